"""An engine on a `FakeRunner`, for tests of threads: what its requests yield, and how a test waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from numballama.engine.engine import Engine
from tests.helpers.engine_machine import check_engine
from tests.helpers.fake_runner import FakeRunner, expected

PATIENCE = 120
"""Seconds after which what a test waits for is taken to hang."""


def make_engine(**options: Any) -> tuple[Engine, FakeRunner]:
    runner = FakeRunner(**{"max_sequences": 8, "max_tokens": 32, "pages": 60, **options})
    return Engine(runner), runner


def alone(prompt: list[int], count: int = 8) -> list[int]:
    return expected(prompt, count, 1000)


def settle(engine: Engine, runner: FakeRunner) -> None:
    """Stop the thread, finish what is in flight, and check the books."""
    engine.stop()
    while engine._has_work():
        engine._step()
    check_engine(engine, runner)
    assert engine.stats().pages_used == 0


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
