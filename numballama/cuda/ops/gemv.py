"""Linear layers for a few tokens: how the kernels of `kernels/gemv.py` are launched. `linear` registers them."""

from __future__ import annotations

from typing import NamedTuple

from ...memory import ceil_div
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

KERNELS = "numballama.cuda.kernels.gemv"
LINEAR = KernelRef(KERNELS, "linear_kernel")
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


def _shape(ctx: LaunchContext, weight: Matrix, pairs: int, tokens: int) -> _Shape:
    """How `tokens` vectors are multiplied with `pairs` pairs of rows."""
    blocks = min(ctx.n_sms, pairs)
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


def _qkv_input(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, wq: Matrix, wk: Matrix, wv: Matrix
) -> tuple[dict[str, Argument], _Shape]:
    """First arguments of the kernels for q, k and v. The three weights have the same type and number of columns."""
    arguments = named(
        **_input(ctx, x, norm, eps), wq=wq.payload, wk=wk.payload, wv=wv.payload, stride=wq.stride,
        wq_scales=wq.scales, wk_scales=wk.scales, wv_scales=wv.scales, scale_stride=wq.scale_stride, shift=wq.shift,
    )  # fmt: skip
    return arguments, _shape(ctx, wq, (wq.shape[0] + 2 * wk.shape[0]) // 2, x.shape[0])


def qkv(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, wq: Matrix, wk: Matrix, wv: Matrix, q: Array,
    k: Array, v: Array,
) -> list[Launch]:  # fmt: skip
    """q, k and v = x · Wqᵀ, x · Wkᵀ, x · Wvᵀ, after RMSNorm of x where `norm` is given."""
    first, (grid, layout, shared) = _qkv_input(ctx, x, norm, eps, wq, wk, wv)
    (q_rows, columns), kv_rows = wq.shape, wk.shape[0]
    arguments = named(**first, q=q, k=k, v=v, q_rows=q_rows, kv_rows=kv_rows, columns=columns, **layout._asdict())
    return [Launch(QKV, grid, GEMV_THREADS, arguments, shared)]


def norm_qkv_rope(
    ctx: LaunchContext, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, angles: Array, k_cache: Array,
    positions: Array, sequences: Array, page_table: Array, v_cache: Array, out: Array, eps: float, head_dim: int,
    interleaved: int,
) -> list[Launch]:  # fmt: skip
    """q, k and v of norm(x); q rotated into `out`, k rotated and v into the KV cache."""
    first, (grid, layout, shared) = _qkv_input(ctx, x, norm, eps, wq, wk, wv)
    kv_heads = k_cache.shape[1]
    (q_rows, columns), kv_rows = wq.shape, wk.shape[0]
    arguments = named(
        **first, angles=angles, **paged(k_cache, positions, sequences, page_table), q=out, k_cache=k_cache,
        v_cache=v_cache, q_rows=q_rows, kv_rows=kv_rows, head_dim=head_dim, interleaved=interleaved, kv_heads=kv_heads,
        inverse_head_dim=1.0 / head_dim, columns=columns, **layout._asdict(),
    )  # fmt: skip
    return [Launch(QKV_ROPE, grid, GEMV_THREADS, arguments, shared)]
