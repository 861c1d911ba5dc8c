"""Time the steps of a program on the CPU."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..backend import Program

ROUNDS, FEWEST = 40, 5
"""Measurements of each step, at most and at least."""
ENOUGH_S = 2.0
"""After this many seconds there are no more than the least."""
SHORTEST_S = 1e-9
"""Lower bound of a step's time in seconds, so that a rate computed from it is finite."""


def time_steps(program: Program, tokens: int = 1) -> tuple[list[float], float]:
    """Seconds of each step and of the whole run, for the first `tokens` tokens of the inputs; medians.

    Every step is a separate call, in order, so caches have the content that they have in a real run. The time of a call
    into compiled code is subtracted.
    """

    def seconds(begin: int, end: int) -> float:
        start = time.perf_counter()
        program.run(tokens, begin, end)
        return time.perf_counter() - start

    count = len(program.graph.ops)
    rounds, wholes, started = list[list[float]](), list[float](), time.perf_counter()
    for number in range(ROUNDS + 1):
        each = [seconds(i, i + 1) for i in range(count)]
        if number:  # the first one reads from memory what the others have in caches
            rounds.append(each)
        wholes.append(seconds(0, count))
        if number >= FEWEST and time.perf_counter() - started > ENOUGH_S:
            break
    entry = statistics.median(seconds(0, 0) for _ in range(ROUNDS))
    steps = [max(statistics.median(times) - entry, SHORTEST_S) for times in zip(*rounds, strict=True)]
    return steps, max(statistics.median(wholes) - entry, SHORTEST_S)
