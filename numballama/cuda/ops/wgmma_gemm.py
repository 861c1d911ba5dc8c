"""Linear layers for many tokens by wgmma: how the kernels of `kernels/wgmma_gemm.py` are launched, for `gemm`."""

from __future__ import annotations

from collections.abc import Sequence

from ...memory import ceil_div
from ...registry import KernelRef
from ..kernels.params import (
    WGMMA_CONSUMERS,
    WGMMA_LOADERS,
    WGMMA_ROWS,
    WGMMA_STAGES,
    WGMMA_STEP_COLUMNS,
)
from ..launch import Argument, Array, Launch, LaunchContext, Matrix, TensorMap, named

KERNELS = {width: KernelRef("numballama.cuda.kernels.wgmma_gemm", f"wgmma_{width}_kernel") for width in WGMMA_STAGES}
"""Rows of W of a tile → the kernel for them."""
TILE_COST = 16
"""What a tile costs beside its product, in rows of W: its results are stored and the ring fills again."""
DECODED_WIDTH = 128
"""Rows of a tile of a quantised weight, which the loading threads' registers are made for."""


def wanted(ctx: LaunchContext, weights: Sequence[Matrix]) -> bool:
    """Whether these kernels multiply the weights: the device has wgmma, and results are stored two at a time."""
    return ctx.wgmma and weights[0].payload.dtype != "f32" and all(w.shape[0] % 2 == 0 for w in weights)


def exchanged(ctx: LaunchContext, weights: Sequence[Matrix]) -> bool:
    """Whether the kernels want the second and third of each four columns of X exchanged (see `fragments`)."""
    return wanted(ctx, weights) and weights[0].payload.dtype in ("q4_0", "q4_1", "q4_k", "q6_k")


def width_for(tokens: int, paired: bool, rows: int, kv_rows: int, n_sms: int) -> int:
    """The width of a tile for which all tiles end first."""

    def cost(width: int) -> int:
        tiles = ceil_div(rows, width // 2 if paired else width) + 2 * ceil_div(kv_rows, width)
        return ceil_div(tiles * ceil_div(tokens, WGMMA_ROWS), n_sms) * (width + TILE_COST)

    return min(WGMMA_STAGES, key=cost)


def launch(
    ctx: LaunchContext, x: Array, columns: int, scales: Array, w: Sequence[Matrix], outs: Sequence[Array],
    residual: Array | None = None, paired: bool = False,
) -> Launch:  # fmt: skip
    """The launch for one weight and its result; for a gate, up and one result (`paired`); or for queries, keys and
    values.

    x [T, padded columns] has 16 bits, `scales` are its rows' factors. The weights have one type.
    """
    tokens, rows, kv_rows = x.shape[0], w[0].shape[0], 0 if paired or len(w) == 1 else w[1].shape[0]
    decoded = w[0].quantized
    width = DECODED_WIDTH if decoded else width_for(tokens, paired, rows, kv_rows, ctx.n_sms)
    row_tiles, kv_tiles = ceil_div(rows, width // 2 if paired else width), ceil_div(kv_rows, width)
    w, outs = [*w, w[0], w[0]][:3], [*outs, outs[0], outs[0]][:3]
    box = width // 2 if paired else width
    maps: list[Argument] = [0, 0, 0]
    if not decoded:
        maps = [TensorMap(m.payload.address, m.payload.dtype, m.shape[0], m.shape[1], m.stride, box) for m in w]
    arguments = named(
        tokens=ctx.tokens, x=x, x_map=TensorMap(x.address, x.dtype, tokens, x.shape[1], 2 * x.shape[1], WGMMA_ROWS),
        scales=scales, w0=w[0].payload, w1=w[1].payload, w2=w[2].payload, m0=maps[0], m1=maps[1], m2=maps[2],
        stride=w[0].stride, s0=w[0].scales, s1=w[1].scales, s2=w[2].scales, scale_stride=w[0].scale_stride,
        shift=w[0].shift, paired=int(paired), rows=rows, kv_rows=kv_rows, row_tiles=row_tiles, kv_tiles=kv_tiles,
        residual=residual or outs[0], added=int(residual is not None), out=outs[0], out_k=outs[1], out_v=outs[2],
        steps=ceil_div(columns, WGMMA_STEP_COLUMNS), stages=WGMMA_STAGES[width], bias=0x64006400,
    )  # fmt: skip
    threads = WGMMA_CONSUMERS + (WGMMA_LOADERS if decoded else 32)
    blocks = min(ctx.n_sms, ceil_div(tokens, WGMMA_ROWS) * (row_tiles + 2 * kv_tiles))
    stage_bytes = (WGMMA_ROWS + width) * 2 * WGMMA_STEP_COLUMNS
    return Launch(KERNELS[width], (blocks,), threads, arguments, 1024 + WGMMA_STAGES[width] * (stage_bytes + 16))
