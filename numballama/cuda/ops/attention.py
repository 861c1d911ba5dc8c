"""Launches of attention over the KV cache, for single tokens and for many.

Single tokens (`kernels/decode_attention.py`): in a short context one block computes each head. A long context is split
over blocks, and one block computes `HEADS_PER_BLOCK` query heads that share keys (grouped-query attention), so that a
key is read once for them. Many tokens (`kernels/prefill_attention.py`) use tensor cores.
"""

from __future__ import annotations

from dataclasses import replace

from ...memory import ceil_div
from ...quantization.types import KV_TYPES
from ...registry import KernelRef, kernel
from ..kernels.params import (
    ATTENTION_STAGE_BYTES,
    ATTENTION_STAGES,
    ATTENTION_THREADS,
    ATTENTION_WARPS,
    HEADS_PER_BLOCK,
    MAX_SPLITS,
    MIN_SPLIT_KEYS,
    PLAIN_ATTENTION_THREADS,
    PREFILL_ATTENTION_THREADS,
    PREFILL_ATTENTION_TILE,
    SPLIT_FROM,
    SPLIT_WEIGHTS,
)
from ..launch import Array, Launch, LaunchContext, named
from .gemm import FEW

DECODE = "numballama.cuda.kernels.decode_attention"
ATTENTION_PLAIN = KernelRef(DECODE, "attention_plain_kernel")
ATTENTION_SINGLE = KernelRef(DECODE, "attention_single_kernel")
ATTENTION_GROUPED = KernelRef(DECODE, "attention_grouped_kernel")
PLAIN = "numballama.kernels_cuda"
ATTENTION_SCORES = KernelRef(PLAIN, "attention_scores_kernel")
ATTENTION_VALUES = KernelRef(PLAIN, "attention_values_kernel")
SOFTMAX = KernelRef(PLAIN, "softmax_kernel")
PREFILL = "numballama.cuda.kernels.prefill_attention"
ATTENTION_64 = KernelRef(PREFILL, "attention_64_kernel")
ATTENTION_128 = KernelRef(PREFILL, "attention_128_kernel")


@kernel(
    "attention",
    "cuda",
    "f32",
    KV_TYPES,
    "i32",
    "i32",
    KV_TYPES,
    partials=lambda q, k, positions, sequences, v, workers: (
        q[0],
        q[1] // k[3],
        min(MAX_SPLITS, ceil_div(k[2], MIN_SPLIT_KEYS)) if q[0] <= FEW else 1,
        k[3] + 2,
    ),
)
def attention(
    ctx: LaunchContext, q: Array, k_cache: Array, positions: Array, sequences: Array, v_cache: Array, out: Array,
    window: int, partials: Array,
) -> list[Launch]:  # fmt: skip
    """`partials` [T, heads, splits, head_dim + 2] float32: results of blocks that share a context, to be combined."""
    if _for_tensor_cores(ctx, q, k_cache, v_cache, window):
        return _prefill(ctx, q, k_cache, positions, sequences, v_cache, out)
    return _decode(ctx, q, k_cache, positions, sequences, v_cache, out, window, partials)


def _for_tensor_cores(ctx: LaunchContext, q: Array, k_cache: Array, v_cache: Array, window: int) -> bool:
    """Whether the kernels for many tokens support these operands: no float32 cache, no sliding window, heads up to 128.

    Before sm_80, whose cards have at least 100 KB of shared memory, tensor cores and copies need more registers than a
    head of more than 64 elements leaves.
    """
    context, head_dim = k_cache.shape[2:]
    same_type = k_cache.dtype == v_cache.dtype != "f32"
    fits = head_dim <= (128 if ctx.shared_limit > 64 << 10 else 64)
    windowed = 0 < window < context
    return q.shape[0] > FEW and same_type and fits and head_dim % 8 == 0 and not windowed


def _prefill(
    ctx: LaunchContext, q: Array, k_cache: Array, positions: Array, sequences: Array, v_cache: Array, out: Array
) -> list[Launch]:
    _, kv_heads, context, head_dim = k_cache.shape
    heads = q.shape[1] // head_dim
    kernel_ref, width = (ATTENTION_64, 64) if head_dim <= 64 else (ATTENTION_128, 128)
    arguments = named(
        tokens=ctx.tokens, q=q, k_cache=k_cache, v_cache=v_cache, positions=positions, sequences=sequences, out=out,
        kv_heads=kv_heads, shared_by=heads // kv_heads, context=context, head_dim=head_dim,
    )  # fmt: skip
    grid = ceil_div(q.shape[0], PREFILL_ATTENTION_TILE), heads
    shared = 2 * 2 * PREFILL_ATTENTION_TILE * 2 * width  # two stages of keys and values in 16 bits
    return [Launch(kernel_ref, grid, PREFILL_ATTENTION_THREADS, arguments, shared)]


def _splits(ctx: LaunchContext, blocks: int, context: int) -> int:
    """Number of blocks that share a head's context: as many as fill the SMs once, because a second wave would wait."""
    return max(1, min(ceil_div(context, MIN_SPLIT_KEYS), ctx.n_sms // blocks))


def _decode(
    ctx: LaunchContext, q: Array, k_cache: Array, positions: Array, sequences: Array, v_cache: Array, out: Array,
    window: int, partials: Array,
) -> list[Launch]:  # fmt: skip
    tokens = q.shape[0]
    _, kv_heads, context, head_dim = k_cache.shape
    heads = q.shape[1] // head_dim
    shared_by, elements = heads // kv_heads, 4 if k_cache.dtype == "f32" else 8
    operands = named(
        tokens=ctx.tokens, q=q, k_cache=k_cache, v_cache=v_cache, positions=positions, sequences=sequences, out=out
    )
    shape = named(kv_heads=kv_heads, shared_by=shared_by, context=context, head_dim=head_dim, window=window)
    if head_dim % elements or head_dim > 32 * elements or k_cache.dtype != v_cache.dtype:
        shared = 4 * (PLAIN_ATTENTION_THREADS + head_dim)
        return [Launch(ATTENTION_PLAIN, (heads, tokens), PLAIN_ATTENTION_THREADS, named(**operands, **shape), shared)]
    lanes = 1 << (ceil_div(head_dim, elements) - 1).bit_length()
    counters = ctx.zeros(heads * tokens)

    def launch(kernel_ref: KernelRef, heads_per_block: int, max_splits: int) -> Launch:
        subgroups = ceil_div(shared_by, heads_per_block)
        blocks, lane_groups = kv_heads * subgroups, ATTENTION_WARPS * (32 // lanes)
        splits = min(max_splits, _splits(ctx, blocks * tokens, context))
        combined = heads_per_block * max((head_dim + 4) * (lane_groups + 1) + lane_groups, SPLIT_WEIGHTS)
        shared = max(ATTENTION_STAGES * ATTENTION_STAGE_BYTES, 4 * combined)
        arguments = named(
            **operands, partials=partials, counters=counters, **shape, lanes=lanes, subgroups=subgroups,
            inverse_subgroups=1 / subgroups, inverse_head_dim=1 / head_dim,
        )  # fmt: skip
        return Launch(kernel_ref, (blocks, tokens, splits), ATTENTION_THREADS, arguments, shared)

    short = launch(ATTENTION_SINGLE, 1, 1)
    most_splits = partials.shape[2]
    if most_splits == 1 or 0 < window <= SPLIT_FROM:
        return [short]
    if shared_by > 1:
        long = launch(ATTENTION_GROUPED, HEADS_PER_BLOCK, most_splits)
    else:
        long = launch(ATTENTION_SINGLE, 1, most_splits)
    return [replace(short, long_context_variant=(SPLIT_FROM, long))]


# The operators as the graph declares them


@kernel("attention_scores", "cuda", "f32", KV_TYPES, "i32", "i32")
def attention_scores(
    ctx: LaunchContext, q: Array, k_cache: Array, positions: Array, sequences: Array, out: Array, window: int
) -> list[Launch]:
    tokens, heads, context = out.shape
    _, kv_heads, _, head_dim = k_cache.shape
    arguments = named(
        tokens=ctx.tokens, q=q, k_cache=k_cache, positions=positions, sequences=sequences, out=out, kv_heads=kv_heads,
        shared_by=heads // kv_heads, context=context, head_dim=head_dim, window=window,
    )  # fmt: skip
    return [Launch(ATTENTION_SCORES, (heads, tokens), ATTENTION_THREADS, arguments)]


@kernel("softmax", "cuda", "f32")
def softmax(ctx: LaunchContext, x: Array, out: Array) -> list[Launch]:
    tokens, heads, columns = x.shape
    arguments = named(tokens=ctx.tokens, x=x, out=out, columns=columns)
    return [Launch(SOFTMAX, (heads, tokens), ATTENTION_THREADS, arguments)]


@kernel("attention_values", "cuda", "f32", KV_TYPES, "i32", "i32")
def attention_values(
    ctx: LaunchContext, weights: Array, v_cache: Array, positions: Array, sequences: Array, out: Array, window: int
) -> list[Launch]:
    tokens, heads, context = weights.shape
    _, kv_heads, _, head_dim = v_cache.shape
    arguments = named(
        tokens=ctx.tokens, weights=weights, v_cache=v_cache, positions=positions, sequences=sequences, out=out,
        kv_heads=kv_heads, shared_by=heads // kv_heads, context=context, head_dim=head_dim, window=window,
    )  # fmt: skip
    return [Launch(ATTENTION_VALUES, (heads, tokens), ATTENTION_THREADS, arguments)]
