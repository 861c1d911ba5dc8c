"""Dot products: each lane multiplies 16 bytes of a weight row with x, which is staged in shared memory in a layout that
depends on the weight's type (`gemv_x`).

A chunk of a row is 16 bytes for each of a warp's 32 lanes. Layouts of a chunk of x in shared memory:

- float32 and 16-bit weights: float32, four elements at a time in the order in which lanes read them. Element 4q + i of
  lane l's 16 bytes is at 132 q + 4 l + i. The step is 132 instead of 128 to avoid bank conflicts when x is written.
- int8 and 4-bit weights: 24-bit fixed point, as three planes of bytes (low, middle, high), then one scale for the
  elements that one lane multiplies. That is nearly as precise as float32, and `dp4a` multiplies four elements at once.
- q6_k: a lane's 16 bytes are the lower four bits of 32 neighbours. A stage of a row is one such chunk with its upper
  bits and scales. It counts as two chunks of half as many elements: the lanes' first 16 elements, and their last 16.
"""

from __future__ import annotations

import numpy as np

from ..arithmetic import dp4a, dp4a_su, dp4a_us, dp4a_uu, s32, uint_as_float
from ..intrinsics import cp_async_4, cp_async_8, cp_async_16, ld_shared_u32, ld_shared_v2_u32, ld_shared_v4_u32
from ..quant_traits import (
    dot_16_bytes,
    has_mins,
    has_scales,
    is_packed,
    is_q5_k,
    is_q6_k,
    per_16_bytes,
    scale_in,
)
from .common import device
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
def fetch_q6_k(slot, source, scales, left, lane):
    """Start copying a lane's part of a stage of a q6_k row: 24 bytes of integers, and the words with its scales. Zeros
    if `left` is not positive.
    """
    inside = lane & 15
    word_offset = 4 * (inside >> 1)
    cp_async_16(slot, source, left)
    cp_async_8(slot + Q6_K_HIGH_AT - 8 * lane, scales + 8 * inside - word_offset - SIX_SCALES, left)
    cp_async_4(slot + Q6_K_SCALES_AT - 12 * lane, scales, left)
    cp_async_4(
        slot + Q6_K_FACTORS_AT - 12 * lane, scales + (SIX_FACTORS - SIX_SCALES) + 4 * (inside >> 3) - word_offset, left
    )


@device
def columns_of_stage(payload):
    """Columns of a row in one stage."""
    return 64 * per_16_bytes(payload)


@device
def x_step(payload):
    """float32 elements that one chunk of x takes in shared memory."""
    return per_16_bytes(payload) * 24 + 64 if has_scales(payload) else per_16_bytes(payload) // 4 * X_LANE_STRIDE


@device
def multiply(slot, payload, scales, odd, x, lane, high_nibbles):
    """This lane's part of a row's sum over two chunks that have arrived. `x` is the shared address of the first one's
    x, `slot` that of this lane's 16 bytes.
    """
    next_x = s32(x + 4 * x_step(payload))
    if is_packed(payload):
        total = multiply_packed(slot, payload, odd, x, next_x, lane)
    elif has_scales(payload):
        at = s32(slot + SCALES_AT - 12 * lane)
        first = multiply_fixed(slot, payload, x, lane, high_nibbles) * scale_in(scales, ld_shared_u32(at), odd)
        second = multiply_fixed(slot + CHUNK_BYTES, payload, next_x, lane, high_nibbles)
        total = first + second * scale_in(scales, ld_shared_u32(at + SCALE_BYTES), odd)
    else:
        lane_x = s32(x + lane * 16)
        first = dot_16_bytes(payload, ld_shared_v4_u32(slot), lane_x, 4 * X_LANE_STRIDE)
        second = dot_16_bytes(
            payload, ld_shared_v4_u32(slot + CHUNK_BYTES), s32(lane_x + 4 * x_step(payload)), 4 * X_LANE_STRIDE
        )
        total = first + second
    return total


@device
def multiply_packed(slot, payload, odd, x, next_x, lane):
    """`multiply` for q4_1, q4_k, q5_k and q6_k."""
    if is_q6_k(payload):
        words, high = ld_shared_v4_u32(slot), ld_shared_v2_u32(slot + Q6_K_HIGH_AT - 8 * lane)
        at = s32(slot - 12 * lane)
        scales, factor = ld_shared_u32(at + Q6_K_SCALES_AT), ld_shared_u32(at + Q6_K_FACTORS_AT)
        scale, scale2 = factors_q6_k(scales, odd, factor)
        total = scale * multiply_six(lower(words), high[0], x, lane)
        total += scale2 * multiply_six(upper(words), high[1], next_x, lane)
    else:
        # factors are computed where they are used, and words loaded again, to save registers
        at = s32(slot + SCALES_AT - 12 * lane)
        d_dmin_at, high_at, step = at, at, FIVE_RECORD if is_q5_k(payload) else SCALE_BYTES
        if has_mins(payload):  # a word serves several lanes
            high_at = s32(slot + SCALES_AT + FIVE_HIGH - 12 * lane)
            at = s32(slot + SCALES_AT - 16 * lane + 4 * (lane >> 1))
            d_dmin_at = s32(slot + SCALES_AT + FOUR_FACTORS - 16 * lane + 4 * (lane >> 3))
        product, x_sum = multiply_nibbles(slot, payload, high_at, x, lane)
        scale, block_min = factors_of(payload, ld_shared_u32(at), odd, ld_shared_u32(d_dmin_at))
        total = scale * product + block_min * x_sum
        product, x_sum = multiply_nibbles(slot + CHUNK_BYTES, payload, high_at + step, next_x, lane)
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
    """float32 from the three sums of products with the low, middle and high bytes of x. A sum with 24 bits of x would
    not fit an int32, one with 16 bits does.
    """
    return np.float32(high) * np.float32(65536) + np.float32(s32(low + (middle << 8)))


@device
def shared_float(at):
    """The float32 at a shared address."""
    return uint_as_float(ld_shared_u32(at))


@device
def multiply_nibbles(slot, payload, high_at, x, lane):
    """(sum of a lane's 32 unsigned quants of 4 bits times its x, sum of its x). The shared word at `high_at` has a
    fifth bit of each of q5_k's.
    """
    words = ld_shared_v4_u32(slot)
    plane = s32(x + lane * 16)
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
    factors = s32(plane + 3072 - 12 * lane)
    return join_planes(low, middle, high) * shared_float(factors), shared_float(factors + 128)


@device
def multiply_signed_nibbles(slot, x, lane, high_nibbles):
    """Sum of a lane's 32 quants of 4 bits, minus their zero point 8, times its x.

    With its upper bit flipped, a nibble minus 8 is a signed number, in a byte's upper half sixteen times as much.
    """
    words, flip, four = ld_shared_v4_u32(slot), np.uint32(0x80808080), np.uint32(4)
    plane, zero = s32(x + lane * 16), np.int32(0)
    a = (
        ((words[0] << four) & high_nibbles) ^ flip, ((words[1] << four) & high_nibbles) ^ flip,
        ((words[2] << four) & high_nibbles) ^ flip, ((words[3] << four) & high_nibbles) ^ flip,
    )  # fmt: skip
    b = (
        (words[0] & high_nibbles) ^ flip, (words[1] & high_nibbles) ^ flip, (words[2] & high_nibbles) ^ flip,
        (words[3] & high_nibbles) ^ flip,
    )  # fmt: skip
    low = dot4_signed_unsigned(b, ld_shared_v4_u32(plane + 512), dot4_signed_unsigned(a, ld_shared_v4_u32(plane), zero))
    middle = dot4_signed_unsigned(
        b, ld_shared_v4_u32(plane + 1536), dot4_signed_unsigned(a, ld_shared_v4_u32(plane + 1024), zero)
    )
    high = dot4_signed(b, ld_shared_v4_u32(plane + 2560), dot4_signed(a, ld_shared_v4_u32(plane + 2048), zero))
    return join_planes(low, middle, high) * shared_float(s32(plane + 3072 - 12 * lane))


@device
def multiply_six(nibbles, high, x, lane):
    """Dot product of a lane's x and its 16 quants of 6 bits, minus their zero point 32."""
    plane, mask, zero = s32(x + lane * 16), np.uint32(0x30303030), np.int32(0)
    w = (
        nibbles[0] | ((high << np.uint32(4)) & mask), nibbles[1] | ((high << np.uint32(2)) & mask),
        nibbles[2] | (high & mask), nibbles[3] | ((high >> np.uint32(2)) & mask),
    )  # fmt: skip
    low = dot4_unsigned(w, ld_shared_v4_u32(plane), zero)
    middle = dot4_unsigned(w, ld_shared_v4_u32(plane + 512), zero)
    top = dot4_unsigned_signed(w, ld_shared_v4_u32(plane + 1024), zero)
    factors = s32(plane + 1536 - 12 * lane)
    return join_planes(low, middle, top) * shared_float(factors) - shared_float(factors + 128)


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
def multiply_fixed(slot, payload, x, lane, high_nibbles):
    """The lane's int8 or q4_0 weights of one chunk times its x in fixed point, without the weights' scale.

    x is three planes of bytes (`put_fixed`), so the sums of products are integers, and exact.
    """
    zero = np.int32(0)
    if per_16_bytes(payload) == 16:
        words = ld_shared_v4_u32(slot)
        plane = s32(x + lane * 16)
        low = dot4_signed_unsigned(words, ld_shared_v4_u32(plane), zero)
        middle = dot4_signed_unsigned(words, ld_shared_v4_u32(plane + 512), zero)
        high = dot4_signed(words, ld_shared_v4_u32(plane + 1024), zero)
        total = join_planes(low, middle, high) * shared_float(s32(plane + 1536 - 12 * lane))
    else:
        total = multiply_signed_nibbles(slot, x, lane, high_nibbles)
    return total
