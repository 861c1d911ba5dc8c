"""Repacks blocks of a GGUF file, which lie in device memory as in the file, into the layout of `cuda/repack.py`.

Shapes: `runs` runs of 32 elements, whole rows of a weight; a thread repacks one. Blocks are read as 16-bit words: every
block type has an even number of bytes, most no multiple of four. Each byte is read and written about once, and the copy
from the host, which comes before, takes ten times as long as this. So no shared memory, and stores of 4 bytes.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..intrinsics import address, st_global_u32
from ..quant_traits import has_mins, is_int8, is_q4_1, is_q5_k, is_q6_k
from .common import device, pdl_sync
from .dequant import FIVE_HIGH, FOUR_FACTORS, SIX_FACTORS, SIX_RECORD, SIX_SCALES, record_bytes

LOW, HIGH = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0)
ONE_BIT, TWO_BITS = np.uint32(0x01010101), np.uint32(0x03030303)


@device
def word(source, at):
    """32 bits from the 16-bit word number `at` on."""
    return np.uint32(source[at]) | np.uint32(source[at + 1]) << np.uint32(16)


@device
def byte(source, first, n):
    """Byte `n` after the 16-bit word number `first`, as uint32."""
    return np.uint32(source[first + (n >> 1)]) >> np.uint32(8 * (n & 1)) & np.uint32(255)


@device
def copy_words(source, at, to, count):
    """Copy `count` words of 32 bits to a global address."""
    for i in range(count):
        st_global_u32(to + 4 * i, word(source, at + 2 * i))


@device
def join_halves(source, at, to, high):
    """16 bytes of payload at the global address `to` from the low, or high, halves of 32 bytes."""
    for i in range(4):
        first, second = word(source, at + 2 * i), word(source, at + 8 + 2 * i)
        low = (first & LOW) | (second & LOW) << np.uint32(4)
        st_global_u32(to + 4 * i, (first >> np.uint32(4) & LOW) | (second & HIGH) if high else low)


@device
def scale_and_min(source, first, n):
    """Scale and min of run `n` of a block in one 16-bit number. Its 12 bytes of them begin at word number `first`."""
    scale, least = byte(source, first, n & 3), byte(source, first, 4 + (n & 3))
    if n >= 4:
        both = byte(source, first, 4 + n)
        scale = (both & np.uint32(15)) | (scale >> np.uint32(6)) << np.uint32(4)
        least = (both >> np.uint32(4)) | (least >> np.uint32(6)) << np.uint32(4)
    return (scale & np.uint32(63)) | (least & np.uint32(63)) << np.uint32(8)


@device
def store_u16(scales, at, number):
    """Store a 16-bit number to two elements of a matrix of bytes."""
    scales[at] = number & np.uint32(255)
    scales[at + 1] = number >> np.uint32(8)


@device
def repack_with_mins(source, run, to, payload, scales, record, lane):
    """q4_k, and q5_k, whose fifth bits lie between its scales and its lower bits: bit n of a byte for run n."""
    five, n = is_q5_k(payload), run & 7
    block = (88 if five else 72) * (run >> 3)
    join_halves(source, block + (24 if five else 8) + 16 * (n >> 1), to, n & 1)
    if five:
        upper = np.uint32(0)
        for i in range(8):
            upper |= np.uint32((word(source, block + 8 + 2 * i) >> np.uint32(n) & ONE_BIT) << np.uint32(i))
        st_global_u32(address(scales, record + FIVE_HIGH + 4 * lane), upper)
    store_u16(scales, record + 2 * lane, scale_and_min(source, block + 2, n))
    if n == 0:
        st_global_u32(address(scales, record + FOUR_FACTORS + 4 * (lane >> 3)), word(source, block))


@device
def repack_q6_k(source, run, to, scales, record, lane):
    """Upper bits: a byte of the file has those of elements 32 apart, a byte here of elements 4 apart."""
    block, half, quarter = 105 * (run >> 3), (run >> 2) & 1, run & 3
    join_halves(source, block + 32 * half + 16 * (quarter & 1), to, quarter >> 1)
    for i in range(2):
        upper = np.uint32(0)
        for j in range(4):
            bits = word(source, block + 64 + 16 * half + 8 * i + 2 * j) >> np.uint32(2 * quarter) & TWO_BITS
            upper |= np.uint32(bits << np.uint32(2 * j))
        st_global_u32(address(scales, record + 8 * lane + 4 * i), upper)
    store_u16(scales, record + SIX_SCALES + 2 * lane, np.uint32(source[block + 96 + (run & 7)]))
    if run & 7 == 0:
        st_global_u32(address(scales, record + SIX_FACTORS + 4 * (lane >> 3)), np.uint32(source[block + 104]))


@cuda.jit
def repack_kernel(source, first, runs, runs_of_row, payload, scales, scale_stride):
    """Repack `runs` runs; the first one is number `first` of the weight, and whole blocks are repacked."""
    pdl_sync()
    n = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if n >= runs:
        return
    run = first + n
    i, row = run % runs_of_row, run // runs_of_row * scale_stride
    if is_int8(payload):
        copy_words(source, 17 * n + 1, address(payload, 32 * run), 8)
        scales[row + i] = source[17 * n]
        return
    to = address(payload, 16 * run)
    if is_q4_1(payload):
        copy_words(source, 10 * n + 2, to, 4)
        st_global_u32(address(scales, row + i), word(source, 10 * n))
    elif has_mins(payload):
        repack_with_mins(source, n, to, payload, scales, row + record_bytes(payload) * (i >> 5), i & 31)
    elif is_q6_k(payload):
        repack_q6_k(source, n, to, scales, row + SIX_RECORD * (i >> 4), i & 15)
    else:
        copy_words(source, 9 * n + 1, to, 4)
        scales[row + i] = source[9 * n]
