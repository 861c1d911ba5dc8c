"""`Driver`: who steps the engine, and how those who wait for its results are woken."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue

from ..errors import FORKED, DeviceError, Error
from .interrupts import DeferredInterrupt
from .request import RequestState

ENGINE_CLOSED = "this engine is closed"
"""Message of the `Error` that ends requests when their engine is closed."""


class Driver:
    """Lets one thread at a time call `step`.

    Without a thread of its own (inline), whoever waits for a response and finds nobody stepping does it until the
    response is there, then wakes another one who waits. After `start` a thread does it. Nobody polls: a waiting thread
    sleeps on a lock of its own, the engine's on a queue, a coroutine on a future. Each event loop is called once a
    step.

    `has_work` tells whether `step` has anything to do. What `step` raises is for the reader who steps; in the thread it
    is a reason to `fail`.
    """

    def __init__(
        self,
        step: Callable[[], None],
        has_work: Callable[[], bool],
        fail: Callable[[BaseException], None],
        name: str,
    ) -> None:
        self._step, self._has_work, self._fail, self._name = step, has_work, fail, name
        self.lock = threading.Lock()
        """Held for a few instructions at a time, never during a step."""
        self._changed = threading.Condition(self.lock)
        self._listeners = 0  # threads that wait for `_changed`
        self._stepping: int | None = None  # identity of the thread that may call `step`
        self._sleeping: dict[RequestState, None] = {}  # requests whose readers sleep on a lock, in order
        self._awaiting: dict[RequestState, None] = {}  # requests whose readers await a future
        self._users = 0  # those who want the thread
        self._thread: threading.Thread | None = None
        self._idle = False  # whether the thread sleeps until `_bell` rings
        self._bell: SimpleQueue[None] = SimpleQueue()  # the garbage collector may put into it while a lock is held
        self._pausing = 0  # threads that are in `paused` or wait for it
        self._stopping = self.closed = False
        self._pid = os.getpid()

    @property
    def running(self) -> bool:
        """Whether a thread steps the engine."""
        return self._thread is not None

    @property
    def forked(self) -> bool:
        """Whether this process is a forked child: the thread and whoever holds the lock may not exist in it."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raise `DeviceError` in a forked child."""
        if self.forked:
            raise DeviceError(FORKED)

    def wait(self, state: RequestState) -> None:
        """Return when a response of the request is there, or the request has ended. Steps the engine if nobody does."""
        self.check_process()
        while not state.ready:
            with DeferredInterrupt() as interrupt:
                if self._drive(state, interrupt):
                    return
            self._sleep(state)

    def _drive(self, state: RequestState, interrupt: DeferredInterrupt) -> bool:
        """Step until the request is ready. False: another thread steps."""
        with self.lock:
            self._check_callback()
            if not self._nobody_steps:
                return state.ready
            self._stepping = threading.get_ident()
        try:
            while not (state.ready or interrupt.arrived or self._thread is not None or self.closed or self._pausing):
                self._step()
        finally:
            self._stop_stepping()
        return state.ready

    @property
    def _nobody_steps(self) -> bool:
        """Whether a reader may step. The lock is held."""
        return self._stepping is None and self._thread is None and not (self.closed or self._pausing)

    def _check_callback(self) -> None:
        if self._stepping == threading.get_ident():
            raise Error(
                "a callback cannot wait for responses, stop or close: it runs in the thread that steps the engine"
            )

    def notify(self) -> None:
        """Tell the engine's thread, and those who wait for their turn, that something has changed. The lock is held."""
        if self._listeners:
            self._changed.notify_all()
        if self._idle:
            self._idle = False
            self._bell.put(None)

    def _listen(self) -> None:
        """Wait for `notify`. The lock is held."""
        self._listeners += 1
        try:
            self._changed.wait()
        finally:
            self._listeners -= 1

    def _stop_stepping(self) -> None:
        """Let another thread step. Does nothing in a forked child, which may leave a block of its parent's."""
        if self.forked:
            return
        with self.lock:
            self._stepping = None
            self._pass_on()

    def _pass_on(self) -> None:
        """Wake somebody who can step, if nobody does. The lock is held."""
        if self._stepping is None:
            self.notify()
            if self._sleeping and self._nobody_steps:
                _wake(self._sleeping, next(iter(self._sleeping)))

    def _sleep(self, state: RequestState) -> None:
        """Sleep until the request is ready or nobody steps."""
        waiter = threading.Lock()
        waiter.acquire()
        try:
            with DeferredInterrupt(), self.lock:
                if state.ready or self._nobody_steps:
                    return
                _check_reader(state)
                state.waiter = waiter
                self._sleeping[state] = None
            waiter.acquire()
        finally:
            with DeferredInterrupt(), self.lock:
                if state.waiter is waiter:
                    del self._sleeping[state]
                    state.waiter = None
                if state.ready or sys.exc_info()[0] is not None:
                    self._pass_on()  # it may have been woken to step, and will not

    async def wait_async(self, state: RequestState) -> None:
        """Like `wait`, for a coroutine. Starts the engine's thread."""
        self.check_process()
        loop = asyncio.get_running_loop()
        if self._thread is None:
            self.start()
        future = loop.create_future()
        with self.lock:
            self._check_callback()
            if state.ready:
                return
            _check_reader(state)
            if self._thread is None or self._stopping:
                return  # it ends just now: the reader asks again, and starts another
            state.waiter = loop, future
            self._awaiting[state] = None
        await future

    async def pause(self, state: RequestState, future: asyncio.Future[None]) -> None:
        """Return when a future of the running loop is set. It is set when the request has ended, if not before."""
        waiter = asyncio.get_running_loop(), future
        with self.lock:
            if state.done:
                return
            _check_reader(state)
            state.waiter, state.pausing = waiter, True
        try:
            await future
        finally:
            with self.lock:
                state.pausing = False
                if state.waiter is waiter:
                    state.waiter = None

    def wake(self, states: Iterable[RequestState]) -> None:
        """Wake the readers of requests that have something to read: one call for each event loop."""
        loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        with self.lock:
            for state in states:
                if state.waiter is None or (state.pausing and not state.done):
                    continue
                if isinstance(state.waiter, tuple):
                    loop, future = state.waiter
                    state.waiter = None
                    self._awaiting.pop(state, None)
                    loops.setdefault(loop, []).append(future)
                else:
                    _wake(self._sleeping, state)
        for loop, futures in loops.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(_resolve, futures)

    def enter(self) -> None:
        """Step in a thread as long as somebody who has entered has not left."""
        self.check_process()
        with self.lock:
            self._users += 1
        try:
            self.start()
        except BaseException:
            with self.lock:
                self._users -= 1
            raise

    def leave(self) -> None:
        """End the thread if nobody else has entered. Does nothing in a forked child."""
        if self.forked:
            return
        with self.lock:
            self._users -= 1
        self._stop(unless_used=True)

    def start(self) -> None:
        """Step in a thread from now on."""
        self.check_process()
        with self.lock:
            while self._stopping and self._thread is not threading.current_thread():
                self._listen()
        with DeferredInterrupt(), self.lock:
            if self._thread is not None or self.closed:
                return
            self._idle, self._bell = False, SimpleQueue()
            bell = self._bell
            me = weakref.ref(self, lambda _: bell.put(None))
            thread = threading.Thread(target=_run, args=(me, bell), name=self._name, daemon=True)
            self._thread = thread
            try:
                thread.start()
            except Exception as error:  # a limit of the system
                self._thread = None
                raise DeviceError(f"the engine's thread does not start: {error}") from error

    def _run_while_there_is_work(self) -> bool:
        """What the thread does when it is woken. False: it is to end."""
        while True:
            with self.lock:
                if self._stopping:
                    return False
                if self._stepping is not None or self._pausing or not self._has_work():
                    self._idle = True
                    return True
                self._stepping = threading.get_ident()
            try:
                while self._has_work() and not (self._stopping or self._pausing):
                    self._step()
            except BaseException as error:
                self._fail(error)
            finally:
                self._stop_stepping()

    def stop(self) -> None:
        """End the thread after its step. Requests go on as soon as somebody waits for them. Not in a forked child."""
        self._stop(unless_used=False)

    def _stop(self, unless_used: bool) -> None:
        if self.forked:
            return
        with DeferredInterrupt(), self.lock:
            self._check_callback()
            thread = self._thread
            if thread is None or (unless_used and self._users > 0):
                return
            self._stopping = True
            self.notify()
        with self.lock:
            while self._thread is thread:
                self._listen()  # `join` would take the thread for ended after Ctrl-C (CPython up to 3.12)
        thread.join()

    def _end(self) -> None:
        """What the thread does last: whoever asked for its end may not wait for it any more, after Ctrl-C."""
        with self.lock:
            self._thread, self._stopping = None, False
            self.notify()
            self._pass_on()
            left = tuple(self._awaiting)
        self.wake(left)  # they ask again, and start another thread

    def close(self) -> None:
        """Let nobody step any more, and wait until nobody does."""
        with DeferredInterrupt(), self.lock:
            self._check_callback()
            self.closed = True
            self.notify()
        self.stop()
        with self.lock:
            while self._stepping is not None:
                self._listen()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nobody else steps during the block."""
        self.check_process()
        entered = False
        try:
            with self.lock:
                self._check_callback()
                self._pausing += 1
                try:
                    while self._stepping is not None:
                        self._listen()
                    if self.closed:
                        raise Error(ENGINE_CLOSED)
                    entered, self._stepping = True, threading.get_ident()
                finally:
                    self._pausing -= 1
                    self._pass_on()  # others may have waited for the end of a pause that never came
            yield
        finally:
            if entered:
                self._stop_stepping()


def _run(driver: weakref.ref[Driver], bell: SimpleQueue[None]) -> None:
    """The engine's thread. It holds no reference while it sleeps, and ends when the engine has been collected."""
    found = driver()
    try:
        while found is not None and found._run_while_there_is_work():
            found = None
            bell.get()
            found = driver()
    finally:
        if found is not None:
            found._end()


def _check_reader(state: RequestState) -> None:
    """Raise `Error` if somebody else waits for the request's responses."""
    waiter = state.waiter
    gone = isinstance(waiter, tuple) and (waiter[1].done() or waiter[0].is_closed())
    if waiter is not None and not gone:
        raise Error(f"request {state.id} is read by two readers at the same time; let one read its responses")


def _wake(sleeping: dict[RequestState, None], state: RequestState) -> None:
    """Wake a thread that sleeps for a request's response."""
    del sleeping[state]
    waiter, state.waiter = state.waiter, None
    assert waiter is not None and not isinstance(waiter, tuple)
    waiter.release()


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
