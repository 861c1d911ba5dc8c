"""What neighbouring steps do together: a kernel that only changes the form of what a step before it wrote is left out.

Such a kernel costs 4 µs a layer at 17 to 128 tokens, most of which is its start and its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from ..launch import Argument, Array, Launch, TensorMap, Work
from . import attention, wide

ATTENTION = {kernel for kernels in attention.ROUNDING for kernel in kernels.values()}
"""The kernels of attention that can write their results in 16 bits."""


def join(steps: Sequence[list[Work]]) -> None:
    """Join the launches of all steps of a plan, in place."""
    for step, following in pairwise(steps):
        if step and following:
            _join_sums(step, following)
            _join_rounding(step, following)


def _join_sums(step: list[Work], following: list[Work]) -> None:
    """Where a step ends with sums over ranks, and the next one begins by rounding them, let one kernel do both, at the
    end of the first step. It writes to the memory of the next step, which nothing uses before.
    """
    last, rounding = step[-1], following[0]
    if not (isinstance(last, Launch) and isinstance(rounding, Launch)):
        return
    sums = last.arguments
    if (last.kernel, rounding.kernel) == (wide.ADD_UP, wide.ROUND) and rounding.arguments["x"] == sums["out"]:
        of_ranks = {name: value for name, value in sums.items() if name not in ("tokens", "out", "rows")}
        step[-1] = replace(rounding, kernel=wide.ROUND_SUMS, arguments={**rounding.arguments, **of_ranks})
        del following[0]


def _join_rounding(step: list[Work], following: list[Work]) -> None:
    """Where a linear layer begins by rounding what the step before it wrote, let that step write it rounded, without
    scales, where its results would be.

    The plan must have no other reader of these results: fusions leave none.
    """
    rounding = following[0]
    if not isinstance(rounding, Launch) or rounding.kernel != wide.ROUND or rounding.arguments["normed"]:
        return
    x, rounded = rounding.arguments["x"], rounding.arguments["rounded"]
    linear = following[1]
    assert isinstance(x, Array) and isinstance(rounded, Array) and isinstance(linear, Launch)
    x_map = linear.arguments["x_map"]
    assert isinstance(x_map, TensorMap) and linear.arguments["x"] == rounded
    result = Array(x.address, x.shape, rounded.dtype)
    swapped = int(rounding.arguments["pieces"] == 4)
    made = [_writer(work, result, swapped) if _uses(work, x) else work for work in step]
    if x.shape[1] % 8 or made == step or None in made:  # a row is whole groups of 16 bytes, as TMA wants
        return
    step[:] = [work for work in made if work]
    x_map = replace(x_map, address=x.address, shape=x.shape, stride=2 * x.shape[1])
    following[1] = replace(linear, arguments={**linear.arguments, "x": result, "x_map": x_map, "capacity": 0})
    del following[0]


def _uses(work: Work, x: Array) -> bool:
    return not isinstance(work, Launch) or x in work.arguments.values()


def _writer(launch: Work, result: Array, swapped: int) -> Launch | None:
    """A launch that writes its results to `result`; None if it cannot, or if they may not fit the type: results of
    attention are averages of values, those of SwiGLU are of any size.
    """
    if not isinstance(launch, Launch):
        return None
    if launch.kernel in ATTENTION and _fits(launch.arguments["v_cache"], result):
        changed: dict[str, Argument] = {"out": result, "swapped": swapped}
    elif launch.kernel in wide.WIDE.values() and result.dtype == "bf16" and not swapped:
        changed = dict.fromkeys(("q", "k", "v"), result)
    else:
        return None
    made = replace(launch, arguments={**launch.arguments, **changed})
    if launch.long_context_variant is None:
        return made
    start, longer = launch.long_context_variant
    variant = _writer(longer, result, swapped)
    return variant and replace(made, long_context_variant=(start, variant))


def _fits(v_cache: Argument, result: Array) -> bool:
    """Whether averages of a cache's values fit the type of a result."""
    assert isinstance(v_cache, Array)
    return result.dtype == "bf16" or v_cache.dtype == "f16"
