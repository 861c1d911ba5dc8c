"""Products of 16 bytes of a weight a lane with x, which lies in shared memory as the weight's type wants it.

For float32 and 16-bit weights x is float32 in the order in which lanes take it, four numbers at a time: number 4q + i
of lane l's sixteen bytes at 132 q + 4 l + i. 132, not 128, so that writing it meets no bank twice either.

For int8 and 4-bit weights x is in fixed point: integers of 24 bits, as three planes of bytes, with a scale for the
numbers that meet a lane's 16 bytes. That is as precise as float32, and `dp4a` does four products at once.

A lane's 16 bytes of q6_k are the lower four bits of 32 neighbours, and a stage of a row is one such chunk with all that
belongs to it. It counts as two chunks of half as many numbers: those of the lanes' first 16, and those of the others.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..intrinsics import (
    bits_of_f32,
    copy4,
    copy8,
    copy16,
    counts_from,
    dot16,
    dp4a,
    dp4a_su,
    dp4a_us,
    dp4a_uu,
    f32_of_bits,
    floats4,
    has_scales,
    is_packed,
    is_q4_k,
    is_q6_k,
    keep_loop,
    nearest,
    per_16_bytes,
    planes,
    scale_in,
    shared_address,
    shared_word,
    shared_words2,
    shared_words4,
    store4,
)
from .common import ALL, device, warp_sum
from .dequant import FOUR_FACTORS, SIX_FACTORS, SIX_SCALES, factors_of, factors_q6_k
from .params import CHUNK_BYTES, SCALE_BYTES, SCALES_AT
from .params import GEMV_THREADS as THREADS
from .params import GEMV_WARPS as WARPS
from .params import Q6_K_FACTORS_AT as SIX_FACTORS_AT
from .params import Q6_K_HIGH_AT as SIX_AT
from .params import Q6_K_SCALES_AT as SIX_SCALES_AT
from .params import X_LANE_STRIDE as LANE_STEP


@device
def row_bytes(payload):
    """Bytes of one row of a stage of a warp's ring: two chunks, and for each a word a lane with its scale."""
    if is_q6_k(payload):
        return SIX_FACTORS_AT + SCALE_BYTES
    return 2 * (CHUNK_BYTES + SCALE_BYTES) if has_scales(payload) else 2 * CHUNK_BYTES


@device
def payload_step(payload):
    """Bytes of a row's payload that a stage has."""
    return CHUNK_BYTES if is_q6_k(payload) else 2 * CHUNK_BYTES


@device
def numbers_together(payload):
    """Neighbours among a row's numbers that are one lane's."""
    return 32 if is_q6_k(payload) else per_16_bytes(payload)


@device
def fetch_q6_k(slot, source, scales, count, lane):
    """Start copying what a lane needs of a stage of a row: 24 bytes of integers, and the words with scales."""
    inside = lane & 15
    own = 4 * (inside >> 1)
    copy16(slot, source, count)
    copy8(slot + SIX_AT - 8 * lane, scales + 8 * inside - own - SIX_SCALES, count >> 1)
    copy4(slot + SIX_SCALES_AT - 12 * lane, scales, count >> 2)
    copy4(slot + SIX_FACTORS_AT - 12 * lane, scales + (SIX_FACTORS - SIX_SCALES) + 4 * (inside >> 3) - own, count >> 2)


@device
def x_step(payload):
    """Float32 places that one chunk of x takes in shared memory."""
    return per_16_bytes(payload) * 24 + 64 if has_scales(payload) else per_16_bytes(payload) // 4 * LANE_STEP


@device
def multiply(slot, payload, scales, odd, shared, x_at, lane):
    """The lane's part of a row's sum over two chunks that have arrived; x_at is where the first one's x lies."""
    if is_packed(payload):
        total = multiply_packed(slot, payload, odd, shared, x_at, lane)
    elif has_scales(payload):
        at = slot + SCALES_AT - 12 * lane
        first = multiply_fixed(slot, payload, shared, x_at, lane) * scale_in(scales, shared_word(at), odd)
        second = multiply_fixed(slot + CHUNK_BYTES, payload, shared, x_at + x_step(payload), lane)
        total = first + second * scale_in(scales, shared_word(at + SCALE_BYTES), odd)
    else:
        here = x_at + lane * 4
        first = dot16(payload, shared_words4(slot), shared, here, LANE_STEP)
        total = first + dot16(payload, shared_words4(slot + CHUNK_BYTES), shared, here + x_step(payload), LANE_STEP)
    return total


@device
def multiply_packed(slot, payload, odd, shared, x_at, lane):
    """`multiply` for q4_1, q4_k and q6_k."""
    next_x = x_at + x_step(payload)
    if is_q6_k(payload):
        words, high = shared_words4(slot), shared_words2(slot + SIX_AT - 8 * lane)
        here, factor = shared_word(slot + SIX_SCALES_AT - 12 * lane), shared_word(slot + SIX_FACTORS_AT - 12 * lane)
        scale, scale_too = factors_q6_k(here, odd, factor)
        total = scale * multiply_six(lower(words), high[0], shared, x_at, lane)
        total += scale_too * multiply_six(upper(words), high[1], shared, next_x, lane)
    else:
        # factors are made when they are wanted, and words loaded again: there are no registers to spare
        at = slot + SCALES_AT - 12 * lane
        both_at = at
        if is_q4_k(payload):  # words of several lanes
            at = slot + SCALES_AT - 16 * lane + 4 * (lane >> 1)
            both_at = slot + SCALES_AT + FOUR_FACTORS - 16 * lane + 4 * (lane >> 3)
        product, whole = multiply_nibbles(slot, shared, x_at, lane)
        scale, least = factors_of(payload, shared_word(at), odd, shared_word(both_at))
        total = scale * product + least * whole
        product, whole = multiply_nibbles(slot + CHUNK_BYTES, shared, next_x, lane)
        there = shared_word(at + SCALE_BYTES)
        scale, least = factors_of(payload, there, odd, shared_word(both_at + SCALE_BYTES))
        total += scale * product + least * whole
    return total


@device
def lower(words):
    """The lower halves of 16 bytes."""
    mask = np.uint32(0x0F0F0F0F)
    return words[0] & mask, words[1] & mask, words[2] & mask, words[3] & mask


@device
def upper(words):
    """The upper halves of 16 bytes."""
    mask, four = np.uint32(0x0F0F0F0F), np.uint32(4)
    return (words[0] >> four) & mask, (words[1] >> four) & mask, (words[2] >> four) & mask, (words[3] >> four) & mask


@device
def in_float(low, middle, high):
    """A sum of products of integers with three planes of bytes."""
    return (np.float32(high) * np.float32(65536) + np.float32(middle) * np.float32(256)) + np.float32(low)


@device
def multiply_nibbles(slot, shared, x_at, lane):
    """Sums of a lane's 32 integers of 4 bits times its x, and of its x times `counts_from`."""
    words = shared_words4(slot)
    plane = shared_address(shared, x_at) + lane * 16
    zero = np.int32(0)
    # byte j holds number j in its low half and j + 16 in its high one
    a, b = lower(words), upper(words)
    low = dot4_unsigned(b, shared_words4(plane + 512), dot4_unsigned(a, shared_words4(plane), zero))
    middle = dot4_unsigned(b, shared_words4(plane + 1536), dot4_unsigned(a, shared_words4(plane + 1024), zero))
    high = dot4_unsigned_signed(
        b, shared_words4(plane + 2560), dot4_unsigned_signed(a, shared_words4(plane + 2048), zero)
    )
    return in_float(low, middle, high) * shared[x_at + 768 + lane], shared[x_at + 800 + lane]


@device
def multiply_six(nibbles, high, shared, x_at, lane):
    """The sum of a lane's 16 integers of 6 bits, which count from -32, times its x."""
    plane, mask, zero = shared_address(shared, x_at) + lane * 16, np.uint32(0x30303030), np.int32(0)
    w = (
        nibbles[0] | ((high << np.uint32(4)) & mask), nibbles[1] | ((high << np.uint32(2)) & mask),
        nibbles[2] | (high & mask), nibbles[3] | ((high >> np.uint32(2)) & mask),
    )  # fmt: skip
    low = dot4_unsigned(w, shared_words4(plane), zero)
    middle = dot4_unsigned(w, shared_words4(plane + 512), zero)
    top = dot4_unsigned_signed(w, shared_words4(plane + 1024), zero)
    return in_float(low, middle, top) * shared[x_at + 384 + lane] - shared[x_at + 416 + lane]


@device
def dot4_signed(w, x, total):
    """Four times four signed weights with signed bytes of x."""
    return dp4a(w[0], x[0], dp4a(w[1], x[1], dp4a(w[2], x[2], dp4a(w[3], x[3], total))))


@device
def dot4_signed_unsigned(w, x, total):
    """Four times four signed weights with unsigned bytes of x."""
    return dp4a_su(w[0], x[0], dp4a_su(w[1], x[1], dp4a_su(w[2], x[2], dp4a_su(w[3], x[3], total))))


@device
def dot4_unsigned_signed(w, x, total):
    """Four times four unsigned weights with signed bytes of x."""
    return dp4a_us(w[0], x[0], dp4a_us(w[1], x[1], dp4a_us(w[2], x[2], dp4a_us(w[3], x[3], total))))


@device
def dot4_unsigned(w, x, total):
    """Four times four unsigned weights with unsigned bytes of x."""
    return dp4a_uu(w[0], x[0], dp4a_uu(w[1], x[1], dp4a_uu(w[2], x[2], dp4a_uu(w[3], x[3], total))))


@device
def multiply_fixed(slot, payload, shared, x_at, lane):
    """The lane's int8 or 4-bit weights of one chunk times its x in fixed point, without the weights' scale.

    x is three planes of bytes (`stage_fixed`), so the sums of products are integers, and exact.
    """
    zero = np.int32(0)
    if per_16_bytes(payload) == 16:
        words = shared_words4(slot)
        plane = shared_address(shared, x_at) + lane * 16
        low = dot4_signed_unsigned(words, shared_words4(plane), zero)
        middle = dot4_signed_unsigned(words, shared_words4(plane + 512), zero)
        high = dot4_signed(words, shared_words4(plane + 1024), zero)
        total = in_float(low, middle, high) * shared[x_at + 384 + lane]
    else:  # 8 stands for 0
        product, whole = multiply_nibbles(slot, shared, x_at, lane)
        total = product - whole
    return total


@device
def stage_x(x, start, norm, normed, columns, payload, shared, x_at, sums_at):
    """x into shared memory in lane order, times the norm's weight; each warp leaves its sum of squares at `sums_at`.

    Zeros fill the last pair of chunks.
    """
    numbers = per_16_bytes(payload)
    width = 64 * numbers
    padded = (columns + width - 1) & -width
    squares = np.float32(0)
    if columns & 3 == 0:
        for first in range(4 * cuda.threadIdx.x, padded, 16 * THREADS):
            keep_loop()
            # all loads are under way at once: the memory answers after half a microsecond
            limit = columns if normed else 0
            n0, n1 = floats4_or_0(norm, 0, first, limit), floats4_or_0(norm, 0, first + 4 * THREADS, limit)
            n2 = floats4_or_0(norm, 0, first + 8 * THREADS, limit)
            n3 = floats4_or_0(norm, 0, first + 12 * THREADS, limit)
            x0, x1 = floats4_or_0(x, start, first, columns), floats4_or_0(x, start, first + 4 * THREADS, columns)
            x2 = floats4_or_0(x, start, first + 8 * THREADS, columns)
            x3 = floats4_or_0(x, start, first + 12 * THREADS, columns)
            if normed:
                squares += squared(x0) + squared(x1) + squared(x2) + squared(x3)
                x0, x1, x2, x3 = times4(x0, n0), times4(x1, n1), times4(x2, n2), times4(x3, n3)
            put4(shared, x_at, first, padded, numbers, payload, x0)
            put4(shared, x_at, first + 4 * THREADS, padded, numbers, payload, x1)
            put4(shared, x_at, first + 8 * THREADS, padded, numbers, payload, x2)
            put4(shared, x_at, first + 12 * THREADS, padded, numbers, payload, x3)
    else:
        for first in range(4 * cuda.threadIdx.x, padded, 4 * THREADS):
            keep_loop()
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
            put4(shared, x_at, first, padded, numbers, payload, v)
    if normed:
        squares = warp_sum(squares)
        if cuda.threadIdx.x & 31 == 0:
            shared[sums_at + (cuda.threadIdx.x >> 5)] = squares


@device
def lane_order(k, numbers):
    """Where number k of x lies in shared memory; `numbers` is a power of two."""
    log2 = 2 if numbers == 4 else (3 if numbers == 8 else (4 if numbers == 16 else 5))
    chunk, inside = k >> (5 + log2), k & (32 * numbers - 1)
    i = inside & (numbers - 1)
    return (chunk << (log2 - 2)) * LANE_STEP + (i >> 2) * LANE_STEP + (inside >> log2) * 4 + (i & 3)


@device
def floats4_or_0(x, start, k, columns):
    """x[start + k : … + 4], zeros beyond `columns`."""
    zero = np.float32(0)
    numbers = (zero, zero, zero, zero)
    if k < columns:
        numbers = floats4(x, start + k)
    return numbers


@device
def one_or_0(x, start, k, columns):
    """x[start + k], 0 beyond `columns`."""
    return x[start + k] if k < columns else np.float32(0)


@device
def squared(v):
    """The sum of the squares of four numbers."""
    return (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3])


@device
def times4(v, w):
    """Four products."""
    return v[0] * w[0], v[1] * w[1], v[2] * w[2], v[3] * w[3]


@device
def put4(shared, x_at, k, padded, numbers, payload, v):
    """Four numbers from k on into their place."""
    if k < padded:
        if has_scales(payload):
            put_fixed(shared, x_at, k, numbers, payload, v)
        else:
            store4(shared, x_at + lane_order(k, numbers), v[0], v[1], v[2], v[3])


MOST = np.float32(8388600)
"""The largest fixed-point number: 24 bits with their sign hold it, whatever rounding does."""


@device
def magnitude(x):
    """|x| as an integer that is the larger the larger |x| is, and largest for a NaN."""
    return np.int32(bits_of_f32(x) & np.uint32(0x7FFFFFFF))


@device
def put_fixed(shared, x_at, k, numbers, payload, v):
    """Four numbers from k on, as integers of 24 bits, in three planes of bytes. All lanes of a warp come here at once.

    The numbers that meet a lane's 16 bytes share a scale: the largest becomes 2^23, so each is off by 2^-24 of that at
    most, what float32 rounding costs; but sums of their products with weights are exact, and four weights take three
    instructions (`dp4a`) instead of twelve.
    """
    most = max(max(magnitude(v[0]), magnitude(v[1])), max(magnitude(v[2]), magnitude(v[3])))
    most = max(most, cuda.shfl_xor_sync(ALL, most, 1))
    most = max(most, cuda.shfl_xor_sync(ALL, most, 2))
    if numbers == 32:
        most = max(most, cuda.shfl_xor_sync(ALL, most, 4))
    largest = f32_of_bits(np.uint32(most))
    inverse = MOST / largest if largest > np.float32(1e-30) else np.float32(0)
    a, b, c, d = nearest(v[0] * inverse), nearest(v[1] * inverse), nearest(v[2] * inverse), nearest(v[3] * inverse)
    low, middle, high = planes(a, b, c, d)
    chunk, inside = k // (32 * numbers), k & (32 * numbers - 1)
    lane, word = inside // numbers, (inside & (numbers - 1)) >> 2
    if is_q6_k(payload):
        chunk, lane = 2 * (k >> 10) + ((k >> 4) & 1), (k & 1023) >> 5
    base = x_at + chunk * x_step(payload)
    at = base + ((word >> 2) * 32 + lane) * 4 + (word & 3)
    plane = numbers * 8
    shared[at], shared[at + plane], shared[at + 2 * plane] = f32_of_bits(low), f32_of_bits(middle), f32_of_bits(high)
    scale = largest / MOST
    if numbers == 32 or is_packed(payload):
        total = np.int32(a + b + c + d)
        total += cuda.shfl_xor_sync(ALL, total, 1)
        total += cuda.shfl_xor_sync(ALL, total, 2)
        if numbers == 32:
            total += cuda.shfl_xor_sync(ALL, total, 4)
        if word == 0:
            shared[base + 3 * plane + 32 + lane] = counts_from(payload) * (np.float32(total) * scale)
    if word == 0:
        shared[base + 3 * plane + lane] = scale


@device
def norm_factor(shared, sums_at, normed, columns, eps):
    """1 / sqrt(mean(x²) + eps), from what `stage_x` left (Zhang and Sennrich, RMSNorm, 2019); 1 without a norm."""
    factor = np.float32(1)
    if normed:
        squares = np.float32(0)
        for i in range(WARPS):
            squares += shared[sums_at + i]
        factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(columns) + eps))
    return factor
