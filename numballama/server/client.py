"""A request ends when its client is gone or its time is over: `Client`, and `Section`, which can be ended from outside.

Both cancel the task that answers the request. A task of their own for each part of the work would cost more than most
parts do, and so would a timer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

from starlette.types import Receive

from .errors import ApiError

T = TypeVar("T")


LOST = "numballama.lost"
"""Where an ASGI scope may hold a function that takes another one: what to call when the connection is lost."""
WhenLost = Callable[[Callable[[], None]], None]


class ClientGoneError(Exception):
    """The client has closed its connection: nobody reads an answer."""


class Section:
    """A part of the running task, in a `with` block, which `end` cancels: the block then raises an error.

    `end` is for others: callbacks and tasks of the same event loop. The task itself must not call it.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._error: Exception | None = None
        self._cancelled = 0

    def end(self, error: Exception) -> None:
        """Cancel what the task waits for. The first error is raised; nothing happens when the block has ended."""
        if self._task is not None and self._error is None:
            self._error = error
            self._task.cancel()

    def __enter__(self) -> Section:
        self._task = task = asyncio.current_task()
        assert task is not None
        self._cancelled = task.cancelling() if hasattr(task, "cancelling") else 0  # since Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, found: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._error is None or task is None:
            return
        others = hasattr(task, "uncancel") and task.uncancel() > self._cancelled
        if isinstance(found, asyncio.CancelledError) and not others:
            raise self._error from None


class Client:
    """Who waits for the answer to a request. `watch` when its body has been read, and `close` in the end.

    `when_lost`: what the scope holds as `LOST`. Without it a task waits for the end of the connection.
    """

    def __init__(self, receive: Receive, when_lost: WhenLost | None = None) -> None:
        self.gone = False
        """Whether it has closed its connection, as far as `watch` has seen."""
        self._receive, self._when_lost = receive, when_lost
        self._loop = asyncio.get_running_loop()
        self._section: Section | None = None
        self._watching: asyncio.Task[None] | None = None
        self._seconds = self._deadline = math.inf
        self._late: Callable[[float], ApiError] = answer_is_late
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """End what runs when it is gone."""
        if self._when_lost is not None:
            self._when_lost(self._lost)
        else:
            self._watching = asyncio.ensure_future(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._lost()

    def _lost(self) -> None:
        self.gone = True
        if self._section is not None:
            self._section.end(ClientGoneError())

    async def run(
        self, work: Coroutine[Any, Any, T], timeout_s: float, late: Callable[[float], ApiError] | None = None
    ) -> T:
        """The result of `work`, which is cancelled when the client is gone or after `timeout_s`.

        Raises `ClientGoneError`, or what `late` makes of `timeout_s`: `ApiError` 504 unless it is given.
        """
        if self.gone:
            work.close()
            raise ClientGoneError
        with Section() as self._section:
            self._limit(timeout_s, late or answer_is_late)
            return await work

    def _limit(self, seconds: float, late: Callable[[float], ApiError]) -> None:
        """End the section after so many seconds. A timer that rings too early is set again when it does."""
        self._seconds, self._late = seconds, late
        self._deadline = self._loop.time() + seconds
        if self._timer is not None and self._timer.when() <= self._deadline:
            return
        self._stop_timer()
        self._timer = self._loop.call_at(self._deadline, self._ring)

    def _ring(self) -> None:
        assert self._section is not None
        self._timer = None
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._ring)
        else:
            self._section.end(self._late(self._seconds))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        """Watch no longer."""
        self._stop_timer()
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None  # the task refers to this object


def answer_is_late(seconds: float) -> ApiError:
    return ApiError(f"the answer was not complete within {seconds:g} s", 504, code="timeout")


def body_is_late(seconds: float) -> ApiError:
    return ApiError(f"the body did not arrive within {seconds:g} s", 408, code="request_timeout")
