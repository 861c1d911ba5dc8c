"""Where a lane of the attention kernels reads keys and values, and how: 16 bytes at a time, from any page, of any type.

`source` is what `source_of_keys` returns: all that does not change from key to key. Of a q8_0 cache a lane has 8 quants
and their scale.
"""

from __future__ import annotations

import numpy as np

from ..arithmetic import mad_wide_s32, s32
from ..intrinsics import address, cp_async_4, cp_async_8, cp_async_16
from ..quant_traits import is_q8_0, unpack8
from .common import device


@device
def row_bytes(cache, head_dim):
    """Bytes of one key of one head in a cache."""
    return address(cache, head_dim) - address(cache, 0)


@device
def page_of(source, position, wanted):
    """Page that holds a position of the sequence, page 0 if it is not wanted: then the table may have no such entry."""
    page_table, row, log2_page = source[:3]
    page = s32(0)
    if wanted:
        page = page_table[s32(row + (position >> log2_page))]
    return page


@device
def key_address(base, source, page, position):
    """Address of the lane's 16 bytes of a key or value, in the cache at `base`."""
    log2_page, page_bytes, bytes_of_row, first = source[2:6]
    inside = s32((position & s32((1 << log2_page) - 1)) * bytes_of_row + first)
    return mad_wide_s32(page, page_bytes, base + inside)


@device
def scale_address(base, source, page, position):
    """Address of the word with the scale of the lane's quants of a key or value, in a cache of q8_0."""
    log2_page, (page_bytes, bytes_of_row, first, scales_at) = source[2], source[8]
    inside = s32((position & s32((1 << log2_page) - 1)) * bytes_of_row + first)
    return base + scales_at + (mad_wide_s32(page, page_bytes, inside) & -4)


@device
def source_of_keys(pages, sequence, kv_head, kv_heads, k_cache, v_cache, head_dim, d):
    """Where a lane reads keys and values: (page table, the sequence's row in it, log2 of the tokens in a page, bytes of
    a page, bytes of a key, offset of the lane's bytes in a page, addresses of the caches of keys and of values, the
    same for the scales of q8_0: bytes of a page and of a key, offsets in a page and of page 0).
    """
    page_table, table_stride, log2_page, scales_at = pages
    # a page has less than 2 GiB: a product of two int32 is one instruction, of int64 several
    log2_page = s32(log2_page)
    bytes_of_row = s32(row_bytes(k_cache, head_dim))
    bytes_of_head = s32(bytes_of_row << log2_page)
    first = s32(kv_head * bytes_of_head + row_bytes(k_cache, d))
    bytes_of_scales = s32(2 * ((head_dim + 31) >> 5))
    first_scale = s32((kv_head << log2_page) * bytes_of_scales + 2 * (d >> 5))
    scales = s32((kv_heads << log2_page) * bytes_of_scales), bytes_of_scales, first_scale, scales_at
    return (
        page_table, s32(sequence * table_stride), log2_page, s32(kv_heads * bytes_of_head), bytes_of_row, first,
        address(k_cache, 0), address(v_cache, 0), scales,
    )  # fmt: skip


@device
def fetch_16_bytes(slot, cache, base, source, page, position, wanted):
    """Start copying the lane's part of a key or value to `slot`: 16 bytes, or 8 quants and the word of their scale."""
    if is_q8_0(cache):
        cp_async_8(slot, key_address(base, source, page, position), 8 if wanted else 0)
        cp_async_4(slot + 8, scale_address(base, source, page, position), 4 if wanted else 0)
    else:
        cp_async_16(slot, key_address(base, source, page, position), 16 if wanted else 0)


@device
def elements_of(cache, words, odd):
    """The lane's elements in four words; `odd` tells which half of the third has the scale of q8_0."""
    if is_q8_0(cache):
        words = words[0], words[1], np.uint32(words[2] >> np.uint32(16 * odd)), words[3]
    return unpack8(cache, words)
