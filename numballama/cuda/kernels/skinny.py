"""Skinny GEMM: linear layers for 2 to 64 tokens, Y[T, N] = X[T, K] · W[N, K]ᵀ on tensor cores, with sums in float32.

W is streamed once from memory and decoded to 16 bits in registers (`cuda/fragments.py`). Its rows are the 16 rows of
`mma.m16n8k16`, tokens the 8 columns, so that two tokens waste little. X comes rounded to 16 bits, with a scale for each
row (`round_kernel`). Memory bandwidth is the floor: W of 4096 × 4096 in float16 is 34 MB, 8.3 µs at 4.05 TB/s.

- K is divided into slices. A block keeps its slice of X in shared memory and walks through tiles of rows of W. A warp
  has 32 rows; of the 64-byte steps of their slice it takes every `k_warps`-th. It copies them to a ring of its own in
  shared memory, `stages` - 1 steps ahead, without a barrier, from one tile to the next. The first copies start before
  the kernel waits for its predecessor.
- At the end of a tile the `k_warps` warps with the same rows add their sums up through shared memory, in the order of
  the warps. If there is one slice, they finish the results. Otherwise the sums of the slices go to `partials`, and
  `skinny_sum_kernel` adds them up in the order of the slices.
- So an element's sum has one order, whatever the number of tokens. Its row of X alone decides on its bits.

A unit is what a warp has of 8 tokens: two tiles of 16 rows × 8 tokens, eight float32 per lane. With a gate, one tile has
rows of the gate and the other the same rows of up.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..fragments import (
    is_float32,
    mma_step,
    pieces_of,
    splat_half,
    st_global_f32,
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
from ..quant_traits import has_scales, is_q4_1, is_q4_k, is_q6_k, scale_bytes
from .common import device, launch_bounds, pdl_sync, silu_and_mul
from .dequant import FOUR_FACTORS, FOUR_RECORD, SIX_FACTORS, SIX_RECORD, SIX_SCALES, factors_of, factors_q6_k
from .params import SKINNY_ROWS as ROWS
from .params import SKINNY_STEP_BYTES as STEP_BYTES
from .params import SKINNY_UNITS as UNITS
from .params import SKINNY_WARPS as WARPS
from .params import SKINNY_PLANE_BYTES as PLANE

HIGH_AT = 3 * PLANE
"""Byte offset of q6_k's upper bits after a stage's payload."""
UNIT = 256
"""Sums of a unit, as float32."""


# Rows


@device
def addresses_of(paired, group, i, rows, kv_rows, weights, scales):
    """Addresses of row `i` of a group of 32 rows, and of its scales. A row after the end is the last one instead."""
    w0, w1, w2, stride = weights
    s0, s1, s2, scale_stride = scales
    if paired:
        row = min(group * 16 + (i & 15), rows - 1)
        base, scale_base = (w0, s0) if i < 16 else (w1, s1)
    else:
        row = min(group * ROWS + i, rows + 2 * kv_rows - 1)
        base, scale_base = w0, s0
        if row >= rows + kv_rows:
            row -= rows + kv_rows
            base, scale_base = w2, s2
        elif row >= rows:
            row -= rows
            base, scale_base = w1, s1
    return base + row * stride, scale_base + row * scale_stride


@device
def rows_of(paired, group, rows, kv_rows, weights, scales):
    """Addresses of this lane's four rows of a group, 8 apart, and of the scales that it copies: of row number `lane`."""
    lane = cuda.threadIdx.x & 31
    g, t = lane >> 2, (lane & 3) << 4
    a, _ = addresses_of(paired, group, g, rows, kv_rows, weights, scales)
    b, _ = addresses_of(paired, group, g + 8, rows, kv_rows, weights, scales)
    c, _ = addresses_of(paired, group, g + 16, rows, kv_rows, weights, scales)
    d, _ = addresses_of(paired, group, g + 24, rows, kv_rows, weights, scales)
    _, mine = addresses_of(paired, group, lane, rows, kv_rows, weights, scales)
    return a + t, b + t, c + t, d + t, mine


# Copies of a step: 64 bytes of each row, and their scales


@device
def fetch_scales(slot, payload, scales, row, step, scale_stride, shift):
    """Start copying the scales of step number `step` of a row: words in planes, and q6_k's upper bits."""
    to = slot + STEP_BYTES + 4 * (cuda.threadIdx.x & 31)
    if is_q4_k(payload) or is_q6_k(payload):
        log2 = 3 if is_q4_k(payload) else 2
        record, inside = step >> log2, step & ((1 << log2) - 1)
        size = FOUR_RECORD if is_q4_k(payload) else SIX_RECORD
        source, count = row + record * size, 4 if record * size < scale_stride else 0
        words = source + 8 * inside + (0 if is_q4_k(payload) else SIX_SCALES)
        cp_async_4(to, words, count)
        cp_async_4(to + PLANE, words + 4, count)
        factors = FOUR_FACTORS if is_q4_k(payload) else SIX_FACTORS
        cp_async_4(to + 2 * PLANE, source + factors + 4 * (inside >> 1), count)
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
        per_step = pieces_of(payload)  # two float16 of int8, four of q4_0
        cp_async_4(to, row + 2 * per_step * step, 4 if per_step * step < scale_stride else 0)
        if per_step == 4:
            cp_async_4(to + PLANE, row + 8 * step + 4, 4 if 4 * step + 2 < scale_stride else 0)


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
    if is_q4_k(payload):
        scale, least = factors_of(payload, ld_shared_u32(at + PLANE * (t >> 1)), t & 1, ld_shared_u32(at + 2 * PLANE))
        factor, second = float_as_uint(scale), float_as_uint(least)
    elif is_q6_k(payload):
        scale, scale2 = factors_q6_k(ld_shared_u32(at + PLANE * (t >> 1)), t & 1, ld_shared_u32(at + 2 * PLANE))
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
            factor = splat_half(ld_shared_u32(at + PLANE * (t >> 1)), t & 1)
    return w[0], w[1], w[2], w[3], factor, second, high, high2


# X


@device
def stage_x(x, padded, first_token, tokens, rows, first_column, row_bytes, payload, shared_at):
    """Start copying the block's columns of `rows` tokens to shared memory, `row_bytes` each; zeros for what is missing.

    Of the pieces (8 columns, 16 bytes) of a step, those that one lane multiplies are 64 bytes apart; of two neighbouring
    64 bytes, tokens with odd numbers have the second first.
    """
    lane, pieces = cuda.threadIdx.x & 31, pieces_of(payload)
    log2 = 0 if pieces == 1 else (1 if pieces == 2 else 2)
    for n in range(cuda.threadIdx.x >> 5, rows, WARPS):
        no_unroll()
        source = address(x, (first_token + n) * padded + first_column)
        for i in range(lane, row_bytes >> 4, 32):
            no_unroll()
            inside = i & (4 * pieces - 1)
            place = i - inside + ((inside & (pieces - 1)) << 2) + (inside >> log2)
            here = first_token + n < tokens and first_column + 8 * i < padded
            cp_async_16(shared_at + n * row_bytes + 16 * (place ^ ((n & 1) << 2)), source + 16 * i, 16 if here else 0)


# Results


@device
def put_row(row, token, here, a, b, rows, kv_rows, residual, added, outs):
    """Write a row's results for two tokens from `token` on, `here` of which exist. Rows of keys and values come after
    those of the first weight.
    """
    width = rows if row < rows else kv_rows
    inside = row if row < rows else (row - rows if row < rows + kv_rows else row - rows - kv_rows)
    if row < rows + 2 * kv_rows:
        out = address(outs[0], 0) if row < rows else address(outs[1] if row < rows + kv_rows else outs[2], 0)
        at = token * width + inside
        if here > 0:
            st_global_f32(out + 4 * at, a + residual[at] if added else a)
        if here > 1:
            st_global_f32(out + 4 * (at + width), b + residual[at + width] if added else b)


@device
def finish_unit(paired, group, token, tokens, x_scales, upper, lower, rows, kv_rows, residual, added, outs):
    """Write a unit's sums: `upper` of rows l / 4 and 8 more, `lower` of rows 16 further, for two tokens from `token`."""
    here = tokens - token
    scale = x_scales[token] if here > 0 else np.float32(0)
    scale2 = x_scales[token + 1] if here > 1 else np.float32(0)
    row = (group << (4 if paired else 5)) + ((cuda.threadIdx.x & 31) >> 2)
    a, b, c, d = upper[0] * scale, upper[1] * scale2, upper[2] * scale, upper[3] * scale2
    e, f, g, h = lower[0] * scale, lower[1] * scale2, lower[2] * scale, lower[3] * scale2
    if paired:
        a, b, c, d = silu_and_mul(a, e), silu_and_mul(b, f), silu_and_mul(c, g), silu_and_mul(d, h)
    put_row(row, token, here, a, b, rows, kv_rows, residual, added, outs)
    put_row(row + 8, token, here, c, d, rows, kv_rows, residual, added, outs)
    if not paired:
        put_row(row + 16, token, here, e, f, rows, kv_rows, residual, added, outs)
        put_row(row + 24, token, here, g, h, rows, kv_rows, residual, added, outs)


@device
def add4(a, b):
    """Element-wise sum of four elements."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@device
def add_slice(partials, at, here, upper, lower):
    """(upper, lower) plus the two tiles of a unit at this index, if `here`."""
    if here:
        upper, lower = add4(upper, ld_v4_f32(partials, at)), add4(lower, ld_v4_f32(partials, at + 128))
    return upper, lower


@cuda.jit
def skinny_sum_kernel(tokens, partials, x_scales, paired, residual, added, q, k, v, rows, kv_rows, slices, groups,
                      log2_units, log2_row_warps):  # fmt: skip
    """Add up the slices' sums and finish the results. A warp has a unit: blockIdx.x counts eight groups of 32 rows,
    blockIdx.y units of 8 tokens.
    """
    pdl_sync()
    lane, group = cuda.threadIdx.x & 31, cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5)
    token = 8 * cuda.blockIdx.y
    if token >= tokens[0] or group >= groups:
        return
    units, row_warps = 1 << log2_units, 1 << log2_row_warps
    token_tile, unit = cuda.blockIdx.y >> log2_units, cuda.blockIdx.y & (units - 1)
    tile, row_warp = group >> log2_row_warps, group & (row_warps - 1)
    tiles = (groups + row_warps - 1) >> log2_row_warps
    at = ((token_tile * tiles + tile) * slices * row_warps + row_warp) * units + unit
    distance = row_warps * units * UNIT
    at = at * UNIT + 4 * lane
    zero = np.float32(0)
    upper, lower = (zero, zero, zero, zero), (zero, zero, zero, zero)
    for s in range(0, slices, 4):
        no_unroll()
        upper, lower = add_slice(partials, at + s * distance, True, upper, lower)
        upper, lower = add_slice(partials, at + (s + 1) * distance, s + 1 < slices, upper, lower)
        upper, lower = add_slice(partials, at + (s + 2) * distance, s + 2 < slices, upper, lower)
        upper, lower = add_slice(partials, at + (s + 3) * distance, s + 3 < slices, upper, lower)
    finish_unit(paired, group, token + 2 * (lane & 3), tokens[0], x_scales, upper, lower, rows, kv_rows, residual, added,
                (q, k, v))  # fmt: skip


@device
def skinny(zeros, tokens, x, padded, x_scales, w0, w1, w2, stride, s0, s1, s2, scale_stride, shift, paired, residual,
           added, outs, rows, kv_rows, partials, tiles, slices, slice_steps, log2_k_warps, stages,
           slot_bytes):  # fmt: skip
    """The body of all kernels here, for `zeros.size` / 8 units. blockIdx.x counts tiles of rows that blocks begin with,
    blockIdx.y tiles of tokens, blockIdx.z slices of K.
    """
    units = len(zeros) >> 3
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
    stage = np.int64(0)
    while stage < stages - 1:
        no_unroll()
        cursor = fetch_step(cursor, place, ring + stage * slot_bytes, w0, s0, bases, scale_bases, shape)
        stage += 1
    griddepcontrol_wait()
    stage_x(x, padded, first_token, tokens[0], 8 * units, first_step * (32 * pieces), x_row, w0, x_at)
    cp_async_commit()
    cp_async_wait_all()
    cuda.syncthreads()
    griddepcontrol_launch_dependents()

    token_row, odd = x_at + (lane >> 2) * x_row, ((lane >> 2) & 1) << 6
    while tile < tiles:
        sums = zeros
        step = np.int64(k_warp)
        while step < steps:
            if has_scales(w0):
                cuda.syncwarp()  # all lanes have read what others copied for them
            cursor = fetch_step(
                cursor, place, ring + (stage & (stages - 1)) * slot_bytes, w0, s0, bases, scale_bases, shape
            )
            stage += 1
            wait_for_step(stages)
            if has_scales(w0):
                cuda.syncwarp()
            slot = ring + (stage & (stages - 1)) * slot_bytes
            g = lane >> 2
            sums = mma_step(
                w0, s0, sums, load_row(slot, w0, s0, g), load_row(slot, w0, s0, g + 8),
                load_row(slot, w0, s0, g + 16), load_row(slot, w0, s0, g + 24),
                token_row + ((step * (64 * pieces) + ((lane & 3) << 4)) ^ odd), 8 * x_row,
            )  # fmt: skip
            step += k_warps

        group = tile * row_warps + row_warp
        slot_of_tile = ((cuda.blockIdx.y * tiles + tile) * slices + cuda.blockIdx.z) * row_warps + row_warp
        for part in range(units // together):
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
                token = first_token + 8 * unit
                if token < tokens[0]:
                    if slices == 1:
                        finish_unit(paired, group, token + 2 * (lane & 3), tokens[0], x_scales, upper, lower, rows,
                                    kv_rows, residual, added, outs)  # fmt: skip
                    else:
                        to = address(partials, (slot_of_tile * units + unit) * UNIT + 4 * lane)
                        st_global_v4_f32(to, upper[0], upper[1], upper[2], upper[3])
                        st_global_v4_f32(to + 512, lower[0], lower[1], lower[2], lower[3])
                local += k_warps
        tile += cuda.gridDim.x
    cp_async_wait_all()


@launch_bounds(min_blocks=2)
@cuda.jit
def skinny_8_kernel(tokens, x, padded, x_scales, w0, w1, w2, stride, s0, s1, s2, scale_stride, shift, paired, residual,
                    added, q, k, v, rows, kv_rows, partials, tiles, slices, slice_steps, log2_k_warps,
                    stages, slot_bytes):  # fmt: skip
    """x · Wᵀ of blocks of up to 8 tokens."""
    skinny(zeros8(), tokens, x, padded, x_scales, w0, w1, w2, stride, s0, s1, s2, scale_stride, shift, paired, residual,
           added, (q, k, v), rows, kv_rows, partials, tiles, slices, slice_steps, log2_k_warps, stages,
           slot_bytes)  # fmt: skip


@launch_bounds(min_blocks=2)
@cuda.jit
def skinny_16_kernel(tokens, x, padded, x_scales, w0, w1, w2, stride, s0, s1, s2, scale_stride, shift, paired, residual,
                     added, q, k, v, rows, kv_rows, partials, tiles, slices, slice_steps, log2_k_warps,
                     stages, slot_bytes):  # fmt: skip
    """x · Wᵀ of blocks of up to 16 tokens."""
    skinny(zeros16(), tokens, x, padded, x_scales, w0, w1, w2, stride, s0, s1, s2, scale_stride, shift, paired, residual,
           added, (q, k, v), rows, kv_rows, partials, tiles, slices, slice_steps, log2_k_warps, stages,
           slot_bytes)  # fmt: skip


@launch_bounds(min_blocks=2)
@cuda.jit
def skinny_32_kernel(tokens, x, padded, x_scales, w0, w1, w2, stride, s0, s1, s2, scale_stride, shift, paired, residual,
                     added, q, k, v, rows, kv_rows, partials, tiles, slices, slice_steps, log2_k_warps,
                     stages, slot_bytes):  # fmt: skip
    """x · Wᵀ of blocks of up to 32 tokens."""
    skinny(zeros32(), tokens, x, padded, x_scales, w0, w1, w2, stride, s0, s1, s2, scale_stride, shift, paired, residual,
           added, (q, k, v), rows, kv_rows, partials, tiles, slices, slice_steps, log2_k_warps, stages,
           slot_bytes)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def skinny_64_kernel(tokens, x, padded, x_scales, w0, w1, w2, stride, s0, s1, s2, scale_stride, shift, paired, residual,
                     added, q, k, v, rows, kv_rows, partials, tiles, slices, slice_steps, log2_k_warps,
                     stages, slot_bytes):  # fmt: skip
    """x · Wᵀ of blocks of up to 64 tokens."""
    skinny(zeros64(), tokens, x, padded, x_scales, w0, w1, w2, stride, s0, s1, s2, scale_stride, shift, paired, residual,
           added, (q, k, v), rows, kv_rows, partials, tiles, slices, slice_steps, log2_k_warps, stages,
           slot_bytes)  # fmt: skip
