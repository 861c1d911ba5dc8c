"""Decode attention of many rows on sm_90: a warp streams the keys and values of a row's head through shared memory.

It computes what `rows_attention` does, with the same splits, for caches of 16 bits, heads of 64 or 128 elements and
query heads that share no keys. All arithmetic is in float32.

Work. An item is a split of a row's keys for one head. A warp computes whole items, one after the other, and needs no
other warp: it has a ring of its own in shared memory, and nothing waits for the block. A block has a multiprocessor to
itself, and the items are dealt to all warps of the device in turn.

Copies. 32 keys of a head lie one behind the other in a page, and so do their values: a lane asks the copy engine for
each (`cp.async.bulk`), and an mbarrier tells when they are there. A slot is filled again as soon as it has been read,
with what comes next, be it of this item or of the warp's next one: the memory does not wait for the end of an item.

Scores. `lanes` lanes share a key, eight elements each, and a lane goes through `lanes` keys. Its sums are then added up
over these lanes such that each of the 32 lanes ends with the score of one key, the one of its own number.

Why. 64 rows of 200 keys with 32 KV heads of 128 elements are 210 MB a layer, 50 µs of an H200's bandwidth, and the
arithmetic is a tenth of what a multiprocessor can do in that time. What counts is bytes on their way: more than 100 KB
a multiprocessor, none of which takes registers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import cuda

from ..arithmetic import ex2_approx
from ..barriers import mbarrier_init, mbarrier_wait
from ..intrinsics import (
    address,
    atom_add_1,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_shared_v4_u32,
    ld_v4_f32,
    no_unroll,
    shared_address,
)
from ..quant_traits import unpack8
from ..tma import copy_bytes, fence_mbarrier_init, mbarrier_expect_tx
from .attention_out import put_eight, put_element
from .common import FULL_MASK, LOG2_E, device, fast_divmod, launch_bounds
from .decode_attention import LOWEST_SCORE
from .group_attention import clamped
from .params import BULK_KEYS as KEYS
from .params import BULK_RING_BYTES as RING_BYTES
from .params import BULK_WARPS as WARPS
from .reduce import warp_max, warp_sum
from .rows_attention import splits_of_row


class Item(NamedTuple):
    """A split of a row's keys for one head."""

    work: int
    """A number that stands for a row, a KV head and a first split, and every `blocks_of_keys`-th split after that."""
    part: int
    """The split's number in its row."""
    row: int
    kv_head: int
    sequence: int
    position: int
    """Of the row's token, whose query sees no later keys."""
    begin: int
    end: int
    """Positions of the first key and behind the last."""
    splits: int
    """Of its row; one writes the result, more write partial sums."""


class Sizes(NamedTuple):
    """What all items of a run have in common."""

    kv_heads: int
    inverse_heads: float
    blocks_of_keys: int
    inverse_blocks: float
    splits: int
    """At most, of a row."""
    window: int
    """How many keys a row sees, 0 for all."""
    workers: int
    """Warps of the device: a warp's numbers of work are so far apart."""
    total: int
    """Numbers of work."""


class Rows(NamedTuple):
    """Rows of a run: the first ones, or those that are listed."""

    tiles: np.ndarray
    listed: int
    most_rows: int


class Place(NamedTuple):
    """Strides of a cache, in bytes but for the page table's."""

    table_stride: int
    log2_page: int
    page_bytes: int
    head_bytes: int
    row_bytes: int


@device
def find_item(work, part, sizes, rows, positions, sequences):
    """The warp's first item from number `work` on whose split exists.

    `part` is the split to begin with, -1 the number's first. If no item is left, the number is `total` and the item has
    no keys.
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
        first, keys, splits_used = splits_of_row(position, window, splits)
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
    return Item(work, part, t, kv_head, sequence, position, begin, end, splits_used)


@device
def next_item(item, sizes, rows, positions, sequences):
    """The warp's next item: the next of its row's splits that is its own, or one of another row."""
    return find_item(item.work, item.part + sizes.blocks_of_keys, sizes, rows, positions, sequences)


@device
def after(item, p, sizes, rows, positions, sequences):
    """What comes after an item's keys from position `p` to the end of their 32: (item, position)."""
    p = (p | (KEYS - 1)) + 1
    if p >= item.end:
        item = next_item(item, sizes, rows, positions, sequences)
        p = item.begin
    return item, p


@device
def source_of(item, p, place, page_table):
    """Where the keys of an item lie from position `p` to the end of their 32: (byte offset in a cache, byte offset in
    a slot, bytes).
    """
    table_stride, log2_page, page_bytes, head_bytes, row_bytes = place
    page = np.int64(page_table[item.sequence * table_stride + (p >> log2_page)])
    at = page * page_bytes + item.kv_head * head_bytes + (p & ((1 << log2_page) - 1)) * row_bytes
    end = min(item.end, (p | (KEYS - 1)) + 1)
    return at, (p & (KEYS - 1)) * row_bytes, (end - p) * row_bytes


@device
def load_rows(base, slot, barrier, source):
    """Ask for rows of a cache. By one lane."""
    at, to, nbytes = source
    mbarrier_expect_tx(barrier, nbytes)
    copy_bytes(slot + to, base + at, nbytes, barrier)


@device
def load_query(q, item, kv_heads, lanes):
    """The lane's eight elements of an item's query; of row 0 for one that does not exist."""
    at = ((item.row * kv_heads + item.kv_head) * lanes + (cuda.threadIdx.x & (lanes - 1))) * 8
    return ld_v4_f32(q, at), ld_v4_f32(q, at + 4)


@device
def fold(scores, offset):
    """Add up pairs of lanes `offset` apart: the lower lane keeps the first `offset` sums, the other one the others."""
    upper = cuda.threadIdx.x & offset
    for i in range(offset):
        a, b = scores[i], scores[i + offset]
        scores[i] = (b if upper else a) + cuda.shfl_xor_sync(FULL_MASK, a if upper else b, offset)


@device
def write_item(item, kv_heads, splits, lanes, max_score, exp_sum, acc, out, swapped, partials, counters):
    """Write the head's result, or this split of it. The last warp to finish merges a row's splits."""
    lane, head_dim = np.int64(cuda.threadIdx.x & 31), 8 * lanes
    part_size, head = head_dim + 2, item.row * kv_heads + item.kv_head
    total = warp_sum(exp_sum)
    for j in range(8):
        if lanes == 8:
            acc[j] += cuda.shfl_xor_sync(FULL_MASK, acc[j], 8)
        acc[j] += cuda.shfl_xor_sync(FULL_MASK, acc[j], 16)
    if item.splits == 1:
        if lane < lanes:
            put_eight(out, head * head_dim + 8 * lane, swapped, acc, np.float32(1) / total)
        return
    first = head * splits * part_size
    if lane < lanes:
        at = first + item.part * part_size
        for j in range(8):
            partials[at + 8 * lane + j] = acc[j]
        if lane == 0:
            partials[at + head_dim], partials[at + head_dim + 1] = max_score, total
    cuda.syncwarp()
    finished = np.int32(0)
    if lane == 0:
        finished = atom_add_1(address(counters, head))
    if cuda.shfl_sync(FULL_MASK, finished, 0) == item.splits - 1:
        largest, total = LOWEST_SCORE, np.float32(0)
        if lane < item.splits:
            at = first + lane * part_size + head_dim
            largest, total = partials[at], partials[at + 1]
        weight = ex2_approx(largest - warp_max(largest))
        factor = np.float32(1) / warp_sum(total * weight)
        d = lane
        while d < head_dim:
            no_unroll()
            value = np.float32(0)
            for i in range(item.splits):
                value += cuda.shfl_sync(FULL_MASK, weight, i) * partials[first + i * part_size + d]
            put_element(out, head * head_dim + d, swapped, value * factor)
            d += 32
        if lane == 0:
            counters[head] = 0


def body_with(lanes):
    """The body of the kernel for heads of 8 · `lanes` elements."""
    slot_bytes = KEYS * 16 * lanes
    stages = RING_BYTES // (2 * slot_bytes)

    @device
    def score_keys(k_cache, slot, query):
        """The score of the lane's key, whether it exists or not."""
        lane, row_bytes = np.int32(cuda.threadIdx.x & 31), 16 * lanes
        at = slot + 16 * (lane & (lanes - 1)) + (lane & -lanes) * row_bytes
        scores = cuda.local.array(lanes, np.float32)
        for i in range(lanes):
            key, score = unpack8(k_cache, ld_shared_v4_u32(at + i * row_bytes)), np.float32(0)
            for j in range(8):
                score += query[j] * key[j]
            scores[i] = score
        if lanes == 16:
            fold(scores, 8)
        fold(scores, 4)
        fold(scores, 2)
        fold(scores, 1)
        return scores[0]

    @device
    def add_values(v_cache, slot, low, last, weight, acc):
        """Add the values times the weights, of which each lane has its key's."""
        lane, row_bytes = np.int32(cuda.threadIdx.x & 31), 16 * lanes
        column, first = slot + 16 * (lane & (lanes - 1)), lane & -lanes
        for i in range(lanes):
            value = unpack8(v_cache, ld_shared_v4_u32(column + clamped(first + i, low, last) * row_bytes))
            w = cuda.shfl_sync(FULL_MASK, weight, first + i)
            for j in range(8):
                acc[j] += w * value[j]

    @device
    def body(tokens, q, k_cache, v_cache, pages, positions, sequences, out, swapped, partials, counters, kv_heads,
             window, splits, blocks_of_keys, tiles, listed, most_rows):  # fmt: skip
        shared = cuda.shared.array(0, np.float32)
        page_table, table_stride, log2_page, _ = pages
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        row_bytes = np.int64(16 * lanes)
        head_bytes = row_bytes << log2_page
        place = Place(table_stride, log2_page, kv_heads * head_bytes, head_bytes, row_bytes)
        k_base, v_base, base = address(k_cache, 0), address(v_cache, 0), shared_address(shared, 0)
        k_ring, k_barriers = base + warp * RING_BYTES, base + WARPS * RING_BYTES + 16 * stages * warp
        v_ring, v_barriers = k_ring + stages * slot_bytes, k_barriers + 8 * stages
        if lane == 0:
            for i in range(2 * stages):
                mbarrier_init(k_barriers + 8 * i, 1)
            fence_mbarrier_init()
        cuda.syncwarp()
        count = np.int64(tiles[1] if listed else tokens[0])
        sizes = Sizes(
            kv_heads, np.float32(1) / np.float32(kv_heads), blocks_of_keys, np.float32(1) / np.float32(blocks_of_keys),
            splits, window, np.int64(cuda.gridDim.x * WARPS), count * blocks_of_keys * kv_heads,
        )  # fmt: skip
        rows = Rows(tiles, listed, most_rows)
        work = np.int64(cuda.blockIdx.x + cuda.gridDim.x * warp)
        item = find_item(work, np.int64(-1), sizes, rows, positions, sequences)
        ahead, p_ahead = item, item.begin
        run = np.int64(tokens[0])
        for i in range(stages):
            no_unroll()
            if p_ahead < ahead.end:
                # this run writes keys of its own tokens, of which a sequence has no more than there are rows
                if (p_ahead | (KEYS - 1)) + run > ahead.position:
                    griddepcontrol_wait()
                if lane == 0:
                    source = source_of(ahead, p_ahead, place, page_table)
                    load_rows(k_base, k_ring + i * slot_bytes, k_barriers + 8 * i, source)
                    load_rows(v_base, v_ring + i * slot_bytes, v_barriers + 8 * i, source)
                ahead, p_ahead = after(ahead, p_ahead, sizes, rows, positions, sequences)
        griddepcontrol_wait()
        griddepcontrol_launch_dependents()
        factor = LOG2_E / np.float32(math.sqrt(np.float32(8 * lanes)))
        query, acc = cuda.local.array(8, np.float32), cuda.local.array(8, np.float32)
        slot, parity = np.int64(0), np.int64(0)
        a, b = load_query(q, item, kv_heads, lanes)
        while item.begin < item.end:
            no_unroll()
            for j in range(4):
                query[j], query[4 + j] = a[j] * factor, b[j] * factor
                acc[j], acc[4 + j] = np.float32(0), np.float32(0)
            following = next_item(item, sizes, rows, positions, sequences)
            if following.begin < following.end:
                a, b = load_query(q, following, kv_heads, lanes)
            max_score, exp_sum = LOWEST_SCORE, np.float32(0)
            p = item.begin
            while p < item.end:
                no_unroll()
                low = np.int32(p & (KEYS - 1))
                last = np.int32(min(item.end - 1 - (p & -KEYS), KEYS - 1))
                more, source = p_ahead < ahead.end, (np.int64(0), np.int64(0), np.int64(0))
                if more and lane == 0:
                    source = source_of(ahead, p_ahead, place, page_table)
                mbarrier_wait(k_barriers + 8 * slot, parity)
                score = score_keys(k_cache, k_ring + slot * slot_bytes, query)
                cuda.syncwarp()  # all lanes have read the slot
                if more and lane == 0:
                    load_rows(k_base, k_ring + slot * slot_bytes, k_barriers + 8 * slot, source)
                valid = low <= lane <= last
                score = score if valid else LOWEST_SCORE
                largest = max(max_score, warp_max(score))
                rescale = ex2_approx(max_score - largest)
                weight = ex2_approx(score - largest) if valid else np.float32(0)
                max_score, exp_sum = largest, exp_sum * rescale + weight
                for j in range(8):
                    acc[j] *= rescale
                mbarrier_wait(v_barriers + 8 * slot, parity)
                add_values(v_cache, v_ring + slot * slot_bytes, low, last, weight, acc)
                cuda.syncwarp()
                if more and lane == 0:
                    load_rows(v_base, v_ring + slot * slot_bytes, v_barriers + 8 * slot, source)
                if more:
                    ahead, p_ahead = after(ahead, p_ahead, sizes, rows, positions, sequences)
                slot += 1
                if slot == stages:
                    slot, parity = np.int64(0), parity ^ 1
                p = (p | (KEYS - 1)) + 1
            write_item(item, kv_heads, splits, lanes, max_score, exp_sum, acc, out, swapped, partials, counters)
            item = following

    return body


bulk_64, bulk_128 = body_with(8), body_with(16)


@launch_bounds(min_blocks=1)
@cuda.jit
def attention_bulk_64_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                             scales_at, out, swapped, partials, counters, kv_heads, window, splits,
                             blocks_of_keys, tiles, listed, most_rows):  # fmt: skip
    """Many rows, with heads of 64 elements that share no keys."""
    pages = page_table, table_stride, log2_page, scales_at
    bulk_64(tokens, q, k_cache, v_cache, pages, positions, sequences, out, swapped, partials, counters, kv_heads,
            window, splits, blocks_of_keys, tiles, listed, most_rows)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def attention_bulk_128_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                              scales_at, out, swapped, partials, counters, kv_heads, window, splits,
                             blocks_of_keys, tiles, listed, most_rows):  # fmt: skip
    """Many rows, with heads of 128 elements that share no keys."""
    pages = page_table, table_stride, log2_page, scales_at
    bulk_128(tokens, q, k_cache, v_cache, pages, positions, sequences, out, swapped, partials, counters, kv_heads,
             window, splits, blocks_of_keys, tiles, listed, most_rows)  # fmt: skip
