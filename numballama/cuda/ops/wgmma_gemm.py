"""Linear layers for many tokens by wgmma: how the kernels of `kernels/wgmma_gemm.py` are launched, for `gemm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...memory import ceil_div, round_up
from ...registry import KernelRef
from ..kernels.params import (
    WGMMA_CONSUMERS,
    WGMMA_LOADERS,
    WGMMA_ROWS,
    WGMMA_STAGES,
    WGMMA_STEP_COLUMNS,
    WGMMA_TALL_LOADERS,
    WGMMA_TALL_STAGES,
)
from ..launch import Argument, Array, Launch, LaunchContext, Matrix, TensorMap, named

KERNELS = {width: KernelRef("numballama.cuda.kernels.wgmma_gemm", f"wgmma_{width}_kernel") for width in WGMMA_STAGES}
"""Rows of W of a tile → the kernel for them."""
TALL = KernelRef("numballama.cuda.kernels.wgmma_gemm", "wgmma_tall_kernel")
"""The kernel for quantised weights whose tiles have 256 tokens."""
TALL_COST = 1.5
"""What a tile of 256 tokens costs of a quantised weight, where one of 128 costs 1."""
ROUND = KernelRef("numballama.cuda.kernels.rounding", "round_kernel")
TILE_COST = 16
"""What a tile costs beside its product, in rows of W: its results are stored and the ring fills again."""
NARROW = 128
"""Rows of a tile of a quantised or float32 weight: two threads decode a row, and there are two sets of sums."""


MAX_PIECES = 1 << 24
"""Elements of a float32 weight that are split into two pieces at a time."""


def wanted(ctx: LaunchContext, weights: Sequence[Matrix]) -> bool:
    """Whether these kernels multiply the weights: the device has wgmma, and results are stored two at a time."""
    return ctx.wgmma and all(w.shape[0] % 2 == 0 for w in weights)


@dataclass(frozen=True)
class Pieces:
    """Rows of a float32 weight in two float16 pieces [rows, 2 · padded columns], and the rows' factors."""

    values: Array
    scales: Array

    def split(self, ctx: LaunchContext, weight: Matrix, begin: int) -> Launch:
        """The launch that splits the rows of a weight from `begin` on."""
        rows, padded = self.values.shape[0], self.values.shape[1] // 2
        x = Array(weight.payload.address + begin * weight.stride, (rows, weight.shape[1]), "f32")
        return round_rows(ctx, x, weight.stride // 4, self.values, self.scales, padded, every_row=1, split=1)


def part_rows(rows: int, columns: int) -> int:
    """Number of rows of a float32 weight that are split at a time."""
    return min(rows, max(WGMMA_ROWS, MAX_PIECES // columns // WGMMA_ROWS * WGMMA_ROWS))


def round_rows(
    ctx: LaunchContext, x: Array, stride: int, out: Array, scales: Array, padded: int, norm: Array | None = None,
    eps: float = 0.0, exchanged: bool = False, every_row: int = 0, split: int = 0,
) -> Launch:  # fmt: skip
    """The launch that rounds rows of x, `stride` elements apart: see `kernels/rounding.py`."""
    rows, columns = x.shape
    arguments = named(
        tokens=ctx.tokens, every_row=every_row, x=x, stride=stride, norm=norm or x, normed=int(norm is not None),
        eps=eps, out=out, scales=scales, columns=columns, padded=padded, exchanged=int(exchanged), split=split,
    )  # fmt: skip
    threads = min(1024, max(64, round_up(ceil_div(padded, 16), 32)))  # a row in registers, 16 elements a thread
    return Launch(ROUND, (rows,), threads, arguments)


def exchanged(ctx: LaunchContext, weights: Sequence[Matrix]) -> bool:
    """Whether the kernels want the second and third of each four columns of X exchanged (see `fragments`)."""
    return wanted(ctx, weights) and weights[0].payload.dtype in ("q4_0", "q4_1", "q4_k", "q6_k")


def width_for(tokens: int, paired: bool, rows: int, kv_rows: int, n_sms: int) -> int:
    """The width of a tile for which all tiles end first."""

    def cost(width: int) -> int:
        tiles = ceil_div(rows, width // 2 if paired else width) + 2 * ceil_div(kv_rows, width)
        return ceil_div(tiles * ceil_div(tokens, WGMMA_ROWS), n_sms) * (width + TILE_COST)

    return min(WGMMA_STAGES, key=cost)


def tall_wins(tokens: int, tiles: int, n_sms: int) -> bool:
    """Whether `tiles` tiles of rows of a quantised weight end sooner with 256 tokens each."""
    narrow, tall = (ceil_div(tiles * ceil_div(tokens, each), n_sms) for each in (WGMMA_ROWS, 2 * WGMMA_ROWS))
    return TALL_COST * tall < narrow


def launch(
    ctx: LaunchContext, x: Array, columns: int, scales: Array, w: Sequence[Matrix], outs: Sequence[Array],
    residual: Array | None = None, paired: bool = False, pieces: Sequence[Pieces] = (), begin: int = 0,
) -> Launch:  # fmt: skip
    """The launch for one weight and its result; for a gate, up and one result (`paired`); or for queries, keys and
    values.

    x [T, padded columns] has 16 bits, `scales` are its rows' factors. The weights have one type. float32 weights come
    with their `pieces`, which may be of rows from `begin` on only; x has two pieces too then.
    """
    tokens, rows, kv_rows = x.shape[0], w[0].shape[0], 0 if paired or len(w) == 1 else w[1].shape[0]
    decoded, end = w[0].quantized, pieces[0].values.shape[0] if pieces else rows
    width = NARROW if decoded or pieces else width_for(tokens, paired, rows, kv_rows, ctx.n_sms)
    row_tiles, kv_tiles = ceil_div(end, width // 2 if paired else width), ceil_div(kv_rows, width)
    tall = decoded and tall_wins(tokens, row_tiles + 2 * kv_tiles, ctx.n_sms)
    tile_tokens, stages = (2 * WGMMA_ROWS, WGMMA_TALL_STAGES) if tall else (WGMMA_ROWS, WGMMA_STAGES[width])
    box = width // 2 if paired else width
    payloads = [piece.values for piece in pieces] or [matrix.payload for matrix in w]
    factors = [piece.scales for piece in pieces] or [matrix.scales for matrix in w]
    maps: list[Argument] = [0, 0, 0]
    if not decoded:
        strides = [2 * p.shape[1] for p in payloads] if pieces else [matrix.stride for matrix in w]
        shapes = [p.shape for p in payloads] if pieces else [matrix.shape for matrix in w]
        maps = [
            TensorMap(p.address, p.dtype, shape, stride, box)
            for p, shape, stride in zip(payloads, shapes, strides, strict=True)
        ]
    p, s, m = _three(payloads), _three(factors), _three(maps)
    out, out_k, out_v = _three([_from(out, begin) for out in outs])
    arguments = named(
        tokens=ctx.tokens, x=x, x_map=TensorMap(x.address, x.dtype, x.shape, 2 * x.shape[1], tile_tokens),
        scales=scales, w0=p[0], w1=p[1], w2=p[2], m0=m[0], m1=m[1], m2=m[2],
        stride=w[0].stride, s0=s[0], s1=s[1], s2=s[2], scale_stride=w[0].scale_stride, shift=w[0].shift,
        paired=int(paired), rows=rows, end=end, kv_rows=kv_rows, row_tiles=row_tiles, kv_tiles=kv_tiles,
        residual=_from(residual, begin) if residual else out, added=int(residual is not None), out=out, out_k=out_k,
        out_v=out_v, steps=ceil_div(columns, WGMMA_STEP_COLUMNS), stages=stages,
        bias=0x64006400,
    )  # fmt: skip
    threads = WGMMA_CONSUMERS + (WGMMA_TALL_LOADERS if tall else WGMMA_LOADERS if decoded else 32)
    blocks = min(ctx.n_sms, ceil_div(tokens, tile_tokens) * (row_tiles + 2 * kv_tiles))
    stage_bytes = (tile_tokens + width) * 2 * WGMMA_STEP_COLUMNS
    kernel = TALL if tall else KERNELS[width]
    return Launch(kernel, (blocks,), threads, arguments, 1024 + stages * (stage_bytes + 16))


T = TypeVar("T")


def _three(some: Sequence[T]) -> list[T]:
    """One to three, and the first again for those that are missing."""
    return [*some, some[0], some[0]][:3]


def _from(out: Array, column: int) -> Array:
    """The array from a column on; its rows are as long as before."""
    return Array(out.address + 4 * column, out.shape, out.dtype)
