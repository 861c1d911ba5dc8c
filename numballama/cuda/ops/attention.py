"""Attention of one token over the KV cache: how the kernels of `attention_kernels` are launched.

A short context is one block's for each head. A long one is split over blocks, and heads that share keys (grouped
queries) are computed by one, `HEADS` at a time, so that a key is read once for them.
"""

from __future__ import annotations

from dataclasses import replace

from ...quantization.types import KV_TYPES as CACHE
from ...registry import KernelRef, kernel
from ..launch import Array, Gpu, KernelFile, Launch

kernels = KernelFile("numballama.cuda.kernels.decode_attention")
plain_kernels = KernelFile("numballama.kernels_cuda")

THREADS = 256
WARPS = THREADS // 32
HEADS = 2
"""Heads of a group that a block computes together where keys are many."""
ALONE, LEAST_KEYS = 256, 128
"""So many keys one block does alone; of more, fewer than this are not worth a block of their own."""
STAGES, STAGE_BYTES = 2, 64 * THREADS
"""Of the ring through which keys come: 16 bytes a lane of two keys and of their values. `attend` awaits all but one."""
MOST_SPLITS = 32
"""Parts of a context at most: a lane each when they are joined."""
WEIGHTS = MOST_SPLITS + 1
"""Numbers that `weigh_parts` leaves for each head."""
PLAIN_THREADS = 128


def _splits(gpu: Gpu, blocks: int, context: int) -> int:
    """Blocks that share a head's context: one for each processor, as a second one there only begins later."""
    return max(1, min(-(-context // LEAST_KEYS), gpu.processors // blocks))


@kernel(
    "attention",
    "cuda",
    "f32",
    CACHE,
    "i32",
    "i32",
    CACHE,
    parts=lambda q, k, positions, sequences, v, workers: (
        q[0],
        q[1] // k[3],
        min(MOST_SPLITS, -(-k[2] // LEAST_KEYS)) if q[0] <= 8 else 1,
        k[3] + 2,
    ),
)
def fused_attention(
    gpu: Gpu,
    q: Array,
    k_cache: Array,
    positions: Array,
    sequences: Array,
    v_cache: Array,
    out: Array,
    window: int,
    parts: Array,
) -> list[Launch]:
    tokens = q.shape[0]
    _, kv_heads, context, head_dim = k_cache.shape
    heads = q.shape[1] // head_dim
    together, numbers = heads // kv_heads, 4 if k_cache.dtype == "f32" else 8
    common = (gpu.tokens, q, k_cache, v_cache, positions, sequences, out)
    if head_dim % numbers or head_dim > 32 * numbers or k_cache.dtype != v_cache.dtype:
        plain = (*common, kv_heads, together, context, head_dim, window)
        shared = 4 * (PLAIN_THREADS + head_dim)
        return [Launch(kernels.attention_plain_kernel, (heads, tokens), PLAIN_THREADS, plain, shared)]
    lanes = 1 << (-(-head_dim // numbers) - 1).bit_length()
    counters = gpu.zeros(heads * tokens)

    def launch(function: KernelRef, heads_a_block: int, most_splits: int) -> Launch:
        subgroups = -(-together // heads_a_block)
        blocks, groups = kv_heads * subgroups, WARPS * (32 // lanes)
        splits = min(most_splits, _splits(gpu, blocks * tokens, context))
        shared = max(STAGES * STAGE_BYTES, 4 * heads_a_block * max((head_dim + 4) * (groups + 1) + groups, WEIGHTS))
        arguments = (
            *common, parts, counters, kv_heads, together, context, head_dim, window, lanes, subgroups, 1 / subgroups,
            1 / head_dim,
        )  # fmt: skip
        return Launch(function, (blocks, tokens, splits), THREADS, arguments, shared)

    alone = launch(kernels.attention_single_kernel, 1, 1)
    if parts.shape[2] == 1 or 0 < window <= ALONE:
        return [alone]
    if together > 1:
        return [replace(alone, later=(ALONE, launch(kernels.attention_grouped_kernel, HEADS, parts.shape[2])))]
    return [replace(alone, later=(ALONE, launch(kernels.attention_single_kernel, 1, parts.shape[2])))]


# The operators as the graph declares them


@kernel("attention_scores", "cuda", "f32", CACHE, "i32", "i32")
def attention_scores(
    gpu: Gpu, q: Array, k_cache: Array, positions: Array, sequences: Array, out: Array, window: int
) -> list[Launch]:
    tokens, heads, context = out.shape
    _, kv_heads, _, head_dim = k_cache.shape
    arguments = (
        gpu.tokens,
        q,
        k_cache,
        positions,
        sequences,
        out,
        kv_heads,
        heads // kv_heads,
        context,
        head_dim,
        window,
    )
    return [Launch(plain_kernels.attention_scores_kernel, (heads, tokens), THREADS, arguments)]


@kernel("softmax", "cuda", "f32")
def softmax(gpu: Gpu, x: Array, out: Array) -> list[Launch]:
    tokens, heads, columns = x.shape
    return [Launch(plain_kernels.softmax_kernel, (heads, tokens), THREADS, (gpu.tokens, x, out, columns))]


@kernel("attention_values", "cuda", "f32", CACHE, "i32", "i32")
def attention_values(
    gpu: Gpu, weights: Array, v_cache: Array, positions: Array, sequences: Array, out: Array, window: int
) -> list[Launch]:
    tokens, heads, context = weights.shape
    _, kv_heads, _, head_dim = v_cache.shape
    arguments = (
        gpu.tokens, weights, v_cache, positions, sequences, out, kv_heads, heads // kv_heads, context, head_dim,
        window,
    )  # fmt: skip
    return [Launch(plain_kernels.attention_values_kernel, (heads, tokens), THREADS, arguments)]
