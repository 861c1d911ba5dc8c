"""Linear layers of 17 to 128 tokens by wgmma: how the kernels of `kernels/wide.py` are launched, for `skinny`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...memory import ceil_div
from ...registry import KernelRef
from ..kernels.params import (
    SKINNY_UNIT,
    WIDE_CONSUMERS,
    WIDE_HELPERS,
    WIDE_LOADERS,
    WIDE_ROWS,
    WIDE_STEP_COLUMNS,
    WIDE_WIDTHS,
)
from ..launch import Argument, Array, Launch, LaunchContext, Matrix, TensorMap, named
from .collectives import Sums

WIDE = {width: KernelRef("numballama.cuda.kernels.wide", f"wide_{width}_kernel") for width in WIDE_WIDTHS}
"""Tokens of a block → the kernel for them."""
SEND = {width: KernelRef("numballama.cuda.kernels.wide", f"wide_{width}_send_kernel") for width in WIDE_WIDTHS}
"""The same, whose results are sent to all ranks."""
ADD_UP = KernelRef("numballama.cuda.kernels.linear_sums", "add_up_rows_kernel")
ROUND, ROUND_SUMS = (
    KernelRef("numballama.cuda.kernels.skinny_x", f"wide_round_{name}kernel") for name in ("", "sums_")
)  # fmt: skip
LEAST = {"f16": 17, "bf16": 17, "int8": 33, "q4_0": 33, "q4_1": 33, "q4_k": 33, "q5_k": 33, "q6_k": 33}
"""Type of a payload → from this number of tokens on, these kernels are faster than `skinny`."""
MOST = 128
"""Up to this number of tokens they are faster than `wgmma_gemm`."""
MOST_STEPS = 2 * 8 * 1024 // WIDE_STEP_COLUMNS
"""Steps of the longest slice: a thread rounds two pieces of 8 columns of it."""
MOST_COLUMNS = 8 * MOST_STEPS * WIDE_STEP_COLUMNS
TILE_STEPS, SLICE_STEPS = 1.5, 2
"""What the end of a tile costs, and each slice, in steps of 64 columns."""
FIT = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 8: 15}
"""Blocks of a cluster → clusters that run at once on an H200, of 132 multiprocessors in groups of unequal sizes."""
COLUMN_BYTES = 2 * WIDE_STEP_COLUMNS
BYTES_BESIDE = 12 << 10
"""Shared memory of a multiprocessor that is left to the small kernels before and after, where weights are quantised.
They wait there while a weight is multiplied, and while they run the next weight's first bytes come. Weights in 16 bits
gain more from another stage of the ring.
"""


@dataclass(frozen=True)
class Division:
    """How K is divided among the blocks of a cluster."""

    slice_steps: int
    """Steps of 64 columns of a block; the last may have fewer."""
    slices: int

    @property
    def slice_columns(self) -> int:
        """Columns of a block; the last may have fewer."""
        return self.slice_steps * WIDE_STEP_COLUMNS


def wanted(ctx: LaunchContext, tokens: int, payload: str, columns: int) -> bool:
    """Whether the device has wgmma, and it is the faster way for so many tokens and this type of weight."""
    return ctx.wgmma and LEAST.get(payload, MOST + 1) <= tokens <= MOST and columns <= MOST_COLUMNS


def width_for(tokens: int) -> int:
    """Tokens of a block."""
    return next((width for width in WIDE if width >= tokens), max(WIDE))


def tiles_of(rows: int, kv_rows: int, paired: bool) -> tuple[int, int]:
    """Tiles of the first weight, with those of up if `paired`, and of each of two more."""
    return ceil_div(rows, WIDE_ROWS // 2 if paired else WIDE_ROWS), ceil_div(kv_rows, WIDE_ROWS)


@lru_cache
def divide(tiles: int, columns: int, n_sms: int) -> Division:
    """The division of K for which all clusters end first."""
    steps, candidates = ceil_div(columns, WIDE_STEP_COLUMNS), []
    for slices, fit in FIT.items():
        each = ceil_div(steps, slices)
        rounds = ceil_div(tiles, max(1, fit * n_sms // FIT[1]))
        if ceil_div(steps, each) == slices <= n_sms and each <= MOST_STEPS:
            candidates.append((rounds * (each + TILE_STEPS) + SLICE_STEPS * slices, Division(each, slices)))
    return min(candidates, key=lambda found: found[0])[1]


def launch(
    ctx: LaunchContext, rounded: Array, of_x: Mapping[str, Argument], w: Sequence[Matrix], paired: bool, rows: int,
    kv_rows: int, of_results: Mapping[str, Argument], division: Division, sums: Sums | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches of a weight, of a gate and up (`paired`), or of queries, keys and values. Results of one weight are
    added up over ranks if there are `sums`.

    `of_x` are the arguments about X from `x_scales` to `columns`, `of_results` those from `residual` to `v`.
    """
    width, first, slices = width_for(rounded.shape[0]), w[0], division.slices
    row_tiles, kv_tiles = tiles_of(rows, kv_rows, paired)
    parts = ceil_div(WIDE_ROWS // 32 * (width // 8), slices) * slices
    fixed, stage_bytes = 1024 + 16 + 4 * SKINNY_UNIT * parts + 4 * slices * width, (WIDE_ROWS + width) * COLUMN_BYTES
    beside = BYTES_BESIDE if first.quantized else 0
    stages = (ctx.shared_limit - beside - fixed) // (stage_bytes + 16)
    box = WIDE_ROWS // 2 if paired else WIDE_ROWS
    maps: list[Argument] = [0 if m.quantized else TensorMap(m.payload.address, m.payload.dtype, m.shape, m.stride, box)
                            for m in w]  # fmt: skip
    x_map = TensorMap(rounded.address, rounded.dtype, rounded.shape, 2 * rounded.shape[1], width)
    arguments = named(
        tokens=ctx.tokens, x=rounded, x_map=x_map, **of_x, w0=w[0].payload, w1=w[1].payload, w2=w[2].payload,
        m0=maps[0], m1=maps[1], m2=maps[2], stride=first.stride, s0=w[0].scales, s1=w[1].scales, s2=w[2].scales,
        scale_stride=first.scale_stride, shift=first.shift, paired=int(paired), rows=rows, kv_rows=kv_rows,
        row_tiles=row_tiles, kv_tiles=kv_tiles, **of_results, steps=division.slice_steps,
        row_steps=ceil_div(first.shape[1], WIDE_STEP_COLUMNS), stages=stages, bias=0x64006400,
    )  # fmt: skip
    clusters = min(row_tiles + 2 * kv_tiles, max(1, ctx.n_sms // slices))
    grid = clusters, ceil_div(rounded.shape[0], width), slices
    threads = WIDE_CONSUMERS + (WIDE_LOADERS if first.quantized else 32 + WIDE_HELPERS)
    shared = fixed + stages * (stage_bytes + 16)
    if not sums:
        return [Launch(WIDE[width], grid, threads, arguments, shared, cluster=slices)]
    of_ranks = sums.arguments(ctx)
    of_sums = named(tokens=ctx.tokens, out=of_results["q"], rows=rows)
    return [
        Launch(SEND[width], grid, threads, arguments | of_ranks, shared, cluster=slices),
        Launch(ADD_UP, (ceil_div(rounded.shape[0] * ceil_div(rows, 16), 128),), 128, of_sums | of_ranks),
    ]
