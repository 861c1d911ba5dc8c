"""Writes to a KV cache of q8_0: int8 quants in blocks of 32 elements of a head, and a float16 scale for each block.

x[T, heads · head_dim] → the cache, as ggml's quantize_row_q8_0: scale max|x| / 127, quants x · (127 / max|x|) rounded
to nearest even. One warp per block of a head, one lane per element, so a block's maximum is five shuffles. The last
block of a head may be shorter. These kernels move little memory.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..arithmetic import cvt_rni_s32, uint_as_float
from ..intrinsics import address, st_global_f16
from ..quant_traits import store_element
from .common import FULL_MASK, device, fast_divmod, is_padding_token, kv_index, magnitude_bits, pdl_sync
from .params import ELEMENTWISE_THREADS as THREADS

MIN_LARGEST = np.float32(2.0**-120)
"""A block whose largest magnitude is smaller becomes zeros: the reciprocal of its scale might not be finite."""


@device
def store_block(cache, scales_at, row, head_dim, blocks, block, value):
    """Quantise a block of the key or value whose first element has index `row`; `value` is the lane's element.

    int8 has no NaN: a block with NaN or infinity gets the scale NaN, which carries it to the logits.
    """
    lane = cuda.threadIdx.x & 31
    d = 32 * block + lane
    bits = magnitude_bits(value) if d < head_dim else np.int32(0)
    for i in range(5):
        bits = max(bits, np.int32(cuda.shfl_xor_sync(FULL_MASK, bits, 16 >> i)))
    not_finite, largest, factor = bits >= 0x7F800000, uint_as_float(np.uint32(bits)), np.float32(0)
    if not not_finite and largest >= MIN_LARGEST:
        factor = np.float32(127) / largest
    if d < head_dim:
        quant = np.float32(cvt_rni_s32(value * factor)) if factor > 0 else np.float32(0)
        store_element(cache, row + d, quant)
    if lane == 0:
        scale = np.float32(np.nan) if not_finite else largest / np.float32(127)
        st_global_f16(address(cache, 0) + scales_at + 2 * (row // head_dim * blocks + block), scale)


@cuda.jit
def kv_write_q8_0_kernel(tokens, x, cache, positions, sequences, page_table, table_stride, log2_page, scales_at, heads,
                         head_dim, blocks, inverse_blocks):  # fmt: skip
    """Write x, keys or values of each token, into the cache at the token's position. `blocks` are those of a head."""
    if is_padding_token(tokens):
        return
    pdl_sync()
    t, unit = cuda.blockIdx.y, cuda.blockIdx.x * (THREADS // 32) + (cuda.threadIdx.x >> 5)
    head, block = fast_divmod(unit, blocks, inverse_blocks)
    if head < heads:
        d = 32 * block + (cuda.threadIdx.x & 31)
        value = x[(t * heads + head) * head_dim + d] if d < head_dim else np.float32(0)
        row = kv_index((page_table, table_stride, log2_page), sequences[t], head, positions[t], heads, head_dim)
        store_block(cache, scales_at, row, head_dim, blocks, block, value)


@cuda.jit
def rope_kv_write_q8_0_kernel(tokens, q, angles, k, k_cache, positions, sequences, page_table, table_stride, log2_page,
                              scales_at, v, v_cache, out, heads, kv_heads, head_dim, interleaved, blocks,
                              inverse_blocks):  # fmt: skip
    """Write RoPE of queries to `out`, RoPE of keys and unchanged values to the caches.

    A warp has a block of a head of queries, of keys or of values; a lane rotates its own element of a pair.
    """
    if is_padding_token(tokens):
        return
    pdl_sync()
    t, unit = cuda.blockIdx.y, cuda.blockIdx.x * (THREADS // 32) + (cuda.threadIdx.x >> 5)
    number, block = fast_divmod(unit, blocks, inverse_blocks)
    d, half, value = 32 * block + (cuda.threadIdx.x & 31), head_dim // 2, np.float32(0)
    head = number - heads if number >= heads else number
    if number >= heads + kv_heads:
        head -= kv_heads
    if number < heads + 2 * kv_heads:
        if d < head_dim and number >= heads + kv_heads:
            value = v[(t * kv_heads + head) * head_dim + d]
        elif d < head_dim:
            second = d & 1 if interleaved else (1 if d >= half else 0)
            i = d >> 1 if interleaved else d - second * half
            apart = 1 if interleaved else half
            other = d - apart if second else d + apart
            cos, sin = angles[t * head_dim + i], angles[t * head_dim + half + i]
            if number < heads:
                at = (t * heads + head) * head_dim
                x, y = q[at + d], q[at + other]
            else:
                at = (t * kv_heads + head) * head_dim
                x, y = k[at + d], k[at + other]
            value = y * sin + x * cos if second else x * cos - y * sin
        if number < heads:
            if d < head_dim:
                out[(t * heads + head) * head_dim + d] = value
        else:
            row = kv_index((page_table, table_stride, log2_page), sequences[t], head, positions[t], kv_heads, head_dim)
            if number < heads + kv_heads:
                store_block(k_cache, scales_at, row, head_dim, blocks, block, value)
            else:
                store_block(v_cache, scales_at, row, head_dim, blocks, block, value)
