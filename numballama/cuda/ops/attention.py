"""Launches of attention over the KV cache, for single tokens and for many.

A single token (`kernels/decode_attention.py`): in a short context one block computes each head. A long context is split
over blocks, and one block computes `HEADS_PER_BLOCK` query heads that share keys (grouped-query attention), so that a
key is read once for them. Rows of many sequences (`kernels/rows_attention.py`): the same, but a row's splits depend on
its length only, so that its result does not depend on other rows. With a cache of 16 bits they use tensor cores
(`kernels/group_attention.py`), or the copy engine where the device has one and few heads share keys
(`kernels/bulk_attention.py`). Prompts use tensor cores too: `kernels/wgmma_attention.py` where the device has wgmma,
else `kernels/prefill_attention.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from ...memory import ceil_div
from ...quantization.types import KV_TYPES
from ...registry import KernelRef, kernel
from ..kernels.params import (
    ATTENTION_STAGE_BYTES,
    ATTENTION_STAGES,
    ATTENTION_THREADS,
    ATTENTION_WARPS,
    BULK_FROM,
    BULK_KEYS,
    BULK_RING_BYTES,
    BULK_WARPS,
    FEW_HEADS,
    GROUP_HEADS,
    GROUP_STAGES,
    GROUP_THREADS,
    HEADS_PER_BLOCK,
    MAX_SPLITS,
    MIN_SPLIT_KEYS,
    PLAIN_ATTENTION_THREADS,
    PREFILL_ATTENTION_THREADS,
    PREFILL_ATTENTION_TILE,
    ROW_SPLIT_KEYS,
    SPLIT_FROM,
    WGMMA_ATTENTION_KEYS,
    WGMMA_ATTENTION_THREADS,
    WGMMA_ATTENTION_TILE,
)
from ..launch import Argument, Array, Launch, LaunchContext, RowKind, named, paged, scales_of
from .gemm import FEW

DECODE = "numballama.cuda.kernels.decode_attention"
ATTENTION_SINGLE = KernelRef(DECODE, "attention_single_kernel")
ATTENTION_GROUPED = KernelRef(DECODE, "attention_grouped_kernel")
ROWS = "numballama.cuda.kernels.rows_attention"
ATTENTION_PLAIN = KernelRef(ROWS, "attention_plain_kernel")
ATTENTION_ROWS = KernelRef(ROWS, "attention_rows_kernel")
ATTENTION_GROUPED_ROWS = KernelRef(ROWS, "attention_grouped_rows_kernel")
GROUP = "numballama.cuda.kernels.group_attention"
ATTENTION_GROUP = {size: KernelRef(GROUP, f"attention_group_{size}_kernel") for size in (64, 128)}
ATTENTION_FEW = {size: KernelRef(GROUP, f"attention_few_{size}_kernel") for size in (64, 128)}
BULK = "numballama.cuda.kernels.bulk_attention"
ATTENTION_BULK = {size: KernelRef(BULK, f"attention_bulk_{size}_kernel") for size in (64, 128)}
PLAIN = "numballama.kernels_cuda"
ATTENTION_SCORES = KernelRef(PLAIN, "attention_scores_kernel")
ATTENTION_VALUES = KernelRef(PLAIN, "attention_values_kernel")
SOFTMAX = KernelRef(PLAIN, "softmax_kernel")
PREFILL = "numballama.cuda.kernels.prefill_attention"
ATTENTION_64 = KernelRef(PREFILL, "attention_64_kernel")
ATTENTION_128 = KernelRef(PREFILL, "attention_128_kernel")
WGMMA = "numballama.cuda.kernels.wgmma_attention"
ATTENTION_WGMMA = {width: KernelRef(WGMMA, f"attention_wgmma_{width}_kernel") for width in WGMMA_ATTENTION_KEYS}
"""Elements of the widest head → the kernel for it."""
ROUNDING = ATTENTION_GROUP, ATTENTION_FEW, ATTENTION_BULK, ATTENTION_WGMMA
"""The kernels that can write their results in 16 bits."""

MORE_TILES = 8
"""Blocks for tiles that are not full, because chunks of several prompts share a run. Further tiles wait for these."""
BULK_SHARED = BULK_WARPS * (BULK_RING_BYTES + 8 * 8)
"""Bytes of shared memory of a block of `bulk_attention`: for each warp its rings, and room for eight mbarriers."""
ROW_BLOCKS = 2048
"""Blocks that share the keys of one head, over all rows of a run, where a long context has splits for so many."""


def _partials(
    q: tuple[int, ...], k: tuple[int, ...], positions: tuple[int, ...], sequences: tuple[int, ...],
    table: tuple[int, ...], v: tuple[int, ...], workers: int,
) -> tuple[int, ...]:  # fmt: skip
    """Shape of an array for the results of a row's splits: [T, heads, splits, head_dim + 2]."""
    splits = ceil_div(table[1] * k[2], MIN_SPLIT_KEYS if q[0] == 1 else ROW_SPLIT_KEYS)
    return (q[0], q[1] // k[3], min(MAX_SPLITS, splits), k[3] + 2)


@kernel("attention", "cuda", "f32", KV_TYPES, "i32", "i32", "i32", KV_TYPES, partials=_partials)
def attention(
    ctx: LaunchContext, q: Array, k_cache: Array, positions: Array, sequences: Array, page_table: Array, v_cache: Array,
    out: Array, window: int, partials: Array,
) -> list[Launch]:  # fmt: skip
    """`partials` [T, heads, splits, head_dim + 2] float32: results of blocks that share a context, to be combined."""
    where, chunks = paged(k_cache, positions, sequences, page_table), list[Launch]()
    if _for_wgmma(ctx, q, k_cache, v_cache):
        chunks = _wgmma(ctx, q, k_cache, where, v_cache, out, window)
    elif _for_tensor_cores(ctx, q, k_cache, v_cache, page_table, window):
        chunks = _prefill(ctx, q, k_cache, where, v_cache, out)
    context = page_table.shape[1] * k_cache.shape[2]
    return chunks + _decode(ctx, q, k_cache, where, v_cache, out, window, partials, context, bool(chunks))


def _for_tensor_cores(
    ctx: LaunchContext, q: Array, k_cache: Array, v_cache: Array, page_table: Array, window: int
) -> bool:
    """Whether the kernels for many tokens support these operands: a cache of 16 bits, no window, heads up to 128. Not
    in batch-invariant runs.

    Before sm_80, whose cards have at least 100 KB of shared memory, tensor cores and copies need more registers than a
    head of more than 64 elements leaves.
    """
    page, head_dim = k_cache.shape[2:]
    same_type = k_cache.dtype == v_cache.dtype and k_cache.dtype in ("f16", "bf16")
    fits = head_dim <= (128 if ctx.shared_limit > 64 << 10 else 64)
    windowed = 0 < window < page_table.shape[1] * page
    many = q.shape[0] > FEW and not ctx.batch_invariant
    return many and same_type and fits and head_dim % 8 == 0 and not windowed


def _prefill(
    ctx: LaunchContext, q: Array, k_cache: Array, where: Mapping[str, Argument], v_cache: Array, out: Array
) -> list[Launch]:
    _, kv_heads, _, head_dim = k_cache.shape
    heads = q.shape[1] // head_dim
    kernel_ref, width = (ATTENTION_64, 64) if head_dim <= 64 else (ATTENTION_128, 128)
    most_tiles = ctx.tiles.shape[0] - 1
    arguments = named(
        tokens=ctx.tokens, q=q, k_cache=k_cache, v_cache=v_cache, **where, tiles=ctx.tiles, out=out,
        kv_heads=kv_heads, shared_by=heads // kv_heads, head_dim=head_dim,
    )  # fmt: skip
    grid = min(most_tiles, ceil_div(q.shape[0], PREFILL_ATTENTION_TILE) + MORE_TILES), heads
    shared = 2 * 2 * PREFILL_ATTENTION_TILE * 2 * width  # two stages of keys and values in 16 bits
    return [Launch(kernel_ref, grid, PREFILL_ATTENTION_THREADS, arguments, shared, only_for="chunks")]


def _for_wgmma(ctx: LaunchContext, q: Array, k_cache: Array, v_cache: Array) -> bool:
    """Whether the kernels by wgmma support these operands: a cache of 16 bits, heads up to 256."""
    head_dim = k_cache.shape[3]
    same_type = k_cache.dtype == v_cache.dtype and k_cache.dtype in ("f16", "bf16")
    return ctx.wgmma and q.shape[0] > FEW and same_type and head_dim % 8 == 0 and head_dim <= max(ATTENTION_WGMMA)


def _wgmma(
    ctx: LaunchContext, q: Array, k_cache: Array, where: Mapping[str, Argument], v_cache: Array, out: Array, window: int
) -> list[Launch]:
    _, kv_heads, _, head_dim = k_cache.shape
    heads = q.shape[1] // head_dim
    width = next(width for width in ATTENTION_WGMMA if width >= head_dim)
    arguments = named(
        tokens=ctx.tokens, q=q, k_cache=k_cache, v_cache=v_cache, **where, tiles=ctx.tiles, out=out, swapped=0,
        kv_heads=kv_heads, shared_by=heads // kv_heads, inverse_shared=kv_heads / heads, head_dim=head_dim,
        window=window, factor=_factor(head_dim),
    )  # fmt: skip
    # a block has a multiprocessor to itself: more blocks than that wait, as tiles of the same block do
    tiles = max(ceil_div(q.shape[0], WGMMA_ATTENTION_TILE), ceil_div(ctx.n_sms, heads))
    columns = ceil_div(width, 64) * 64  # two stages of keys, three of values, and the queries, in tiles of 64 columns
    staged = 2 * columns * (5 * WGMMA_ATTENTION_KEYS[width] + WGMMA_ATTENTION_TILE)
    shared = 1024 + staged + 10 * 8  # room to align them, and mbarriers
    grid = heads, min(ctx.tiles.shape[0] - 1, tiles)
    return [Launch(ATTENTION_WGMMA[width], grid, WGMMA_ATTENTION_THREADS, arguments, shared, only_for="chunks")]


def _for_groups(ctx: LaunchContext, k_cache: Array) -> bool:
    """Whether `group_attention` supports a cache, whose keys and values have the same type; from sm_80 on."""
    page, head_dim = k_cache.shape[2:]
    return (
        k_cache.dtype in ("f16", "bf16") and head_dim in ATTENTION_GROUP and page % 16 == 0
        and ctx.shared_limit > 64 << 10
    )  # fmt: skip


def _for_bulk(ctx: LaunchContext, tokens: int, k_cache: Array, shared_by: int) -> bool:
    """Whether `bulk_attention` takes a cache that `group_attention` supports: heads share no keys, pages have whole
    runs of 32 keys, there are rows enough. Not in batch-invariant runs, where few rows have the same kernel.
    """
    fits = ctx.bulk_copies and ctx.shared_limit >= BULK_SHARED and tokens >= BULK_FROM and not ctx.batch_invariant
    return fits and shared_by == 1 and k_cache.shape[2] % BULK_KEYS == 0


def _factor(head_dim: int) -> float:
    """What scores are multiplied by, so that their exponentials are powers of 2."""
    return math.log2(math.e) / math.sqrt(head_dim)


def _splits(ctx: LaunchContext, blocks: int, context: int) -> int:
    """Number of blocks that share a head's context: as many as fill the SMs once, because a second wave would wait."""
    return max(1, min(ceil_div(context, MIN_SPLIT_KEYS), ctx.n_sms // blocks))


def _decode(
    ctx: LaunchContext, q: Array, k_cache: Array, where: Mapping[str, Argument], v_cache: Array, out: Array,
    window: int, partials: Array, context: int, listed: bool,
) -> list[Launch]:  # fmt: skip
    """`listed`: only for the rows that `ctx.tiles` lists alone, not for those of chunks of a prompt."""
    tokens = q.shape[0]
    _, kv_heads, _, head_dim = k_cache.shape
    heads = q.shape[1] // head_dim
    shared_by, elements = heads // kv_heads, 4 if k_cache.dtype == "f32" else 8
    operands = named(tokens=ctx.tokens, q=q, k_cache=k_cache, v_cache=v_cache, **where, **scales_of(k_cache), out=out)
    shape = named(kv_heads=kv_heads, shared_by=shared_by, head_dim=head_dim, window=window)
    odd_pages = k_cache.dtype == "q8_0" and k_cache.shape[2] == 1  # a scale may lie in either half of a word
    if head_dim % elements or head_dim > 32 * elements or k_cache.dtype != v_cache.dtype or odd_pages:
        shared = 4 * (PLAIN_ATTENTION_THREADS + head_dim)
        return [Launch(ATTENTION_PLAIN, (heads, tokens), PLAIN_ATTENTION_THREADS, named(**operands, **shape), shared)]
    lanes = 1 << (ceil_div(head_dim, elements) - 1).bit_length()
    counters = ctx.zeros(heads * tokens)

    def launch(kernel_ref: KernelRef, heads_per_block: int, blocks_of_keys: int, **more: Argument) -> Launch:
        """A launch with at most `blocks_of_keys` blocks for the keys of a head."""
        subgroups = ceil_div(shared_by, heads_per_block)
        blocks = kv_heads * subgroups
        if tokens == 1:
            blocks_of_keys = min(blocks_of_keys, _splits(ctx, blocks, context))
        results = 8 * ATTENTION_WARPS * heads_per_block  # maxima and sums of the warps, behind the ring
        shared = ATTENTION_STAGES * ATTENTION_STAGE_BYTES + results
        arguments = named(
            **operands, partials=partials, counters=counters, **shape, lanes=lanes, subgroups=subgroups,
            inverse_subgroups=1 / subgroups, factor=_factor(head_dim), **more,
        )  # fmt: skip
        return Launch(kernel_ref, (blocks, tokens, blocks_of_keys), ATTENTION_THREADS, arguments, shared)

    most_splits = partials.shape[2]
    if tokens > 1:
        rows = named(splits=most_splits, tiles=ctx.tiles, listed=int(listed))

        def bulk(parts: int) -> Launch:
            arguments = named(
                **operands, swapped=0, partials=partials, counters=counters, kv_heads=kv_heads, window=window,
                splits=most_splits, blocks_of_keys=parts, tiles=ctx.tiles, listed=int(listed), most_rows=tokens,
            )  # fmt: skip
            return Launch(ATTENTION_BULK[head_dim], (ctx.n_sms, 1), 32 * BULK_WARPS, arguments, BULK_SHARED)

        def group(blocks_of_keys: int) -> Launch:
            few = shared_by <= FEW_HEADS
            together, kernels = (FEW_HEADS, ATTENTION_FEW) if few else (GROUP_HEADS, ATTENTION_GROUP)
            subgroups = ceil_div(shared_by, together)
            arguments = named(
                **operands, swapped=0, partials=partials, counters=counters, kv_heads=kv_heads,
                shared_by=shared_by, window=window, subgroups=subgroups, inverse_subgroups=1 / subgroups, **rows,
            )  # fmt: skip
            results, ring = 4 * together * (head_dim + 4), GROUP_STAGES * 64 * head_dim  # of a warp, in bytes
            grid, shared = (kv_heads * subgroups, tokens, blocks_of_keys), GROUP_THREADS // 32 * max(results, ring)
            return Launch(kernels[head_dim], grid, GROUP_THREADS, arguments, shared)

        def plain(blocks_of_keys: int) -> Launch:
            kernel_ref, each = (ATTENTION_GROUPED_ROWS, HEADS_PER_BLOCK) if shared_by > 1 else (ATTENTION_ROWS, 1)
            return launch(kernel_ref, each, blocks_of_keys, **rows)

        grouped = _for_groups(ctx, k_cache)
        made = bulk if grouped and _for_bulk(ctx, tokens, k_cache, shared_by) else group if grouped else plain
        only_for: RowKind | None = "single rows" if listed else None
        return [_by_length(
            lambda blocks: replace(made(blocks), only_for=only_for), _most_seen(window, context), most_splits,
            max(4, ROW_BLOCKS // tokens),
        )]  # fmt: skip
    short = launch(ATTENTION_SINGLE, 1, 1)
    if most_splits == 1 or 0 < window <= SPLIT_FROM:
        return [short]
    if shared_by > 1:
        long = launch(ATTENTION_GROUPED, HEADS_PER_BLOCK, most_splits)
    else:
        long = launch(ATTENTION_SINGLE, 1, most_splits)
    return [replace(short, long_context_variant=(SPLIT_FROM, long))]


def _most_seen(window: int, context: int) -> int:
    """Keys that a token sees at most."""
    return min(window, context) if window else context


def _by_length(rows: Callable[[int], Launch], most_keys: int, most_splits: int, most_blocks: int) -> Launch:
    """A launch for rows of many sequences with variants for longer contexts: 1, 4 and more blocks for a head's keys.

    Blocks whose split does not exist end at once, but thousands of them take time. With fewer blocks than splits, a
    block computes several.
    """
    blocks = [1, 4, MAX_SPLITS]
    blocks = sorted({min(count, most_splits, most_blocks) for count in blocks})
    made: Launch | None = None
    for index in range(len(blocks) - 1, -1, -1):
        launch = rows(blocks[index])
        # from this many keys on, the blocks of this variant do not suffice
        if made is not None and (start := blocks[index] * ROW_SPLIT_KEYS) < most_keys:
            launch = replace(launch, long_context_variant=(start, made))
        made = launch
    assert made is not None
    return made


# The operators as the graph declares them


@kernel("attention_scores", "cuda", "f32", KV_TYPES, "i32", "i32", "i32")
def attention_scores(
    ctx: LaunchContext, q: Array, k_cache: Array, positions: Array, sequences: Array, page_table: Array, out: Array,
    window: int,
) -> list[Launch]:  # fmt: skip
    tokens, heads, _ = out.shape
    _, kv_heads, _, head_dim = k_cache.shape
    arguments = named(
        tokens=ctx.tokens, q=q, k_cache=k_cache, **paged(k_cache, positions, sequences, page_table),
        **scales_of(k_cache), out=out, kv_heads=kv_heads, shared_by=heads // kv_heads, head_dim=head_dim, window=window,
    )  # fmt: skip
    return [Launch(ATTENTION_SCORES, (heads, tokens), ATTENTION_THREADS, arguments)]


@kernel("softmax", "cuda", "f32")
def softmax(ctx: LaunchContext, x: Array, out: Array) -> list[Launch]:
    tokens, heads, columns = x.shape
    arguments = named(tokens=ctx.tokens, x=x, out=out, columns=columns)
    return [Launch(SOFTMAX, (heads, tokens), ATTENTION_THREADS, arguments)]


@kernel("attention_values", "cuda", "f32", KV_TYPES, "i32", "i32", "i32")
def attention_values(
    ctx: LaunchContext, weights: Array, v_cache: Array, positions: Array, sequences: Array, page_table: Array,
    out: Array, window: int,
) -> list[Launch]:  # fmt: skip
    tokens, heads, _ = weights.shape
    _, kv_heads, _, head_dim = v_cache.shape
    arguments = named(
        tokens=ctx.tokens, weights=weights, v_cache=v_cache, **paged(v_cache, positions, sequences, page_table),
        **scales_of(v_cache), out=out, kv_heads=kv_heads, shared_by=heads // kv_heads, head_dim=head_dim, window=window,
    )  # fmt: skip
    return [Launch(ATTENTION_VALUES, (heads, tokens), ATTENTION_THREADS, arguments)]
