"""Dequantisation of q4_1, q4_k, q5_k and q6_k: a block's scales and mins as float32, from a weight's second matrix.

An element of q6_k is scale · (integer - 32), of the others scale · integer + min. `cuda/repack.py` describes the
layout: integers in one matrix, in the order in which lanes read them; scales, mins and upper bits in another, in
records that the lanes of a warp share. A thread loads aligned 32-bit words and takes its part of them.
"""

from __future__ import annotations

import numpy as np

from ..arithmetic import cvt_f32_f16, cvt_f32_s8, cvt_f32_u8, half_word
from ..intrinsics import address, ld_global_u32
from ..quant_traits import has_mins, is_packed, is_q4_1, is_q5_k, is_q6_k, scale_bytes, scale_word
from .common import device

FOUR_RECORD, FOUR_WORDS, FOUR_FACTORS = 80, 20, 64
"""q4_k: bytes and words of a record, and the byte offset of d and dmin in it. A record is for a warp's 32 lanes of 32
elements each: first words with 8-bit scales and mins, one for two lanes, then words with d and dmin, one for eight
lanes.
"""
FIVE_RECORD, FIVE_HIGH = 208, 80
"""q5_k: bytes of a record, which begins as that of q4_k, and the byte offset of a word per lane with the fifth bits."""
SIX_RECORD, SIX_SCALES, SIX_FACTORS = 168, 128, 160
"""q6_k: bytes of a record, and the byte offsets of its scales and of d. A record is for 16 lanes of 32 elements each:
first 8 bytes per lane with the upper bits, then words with 8-bit scales, one for two lanes, then words with d, one for
eight lanes.
"""


@device
def record_bytes(payload):
    """Bytes of a record of q4_k, q5_k or q6_k."""
    if is_q6_k(payload):
        return SIX_RECORD
    return FIVE_RECORD if is_q5_k(payload) else FOUR_RECORD


@device
def factors_of(payload, scale_mins, odd, d_dmin):
    """(scale, min) of a q4_1, q4_k or q5_k block as float32: an element is scale · integer + min.

    `scale_mins` is the word with the block's scale and min. Except for q4_1 it serves two blocks; this block is the
    second one if `odd`. `d_dmin` is the word of their superblock. ggml subtracts dmin · m, hence the negation.
    """
    if has_mins(payload):
        half = half_word(scale_mins, odd)
        scale = cvt_f32_f16(d_dmin) * cvt_f32_u8(half)
        block_min = -cvt_f32_f16(d_dmin >> np.uint32(16)) * cvt_f32_u8(half >> np.uint32(8))
    else:
        scale, block_min = cvt_f32_f16(scale_mins), cvt_f32_f16(scale_mins >> np.uint32(16))
    return scale, block_min


@device
def factors_q6_k(scales, odd, d_word):
    """(scale of the first 16, scale of the last 16) of 32 elements of q6_k.

    `scales` is the word with the scales of two such runs of 32; this run is the second one if `odd`. `d_word` is the
    word with d of their superblock.
    """
    half, d = half_word(scales, odd), cvt_f32_f16(d_word)
    return d * cvt_f32_s8(half), d * cvt_f32_s8(half >> np.uint32(8))


# Where the scales of a streamed row are (gemv)


@device
def first_scale(payload, scales, scale, lane):
    """Byte offset from the row's first scale to the word that this lane copies first. `scale` is its scale's index."""
    if is_q5_k(payload):
        return 16 * lane
    if has_mins(payload):
        return 4 * lane
    if is_q6_k(payload):
        return (lane >> 4) * SIX_RECORD + SIX_SCALES + 4 * ((lane & 15) >> 1)
    return scale_word(scales, scale) - address(scales, 0)


@device
def chunk_scales(payload, scales, elements, shift):
    """Bytes from a chunk's scales to the next chunk's. A chunk of a row is 16 bytes per lane, `elements` elements."""
    if is_packed(payload) and not is_q4_1(payload):
        return record_bytes(payload)
    return ((32 * elements) >> shift) * scale_bytes(scales)


# A single block, where speed does not matter


@device
def block_at(payload, where, block):
    """Upper bits, scales and min of a block of 32 quants. The row's scales begin at address `where`.

    Returns (upper bits of the first 16 quants, upper bits of the last 16, scale of the first 16, scale of the last 16,
    min). Upper bits are 0 for 4-bit types, min is 0 for q6_k. The first word has all upper bits of q5_k.
    """
    high, high2, block_min = np.uint32(0), np.uint32(0), np.float32(0)
    scale, scale2 = np.float32(0), np.float32(0)
    if is_q6_k(payload):
        record, i = where + (block >> 4) * SIX_RECORD, block & 15
        high, high2 = ld_global_u32(record + 8 * i), ld_global_u32(record + 8 * i + 4)
        d_word = ld_global_u32(record + SIX_FACTORS + 4 * (i >> 3))
        scale, scale2 = factors_q6_k(ld_global_u32(record + SIX_SCALES + 4 * (i >> 1)), i & 1, d_word)
    elif has_mins(payload):
        record, i = where + (block >> 5) * record_bytes(payload), block & 31
        if is_q5_k(payload):
            high = ld_global_u32(record + FIVE_HIGH + 4 * i)
        d_dmin = ld_global_u32(record + FOUR_FACTORS + 4 * (i >> 3))
        scale, block_min = factors_of(payload, ld_global_u32(record + 4 * (i >> 1)), i & 1, d_dmin)
    elif is_q4_1(payload):
        scale, block_min = factors_of(payload, ld_global_u32(where + 4 * block), 0, high)
    return high, high2, scale, scale2 if is_q6_k(payload) else scale, block_min


@device
def dequant_element(payload, row, where, k):
    """Element k as float32 of the row that begins at address `row` and whose scales begin at address `where`."""
    high, high2, scale, scale2, block_min = block_at(payload, where, k >> 5)
    j, second = k & 15, (k >> 4) & 1
    nibble = ld_global_u32(row + 16 * (k >> 5) + (j & 12)) >> np.uint32(8 * (j & 3) + 4 * second)
    integer = np.float32(nibble & np.uint32(15))
    if is_q6_k(payload):
        upper = (high2 if second else high) >> np.uint32(8 * (j & 3) + 2 * (j >> 2))
        integer += np.float32((upper & np.uint32(3)) << np.uint32(4)) - np.float32(32)
    if is_q5_k(payload):
        upper = high >> np.uint32(8 * (j & 3) + (j >> 2) + 4 * second)
        integer += np.float32((upper & np.uint32(1)) << np.uint32(4))
    return integer * (scale2 if second else scale) + block_min
