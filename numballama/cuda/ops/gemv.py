"""Linear layers for a few tokens: how the kernels of `kernels/gemv.py` are launched. `linear` registers them."""

from __future__ import annotations

from typing import NamedTuple

from ...memory import ceil_div
from ...quantization.types import TYPE_TRAITS
from ...registry import KernelRef
from ..kernels.params import (
    CHUNK_BYTES,
    GEMV_STAGES,
    GEMV_THREADS,
    GEMV_WARPS,
    Q6_K_FACTORS_AT,
    SCALE_BYTES,
    X_LANE_STRIDE,
)
from ..launch import ELEMENTS_PER_16_BYTES, QUANTIZED, Argument, Array, Launch, LaunchContext, Matrix, named, paged
from ..repack import LAYOUTS
from .collectives import Sums

KERNELS = "numballama.cuda.kernels.gemv"
LINEAR = KernelRef(KERNELS, "linear_kernel")
LINEAR_ALL_REDUCE = KernelRef(KERNELS, "linear_all_reduce_kernel")
GATE_UP = KernelRef(KERNELS, "gate_up_kernel")
QKV = KernelRef(KERNELS, "qkv_kernel")
QKV_ROPE = KernelRef(KERNELS, "qkv_rope_kernel")

MIN_SHARED_BYTES = 80 << 10
"""Minimum dynamic shared memory per block. It caps occupancy at two blocks per SM of an H200: with three, the next
kernel's blocks pile up on the SMs that finish first, and others have nothing to do.
"""


def stage_of(payload: str) -> tuple[int, int, int]:
    """Sizes for a payload's type: (elements per lane of a chunk, bytes of a row in a stage, float32 of a chunk of x).

    The same on the device: `elements_together`, `row_bytes` and `x_step` in `kernels/dot.py`.
    """
    elements = ELEMENTS_PER_16_BYTES[payload]
    if payload in QUANTIZED:
        row = 2 * (CHUNK_BYTES + SCALE_BYTES)
        if payload == "q5_k":
            row = 2 * (CHUNK_BYTES + LAYOUTS[payload].record[0])
        elif payload == "q6_k":
            row = Q6_K_FACTORS_AT + SCALE_BYTES
        return elements, row, elements * 24 + 64
    return elements, 2 * CHUNK_BYTES, elements // 4 * X_LANE_STRIDE


class StreamLayout(NamedTuple):
    """How a block divides its work and its shared memory: the last arguments of every kernel here.

    Offsets count float32 in shared memory.
    """

    slices: int
    """Warps that share a pair of rows; a power of two."""
    log2_slices: int
    x_at: int
    """Offset of x."""
    sums_at: int
    """Offset of the warps' sums of squares of x, for RMSNorm."""
    partial_at: int
    """Offset of the slices' sums of each row."""
    chunks: int
    """Chunks of a row."""
    pairs_per_block: int
    """Pairs of rows of each block."""
    extra_pairs: int
    """Number of blocks, from the first on, that have one pair more."""
    prefetch: int
    """Stages that are copied before the first one is used."""


class _Shape(NamedTuple):
    grid: tuple[int, int]
    layout: StreamLayout
    shared_bytes: int


BLOCKS_OF_FEW_BITS, MANY_STAGES = 2, 100
"""Blocks an SM for large weights of 8 bits or fewer, from this number of stages of pairs of rows an SM on, if their
shared memory lets them. Arithmetic takes longer than memory then, and one block's eight warps do not fill the SM's
schedulers. For smaller weights it is worth more that the next kernel's block fits beside this one's.
"""
RESERVED_BYTES = 1 << 10
"""Shared memory that each block takes besides its own."""


def _shape(ctx: LaunchContext, weight: Matrix, pairs: int, tokens: int) -> _Shape:
    """How `tokens` vectors are multiplied with `pairs` pairs of rows."""
    elements, _, _ = stage_of(weight.payload.dtype)
    stages = pairs * ceil_div(weight.shape[1], 64 * elements)
    if TYPE_TRAITS[weight.payload.dtype].bits <= 8 and stages >= MANY_STAGES * ctx.n_sms:
        found = _shape_for(BLOCKS_OF_FEW_BITS * ctx.n_sms, ctx, weight, pairs, tokens)
        if BLOCKS_OF_FEW_BITS * (found.shared_bytes + RESERVED_BYTES) <= ctx.shared_limit + RESERVED_BYTES:
            return found
    return _shape_for(ctx.n_sms, ctx, weight, pairs, tokens)


def _shape_for(most_blocks: int, ctx: LaunchContext, weight: Matrix, pairs: int, tokens: int) -> _Shape:
    """The same with at most `most_blocks` blocks for each vector."""
    blocks = min(most_blocks, pairs)
    most_pairs = ceil_div(pairs, blocks)
    elements, row_bytes, x_step = stage_of(weight.payload.dtype)
    chunks = ceil_div(weight.shape[1], 32 * elements)
    # the cost is one per stage of the busiest warp, and half of one for adding each pair's slices
    counts = [n for n in (1, 2, 4, 8) if n <= GEMV_WARPS]
    slices = min(counts, key=lambda n: ceil_div(most_pairs, GEMV_WARPS // n) * (ceil_div(chunks, 2 * n) + 0.5))
    x_at = GEMV_WARPS * GEMV_STAGES * 2 * row_bytes // 4
    sums_at = x_at + (chunks + 1) * x_step
    partial_at = sums_at + GEMV_WARPS
    pairs_per_block, extra_pairs = divmod(pairs, blocks)
    layout = StreamLayout(
        slices=slices, log2_slices=slices.bit_length() - 1, x_at=x_at, sums_at=sums_at, partial_at=partial_at,
        chunks=chunks, pairs_per_block=pairs_per_block, extra_pairs=extra_pairs, prefetch=GEMV_STAGES - 1,
    )  # fmt: skip
    shared = max(4 * (partial_at + 2 * most_pairs * slices), min(MIN_SHARED_BYTES, ctx.shared_limit))
    return _Shape((blocks, tokens), layout, shared)


def _input(ctx: LaunchContext, x: Array, norm: Array | None, eps: float) -> dict[str, Argument]:
    """The first arguments of every kernel here: x, and the weight of an RMSNorm before it (x where there is none)."""
    return named(tokens=ctx.tokens, x=x, norm=norm or x, normed=int(norm is not None), eps=eps)


def linear(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, weight: Matrix, residual: Array | None, out: Array
) -> list[Launch]:
    """out[T, N] = x[T, K] · W[N, K]ᵀ, after RMSNorm of x where `norm` is given, plus `residual`."""
    rows, columns = weight.shape
    grid, layout, shared = _shape(ctx, weight, ceil_div(rows, 2), x.shape[0])
    arguments = named(
        **_input(ctx, x, norm, eps), **weight.arguments(), residual=residual or x, added=int(residual is not None),
        out=out, rows=rows, columns=columns, **layout._asdict(),
    )  # fmt: skip
    return [Launch(LINEAR, grid, GEMV_THREADS, arguments, shared)]


def linear_all_reduce(
    ctx: LaunchContext, x: Array, weight: Matrix, residual: Array | None, out: Array, sums: Sums
) -> list[Launch]:
    """out[1, N] = the sum of x[1, K] · W[N, K]ᵀ over ranks, plus `residual` of ranks that have one."""
    rows, columns = weight.shape
    if x.shape[0] > 1 or not sums.hold(rows):
        return linear(ctx, x, None, 0.0, weight, residual, out) + sums.of(ctx, out)
    (blocks, _), layout, shared = _shape(ctx, weight, ceil_div(rows, 2), 1)
    arguments = named(
        tokens=ctx.tokens, x=x, **weight.arguments(), residual=residual or x, added=int(residual is not None), out=out,
        rows=rows, columns=columns, **sums.arguments(ctx), **layout._asdict(),
    )  # fmt: skip
    return [Launch(LINEAR_ALL_REDUCE, (blocks,), GEMV_THREADS, arguments, shared)]


def gate_up(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, w1: Matrix, w3: Matrix, out: Array
) -> list[Launch]:
    """out[T, N] = silu(x · W1ᵀ) · (x · W3ᵀ). The two weights have one type and one shape."""
    rows, columns = w1.shape
    grid, layout, shared = _shape(ctx, w1, rows, x.shape[0])
    arguments = named(
        **_input(ctx, x, norm, eps), w1=w1.payload, w3=w3.payload, stride=w1.stride, w1_scales=w1.scales,
        w3_scales=w3.scales, scale_stride=w1.scale_stride, shift=w1.shift, out=out, rows=rows, columns=columns,
        **layout._asdict(),
    )  # fmt: skip
    return [Launch(GATE_UP, grid, GEMV_THREADS, arguments, shared)]


class _Section(NamedTuple):
    """A launch for q, k and v, or for some of them: number of rows of each, 0 for those of another launch."""

    arguments: dict[str, Argument]
    q_rows: int
    k_rows: int
    v_rows: int
    shape: _Shape


def _sections(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, wq: Matrix, wk: Matrix, wv: Matrix
) -> list[_Section]:
    """One launch where the three weights have one type, else one for wq and wk, which have, and one for wv."""
    together = wv.payload.dtype == wq.payload.dtype
    (q_rows, k_rows, v_rows), found = (w.shape[0] for w in (wq, wk, wv)), []
    for w, rows in (
        ((wq, wk, wv if together else wk), (q_rows, k_rows, v_rows if together else 0)),
        ((wv, wv, wv), (0, 0, 0 if together else v_rows)),
    ):
        if sum(rows) == 0:
            continue
        arguments = named(
            **_input(ctx, x, norm, eps), wq=w[0].payload, wk=w[1].payload, wv=w[2].payload, stride=w[0].stride,
            wq_scales=w[0].scales, wk_scales=w[1].scales, wv_scales=w[2].scales, scale_stride=w[0].scale_stride,
            shift=w[0].shift,
        )  # fmt: skip
        found.append(_Section(arguments, *rows, _shape(ctx, w[0], sum(rows) // 2, x.shape[0])))
    return found


def qkv(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, wq: Matrix, wk: Matrix, wv: Matrix, q: Array,
    k: Array, v: Array,
) -> list[Launch]:  # fmt: skip
    """q, k and v = x · Wqᵀ, x · Wkᵀ, x · Wvᵀ, after RMSNorm of x where `norm` is given."""
    launches = []
    for first, q_rows, k_rows, v_rows, (grid, layout, shared) in _sections(ctx, x, norm, eps, wq, wk, wv):
        arguments = named(
            **first, q=q, k=k, v=v, q_rows=q_rows, k_rows=k_rows, v_rows=v_rows, columns=x.shape[1], **layout._asdict()
        )
        launches.append(Launch(QKV, grid, GEMV_THREADS, arguments, shared))
    return launches


def norm_qkv_rope(
    ctx: LaunchContext, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, angles: Array, k_cache: Array,
    positions: Array, sequences: Array, page_table: Array, v_cache: Array, out: Array, eps: float, head_dim: int,
    interleaved: int,
) -> list[Launch]:  # fmt: skip
    """q, k and v of norm(x); q rotated into `out`, k rotated and v into the KV cache."""
    launches = []
    for first, q_rows, k_rows, v_rows, (grid, layout, shared) in _sections(ctx, x, norm, eps, wq, wk, wv):
        arguments = named(
            **first, angles=angles, **paged(k_cache, positions, sequences, page_table), q=out, k_cache=k_cache,
            v_cache=v_cache, q_rows=q_rows, k_rows=k_rows, v_rows=v_rows, head_dim=head_dim, interleaved=interleaved,
            kv_heads=k_cache.shape[1], inverse_head_dim=1.0 / head_dim, columns=x.shape[1], **layout._asdict(),
        )  # fmt: skip
        launches.append(Launch(QKV_ROPE, grid, GEMV_THREADS, arguments, shared))
    return launches
