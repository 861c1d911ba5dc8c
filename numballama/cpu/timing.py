"""Time the steps of a program on the CPU."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..backend import Program

ROUNDS = 40
SHORTEST_S = 1e-9
"""Lower bound of a step's time in seconds, so that a rate computed from it is finite."""


def time_steps(program: Program) -> tuple[list[float], float]:
    """Seconds of each step and of the whole run, for one token; medians.

    Every step is a separate call, in order, so caches have the content that they have in a real run. The time of a call
    into compiled code is subtracted.
    """

    def seconds(begin: int, end: int) -> float:
        start = time.perf_counter()
        program.run(1, begin, end)
        return time.perf_counter() - start

    count = len(program.graph.ops)
    rounds = [[seconds(i, i + 1) for i in range(count)] for _ in range(ROUNDS + 1)][1:]
    entry = statistics.median(seconds(0, 0) for _ in range(ROUNDS))
    whole = statistics.median(seconds(0, count) for _ in range(ROUNDS))
    steps = [max(statistics.median(times) - entry, SHORTEST_S) for times in zip(*rounds, strict=True)]
    return steps, max(whole - entry, SHORTEST_S)
