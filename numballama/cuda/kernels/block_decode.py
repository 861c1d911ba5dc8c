"""Blocks of 32 columns of a quantised weight's row on their way to wgmma: words to registers, then 16 bits to a tile.

A kernel loads a block some steps before it decodes it, so that it waits for no memory. A tile has 64 columns of 16
bits, swizzled as wgmma reads them.
"""

from __future__ import annotations

import numpy as np

from ..arithmetic import float_as_uint
from ..fragments import is_float32, splat_half, st_shared_decoded
from ..intrinsics import ld_global_u32, ld_global_v4_u32
from ..quant_traits import has_mins, is_int8, is_q4_1, is_q5_k, is_q6_k, scale_bytes
from .common import device
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
