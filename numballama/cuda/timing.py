"""Time the steps of a program on a GPU.

Steps of equal kind are measured together: the launches of all layers are captured as one graph. So no weight is read
twice, and each kernel starts before the previous one has ended, as in a real step. A whole step runs before each
measurement, so that caches have the content that they have in a real step.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from ..memory import ceil_div
from .driver import CudaGraph, Stopwatch

if TYPE_CHECKING:
    from .program import CudaProgram

ROUNDS = 9
SMALL_BYTES = 1 << 20
"""A step that moves fewer bytes is repeated within a measurement, because its data is in a cache in a real step too."""
SMALL_REPEATS = 24
WHOLE_STEPS = 10
"""Number of whole steps in one measurement."""
SHORTEST_S = 1e-9
"""Lower bound of a step's time in seconds, so that a rate computed from it is finite."""


def time_steps(
    program: CudaProgram, kinds: Sequence[Hashable], nbytes: Sequence[int], tokens: int = 1
) -> tuple[list[float], float]:
    """Seconds of each step and of the whole run, for the first `tokens` tokens of the inputs; medians.

    Steps of equal kind get their mean. `nbytes` are the bytes that each step must move.
    """
    device = program.backend.device
    watch = Stopwatch(device)
    program.run(tokens)  # sends the inputs to the device, where they stay
    step_launches = program.launches_of_run(tokens)
    whole = CudaGraph(device, [launch for launches in step_launches for launch in launches])

    def median(indices: Sequence[int]) -> float:
        """Median seconds of these steps. The device is busy while they are queued, so host time is not included."""
        graph = CudaGraph(device, [launch for index in indices for launch in step_launches[index]])

        def once() -> float:
            whole.replay()
            return watch.measure(graph.replay)

        once()
        return statistics.median(once() for _ in range(ROUNDS))

    groups: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    smallest = min(range(len(nbytes)), key=nbytes.__getitem__)
    one, many = median([smallest]), median([smallest] * 33)
    replay_s = max(0.0, one - (many - one) / 32)  # the overhead of a replay
    times = [0.0] * len(kinds)
    for indices in groups.values():
        repeats = ceil_div(SMALL_REPEATS, len(indices)) if nbytes[indices[0]] < SMALL_BYTES else 1
        each = (median(indices * repeats) - replay_s) / (len(indices) * repeats)
        for index in indices:
            times[index] = max(each, SHORTEST_S)

    def whole_steps() -> None:
        for _ in range(WHOLE_STEPS):
            whole.replay()

    whole_steps()
    return times, statistics.median(watch.measure(whole_steps) for _ in range(ROUNDS)) / WHOLE_STEPS
