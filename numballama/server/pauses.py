"""`Pauses`: many tasks that wait, and few timers."""

from __future__ import annotations

import asyncio
import math

STEP_S = 0.002
"""Pauses end at multiples of this, so that those of many tasks end together."""


class Pauses:
    """Waits like `asyncio.sleep`, a little longer. Tasks whose pauses end together share a timer: one for each task
    costs as much as all the rest of a pause. For one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}
        """Who waits, by the end of the pause in `STEP_S`."""

    async def wait(self, seconds: float) -> None:
        """Return after so many seconds, or up to `STEP_S` later."""
        loop = asyncio.get_running_loop()
        end = math.ceil((loop.time() + seconds) / STEP_S)
        waiting = self._waiting.get(end)
        if waiting is None:
            waiting = self._waiting[end] = []
            loop.call_at(end * STEP_S, self._end, end)
        future = loop.create_future()
        waiting.append(future)
        await future

    def _end(self, end: int) -> None:
        for future in self._waiting.pop(end):
            if not future.done():  # its task may have been cancelled
                future.set_result(None)
