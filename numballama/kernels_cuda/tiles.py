"""Products of sixteen rows of weights with one vector, on tensor cores: what `chain` multiplies with.

A warp takes rows in units of eight pairs: a lane holds numbers of rows a and b of pair lane / 4, 16 bytes of each at a
time, which it copied into the warp's ring itself: number l mod 4 of the four pieces of 16 bytes that make 64 bytes of a
row. The tensor cores' tile of 16 rows takes these words as they are: its order of columns is any order, if only x comes
in the same.

A tile of x has eight columns where one vector has one, and 16-bit numbers or bytes where x is float32. So x comes in
three parts, a column each, which together are as precise: three bfloat16 (or float16, the second and third made larger
by 2^11 and 2^22), or the digits of a 24-bit integer. With int8 and 4-bit weights, whose scales change every 32 numbers,
three columns are for one block of 32 and three for the next: each is zero where the other's numbers stand.

float32 weights are multiplied one by one; a number of x serves two rows.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..lowlevel_cuda.instructions import (
    copy16,
    f32_of_bits,
    f32_of_half,
    has_scales,
    is_16_bit,
    is_float16,
    keep_loop,
    nearest,
    per_16_bytes,
    planes,
    scale_bytes,
    shared_address,
    shared_word,
    shared_words2,
    shared_words4,
    store4,
    unpack2,
)
from ..lowlevel_cuda.launch import Matrix
from ..lowlevel_cuda.tensor_cores import multiply_bytes, multiply_halves, pack2
from .pieces import ALL, device, warp_sum
from .products import THREADS, floats4_or_0, magnitude, squared, times4

PAIRS = 8
"""Pairs of rows of a unit."""
SPAN, TILE = 256, 4096
"""Bytes of a row in a stage of a warp's ring, and bytes of sixteen."""
KINDS = ("f32", "f16", "bf16", "int8", "q4_0")
NUMBERS = {"f32": 64, "f16": 128, "bf16": 128, "int8": 256, "q4_0": 512}
"""Of a row in a stage."""
LARGEST = np.float32(8355000)
"""Of a fixed-point number: its three digits, -128 to 127, hold it, whatever rounding does."""
SMALLER, LARGER = np.float32(2.0**-10), np.float32(2.0**11)
"""x is made so much smaller before it becomes float16, against overflow, and each next part so much larger."""
PLANE_GAP = 32
"""Bytes between planes of x, so that they begin in different banks; 64 for 16-bit numbers."""


@device
def numbers_of_stage(weight):
    """Numbers of a row in a stage."""
    return 16 * per_16_bytes(weight)


@device
def scales_of_stage(weight):
    """Bytes of a row's scales in a stage."""
    return 32 if per_16_bytes(weight) == 32 else 16


@device
def tile_bytes(weight):
    """Bytes of a stage: sixteen rows, and then their scales."""
    return TILE + 16 * scales_of_stage(weight) if has_scales(weight) else TILE


@device
def fetch_tile(slot, a, b, scales, left, scales_left, weight, lane):
    """Start copying a lane's share of a stage: pieces of its rows a and b, and 16 bytes of scales of one of them.

    `left` and `scales_left` are how many bytes the rows have from this stage on, and the row's scales from `scales` on.
    """
    on = 16 * (lane & 3)
    for j in range(4):
        count = 16 if left > 64 * j + on else 0
        copy16(slot + 1024 * j + 16 * lane, a + 64 * j, count)
        copy16(slot + 1024 * j + 512 + 16 * lane, b + 64 * j, count)
    if has_scales(weight):
        pair, part = lane >> 2, lane & 3
        count = 16 if scales_left > 0 else 0
        if per_16_bytes(weight) == 32:
            copy16(slot + TILE + 64 * pair + 16 * part, scales, count)
        elif part < 2:
            copy16(slot + TILE + 32 * pair + 16 * part, scales, count)


@device
def scales_row(weight, lane):
    """(0 or 1: whether a lane copies scales of its row a or b, from which byte of a stage's on)."""
    part = lane & 3
    if per_16_bytes(weight) == 32:
        return part >> 1, 16 * (part & 1)
    return part & 1, np.int64(0)


# x


@device
def plane_bytes(weight, padded):
    """Bytes from one part of x to the next."""
    return 2 * padded + 2 * PLANE_GAP if is_16_bit(weight) else padded + PLANE_GAP


@device
def zeros_at(weight, padded):
    """Float32 place, from x's first on, of 32 bytes of zeros, behind the planes of digits."""
    return 3 * (plane_bytes(weight, padded) >> 2)


def x_floats(payload: str, columns: int) -> int:
    """Float32 places that x takes in shared memory."""
    padded = -(-columns // NUMBERS[payload]) * NUMBERS[payload]
    if payload == "f32":
        return padded
    if payload in ("f16", "bf16"):
        return 3 * (2 * padded + 2 * PLANE_GAP) // 4
    return 3 * (padded + PLANE_GAP) // 4 + 8 + padded // 8


def unit_bytes(payload: str) -> int:
    """Bytes of a stage of a warp's ring, as `tile_bytes`."""
    return TILE + 16 * {"int8": 16, "q4_0": 32}.get(payload, 0)


def fits(weight: Matrix) -> bool:
    """Whether rows and scales lie so that 16 bytes at a time are whole, and a block of 32 has one scale."""
    payload, scales = weight.payload.dtype, weight.scales.dtype
    if payload not in KINDS or weight.shape[1] % 4:
        return False
    if not weight.quantized:
        return True
    width = weight.scale_stride * {"f16": 2, "f32": 4}[scales]
    return width % 16 == 0 and (scales, weight.shift) in (("f16", 5), ("f32", 6))


@device
def stage_vector(x, norm, normed, columns, padded, weight, shared, x_at, sums_at):
    """x into shared memory as `multiply_tile` wants it, times the norm's weight; zeros up to `padded`.

    Each warp leaves its sum of squares at `sums_at`. All loads are under way at once, as the memory answers after half
    a microsecond: of four quarters of x, with the norm's weights for them or with four quarters more.
    """
    squares = np.float32(0)
    also = 0 if normed else 16 * THREADS
    for first in range(4 * cuda.threadIdx.x, padded, 16 * THREADS + also):
        keep_loop()
        more = first + also
        n0, n1 = floats4_or_0(norm, 0, more, columns), floats4_or_0(norm, 0, more + 4 * THREADS, columns)
        n2 = floats4_or_0(norm, 0, more + 8 * THREADS, columns)
        n3 = floats4_or_0(norm, 0, more + 12 * THREADS, columns)
        x0, x1 = floats4_or_0(x, 0, first, columns), floats4_or_0(x, 0, first + 4 * THREADS, columns)
        x2 = floats4_or_0(x, 0, first + 8 * THREADS, columns)
        x3 = floats4_or_0(x, 0, first + 12 * THREADS, columns)
        if normed:
            squares += squared(x0) + squared(x1) + squared(x2) + squared(x3)
            x0, x1, x2, x3 = times4(x0, n0), times4(x1, n1), times4(x2, n2), times4(x3, n3)
        for k in range(first, first + also + 1, 16 * THREADS):
            keep_loop()
            for _ in range(4):  # a loop: it is long, and runs once
                keep_loop()
                if k < padded:
                    put_numbers(shared, x_at, k, padded, weight, x0)
                k += 4 * THREADS
                x0, x1, x2, x3 = x1, x2, x3, x0
            x0, x1, x2, x3 = n0, n1, n2, n3
    if normed:
        squares = warp_sum(squares)
        if cuda.threadIdx.x & 31 == 0:
            shared[sums_at + (cuda.threadIdx.x >> 5)] = squares


@device
def put_numbers(shared, x_at, k, padded, weight, v):
    """Four numbers from k on into their places."""
    if has_scales(weight):
        put_digits(shared, x_at, k, padded, weight, v)
    elif is_16_bit(weight):
        put_halves(shared, x_at, k, padded, weight, v)
    else:
        store4(shared, x_at + k, v[0], v[1], v[2], v[3])


@device
def put_halves(shared, x_at, k, padded, weight, v):
    """Four numbers as three 16-bit ones each, rounded, what that leaves rounded, and what that leaves."""
    larger = LARGER if is_float16(weight) else np.float32(1)
    smaller = SMALLER if is_float16(weight) else np.float32(1)
    a, b, c, d = v[0] * smaller, v[1] * smaller, v[2] * smaller, v[3] * smaller
    at, plane = x_at + (k >> 1), plane_bytes(weight, padded) >> 2
    for _ in range(3):
        low, high = pack2(weight, a, b), pack2(weight, c, d)
        shared[at], shared[at + 1] = f32_of_bits(low), f32_of_bits(high)
        at += plane
        of_low, of_high = unpack2(weight, low), unpack2(weight, high)
        a, b = (a - of_low[0]) * larger, (b - of_low[1]) * larger
        c, d = (c - of_high[0]) * larger, (d - of_high[1]) * larger


@device
def put_digits(shared, x_at, k, padded, weight, v):
    """Four numbers as integers of three digits -128 to 127. All lanes of a warp come here at once.

    A block of 32 shares a scale: its largest number becomes `LARGEST`. `multiply_tile` finds it with the digits' values
    and, for 4-bit weights, for which 8 stands for 0, with eight times the block's sum.
    """
    most = max(max(magnitude(v[0]), magnitude(v[1])), max(magnitude(v[2]), magnitude(v[3])))
    most = max(most, cuda.shfl_xor_sync(ALL, most, 1))
    most = max(most, cuda.shfl_xor_sync(ALL, most, 2))
    most = max(most, cuda.shfl_xor_sync(ALL, most, 4))
    largest = f32_of_bits(np.uint32(most))
    inverse = LARGEST / largest if largest > np.float32(1e-30) else np.float32(0)
    a, b, c, d = nearest(v[0] * inverse), nearest(v[1] * inverse), nearest(v[2] * inverse), nearest(v[3] * inverse)
    # a number more by 128 · 257 has for bytes its two lower digits more by 128
    low, middle, high = planes(a + 32896, b + 32896, c + 32896, d + 32896)
    flip = np.uint32(0x80808080)
    at, plane = x_at + (k >> 2), plane_bytes(weight, padded) >> 2
    shared[at] = f32_of_bits(high)
    shared[at + plane], shared[at + 2 * plane] = f32_of_bits(middle ^ flip), f32_of_bits(low ^ flip)
    scale = largest / LARGEST
    zeros, block = x_at + zeros_at(weight, padded), k >> 5
    table = zeros + 8 + 8 * (block >> 1)
    offset = np.float32(0)
    if per_16_bytes(weight) == 32:
        total = np.int32(a + b + c + d)
        total += cuda.shfl_xor_sync(ALL, total, 1)
        total += cuda.shfl_xor_sync(ALL, total, 2)
        total += cuda.shfl_xor_sync(ALL, total, 4)
        offset = np.float32(-8) * (np.float32(total) * scale)
    if k & 31 == 0:  # the lane with a block's first number: digits' values for columns 2t and 2t + 1 at 2t and 2t + 1
        odd = block & 1
        first = table + 3 * odd
        shared[first] = np.float32(65536) * scale
        shared[first + 1], shared[first + 2] = np.float32(256) * scale, scale
        shared[table + 6 + odd] = offset
        if block < 8:
            shared[zeros + block] = np.float32(0)


@device
def place_of_x(weight, shared, x_at, padded, lane):
    """Address of the first 16 bytes of x that a lane takes: of the part of x that its column of the tile has.

    With scales: of the part where its column is not zero.
    """
    first, column, piece = shared_address(shared, x_at), lane >> 2, lane & 3
    plane = plane_bytes(weight, padded)
    if has_scales(weight):
        part = column if column < 3 else column - 3
        return first + part * plane + piece * per_16_bytes(weight)
    if is_16_bit(weight):
        return first + min(column, 2) * plane + 16 * piece
    return first + 16 * piece


@device
def multiply_tile(slot, weight, scales, x_from, zeros, table, stage, sums, lane):
    """sums + the lane's part of a stage that has arrived times x."""
    if has_scales(weight):
        if per_16_bytes(weight) == 32:
            sums = multiply_nibbles(slot, x_from, zeros, table, stage, sums, lane)
        else:
            sums = multiply_integers(slot, scales, x_from, zeros, table, stage, sums, lane)
    else:
        at = x_from + stage * (SPAN if is_16_bit(weight) else 256)
        for j in range(4):
            a, b = shared_words4(slot + 1024 * j + 16 * lane), shared_words4(slot + 1024 * j + 512 + 16 * lane)
            x = shared_words4(at + 64 * j)
            if is_16_bit(weight):
                sums = multiply_halves(weight, sums, a[0], a[1], b[0], b[1], x[0], x[1])
                sums = multiply_halves(weight, sums, a[2], a[3], b[2], b[3], x[2], x[3])
            else:
                sums = dot_tile(sums, a, b, x)
    return sums


@device
def dot_tile(sums, a, b, x):
    """sums + a · x and b · x of four float32 each, in the first and the third."""
    first, third = sums[0], sums[2]
    for i in range(4):
        number = f32_of_bits(x[i])
        first += f32_of_bits(a[i]) * number
        third += f32_of_bits(b[i]) * number
    return first, sums[1], third, sums[3]


@device
def scaled(sums, found, factors, a_first, a_second, b_first, b_second):
    """sums + what a tile found, each number times its column's factor and its row's scale."""
    c0, c1 = np.float32(found[0]) * factors[0], np.float32(found[1]) * factors[1]
    c2, c3 = np.float32(found[2]) * factors[0], np.float32(found[3]) * factors[1]
    return sums[0] + (c0 * a_first + c1 * a_second), sums[1], sums[2] + (c2 * b_first + c3 * b_second), sums[3]


@device
def multiply_integers(slot, scales, x_from, zeros, table, stage, sums, lane):
    """int8: 64 numbers of each row at a time, of two blocks."""
    column, piece = lane >> 2, lane & 3
    wanted = column < 6 and (piece < 2) == (column < 3)
    first_shift, second_shift = 16 if piece == 2 else 0, 0 if piece == 0 else 16
    zero = np.int32(0)
    for j in range(4):
        a, b = shared_words4(slot + 1024 * j + 16 * lane), shared_words4(slot + 1024 * j + 512 + 16 * lane)
        x = shared_words4(x_from + stage * 256 + 64 * j if wanted else zeros)
        found = multiply_bytes((zero, zero, zero, zero), a[0], a[1], b[0], b[1], x[0], x[1])
        found = multiply_bytes(found, a[2], a[3], b[2], b[3], x[2], x[3])
        both = shared_words2(table + (stage * 4 + j) * 32 + 8 * piece)
        factors = f32_of_bits(both[0]), f32_of_bits(both[1])
        of_a, of_b = shared_word(slot + TILE + 32 * column + 4 * j), shared_word(slot + TILE + 32 * column + 16 + 4 * j)
        if scale_bytes(scales) == 4:
            scale_a, scale_b = f32_of_bits(of_a), f32_of_bits(of_b)
            sums = scaled(sums, found, factors, scale_a, scale_a, scale_b, scale_b)
        else:
            sums = scaled(
                sums, found, factors, f32_of_half(of_a >> first_shift), f32_of_half(of_a >> second_shift),
                f32_of_half(of_b >> first_shift), f32_of_half(of_b >> second_shift),
            )  # fmt: skip
    return sums


@device
def multiply_nibbles(slot, x_from, zeros, table, stage, sums, lane):
    """4 bits: 128 numbers of each row at a time, of four blocks, two and two."""
    column, piece = lane >> 2, lane & 3
    first_shift, second_shift = 16 if piece == 2 else 0, 0 if piece == 0 else 16
    zero, mask, four = np.int32(0), np.uint32(0x0F0F0F0F), np.uint32(4)
    for j in range(4):
        keep_loop()
        a, b = shared_words4(slot + 1024 * j + 16 * lane), shared_words4(slot + 1024 * j + 512 + 16 * lane)
        for pair in range(2):
            keep_loop()
            wanted = piece == 2 * pair + (0 if column < 3 else 1) and column < 6
            at = x_from + stage * 512 + 128 * j if wanted else zeros
            x, y = shared_words4(at), shared_words4(at + 16)
            found = multiply_bytes((zero, zero, zero, zero), a[0] & mask, a[1] & mask, b[0] & mask, b[1] & mask, x[0], x[1])
            found = multiply_bytes(found, a[2] & mask, a[3] & mask, b[2] & mask, b[3] & mask, x[2], x[3])
            found = multiply_bytes(
                found, (a[0] >> four) & mask, (a[1] >> four) & mask, (b[0] >> four) & mask, (b[1] >> four) & mask, y[0],
                y[1],
            )  # fmt: skip
            found = multiply_bytes(
                found, (a[2] >> four) & mask, (a[3] >> four) & mask, (b[2] >> four) & mask, (b[3] >> four) & mask, y[2],
                y[3],
            )  # fmt: skip
            if piece == 3:  # no column of these lanes is wanted: they take what 8 stands for
                one = np.int32(1)
                found = one, one, one, one
            both = shared_words2(table + (stage * 8 + 2 * j + pair) * 32 + 8 * piece)
            factors = f32_of_bits(both[0]), f32_of_bits(both[1])
            scale = slot + TILE + 64 * column + 8 * j + 4 * pair
            of_a, of_b = shared_word(scale), shared_word(scale + 32)
            sums = scaled(
                sums, found, factors, f32_of_half(of_a >> first_shift), f32_of_half(of_a >> second_shift),
                f32_of_half(of_b >> first_shift), f32_of_half(of_b >> second_shift),
            )  # fmt: skip
    return sums


@device
def join_tile(sums, weight, lane):
    """The sum over x of rows a (in even lanes) and b (in odd ones) of a lane's pair, from all its lanes."""
    a, b = sums[0], sums[2]
    if is_16_bit(weight):
        piece = lane & 3
        larger = LARGER if is_float16(weight) else np.float32(1)
        smaller = SMALLER if is_float16(weight) else np.float32(1)
        first, second = np.float32(0), np.float32(0)
        if piece == 0:
            first, second = np.float32(1) / smaller, np.float32(1) / (smaller * larger)
        elif piece == 1:
            first = np.float32(1) / (smaller * larger * larger)
        a, b = sums[0] * first + sums[1] * second, sums[2] * first + sums[3] * second
    odd = lane & 1
    total = (b if odd else a) + cuda.shfl_xor_sync(ALL, a if odd else b, 1)
    return total + cuda.shfl_xor_sync(ALL, total, 2)
