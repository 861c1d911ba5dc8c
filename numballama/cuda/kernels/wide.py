"""Linear layers of 33 to 128 tokens on sm_90, Y[T, N] = X[T, K] · W[N, K]ᵀ, by wgmma.

A kernel here takes the place of those in `skinny.py` and of `skinny_sum_kernel`: it reads X as `skinny_round_kernel`
leaves it. W is A of wgmma and X is B, so that all tokens of a run are one product and W is read
once. A block has 128 rows of W, 64 a warpgroup, and a slice of K. Tiles of 64 columns of W and X are copied to a ring
of `stages` in shared memory, `stages` - 2 steps ahead; the first of W before the kernel waits for its predecessor. Of a
quantised W a thread loads 32 columns of a row to registers, four steps ahead, and decodes them to shared memory while
the products of the step before are being computed.

Why. mma.sync, as `skinny` and `gemm` use it, multiplies half as fast. At 64 tokens the floor is memory: weights of
11264 × 2048 in bfloat16 are 46 MB, 11 µs at 4.05 TB/s. From 129 tokens on `wgmma_gemm` is faster.

The blocks with a tile's slices of K are a cluster. At the end each leaves its sums in its shared memory, all add up
those of a part of the tile in the order of the slices, from each other's memory, and finish it.

How K is divided depends on the weight alone, so a row's bits are the same in runs of any number of tokens.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..clusters import barrier_cluster_arrive, barrier_cluster_wait, ld_cluster_v4_f32, map_to_rank
from ..fragments import is_float32, splat_half, st_shared_decoded
from ..intrinsics import (
    address,
    cp_async_16,
    cp_async_commit,
    cp_async_wait_all,
    cp_async_wait_group,
    float_as_uint,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_global_u32,
    ld_global_v4_u32,
    no_unroll,
    shared_address,
)
from ..quant_traits import has_mins, has_scales, is_int8, is_q4_1, is_q5_k, is_q6_k, scale_bytes
from ..wgmma import DESCRIPTOR, fence_proxy_async, st_shared_parts, wgmma_end, wgmma_tile, zeros_of
from .common import device, launch_bounds
from .dequant import (
    FIVE_HIGH,
    FOUR_FACTORS,
    SIX_FACTORS,
    SIX_RECORD,
    SIX_SCALES,
    factors_of,
    factors_q6_k,
    record_bytes,
)
from .params import SKINNY_ROWS as GROUP
from .params import SKINNY_UNIT as UNIT
from .params import SKINNY_WARPS as WARPS
from .params import WIDE_ROWS as ROWS
from .params import WIDE_THREADS as THREADS
from .skinny_sum import add_slice, finish_unit, norm_factor, old_row

ROW_BYTES = 128
"""A row of a tile: 64 columns of 16 bits."""


@device
def weight_row(r, group, paired, rows, kv_rows, bases, stride):
    """Address of row `r` of a group of 32; a row after the end is the last instead. A pair's group has 16 rows of the
    gate and the same of up.
    """
    w0, w1, w2 = bases
    if paired:
        row = min(group * 16 + (r & 15), rows - 1)
        return (w1 if r >= 16 else w0) + row * stride
    row, last, base = group * GROUP + r, rows - 1, w0
    if kv_rows > 0 and row >= rows:
        row -= rows
        last, base = kv_rows - 1, w1
        if row >= kv_rows:
            row -= kv_rows
            base = w2
    return base + min(row, last) * stride


@device
def load_block(loads, block):
    """The words of 32 columns of a row: 16 bytes of payload, then of scales and upper bits, four each; of int8 these
    eight for each 16 columns. After the end of the row it is its last block.
    """
    payload, scales, row_at, scales_at, row_bytes, shift = loads
    z = np.uint32(0)
    rest = z, z, z, z, z, z, z, z
    if is_int8(payload):
        a, b = min(2 * block, (row_bytes >> 4) - 1), min(2 * block + 1, (row_bytes >> 4) - 1)
        size, log2 = scale_bytes(scales), shift - 4
        one = ld_global_u32((scales_at + (a >> log2) * size) & -4)
        two = ld_global_u32((scales_at + (b >> log2) * size) & -4)
        low, low_scale = ld_global_v4_u32(row_at + 16 * a), (one, z, z, z)
        high, high_scale = ld_global_v4_u32(row_at + 16 * b), (two, z, z, z)
        return low + low_scale + high + high_scale
    block = min(block, (row_bytes >> 4) - 1)
    e, f, g, h = z, z, z, z
    if is_q6_k(payload):
        record, i = scales_at + (block >> 4) * SIX_RECORD, block & 15
        e, f = ld_global_u32(record + 8 * i), ld_global_u32(record + 8 * i + 4)
        g, h = ld_global_u32(record + SIX_SCALES + 4 * (i >> 1)), ld_global_u32(record + SIX_FACTORS + 4 * (i >> 3))
    elif has_mins(payload):
        record, i = scales_at + (block >> 5) * record_bytes(payload), block & 31
        if is_q5_k(payload):
            g = ld_global_u32(record + FIVE_HIGH + 4 * i)
        e, f = ld_global_u32(record + 4 * (i >> 1)), ld_global_u32(record + FOUR_FACTORS + 4 * (i >> 3))
    elif is_q4_1(payload):
        e = ld_global_u32(scales_at + 4 * block)
    else:
        e = ld_global_u32((scales_at + 2 * block) & -4)
    words, more = ld_global_v4_u32(row_at + 16 * block), (e, f, g, h)
    return words + more + rest


@device
def int8_factor(scales, word, chunk, scales_at, row_bytes, shift):
    """The factor of 16 columns of int8, as `st_shared_decoded` wants it."""
    chunk = min(chunk, (row_bytes >> 4) - 1)
    if is_float32(scales):
        return word
    return splat_half(word, ((scales_at + 2 * (chunk >> (shift - 4))) >> 1) & 1)


@device
def decode_block(payload, scales, raw, scales_at, block, row_bytes, shift, at, first, bias):
    """Decode what `load_block` has loaded, to a row of a tile at `at`, pieces `first` xor 0 to 3."""
    z = np.uint32(0)
    if is_int8(payload):
        a = int8_factor(scales, raw[4], 2 * block, scales_at, row_bytes, shift)
        b = int8_factor(scales, raw[12], 2 * block + 1, scales_at, row_bytes, shift)
        st_shared_decoded(payload, scales, (raw[0], raw[1], raw[2], raw[3], a, z, z, z), at, first, bias)
        st_shared_decoded(payload, scales, (raw[8], raw[9], raw[10], raw[11], b, z, z, z), at, first ^ 2, bias)
        return
    block = min(block, (row_bytes >> 4) - 1)
    factor, second, high, high2 = z, z, z, z
    if is_q6_k(payload):
        x, y = factors_q6_k(raw[6], block & 1, raw[7])
        factor, second, high, high2 = float_as_uint(x), float_as_uint(y), raw[4], raw[5]
    elif has_mins(payload):
        x, y = factors_of(payload, raw[4], block & 1, raw[5])
        factor, second, high = float_as_uint(x), float_as_uint(y), raw[6]  # which only q5_k uses
    elif is_q4_1(payload):
        factor, second = splat_half(raw[4], 0), splat_half(raw[4], 1)
    else:
        factor = splat_half(raw[4], ((scales_at + 2 * block) >> 1) & 1)
    row = raw[0], raw[1], raw[2], raw[3], factor, second, high, high2
    st_shared_decoded(payload, scales, row, at, first, bias)


@device
def fetch_weights(slot, rows_at, column, stride):
    """Start copying 64 columns of a block's rows of W, from byte `column` on: a thread copies 16 bytes of four rows."""
    count = 16 if column < stride else 0
    cp_async_16(slot, rows_at[0] + column, count)
    cp_async_16(slot + 32 * ROW_BYTES, rows_at[1] + column, count)
    cp_async_16(slot + 64 * ROW_BYTES, rows_at[2] + column, count)
    cp_async_16(slot + 96 * ROW_BYTES, rows_at[3] + column, count)


@device
def fetch_tokens(slot, source, row_bytes, column, left, rows):
    """Start copying 64 columns of `rows` tokens, from byte `column` on; zeros from token number `left` on."""
    for i in range(rows >> 5):
        count = 16 if 32 * i < left and column < row_bytes else 0
        cp_async_16(slot + 32 * ROW_BYTES * i, source + 32 * i * row_bytes + column, count)


@device
def multiply_floats(sums, base, rounded, padded, first_token, tokens, bases, paired, rows, kv_rows, stride,
                    first, steps, stages):  # fmt: skip
    """The sums of a block whose W has 16 bits."""
    width = 2 * len(sums)
    stage = (ROWS + width) * ROW_BYTES
    thread = cuda.threadIdx.x
    r, piece = thread >> 3, thread & 7
    mine = base + r * ROW_BYTES + ((piece ^ (r & 7)) << 4)
    group = cuda.blockIdx.x * (ROWS // GROUP)
    rows_at = (
        weight_row(r, group, paired, rows, kv_rows, bases, stride),
        weight_row(r, group + 1, paired, rows, kv_rows, bases, stride),
        weight_row(r, group + 2, paired, rows, kv_rows, bases, stride),
        weight_row(r, group + 3, paired, rows, kv_rows, bases, stride),
    )
    column, ahead = (first << 7) + (piece << 4), stages - 2
    for k in range(min(ahead, steps)):
        no_unroll()
        fetch_weights(mine + k * stage, rows_at, column + (k << 7), stride)
    griddepcontrol_wait()
    source, row_bytes, left = address(rounded, (first_token + r) * padded), 2 * padded, tokens - first_token - r
    for k in range(ahead):
        no_unroll()
        if k < steps:
            fetch_tokens(mine + ROWS * ROW_BYTES + k * stage, source, row_bytes, column + (k << 7), left, width)
        cp_async_commit()
    griddepcontrol_launch_dependents()
    a = DESCRIPTOR + ((base + (thread >> 7) * 64 * ROW_BYTES) >> 4)
    b = DESCRIPTOR + ((base + ROWS * ROW_BYTES) >> 4)
    k, reading, writing = np.int64(0), np.int64(0), np.int64(ahead)
    while k < steps:
        no_unroll()
        wait_for_tokens(stages)
        fence_proxy_async()
        cuda.syncthreads()  # this step's tiles are there, and all products but the last have ended
        if k + ahead < steps:
            fetch_weights(mine + writing * stage, rows_at, column + ((k + ahead) << 7), stride)
            fetch_tokens(
                mine + ROWS * ROW_BYTES + writing * stage, source, row_bytes, column + ((k + ahead) << 7), left, width
            )
        cp_async_commit()
        sums = wgmma_tile(rounded, sums, a + reading * (stage >> 4), b + reading * (stage >> 4))
        reading = reading + 1 if reading + 1 < stages else 0
        writing = writing + 1 if writing + 1 < stages else 0
        k += 1
    return wgmma_end(sums)


@device
def multiply_blocks(sums, base, rounded, padded, first_token, tokens, bases, weight, scale_bases, scales, scale_stride,
                    shift, paired, rows, kv_rows, stride, first, steps, stages, bias):  # fmt: skip
    """The sums of a block whose W is quantised."""
    width = 2 * len(sums)
    stage = (ROWS + width) * ROW_BYTES
    thread = cuda.threadIdx.x
    r, piece, mine, half = thread >> 3, thread & 7, thread >> 1, thread & 1
    to = base + r * ROW_BYTES + ((piece ^ (r & 7)) << 4) + ROWS * ROW_BYTES
    group = cuda.blockIdx.x * (ROWS // GROUP) + (mine >> 5)
    row_at = weight_row(mine & 31, group, paired, rows, kv_rows, bases, stride)
    scales_at = weight_row(mine & 31, group, paired, rows, kv_rows, scale_bases, scale_stride)
    decoded, swizzled = base + mine * ROW_BYTES, (half << 2) ^ (mine & 7)
    column, block, ahead = (first << 7) + (piece << 4), 2 * first + half, stages - 2
    loads = weight, scales, row_at, scales_at, stride, shift
    raw0, raw1 = load_block(loads, block), load_block(loads, block + 2)
    raw2, raw3 = load_block(loads, block + 4), load_block(loads, block + 6)
    griddepcontrol_wait()
    source, row_bytes, left = address(rounded, (first_token + r) * padded), 2 * padded, tokens - first_token - r
    for k in range(ahead):
        no_unroll()
        fetch_tokens(to + k * stage, source, row_bytes, column + (k << 7), left if k < steps else 0, width)
        cp_async_commit()
    griddepcontrol_launch_dependents()
    a = DESCRIPTOR + ((base + (thread >> 7) * 64 * ROW_BYTES) >> 4)
    b = DESCRIPTOR + ((base + ROWS * ROW_BYTES) >> 4)
    tokens_from = to, source, row_bytes, column, left, width, steps
    tiles = a, b, decoded, swizzled, stage, stages, bias
    k, slot = np.int64(0), np.int64(0)
    while k < steps:  # four steps: a move of what is loaded to another register would wait for it
        no_unroll()
        sums = multiply_block(sums, rounded, loads, raw0, block, tiles, tokens_from, k, slot)
        raw0, slot = load_block(loads, block + 8), slot + 1 if slot + 1 < stages else 0
        sums = multiply_block(sums, rounded, loads, raw1, block + 2, tiles, tokens_from, k + 1, slot)
        raw1, slot = load_block(loads, block + 10), slot + 1 if slot + 1 < stages else 0
        sums = multiply_block(sums, rounded, loads, raw2, block + 4, tiles, tokens_from, k + 2, slot)
        raw2, slot = load_block(loads, block + 12), slot + 1 if slot + 1 < stages else 0
        sums = multiply_block(sums, rounded, loads, raw3, block + 6, tiles, tokens_from, k + 3, slot)
        raw3, slot = load_block(loads, block + 14), slot + 1 if slot + 1 < stages else 0
        block += 8
        k += 4
    return wgmma_end(sums)


@device
def multiply_block(sums, rounded, loads, raw, block, tiles, tokens_from, k, slot):
    """The sums after step `k`, whose tiles are in stage `slot`. After the last step tokens are zeros."""
    weight, scales, _, scales_at, stride, shift = loads
    a, b, decoded, swizzled, stage, stages, bias = tiles
    to, source, row_bytes, column, left, width, steps = tokens_from
    decode_block(weight, scales, raw, scales_at, block, stride, shift, decoded + slot * stage, swizzled, bias)
    wait_for_tokens(stages)
    fence_proxy_async()
    cuda.syncthreads()  # this step's tiles are there, and all products but the last have ended
    ahead = stages - 2
    writing = slot + ahead if slot + ahead < stages else slot - 2
    fetch_tokens(
        to + writing * stage, source, row_bytes, column + ((k + ahead) << 7), left if k + ahead < steps else 0, width
    )
    cp_async_commit()
    return wgmma_tile(rounded, sums, a + slot * (stage >> 4), b + slot * (stage >> 4))


@device
def wait_for_tokens(stages):
    """Wait until at most the newest `stages` - 3 of this thread's groups of copies are pending."""
    if stages == 4:
        cp_async_wait_group(1)
    else:
        cp_async_wait_group(3)


@device
def load_part(at, s, slices, scales, squares, token, last, capacity):
    """A slice's part of a unit from its block's memory, as `skinny_sum.load_slice` returns it."""
    s = min(s, slices - 1)
    where, a, b = map_to_rank(at, s), s * capacity + token, s * capacity + last
    return ld_cluster_v4_f32(where), ld_cluster_v4_f32(where + 2 * UNIT), scales[a], scales[b], squares[a], squares[b]


@device
def finish_part(base, unit, group, first_token, tokens, slices, factors_of_x, paired, rows, kv_rows, residual, added,
                outs):  # fmt: skip
    """Add up a unit's sums of all slices, of 32 rows and 8 tokens, and write the results."""
    scales, squares, capacity, normed, eps, columns, units = factors_of_x
    lane = cuda.threadIdx.x & 31
    token = first_token + 8 * unit + 2 * (lane & 3)
    here, row = tokens - token, ((cuda.blockIdx.x * (ROWS // GROUP) + group) << (4 if paired else 5)) + (lane >> 2)
    olds = (
        old_row(row, token, here, rows, residual, added), old_row(row + 8, token, here, rows, residual, added),
        old_row(row + 16, token, here, rows, residual, added), old_row(row + 24, token, here, rows, residual, added),
    )  # fmt: skip
    at = base + 4 * UNIT * (group * units + unit) + 16 * lane
    a, b = min(token, capacity - 1), min(token + 1, capacity - 1)
    zero = np.float32(0)
    sums = (zero, zero, zero, zero), (zero, zero, zero, zero), zero, zero
    for s in range(0, slices, 4):
        no_unroll()
        first = load_part(at, s, slices, scales, squares, a, b, capacity)
        second = load_part(at, s + 1, slices, scales, squares, a, b, capacity)
        third = load_part(at, s + 2, slices, scales, squares, a, b, capacity)
        fourth = load_part(at, s + 3, slices, scales, squares, a, b, capacity)
        sums = add_slice(sums, True, first)
        sums = add_slice(sums, s + 1 < slices, second)
        sums = add_slice(sums, s + 2 < slices, third)
        sums = add_slice(sums, s + 3 < slices, fourth)
    upper, lower, square, square2 = sums
    factors = norm_factor(square, normed, columns, eps), norm_factor(square2, normed, columns, eps)
    finish_unit(paired, row, token, here, factors, upper, lower, olds, rows, kv_rows, outs)


@device
def wide(zeros, tokens, rounded, padded, x_scales, squares, capacity, normed, eps, columns, weights, scales,
         scale_stride, shift, stride, paired, rows, kv_rows, residual, added, outs, slices, steps_here, row_steps,
         stages, bias):  # fmt: skip
    """The body of the kernels here: blockIdx.x is the tile of rows, blockIdx.y that of tokens, blockIdx.z the slice."""
    width = 2 * len(zeros)
    first_token = cuda.blockIdx.y * width
    if first_token >= tokens[0]:
        return
    w0, w1, w2 = weights
    s0, s1, s2 = scales
    base = (shared_address(cuda.shared.array(0, np.float32), 0) + 1023) & ~1023
    bases = address(w0, 0), address(w1, 0), address(w2, 0)
    first = cuda.blockIdx.z * steps_here
    steps = min(steps_here, row_steps - first)
    if has_scales(w0):
        scale_bases = address(s0, 0), address(s1, 0), address(s2, 0)
        sums = multiply_blocks(zeros, base, rounded, padded, first_token, tokens[0], bases, w0, scale_bases, s0,
                               scale_stride * scale_bytes(s0), shift, paired, rows, kv_rows, stride, first, steps,
                               stages, bias)  # fmt: skip
    else:
        sums = multiply_floats(zeros, base, rounded, padded, first_token, tokens[0], bases, paired, rows, kv_rows,
                               stride, first, steps, stages)  # fmt: skip
    cp_async_wait_all()
    lane, warp, units = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, width >> 3
    cuda.syncthreads()  # all products have ended, and sums take the place of the tiles
    at = base + 4 * UNIT * units * (warp >> 1) + 2 * UNIT * (warp & 1) + 16 * lane
    st_shared_parts(sums, at, 4 * UNIT)
    barrier_cluster_arrive()
    barrier_cluster_wait()
    part, parts = cuda.blockIdx.z * WARPS + warp, (ROWS // GROUP) * min(units, (tokens[0] - first_token + 7) >> 3)
    factors_of_x = x_scales, squares, capacity, normed, eps, columns, units
    while part < parts:
        no_unroll()
        finish_part(base, part >> 2, part & 3, first_token, tokens[0], slices, factors_of_x, paired, rows, kv_rows,
                    residual, added, outs)  # fmt: skip
        part += slices * WARPS
    barrier_cluster_arrive()
    barrier_cluster_wait()


@launch_bounds(min_blocks=2)
@cuda.jit
def wide_64_kernel(tokens, rounded, padded, x_scales, squares, capacity, normed, eps, columns, w0, w1, w2, stride, s0,
                   s1, s2, scale_stride, shift, paired, rows, kv_rows, residual, added, q, k, v, slices, steps,
                   row_steps, stages, bias):  # fmt: skip
    """x · Wᵀ of up to 64 tokens, finished as by `skinny_sum_kernel`."""
    wide(zeros_of(32), tokens, rounded, padded, x_scales, squares, capacity, normed, eps, columns, (w0, w1, w2),
         (s0, s1, s2), scale_stride, shift, stride, paired, rows, kv_rows, residual, added, (q, k, v), slices, steps,
         row_steps, stages, bias)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def wide_128_kernel(tokens, rounded, padded, x_scales, squares, capacity, normed, eps, columns, w0, w1, w2, stride, s0,
                    s1, s2, scale_stride, shift, paired, rows, kv_rows, residual, added, q, k, v, slices, steps,
                    row_steps, stages, bias):  # fmt: skip
    """x · Wᵀ of up to 128 tokens, finished as by `skinny_sum_kernel`."""
    wide(zeros_of(64), tokens, rounded, padded, x_scales, squares, capacity, normed, eps, columns, (w0, w1, w2),
         (s0, s1, s2), scale_stride, shift, stride, paired, rows, kv_rows, residual, added, (q, k, v), slices, steps,
         row_steps, stages, bias)  # fmt: skip


assert ROWS == 4 * GROUP, "`part` counts groups of a unit"
assert THREADS == 2 * ROWS, "a warpgroup for each 64 rows; a thread copies 16 bytes of every 32nd row"
