"""Loading for `wgmma_gemm` (and parts for `wide_loads`): X and W come to a ring of stages in shared memory, 64 columns
at a time.

A stage is a tile of X, then one of W, swizzled as wgmma reads them. Each has two mbarriers: who multiplies waits on
`full`, who loads waits on `empty`. A ring is (its shared address, bytes of a stage, stages, address of the first
`full`, of the first `empty`, bytes of X in a stage).
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..barriers import mbarrier_arrive, mbarrier_init, mbarrier_wait
from ..fragments import is_float32
from ..intrinsics import griddepcontrol_wait, no_unroll, shared_address
from ..quant_traits import has_scales
from ..tma import copy_box, div_u32, fence_mbarrier_init, fence_tensormap, mbarrier_expect_tx
from ..wgmma import fence_proxy_async
from .block_decode import decode_block, load_block
from .common import device
from .params import WGMMA_CONSUMERS as CONSUMERS
from .params import WGMMA_ROWS as ROWS
from .params import WGMMA_STEP_COLUMNS as STEP

ROW_BYTES = 2 * STEP
X_BYTES = ROWS * ROW_BYTES


@device
def make_ring(x_rows, width, stages, quantised):
    """A ring in the block's shared memory; its mbarriers are ready for all threads."""
    stage = (x_rows + width) * ROW_BYTES
    base = (shared_address(cuda.shared.array(0, np.float32), 0) + 1023) & ~1023
    full = base + stages * stage
    if cuda.threadIdx.x == 0:
        i = 0
        while i < stages:  # of a quantised W half of the loading threads fill a stage
            no_unroll()
            mbarrier_init(full + 8 * i, 1 + (cuda.blockDim.x - CONSUMERS) // 2 if quantised else 1)
            mbarrier_init(full + 8 * (stages + i), CONSUMERS // 32)
            i += 1
        fence_mbarrier_init()
    cuda.syncthreads()
    return base, stage, stages, full, full + 8 * stages, x_rows * ROW_BYTES


@device
def is_split(weight, scales):
    """Whether the weight is float32 in two pieces of float16 with a factor for each row; known when compiled."""
    return not has_scales(weight) and is_float32(scales)


@device
def next_slot(slot, parity, stages):
    """The next stage of the ring, and the parity of its phase."""
    slot += 1
    if slot == stages:
        return 0, parity ^ 1
    return slot, parity


@device
def section_of(tile, row_tiles, kv_tiles):
    """(number of the weight, tile of its rows): queries have `row_tiles` tiles, keys and values `kv_tiles` each."""
    if tile < row_tiles:
        return 0, tile
    tile -= row_tiles
    if tile < kv_tiles:
        return 1, tile
    return 2, tile - kv_tiles


@device
def fetch_weights(to, maps, paired, tile, row_tiles, kv_tiles, width, column, full):
    """Ask for 64 columns of a tile of W; half a tile each of the gate and of up if `paired`."""
    m0, m1, m2 = maps
    if paired:
        half = width >> 1
        copy_box(to, m0, column, tile * half, full)
        copy_box(to + half * ROW_BYTES, m1, column, tile * half, full)
        return
    section, tile = section_of(tile, row_tiles, kv_tiles)
    which = m0
    if section == 1:
        which = m1
    elif section == 2:
        which = m2
    copy_box(to, which, column, tile * width, full)


@device
def columns_of(k, first, steps, split):
    """First columns of step `k` in X and in W, if a block begins with step `first` of a row. With `split`, where that
    is 0, a row has two pieces of `steps` steps each, and the steps are three times those: first pieces, X's second with
    W's first, X's first with W's second.
    """
    if not split or k < steps:
        return (first + k) * STEP, (first + k) * STEP
    if k < 2 * steps:
        return k * STEP, (k - steps) * STEP
    return (k - 2 * steps) * STEP, (k - steps) * STEP


@device
def load_boxes(tiles, ring, x_map, maps, paired, sections, first, steps, split, width):
    """What the one thread does that loads weights in 16 bits, `steps` steps of a row from `first` on. Weights that no
    kernel writes come before the wait; pieces of float32 do not (`split`).
    """
    row_groups, groups = tiles
    base, stage, stages, full, empty, _ = ring
    row_tiles, kv_tiles = sections
    group, slot, parity = cuda.blockIdx.x, 0, 0
    all_steps = 3 * steps if split else steps
    early = min(stages, steps) if group < groups and not split else 0
    fence_tensormap(x_map)
    fence_tensormap(maps[0])
    if paired or kv_tiles > 0:
        fence_tensormap(maps[1])
        fence_tensormap(maps[2])
    tile, k = div_u32(group, row_groups), 0
    while k < early:
        no_unroll()
        mbarrier_expect_tx(full + 8 * k, stage)
        fetch_weights(base + k * stage + X_BYTES, maps, paired, tile, row_tiles, kv_tiles, width,
                      (first + k) * STEP, full + 8 * k)  # fmt: skip
        k += 1
    griddepcontrol_wait()
    while group < groups:
        no_unroll()
        tile = div_u32(group, row_groups)
        row, k = (group - tile * row_groups) * ROWS, 0
        while k < all_steps:
            no_unroll()
            ready, to = full + 8 * slot, base + slot * stage
            x_column, w_column = columns_of(k, first, steps, split)
            if early == 0:
                mbarrier_wait(empty + 8 * slot, parity ^ 1)
                mbarrier_expect_tx(ready, stage)
                fetch_weights(to + X_BYTES, maps, paired, tile, row_tiles, kv_tiles, width, w_column, ready)
            else:
                early -= 1
            copy_box(to, x_map, x_column, row, ready)
            slot, parity = next_slot(slot, parity, stages)
            k += 1
        group += cuda.gridDim.x


@device
def row_addresses(bases, strides, paired, tile, sections, sizes, mine):
    """Addresses of the payload and the scales of row `mine` of a tile; a row after the end is the last instead. With
    `paired` the first half of the rows is the gate's and the second is up's.
    """
    w0, w1, w2, s0, s1, s2 = bases
    stride, scale_stride = strides
    _, end, kv_rows = sizes
    w, s, last, row = w0, s0, end - 1, tile * ROWS + mine
    if paired:
        row = tile * (ROWS >> 1) + (mine & 63)
        if mine >= 64:
            w, s = w1, s1
    else:
        section, tile = section_of(tile, sections[0], sections[1])
        if section > 0:
            w, s, last, row = w1, s1, kv_rows - 1, tile * ROWS + mine
            if section > 1:
                w, s = w2, s2
    row = min(row, last)
    return w + row * stride, s + row * scale_stride


@device
def ask_for_x(ring, slot, parity, x_map, k, row):
    """Wait until a stage is empty; one thread asks for its tile of X."""
    base, stage, _, full, empty, x_bytes = ring
    mbarrier_wait(empty + 8 * slot, parity ^ 1)
    if cuda.threadIdx.x == CONSUMERS:
        mbarrier_expect_tx(full + 8 * slot, x_bytes)
        copy_box(base + slot * stage, x_map, k * STEP, row, full + 8 * slot)


@device
def begin_pair(ring, at, x_map, k, steps, row, upper):
    """Begin to fill the stages of steps `k` and `k` + 1. Returns (stage of the thread's step, the stage after both)."""
    slot, parity = at
    ask_for_x(ring, slot, parity, x_map, k, row)
    following, following_parity = next_slot(slot, parity, ring[2])
    after = following, following_parity
    if k + 1 < steps:
        ask_for_x(ring, following, following_parity, x_map, k + 1, row)
        after = next_slot(following, following_parity, ring[2])
    return following if upper else slot, after


@device
def decode_two(loads0, loads1, raw0, raw1, to, block, place, bias):
    """Decode a thread's words of two rows, 8 apart, to a tile."""
    weight, scales, _, scales0, stride, shift = loads0
    mine, _, half = place
    swizzled = (half << 2) ^ (mine & 7)
    decode_block(weight, scales, raw0, scales0, block, stride, shift, to, swizzled, bias)
    decode_block(weight, scales, raw1, loads1[3], block, stride, shift, to + 8 * ROW_BYTES, swizzled, bias)


@device
def put_two(ring, at, x_map, k, steps, row, loads, raw0, raw1, place, bias):
    """Fill a thread's parts of the stages of steps `k` and `k` + 1: two rows. Returns the stage after them."""
    mine, upper, half = place
    slot, after = begin_pair(ring, at, x_map, k, steps, row, upper)
    if k + upper < steps:
        to = ring[0] + slot * ring[1] + ring[5] + mine * ROW_BYTES
        decode_two(loads[0], loads[1], raw0, raw1, to, 2 * (k + upper) + half, place, bias)
        fence_proxy_async()
        mbarrier_arrive(ring[3] + 8 * slot)
    return after


@device
def put_four(ring, at, x_map, k, steps, row, loads, raw0, raw1, raw2, raw3, place, bias):
    """The same with four rows."""
    mine, upper, half = place
    slot, after = begin_pair(ring, at, x_map, k, steps, row, upper)
    if k + upper < steps:
        to, block = ring[0] + slot * ring[1] + ring[5] + mine * ROW_BYTES, 2 * (k + upper) + half
        decode_two(loads[0], loads[1], raw0, raw1, to, block, place, bias)
        decode_two(loads[2], loads[3], raw2, raw3, to + 16 * ROW_BYTES, block, place, bias)
        fence_proxy_async()
        mbarrier_arrive(ring[3] + 8 * slot)
    return after


@device
def place_of(rows):
    """A loading thread's place, where a warp has `rows` rows of a tile: (its first row, 1 if it has the second of two
    steps, which half of a step's columns). Its other rows are 8, 16 and 24 after the first.
    """
    lane, warp = cuda.threadIdx.x & 31, (cuda.threadIdx.x - CONSUMERS) >> 5
    upper = (lane >> 1) & 1
    return rows * warp + ((lane >> 2) ^ (2 * upper)), upper, lane & 1


@device
def load_blocks(tiles, ring, x_map, weight, scales, bases, strides, shift, paired, sections, sizes, begin, end, bias):
    """What two warpgroups do that load quantised weights, steps `begin` to `end` of a row.

    Of two steps, 128 columns, a thread has 32 columns of two rows, and loads them two steps ahead. Four lanes share a
    row, so that a warp's load touches eight rows; those of the second step have their rows in another order, so that
    eight lanes store to different banks.
    """
    row_groups, groups = tiles
    group, at, place, first = cuda.blockIdx.x, (0, 0), place_of(16), 2 * begin + (cuda.threadIdx.x & 3)
    started = False
    if cuda.threadIdx.x == CONSUMERS:
        fence_tensormap(x_map)
    while group < groups:
        no_unroll()
        tile = div_u32(group, row_groups)
        row = (group - tile * row_groups) * ROWS
        w0, s0 = row_addresses(bases, strides, paired, tile, sections, sizes, place[0])
        w1, s1 = row_addresses(bases, strides, paired, tile, sections, sizes, place[0] + 8)
        loads = (weight, scales, w0, s0, strides[0], shift), (weight, scales, w1, s1, strides[0], shift)
        raw0, raw1 = load_block(loads[0], first), load_block(loads[1], first)
        raw2, raw3 = load_block(loads[0], first + 4), load_block(loads[1], first + 4)
        if not started:
            griddepcontrol_wait()
            started = True
        k, block = begin, first + 8
        while k < end:  # four steps: a move of what is loaded to another register would wait for it
            no_unroll()
            at = put_two(ring, at, x_map, k, end, row, loads, raw0, raw1, place, bias)
            raw0, raw1 = load_block(loads[0], block), load_block(loads[1], block)
            if k + 2 < end:
                at = put_two(ring, at, x_map, k + 2, end, row, loads, raw2, raw3, place, bias)
                raw2, raw3 = load_block(loads[0], block + 4), load_block(loads[1], block + 4)
            k += 4
            block += 8
        group += cuda.gridDim.x


@device
def load_tall_blocks(tiles, ring, x_map, weight, scales, bases, strides, shift, paired, sections, sizes, steps, bias):
    """What one warpgroup does instead where a tile has twice as many tokens: a thread has four rows."""
    row_groups, groups = tiles
    group, at, place, first = cuda.blockIdx.x, (0, 0), place_of(32), cuda.threadIdx.x & 3
    started = False
    if cuda.threadIdx.x == CONSUMERS:
        fence_tensormap(x_map)
    while group < groups:
        no_unroll()
        tile = div_u32(group, row_groups)
        row = (group - tile * row_groups) * (2 * ROWS)
        w0, s0 = row_addresses(bases, strides, paired, tile, sections, sizes, place[0])
        w1, s1 = row_addresses(bases, strides, paired, tile, sections, sizes, place[0] + 8)
        w2, s2 = row_addresses(bases, strides, paired, tile, sections, sizes, place[0] + 16)
        w3, s3 = row_addresses(bases, strides, paired, tile, sections, sizes, place[0] + 24)
        loads = (
            (weight, scales, w0, s0, strides[0], shift), (weight, scales, w1, s1, strides[0], shift),
            (weight, scales, w2, s2, strides[0], shift), (weight, scales, w3, s3, strides[0], shift),
        )  # fmt: skip
        raw0, raw1 = load_block(loads[0], first), load_block(loads[1], first)
        raw2, raw3 = load_block(loads[2], first), load_block(loads[3], first)
        raw4, raw5 = load_block(loads[0], first + 4), load_block(loads[1], first + 4)
        raw6, raw7 = load_block(loads[2], first + 4), load_block(loads[3], first + 4)
        if not started:
            griddepcontrol_wait()
            started = True
        k, block = 0, first + 8
        while k < steps:
            no_unroll()
            at = put_four(ring, at, x_map, k, steps, row, loads, raw0, raw1, raw2, raw3, place, bias)
            raw0, raw1 = load_block(loads[0], block), load_block(loads[1], block)
            raw2, raw3 = load_block(loads[2], block), load_block(loads[3], block)
            if k + 2 < steps:
                at = put_four(ring, at, x_map, k + 2, steps, row, loads, raw4, raw5, raw6, raw7, place, bias)
                raw4, raw5 = load_block(loads[0], block + 4), load_block(loads[1], block + 4)
                raw6, raw7 = load_block(loads[2], block + 4), load_block(loads[3], block + 4)
            k += 4
            block += 8
        group += cuda.gridDim.x
