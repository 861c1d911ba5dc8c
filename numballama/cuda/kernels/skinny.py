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
    float_as_uint,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_shared_u32,
    ld_shared_v2_u32,
    ld_shared_v4_u32,
    ld_v4_f32,
    no_unroll,
    shared_address,
)
from ..mma import zeros8, zeros16, zeros32, zeros64
from ..quant_traits import has_mins, has_scales, is_q4_1, is_q5_k, is_q6_k, scale_bytes
from .common import add4, device, launch_bounds, prefetch_norm
from .dequant import FIVE_HIGH, FOUR_FACTORS, SIX_FACTORS, SIX_SCALES, factors_of, factors_q6_k, record_bytes
from .params import SKINNY_FUSED_UNITS as FUSED_UNITS
from .params import SKINNY_PLANE_BYTES as PLANE
from .params import SKINNY_ROWS as ROWS
from .params import SKINNY_STEP_BYTES as STEP_BYTES
from .params import SKINNY_UNIT as UNIT
from .params import SKINNY_UNITS as UNITS
from .params import SKINNY_WARPS as WARPS
from .skinny_x import round_x, stage_x

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
    first, last, base, scale_base = group * ROWS, rows - 1, w0, s0
    if paired:
        first = group * 16
    elif kv_rows > 0 and first >= rows:
        first -= rows
        last = kv_rows - 1
        base, scale_base = w1, s1
        if first >= kv_rows:
            first -= kv_rows
            base, scale_base = w2, s2
    last -= first
    lane = cuda.threadIdx.x & 31
    g = lane >> 2
    base += first * stride + ((lane & 3) << 4)
    scale_base += first * scale_stride
    other, second, mine = base, 16, lane
    if paired:
        other, second, mine = base + (w1 - w0), 0, lane & 15
        if lane >= 16:
            scale_base += s1 - s0
    a, b = np.int32(min(g, last)), np.int32(min(g + 8, last))
    c, d = np.int32(min(g + second, last)), np.int32(min(g + second + 8, last))
    step = np.int32(stride)
    return (
        base + a * step, base + b * step, other + c * step, other + d * step,
        scale_base + np.int32(min(mine, last)) * np.int32(scale_stride),
    )  # fmt: skip


# Copies of a step: 64 bytes of each row, and their scales


@device
def fetch_scales(slot, payload, scales, row, step, scale_stride, shift):
    """Start copying the scales of step number `step` of a row: words in planes, and the upper bits of q5_k and q6_k."""
    to = slot + STEP_BYTES + 4 * (cuda.threadIdx.x & 31)
    if has_mins(payload) or is_q6_k(payload):
        log2 = 3 if has_mins(payload) else 2
        record, inside = step >> log2, step & ((1 << log2) - 1)
        size = record_bytes(payload)
        source, count = row + record * size, 4 if record * size < scale_stride else 0
        words = source + 8 * inside + (0 if has_mins(payload) else SIX_SCALES)
        cp_async_8(to + 4 * (cuda.threadIdx.x & 31), words, 2 * count)
        factors = FOUR_FACTORS if has_mins(payload) else SIX_FACTORS
        cp_async_4(to + 2 * PLANE, source + factors + 4 * (inside >> 1), count)
        if is_q5_k(payload):
            high = slot + STEP_BYTES + HIGH_AT + 16 * (cuda.threadIdx.x & 31)
            cp_async_16(high, source + FIVE_HIGH + 16 * inside, 4 * count)
        if is_q6_k(payload):
            high = slot + STEP_BYTES + HIGH_AT + 8 * (cuda.threadIdx.x & 31)
            for j in range(4):
                cp_async_8(high + 2 * PLANE * j, source + 32 * inside + 8 * j, 2 * count)
    elif is_q4_1(payload):
        for j in range(4):
            cp_async_4(to + PLANE * j, row + 16 * step + 4 * j, 4 if 4 * step + j < scale_stride else 0)
    elif is_float32(scales):
        for j in range(4):
            scale = (64 * step + 16 * j) >> shift
            cp_async_4(to + PLANE * j, row + 4 * scale, 4 if scale < scale_stride else 0)
    else:
        if pieces_of(payload) == 2:  # two float16 of int8
            cp_async_4(to, row + 4 * step, 4 if 2 * step < scale_stride else 0)
        elif scale_stride & 3 == 0:  # four of q4_0
            cp_async_8(to + 4 * (cuda.threadIdx.x & 31), row + 8 * step, 8 if 4 * step < scale_stride else 0)
        else:
            cp_async_4(to + 4 * (cuda.threadIdx.x & 31), row + 8 * step, 4 if 4 * step < scale_stride else 0)
            cp_async_4(
                to + 4 * (cuda.threadIdx.x & 31) + 4, row + 8 * step + 4, 4 if 4 * step + 2 < scale_stride else 0
            )


@device
def fetch_step(cursor, place, slot, payload, scales, bases, scale_bases, shape):
    """Start copying the step at the cursor, if there is one. Returns the cursor of the next step."""
    tile, step, a, b, c, d, mine = cursor
    k_warp, k_warps, row_warp, row_warps, first_step, steps, tiles = place
    paired, rows, kv_rows, stride, scale_stride, shift = shape
    if tile < tiles:
        lane = cuda.threadIdx.x & 31
        column = (first_step + step) << 6
        to, count = slot + 16 * lane, 16 if column + ((lane & 3) << 4) < stride else 0
        cp_async_16(to, a + column, count)
        cp_async_16(to + 512, b + column, count)
        cp_async_16(to + 1024, c + column, count)
        cp_async_16(to + 1536, d + column, count)
        if has_scales(payload):
            fetch_scales(slot, payload, scales, mine, first_step + step, scale_stride, shift)
        step += k_warps
        if step >= steps:
            step = k_warp
            tile += cuda.gridDim.x
            a, b, c, d, mine = rows_of(
                paired, min(tile, tiles - 1) * row_warps + row_warp, rows, kv_rows, bases, scale_bases
            )
    cp_async_commit()
    return tile, step, a, b, c, d, mine


@device
def wait_for_step(stages):
    """Wait until at most the newest `stages` - 1 of this thread's steps are pending."""
    if stages == 8:
        cp_async_wait_group(7)
    elif stages == 4:
        cp_async_wait_group(3)
    elif stages == 2:
        cp_async_wait_group(1)
    else:
        cp_async_wait_all()


@device
def load_row(slot, payload, scales, row):
    """This lane's part of a row from a stage, as `mma_step` wants it; `row` is its number in the warp."""
    lane = cuda.threadIdx.x & 31
    t = lane & 3
    zero = np.uint32(0)
    w = ld_shared_v4_u32(slot + ((row >> 3) << 9) + 16 * lane)
    factor, second, high, high2 = zero, zero, zero, zero
    at = slot + STEP_BYTES + 4 * row
    if has_mins(payload):
        scale, least = factors_of(
            payload, ld_shared_u32(at + 4 * row + 4 * (t >> 1)), t & 1, ld_shared_u32(at + 2 * PLANE)
        )  # fmt: skip
        factor, second = float_as_uint(scale), float_as_uint(least)
        if is_q5_k(payload):
            high = ld_shared_u32(at + HIGH_AT + 12 * row + 4 * t)
    elif is_q6_k(payload):
        scale, scale2 = factors_q6_k(ld_shared_u32(at + 4 * row + 4 * (t >> 1)), t & 1, ld_shared_u32(at + 2 * PLANE))
        factor, second = float_as_uint(scale), float_as_uint(scale2)
        high, high2 = ld_shared_v2_u32(at + HIGH_AT + 4 * row + 2 * PLANE * t)
    elif is_q4_1(payload):
        word = ld_shared_u32(at + PLANE * t)
        factor, second = splat_half(word, 0), splat_half(word, 1)
    elif has_scales(payload):
        if is_float32(scales):
            factor = ld_shared_u32(at + PLANE * t)
        elif pieces_of(payload) == 2:
            factor = splat_half(ld_shared_u32(at), t >> 1)
        else:
            factor = splat_half(ld_shared_u32(at + 4 * row + 4 * (t >> 1)), t & 1)
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
    first_token = cuda.blockIdx.y * (8 * units)
    if first_token >= tokens[0]:
        return
    shared = cuda.shared.array(0, np.float32)
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    k_warps, row_warps = 1 << log2_k_warps, WARPS >> log2_k_warps
    k_warp, row_warp = warp & (k_warps - 1), warp >> log2_k_warps
    pieces = pieces_of(w0)
    x_row = slice_steps * 64 * pieces
    x_at = shared_address(shared, 0)
    ring_at = x_at + 8 * units * x_row
    sums_at = ring_at + WARPS * stages * slot_bytes
    sums_index = (sums_at - x_at) >> 2
    together = units if units < UNITS else 2
    ring = ring_at + warp * (stages * slot_bytes)
    size = scale_bytes(s0)
    if not has_scales(w0):
        size = 0

    direct = k_warps == 1  # a warp's sums are all of its slice

    # this warp's steps of W
    first_step = cuda.blockIdx.z * slice_steps
    row_steps = (stride + 63) >> 6
    steps = min(slice_steps, row_steps - first_step)
    bases = address(w0, 0), address(w1, 0), address(w2, 0), stride
    scale_bases = address(s0, 0), address(s1, 0), address(s2, 0), scale_stride * size
    place = k_warp, k_warps, row_warp, row_warps, first_step, steps, tiles
    shape = paired, rows, kv_rows, stride, scale_stride, shift
    tile = np.int64(cuda.blockIdx.x)
    a, b, c, d, mine = rows_of(paired, tile * row_warps + row_warp, rows, kv_rows, bases, scale_bases)
    cursor = (tile if k_warp < steps else tiles), k_warp, a, b, c, d, mine
    ring_end, writing, reading = ring + stages * slot_bytes, ring, ring
    while writing < ring_end - slot_bytes:
        no_unroll()
        cursor = fetch_step(cursor, place, writing, w0, s0, bases, scale_bases, shape)
        writing += slot_bytes
    first_column = first_step * (32 * pieces)
    prefetch_norm(norm, normed, first_column, min(columns, first_column + slice_steps * (32 * pieces)))
    griddepcontrol_wait()
    if units <= FUSED_UNITS:
        round_x(x, norm, normed, rounded, scales, squares, capacity, first_token, tokens[0], 8 * units, first_column,
                columns, x_row, w0, x_at)  # fmt: skip
    else:
        stage_x(rounded, padded, first_token, tokens[0], 8 * units, first_column, x_row, w0, x_at)
    cp_async_commit()
    cp_async_wait_all()
    cuda.syncthreads()
    griddepcontrol_launch_dependents()  # not earlier: `skinny_sum` reads residuals before it waits

    token_row, odd = x_at + (lane >> 2) * x_row, ((lane >> 2) & 1) << 6
    while tile < tiles:
        sums = zeros
        step = np.int64(k_warp)
        while step < steps:
            if has_scales(w0):
                cuda.syncwarp()  # all lanes have read what others copied for them
            cursor = fetch_step(cursor, place, writing, w0, s0, bases, scale_bases, shape)
            writing = writing + slot_bytes if writing + slot_bytes < ring_end else ring
            wait_for_step(stages)
            if has_scales(w0):
                cuda.syncwarp()
            g = lane >> 2
            sums = mma_step(
                w0, s0, sums, load_row(reading, w0, s0, g), load_row(reading, w0, s0, g + 8),
                load_row(reading, w0, s0, g + 16), load_row(reading, w0, s0, g + 24),
                token_row + ((step * (64 * pieces) + ((lane & 3) << 4)) ^ odd), 8 * x_row, bias,
            )  # fmt: skip
            reading = reading + slot_bytes if reading + slot_bytes < ring_end else ring
            step += k_warps

        slot_of_tile = ((cuda.blockIdx.y * tiles + tile) * slices + cuda.blockIdx.z) * row_warps + row_warp
        parts = units // together
        if direct:
            parts = 0
            to = address(partials, slot_of_tile * units * UNIT + 4 * lane)
            st_global_units(sums, to)
        for part in range(parts):
            no_unroll()
            cuda.syncthreads()  # the sums of the last ones have been read
            st_shared_units(sums, sums_at + warp * (1024 * together) + 16 * lane, part)
            cuda.syncthreads()
            local = np.int64(k_warp)
            while local < together:
                no_unroll()
                unit = part * together + local
                at = sums_index + ((row_warp << log2_k_warps) * together + local) * UNIT + 4 * lane
                upper, lower = ld_v4_f32(shared, at), ld_v4_f32(shared, at + 128)
                for k in range(1, k_warps):
                    no_unroll()
                    other = at + k * (together * UNIT)
                    upper, lower = add4(upper, ld_v4_f32(shared, other)), add4(lower, ld_v4_f32(shared, other + 128))
                if first_token + 8 * unit < tokens[0]:
                    to = address(partials, (slot_of_tile * units + unit) * UNIT + 4 * lane)
                    st_global_v4_f32(to, upper[0], upper[1], upper[2], upper[3])
                    st_global_v4_f32(to + 512, lower[0], lower[1], lower[2], lower[3])
                local += k_warps
        tile += cuda.gridDim.x
    cp_async_wait_all()


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
