"""Dot products: each lane multiplies 16 bytes of a weight row with x, which is staged in shared memory in a layout that
depends on the weight's type.

A chunk of a row is 16 bytes for each of a warp's 32 lanes. Layouts of a chunk of x in shared memory:

- float32 and 16-bit weights: float32, four elements at a time in the order in which lanes read them. Element 4q + i of
  lane l's 16 bytes is at 132 q + 4 l + i. The step is 132 instead of 128 to avoid bank conflicts when x is written.
- int8 and 4-bit weights: 24-bit fixed point, as three planes of bytes (low, middle, high), then one scale for the
  elements that one lane multiplies. That is as precise as float32, and `dp4a` multiplies four elements at once.
- q6_k: a lane's 16 bytes are the lower four bits of 32 neighbours. A stage of a row is one such chunk with its upper
  bits and scales. It counts as two chunks of half as many elements: the lanes' first 16 elements, and their last 16.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..intrinsics import (
    cp_async_4,
    cp_async_8,
    cp_async_16,
    cvt_rni_s32,
    dp4a,
    dp4a_su,
    dp4a_us,
    dp4a_uu,
    ld_shared_u32,
    ld_shared_v2_u32,
    ld_shared_v4_u32,
    ld_v4_f32,
    no_unroll,
    prmt_byte_planes,
    shared_address,
    st_v4_f32,
    uint_as_float,
)
from ..quant_traits import (
    dot_16_bytes,
    has_mins,
    has_scales,
    is_packed,
    is_q5_k,
    is_q6_k,
    per_16_bytes,
    scale_in,
    zero_point,
)
from .common import FULL_MASK, device, magnitude_bits
from .dequant import FIVE_HIGH, FIVE_RECORD, FOUR_FACTORS, SIX_FACTORS, SIX_SCALES, factors_of, factors_q6_k
from .params import (
    CHUNK_BYTES,
    Q6_K_FACTORS_AT,
    Q6_K_HIGH_AT,
    Q6_K_SCALES_AT,
    SCALE_BYTES,
    SCALES_AT,
    X_LANE_STRIDE,
)
from .params import GEMV_THREADS as THREADS
from .params import GEMV_WARPS as WARPS
from .reduce import warp_sum


@device
def row_bytes(payload):
    """Bytes that one row takes in a stage of a warp's ring: two chunks, and for each a word per lane with its scale, or
    a record of q5_k.
    """
    if is_q5_k(payload):
        return 2 * (CHUNK_BYTES + FIVE_RECORD)
    if is_q6_k(payload):
        return Q6_K_FACTORS_AT + SCALE_BYTES
    return 2 * (CHUNK_BYTES + SCALE_BYTES) if has_scales(payload) else 2 * CHUNK_BYTES


@device
def payload_step(payload):
    """Bytes of a row's payload in one stage."""
    return CHUNK_BYTES if is_q6_k(payload) else 2 * CHUNK_BYTES


@device
def elements_together(payload):
    """Number of neighbouring elements of a row that one lane reads."""
    return 32 if is_q6_k(payload) else per_16_bytes(payload)


@device
def fetch_q6_k(slot, source, scales, count, lane):
    """Start copying a lane's part of a stage of a q6_k row: 24 bytes of integers, and the words with its scales."""
    inside = lane & 15
    word_offset = 4 * (inside >> 1)
    cp_async_16(slot, source, count)
    cp_async_8(slot + Q6_K_HIGH_AT - 8 * lane, scales + 8 * inside - word_offset - SIX_SCALES, count >> 1)
    cp_async_4(slot + Q6_K_SCALES_AT - 12 * lane, scales, count >> 2)
    cp_async_4(
        slot + Q6_K_FACTORS_AT - 12 * lane,
        scales + (SIX_FACTORS - SIX_SCALES) + 4 * (inside >> 3) - word_offset,
        count >> 2,
    )


@device
def x_step(payload):
    """float32 elements that one chunk of x takes in shared memory."""
    return per_16_bytes(payload) * 24 + 64 if has_scales(payload) else per_16_bytes(payload) // 4 * X_LANE_STRIDE


@device
def multiply(slot, payload, scales, odd, shared, x_at, lane):
    """This lane's part of a row's sum over two chunks that have arrived. `x_at` is the index of the first chunk's x."""
    if is_packed(payload):
        total = multiply_packed(slot, payload, odd, shared, x_at, lane)
    elif has_scales(payload):
        at = slot + SCALES_AT - 12 * lane
        first = multiply_fixed(slot, payload, shared, x_at, lane) * scale_in(scales, ld_shared_u32(at), odd)
        second = multiply_fixed(slot + CHUNK_BYTES, payload, shared, x_at + x_step(payload), lane)
        total = first + second * scale_in(scales, ld_shared_u32(at + SCALE_BYTES), odd)
    else:
        lane_x = x_at + lane * 4
        first = dot_16_bytes(payload, ld_shared_v4_u32(slot), shared, lane_x, X_LANE_STRIDE)
        total = first + dot_16_bytes(
            payload, ld_shared_v4_u32(slot + CHUNK_BYTES), shared, lane_x + x_step(payload), X_LANE_STRIDE
        )
    return total


@device
def multiply_packed(slot, payload, odd, shared, x_at, lane):
    """`multiply` for q4_1, q4_k, q5_k and q6_k."""
    next_x = x_at + x_step(payload)
    if is_q6_k(payload):
        words, high = ld_shared_v4_u32(slot), ld_shared_v2_u32(slot + Q6_K_HIGH_AT - 8 * lane)
        scales, factor = (
            ld_shared_u32(slot + Q6_K_SCALES_AT - 12 * lane),
            ld_shared_u32(slot + Q6_K_FACTORS_AT - 12 * lane),
        )
        scale, scale2 = factors_q6_k(scales, odd, factor)
        total = scale * multiply_six(lower(words), high[0], shared, x_at, lane)
        total += scale2 * multiply_six(upper(words), high[1], shared, next_x, lane)
    else:
        # factors are computed where they are used, and words loaded again, to save registers
        at = slot + SCALES_AT - 12 * lane
        d_dmin_at, high_at, step = at, at, FIVE_RECORD if is_q5_k(payload) else SCALE_BYTES
        if has_mins(payload):  # a word serves several lanes
            high_at = slot + SCALES_AT + FIVE_HIGH - 12 * lane
            at = slot + SCALES_AT - 16 * lane + 4 * (lane >> 1)
            d_dmin_at = slot + SCALES_AT + FOUR_FACTORS - 16 * lane + 4 * (lane >> 3)
        product, x_sum = multiply_nibbles(slot, payload, high_at, shared, x_at, lane)
        scale, block_min = factors_of(payload, ld_shared_u32(at), odd, ld_shared_u32(d_dmin_at))
        total = scale * product + block_min * x_sum
        product, x_sum = multiply_nibbles(slot + CHUNK_BYTES, payload, high_at + step, shared, next_x, lane)
        there = ld_shared_u32(at + step)
        scale, block_min = factors_of(payload, there, odd, ld_shared_u32(d_dmin_at + step))
        total += scale * product + block_min * x_sum
    return total


@device
def lower(words):
    """Low nibbles of 16 bytes."""
    mask = np.uint32(0x0F0F0F0F)
    return words[0] & mask, words[1] & mask, words[2] & mask, words[3] & mask


@device
def upper(words):
    """High nibbles of 16 bytes."""
    mask, four = np.uint32(0x0F0F0F0F), np.uint32(4)
    return (words[0] >> four) & mask, (words[1] >> four) & mask, (words[2] >> four) & mask, (words[3] >> four) & mask


@device
def join_planes(low, middle, high):
    """float32 from the three sums of products with the low, middle and high bytes of x."""
    return (np.float32(high) * np.float32(65536) + np.float32(middle) * np.float32(256)) + np.float32(low)


@device
def multiply_nibbles(slot, payload, high_at, shared, x_at, lane):
    """(sum of a lane's 32 unsigned quants of 4 bits times its x, sum of its x times `zero_point`). The shared word at
    `high_at` has a fifth bit of each of q5_k's.
    """
    words = ld_shared_v4_u32(slot)
    plane = shared_address(shared, x_at) + lane * 16
    zero = np.int32(0)
    # byte j holds element j in its low nibble and element j + 16 in its high nibble
    a, b = lower(words), upper(words)
    if is_q5_k(payload):
        high, bit = ld_shared_u32(high_at), np.uint32(0x10101010)
        a = (
            a[0] | ((high << np.uint32(4)) & bit), a[1] | ((high << np.uint32(3)) & bit),
            a[2] | ((high << np.uint32(2)) & bit), a[3] | ((high << np.uint32(1)) & bit),
        )  # fmt: skip
        b = (
            b[0] | (high & bit), b[1] | ((high >> np.uint32(1)) & bit),
            b[2] | ((high >> np.uint32(2)) & bit), b[3] | ((high >> np.uint32(3)) & bit),
        )  # fmt: skip
    low = dot4_unsigned(b, ld_shared_v4_u32(plane + 512), dot4_unsigned(a, ld_shared_v4_u32(plane), zero))
    middle = dot4_unsigned(b, ld_shared_v4_u32(plane + 1536), dot4_unsigned(a, ld_shared_v4_u32(plane + 1024), zero))
    high = dot4_unsigned_signed(
        b, ld_shared_v4_u32(plane + 2560), dot4_unsigned_signed(a, ld_shared_v4_u32(plane + 2048), zero)
    )
    return join_planes(low, middle, high) * shared[x_at + 768 + lane], shared[x_at + 800 + lane]


@device
def multiply_six(nibbles, high, shared, x_at, lane):
    """Dot product of a lane's x and its 16 quants of 6 bits, minus their zero point 32."""
    plane, mask, zero = shared_address(shared, x_at) + lane * 16, np.uint32(0x30303030), np.int32(0)
    w = (
        nibbles[0] | ((high << np.uint32(4)) & mask), nibbles[1] | ((high << np.uint32(2)) & mask),
        nibbles[2] | (high & mask), nibbles[3] | ((high >> np.uint32(2)) & mask),
    )  # fmt: skip
    low = dot4_unsigned(w, ld_shared_v4_u32(plane), zero)
    middle = dot4_unsigned(w, ld_shared_v4_u32(plane + 512), zero)
    top = dot4_unsigned_signed(w, ld_shared_v4_u32(plane + 1024), zero)
    return join_planes(low, middle, top) * shared[x_at + 384 + lane] - shared[x_at + 416 + lane]


@device
def dot4_signed(w, x, total):
    """total + the dot product of 16 signed weights with 16 signed bytes of x."""
    return dp4a(w[0], x[0], dp4a(w[1], x[1], dp4a(w[2], x[2], dp4a(w[3], x[3], total))))


@device
def dot4_signed_unsigned(w, x, total):
    """total + the dot product of 16 signed weights with 16 unsigned bytes of x."""
    return dp4a_su(w[0], x[0], dp4a_su(w[1], x[1], dp4a_su(w[2], x[2], dp4a_su(w[3], x[3], total))))


@device
def dot4_unsigned_signed(w, x, total):
    """total + the dot product of 16 unsigned weights with 16 signed bytes of x."""
    return dp4a_us(w[0], x[0], dp4a_us(w[1], x[1], dp4a_us(w[2], x[2], dp4a_us(w[3], x[3], total))))


@device
def dot4_unsigned(w, x, total):
    """total + the dot product of 16 unsigned weights with 16 unsigned bytes of x."""
    return dp4a_uu(w[0], x[0], dp4a_uu(w[1], x[1], dp4a_uu(w[2], x[2], dp4a_uu(w[3], x[3], total))))


@device
def multiply_fixed(slot, payload, shared, x_at, lane):
    """The lane's int8 or q4_0 weights of one chunk times its x in fixed point, without the weights' scale.

    x is three planes of bytes (`put_fixed`), so the sums of products are integers, and exact.
    """
    zero = np.int32(0)
    if per_16_bytes(payload) == 16:
        words = ld_shared_v4_u32(slot)
        plane = shared_address(shared, x_at) + lane * 16
        low = dot4_signed_unsigned(words, ld_shared_v4_u32(plane), zero)
        middle = dot4_signed_unsigned(words, ld_shared_v4_u32(plane + 512), zero)
        high = dot4_signed(words, ld_shared_v4_u32(plane + 1024), zero)
        total = join_planes(low, middle, high) * shared[x_at + 384 + lane]
    else:  # the zero point is 8
        product, x_sum = multiply_nibbles(slot, payload, slot, shared, x_at, lane)
        total = product - x_sum
    return total


@device
def stage_x(x, start, norm, normed, columns, payload, shared, x_at, sums_at):
    """Stage x in shared memory; the last pair of chunks is padded with zeros.

    If `normed`, x is multiplied by the norm's weight, and each warp writes its sum of squares to `sums_at`.
    """
    elements = per_16_bytes(payload)
    width = 64 * elements
    padded = (columns + width - 1) & -width
    squares = np.float32(0)
    if columns & 3 == 0:
        for first in range(4 * cuda.threadIdx.x, padded, 16 * THREADS):
            no_unroll()
            # all loads are in flight at once, as each takes half a microsecond
            limit = columns if normed else 0
            n0, n1 = ld_v4_f32_or_0(norm, 0, first, limit), ld_v4_f32_or_0(norm, 0, first + 4 * THREADS, limit)
            n2 = ld_v4_f32_or_0(norm, 0, first + 8 * THREADS, limit)
            n3 = ld_v4_f32_or_0(norm, 0, first + 12 * THREADS, limit)
            x0, x1 = ld_v4_f32_or_0(x, start, first, columns), ld_v4_f32_or_0(x, start, first + 4 * THREADS, columns)
            x2 = ld_v4_f32_or_0(x, start, first + 8 * THREADS, columns)
            x3 = ld_v4_f32_or_0(x, start, first + 12 * THREADS, columns)
            if normed:
                squares += squared(x0) + squared(x1) + squared(x2) + squared(x3)
                x0, x1, x2, x3 = times4(x0, n0), times4(x1, n1), times4(x2, n2), times4(x3, n3)
            put4(shared, x_at, first, padded, elements, payload, x0)
            put4(shared, x_at, first + 4 * THREADS, padded, elements, payload, x1)
            put4(shared, x_at, first + 8 * THREADS, padded, elements, payload, x2)
            put4(shared, x_at, first + 12 * THREADS, padded, elements, payload, x3)
    else:
        for first in range(4 * cuda.threadIdx.x, padded, 4 * THREADS):
            no_unroll()
            v = (
                one_or_0(x, start, first, columns),
                one_or_0(x, start, first + 1, columns),
                one_or_0(x, start, first + 2, columns),
                one_or_0(x, start, first + 3, columns),
            )
            if normed:
                squares += squared(v)
                n = (
                    one_or_0(norm, 0, first, columns),
                    one_or_0(norm, 0, first + 1, columns),
                    one_or_0(norm, 0, first + 2, columns),
                    one_or_0(norm, 0, first + 3, columns),
                )
                v = times4(v, n)
            put4(shared, x_at, first, padded, elements, payload, v)
    if normed:
        squares = warp_sum(squares)
        if cuda.threadIdx.x & 31 == 0:
            shared[sums_at + (cuda.threadIdx.x >> 5)] = squares


@device
def lane_order(k, elements):
    """Index of element k of x in shared memory; a lane's 16 bytes hold `elements` elements, a power of two."""
    log2 = 2 if elements == 4 else (3 if elements == 8 else (4 if elements == 16 else 5))
    chunk, inside = k >> (5 + log2), k & (32 * elements - 1)
    i = inside & (elements - 1)
    return (chunk << (log2 - 2)) * X_LANE_STRIDE + (i >> 2) * X_LANE_STRIDE + (inside >> log2) * 4 + (i & 3)


@device
def ld_v4_f32_or_0(x, start, k, columns):
    """x[start + k : start + k + 4], zeros from `columns` on."""
    zero = np.float32(0)
    elements = (zero, zero, zero, zero)
    if k < columns:
        elements = ld_v4_f32(x, start + k)
    return elements


@device
def one_or_0(x, start, k, columns):
    """x[start + k], 0 from `columns` on."""
    return x[start + k] if k < columns else np.float32(0)


@device
def squared(v):
    """Sum of the squares of four elements."""
    return (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3])


@device
def times4(v, w):
    """Element-wise product of four elements."""
    return v[0] * w[0], v[1] * w[1], v[2] * w[2], v[3] * w[3]


@device
def put4(shared, x_at, k, padded, elements, payload, v):
    """Stage elements k to k + 3 of x."""
    if k < padded:
        if has_scales(payload):
            put_fixed(shared, x_at, k, elements, payload, v)
        else:
            st_v4_f32(shared, x_at + lane_order(k, elements), v[0], v[1], v[2], v[3])


MOST = np.float32(8388600)
"""The largest fixed-point integer. It fits 24 signed bits however it is rounded."""
LEAST_BITS = np.float32(1e-31).view(np.int32)
"""Bits of the least magnitude that `MOST` stands for: the scale of a lesser one would be subnormal, and rounded."""


@device
def put_fixed(shared, x_at, k, elements, payload, v):
    """Stage elements k to k + 3 as 24-bit integers in three planes of bytes. All lanes of a warp must call it.

    The elements that one lane multiplies share a scale, which maps the largest to 2^23. So the error of an element is
    at most 2^-24 of the largest, as with float32 rounding, or of 1e-31. But sums of products are exact, and four
    weights take three instructions (`dp4a`) instead of twelve. After the planes come the lanes' scales, then their sums
    of x times the weight's zero point.
    """
    largest_bits = max(max(magnitude_bits(v[0]), magnitude_bits(v[1])), max(magnitude_bits(v[2]), magnitude_bits(v[3])))
    largest_bits = max(largest_bits, cuda.shfl_xor_sync(FULL_MASK, largest_bits, 1))
    largest_bits = max(largest_bits, cuda.shfl_xor_sync(FULL_MASK, largest_bits, 2))
    if elements == 32:
        largest_bits = max(largest_bits, cuda.shfl_xor_sync(FULL_MASK, largest_bits, 4))
    largest = uint_as_float(np.uint32(max(largest_bits, LEAST_BITS)))
    inverse = MOST / largest
    a, b, c, d = (
        cvt_rni_s32(v[0] * inverse),
        cvt_rni_s32(v[1] * inverse),
        cvt_rni_s32(v[2] * inverse),
        cvt_rni_s32(v[3] * inverse),
    )
    low, middle, high = prmt_byte_planes(a, b, c, d)
    chunk, inside = k // (32 * elements), k & (32 * elements - 1)
    lane, word = inside // elements, (inside & (elements - 1)) >> 2
    if is_q6_k(payload):
        chunk, lane = 2 * (k >> 10) + ((k >> 4) & 1), (k & 1023) >> 5
    base = x_at + chunk * x_step(payload)
    at = base + ((word >> 2) * 32 + lane) * 4 + (word & 3)
    plane = elements * 8
    shared[at], shared[at + plane], shared[at + 2 * plane] = (
        uint_as_float(low),
        uint_as_float(middle),
        uint_as_float(high),
    )
    scale = largest / MOST
    if elements == 32 or is_packed(payload):
        total = np.int32(a + b + c + d)
        total += cuda.shfl_xor_sync(FULL_MASK, total, 1)
        total += cuda.shfl_xor_sync(FULL_MASK, total, 2)
        if elements == 32:
            total += cuda.shfl_xor_sync(FULL_MASK, total, 4)
        if word == 0:
            shared[base + 3 * plane + 32 + lane] = zero_point(payload) * (np.float32(total) * scale)
    if word == 0:
        shared[base + 3 * plane + lane] = scale


@device
def norm_factor(shared, sums_at, normed, columns, eps):
    """1 / sqrt(mean(x²) + eps), from the sums that `stage_x` left (Zhang and Sennrich, 2019); 1 without a norm."""
    factor = np.float32(1)
    if normed:
        squares = np.float32(0)
        for i in range(WARPS):
            squares += shared[sums_at + i]
        factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(columns) + eps))
    return factor
