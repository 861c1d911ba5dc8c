"""Linear layers for many tokens by wgmma: how the kernels of `kernels/wgmma_gemm.py` are launched, for `gemm`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...memory import ceil_div, round_up
from ...quantization.types import TYPE_TRAITS
from ...registry import KernelRef
from ..kernels.params import (
    PROMPT_CHUNK,
    WGMMA_CONSUMERS,
    WGMMA_HALF_BYTES,
    WGMMA_LOADERS,
    WGMMA_NARROW,
    WGMMA_ROWS,
    WGMMA_STAGES,
    WGMMA_STEP_COLUMNS,
    WGMMA_TALL_LOADERS,
    WGMMA_TALL_STAGES,
)
from ..launch import Argument, Array, Launch, LaunchContext, Matrix, TensorMap, named
from .collectives import Sums
from .rounding import round_rows

KERNELS = {width: KernelRef("numballama.cuda.kernels.wgmma_gemm", f"wgmma_{width}_kernel") for width in WGMMA_STAGES}
"""Rows of W of a tile → the kernel for them."""
TALL = KernelRef("numballama.cuda.kernels.wgmma_gemm", "wgmma_tall_kernel")
"""The kernel for quantised weights whose tiles have 256 tokens."""
ADD_UP_PIECES = KernelRef("numballama.cuda.kernels.linear_sums", "add_up_pieces_kernel")
SUM_THREADS = 512
"""Threads of a block of it."""
TALL_COST = 1.5
"""What a tile of 256 tokens costs of a quantised weight, where one of 128 costs 1."""
TILE_COST = 16
"""What a tile costs beside its product, in rows of W: its results are stored and the ring fills again."""
LEAST_HALF = 16
"""Steps of 64 columns from which on half of a row is worth a block of its own: an exchange of sums costs some six."""
MAX_PIECES = 1 << 24
"""Elements of a float32 weight that are split into two pieces at a time."""


def wanted(ctx: LaunchContext, weights: Sequence[Matrix]) -> bool:
    """Whether these kernels multiply the weights: the device has wgmma, and results are stored two at a time."""
    return ctx.wgmma and all(w.shape[0] % 2 == 0 for w in weights)


def split(ctx: LaunchContext, weight: Matrix, begin: int, values: Array, scales: Array) -> tuple[Launch, Matrix]:
    """The launch that splits rows of a float32 weight from `begin` on into two float16 pieces, and these as a matrix.

    `values` [rows, 2 · padded columns] takes the pieces, `scales` the rows' factors.
    """
    rows, columns = values.shape
    x = Array(weight.payload.address + begin * weight.stride, (rows, weight.shape[1]), "f32")
    launch = round_rows(ctx, x, weight.stride // 4, values, scales, columns // 2, every_row=1, split=1)
    return launch, Matrix(values.shape, values, 2 * columns, scales)


def part_rows(rows: int, columns: int) -> int:
    """Number of rows of a float32 weight that are split at a time."""
    return min(rows, max(WGMMA_ROWS, MAX_PIECES // columns // WGMMA_ROWS * WGMMA_ROWS))


def exchanged(ctx: LaunchContext, weights: Sequence[Matrix]) -> bool:
    """Whether the kernels want the second and third of each four columns of X exchanged (see `fragments`)."""
    return wanted(ctx, weights) and TYPE_TRAITS[weights[0].payload.dtype].bits < 8


def width_for(tokens: int, paired: bool, rows: int, kv_rows: int, n_sms: int, multiple: int = 1) -> int:
    """The width of a tile, a multiple of `multiple`, for which all tiles end first."""

    def cost(width: int) -> int:
        tiles = ceil_div(rows, width // 2 if paired else width) + 2 * ceil_div(kv_rows, width)
        return ceil_div(tiles * ceil_div(tokens, WGMMA_ROWS), n_sms) * (width + TILE_COST)

    return min((width for width in WGMMA_STAGES if width % multiple == 0), key=cost)


def is_halved(ctx: LaunchContext, weights: Sequence[Matrix], paired: bool = False) -> bool:
    """Whether two blocks have half of K each.

    They have where a run of `PROMPT_CHUNK` tokens leaves room for twice as many blocks. How many tokens a run really
    has is not asked: a row's bits may not depend on it.
    """
    first = weights[0]
    rows = [w.shape[0] for w in weights[: 1 if paired else 3]]
    tiles = sum(ceil_div(each, WGMMA_NARROW // 2 if paired else WGMMA_NARROW) for each in rows)
    long = first.shape[1] >= 2 * LEAST_HALF * WGMMA_STEP_COLUMNS
    room = 2 * tiles * ceil_div(PROMPT_CHUNK, WGMMA_ROWS) <= ctx.n_sms
    return long and room and (first.quantized or first.scales.dtype != "f32")


def tall_wins(tokens: int, tiles: int, n_sms: int) -> bool:
    """Whether `tiles` tiles of rows of a quantised weight end sooner with 256 tokens each."""
    narrow, tall = (ceil_div(tiles * ceil_div(tokens, each), n_sms) for each in (WGMMA_ROWS, 2 * WGMMA_ROWS))
    return TALL_COST * tall < narrow


@dataclass(frozen=True)
class Heads:
    """How heads are finished in registers: queries and keys rotated, keys and values written to the KV cache."""

    angles: Array
    where: Mapping[str, Argument]
    """Where tokens lie in the cache, as `launch.paged` tells kernels."""
    head_dim: int
    interleaved: int


def finishes_heads(ctx: LaunchContext, tokens: int, weights: Sequence[Matrix], k_cache: Array, v_cache: Array) -> bool:
    """Whether the kernels finish heads of these weights and caches: tiles have whole heads. Where tiles of 256 tokens
    win, they do not.
    """
    in_16_bits = k_cache.dtype == v_cache.dtype and k_cache.dtype in ("f16", "bf16")
    supported = in_16_bits and k_cache.shape[3] in (64, 128) and weights[0].payload.dtype != "f32"
    tiles = sum(ceil_div(w.shape[0], WGMMA_NARROW) for w in weights)
    tall = weights[0].quantized and tall_wins(tokens, tiles, ctx.n_sms)
    return wanted(ctx, weights) and supported and not tall


def qkv_rope(
    ctx: LaunchContext, x: Array, columns: int, scales: Array, w: Sequence[Matrix], outs: Sequence[Array], heads: Heads,
) -> list[Launch]:  # fmt: skip
    """Launches for queries, keys and values: one, or one for each weight where they differ in type."""
    if len({weight.payload.dtype for weight in w}) == 1:
        return [launch(ctx, x, columns, scales, w, outs, heads=heads)]
    return [launch(ctx, x, columns, scales, [w[i]], outs, heads=heads, section=i) for i in range(3)]


def launch(
    ctx: LaunchContext, x: Array, columns: int, scales: Array, w: Sequence[Matrix], outs: Sequence[Array],
    residual: Array | None = None, paired: bool = False, begin: int = 0, heads: Heads | None = None, section: int = 0,
    sums: Sums | None = None,
) -> Launch:  # fmt: skip
    """The launch for one weight and its result; for a gate, up and one result (`paired`); or for queries, keys and
    values. With `heads`, `outs` are rotated queries and the two caches, and a weight alone is that of number `section`.

    x [T, padded columns] has 16 bits, `scales` are its rows' factors. The weights have one type. Those that `split`
    made may be rows from `begin` on of a weight; x has two pieces too then. With `sums` results are sent to all ranks.
    """
    tokens, end, decoded = x.shape[0], w[0].shape[0], w[0].quantized
    rows, kv_rows = outs[0].shape[1], w[1].shape[0] if len(w) > 1 and not paired else 0
    halved = is_halved(ctx, w, paired)
    width = WGMMA_NARROW if halved else _width(ctx, tokens, w[0], paired, kv_rows, heads.head_dim if heads else 1)
    box = width // 2 if paired else width
    row_tiles, kv_tiles = ceil_div(end, box), ceil_div(kv_rows, width)
    if heads:
        kv_rows = outs[1].shape[1] * heads.head_dim
    told = heads or _no_heads(ctx, outs[0])
    tall = decoded and not heads and not halved and tall_wins(tokens, row_tiles + 2 * kv_tiles, ctx.n_sms)
    tile_tokens, stages = (2 * WGMMA_ROWS, WGMMA_TALL_STAGES) if tall else (WGMMA_ROWS, WGMMA_STAGES[width])
    row_steps = ceil_div(columns, WGMMA_STEP_COLUMNS)
    w0, w1, w2 = _three(w)
    out, out_k, out_v = outs if heads else _three([_from(each, begin) for each in outs])
    maps: list[Argument] = [0 if decoded else TensorMap(m.payload.address, m.payload.dtype, m.shape, m.stride, box)
                            for m in (w0, w1, w2)]  # fmt: skip
    arguments = named(
        tokens=ctx.tokens, x=x, x_map=TensorMap(x.address, x.dtype, x.shape, 2 * x.shape[1], tile_tokens),
        scales=scales, w0=w0.payload, w1=w1.payload, w2=w2.payload, m0=maps[0], m1=maps[1], m2=maps[2],
        stride=w0.stride, s0=w0.scales, s1=w1.scales, s2=w2.scales, scale_stride=w0.scale_stride, shift=w0.shift,
        paired=int(paired), rows=rows, end=end, kv_rows=kv_rows, row_tiles=row_tiles, kv_tiles=kv_tiles,
        residual=_from(residual, begin) if residual else out, added=int(residual is not None), out=out, out_k=out_k,
        out_v=out_v, steps=round_up(ceil_div(row_steps, 2), 4) if halved else row_steps, row_steps=row_steps,
        stages=stages, bias=0x64006400, angles=told.angles, **told.where, head_dim=told.head_dim,
        interleaved=told.interleaved, first_section=section, **_link(ctx, out, sums),
    )  # fmt: skip
    threads = WGMMA_CONSUMERS + (WGMMA_TALL_LOADERS if tall else WGMMA_LOADERS if decoded else 32)
    blocks = min(ctx.n_sms, ceil_div(tokens, tile_tokens) * (row_tiles + 2 * kv_tiles))
    stage_bytes = (tile_tokens + width) * 2 * WGMMA_STEP_COLUMNS
    kernel, shared = TALL if tall else KERNELS[width], 1024 + stages * (stage_bytes + 16)
    if halved:
        clusters = min(blocks, max(1, ctx.n_sms // 2))
        return Launch(kernel, (clusters, 1, 2), threads, arguments, shared + WGMMA_HALF_BYTES, cluster=2)
    return Launch(kernel, (blocks,), threads, arguments, shared)


def _width(
    ctx: LaunchContext, tokens: int, weight: Matrix, paired: bool = False, kv_rows: int = 0, multiple: int = 1
) -> int:
    """The width of the tiles of a launch whose first weight this is."""
    if weight.quantized or weight.scales.dtype == "f32":
        return WGMMA_NARROW
    return width_for(tokens, paired, weight.shape[0], kv_rows, ctx.n_sms, multiple)


def _link(ctx: LaunchContext, out: Array, sums: Sums | None) -> dict[str, Argument]:
    """What kernels need to send results; float32 in place of addresses if they are not to."""
    if sums is None:
        return named(peers=out, inbox_at=0, slot=0, rank=0, ranks=0)
    found = sums.arguments(ctx)
    return {name: found[name] for name in ("peers", "inbox_at", "slot", "rank", "ranks")}


def linear_all_reduce(
    ctx: LaunchContext, x: Array, columns: int, scales: Array, weight: Matrix, residual: Array | None, out: Array,
    sums: Sums,
) -> list[Launch]:  # fmt: skip
    """The launches for one weight whose results are added up over ranks; it is not float32."""
    rows, tokens = weight.shape[0], x.shape[0]
    width = WGMMA_NARROW if is_halved(ctx, [weight]) else _width(ctx, tokens, weight)
    sent = launch(ctx, x, columns, scales, [weight], [out], residual, sums=sums)
    arguments = named(tokens=ctx.tokens, out=out, columns=rows, width=width, **sums.arguments(ctx))
    items = ceil_div(rows, width) * ceil_div(tokens, 64) * (width // 16)
    grid = min(ceil_div(items, SUM_THREADS // 128), ctx.n_sms * 2048 // SUM_THREADS)
    return [sent, Launch(ADD_UP_PIECES, (grid,), SUM_THREADS, arguments)]


def held(sums: Sums, tokens: int, weight: Matrix) -> bool:
    """Whether the inbox has room for the results of this many tokens, in tiles of the greatest width."""
    return weight.payload.dtype != "f32" and sums.hold(round_up(tokens, WGMMA_ROWS) * (weight.shape[0] + max(KERNELS)))


def _no_heads(ctx: LaunchContext, out: Array) -> Heads:
    """What kernels are told that finish no heads: any arrays."""
    where = named(positions=ctx.tokens, sequences=ctx.tokens, page_table=ctx.tokens, table_stride=0, log2_page=0)
    return Heads(out, where, 0, 0)


T = TypeVar("T")


def _three(some: Sequence[T]) -> list[T]:
    """One to three, and the first again for those that are missing."""
    return [*some, some[0], some[0]][:3]


def _from(out: Array, column: int) -> Array:
    """The array from a column on; its rows are as long as before."""
    return Array(out.address + 4 * column, out.shape, out.dtype)
