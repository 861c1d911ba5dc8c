"""Decode attention of many rows on sm_90: each warp streams the keys and values of one row's heads through shared memory.

It computes what `rows_attention` does, with the same splits, for caches of 16 bits, heads of 64 or 128 elements and up
to `FEW_HEADS` query heads that share keys. All arithmetic is in float32.

Work. An item is a split of a row's keys for the heads that share them. A warp computes whole items, one after the
other, and needs no other warp: it has a ring of its own in shared memory, and nothing waits for the block. A block has
a multiprocessor to itself, and the items are dealt to all warps of the device in turn.

Copies. 32 keys of a head lie one behind the other in a page, and so do their values: a lane asks the copy engine for
both (`cp.async.bulk`), and an mbarrier tells when they are there. The ring is filled from the next item while the last
keys of this one are computed, so the memory never waits for the end of an item.

Scores. `lanes` lanes share a key, eight elements each, and a lane goes through `lanes` keys. Its sums are then added up
over these lanes such that each of the 32 lanes ends with the score of one key, the one of its own number.

Why. 64 rows of 200 keys with 32 KV heads of 128 elements are 210 MB a layer, 50 µs of an H200's bandwidth, and the
arithmetic is a tenth of what a multiprocessor can do in that time. What counts is bytes on their way: 112 to 224 KB a
multiprocessor, none of which takes registers.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..barriers import mbarrier_init, mbarrier_wait
from ..intrinsics import (
    address,
    atom_add_1,
    ex2_approx,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_shared_v4_u32,
    ld_v4_f32,
    no_unroll,
    shared_address,
    st_v4_f32,
)
from ..quant_traits import unpack8
from ..tma import copy_bytes, fence_mbarrier_init, mbarrier_expect_tx
from .common import FULL_MASK, LOG2_E, device, fast_divmod, first_visible, launch_bounds
from .decode_attention import LOWEST_SCORE
from .params import BULK_KEYS as KEYS
from .params import BULK_RING_BYTES as RING_BYTES
from .params import BULK_WARPS as WARPS
from .params import FEW_HEADS, ROW_SPLIT_KEYS
from .reduce import warp_max, warp_sum


@device
def find_item(work, part, sizes, rows, positions, sequences):
    """The first item from number `work` on whose split exists: (number, split, row, KV head, sequence, position, first
    key, end of its keys, splits of its row). A `part` of -1 is the number's first one. If there is none, the number is
    `sizes`' last, and the item has no keys.
    """
    kv_heads, inverse_heads, blocks_of_keys, inverse_blocks, splits, window, workers, total = sizes
    tiles, listed, most_rows = rows
    t, kv_head, sequence, position = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    begin, end, splits_used, found = np.int64(0), np.int64(0), np.int64(0), False
    while not found and work < total:
        no_unroll()
        row_part, kv_head = fast_divmod(work, kv_heads, inverse_heads)
        t, first_part = fast_divmod(row_part, blocks_of_keys, inverse_blocks)
        if listed:
            t = np.int64(tiles[2 * (most_rows - t)])
        position, sequence = np.int64(positions[t]), np.int64(sequences[t])
        first = first_visible(position + 1, window)
        seen, keys = position + 1 - first, np.int64(ROW_SPLIT_KEYS)
        while keys * splits < seen:
            keys *= 2
        splits_used = (seen + keys - 1) // keys
        if part < 0:
            part = first_part
        begin = first + part * keys
        end = min(position + 1, begin + keys)
        found = part < splits_used
        if not found:
            work += workers
            part = np.int64(-1)
    if not found:
        work, end = total, begin
    return work, part, t, kv_head, sequence, position, begin, end, splits_used


@device
def next_item(item, sizes, rows, positions, sequences):
    """The warp's next item: the next of its row's splits that is its own, or one of another row."""
    return find_item(item[0], item[1] + sizes[2], sizes, rows, positions, sequences)


@device
def load_keys(item, p, slot, barrier, place, page_table):
    """Ask for the keys of an item from position `p` to the end of their 32, and for their values. By one lane."""
    k_base, v_base, table_stride, log2_page, page_bytes, head_bytes, row_bytes = place
    end = min(item[7], (p | (KEYS - 1)) + 1)
    page = np.int64(page_table[item[4] * table_stride + (p >> log2_page)])
    at = page * page_bytes + item[3] * head_bytes + (p & ((1 << log2_page) - 1)) * row_bytes
    to, nbytes = slot + (p & (KEYS - 1)) * row_bytes, (end - p) * row_bytes
    mbarrier_expect_tx(barrier, 2 * nbytes)
    copy_bytes(to, k_base + at, nbytes, barrier)
    copy_bytes(to + KEYS * row_bytes, v_base + at, nbytes, barrier)


@device
def score_keys(k_cache, at, row_bytes, query, scores, first):
    """The lane's sums of four of its keys, from number `first` on. The compiler unrolls no longer loops of four heads."""
    for i in range(4):
        key = unpack8(k_cache, ld_shared_v4_u32(at + (first + i) * row_bytes))
        for h in range(query.shape[0]):
            score = np.float32(0)
            for j in range(8):
                score += query[h, j] * key[j]
            scores[h, first + i] = score


@device
def fold(scores, h, offset):
    """Add up pairs of lanes `offset` apart: the lower lane keeps the first `offset` sums, the other one the others."""
    upper = cuda.threadIdx.x & offset
    for i in range(offset):
        a, b = scores[h, i], scores[h, i + offset]
        scores[h, i] = (b if upper else a) + cuda.shfl_xor_sync(FULL_MASK, a if upper else b, offset)


@device
def write_item(item, heads_here, shared_by, kv_heads, splits, lanes, max_score, exp_sum, acc, out, partials, counters):
    """Write the heads' results, or this split of them. The last warp to finish merges a row's splits."""
    _, part, t, kv_head, _, _, _, _, splits_used = item
    lane, head_dim = np.int64(cuda.threadIdx.x & 31), 8 * lanes
    part_size, first_head = head_dim + 2, (t * kv_heads + kv_head) * shared_by
    for h in range(max_score.size):
        total = warp_sum(exp_sum[h])
        for j in range(8):
            if lanes == 8:
                acc[h, j] += cuda.shfl_xor_sync(FULL_MASK, acc[h, j], 8)
            acc[h, j] += cuda.shfl_xor_sync(FULL_MASK, acc[h, j], 16)
        if h < heads_here and lane < lanes:
            if splits_used == 1:
                at = (first_head + h) * head_dim + 8 * lane
                st_v4_f32(out, at, acc[h, 0] / total, acc[h, 1] / total, acc[h, 2] / total, acc[h, 3] / total)
                st_v4_f32(out, at + 4, acc[h, 4] / total, acc[h, 5] / total, acc[h, 6] / total, acc[h, 7] / total)
            else:
                at = ((first_head + h) * splits + part) * part_size
                for j in range(8):
                    partials[at + 8 * lane + j] = acc[h, j]
                if lane == 0:
                    partials[at + head_dim], partials[at + head_dim + 1] = max_score[h], total
    if splits_used == 1:
        return
    cuda.syncwarp()
    finished, counter = np.int32(0), t * kv_heads + kv_head
    if lane == 0:
        finished = atom_add_1(address(counters, counter))
    if cuda.shfl_sync(FULL_MASK, finished, 0) == splits_used - 1:
        for h in range(heads_here):
            no_unroll()
            first = (first_head + h) * splits * part_size
            largest, total = LOWEST_SCORE, np.float32(0)
            if lane < splits_used:
                at = first + lane * part_size + head_dim
                largest, total = partials[at], partials[at + 1]
            weight = ex2_approx(largest - warp_max(largest))
            total = warp_sum(total * weight)
            d = lane
            while d < head_dim:
                no_unroll()
                value = np.float32(0)
                for i in range(splits_used):
                    value += cuda.shfl_sync(FULL_MASK, weight, i) * partials[first + i * part_size + d]
                out[(first_head + h) * head_dim + d] = value / total
                d += 32
        if lane == 0:
            counters[counter] = 0


@device
def clamped(key, low, last):
    """A key from `low` to `last`: for one that is not, a neighbour, whose memory holds numbers."""
    return max(min(key, last), low)


def body_with(heads, lanes):
    """The body of the kernels for up to `heads` query heads that share keys, of 8 · `lanes` elements."""
    stages = RING_BYTES // (2 * KEYS * 16 * lanes)

    @device
    def attend_keys(k_cache, v_cache, slot, low, last, query, max_score, exp_sum, acc):
        """Add those of 32 keys in a stage that exist, number `low` to `last`, to the running softmax of each head."""
        lane = np.int32(cuda.threadIdx.x & 31)
        row_bytes, first = 16 * lanes, lane & -lanes
        column = slot + 16 * (lane & (lanes - 1))
        scores = cuda.local.array((heads, lanes), np.float32)
        weights = cuda.local.array(heads, np.float32)
        at = column + first * row_bytes
        score_keys(k_cache, at, row_bytes, query, scores, 0)
        score_keys(k_cache, at, row_bytes, query, scores, 4)
        if lanes == 16:
            score_keys(k_cache, at, row_bytes, query, scores, 8)
            score_keys(k_cache, at, row_bytes, query, scores, 12)
        valid = low <= lane <= last
        for h in range(heads):
            if lanes == 16:
                fold(scores, h, 8)
            fold(scores, h, 4)
            fold(scores, h, 2)
            fold(scores, h, 1)
            score = scores[h, 0] if valid else LOWEST_SCORE
            largest = max(max_score[h], warp_max(score))
            rescale = ex2_approx(max_score[h] - largest)
            weights[h] = ex2_approx(score - largest) if valid else np.float32(0)
            max_score[h], exp_sum[h] = largest, exp_sum[h] * rescale + weights[h]
            for j in range(8):
                acc[h, j] *= rescale
        column += KEYS * row_bytes
        for i in range(lanes):
            value = unpack8(v_cache, ld_shared_v4_u32(column + clamped(first + i, low, last) * row_bytes))
            for h in range(heads):
                weight = cuda.shfl_sync(FULL_MASK, weights[h], first + i)
                for j in range(8):
                    acc[h, j] += weight * value[j]

    @device
    def body(tokens, q, k_cache, v_cache, pages, positions, sequences, out, partials, counters, kv_heads, shared_by,
             window, splits, blocks_of_keys, tiles, listed, most_rows):  # fmt: skip
        shared = cuda.shared.array(0, np.float32)
        page_table, table_stride, log2_page, _ = pages
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        row_bytes = np.int64(16 * lanes)
        head_bytes = row_bytes << log2_page
        place = (
            address(k_cache, 0), address(v_cache, 0), table_stride, log2_page, kv_heads * head_bytes, head_bytes,
            row_bytes,
        )  # fmt: skip
        base = shared_address(shared, 0)
        ring, barriers = base + warp * RING_BYTES, base + WARPS * RING_BYTES + 8 * stages * warp
        stage = 2 * KEYS * row_bytes
        if lane == 0:
            for i in range(stages):
                mbarrier_init(barriers + 8 * i, 1)
            fence_mbarrier_init()
        cuda.syncwarp()
        count = np.int64(tiles[1] if listed else tokens[0])
        sizes = (
            kv_heads, np.float32(1) / np.float32(kv_heads), blocks_of_keys, np.float32(1) / np.float32(blocks_of_keys),
            splits, window, np.int64(cuda.gridDim.x * WARPS), count * blocks_of_keys * kv_heads,
        )  # fmt: skip
        rows = tiles, listed, most_rows
        work = np.int64(cuda.blockIdx.x + cuda.gridDim.x * warp)
        item = find_item(work, np.int64(-1), sizes, rows, positions, sequences)
        ahead, p_ahead = item, item[6]
        settled = np.int64(tokens[0])
        for i in range(stages):
            no_unroll()
            if p_ahead < ahead[7]:
                # this run writes keys of its own tokens, of which a sequence has no more than there are rows
                if (p_ahead | (KEYS - 1)) + settled > ahead[5]:
                    griddepcontrol_wait()
                if lane == 0:
                    load_keys(ahead, p_ahead, ring + i * stage, barriers + 8 * i, place, page_table)
                p_ahead = (p_ahead | (KEYS - 1)) + 1
                if p_ahead >= ahead[7]:
                    ahead = next_item(ahead, sizes, rows, positions, sequences)
                    p_ahead = ahead[6]
        griddepcontrol_wait()
        griddepcontrol_launch_dependents()
        factor = LOG2_E / np.float32(math.sqrt(np.float32(8 * lanes)))
        query = cuda.local.array((heads, 8), np.float32)
        acc = cuda.local.array((heads, 8), np.float32)
        max_score = cuda.local.array(heads, np.float32)
        exp_sum = cuda.local.array(heads, np.float32)
        slot, parity = np.int64(0), np.int64(0)
        while item[6] < item[7]:
            no_unroll()
            q_at = ((item[2] * kv_heads + item[3]) * shared_by * lanes + (lane & (lanes - 1))) * 8
            for h in range(heads):
                max_score[h], exp_sum[h] = LOWEST_SCORE, np.float32(0)
                for j in range(8):
                    query[h, j], acc[h, j] = np.float32(0), np.float32(0)
                if h < shared_by:
                    a, b = ld_v4_f32(q, q_at + 8 * lanes * h), ld_v4_f32(q, q_at + 8 * lanes * h + 4)
                    for j in range(4):
                        query[h, j], query[h, 4 + j] = a[j] * factor, b[j] * factor
            p = item[6]
            while p < item[7]:
                no_unroll()
                mbarrier_wait(barriers + 8 * slot, parity)
                low = np.int32(p & (KEYS - 1))
                last = np.int32(min(item[7] - 1 - (p & -KEYS), KEYS - 1))
                attend_keys(k_cache, v_cache, ring + slot * stage, low, last, query, max_score, exp_sum, acc)
                cuda.syncwarp()  # all lanes have read the stage
                if p_ahead < ahead[7]:
                    if lane == 0:
                        load_keys(ahead, p_ahead, ring + slot * stage, barriers + 8 * slot, place, page_table)
                    p_ahead = (p_ahead | (KEYS - 1)) + 1
                    if p_ahead >= ahead[7]:
                        ahead = next_item(ahead, sizes, rows, positions, sequences)
                        p_ahead = ahead[6]
                slot += 1
                if slot == stages:
                    slot, parity = np.int64(0), parity ^ 1
                p = (p | (KEYS - 1)) + 1
            write_item(item, shared_by, shared_by, kv_heads, splits, lanes, max_score, exp_sum, acc, out, partials,
                       counters)  # fmt: skip
            item = next_item(item, sizes, rows, positions, sequences)

    return body


bulk_64_1, bulk_64_4 = body_with(1, 8), body_with(FEW_HEADS, 8)
bulk_128_1, bulk_128_4 = body_with(1, 16), body_with(FEW_HEADS, 16)


@launch_bounds(min_blocks=1)
@cuda.jit
def attention_bulk_64_1_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                               scales_at, out, partials, counters, kv_heads, shared_by, window, splits, blocks_of_keys,
                               tiles, listed, most_rows):  # fmt: skip
    """Many rows, with heads of 64 elements, which share no keys."""
    pages = page_table, table_stride, log2_page, scales_at
    bulk_64_1(tokens, q, k_cache, v_cache, pages, positions, sequences, out, partials, counters, kv_heads, shared_by,
              window, splits, blocks_of_keys, tiles, listed, most_rows)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def attention_bulk_64_4_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                               scales_at, out, partials, counters, kv_heads, shared_by, window, splits, blocks_of_keys,
                               tiles, listed, most_rows):  # fmt: skip
    """Many rows, with heads of 64 elements, up to four of which share keys."""
    pages = page_table, table_stride, log2_page, scales_at
    bulk_64_4(tokens, q, k_cache, v_cache, pages, positions, sequences, out, partials, counters, kv_heads, shared_by,
              window, splits, blocks_of_keys, tiles, listed, most_rows)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def attention_bulk_128_1_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                               scales_at, out, partials, counters, kv_heads, shared_by, window, splits, blocks_of_keys,
                               tiles, listed, most_rows):  # fmt: skip
    """Many rows, with heads of 128 elements, which share no keys."""
    pages = page_table, table_stride, log2_page, scales_at
    bulk_128_1(tokens, q, k_cache, v_cache, pages, positions, sequences, out, partials, counters, kv_heads, shared_by,
              window, splits, blocks_of_keys, tiles, listed, most_rows)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def attention_bulk_128_4_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                               scales_at, out, partials, counters, kv_heads, shared_by, window, splits, blocks_of_keys,
                               tiles, listed, most_rows):  # fmt: skip
    """Many rows, with heads of 128 elements, up to four of which share keys."""
    pages = page_table, table_stride, log2_page, scales_at
    bulk_128_4(tokens, q, k_cache, v_cache, pages, positions, sequences, out, partials, counters, kv_heads, shared_by,
              window, splits, blocks_of_keys, tiles, listed, most_rows)  # fmt: skip
