"""Decode attention of many rows on tensor cores: the query heads that share a KV head are the rows of one product.

The work and the splits are `rows_attention`'s: a row's keys in parts of `ROW_SPLIT_KEYS`, by the row's own length, so
that its result does not depend on other rows. Caches are float16 or bfloat16; queries and weights are rounded to that
type, as in `prefill_attention`, whose tiles and fragments these are. head_dim is a multiple of 8, at most 128; 2 to 16
query heads share a KV head.

Data layout. A block computes one KV head of one row in one split. Each of its four warps has the same 16 queries, the
heads of the group, and every fourth tile of 64 keys and values in a stage of its own, so warps need no barrier until
they merge their sums in shared memory.

Why. A key is read once for the whole group, and a split of 256 keys is one tile a warp: all its loads are in flight at
once, before the kernel waits for its predecessor if the row's sequence has no other row in the run. Memory is the floor.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..intrinsics import (
    address,
    atom_add_1,
    cp_async_16,
    cp_async_commit,
    cp_async_wait_all,
    ex2_approx,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_v4_f32,
    no_unroll,
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
    st_shared_rows,
    st_shared_v4_u32,
    zeros32,
    zeros64,
)
from .common import LOG2_E, device, fast_divmod, first_visible, is_padding_token, launch_bounds
from .decode_attention import LOWEST_SCORE
from .params import GROUP_ATTENTION_THREADS as THREADS
from .params import GROUP_ATTENTION_WARPS as WARPS
from .params import PREFILL_ATTENTION_TILE as TILE
from .params import ROW_SPLIT_KEYS
from .reduce import quad_max, quad_sum


@device
def fetch_warp_tile(base, k_at, v_at, pages, table_row, page_bytes, first, begin, end, head_dim, width):
    """Start copying those of the keys and values `first` to `first` + 63 that are in [begin, end) to a warp's stage.

    Zeros are written for the others. Arguments are those of `prefill_attention.fetch_tile`.
    """
    page_table, _, log2_page = pages
    lane, chunks = cuda.threadIdx.x & 31, width // 8
    chunk, at_once, in_page = lane & (chunks - 1), 32 // chunks, (1 << log2_page) - 1
    for row in range(lane // chunks, TILE, at_once):
        no_unroll()
        position, count, page = first + row, 0, np.int32(0)
        if begin <= position < end and 8 * chunk < head_dim:
            count, page = 16, page_table[table_row + (position >> log2_page)]
        at = page * page_bytes + (position & in_page) * head_dim * 2 + chunk * 16
        to = base + row * 2 * width + ((chunk ^ (row & 7)) << 4)
        cp_async_16(to, k_at + at, count)
        cp_async_16(to + TILE * 2 * width, v_at + at, count)


@device
def fetch_key(base, k_at, v_at, pages, table_row, page_bytes, first, position, head_dim, width):
    """Start copying the key and value of one position into the stage that begins with position `first`."""
    page_table, _, log2_page = pages
    chunk = cuda.threadIdx.x & 31
    if 8 * chunk < head_dim:
        row = position - first
        page = page_table[table_row + (position >> log2_page)]
        at = page * page_bytes + (position & ((1 << log2_page) - 1)) * head_dim * 2 + chunk * 16
        to = base + row * 2 * width + ((chunk ^ (row & 7)) << 4)
        cp_async_16(to, k_at + at, 16)
        cp_async_16(to + TILE * 2 * width, v_at + at, 16)


@device
def stage_group(q, start, shared_by, head_dim, width, factor, k_cache, base):
    """Write the group's queries, times `factor`, to 16 rows of shared memory; zeros for missing ones."""
    chunks, zero = width // 8, np.float32(0)
    for n in range(cuda.threadIdx.x, 16 * chunks, THREADS):
        row, chunk = n // chunks, n & (chunks - 1)
        low, high = (zero, zero, zero, zero), (zero, zero, zero, zero)
        if row < shared_by and 8 * chunk < head_dim:
            at = start + row * head_dim + 8 * chunk
            low, high = ld_v4_f32(q, at), ld_v4_f32(q, at + 4)
        st_shared_v4_u32(
            base + row * 2 * width + ((chunk ^ (row & 7)) << 4),
            cvt_rn_x2(k_cache, low[0] * factor, low[1] * factor),
            cvt_rn_x2(k_cache, low[2] * factor, low[3] * factor),
            cvt_rn_x2(k_cache, high[0] * factor, high[1] * factor),
            cvt_rn_x2(k_cache, high[2] * factor, high[3] * factor),
        )


@device
def merged(values, at, stride, count, total_at):
    """(weighted sum of element `at`, of the sums of exponentials) over `count` results `stride` apart. A result has its
    maximum at `total_at` and its sum of exponentials after it.
    """
    largest = LOWEST_SCORE
    for i in range(count):
        no_unroll()
        largest = max(largest, values[total_at + i * stride])
    value, exp_sum = np.float32(0), np.float32(0)
    for i in range(count):
        no_unroll()
        weight = ex2_approx(values[total_at + i * stride] - largest)
        value += weight * values[at + i * stride]
        exp_sum += weight * values[total_at + i * stride + 1]
    return value, exp_sum, largest


@device
def attend_group(q, k_cache, v_cache, pages, positions, sequences, out, partials, counters, kv_heads, shared_by,
                 head_dim, window, inverse_head_dim, splits, tiles, listed, zeros):  # fmt: skip
    """The body of both kernels; `zeros` are a lane's sums of 16 queries' weighted values, width / 2 elements."""
    t, kv_head, tokens = cuda.blockIdx.y, cuda.blockIdx.x, cuda.gridDim.y
    if listed:
        if t >= tiles[1]:
            if t == 0:
                griddepcontrol_wait()  # a kernel must not end before the preceding one
            return
        t = np.int64(tiles[2 * (tokens - t)])
    position, sequence = np.int64(positions[t]), np.int64(sequences[t])
    first = first_visible(position + 1, window)
    seen, keys = position + 1 - first, np.int64(ROW_SPLIT_KEYS)
    while keys * splits < seen:
        keys *= 2
    splits_used = (seen + keys - 1) // keys

    shared = cuda.shared.array(0, np.float32)
    base, width = shared_address(shared, 0), 2 * len(zeros)
    stage, line, part_size = 2 * TILE * 2 * width, width + 4, head_dim + 2
    flag = (WARPS * stage + 16 * 2 * width) >> 2  # no static array: rows would not begin at multiples of 128 bytes
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    own, queries_at = base + warp * stage, base + WARPS * stage
    _, table_stride, log2_page = pages
    table_row, head_bytes = sequence * table_stride, (head_dim * 2) << log2_page
    k_at, v_at = address(k_cache, 0) + kv_head * head_bytes, address(v_cache, 0) + kv_head * head_bytes
    page_bytes, first_head = kv_heads * head_bytes, (t * kv_heads + kv_head) * shared_by
    factor = LOG2_E / np.float32(math.sqrt(np.float32(head_dim)))
    k_lane = own + ((lane & 7) + ((lane >> 4) << 3)) * 2 * width + ((((lane >> 3) & 1) ^ (lane & 7)) << 4)
    for part in range(cuda.blockIdx.z, splits_used, cuda.gridDim.z):
        begin = first + part * keys
        end = min(position + 1, begin + keys)
        key = begin + TILE * warp
        cuda.syncthreads()  # the split before this one is no longer in shared memory
        # keys before the token's own are from earlier runs, if `listed`: then no other row is of its sequence
        if not listed:
            griddepcontrol_wait()
        fetch_warp_tile(own, k_at, v_at, pages, table_row, page_bytes, key, begin, min(end, position), head_dim, width)
        griddepcontrol_wait()
        stage_group(q, first_head * head_dim, shared_by, head_dim, width, factor, k_cache, queries_at)
        cp_async_wait_all()  # the zeros in the place of the token's own key
        cuda.syncthreads()
        if key <= position < min(end, key + TILE):
            fetch_key(own, k_at, v_at, pages, table_row, page_bytes, key, position, head_dim, width)
        cp_async_commit()
        cp_async_wait_all()
        cuda.syncthreads()
        griddepcontrol_launch_dependents()
        queries = ldmatrix_queries(zeros, queries_at + (lane & 15) * 2 * width + (((lane >> 4) ^ (lane & 7)) << 4))
        sums = zeros
        max0, max1, sum_exp0, sum_exp1 = LOWEST_SCORE, LOWEST_SCORE, np.float32(0), np.float32(0)
        while key < end:
            scores = mma_qk(k_cache, queries, k_lane)
            if key + TILE > end:
                last = end - 1 - key - 2 * (lane & 3)
                scores = causal_mask(scores, last, last)
            maxima = row_max(scores, max0, max1)
            new_max0, new_max1 = quad_max(maxima[0]), quad_max(maxima[1])
            rescale0, rescale1 = ex2_approx(max0 - new_max0), ex2_approx(max1 - new_max1)
            max0, max1 = new_max0, new_max1
            weights = row_exp2(scores, max0, max1)
            totals = row_sum(weights, sum_exp0 * rescale0, sum_exp1 * rescale1)
            sum_exp0, sum_exp1 = totals[0], totals[1]
            sums = mma_pv(v_cache, row_scale(sums, rescale0, rescale1), weights, k_lane + TILE * 2 * width)
            key += WARPS * TILE
            if key < end:
                cuda.syncwarp()  # no lane reads the tile before this one any more
                fetch_warp_tile(own, k_at, v_at, pages, table_row, page_bytes, key, begin, end, head_dim, width)
                cp_async_commit()
                cp_async_wait_all()
                cuda.syncwarp()
        sum_exp0, sum_exp1 = quad_sum(sum_exp0), quad_sum(sum_exp1)
        cuda.syncthreads()  # the warps' results take the place of the stages
        row = warp * 16 + (lane >> 2)
        st_shared_rows(sums, base + (row * line + 2 * (lane & 3)) * 4, base + ((row + 8) * line + 2 * (lane & 3)) * 4)
        if lane & 3 == 0:
            shared[row * line + width], shared[row * line + width + 1] = max0, sum_exp0
            shared[(row + 8) * line + width], shared[(row + 8) * line + width + 1] = max1, sum_exp1
        cuda.syncthreads()
        for n in range(cuda.threadIdx.x, shared_by * head_dim, THREADS):
            no_unroll()
            h, d = fast_divmod(n, head_dim, inverse_head_dim)
            value, exp_sum, largest = merged(shared, h * line + d, 16 * line, WARPS, h * line + width)
            if splits_used == 1:
                out[(first_head + h) * head_dim + d] = value / exp_sum
            else:
                at = ((first_head + h) * splits + part) * part_size
                partials[at + d] = value
                if d == 0:
                    partials[at + head_dim], partials[at + head_dim + 1] = largest, exp_sum
        if splits_used > 1:
            counter = t * kv_heads + kv_head
            cuda.syncthreads()
            if cuda.threadIdx.x == 0:
                last_to_finish = atom_add_1(address(counters, counter)) == splits_used - 1
                shared[flag] = np.float32(1 if last_to_finish else 0)
            cuda.syncthreads()
            if shared[flag] != 0:
                for n in range(cuda.threadIdx.x, shared_by * head_dim, THREADS):
                    no_unroll()
                    h, d = fast_divmod(n, head_dim, inverse_head_dim)
                    at = (first_head + h) * splits * part_size
                    value, exp_sum, _ = merged(partials, at + d, part_size, splits_used, at + head_dim)
                    out[(first_head + h) * head_dim + d] = value / exp_sum
                if cuda.threadIdx.x == 0:
                    counters[counter] = 0


@launch_bounds(min_blocks=2)
@cuda.jit
def attention_group_64_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                              out, partials, counters, kv_heads, shared_by, head_dim, window, inverse_head_dim, splits,
                              tiles, listed):  # fmt: skip
    """Heads of up to 64 elements."""
    if is_padding_token(tokens):
        return
    pages = page_table, table_stride, log2_page
    attend_group(q, k_cache, v_cache, pages, positions, sequences, out, partials, counters, kv_heads, shared_by,
                 head_dim, window, inverse_head_dim, splits, tiles, listed, zeros32())  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def attention_group_128_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                               out, partials, counters, kv_heads, shared_by, head_dim, window, inverse_head_dim, splits,
                               tiles, listed):  # fmt: skip
    """Heads of up to 128 elements."""
    if is_padding_token(tokens):
        return
    pages = page_table, table_stride, log2_page
    attend_group(q, k_cache, v_cache, pages, positions, sequences, out, partials, counters, kv_heads, shared_by,
                 head_dim, window, inverse_head_dim, splits, tiles, listed, zeros64())  # fmt: skip
