"""Decoders of the block types that `blocks_cuda` lays out: small functions that make float32 factors of what lies in a
weight's second matrix.

Of the types with 4 bits a number is scale · integer + least, of q6_k scale · (integer - 32).
"""

from __future__ import annotations

import numpy as np

from ..intrinsics import (
    address,
    f32_of_half,
    f32_of_signed_byte,
    is_packed,
    is_q4_1,
    is_q4_k,
    is_q6_k,
    scale_bytes,
    scale_word,
    word,
)
from .common import device

FOUR_RECORD, FOUR_WORDS, FOUR_FACTORS = 80, 20, 64
"""Bytes and words of a record of q4_k, which a warp's lanes share, 32 numbers each; words of two lanes come first, from
here on those of eight."""
SIX_RECORD, SIX_SCALES, SIX_FACTORS = 168, 128, 160
"""Bytes of a record of q6_k, which 16 lanes share, 32 numbers each: 8 bytes a lane with its numbers' upper bits; then,
from these places on, words of two lanes with scales, and of eight with their factor."""


@device
def factors_of(payload, here, odd, both):
    """(scale, least) of a block out of a word. A word of q4_k is of two blocks, of which this one is `odd` or not; and
    `both` is the word of their superblock.
    """
    if is_q4_k(payload):
        own, byte = here >> (np.uint32(16) if odd else np.uint32(0)), np.uint32(255)
        scale = f32_of_half(both) * np.float32(own & byte)
        least = -f32_of_half(both >> np.uint32(16)) * np.float32((own >> np.uint32(8)) & byte)
    else:
        scale, least = f32_of_half(here), f32_of_half(here >> np.uint32(16))
    return scale, least


@device
def factors_q6_k(here, odd, factor):
    """Scales of 32 numbers' first 16 and of the others, out of the word of two such 32 and that of their superblock."""
    own, d = here >> (np.uint32(16) if odd else np.uint32(0)), f32_of_half(factor)
    return d * f32_of_signed_byte(own), d * f32_of_signed_byte(own >> np.uint32(8))


# A row's scales, as a stream of it wants them


@device
def first_scale(payload, scales, scale, lane):
    """How far behind the row's first scale the word lies that a lane copies first; `scale` is the scale's number."""
    if is_q4_k(payload):
        return 4 * lane
    if is_q6_k(payload):
        return (lane >> 4) * SIX_RECORD + SIX_SCALES + 4 * ((lane & 15) >> 1)
    return scale_word(scales, scale) - address(scales, 0)


@device
def chunk_scales(payload, scales, numbers, shift):
    """Bytes from a chunk's scales to the next chunk's."""
    if is_packed(payload) and not is_q4_1(payload):
        return FOUR_RECORD if is_q4_k(payload) else SIX_RECORD
    return ((32 * numbers) >> shift) * scale_bytes(scales)


# One block at a time


@device
def block_at(payload, where, block):
    """What makes a row's block of 32 integers numbers, from its scales at address `where`: the upper bits of the first
    16 and of the others, a scale for either, and the least number.
    """
    high, high_too, least = np.uint32(0), np.uint32(0), np.float32(0)
    scale, scale_too = np.float32(0), np.float32(0)
    if is_q6_k(payload):
        record, i = where + (block >> 4) * SIX_RECORD, block & 15
        high, high_too = word(record + 8 * i), word(record + 8 * i + 4)
        factor = word(record + SIX_FACTORS + 4 * (i >> 3))
        scale, scale_too = factors_q6_k(word(record + SIX_SCALES + 4 * (i >> 1)), i & 1, factor)
    elif is_q4_k(payload):
        record, i = where + (block >> 5) * FOUR_RECORD, block & 31
        both = word(record + FOUR_FACTORS + 4 * (i >> 3))
        scale, least = factors_of(payload, word(record + 4 * (i >> 1)), i & 1, both)
    elif is_q4_1(payload):
        scale, least = factors_of(payload, word(where + 4 * block), 0, high)
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
