"""Prefill attention: many query tokens on tensor cores, 64 queries of one head with 64 keys at a time.

out = softmax(Q · Kᵀ / sqrt(head_dim)) · V in one pass over keys and values (Dao et al., FlashAttention-2, 2023), each
query with the keys up to its own position. Shapes: q and out [T, n_heads · head_dim] in float32, caches [sequences,
n_kv_heads, context, head_dim] in float16 or bfloat16; head_dim is a multiple of 8, at most 128.

Data layout. Each of four warps has 16 queries. Their fragments stay in registers, and so do the sums over values.
Scores have the layout of the weights' fragments, so they stay in registers too. Tiles of 64 keys and 64 values are
copied to two stages of shared memory, one ahead of the one in use. A head is padded with zeros to 64 or 128 elements.
Queries may belong to any sequences: a tile's tokens are processed in runs of one sequence.

Why. The work is 4 · T · length / 2 · head_dim operations per head. Tensor cores of an H200 do some 600 · 10^12 per
second, and K and V are read once for 64 queries, so arithmetic is the floor. Operands have the cache's 16-bit type;
queries and weights are rounded to it. Sums, maxima and exponentials are float32.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..intrinsics import (
    address,
    cp_async_16,
    cp_async_commit,
    cp_async_wait_all,
    ex2_approx,
    ld_v4_f32,
    shared_address,
)
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
from .common import FULL_MASK, LOG2_E, device, kv_index, launch_bounds, pdl_sync
from .decode_attention import LOWEST_SCORE
from .params import PREFILL_ATTENTION_THREADS as THREADS
from .params import PREFILL_ATTENTION_TILE as TILE
from .reduce import quad_max, quad_sum


@device
def stage_queries(q, start, row_elements, rows, head_dim, width, factor, k_cache, base):
    """Write a tile's queries, times `factor`, to shared memory in rows of `width` elements. Absent queries are 0."""
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
def fetch_tile(base, k_at, v_at, first, length, head_dim, width):
    """Start copying keys and values `first` to `first` + 63; zeros from `length` on and after `head_dim`."""
    chunks = width // 8
    row, chunk = cuda.threadIdx.x // chunks, cuda.threadIdx.x & (chunks - 1)
    to = base + row * 2 * width + ((chunk ^ (row & 7)) << 4)
    step = THREADS // chunks  # a multiple of 8, so that all of a thread's rows are swizzled alike
    at = (first + row) * head_dim * 2 + chunk * 16
    rows_left = length - first - row if 8 * chunk < head_dim else 0
    k_from, v_from, bytes_on = k_at + at, v_at + at, step * head_dim * 2
    for i in range(TILE // step):
        count = 16 if i * step < rows_left else 0
        cp_async_16(to + i * step * 2 * width, k_from, count)
        cp_async_16(to + (TILE + i * step) * 2 * width, v_from, count)
        k_from += bytes_on
        v_from += bytes_on
    cp_async_commit()


@device
def run_of_sequence(sequences, positions, first, begin, rows):
    """(end, largest position) of the run of tokens of one sequence that begins at row `begin`."""
    sequence, lane = sequences[first + begin], cuda.threadIdx.x & 31
    end, last_position = np.int32(rows), np.int32(-1)
    for i in range(2):
        row = lane + 32 * i
        if begin <= row < rows and sequences[first + row] != sequence:
            end = min(end, np.int32(row))
    for i in range(5):
        end = min(end, np.int32(cuda.shfl_xor_sync(FULL_MASK, end, 16 >> i)))
    for i in range(2):
        row = lane + 32 * i
        if begin <= row < end:
            last_position = max(last_position, np.int32(positions[first + row]))
    for i in range(5):
        last_position = max(last_position, np.int32(cuda.shfl_xor_sync(FULL_MASK, last_position, 16 >> i)))
    return end, last_position


@device
def attend(tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, shared_by, context, head_dim, sums):
    """The body of both kernels; `sums` is a lane's part of 16 queries' weighted values, width / 2 elements."""
    # the last tokens have the most keys: their blocks start first
    first, head = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * TILE, cuda.blockIdx.y
    if first >= tokens[0]:
        return
    pdl_sync()
    shared = cuda.shared.array(0, np.float32)
    base, width, rows = shared_address(shared, 0), 2 * len(sums), min(TILE, tokens[0] - first)
    stage = 2 * TILE * 2 * width
    lane, warp, heads = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.gridDim.y
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
    position0 = positions[first + row0] if row0 < rows else np.int32(-1)
    position1 = positions[first + row1] if row1 < rows else np.int32(-1)
    max0, max1, sum_exp0, sum_exp1 = LOWEST_SCORE, LOWEST_SCORE, np.float32(0), np.float32(0)
    begin = 0
    while begin < rows:
        end, last_position = run_of_sequence(sequences, positions, first, begin, rows)
        last0 = position0 if begin <= row0 < end else np.int32(-1)
        last1 = position1 if begin <= row1 < end else np.int32(-1)
        at = kv_index(sequences[first + begin], head // shared_by, 0, kv_heads, context, head_dim)
        k_at, v_at, length = address(k_cache, at), address(v_cache, at), last_position + 1
        cuda.syncthreads()  # no thread reads the stages any more
        fetch_tile(base, k_at, v_at, 0, length, head_dim, width)
        stage_at = 0
        for key in range(0, length, TILE):
            cp_async_wait_all()
            cuda.syncthreads()
            if key + TILE < length:
                fetch_tile(base + stage - stage_at, k_at, v_at, key + TILE, length, head_dim, width)
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
        begin = end
    one = np.float32(1)
    sums = row_scale(sums, one / quad_sum(sum_exp0), one / quad_sum(sum_exp1))
    at = ((first + row0) * heads + head) * head_dim + 2 * (lane & 3)
    st_global_rows(sums, address(out, at), address(out, at + 8 * heads * head_dim), head_dim if row0 < rows else 0,
             head_dim if row1 < rows else 0)  # fmt: skip


@launch_bounds(min_blocks=2)
@cuda.jit
def attention_64_kernel(tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, shared_by, context, head_dim):
    """Heads of up to 64 elements."""
    attend(tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, shared_by, context, head_dim, zeros32())


@launch_bounds(min_blocks=2)
@cuda.jit
def attention_128_kernel(
    tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, shared_by, context, head_dim
):
    """Heads of up to 128 elements."""
    attend(tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, shared_by, context, head_dim, zeros64())
