"""Pauses of many tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from numballama.server.pauses import STEP_S, Pauses


class Clock(asyncio.SelectorEventLoop):
    """A loop with a time of its own, which counts its timers."""

    now, timers = 100.0, 0

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, **options: Any) -> asyncio.TimerHandle:
        self.timers += 1
        return super().call_at(when, callback, *args, **options)


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_pauses_that_end_together_share_a_timer() -> None:
    """None ends early. A task that is cancelled keeps no other one waiting."""

    async def work() -> None:
        pauses = Pauses()
        tasks = [pauses.start(0.1) for _ in range(10)]
        later = pauses.start(0.1 + 2 * STEP_S)
        await turn()
        assert loop.timers == 2
        tasks[0].cancel()
        loop.now += 0.0999
        await turn()
        assert not any(task.done() for task in tasks[1:])
        loop.now = 100.1 + STEP_S
        await turn()
        assert all(task.done() for task in tasks) and tasks[0].cancelled() and not later.done()
        loop.now += 2 * STEP_S
        await later

    loop = Clock()
    try:
        loop.run_until_complete(work())
    finally:
        loop.close()


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_pause_that_is_over_ends(seconds: float) -> None:
    async def work() -> None:
        await asyncio.wait_for(Pauses().start(seconds), 30)

    asyncio.run(work())
