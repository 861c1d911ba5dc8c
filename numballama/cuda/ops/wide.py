"""Linear layers of 33 to 128 tokens by wgmma: how the kernels of `kernels/wide.py` are launched, for `skinny`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...memory import ceil_div
from ...registry import KernelRef
from ..kernels.params import (
    SKINNY_ROWS,
    SKINNY_WARPS,
    WIDE_ROWS,
    WIDE_STAGES,
    WIDE_STEP_COLUMNS,
    WIDE_THREADS,
)
from ..launch import Argument, Array, Launch, LaunchContext, Matrix, named

WIDE = {width: KernelRef("numballama.cuda.kernels.wide", f"wide_{width}_kernel") for width in WIDE_STAGES}
"""Tokens of a block → the kernel for them."""
LEAST = {"f16": 33, "bf16": 33, "int8": 65, "q4_0": 65, "q4_1": 65, "q4_k": 65, "q5_k": 65, "q6_k": 65}
"""Type of a payload → from this number of tokens on, these kernels are faster than `skinny`."""
MOST_SLICES = 8
"""Blocks of a cluster that every device with clusters has."""
MOST = 128
"""Up to this number of tokens they are faster than `wgmma_gemm`."""


@dataclass(frozen=True)
class Division:
    """How W is divided among blocks and warps."""

    k_warps: int
    """Warps of a block that share their rows and divide K; a power of two."""
    slice_steps: int
    """Steps of K of a block: 64 bytes of a row in `skinny`, 64 columns in `wide`."""
    slices: int
    """Blocks that divide K."""
    tiles: int
    """Tiles of rows; a tile is what the warps of a block have."""

    @property
    def row_warps(self) -> int:
        """Groups of 32 rows of a tile."""
        return SKINNY_WARPS // self.k_warps


def wanted(ctx: LaunchContext, tokens: int, payload: str) -> bool:
    """Whether the device has wgmma, and it is the faster way for so many tokens and this type of weight."""
    return ctx.wgmma and LEAST.get(payload, MOST + 1) <= tokens <= MOST


def width_for(tokens: int) -> int:
    """Tokens of a block."""
    return next((width for width in WIDE if width >= tokens), max(WIDE))


@lru_cache
def divide(groups: int, columns: int, n_sms: int) -> Division:
    """The division of `groups` · 32 rows of `columns` columns that takes the least time at 128 tokens, by a model."""
    tiles, steps = ceil_div(groups, WIDE_ROWS // SKINNY_ROWS), ceil_div(columns, WIDE_STEP_COLUMNS)
    k_warps = SKINNY_WARPS * SKINNY_ROWS // WIDE_ROWS  # which share 32 rows, as in `skinny`
    candidates = []
    for wanted in range(1, min(MOST_SLICES, steps) + 1):
        each = ceil_div(steps, wanted)
        slices = ceil_div(steps, each)
        multiplied = 0.3 * ceil_div(tiles * slices, n_sms) * (each + 2)  # us
        division = Division(k_warps, each, slices, tiles)
        candidates.append((multiplied, division))
    return min(candidates, key=lambda pair: pair[0])[1]


def launch(
    ctx: LaunchContext, rounded: Array, padded: int, w: Sequence[Matrix], paired: bool, rows: int, kv_rows: int,
    of_x: Mapping[str, Argument], of_results: Mapping[str, Argument], division: Division, token_tiles: int, units: int,
) -> Launch:  # fmt: skip
    """The launch of a weight, of a gate and up (`paired`), or of queries, keys and values.

    `of_x` are the arguments about X after `padded`, `of_results` those about what is written.
    """
    width = 8 * units
    arguments = named(
        tokens=ctx.tokens, rounded=rounded, padded=padded, **of_x, w0=w[0].payload, w1=w[1].payload, w2=w[2].payload,
        stride=w[0].stride, s0=w[0].scales, s1=w[1].scales, s2=w[2].scales, scale_stride=w[0].scale_stride,
        shift=w[0].shift, paired=int(paired), rows=rows, kv_rows=kv_rows, **of_results, slices=division.slices,
        steps=division.slice_steps,
        row_steps=ceil_div(w[0].shape[1], WIDE_STEP_COLUMNS), stages=WIDE_STAGES[width], bias=0x64006400,
    )  # fmt: skip
    shared = 1024 + WIDE_STAGES[width] * (WIDE_ROWS + width) * 2 * WIDE_STEP_COLUMNS
    grid = division.tiles, token_tiles, division.slices
    return Launch(WIDE[width], grid, WIDE_THREADS, arguments, shared, cluster=division.slices)
