"""A request ends when its client is gone or its time is over: `Client`, and `Section`, which can be ended from outside.

Both cancel the task that answers the request. A task of their own for each part of the work would cost more than most
parts do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

from starlette.types import Receive

from .errors import ApiError

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has closed its connection: nobody reads an answer."""


class Section:
    """A part of the running task, in a `with` block, which `end` cancels: the block then raises an error.

    `end` is for others: callbacks and tasks of the same event loop. The task itself must not call it.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None
        self._cancelled = 0

    def limit(self, seconds: float, error: Exception) -> None:
        """End it after so many seconds."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self.end, error)

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
        if self._timer is not None:
            self._timer.cancel()
        if self._error is None or task is None:
            return
        others = hasattr(task, "uncancel") and task.uncancel() > self._cancelled
        if isinstance(found, asyncio.CancelledError) and not others:
            raise self._error from None


class Client:
    """Who waits for the answer to a request whose body has been read. `close` when nothing more is read from it."""

    def __init__(self, receive: Receive) -> None:
        self.gone = False
        self._section: Section | None = None
        self._watch = asyncio.ensure_future(self._wait(receive))

    async def _wait(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self._section is not None:
            self._section.end(ClientGoneError())

    async def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """The result of `work`, which is cancelled when the client is gone or after `timeout_s`.

        Raises `ClientGoneError`, or `ApiError` 504.
        """
        if self.gone:
            work.close()
            raise ClientGoneError
        with Section() as section:
            self._section = section
            section.limit(
                timeout_s, ApiError(f"the answer was not complete within {timeout_s:g} s", 504, code="timeout")
            )
            return await work

    def close(self) -> None:
        """Watch no longer."""
        self._watch.cancel()
