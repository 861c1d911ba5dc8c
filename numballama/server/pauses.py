"""`Pauses`: many tasks that wait, and few timers."""

from __future__ import annotations

import asyncio
import math

STEP_S = 0.002
"""Pauses end at multiples of this, so that those of many tasks end together."""


class Pauses:
    """Timers like those of `asyncio.sleep`, a little late. Tasks whose pauses end together share one: one for each task
    costs as much as all the rest of a pause. For one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}
        """Who waits, by the end of the pause in `STEP_S`."""

    def start(self, seconds: float) -> asyncio.Future[None]:
        """A future that is set after this many seconds, at most `STEP_S` late. Others may set it earlier."""
        loop = asyncio.get_running_loop()
        end = math.ceil((loop.time() + seconds) / STEP_S)
        waiting = self._waiting.get(end)
        if waiting is None:
            waiting = self._waiting[end] = []
            loop.call_at(end * STEP_S, self._end, end)
        future = loop.create_future()
        waiting.append(future)
        return future

    def _end(self, end: int) -> None:
        for future in self._waiting.pop(end):
            if not future.done():  # the pause may have ended early, or its task been cancelled
                future.set_result(None)
