"""Prefill attention: many query tokens on tensor cores, 64 queries of one head with 64 keys at a time.

out = softmax(Q · Kᵀ / sqrt(head_dim)) · V in one pass over keys and values (Dao et al., FlashAttention-2, 2023), each
query with the keys up to its own position. Shapes: q and out [T, n_heads · head_dim] in float32, caches [pages,
n_kv_heads, page, head_dim] in float16 or bfloat16; head_dim is a multiple of 8, at most 128.

Data layout. Each of four warps has 16 queries. Their fragments stay in registers, and so do the sums over values.
Scores have the layout of the weights' fragments, so they stay in registers too. Tiles of 64 keys and 64 values are
copied to two stages of shared memory, one ahead of the one in use. A head is padded with zeros to 64 or 128 elements.
The host divides a run into tiles of up to 64 tokens of one sequence whose positions follow each other
(`program.write_tiles`); tokens that stand alone are left to `rows_attention`. A block computes one head of a tile.

Why. The work is 4 · T · length / 2 · head_dim operations per head. Tensor cores of an H200 do some 600 · 10^12 per
second, and K and V are read once for 64 queries, so arithmetic is the floor. Operands have the cache's 16-bit type;
queries and weights are rounded to it. Sums, maxima and exponentials are float32.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..arithmetic import ex2_approx
from ..intrinsics import address, cp_async_16, cp_async_commit, cp_async_wait_all, ld_v4_f32, shared_address
from ..mma import (
    causal_mask,
    cvt_rn_x2,
    ldmatrix_queries,
    mma_pv,
    mma_qk,
    row_exp2,
    row_max,
    row_scale,
    row_sum,
    st_global_rows,
    st_shared_v4_u32,
    zeros32,
    zeros64,
)
from .common import LOG2_E, device, launch_bounds, pdl_sync
from .decode_attention import LOWEST_SCORE
from .params import PREFILL_ATTENTION_THREADS as THREADS
from .params import PREFILL_ATTENTION_TILE as TILE
from .reduce import quad_max, quad_sum


@device
def stage_queries(q, start, row_elements, rows, head_dim, width, factor, k_cache, base):
    """Write a tile's queries, times `factor`, to shared memory in rows of `width` elements; zeros for missing ones."""
    chunks = width // 8
    zero = np.float32(0)
    for n in range(cuda.threadIdx.x, TILE * chunks, THREADS):
        row, chunk = n // chunks, n & (chunks - 1)
        low, high = (zero, zero, zero, zero), (zero, zero, zero, zero)
        if row < rows and 8 * chunk < head_dim:
            at = start + row * row_elements + 8 * chunk
            low, high = ld_v4_f32(q, at), ld_v4_f32(q, at + 4)
        st_shared_v4_u32(
            base + row * 2 * width + ((chunk ^ (row & 7)) << 4),
            cvt_rn_x2(k_cache, low[0] * factor, low[1] * factor),
            cvt_rn_x2(k_cache, low[2] * factor, low[3] * factor),
            cvt_rn_x2(k_cache, high[0] * factor, high[1] * factor),
            cvt_rn_x2(k_cache, high[2] * factor, high[3] * factor),
        )


@device
def fetch_tile(base, k_at, v_at, pages, table_row, page_bytes, first, length, head_dim, width):
    """Start copying keys and values `first` to `first` + 63 of a sequence; zeros from `length` on and after `head_dim`.

    `k_at` and `v_at` are the addresses of the KV head in page 0, `table_row` the index of the sequence's row in the
    page table, `page_bytes` the bytes of a page, all heads together.
    """
    page_table, _, log2_page = pages
    chunks = width // 8
    row, chunk = cuda.threadIdx.x // chunks, cuda.threadIdx.x & (chunks - 1)
    to = base + row * 2 * width + ((chunk ^ (row & 7)) << 4)
    step = THREADS // chunks  # a multiple of 8, so that all of a thread's rows are swizzled alike
    rows_left = length - first - row if 8 * chunk < head_dim else 0
    position, in_page = first + row, (1 << log2_page) - 1
    for i in range(TILE // step):
        count, page = 0, np.int32(0)
        if i * step < rows_left:
            count, page = 16, page_table[table_row + (position >> log2_page)]
        at = page * page_bytes + (position & in_page) * head_dim * 2 + chunk * 16
        cp_async_16(to + i * step * 2 * width, k_at + at, count)
        cp_async_16(to + (TILE + i * step) * 2 * width, v_at + at, count)
        position += step
    cp_async_commit()


@device
def attend(q, k_cache, v_cache, pages, positions, sequences, first, rows, out, kv_heads, shared_by, head_dim, sums):
    """Attention of one head of a tile: `rows` tokens of one sequence, from row `first` of the run on. `sums` is a
    lane's part of 16 queries' weighted values, width / 2 elements.
    """
    shared = cuda.shared.array(0, np.float32)
    head, heads = cuda.blockIdx.y, cuda.gridDim.y
    base, width = shared_address(shared, 0), 2 * len(sums)
    stage = 2 * TILE * 2 * width
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    factor = LOG2_E / np.float32(math.sqrt(np.float32(head_dim)))
    stage_queries(
        q, (first * heads + head) * head_dim, heads * head_dim, rows, head_dim, width, factor, k_cache, base + stage
    )
    cuda.syncthreads()
    queries = ldmatrix_queries(
        sums, base + stage + (warp * 16 + (lane & 15)) * 2 * width + (((lane >> 4) ^ (lane & 7)) << 4)
    )
    k_lane = base + ((lane & 7) + ((lane >> 4) << 3)) * 2 * width + ((((lane >> 3) & 1) ^ (lane & 7)) << 4)

    row0 = warp * 16 + (lane >> 2)
    row1 = row0 + 8
    start = np.int64(positions[first])
    last0, last1 = start + row0 if row0 < rows else -1, start + row1 if row1 < rows else -1
    max0, max1, sum_exp0, sum_exp1 = LOWEST_SCORE, LOWEST_SCORE, np.float32(0), np.float32(0)
    _, table_stride, log2_page = pages
    table_row, head_bytes = np.int64(sequences[first]) * table_stride, (head_dim * 2) << log2_page
    at = (head // shared_by) * head_bytes
    k_at, v_at = address(k_cache, 0) + at, address(v_cache, 0) + at
    page_bytes, length = kv_heads * head_bytes, start + rows
    cuda.syncthreads()  # no thread reads the queries any more
    fetch_tile(base, k_at, v_at, pages, table_row, page_bytes, 0, length, head_dim, width)
    stage_at = 0
    for key in range(0, length, TILE):
        cp_async_wait_all()
        cuda.syncthreads()
        if key + TILE < length:
            fetch_tile(base + stage - stage_at, k_at, v_at, pages, table_row, page_bytes, key + TILE, length, head_dim,
                       width)  # fmt: skip
        scores = mma_qk(k_cache, queries, k_lane + stage_at)
        if key + TILE - 1 > min(last0, last1):
            lane_key = key + 2 * (lane & 3)
            scores = causal_mask(scores, last0 - lane_key, last1 - lane_key)
        maxima = row_max(scores, max0, max1)
        new_max0, new_max1 = quad_max(maxima[0]), quad_max(maxima[1])
        rescale0, rescale1 = ex2_approx(max0 - new_max0), ex2_approx(max1 - new_max1)
        max0, max1 = new_max0, new_max1
        weights = row_exp2(scores, max0, max1)
        totals = row_sum(weights, sum_exp0 * rescale0, sum_exp1 * rescale1)
        sum_exp0, sum_exp1 = totals[0], totals[1]
        sums = mma_pv(v_cache, row_scale(sums, rescale0, rescale1), weights, k_lane + stage_at + TILE * 2 * width)
        stage_at = stage - stage_at
    one = np.float32(1)
    sums = row_scale(sums, one / quad_sum(sum_exp0), one / quad_sum(sum_exp1))
    at = ((first + row0) * heads + head) * head_dim + 2 * (lane & 3)
    st_global_rows(sums, address(out, at), address(out, at + 8 * heads * head_dim), head_dim if row0 < rows else 0,
             head_dim if row1 < rows else 0)  # fmt: skip


@device
def attend_tiles(q, k_cache, v_cache, pages, positions, sequences, tiles, out, kv_heads, shared_by, head_dim, sums):
    """Attention of one head of the block's tiles. `sums` is as in `attend`."""
    pdl_sync()
    for tile in range(cuda.blockIdx.x, tiles[0], cuda.gridDim.x):
        first, rows = np.int64(tiles[2 * tile + 2]), np.int64(tiles[2 * tile + 3])
        cuda.syncthreads()  # no thread reads the tile before this one
        attend(q, k_cache, v_cache, pages, positions, sequences, first, rows, out, kv_heads, shared_by, head_dim, sums)


@launch_bounds(min_blocks=2)
@cuda.jit
def attention_64_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page, tiles,
                        out, kv_heads, shared_by, head_dim):  # fmt: skip
    """Heads of up to 64 elements."""
    attend_tiles(q, k_cache, v_cache, (page_table, table_stride, log2_page), positions, sequences, tiles, out, kv_heads,
                 shared_by, head_dim, zeros32())  # fmt: skip


@launch_bounds(min_blocks=2)
@cuda.jit
def attention_128_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page, tiles,
                         out, kv_heads, shared_by, head_dim):  # fmt: skip
    """Heads of up to 128 elements."""
    attend_tiles(q, k_cache, v_cache, (page_table, table_stride, log2_page), positions, sequences, tiles, out, kv_heads,
                 shared_by, head_dim, zeros64())  # fmt: skip
