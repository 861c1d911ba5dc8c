"""Skinny GEMM: linear layers for 2 to 128 tokens, Y[T, N] = X[T, K] · W[N, K]ᵀ on tensor cores, with sums in float32.

W is streamed once from memory and decoded to 16 bits in registers (`cuda/fragments.py`). Its rows are the 16 rows of
`mma.m16n8k16`, tokens the 8 columns, so that two tokens waste little. X is rounded to 16 bits (`skinny_x`). Memory
bandwidth is the floor: W of 4096 × 4096 in float16 is 34 MB, 8.3 µs at 4.05 TB/s.

- K is divided into slices. A block keeps its slice of X in shared memory and walks through tiles of rows of W. A warp
  has 32 rows; of the 64-byte steps of their slice it takes every `k_warps`-th. It copies them to a ring of its own in
  shared memory, `stages` - 1 steps ahead, without a barrier, from one tile to the next. The first copies start before
  the kernel waits for its predecessor.
- At the end of a tile the `k_warps` warps (1 to 8) with the same rows add their sums up through shared memory, in the
  order of the warps. The sums go to `partials`, and `skinny_sum_kernel` adds the slices up in their order.
- So an element's sum has one order, whatever the number of tokens. Its row of X alone decides on its bits.

A unit is what a warp has of 8 tokens: two tiles of 16 rows × 8 tokens, eight float32 per lane. With a gate, one tile
has rows of the gate and the other the same rows of up.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..arithmetic import float_as_uint, mad_wide_s32, s32
from ..fragments import (
    is_float32,
    mma_step,
    pieces_of,
    splat_half,
    st_global_units,
    st_global_v4_f32,
    st_shared_units,
)
from ..intrinsics import (
    address,
    cp_async_4,
    cp_async_8,
    cp_async_16,
    cp_async_commit,
    cp_async_wait_all,
    cp_async_wait_group,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_shared_u32,
    ld_shared_v2_u32,
    ld_shared_v4_f32,
    ld_shared_v4_u32,
    no_unroll,
    shared_address,
)
from ..mma import zeros8, zeros16, zeros32, zeros64
from ..quant_traits import has_mins, has_scales, is_q4_1, is_q5_k, is_q6_k, scale_bytes
from .common import add4, device, launch_bounds
from .dequant import FIVE_HIGH, FOUR_FACTORS, SIX_FACTORS, SIX_SCALES, factors_of, factors_q6_k, record_bytes
from .params import SKINNY_FUSED_UNITS as FUSED_UNITS
from .params import SKINNY_PLANE_BYTES as PLANE
from .params import SKINNY_ROWS as ROWS
from .params import SKINNY_STEP_BYTES as STEP_BYTES
from .params import SKINNY_UNIT as UNIT
from .params import SKINNY_UNITS as UNITS
from .params import SKINNY_WARPS as WARPS
from .skinny_x import norm_of_slice, round_x, stage_x

HIGH_AT = 3 * PLANE
"""Byte offset of the upper bits of q5_k and q6_k after a stage's payload."""


# Rows


@device
def rows_of(paired, group, rows, kv_rows, weights, scales):
    """Addresses of this lane's four rows of a group, 8 apart, and of the scales that it copies: of row number `lane`.

    A group has rows of one weight, or 16 rows of the gate and the same of up. A row after the end is the last instead.
    """
    w0, w1, w2, stride = weights
    s0, s1, s2, scale_stride = scales
    lane = s32(cuda.threadIdx.x & 31)
    first, last, base, scale_base = s32(group * ROWS), s32(rows - 1), w0, s0
    other, third, mine = w0, s32(16), lane
    if paired:
        first, other, third, mine = s32(group * 16), w1, s32(0), s32(lane & 15)
        scale_base = s1 if lane >= 16 else s0
    elif kv_rows > 0 and first >= rows:
        first = s32(first - rows)
        last = s32(kv_rows - 1)
        base, scale_base = w1, s1
        if first >= kv_rows:
            first = s32(first - kv_rows)
            base, scale_base = w2, s2
        other = base
    row = s32(first + (lane >> 2))
    other_row = s32(row + third)
    return (
        mad_wide_s32(min(row, last), stride, base), mad_wide_s32(min(s32(row + 8), last), stride, base),
        mad_wide_s32(min(other_row, last), stride, other), mad_wide_s32(min(s32(other_row + 8), last), stride, other),
        mad_wide_s32(min(s32(first + mine), last), scale_stride, scale_base),
    )  # fmt: skip


# Copies of a step: 64 bytes of each row, and their scales


@device
def fetch_scales(to, payload, scales, row, step, scale_stride, shift):
    """Start copying the scales of step number `step` of a row: words in planes, and the upper bits of q5_k and q6_k.
    `to` is the shared address of this lane's word of the first plane.
    """
    lane = s32(cuda.threadIdx.x & 31)
    two = s32(to + 4 * lane)
    if has_mins(payload) or is_q6_k(payload):
        log2 = 3 if has_mins(payload) else 2
        record, inside = s32(step >> log2), s32(step & ((1 << log2) - 1))
        size = s32(record_bytes(payload))
        first = s32(record * size)
        source, left = row + first, s32(scale_stride - first)
        cp_async_8(two, source + s32(8 * inside + (0 if has_mins(payload) else SIX_SCALES)), left)
        factors = FOUR_FACTORS if has_mins(payload) else SIX_FACTORS
        cp_async_4(s32(to + 2 * PLANE), source + s32(factors + 4 * (inside >> 1)), left)
        if is_q5_k(payload):
            cp_async_16(s32(to + 12 * lane + HIGH_AT), source + s32(FIVE_HIGH + 16 * inside), left)
        if is_q6_k(payload):
            source += s32(32 * inside)
            for j in range(4):
                cp_async_8(s32(two + HIGH_AT + 2 * PLANE * j), source + 8 * j, left)
    elif is_q4_1(payload):
        left = s32(scale_stride - 4 * step)
        for j in range(4):
            cp_async_4(s32(to + PLANE * j), row + step * 16 + 4 * j, s32(left - j))
    elif is_float32(scales):
        for j in range(4):
            scale = s32(s32(64 * step + 16 * j) >> shift)
            cp_async_4(s32(to + PLANE * j), row + scale * 4, s32(scale_stride - scale))
    elif pieces_of(payload) == 2:  # two float16 of int8
        cp_async_4(to, row + step * 4, s32(scale_stride - 2 * step))
    else:  # four of q4_0
        left = s32(scale_stride - 4 * step)
        if scale_stride & 3 == 0:
            cp_async_8(two, row + step * 8, left)
        else:
            cp_async_4(two, row + step * 8, left)
            cp_async_4(s32(two + 4), row + step * 8 + 4, s32(left - 2))


@device
def fetch_step(cursor, place, to, payload, scales, bases, scale_bases, shape):
    """Start copying the step at the cursor, if there is one: this lane's 16 bytes of a row to the shared address `to`.
    Returns the cursor of the next step.
    """
    tile, step, a, b, c, d, mine = cursor
    k_warp, k_warps, row_warp, row_warps, first_step, steps, lane_steps, tiles = place
    paired, rows, kv_rows, scale_stride, shift = shape
    if tile < tiles:
        left = s32(lane_steps - step)
        cp_async_16(to, a + step * 64, left)
        cp_async_16(s32(to + 512), b + step * 64, left)
        cp_async_16(s32(to + 1024), c + step * 64, left)
        cp_async_16(s32(to + 1536), d + step * 64, left)
        if has_scales(payload):
            to_scales = s32(to + (STEP_BYTES - 12 * (cuda.threadIdx.x & 31)))
            fetch_scales(to_scales, payload, scales, mine, s32(first_step + step), scale_stride, shift)
        step = s32(step + k_warps)
        if step >= steps:
            step, tile = k_warp, s32(tile + cuda.gridDim.x)
            if tile < tiles:
                a, b, c, d, mine = rows_of(
                    paired, s32(tile * row_warps + row_warp), rows, kv_rows, bases, scale_bases
                )  # fmt: skip
    cp_async_commit()
    return tile, step, a, b, c, d, mine


@device
def wait_for_step(stages):
    """Wait until at most the newest `stages` - 1 of this thread's steps are pending."""
    if stages == 4:
        cp_async_wait_group(3)
    elif stages == 2:
        cp_async_wait_group(1)
    else:
        cp_async_wait_all()


@device
def load_row(slot, payload, scales, number):
    """This lane's part of a row from a stage, as `mma_step` wants it: of row lane / 4 + 8 · `number` of the warp.
    `slot` is the shared address of the lane's 16 bytes of the first row.
    """
    lane = s32(cuda.threadIdx.x & 31)
    t, g, zero = s32(lane & 3), s32(lane >> 2), np.uint32(0)
    w = ld_shared_v4_u32(s32(slot + 512 * number))
    factor, second, high, high2 = zero, zero, zero, zero
    one = s32(slot + (STEP_BYTES - 16 * lane + 4 * g))  # of rows 8 further these are 32 · `number` bytes further
    two = s32(slot + (STEP_BYTES - 16 * lane + 8 * g + 4 * (t >> 1)))
    if has_mins(payload):
        scale, least = factors_of(
            payload, ld_shared_u32(s32(two + 64 * number)), t & 1, ld_shared_u32(s32(one + 2 * PLANE + 32 * number))
        )  # fmt: skip
        factor, second = float_as_uint(scale), float_as_uint(least)
        if is_q5_k(payload):  # 16 bytes of a row
            high = ld_shared_u32(s32(slot + (STEP_BYTES + HIGH_AT + 128 * number) - 16 * lane + 16 * g + 4 * t))
    elif is_q6_k(payload):
        scale, scale2 = factors_q6_k(
            ld_shared_u32(s32(two + 64 * number)), t & 1, ld_shared_u32(s32(one + 2 * PLANE + 32 * number))
        )  # fmt: skip
        factor, second = float_as_uint(scale), float_as_uint(scale2)
        of_lane = s32(slot + (STEP_BYTES + HIGH_AT - 16 * lane + 8 * g + 2 * PLANE * t))
        high, high2 = ld_shared_v2_u32(s32(of_lane + 64 * number))
    elif is_q4_1(payload):
        word = ld_shared_u32(s32(one + PLANE * t + 32 * number))
        factor, second = splat_half(word, 0), splat_half(word, 1)
    elif has_scales(payload):
        if is_float32(scales):
            factor = ld_shared_u32(s32(one + PLANE * t + 32 * number))
        elif pieces_of(payload) == 2:
            factor = splat_half(ld_shared_u32(s32(one + 32 * number)), t >> 1)
        else:
            factor = splat_half(ld_shared_u32(s32(two + 64 * number)), t & 1)
    return w[0], w[1], w[2], w[3], factor, second, high, high2


# The kernels


@device
def skinny(zeros, tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns, weights, weight_scales,
           shift, paired, rows, kv_rows, partials, tiles, slices, slice_steps, log2_k_warps, stages,
           slot_bytes, bias):  # fmt: skip
    """The body of all kernels here, for `zeros.size` / 8 units. blockIdx.x counts tiles of rows that blocks begin with,
    blockIdx.y tiles of tokens, blockIdx.z slices of K.
    """
    units = len(zeros) >> 3
    w0, w1, w2, stride = weights
    s0, s1, s2, scale_stride = weight_scales
    first_token, count = s32(cuda.blockIdx.y * (8 * units)), tokens[0]
    if first_token >= count:
        return
    shared = cuda.shared.array(0, np.float32)
    lane, warp = s32(cuda.threadIdx.x & 31), s32(cuda.threadIdx.x >> 5)
    k_warps, row_warps = s32(1 << log2_k_warps), s32(WARPS >> log2_k_warps)
    k_warp, row_warp = s32(warp & (k_warps - 1)), s32(warp >> log2_k_warps)
    pieces, slot_bytes, stages, tiles = pieces_of(w0), s32(slot_bytes), s32(stages), s32(tiles)
    x_row = s32(slice_steps * (64 * pieces))
    x_at = s32(shared_address(shared, 0))
    ring_at = s32(x_at + 8 * units * x_row)
    sums_at = s32(ring_at + WARPS * stages * slot_bytes)
    together = units if units < UNITS else 2
    ring = s32(ring_at + warp * (stages * slot_bytes) + 16 * lane)
    ring_end = s32(ring + stages * slot_bytes)
    size = scale_bytes(s0)
    if not has_scales(w0):
        size = 0

    # this warp's steps of W; this lane's 16 bytes of the last step of a row may be none
    first_step, quad = s32(cuda.blockIdx.z * slice_steps), s32(16 * (lane & 3))
    steps = s32(min(s32(slice_steps), s32(((stride + 63) >> 6) - first_step)))
    lane_steps = s32(((stride - quad + 63) >> 6) - first_step)
    offset = first_step * 64 + quad
    bases = address(w0, 0) + offset, address(w1, 0) + offset, address(w2, 0) + offset, s32(stride)
    scale_bases = address(s0, 0), address(s1, 0), address(s2, 0), s32(scale_stride * size)
    place = k_warp, k_warps, row_warp, row_warps, first_step, steps, lane_steps, tiles
    shape = paired, s32(rows), s32(kv_rows), s32(scale_stride), s32(shift)
    tile = s32(cuda.blockIdx.x)
    a, b, c, d, mine = rows_of(paired, s32(tile * row_warps + row_warp), s32(rows), s32(kv_rows), bases, scale_bases)
    cursor = (tile if k_warp < steps else tiles), k_warp, a, b, c, d, mine
    slot = ring
    while slot < s32(ring_end - slot_bytes):
        no_unroll()
        cursor = fetch_step(cursor, place, slot, w0, s0, bases, scale_bases, shape)
        slot = s32(slot + slot_bytes)
    first_column = s32(first_step * (32 * pieces))
    zero = np.float32(0)
    eight = zero, zero, zero, zero, zero, zero, zero, zero
    norms = eight, eight, eight, eight
    if units <= FUSED_UNITS:
        norms = norm_of_slice(norm, normed, first_column, s32(x_row >> 4), columns)
    griddepcontrol_wait()
    if units <= FUSED_UNITS:
        round_x(x, norms, normed, rounded, scales, squares, capacity, first_token, count, 8 * units, first_column,
                columns, x_row, w0, x_at)  # fmt: skip
    else:
        stage_x(rounded, padded, first_token, count, 8 * units, first_column, x_row, w0, x_at)
    cp_async_commit()
    cp_async_wait_all()
    cuda.syncthreads()
    griddepcontrol_launch_dependents()  # not earlier: `skinny_sum` reads residuals before it waits

    odd = s32(((lane >> 2) & 1) << 6)
    first_x = s32(x_at + (lane >> 2) * x_row + k_warp * (64 * pieces) + quad)
    while tile < tiles:
        sums, step, x_now = zeros, k_warp, first_x
        while step < steps:
            if has_scales(w0):
                cuda.syncwarp()  # all lanes have read what others copied for them
            cursor = fetch_step(cursor, place, slot, w0, s0, bases, scale_bases, shape)
            slot = s32(slot + slot_bytes)  # after the newest stage comes the oldest
            if slot >= ring_end:
                slot = ring
            wait_for_step(stages)
            if has_scales(w0):
                cuda.syncwarp()
            sums = mma_step(
                w0, s0, sums, load_row(slot, w0, s0, 0), load_row(slot, w0, s0, 1), load_row(slot, w0, s0, 2),
                load_row(slot, w0, s0, 3), s32(x_now ^ odd), 8 * x_row, bias,
            )  # fmt: skip
            step, x_now = s32(step + k_warps), s32(x_now + k_warps * (64 * pieces))

        of_tile = s32(((cuda.blockIdx.y * tiles + tile) * slices + cuda.blockIdx.z) * row_warps + row_warp)
        to = address(partials, 4 * lane) + s32(of_tile * units) * (4 * UNIT)
        if k_warps == 1:  # a warp's sums are all of its slice
            st_global_units(sums, to)
        else:
            for part in range(units // together):
                no_unroll()
                if part > 0 or tile != cuda.blockIdx.x:
                    cuda.syncthreads()  # the sums of the last ones have been read
                st_shared_units(sums, s32(sums_at + warp * (1024 * together) + 16 * lane), part)
                cuda.syncthreads()
                half, at = k_warp, s32(sums_at + (row_warp << log2_k_warps) * (1024 * together) + 16 * lane)
                while half < 2 * together:  # a unit's upper tile or its lower one
                    no_unroll()
                    total = add_warps(s32(at + 512 * half), k_warps, 1024 * together)
                    place_of_half = s32(2 * part * together + half)
                    if first_token + 4 * (place_of_half & -2) < count:
                        st_global_v4_f32(to + place_of_half * 512, total[0], total[1], total[2], total[3])
                    half = s32(half + k_warps)
        tile = s32(tile + cuda.gridDim.x)
    cp_async_wait_all()


@device
def add_warps(at, k_warps, distance):
    """Four sums of each of 2, 4 or 8 warps, `distance` bytes apart in shared memory, added up in the warps' order."""
    total = add4(ld_shared_v4_f32(at), ld_shared_v4_f32(s32(at + distance)))
    if k_warps > 2:
        a, b = ld_shared_v4_f32(s32(at + 2 * distance)), ld_shared_v4_f32(s32(at + 3 * distance))
        total = add4(add4(total, a), b)
    if k_warps > 4:
        a, b = ld_shared_v4_f32(s32(at + 4 * distance)), ld_shared_v4_f32(s32(at + 5 * distance))
        c, d = ld_shared_v4_f32(s32(at + 6 * distance)), ld_shared_v4_f32(s32(at + 7 * distance))
        total = add4(add4(add4(add4(total, a), b), c), d)
    return total


@launch_bounds(min_blocks=2)
@cuda.jit
def skinny_8_kernel(tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns, w0, w1, w2, stride,
                    s0, s1, s2, scale_stride, shift, paired, rows, kv_rows, partials, tiles, slices, slice_steps,
                    log2_k_warps, stages, slot_bytes, bias):  # fmt: skip
    """Sums of x · Wᵀ of blocks of up to 8 tokens."""
    skinny(zeros8(), tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns,
           (w0, w1, w2, stride), (s0, s1, s2, scale_stride), shift, paired, rows, kv_rows, partials, tiles, slices,
           slice_steps, log2_k_warps, stages, slot_bytes, bias)  # fmt: skip


@launch_bounds(min_blocks=2)
@cuda.jit
def skinny_16_kernel(tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns, w0, w1, w2, stride,
                     s0, s1, s2, scale_stride, shift, paired, rows, kv_rows, partials, tiles, slices, slice_steps,
                     log2_k_warps, stages, slot_bytes, bias):  # fmt: skip
    """Sums of x · Wᵀ of blocks of up to 16 tokens."""
    skinny(zeros16(), tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns,
           (w0, w1, w2, stride), (s0, s1, s2, scale_stride), shift, paired, rows, kv_rows, partials, tiles, slices,
           slice_steps, log2_k_warps, stages, slot_bytes, bias)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def skinny_32_kernel(tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns, w0, w1, w2, stride,
                     s0, s1, s2, scale_stride, shift, paired, rows, kv_rows, partials, tiles, slices, slice_steps,
                     log2_k_warps, stages, slot_bytes, bias):  # fmt: skip
    """Sums of x · Wᵀ of blocks of up to 32 tokens."""
    skinny(zeros32(), tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns,
           (w0, w1, w2, stride), (s0, s1, s2, scale_stride), shift, paired, rows, kv_rows, partials, tiles, slices,
           slice_steps, log2_k_warps, stages, slot_bytes, bias)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def skinny_64_kernel(tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns, w0, w1, w2, stride,
                     s0, s1, s2, scale_stride, shift, paired, rows, kv_rows, partials, tiles, slices, slice_steps,
                     log2_k_warps, stages, slot_bytes, bias):  # fmt: skip
    """Sums of x · Wᵀ of blocks of up to 64 tokens."""
    skinny(zeros64(), tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns,
           (w0, w1, w2, stride), (s0, s1, s2, scale_stride), shift, paired, rows, kv_rows, partials, tiles, slices,
           slice_steps, log2_k_warps, stages, slot_bytes, bias)  # fmt: skip
