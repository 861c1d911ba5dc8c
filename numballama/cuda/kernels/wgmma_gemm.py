"""Linear layers for many tokens on sm_90, Y[T, N] = X[T, K] · W[N, K]ᵀ, by wgmma and TMA.

A kernel here takes the place of those in `gemm.py`: it reads X as `round_kernel` leaves it. A block computes 128 tokens
× `width` rows of W, one such tile after the other; there is one block a multiprocessor. Two warpgroups multiply, 64
tokens each. Other threads fill a ring of `stages` in shared memory, 64 columns of X and W at a time: of W in 16 bits
one thread asks the copy engine for both; of a quantised W two warpgroups load words to registers two to four steps
ahead and decode them. Each stage has two mbarriers: who multiplies waits on `full`, who loads waits on `empty`. So
loading goes on while a tile's results are finished in registers and stored.

Tiles with the same rows of W are neighbours, so W comes from memory once and from the L2 cache after that.

Why. mma.sync, as `gemm.py` uses it, does half as many operations a second. The floor is arithmetic: 2 · T · N · K at
990 · 10^12 a second on an H200. A width is chosen for which the last round of tiles leaves few multiprocessors idle.

float32 comes as two pieces in float16 each of X and of W (`round_kernel`), and three products of these are added up:
what is left out is 2^-22 of a product. So it costs three times as much.

A row's bits do not depend on the number of tokens, nor on the width.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..fragments import is_float32
from ..intrinsics import (
    address,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    no_unroll,
    shared_address,
)
from ..mma import row_scale, st_global_rows
from ..quant_traits import has_scales, scale_bytes
from ..tma import (
    copy_box,
    div_u32,
    fence_mbarrier_init,
    mbarrier_arrive,
    mbarrier_expect_tx,
    mbarrier_init,
    mbarrier_wait,
)
from ..wgmma import (
    DESCRIPTOR,
    add_global_rows,
    add_parts,
    fence_proxy_async,
    scale_columns,
    silu_and_mul_halves,
    wgmma_end,
    wgmma_tile,
    zeros_of,
)
from .common import device, launch_bounds
from .params import WGMMA_CONSUMERS as CONSUMERS
from .params import WGMMA_LOADERS as LOADERS
from .params import WGMMA_ROWS as ROWS
from .params import WGMMA_STEP_COLUMNS as STEP
from .wide import decode_block, load_block

ROW_BYTES = 2 * STEP
X_BYTES = ROWS * ROW_BYTES


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


# Loading


@device
def fetch_weights(to, maps, paired, tile, row_tiles, kv_tiles, width, column, full):
    """Ask for 64 columns of a tile of W; half a tile each of the gate and of up if `paired`."""
    m0, m1, m2 = maps
    if paired:
        half = width >> 1
        copy_box((to, m0, column, tile * half, full))
        copy_box((to + half * ROW_BYTES, m1, column, tile * half, full))
        return
    section, tile = section_of(tile, row_tiles, kv_tiles)
    which = m0
    if section == 1:
        which = m1
    elif section == 2:
        which = m2
    copy_box((to, which, column, tile * width, full))


@device
def columns_of(k, steps, split):
    """First columns of step `k` in X and in W. With `split` a row has two pieces of `steps` steps each, and the steps
    are three times those: first pieces, X's second with W's first, X's first with W's second.
    """
    if not split or k < steps:
        return k * STEP, k * STEP
    if k < 2 * steps:
        return k * STEP, (k - steps) * STEP
    return (k - 2 * steps) * STEP, (k - steps) * STEP


@device
def load_boxes(tiles, ring, x_map, maps, paired, sections, steps, split, width):
    """What the one thread does that loads weights in 16 bits. Weights that no kernel writes come before the wait;
    pieces of float32 do not (`split`).
    """
    row_groups, groups = tiles
    base, stage, stages, full, empty = ring
    row_tiles, kv_tiles = sections
    group, slot, parity = cuda.blockIdx.x, 0, 0
    all_steps = 3 * steps if split else steps
    early = min(stages, steps) if group < groups and not split else 0
    tile, k = div_u32((group, row_groups)), 0
    while k < early:
        no_unroll()
        mbarrier_expect_tx((full + 8 * k, stage))
        fetch_weights(base + k * stage + X_BYTES, maps, paired, tile, row_tiles, kv_tiles, width, k * STEP,
                      full + 8 * k)  # fmt: skip
        k += 1
    griddepcontrol_wait()
    while group < groups:
        no_unroll()
        tile = div_u32((group, row_groups))
        row, k = (group - tile * row_groups) * ROWS, 0
        while k < all_steps:
            no_unroll()
            ready, to = full + 8 * slot, base + slot * stage
            x_column, w_column = columns_of(k, steps, split)
            if early == 0:
                mbarrier_wait((empty + 8 * slot, parity ^ 1))
                mbarrier_expect_tx((ready, stage))
                fetch_weights(to + X_BYTES, maps, paired, tile, row_tiles, kv_tiles, width, w_column, ready)
            else:
                early -= 1
            copy_box((to, x_map, x_column, row, ready))
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
    base, stage, _, full, empty = ring
    mbarrier_wait((empty + 8 * slot, parity ^ 1))
    if cuda.threadIdx.x == CONSUMERS:
        mbarrier_expect_tx((full + 8 * slot, X_BYTES))
        copy_box((base + slot * stage, x_map, k * STEP, row, full + 8 * slot))


@device
def put_pair(ring, at, x_map, k, steps, row, loads0, loads1, raw0, raw1, place, bias):
    """Fill a thread's parts of the stages of steps `k` and `k` + 1. Returns the stage after them."""
    base, stage, stages, full, _ = ring
    mine, upper, half = place
    weight, scales, _, scales0, stride, shift = loads0
    slot, parity = at
    ask_for_x(ring, slot, parity, x_map, k, row)
    following, following_parity = next_slot(slot, parity, stages)
    if k + 1 < steps:
        ask_for_x(ring, following, following_parity, x_map, k + 1, row)
    if upper:
        slot = following
    if k + upper < steps:
        to, block = base + slot * stage + X_BYTES + mine * ROW_BYTES, 2 * (k + upper) + half
        swizzled = (half << 2) ^ (mine & 7)
        decode_block(weight, scales, raw0, scales0, block, stride, shift, to, swizzled, bias)
        decode_block(weight, scales, raw1, loads1[3], block, stride, shift, to + 8 * ROW_BYTES, swizzled, bias)
        fence_proxy_async()
        mbarrier_arrive((full + 8 * slot,))
    if k + 1 < steps:
        return next_slot(following, following_parity, stages)
    return following, following_parity


@device
def load_blocks(tiles, ring, x_map, weight, scales, bases, strides, shift, paired, sections, sizes, steps, bias):
    """What the two warpgroups do that load quantised weights.

    Of two steps, 128 columns, a thread has 32 columns of two rows, and loads them two steps ahead. Four lanes share a
    row, so that a warp's load touches eight rows; those of the second step have their rows in another order, so that
    eight lanes store to different banks.
    """
    row_groups, groups = tiles
    group, at = cuda.blockIdx.x, (0, 0)
    lane, warp = cuda.threadIdx.x & 31, (cuda.threadIdx.x - CONSUMERS) >> 5
    upper, half = (lane >> 1) & 1, lane & 1
    mine = 16 * warp + ((lane >> 2) ^ (2 * upper))
    place, first, started = (mine, upper, half), lane & 3, False
    while group < groups:
        no_unroll()
        tile = div_u32((group, row_groups))
        row = (group - tile * row_groups) * ROWS
        w0, s0 = row_addresses(bases, strides, paired, tile, sections, sizes, mine)
        w1, s1 = row_addresses(bases, strides, paired, tile, sections, sizes, mine + 8)
        loads0, loads1 = (weight, scales, w0, s0, strides[0], shift), (weight, scales, w1, s1, strides[0], shift)
        raw0, raw1 = load_block(loads0, first), load_block(loads1, first)
        raw2, raw3 = load_block(loads0, first + 4), load_block(loads1, first + 4)
        if not started:
            griddepcontrol_wait()
            started = True
        k, block = 0, first + 8
        while k < steps:  # four steps: a move of what is loaded to another register would wait for it
            no_unroll()
            at = put_pair(ring, at, x_map, k, steps, row, loads0, loads1, raw0, raw1, place, bias)
            raw0, raw1 = load_block(loads0, block), load_block(loads1, block)
            if k + 2 < steps:
                at = put_pair(ring, at, x_map, k + 2, steps, row, loads0, loads1, raw2, raw3, place, bias)
                raw2, raw3 = load_block(loads0, block + 4), load_block(loads1, block + 4)
            k += 4
            block += 8
        group += cuda.gridDim.x


# Multiplying


@device
def finish(sums, weight, row_scales, scales, tokens, first_token, paired, tile, sections, sizes, residual, added, outs):
    """Store a tile's results: times the tokens' scales and with float32 those of W's rows, plus `residual` if `added`;
    SwiGLU of both halves if `paired`.
    """
    rows, end, kv_rows = sizes
    out, out_k, out_v = outs
    lane, warp, width = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, 2 * len(sums)
    t0 = first_token + 16 * warp + (lane >> 2)
    t1, column = t0 + 8, 2 * (lane & 3)
    first, second = t0 < tokens, t1 < tokens
    scale0 = scales[t0] if first else np.float32(0)
    scale1 = scales[t1] if second else np.float32(0)
    sums = row_scale(sums, scale0, scale1)
    if paired:
        column += tile * (width >> 1)
        at, left = address(out, t0 * rows + column), end - column
        if is_split(weight, row_scales[0]):
            gate, up = address(row_scales[0], column), address(row_scales[1], column)
            sums = scale_columns(sums, gate, up, left, left)
        st_global_rows(silu_and_mul_halves(sums), at, at + 32 * rows, left if first else 0, left if second else 0)
        return
    section, tile = section_of(tile, sections[0], sections[1])
    column += tile * width
    if is_split(weight, row_scales[0]):
        half, left, at = width >> 1, (end if section == 0 else kv_rows) - column, address(row_scales[0], column)
        if section == 1:
            at = address(row_scales[1], column)
        elif section == 2:
            at = address(row_scales[2], column)
        sums = scale_columns(sums, at, at + 4 * half, left, left - half)
    if section == 0:
        left = end - column
        n0, n1 = left if first else 0, left if second else 0
        if added:
            at = address(residual, t0 * rows + column)
            sums = add_global_rows(sums, at, at + 32 * rows, n0, n1)
        at = address(out, t0 * rows + column)
        st_global_rows(sums, at, at + 32 * rows, n0, n1)
    else:
        at, left = address(out_k if section == 1 else out_v, t0 * kv_rows + column), kv_rows - column
        st_global_rows(sums, at, at + 32 * kv_rows, left if first else 0, left if second else 0)


@device
def multiply(zeros, tiles, ring, x, weight, row_scales, steps, scales, tokens, paired, sections, sizes, residual,
             added, outs):  # fmt: skip
    """What the two warpgroups do that multiply. The tensor cores' sums have fewer bits than float32: those of pieces of
    float32 are added up outside after 512 columns.
    """
    row_groups, groups = tiles
    base, stage, stages, full, empty = ring
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    a = DESCRIPTOR + ((base + (warp >> 2) * 64 * ROW_BYTES) >> 4)
    b = DESCRIPTOR + ((base + X_BYTES) >> 4)
    group, slot, parity, before = cuda.blockIdx.x, 0, 0, 0
    all_steps = 3 * steps if is_split(weight, row_scales[0]) else steps
    griddepcontrol_wait()
    while group < groups:
        no_unroll()
        sums, totals, k = zeros, zeros, 0
        while k < all_steps:
            no_unroll()
            mbarrier_wait((full + 8 * slot, parity))
            sums = wgmma_tile(x, sums, a + slot * (stage >> 4), b + slot * (stage >> 4))
            if k > 0 and lane == 0:  # the products before have ended
                mbarrier_arrive((empty + 8 * before,))
            if is_split(weight, row_scales[0]) and k & 7 == 7:
                totals, sums = add_parts(totals, wgmma_end(sums)), zeros
            before = slot
            slot, parity = next_slot(slot, parity, stages)
            k += 1
        sums = wgmma_end(sums)
        if is_split(weight, row_scales[0]):
            sums = add_parts(totals, sums)
        if lane == 0:
            mbarrier_arrive((empty + 8 * before,))
        tile = div_u32((group, row_groups))
        row = (group - tile * row_groups) * ROWS
        finish(sums, weight, row_scales, scales, tokens, row, paired, tile, sections, sizes, residual, added,
               outs)  # fmt: skip
        group += cuda.gridDim.x


@device
def gemm(zeros, tokens, x, x_map, scales, weights, maps, stride, weight_scales, scale_stride, shift, paired, sizes,
         sections, residual, added, outs, steps, stages, bias):  # fmt: skip
    """The body of the kernels here."""
    w0, w1, w2 = weights
    s0, s1, s2 = weight_scales
    width = 2 * len(zeros)
    stage = (ROWS + width) * ROW_BYTES
    base = (shared_address(cuda.shared.array(0, np.float32), 0) + 1023) & ~1023
    full = base + stages * stage
    ring = base, stage, stages, full, full + 8 * stages
    griddepcontrol_launch_dependents()
    if cuda.threadIdx.x == 0:
        i = 0
        while i < stages:
            no_unroll()
            mbarrier_init((full + 8 * i, 1 + LOADERS // 2 if has_scales(w0) else 1))
            mbarrier_init((full + 8 * (stages + i), CONSUMERS // 32))
            i += 1
        fence_mbarrier_init(())
    cuda.syncthreads()
    row_groups = (tokens[0] + ROWS - 1) >> 7
    tiles = row_groups, row_groups * (sections[0] + 2 * sections[1])
    if cuda.threadIdx.x < CONSUMERS:
        multiply(zeros, tiles, ring, x, w0, weight_scales, steps, scales, tokens[0], paired, sections, sizes, residual,
                 added, outs)  # fmt: skip
    elif has_scales(w0):
        bases = address(w0, 0), address(w1, 0), address(w2, 0), address(s0, 0), address(s1, 0), address(s2, 0)
        strides = stride, scale_stride * scale_bytes(s0)
        load_blocks(tiles, ring, x_map, w0, s0, bases, strides, shift, paired, sections, sizes, steps, bias)
    elif cuda.threadIdx.x == CONSUMERS:
        load_boxes(tiles, ring, x_map, maps, paired, sections, steps, is_split(w0, s0), width)


@launch_bounds(min_blocks=1)
@cuda.jit
def wgmma_128_kernel(tokens, x, x_map, scales, w0, w1, w2, m0, m1, m2, stride, s0, s1, s2, scale_stride, shift, paired,
                     rows, end, kv_rows, row_tiles, kv_tiles, residual, added, out, out_k, out_v, steps, stages,
                     bias):  # fmt: skip
    """Tiles of 128 rows of W."""
    gemm(zeros_of(64), tokens, x, x_map, scales, (w0, w1, w2), (m0, m1, m2), stride, (s0, s1, s2), scale_stride, shift,
         paired, (rows, end, kv_rows), (row_tiles, kv_tiles), residual, added, (out, out_k, out_v), steps, stages,
         bias)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def wgmma_192_kernel(tokens, x, x_map, scales, w0, w1, w2, m0, m1, m2, stride, s0, s1, s2, scale_stride, shift, paired,
                     rows, end, kv_rows, row_tiles, kv_tiles, residual, added, out, out_k, out_v, steps, stages,
                     bias):  # fmt: skip
    """Tiles of 192 rows of W, which has 16 bits."""
    gemm(zeros_of(96), tokens, x, x_map, scales, (w0, w1, w2), (m0, m1, m2), stride, (s0, s1, s2), scale_stride, shift,
         paired, (rows, end, kv_rows), (row_tiles, kv_tiles), residual, added, (out, out_k, out_v), steps, stages,
         bias)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def wgmma_224_kernel(tokens, x, x_map, scales, w0, w1, w2, m0, m1, m2, stride, s0, s1, s2, scale_stride, shift, paired,
                     rows, end, kv_rows, row_tiles, kv_tiles, residual, added, out, out_k, out_v, steps, stages,
                     bias):  # fmt: skip
    """Tiles of 224 rows of W, which has 16 bits."""
    gemm(zeros_of(112), tokens, x, x_map, scales, (w0, w1, w2), (m0, m1, m2), stride, (s0, s1, s2), scale_stride, shift,
         paired, (rows, end, kv_rows), (row_tiles, kv_tiles), residual, added, (out, out_k, out_v), steps, stages,
         bias)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def wgmma_256_kernel(tokens, x, x_map, scales, w0, w1, w2, m0, m1, m2, stride, s0, s1, s2, scale_stride, shift, paired,
                     rows, end, kv_rows, row_tiles, kv_tiles, residual, added, out, out_k, out_v, steps, stages,
                     bias):  # fmt: skip
    """Tiles of 256 rows of W, which has 16 bits."""
    gemm(zeros_of(128), tokens, x, x_map, scales, (w0, w1, w2), (m0, m1, m2), stride, (s0, s1, s2), scale_stride, shift,
         paired, (rows, end, kv_rows), (row_tiles, kv_tiles), residual, added, (out, out_k, out_v), steps, stages,
         bias)  # fmt: skip


assert ROWS == 1 << 7
