"""Times of steps, from a program and a clock that the test controls."""

from __future__ import annotations

from typing import Any

import pytest

from numballama.cpu import timing


class Program:
    """Three steps of 1, 2 and 4 µs; entering compiled code takes half a microsecond."""

    costs = (1e-6, 2e-6, 4e-6)

    def __init__(self) -> None:
        self.now = 0.0
        self.graph: Any = type("Graph", (), {"ops": [None] * len(self.costs)})
        self.tokens: set[int] = set()

    def run(self, tokens: int, begin: int, end: int) -> None:
        self.tokens.add(tokens)
        self.now += 0.5e-6 + sum(self.costs[begin:end])


def test_the_time_of_entering_is_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: program.now)
    steps, whole = timing.time_steps(program)  # type: ignore[arg-type]
    assert steps == pytest.approx(Program.costs) and whole == pytest.approx(sum(Program.costs))
    assert program.tokens == {1}


def test_a_step_takes_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate can be computed from what is too short for the clock."""
    program = Program()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 0.0)
    steps, whole = timing.time_steps(program)  # type: ignore[arg-type]
    assert min(*steps, whole) == timing.SHORTEST_S


def test_a_run_of_many_tokens_is_measured_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    program, counts = Program(), {1: 0, 100: 0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: program.now)
    run = program.run

    def counted(tokens: int, begin: int, end: int) -> None:
        counts[tokens] += begin == 0 and end == 3
        run(tokens, begin, end)
        program.now += (tokens - 1) * (end - begin) * 1e-2

    program.run = counted  # type: ignore[method-assign]
    timing.time_steps(program)  # type: ignore[arg-type]
    steps, whole = timing.time_steps(program, 100)  # type: ignore[arg-type]
    assert counts == {1: timing.ROUNDS + 1, 100: timing.FEWEST + 1}
    assert steps == pytest.approx([cost + 0.99 for cost in Program.costs]) and whole == pytest.approx(2.97 + 7e-6)
