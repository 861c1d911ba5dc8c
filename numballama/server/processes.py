"""`serve_by_processes`: HTTP in processes of their own, so that this one only runs the engine.

This process accepts connections and hands each to the next process for HTTP, starts a process again that has ended, and
adds up what they count. The others end when this one does, however that was: their sockets say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..errors import Error
from ..host.child import can_start_python, python_environment
from .engine_host import EngineHost
from .link import Head, Link, SharedCounts, pack
from .loader import ModelLoader
from .metrics import Summed, process_figures
from .run import (
    CANCELLED_WITHIN_S,
    LOADED_WITHIN_S,
    Address,
    allow_files,
    check_tls,
    curl_line,
    listen,
    prepare_log,
    protected,
    rare_collections,
)
from .service import log
from .settings import Settings

if TYPE_CHECKING:
    from ..model import Model

HTTP_PROCESS = f"{__package__}.http_process"
"""The module that a process for HTTP runs."""
LOOK_S = 0.1
"""Seconds between two looks at the processes."""
MOST_STARTS = 3
"""Starts in a row of a process that ends before it answers requests, after which the server ends."""
COUNTED_WITHIN_S = 2.0
"""Seconds in which a process says what it has counted. Then what it said before counts."""
MOST_SILENT_LOOKS = 300
"""Looks after which a process that has given no sign of life is killed. While this one is stopped, it does not look."""
ASKED_EVERY = 10
"""Looks between two questions for a sign of life."""
ENDED_WITHIN_S = 3.0
"""Seconds that a process may take to end besides the time for requests. Then it is killed."""


@dataclass
class HttpProcess:
    """A process for HTTP, and those before it in its place."""

    index: int
    process: subprocess.Popen[bytes]
    link: Link
    handoff: socket.socket
    """Where connections are handed over."""
    thread: threading.Thread | None = None
    """What answers its messages."""
    is_up: bool = False
    """Whether it takes connections."""
    is_ready: bool = False
    """Whether it answers requests."""
    silent_looks: int = 0
    """Looks since its latest sign of life."""
    starts: int = 1
    """Starts since one has become ready."""
    counted: str = ""
    """What it has counted, as far as is known, in Prometheus' text format."""
    before: str = ""
    """What those before it have counted."""


@dataclass
class Scrape:
    """A question of one process for what all have counted."""

    number: int
    link: Link
    ask: int
    waits_for: set[int]
    until: float = field(default_factory=lambda: time.monotonic() + COUNTED_WITHIN_S)


class HttpProcesses:
    """Starts and watches processes for HTTP. `run` returns when all have ended after `drain`."""

    def __init__(self, count: int, first: Head, settings: Settings, listener: socket.socket) -> None:
        self._first, self._settings, self._listener = first, settings, listener
        self.host = EngineHost(settings, self._other_message)
        self._lock = threading.Lock()  # of what links and the main thread change
        self._scrapes: dict[int, Scrape] = {}  # by their numbers, those that wait for processes
        self._numbers = itertools.count()
        self._next = self._looks = self._restarts = 0
        self._signals = 0
        self._drains = False
        self._deadline: float | None = None
        self.error: Error | None = None
        """Why the server ends."""
        self._memory = _shared_memory(SharedCounts.size(count))
        self._counts = SharedCounts(self._memory, 0, count)
        self._processes = [self._start(index, count) for index in range(count)]
        for each in self._processes:
            self._listen(each)

    def _start(self, index: int, count: int) -> HttpProcess:
        ours, theirs = socket.socketpair()
        handoff, far = socket.socketpair()
        handoff.setblocking(False)  # Python up to 3.12 does not pass flags on
        files = [theirs.fileno(), far.fileno(), self._memory]
        words = [*map(str, files), str(index), str(count)]
        with theirs, far:
            process = subprocess.Popen(
                [sys.executable, "-m", HTTP_PROCESS, *words], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                env=python_environment(), pass_fds=files, start_new_session=True,  # Ctrl-C is for this process
            )  # fmt: skip
        link = Link(ours, f"http-{index}-{process.pid}")
        link.send(pack(self._first))
        return HttpProcess(index, process, link, handoff)

    def _listen(self, each: HttpProcess) -> None:
        """Answer its messages from now on."""
        name = f"numballama {each.link.name}"
        each.thread = threading.Thread(target=self.host.serve, args=(each.link,), name=name, daemon=True)
        each.thread.start()

    @property
    def all_ready(self) -> bool:
        """Whether each process answers requests."""
        return all(each.is_ready for each in self._processes)

    def drain(self) -> None:
        """Let running requests end, and then all processes."""
        self._drains = True

    def run(self, on_ready: Callable[[], None]) -> None:
        """Accept connections until all processes have ended after `drain`. `on_ready`: all answer requests."""
        announced, look = False, 0.0
        with self._handled_signals():
            while True:
                takes = any(each.is_up for each in self._processes)
                if select.select([self._listener] if takes else [], [], [], LOOK_S)[0]:
                    self._accept()
                if time.monotonic() < look:
                    continue
                look = time.monotonic() + LOOK_S
                if self._drains and self._deadline is None:
                    self._begin_to_drain()
                self._look()
                if not announced and self.all_ready:
                    announced = True
                    on_ready()
                if self._deadline is not None and all(each.process.poll() is not None for each in self._processes):
                    return

    @contextlib.contextmanager
    def _handled_signals(self) -> Iterator[None]:
        """The first signal begins to drain, the second ends at once."""

        def handle(number: int, frame: object) -> None:
            self._signals += 1
            self._drains = True

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _accept(self) -> None:
        """Hand a connection to the next process that takes it."""
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has been torn, or there are too many files
            time.sleep(0.001)
            return
        with connection:
            turn = self._processes[self._next :] + self._processes[: self._next]
            for each in sorted(turn, key=lambda each: not each.is_ready):  # others say 503
                if each.is_up and each.process.poll() is None:
                    with contextlib.suppress(OSError):  # it has ended, or is slow
                        socket.send_fds(each.handoff, [b"+"], [connection.fileno()])
                        self._next = (each.index + 1) % len(turn)
                        return

    def _begin_to_drain(self) -> None:
        self.host.draining = True
        self._deadline = time.monotonic() + self._settings.drain_s + CANCELLED_WITHIN_S + ENDED_WITHIN_S
        for each in self._processes:
            each.link.send(pack({"drain": True}))

    def _look(self) -> None:
        """Start processes again that have ended, and end those that should have."""
        now = time.monotonic()
        self._looks += 1
        if self._signals > 1:
            self._signals = 1
            self._deadline = now + CANCELLED_WITHIN_S + ENDED_WITHIN_S
            for each in self._processes:
                each.link.send(pack({"exit": True}))
        for each in self._processes:
            if self._deadline is not None and now >= self._deadline:
                each.process.kill()
            elif self._deadline is None and (each.process.poll() is not None or each.link.closed):
                self._start_again(each)
            elif self._deadline is None and each.is_up:
                self._ask_for_life(each)
        with self._lock:
            for scrape in [each for each in self._scrapes.values() if now >= each.until]:
                scrape.waits_for.clear()
                self._finish(scrape)

    def _ask_for_life(self, each: HttpProcess) -> None:
        """Kill a process that hangs: another one is then started."""
        if self._looks % ASKED_EVERY == 0:
            each.link.send(pack({"alive": True}))
        each.silent_looks += 1
        if each.silent_looks == MOST_SILENT_LOOKS:
            log.error("a process for HTTP hangs: it is killed")
            each.process.kill()

    def _end(self, each: HttpProcess) -> int:
        """End a process at once. Returns its exit code."""
        each.process.kill()
        code = each.process.wait()
        each.link.close()
        each.handoff.close()
        if each.process.stdin is not None:
            each.process.stdin.close()
        if each.thread is not None:
            each.thread.join()
        return code

    def close(self) -> None:
        """End all processes that are left, at once."""
        for each in self._processes:
            self._end(each)
        self._counts.close()
        os.close(self._memory)

    def _start_again(self, each: HttpProcess) -> None:
        code = self._end(each)
        self._counts.clear(each.index)
        if not each.is_ready and each.starts >= MOST_STARTS:
            self.error = Error(f"a process for HTTP ends before it answers requests, with exit code {code}")
            self.drain()
            return
        log.error("a process for HTTP has ended with exit code %d: another one is started", code)
        new = self._start(each.index, len(self._processes))
        new.starts = 1 if each.is_ready else each.starts + 1
        with self._lock:
            self._restarts += 1
            new.before = Summed([each.before, each.counted]).text().decode()
            self._processes[each.index] = new
            for scrape in tuple(self._scrapes.values()):
                scrape.waits_for.discard(each.index)
                self._finish(scrape)
        self._listen(new)

    def _other_message(self, link: Link, head: Head) -> None:
        """What a process says that is not for the engine."""
        each = next((each for each in self._processes if each.link is link), None)
        if each is None:  # it has ended
            return
        with self._lock:
            if head["do"] == "up":
                each.is_up = True
            elif head["do"] == "ready":
                each.is_ready, each.starts = True, 1
            elif head["do"] == "alive":
                each.silent_looks = 0
            elif head["do"] == "figures":
                up = [one for one in self._processes if one.is_up and not one.link.closed]
                number = next(self._numbers)
                self._scrapes[number] = Scrape(number, link, head["ask"], {one.index for one in up})
                for one in up:
                    one.link.send(pack({"figures": number}))
            elif head["do"] == "counted":
                each.counted = head["text"]
                if (scrape := self._scrapes.get(head["of"])) is not None:
                    scrape.waits_for.discard(each.index)
                    self._finish(scrape)

    def _finish(self, scrape: Scrape) -> None:
        """Answer, if all have said what they counted. The lock is held."""
        if not scrape.waits_for:
            del self._scrapes[scrape.number]
            texts = [text for each in self._processes for text in (each.before, each.counted) if text]
            texts.append(process_figures(sum(each.is_ready for each in self._processes), self._restarts))
            scrape.link.send(pack({"answer": scrape.ask, "texts": texts}))


def _shared_memory(size: int) -> int:
    """The descriptor of memory of zeros, which other processes inherit."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("numballama")
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    os.ftruncate(file, size)
    return file


def serve_by_processes(
    load: Callable[[], Model],
    settings: Settings,
    address: Address,
    count: int,
    *,
    log_json: bool = False,
    show: Callable[[str], None] = print,
) -> None:
    """As `run.serve`, with `count` processes for HTTP."""
    if not can_start_python():
        raise Error(f"processes for HTTP need Python, and {sys.executable} is not Python")
    prepare_log(log_json)
    allow_files()
    settings = protected(settings, address)
    check_tls(address)
    listener = listen(address)
    listener.setblocking(False)
    url = replace(address, port=listener.getsockname()[1]).url
    as_json = {"settings": dataclasses.asdict(settings), "address": dataclasses.asdict(address)}
    show(f"loading the model; {url}/health says when it is ready")
    processes = HttpProcesses(count, {**as_json, "log_json": log_json}, settings, listener)
    model_name = settings.model_name or ""

    def load_anew() -> Model:
        nonlocal model_name
        gc.unfreeze()
        gc.collect()  # what is left of a model before
        model = load()
        gc.collect()
        gc.freeze()
        model_name = settings.model_name or model.path.name
        return model

    def announce() -> None:
        show(f"numballama serves {model_name} at {url}, HTTP by {count} processes")
        show(curl_line(url, settings))

    loader = ModelLoader(load_anew, processes.host, on_error=processes.drain)
    loader.start()
    try:
        with rare_collections():
            processes.run(announce)
    finally:
        processes.host.close()
        processes.close()
        listener.close()
    if not loader.stop(LOADED_WITHIN_S):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if (error := processes.error or loader.error) is not None:
        raise error
