"""Decoders of GGUF's block types as `blocks_cuda` lays them out: one small function a type makes float32 factors of what
lies in the matrix of scales.

In either type with 4 bits a number is scale · integer + least, in q6_k scale · (integer - 32).
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..lowlevel_cuda.instructions import (
    address,
    f32_of_half,
    f32_of_signed_byte,
    is_q4_1,
    is_q4_k,
    is_q6_k,
    permute,
    scale_bytes,
    scale_word,
    word,
    words4,
)
from .pieces import ALL, device

RECORD = 168
"""Bytes of a record of q6_k, which 16 lanes share, 32 numbers each."""
SCALES, FACTORS = 128, 160
"""Where in a record the words with the scales lie, of two lanes each, and those with the factor of eight lanes' scales;
before them come 8 bytes a lane with the upper two bits of its numbers."""


@device
def factors_q4_1(here):
    """(scale, least) out of a word."""
    return f32_of_half(here), f32_of_half(here >> np.uint32(16))


@device
def factors_q4_k(here, odd, both):
    """(scale, least) of a block, `odd` or not, out of the word of two, and out of that of their superblock."""
    own = here >> (np.uint32(12) if odd else np.uint32(0))
    scale = f32_of_half(both) * np.float32(own & np.uint32(63))
    least = f32_of_half(both >> np.uint32(16)) * np.float32((own >> np.uint32(6)) & np.uint32(63))
    return scale, -least


@device
def factors_q6_k(here, odd, factor):
    """Scales of a lane's first 16 numbers and of the others, out of the word of two lanes and that of its superblock."""
    own, d = here >> (np.uint32(16) if odd else np.uint32(0)), f32_of_half(factor)
    return d * f32_of_signed_byte(own), d * f32_of_signed_byte(own >> np.uint32(8))


@device
def superblocks(first, second, lane):
    """The words of two superblocks of q4_k that this lane has blocks of, from a word of each: eight lanes have four,
    each with a byte of it on top.
    """
    tops = permute(first, second, np.uint32(0x73))
    others = np.uint32(cuda.shfl_xor_sync(ALL, np.int32(tops), 2))
    halves = permute(tops, others, np.uint32(0x1504) if lane & 2 else np.uint32(0x5140))
    others = np.uint32(cuda.shfl_xor_sync(ALL, np.int32(halves), 4))
    upper = lane & 4
    return (
        permute(halves, others, np.uint32(0x1054) if upper else np.uint32(0x5410)),
        permute(halves, others, np.uint32(0x3276) if upper else np.uint32(0x7632)),
    )


# A row's scales, as a stream of it wants them


@device
def first_scale(payload, scales, scale, lane):
    """How far behind the row's first scale the word lies that a lane copies first; `scale` is the scale's number."""
    if is_q6_k(payload):
        return (lane >> 4) * RECORD + SCALES + 4 * ((lane & 15) >> 1)
    return scale_word(scales, scale) - address(scales, 0)


@device
def chunk_scales(payload, scales, numbers, shift):
    """Bytes from a chunk's scales to the next chunk's."""
    return RECORD if is_q6_k(payload) else ((32 * numbers) >> shift) * scale_bytes(scales)


# One block at a time


@device
def block_at(payload, where, block):
    """What makes a row's block of 32 integers numbers, from its scales at address `where`: the upper bits of the first
    16 and of the others, a scale for either, and the least number.
    """
    high, high_too, least = np.uint32(0), np.uint32(0), np.float32(0)
    scale, scale_too = np.float32(0), np.float32(0)
    if is_q6_k(payload):
        record, i = where + (block >> 4) * RECORD, block & 15
        high, high_too = word(record + 8 * i), word(record + 8 * i + 4)
        factor = word(record + FACTORS + 4 * (i >> 3))
        scale, scale_too = factors_q6_k(word(record + SCALES + 4 * (i >> 1)), i & 1, factor)
    elif is_q4_k(payload):
        four = words4(where + 16 * (block >> 3))
        low = permute(four[0], four[1], np.uint32(0x73))
        both = permute(low, permute(four[2], four[3], np.uint32(0x73)), np.uint32(0x5410))
        scale, least = factors_q4_k(word(where + 4 * (block >> 1)), block & 1, both)
    elif is_q4_1(payload):
        scale, least = factors_q4_1(word(where + 4 * block))
    return high, high_too, scale, scale if is_q4_1(payload) or is_q4_k(payload) else scale_too, least


@device
def number_at(payload, row, where, k):
    """Number k of the row that begins at address `row`, with its scales at address `where`."""
    high, high_too, scale, scale_too, least = block_at(payload, where, k >> 5)
    j, second = k & 15, (k >> 4) & 1
    four = word(row + 16 * (k >> 5) + (j & 12)) >> np.uint32(8 * (j & 3) + 4 * second)
    integer = np.float32(four & np.uint32(15))
    if is_q6_k(payload):
        upper = (high_too if second else high) >> np.uint32(8 * (j & 3) + 2 * (j >> 2))
        integer += np.float32((upper & np.uint32(3)) << np.uint32(4)) - np.float32(32)
    return integer * (scale_too if second else scale) + least
