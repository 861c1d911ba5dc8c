"""What neighbouring steps do together: a kernel that only changes the form of what a step before it wrote is left out.

Such a kernel costs 4 µs a layer at 17 to 128 tokens, most of which is its start and its end, and a prompt's results
would be written, read and written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from ..launch import Argument, Array, Launch, TensorMap, Work
from . import attention, wide
from .rounding import ROUND

ATTENTION = {kernel for kernels in attention.ROUNDING for kernel in kernels.values()}
"""The kernels of attention that can write their results in 16 bits."""
MANY_STORES = {kernel for width, kernel in attention.ATTENTION_WGMMA.items() if width > 64}
"""Those of prompts in which a lane would store two bytes 64 times: a prompt of Llama-2-7B was 4 % slower on an H200."""


def join(steps: Sequence[list[Work]], read_once: Sequence[bool], ones: Callable[[int], Array]) -> None:
    """Join the launches of all steps of a plan, in place. `read_once`: whether only the next step reads what a step
    computes, once. `ones(n)` gives n float32, all 1.
    """
    for (step, following), once in zip(pairwise(steps), read_once, strict=False):
        if step and following:
            _join_sums(step, following)
            if once:
                _join_rounding(step, following, ones)


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


def _join_rounding(step: list[Work], following: list[Work], ones: Callable[[int], Array]) -> None:
    """Where a linear layer begins by rounding what the step before it wrote, let that step write it rounded, without
    scales, where its results would be.
    """
    found = _rounding(following[0])
    if found is None:
        return
    x, rounded, swapped = found
    kernels = {work.kernel for work in [*step, following[0]] if isinstance(work, Launch)}
    if ROUND in kernels and not kernels.isdisjoint(MANY_STORES):
        return
    result = Array(x.address, x.shape, rounded.dtype)
    made = [_writer(work, result, swapped) if _uses(work, x) else work for work in step]
    readers = [_reader(work, rounded, result, ones) if _uses(work, rounded) else work for work in following[1:]]
    written, read = [work for work in made if work], [work for work in readers if work]
    changed = made != step and readers != following[1:]
    if changed and len(written) == len(made) and len(read) == len(readers) and x.shape[1] % 8 == 0:  # 16 bytes, for TMA
        step[:], following[:] = written, read


def _rounding(work: Work) -> tuple[Array, Array, int] | None:
    """What a launch rounds row by row without a norm: (float32, 16 bits, whether columns are swapped)."""
    if not isinstance(work, Launch) or work.kernel not in (wide.ROUND, ROUND) or work.arguments["normed"]:
        return None
    given, by_slices = work.arguments, work.kernel == wide.ROUND
    if not by_slices and (given["split"] or given["every_row"] or given["stride"] != given["columns"]):
        return None
    x, rounded = given["x"], given["rounded" if by_slices else "out"]
    assert isinstance(x, Array) and isinstance(rounded, Array)
    return x, rounded, int(given["pieces"] == 4 if by_slices else bool(given["exchanged"]))


def _reader(work: Work, rounded: Array, result: Array, ones: Callable[[int], Array]) -> Launch | None:
    """A launch that reads X as `result` where this one reads it as `rounded`, with scales; None if it does not come by
    TMA, which knows how long a row is.
    """
    x_map = work.arguments.get("x_map") if isinstance(work, Launch) else None
    if not isinstance(work, Launch) or not isinstance(x_map, TensorMap):
        return None
    assert work.arguments["x"] == rounded
    x_map = replace(x_map, address=result.address, shape=result.shape, stride=2 * result.shape[1])
    scales: dict[str, Argument] = {"scales": ones(result.shape[0])}
    if "x_scales" in work.arguments:  # of each slice and token: capacity 0 gives all slices the same
        scales = {"x_scales": scales["scales"], "squares": scales["scales"], "capacity": 0}
    return replace(work, arguments={**work.arguments, "x": result, "x_map": x_map, **scales})


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
