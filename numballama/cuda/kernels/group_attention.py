"""Decode attention of many rows on tensor cores: up to 8 query heads that share keys, with 16 of their keys at a time.

It computes what `rows_attention` does, with the same splits, for caches of 16 bits and heads of 64 or 128 elements.

Data layout. A warp has 16 keys and their values at a time. A lane copies to a ring of its own in shared memory what it
will have in registers, 16 bytes at a time, in the layout that products want (`cuda/group_mma.py`). Queries and weights
are split into two pieces of the cache's type, separate rows or columns of a product: the result is as exact as float32
allows (bfloat16: to 16 bits). Each warp has every `warps`-th 16 keys; at the end the block merges its warps' results.

Why. Of a cache in float16, 64 rows of 200 keys with 4 KV heads of 64 elements are 13 MB a layer, 3 µs of an H200's
bandwidth. So latency counts: no barrier before the merge, a key is read once for all its heads, no copy fills the L1.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..arithmetic import ex2_approx
from ..group_mma import (
    ld_parts,
    mma_scores,
    mma_scores_few,
    mma_values,
    mma_values_few,
    scaled,
    st_shared_few,
    st_shared_heads,
)
from ..intrinsics import (
    address,
    atom_add_1,
    cp_async_16,
    cp_async_commit,
    cp_async_wait_all,
    cp_async_wait_group,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    no_unroll,
    shared_address,
)
from ..mma import cvt_rn_x2, zeros16, zeros32, zeros64
from ..quant_traits import unpack8
from .attention_out import put_element
from .common import FULL_MASK, LOG2_E, device, fast_divmod, is_padding_token, launch_bounds
from .decode_attention import LOWEST_SCORE, weighted_element, weights_of_head
from .group_queries import load_columns, load_queries
from .params import FEW_HEADS, GROUP_HEADS, GROUP_STAGES, MAX_SPLITS, SPLIT_WEIGHTS
from .reduce import quad_max, quad_sum
from .rows_attention import splits_of_row

KEYS = 16
"""Keys of a warp at a time."""
SCALE = np.float32(14)
"""Weights are times 2^14, so that small ones keep their digits in float16. Their sum is too."""


@device
def masked(score, key, low, last):
    """The score of a key if it is one of `low` to `last`."""
    return score if low <= key <= last else LOWEST_SCORE


@device
def weight_of(score, maximum, key, low, last):
    """2^(score - maximum), scaled, if the key is one of `low` to `last`."""
    return ex2_approx(score - (maximum - SCALE)) if low <= key <= last else np.float32(0)


@device
def clamped(key, low, last):
    """A key from `low` to `last`: for one that is not, a neighbour, whose memory holds numbers."""
    return max(min(key, last), low)


@device
def place_of(place, page, position):
    """(byte offset of the 16 keys from a position on in a cache, the first and the last of them that exist). After the
    end it is the last 16 keys again, which are read and not used.
    """
    log2_page, page_bytes, row_bytes, begin, end = place
    p = position & -KEYS
    at = page * page_bytes + (p & ((1 << log2_page) - 1)) * row_bytes
    return at, np.int32(max(begin - p, 0)), np.int32(min(end - 1 - p, KEYS - 1))


@device
def wait_for_keys():
    """Wait until at most the newest `GROUP_STAGES` - 1 of this thread's steps are pending."""
    if GROUP_STAGES == 3:
        cp_async_wait_group(2)
    elif GROUP_STAGES == 2:
        cp_async_wait_group(1)
    else:
        cp_async_wait_all()


@device
def fetch_keys(slot, rows, k_lane, v_lane, place, table_row, page_table, position):
    """Start copying the lane's parts of 16 keys, from a position on, and of their values to a stage of its warp."""
    log2_page, _, row, _, end = place
    if position < end:
        page = page_table[table_row + (position >> log2_page)]
        at, low, last = place_of(place, page, position)
        lane = np.int32(cuda.threadIdx.x & 31)
        g, t = lane >> 2, lane & 3
        k_at, v_at = k_lane + at, v_lane + at
        chunks = len(rows) >> 4
        first, second = k_at + clamped(g, low, last) * row, k_at + clamped(g + 8, low, last) * row
        for i in range(chunks):
            cp_async_16(slot + 512 * i, first + 64 * i, 16)
            cp_async_16(slot + 512 * (chunks + i), second + 64 * i, 16)
        values = slot + 1024 * chunks
        for i in range(chunks >> 1):
            cp_async_16(values + 2048 * i, v_at + clamped(2 * t, low, last) * row + 128 * i, 16)
            cp_async_16(values + 2048 * i + 512, v_at + clamped(2 * t + 1, low, last) * row + 128 * i, 16)
            cp_async_16(values + 2048 * i + 1024, v_at + clamped(2 * t + 8, low, last) * row + 128 * i, 16)
            cp_async_16(values + 2048 * i + 1536, v_at + clamped(2 * t + 9, low, last) * row + 128 * i, 16)
    cp_async_commit()


@device
def wait_for_new_keys(p, position, run):
    """Wait for the kernel before this one unless all 16 keys from position `p` on are older than the run. A sequence
    has at most as many new ones, up to `position`, as the run has rows.
    """
    if p + KEYS + run > position + 1:
        griddepcontrol_wait()


@device
def attend_group(q, k_cache, v_cache, pages, position, run, sequence, q_at, heads_here, kv_head, kv_heads, begin, end,
                 shared, zeros, _):  # fmt: skip
    """Attention of a block's heads over keys [begin, end): the results of each warp in shared memory.

    Row (8 warp + head) of 2 · zeros.size + 4 float32 has the weighted values, the maximum, the sum of weights.
    """
    head_dim = 2 * len(zeros)
    lane, warp, warps = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockDim.x >> 5
    g, t = lane >> 2, lane & 3
    page_table, table_stride, log2_page, _ = pages
    row_bytes = 2 * head_dim
    head_bytes = row_bytes << log2_page
    page_bytes, table_row = kv_heads * head_bytes, np.int64(sequence) * table_stride
    k_lane = address(k_cache, 0) + kv_head * head_bytes + 16 * t
    v_lane = address(v_cache, 0) + kv_head * head_bytes + 16 * g
    factor = LOG2_E / np.float32(math.sqrt(np.float32(head_dim)))
    p, step = (begin & -KEYS) + KEYS * warp, KEYS * warps
    place = log2_page, page_bytes, row_bytes, begin, end
    stage = 2 * KEYS * row_bytes
    ring = shared_address(shared, 0) + warp * (GROUP_STAGES * stage) + 16 * lane
    wait_for_new_keys(p + (GROUP_STAGES - 1) * step, position, run)
    for i in range(GROUP_STAGES):
        fetch_keys(ring + i * stage, zeros, k_lane, v_lane, place, table_row, page_table, p + i * step)
    griddepcontrol_wait()
    slot, ring_end = ring, ring + GROUP_STAGES * stage
    queries, down = load_queries(zeros, q, q_at + g * head_dim + 8 * t, g < heads_here, factor, k_cache)
    max_score, exp_sum, sums = LOWEST_SCORE, np.float32(0), zeros
    while p < end:
        no_unroll()
        low, last = max(begin - p, 0), min(end - 1 - p, KEYS - 1)
        wait_for_keys()
        scores = mma_scores(k_cache, queries, ld_parts(zeros, slot))
        a, b = masked(scores[0] * down, 2 * t, low, last), masked(scores[1] * down, 2 * t + 1, low, last)
        c, d = masked(scores[2] * down, 2 * t + 8, low, last), masked(scores[3] * down, 2 * t + 9, low, last)
        new_max = max(max_score, quad_max(max(max(a, b), max(c, d))))
        rescale = ex2_approx(max_score - new_max)
        max_score = new_max
        a, b = weight_of(a, new_max, 2 * t, low, last), weight_of(b, new_max, 2 * t + 1, low, last)
        c, d = weight_of(c, new_max, 2 * t + 8, low, last), weight_of(d, new_max, 2 * t + 9, low, last)
        exp_sum = exp_sum * rescale + ((a + b) + (c + d))
        first, first2 = cvt_rn_x2(v_cache, a, b), cvt_rn_x2(v_cache, c, d)
        r = unpack8(v_cache, (first, first2, first, first2))
        second, second2 = cvt_rn_x2(v_cache, a - r[0], b - r[1]), cvt_rn_x2(v_cache, c - r[2], d - r[3])
        sums = mma_values(v_cache, scaled(sums, rescale), (first, first2, second, second2),
                          ld_parts(zeros, slot + (stage >> 1)))  # fmt: skip
        fetch_keys(slot, zeros, k_lane, v_lane, place, table_row, page_table, p + GROUP_STAGES * step)
        slot = slot + stage if slot + stage < ring_end else ring
        p += step
    griddepcontrol_launch_dependents()  # not earlier: the next kernel's copies would compete with this one's loads
    cp_async_wait_all()
    cuda.syncthreads()  # results are written where the rings are
    row = (GROUP_HEADS * warp + g) * (head_dim + 4)
    st_shared_heads(sums, shared_address(shared, row + 16 * t))
    exp_sum = quad_sum(exp_sum)
    if t == 0:
        shared[row + head_dim], shared[row + head_dim + 1] = max_score, exp_sum
    cuda.syncthreads()


@device
def eighth_max(x):
    """Maximum of `x` over the eight lanes 4 apart, in each of them."""
    x = max(x, cuda.shfl_xor_sync(FULL_MASK, x, 4))
    x = max(x, cuda.shfl_xor_sync(FULL_MASK, x, 8))
    return max(x, cuda.shfl_xor_sync(FULL_MASK, x, 16))


@device
def eighth_sum(x):
    """Sum of `x` over the eight lanes 4 apart, in each of them."""
    x += cuda.shfl_xor_sync(FULL_MASK, x, 4)
    x += cuda.shfl_xor_sync(FULL_MASK, x, 8)
    return x + cuda.shfl_xor_sync(FULL_MASK, x, 16)


@device
def attend_few(q, k_cache, v_cache, pages, position, run, sequence, q_at, heads_here, kv_head, kv_heads, begin, end,
               shared, zeros, rows):  # fmt: skip
    """What `attend_group` does, for up to four heads: `zeros` are a lane's sums of them, `rows` only tell the size of
    its part of keys and values. Row (4 warp + head) has a head's results.
    """
    head_dim = 2 * len(rows)
    lane, warp, warps = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockDim.x >> 5
    g, t = lane >> 2, lane & 3
    page_table, table_stride, log2_page, _ = pages
    row_bytes = 2 * head_dim
    head_bytes = row_bytes << log2_page
    page_bytes, table_row = kv_heads * head_bytes, np.int64(sequence) * table_stride
    k_lane = address(k_cache, 0) + kv_head * head_bytes + 16 * t
    v_lane = address(v_cache, 0) + kv_head * head_bytes + 16 * g
    factor = LOG2_E / np.float32(math.sqrt(np.float32(head_dim)))
    p, step = (begin & -KEYS) + KEYS * warp, KEYS * warps
    place = log2_page, page_bytes, row_bytes, begin, end
    stage = 2 * KEYS * row_bytes
    ring = shared_address(shared, 0) + warp * (GROUP_STAGES * stage) + 16 * lane
    wait_for_new_keys(p + (GROUP_STAGES - 1) * step, position, run)
    for i in range(GROUP_STAGES):
        fetch_keys(ring + i * stage, rows, k_lane, v_lane, place, table_row, page_table, p + i * step)
    griddepcontrol_wait()
    slot, ring_end = ring, ring + GROUP_STAGES * stage
    queries, down = load_columns(
        zeros, q, q_at + (g >> 1) * head_dim + 8 * t, g >> 1 < heads_here, factor, k_cache, g & 1
    )
    down = cuda.shfl_sync(FULL_MASK, down, 8 * t)  # of query t, whose scores this lane has
    max_score, exp_sum, sums = LOWEST_SCORE, np.float32(0), zeros
    while p < end:
        no_unroll()
        low, last = max(begin - p, 0), min(end - 1 - p, KEYS - 1)
        wait_for_keys()
        scores = mma_scores_few(k_cache, queries, ld_parts(rows, slot))
        a, b = masked(scores[0] * down, g, low, last), masked(scores[1] * down, g + 8, low, last)
        new_max = max(max_score, eighth_max(max(a, b)))
        rescale = ex2_approx(max_score - new_max)
        max_score = new_max
        a, b = weight_of(a, new_max, g, low, last), weight_of(b, new_max, g + 8, low, last)
        exp_sum = exp_sum * rescale + (a + b)
        source = 8 * t + (g >> 1)
        c, d = cuda.shfl_sync(FULL_MASK, a, source), cuda.shfl_sync(FULL_MASK, a, source + 4)
        e, f = cuda.shfl_sync(FULL_MASK, b, source), cuda.shfl_sync(FULL_MASK, b, source + 4)
        first, second = cvt_rn_x2(v_cache, c, d), cvt_rn_x2(v_cache, e, f)
        if g & 1:
            r = unpack8(v_cache, (first, second, first, second))
            first, second = cvt_rn_x2(v_cache, c - r[0], d - r[1]), cvt_rn_x2(v_cache, e - r[2], f - r[3])
        sums = mma_values_few(v_cache, scaled(sums, rescale), first, second, ld_parts(rows, slot + (stage >> 1)))
        fetch_keys(slot, rows, k_lane, v_lane, place, table_row, page_table, p + GROUP_STAGES * step)
        slot = slot + stage if slot + stage < ring_end else ring
        p += step
    griddepcontrol_launch_dependents()  # not earlier: the next kernel's copies would compete with this one's loads
    cp_async_wait_all()
    cuda.syncthreads()  # results are written where the rings are
    row = (FEW_HEADS * warp + t) * (head_dim + 4)
    st_shared_few(sums, shared_address(shared, row + 8 * g))
    exp_sum = eighth_sum(exp_sum)
    if g == 0:
        shared[row + head_dim], shared[row + head_dim + 1] = max_score, exp_sum
    cuda.syncthreads()


@device
def merged(shared, heads, head_dim, h, d):
    """Element `d` of head `h`, all warps together: (weighted value, maximum, sum of weights)."""
    width, warps = head_dim + 4, cuda.blockDim.x >> 5
    largest = LOWEST_SCORE
    for w in range(warps):
        no_unroll()
        largest = max(largest, shared[(heads * w + h) * width + head_dim])
    value, total = np.float32(0), np.float32(0)
    for w in range(warps):
        no_unroll()
        at = (heads * w + h) * width
        weight = ex2_approx(shared[at + head_dim] - largest)
        value += shared[at + d] * weight
        total += shared[at + head_dim + 1] * weight
    return value, largest, total


@device
def write_group(out, swapped, partials, counter, first_head, heads_here, part, splits_used, splits, heads, head_dim,
                shared, is_last):  # fmt: skip
    """Write the heads' results, or this block's split of them. The last block to finish merges the splits."""
    part_size, log2 = head_dim + 2, 6 if head_dim == 64 else 7
    n = np.int64(cuda.threadIdx.x)
    while n < heads_here << log2:
        h, d = n >> log2, n & (head_dim - 1)
        value, largest, total = merged(shared, heads, head_dim, h, d)
        if splits_used == 1:
            put_element(out, (first_head + h) * head_dim + d, swapped, value / total)
        else:
            at = ((first_head + h) * splits + part) * part_size
            partials[at + d] = value
            if d == 0:
                partials[at + head_dim], partials[at + head_dim + 1] = largest, total
        n += cuda.blockDim.x
    if splits_used == 1:
        return
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        is_last[0] = atom_add_1(counter) == splits_used - 1
    cuda.syncthreads()
    if is_last[0]:
        h = cuda.threadIdx.x >> 5
        while h < heads_here:  # there may be fewer warps than heads
            weights_of_head(partials, first_head * splits, splits, h, splits_used, head_dim, shared)
            h += cuda.blockDim.x >> 5
        cuda.syncthreads()
        n = np.int64(cuda.threadIdx.x)
        while n < heads_here << log2:
            h, d = n >> log2, n & (head_dim - 1)
            first, weights_at, value = (first_head + h) * splits * part_size + d, SPLIT_WEIGHTS * h, np.float32(0)
            for i in range(0, splits_used, 8):
                no_unroll()
                for j in range(8):  # the compiler unrolls this: eight loads are in flight
                    value += weighted_element(partials, first, part_size, shared, weights_at, i + j, splits_used)
            result = value / shared[weights_at + MAX_SPLITS]
            put_element(out, (first_head + h) * head_dim + d, swapped, result)
            n += cuda.blockDim.x


def body_with(attend, heads):
    """The body of the kernels that compute up to `heads` query heads a block by `attend`.

    blockIdx.x is a group of heads, blockIdx.y the row, as in `rows_attention`.
    """

    @device
    def body(tokens, q, k_cache, v_cache, pages, positions, sequences, out, swapped, partials, counters, kv_heads,
             shared_by, window, subgroups, inverse_subgroups, splits, tiles, listed, zeros, rows):  # fmt: skip
        shared, is_last = cuda.shared.array(0, np.float32), cuda.shared.array(1, np.int32)
        t = cuda.blockIdx.y
        if listed:
            if t >= tiles[1]:
                if t == 0:
                    griddepcontrol_wait()  # a kernel must not end before the preceding one
                return
            t = np.int64(tiles[2 * (cuda.gridDim.y - t)])
        head_dim = 2 * len(rows)
        position, sequence = np.int64(positions[t]), sequences[t]
        first, keys, splits_used = splits_of_row(position, window, splits)
        kv_head, sub = fast_divmod(cuda.blockIdx.x, subgroups, inverse_subgroups)
        first_head = t * kv_heads * shared_by + kv_head * shared_by + sub * heads
        heads_here = min(heads, shared_by - sub * heads)
        counter = t * cuda.gridDim.x + cuda.blockIdx.x
        run = np.int64(tokens[0])
        for part in range(cuda.blockIdx.z, splits_used, cuda.gridDim.z):
            no_unroll()
            begin = first + part * keys
            cuda.syncthreads()  # the split before this one is no longer in shared memory
            attend(q, k_cache, v_cache, pages, position, run, sequence, first_head * head_dim, heads_here, kv_head,
                   kv_heads, begin, min(position + 1, begin + keys), shared, zeros, rows)  # fmt: skip
            write_group(out, swapped, partials, address(counters, counter), first_head, heads_here, part, splits_used,
                        splits, heads, head_dim, shared, is_last)  # fmt: skip
            if splits_used > 1 and is_last[0] and cuda.threadIdx.x == 0:
                counters[counter] = 0
        griddepcontrol_wait()  # of a block without a split: a kernel must not end before the preceding one

    return body


group_attention = body_with(attend_group, GROUP_HEADS)
few_attention = body_with(attend_few, FEW_HEADS)


@launch_bounds(min_blocks=3)
@cuda.jit
def attention_group_64_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                              scales_at, out, swapped, partials, counters, kv_heads, shared_by, window,
                              subgroups, inverse_subgroups, splits, tiles, listed):  # fmt: skip
    """Many rows, with heads of 64 elements, more than four of which share keys."""
    if is_padding_token(tokens):
        return
    pages = page_table, table_stride, log2_page, scales_at
    group_attention(tokens, q, k_cache, v_cache, pages, positions, sequences, out, swapped, partials, counters,
                    kv_heads, shared_by, window, subgroups, inverse_subgroups, splits, tiles, listed, zeros32(),
                    zeros32())  # fmt: skip


@launch_bounds(min_blocks=2)
@cuda.jit
def attention_group_128_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                               scales_at, out, swapped, partials, counters, kv_heads, shared_by, window,
                               subgroups, inverse_subgroups, splits, tiles, listed):  # fmt: skip
    """Many rows, with heads of 128 elements, more than four of which share keys."""
    if is_padding_token(tokens):
        return
    pages = page_table, table_stride, log2_page, scales_at
    group_attention(tokens, q, k_cache, v_cache, pages, positions, sequences, out, swapped, partials, counters,
                    kv_heads, shared_by, window, subgroups, inverse_subgroups, splits, tiles, listed, zeros64(),
                    zeros64())  # fmt: skip


@launch_bounds(min_blocks=4)
@cuda.jit
def attention_few_64_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                            scales_at, out, swapped, partials, counters, kv_heads, shared_by, window,
                            subgroups, inverse_subgroups, splits, tiles, listed):  # fmt: skip
    """Many rows, with heads of 64 elements, up to four of which share keys."""
    if is_padding_token(tokens):
        return
    pages = page_table, table_stride, log2_page, scales_at
    few_attention(tokens, q, k_cache, v_cache, pages, positions, sequences, out, swapped, partials, counters,
                  kv_heads, shared_by, window, subgroups, inverse_subgroups, splits, tiles, listed, zeros16(),
                  zeros32())  # fmt: skip


@launch_bounds(min_blocks=3)
@cuda.jit
def attention_few_128_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                             scales_at, out, swapped, partials, counters, kv_heads, shared_by, window,
                             subgroups, inverse_subgroups, splits, tiles, listed):  # fmt: skip
    """Many rows, with heads of 128 elements, up to four of which share keys."""
    if is_padding_token(tokens):
        return
    pages = page_table, table_stride, log2_page, scales_at
    few_attention(tokens, q, k_cache, v_cache, pages, positions, sequences, out, swapped, partials, counters,
                  kv_heads, shared_by, window, subgroups, inverse_subgroups, splits, tiles, listed, zeros32(),
                  zeros64())  # fmt: skip
