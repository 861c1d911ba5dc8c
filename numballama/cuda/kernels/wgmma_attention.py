"""Prefill attention on sm_90, by wgmma: 128 queries of one head with 128 keys at a time, or 64 where heads are wide.

A kernel here takes the place of those in `prefill_attention.py`, with the same shapes; head_dim is a multiple of 8, at
most 256, and a query may see a window of keys only.

Data layout. Each of two warpgroups has 64 queries, which lie in shared memory for Q · Kᵀ. Scores, weights and sums over
values stay in registers: a lane's weights are A of P · V as they are. All threads copy tiles of keys to two stages and
tiles of values to three. Tiles have 64 columns; a wider head has several, one after the other.

Order. A step begins the scores of the next keys, then the products of the last weights with their values; while the
tensor cores work on these, the lanes compute maxima and exponentials of the new scores. Warpgroups take turns to begin:
one's exponentials are computed beside the other's products. An mbarrier of a stage tells that all threads' copies are
there, another one that all warps have read it, so that a warpgroup may be most of a step ahead of the other.

Why. mma.sync, as `prefill_attention` uses it, multiplies half as fast, and reads every key and value from shared memory
for 16 queries instead of 64. The floor is arithmetic, 4 · T · length / 2 · head_dim operations per head; with heads of
64 elements exponentials take as long, 16 a cycle on a multiprocessor.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..arithmetic import ex2_approx
from ..barriers import (
    barrier_arrive,
    barrier_sync,
    cp_async_mbarrier_arrive,
    mbarrier_arrive,
    mbarrier_init,
    mbarrier_inval,
    mbarrier_wait,
)
from ..intrinsics import address, cp_async_16, ld_v4_f32, no_unroll, shared_address
from ..mma import (
    causal_mask,
    cvt_rn_x2,
    row_exp2,
    row_max,
    row_scale,
    row_sum,
    st_shared_v4_u32,
)
from ..wgmma import (
    DESCRIPTOR,
    fence_proxy_async,
    rcp_approx,
    value_descriptor,
    weight_words,
    wgmma_end,
    wgmma_pv,
    wgmma_qk,
    wgmma_qk_end,
    window_mask,
    zeros_of,
)
from .attention_out import put_rows
from .common import device, fast_divmod, launch_bounds, pdl_sync
from .decode_attention import LOWEST_SCORE
from .params import WGMMA_ATTENTION_THREADS as THREADS
from .params import WGMMA_ATTENTION_TILE as TILE
from .reduce import quad_max, quad_sum

ROW_BYTES = 128
"""A row of a tile: 64 columns of 16 bits."""
QUERIES_BYTES = 64 * ROW_BYTES
"""A warpgroup's queries in a tile."""


@device
def stage_queries(sums, q, start, row_elements, rows, head_dim, factor, k_cache, base):
    """Write queries, times `factor`, to the tiles of both warpgroups; zeros for rows that are missing and columns from
    `head_dim` on.
    """
    width = 2 * len(sums)
    tiles = (width + 63) >> 6
    zero = np.float32(0)
    thread = cuda.threadIdx.x
    r, piece = thread >> 3, thread & 7
    mine = base + r * ROW_BYTES + ((piece ^ (r & 7)) << 4)
    for i in range(TILE // 32):
        row = r + 32 * i
        for tile in range(tiles):
            column = 64 * tile + 8 * piece
            low, high = (zero, zero, zero, zero), (zero, zero, zero, zero)
            if row < rows and column < head_dim:
                at = start + row * row_elements + column
                low, high = ld_v4_f32(q, at), ld_v4_f32(q, at + 4)
            st_shared_v4_u32(
                mine + ((i >> 1) * tiles + tile) * QUERIES_BYTES + (i & 1) * 32 * ROW_BYTES,
                cvt_rn_x2(k_cache, low[0] * factor, low[1] * factor),
                cvt_rn_x2(k_cache, low[2] * factor, low[3] * factor),
                cvt_rn_x2(k_cache, high[0] * factor, high[1] * factor),
                cvt_rn_x2(k_cache, high[2] * factor, high[3] * factor),
            )


@device
def pages_of(scores, table, first, last):
    """Pages of a thread's rows of a tile of keys, every 32nd from `first` on; after key `last` its page."""
    page_table, table_row, log2_page = table
    row = np.int32(first + (cuda.threadIdx.x >> 3))
    a = page_table[table_row + (min(row, last) >> log2_page)]
    b = page_table[table_row + (min(np.int32(row + 32), last) >> log2_page)]
    if len(scores) == 32:
        return a, b, a, b
    c = page_table[table_row + (min(np.int32(row + 64), last) >> log2_page)]
    d = page_table[table_row + (min(np.int32(row + 96), last) >> log2_page)]
    return a, b, c, d


@device
def fetch_row(sums, scores, to, source, page, row, last, layout):
    """Start copying a thread's pieces of the key or value at position `row`; zeros after `last`."""
    page_bytes, in_page, row_bytes, head_dim = layout
    width = 2 * len(sums)
    piece = cuda.threadIdx.x & 7
    at = source + page * page_bytes + np.int32(row & in_page) * row_bytes
    for tile in range((width + 63) >> 6):
        column = 64 * tile + 8 * piece
        if column < width:
            count = 16 if row <= last and column < head_dim else 0
            cp_async_16(to + tile * 2 * len(scores) * ROW_BYTES, at + 128 * tile, count)


@device
def fetch(sums, scores, to, source, pages, first, last, layout):
    """Start copying a tile of keys or values."""
    row = np.int32(first + (cuda.threadIdx.x >> 3))
    fetch_row(sums, scores, to, source, pages[0], row, last, layout)
    fetch_row(sums, scores, to + 32 * ROW_BYTES, source, pages[1], np.int32(row + 32), last, layout)
    if len(scores) == 64:
        fetch_row(sums, scores, to + 64 * ROW_BYTES, source, pages[2], np.int32(row + 64), last, layout)
        fetch_row(sums, scores, to + 96 * ROW_BYTES, source, pages[3], np.int32(row + 96), last, layout)


@device
def masked(scores, key, start, window, row0):
    """Scores with -infinity for keys that a query does not see. The warpgroup's first query has position `start`."""
    if key + 2 * len(scores) - 1 > start:
        last = start + row0 - key - 2 * (cuda.threadIdx.x & 3)
        scores = causal_mask(scores, last, last + 8)
    if window > 0 and key <= start + 63 - window:
        first = start + row0 - window + 1 - key - 2 * (cuda.threadIdx.x & 3)
        scores = window_mask(scores, first, first + 8)
    return scores


@device
def attend(sums, scores, q, k_cache, v_cache, pages, positions, sequences, first, rows, out, swapped, kv_heads,
           kv_head, head_dim, window, factor):  # fmt: skip
    """Attention of one head of a tile: `rows` tokens of one sequence, from row `first` of the run on."""
    keys, tiles = 2 * len(scores), (2 * len(sums) + 63) >> 6
    head, heads = cuda.blockIdx.x, cuda.gridDim.x
    thread = cuda.threadIdx.x
    group, r, piece = thread >> 7, thread >> 3, thread & 7
    base = (shared_address(cuda.shared.array(0, np.float32), 0) + 1023) & ~1023
    stage = tiles * keys * ROW_BYTES
    keys_at = base + 2 * tiles * QUERIES_BYTES
    to = keys_at + r * ROW_BYTES + ((piece ^ (r & 7)) << 4)
    start = np.int64(positions[first])
    length = start + rows
    key = np.int64(0)
    if window > 0:
        key = max(start - window + 1, 0) & ~(keys - 1)
    page_table, table_stride, log2_page = pages
    head_bytes = (2 * head_dim) << log2_page
    k_at = address(k_cache, 0) + kv_head * head_bytes + 16 * piece
    v_at = address(v_cache, 0) + kv_head * head_bytes + 16 * piece
    table = page_table, np.int64(sequences[first]) * table_stride, np.int32(log2_page)
    last = np.int32(length - 1)
    layout = np.int32(kv_heads * head_bytes), np.int32((1 << log2_page) - 1), np.int32(2 * head_dim), head_dim
    # pages of the keys to fetch are loaded a step earlier, those of the values are those of the keys before
    values_in, keys_in = pages_of(scores, table, key, last), pages_of(scores, table, key + keys, last)
    fetch(sums, scores, to, k_at, values_in, key, last, layout)
    values_at = keys_at + 2 * stage
    full_k = values_at + 3 * stage  # mbarriers: a stage is there, or all warps have read it
    full_v, read_k, read_v = full_k + 16, full_k + 40, full_k + 56
    if thread == 0:
        for i in range(5):
            mbarrier_init(full_k + 8 * i, THREADS)
            mbarrier_init(read_k + 8 * i, THREADS >> 5)
    stage_queries(sums, q, (first * heads + head) * head_dim, heads * head_dim, rows, head_dim, factor, k_cache, base)
    fence_proxy_async()
    cuda.syncthreads()  # the mbarriers and the queries are there
    cp_async_mbarrier_arrive(full_k)
    fetch(sums, scores, to + 2 * stage, v_at, values_in, key, last, layout)
    cp_async_mbarrier_arrive(full_v)
    if key + keys < length:
        fetch(sums, scores, to + stage, k_at, keys_in, key + keys, last, layout)
        cp_async_mbarrier_arrive(full_k + 8)
    values_in, keys_in = keys_in, pages_of(scores, table, key + 2 * keys, last)

    queries = DESCRIPTOR + ((base + group * tiles * QUERIES_BYTES) >> 4)
    keys_of = DESCRIPTOR + (keys_at >> 4)
    values_of = value_descriptor(scores) + (values_at >> 4)
    row0 = ((thread >> 5) & 3) * 16 + ((thread & 31) >> 2)
    mine = start + 64 * group
    mbarrier_wait(full_k, 0)
    fence_proxy_async()
    scores = wgmma_end(wgmma_qk(k_cache, sums, scores, queries, keys_of))
    first_lane = thread & 31 == 0
    if first_lane:
        mbarrier_arrive(read_k)
    scores = masked(scores, key, mine, window, row0)
    maxima = row_max(scores, LOWEST_SCORE, LOWEST_SCORE)
    max0, max1 = quad_max(maxima[0]), quad_max(maxima[1])
    weights = row_exp2(scores, max0, max1)
    totals = row_sum(weights, np.float32(0), np.float32(0))
    rescale0, rescale1 = np.float32(1), np.float32(1)
    key += keys
    # stages: two of keys, in turn, and three of values; whether a stage has had an odd number of tiles before this one
    step, slot, odd = np.int64(1), np.int64(0), np.int64(0)
    while key < length:
        no_unroll()
        sums = wgmma_end(sums)
        if first_lane and step > 1:
            mbarrier_arrive(read_v + 8 * (slot - 1 if slot > 0 else 2))
        words = weight_words(v_cache, weights)
        turn = step & 1
        mbarrier_wait(full_k + 8 * turn, (step >> 1) & 1)
        mbarrier_wait(full_v + 8 * slot, odd)
        fence_proxy_async()
        barrier_sync(1 + group, THREADS)  # the other warpgroup has begun its products
        scores = wgmma_qk(k_cache, sums, weights, queries, keys_of + turn * (stage >> 4))
        sums = row_scale(sums, rescale0, rescale1)
        sums = wgmma_pv(v_cache, sums, words, values_of + slot * (stage >> 4))
        barrier_arrive(2 - group, THREADS)
        slot += 1
        if slot == 3:
            slot, odd = np.int64(0), 1 - odd
        mbarrier_wait(read_v + 8 * slot, 1 - odd)
        fetch(sums, scores, to + (2 + slot) * stage, v_at, values_in, key, last, layout)
        cp_async_mbarrier_arrive(full_v + 8 * slot)
        if key + keys < length:
            mbarrier_wait(read_k + 8 * (1 - turn), 1 - (((step + 1) >> 1) & 1))
            fetch(sums, scores, to + (1 - turn) * stage, k_at, keys_in, key + keys, last, layout)
            cp_async_mbarrier_arrive(full_k + 8 * (1 - turn))
        values_in, keys_in = keys_in, pages_of(scores, table, key + 2 * keys, last)
        scores = wgmma_qk_end(scores)
        if first_lane:
            mbarrier_arrive(read_k + 8 * turn)
        scores = masked(scores, key, mine, window, row0)
        maxima = row_max(scores, max0, max1)
        new_max0, new_max1 = quad_max(maxima[0]), quad_max(maxima[1])
        rescale0, rescale1 = ex2_approx(max0 - new_max0), ex2_approx(max1 - new_max1)
        max0, max1 = new_max0, new_max1
        weights = row_exp2(scores, max0, max1)
        totals = row_sum(weights, totals[0] * rescale0, totals[1] * rescale1)
        step += 1
        key += keys
    sums = wgmma_end(sums)
    mbarrier_wait(full_v + 8 * slot, odd)
    fence_proxy_async()
    words = weight_words(v_cache, weights)
    sums = row_scale(sums, rescale0, rescale1)
    sums = wgmma_end(wgmma_pv(v_cache, sums, words, values_of + slot * (stage >> 4)))
    sums = row_scale(sums, rcp_approx(quad_sum(totals[0])), rcp_approx(quad_sum(totals[1])))
    row0 += 64 * group
    at = ((first + row0) * heads + head) * head_dim + 2 * (thread & 3)
    put_rows(out, swapped, sums, at, at + 8 * heads * head_dim, head_dim if row0 < rows else 0,
             head_dim if row0 + 8 < rows else 0)  # fmt: skip
    cuda.syncthreads()  # no thread reads this tile any more
    if thread == 0:
        for i in range(10):
            mbarrier_inval(full_k + 8 * i)


@device
def attend_tiles(sums, scores, q, k_cache, v_cache, pages, positions, sequences, tiles, out, swapped,
                 kv_heads, shared_by, inverse_shared, head_dim, window, factor):  # fmt: skip
    """The body of the kernels here: blockIdx.x is the head, blockIdx.y the first of a block's tiles."""
    pdl_sync()
    kv_head, _ = fast_divmod(cuda.blockIdx.x, shared_by, inverse_shared)
    if cuda.threadIdx.x >= 128:
        barrier_arrive(1, THREADS)  # the first turn is the first warpgroup's
    tile, count = np.int64(cuda.blockIdx.y), np.int64(tiles[0])
    while tile < count:
        no_unroll()
        first, rows = np.int64(tiles[2 * tile + 2]), np.int64(tiles[2 * tile + 3])
        attend(sums, scores, q, k_cache, v_cache, pages, positions, sequences, first, rows, out, swapped, kv_heads,
               kv_head, head_dim, window, factor)  # fmt: skip
        tile += cuda.gridDim.y


@launch_bounds(min_blocks=1)
@cuda.jit
def attention_wgmma_64_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                              tiles, out, swapped, kv_heads, shared_by, inverse_shared, head_dim, window,
                              factor):  # fmt: skip
    """Heads of up to 64 elements."""
    attend_tiles(zeros_of(32), zeros_of(64), q, k_cache, v_cache, (page_table, table_stride, log2_page), positions,
                 sequences, tiles, out, swapped, kv_heads, shared_by, inverse_shared, head_dim, window,
                 factor)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def attention_wgmma_96_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                              tiles, out, swapped, kv_heads, shared_by, inverse_shared, head_dim, window,
                              factor):  # fmt: skip
    """Heads of up to 96 elements."""
    attend_tiles(zeros_of(48), zeros_of(64), q, k_cache, v_cache, (page_table, table_stride, log2_page), positions,
                 sequences, tiles, out, swapped, kv_heads, shared_by, inverse_shared, head_dim, window,
                 factor)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def attention_wgmma_128_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                               tiles, out, swapped, kv_heads, shared_by, inverse_shared, head_dim, window,
                               factor):  # fmt: skip
    """Heads of up to 128 elements."""
    attend_tiles(zeros_of(64), zeros_of(64), q, k_cache, v_cache, (page_table, table_stride, log2_page), positions,
                 sequences, tiles, out, swapped, kv_heads, shared_by, inverse_shared, head_dim, window,
                 factor)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def attention_wgmma_256_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                               tiles, out, swapped, kv_heads, shared_by, inverse_shared, head_dim, window,
                               factor):  # fmt: skip
    """Heads of up to 256 elements."""
    attend_tiles(zeros_of(128), zeros_of(32), q, k_cache, v_cache, (page_table, table_stride, log2_page), positions,
                 sequences, tiles, out, swapped, kv_heads, shared_by, inverse_shared, head_dim, window,
                 factor)  # fmt: skip


assert THREADS == 2 * TILE, "a warpgroup for each 64 queries; a thread copies 16 bytes of every 32nd row"
