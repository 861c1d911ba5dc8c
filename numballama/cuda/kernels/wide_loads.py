"""Loading for `wide`: how a slice of K of W, tile after tile, and of X come to a block's shared memory.

A stage of the ring is a tile of X and then one of W, as in `wgmma_loads`.
"""

from __future__ import annotations

from numba import cuda

from ..arithmetic import s32
from ..barriers import mbarrier_wait
from ..clusters import barrier_cluster_wait
from ..intrinsics import griddepcontrol_wait, no_unroll
from ..tma import copy_box, fence_tensormap, mbarrier_expect_tx, prefetch_tensormap
from .block_decode import load_block
from .common import device
from .params import WGMMA_CONSUMERS, WGMMA_ROWS
from .params import WGMMA_STEP_COLUMNS as WGMMA_STEP
from .params import WIDE_CONSUMERS as CONSUMERS
from .params import WIDE_ROWS as ROWS
from .params import WIDE_STEP_COLUMNS as STEP
from .wgmma_loads import fetch_weights, next_slot, place_of, put_two, row_addresses

assert (CONSUMERS, ROWS, STEP) == (WGMMA_CONSUMERS, WGMMA_ROWS, WGMMA_STEP), "`wgmma_loads` has the same tiles"


@device
def load_boxes(tiles, ring, x_map, first_token, maps, paired, sections, first, steps):
    """What the one thread does that loads weights in 16 bits. The first ones come before the wait."""
    base, stage, stages, full, empty, x_bytes = ring
    row_tiles, kv_tiles = sections
    tile, slot, parity, k = cuda.blockIdx.x, 0, 0, 0
    early = min(stages, steps)
    fence_tensormap(maps[0])
    if paired or kv_tiles > 0:
        fence_tensormap(maps[1])
        fence_tensormap(maps[2])
    while k < early:
        no_unroll()
        mbarrier_expect_tx(full + 8 * k, stage)
        fetch_weights(base + k * stage + x_bytes, maps, paired, tile, row_tiles, kv_tiles, ROWS, (first + k) * STEP,
                      full + 8 * k)  # fmt: skip
        k += 1
    fence_tensormap(x_map)
    prefetch_tensormap(x_map)
    barrier_cluster_wait()
    griddepcontrol_wait()
    while tile < tiles:
        no_unroll()
        k = 0
        while k < steps:
            no_unroll()
            ready, to, column = full + 8 * slot, base + slot * stage, (first + k) * STEP
            if early == 0:
                mbarrier_wait(empty + 8 * slot, parity ^ 1)
                mbarrier_expect_tx(ready, stage)
                fetch_weights(to + x_bytes, maps, paired, tile, row_tiles, kv_tiles, ROWS, column, ready)
            else:
                early -= 1
            copy_box(to, x_map, column, first_token, ready)
            slot, parity = next_slot(slot, parity, stages)
            k += 1
        tile += cuda.gridDim.x


@device
def load_slices(tiles, ring, x_map, first_token, weight, scales, bases, strides, shift, paired, sections, sizes,
                first, end, bias):  # fmt: skip
    """What two warpgroups do that load quantised weights, as `wgmma_loads.load_blocks`: steps `first` to `end` of each
    tile.
    """
    tile, at, place, mine = s32(cuda.blockIdx.x), (0, 0), place_of(16), 2 * first + (cuda.threadIdx.x & 3)
    started = False
    if cuda.threadIdx.x == CONSUMERS:
        fence_tensormap(x_map)
        prefetch_tensormap(x_map)
    while tile < tiles:
        no_unroll()
        w0, s0 = row_addresses(bases, strides, paired, tile, sections, sizes, place[0])
        w1, s1 = row_addresses(bases, strides, paired, tile, sections, sizes, place[0] + 8)
        loads = (weight, scales, w0, s0, strides[0], shift), (weight, scales, w1, s1, strides[0], shift)
        raw0, raw1 = load_block(loads[0], mine), load_block(loads[1], mine)
        raw2, raw3 = load_block(loads[0], mine + 4), load_block(loads[1], mine + 4)
        if not started:
            barrier_cluster_wait()
            griddepcontrol_wait()
            started = True
        k, block = first, mine + 8
        while k < end:  # four steps: a move of what is loaded to another register would wait for it
            no_unroll()
            at = put_two(ring, at, x_map, k, end, first_token, loads, raw0, raw1, place, bias)
            raw0, raw1 = load_block(loads[0], block), load_block(loads[1], block)
            if k + 2 < end:
                at = put_two(ring, at, x_map, k + 2, end, first_token, loads, raw2, raw3, place, bias)
                raw2, raw3 = load_block(loads[0], block + 4), load_block(loads[1], block + 4)
            k += 4
            block += 8
        tile = s32(tile + cuda.gridDim.x)
