"""Decode attention of many rows: each token against the keys and values of its own sequence, of any length.

The work is `decode_attention`'s, and so are data layout and arithmetic. The rows differ in length, from one key to a
whole context, in one launch. So a row's keys are split by its own length into parts of `ROW_SPLIT_KEYS` keys: a long
row has more blocks, and nobody waits for them. Which keys a block adds up in which order depends on the row alone, so
its result is bit for bit the same with any neighbours, in any place, and in a program for any number of rows.

Blocks are launched for the splits of the longest row that a variant is for. A block whose split its row does not have
ends at once.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..arithmetic import ex2_approx, s32
from ..intrinsics import griddepcontrol_wait
from .common import LOG2_E, device, first_visible, is_padding_token, kv_index, launch_bounds, load_kv, pdl_sync
from .decode_attention import LOWEST_SCORE, attend_split, ceil_quotient
from .params import HEADS_PER_BLOCK, ROW_SPLIT_KEYS
from .params import PLAIN_ATTENTION_THREADS as PLAIN_THREADS
from .reduce import block_max, block_sum


@device
def splits_of_row(position, window, splits):
    """How the keys are split that a token at `position` sees: (first key, keys of a split, splits that are used). Of at
    most `splits` splits; it depends on the row alone.
    """
    first = s32(first_visible(position + 1, window))
    seen, keys = s32(position + 1 - first), s32(ROW_SPLIT_KEYS)
    while keys * splits < seen:
        keys = s32(2 * keys)
    return first, keys, ceil_quotient(seen, keys)


@device
def rows_attention(tokens, q, k_cache, v_cache, pages, positions, sequences, out, partials, counters, kv_heads,
                   shared_by, head_dim, window, lanes, subgroups, inverse_subgroups, factor, splits, tiles,
                   listed, max_score, exp_sum, acc, is_last):  # fmt: skip
    """The body of the kernels for many rows, each of its own sequence and length.

    blockIdx.x is a group of heads, blockIdx.y the row; if `listed`, the row that `tiles` lists in this place, counted
    from their end. A row's splits depend on its length alone, so its result does
    not depend on other rows. A block computes every gridDim.z-th split, and none if its first one does not exist.
    """
    t = s32(cuda.blockIdx.y)
    if listed:
        if t >= tiles[1]:
            if t == 0:
                griddepcontrol_wait()  # a kernel must not end before the preceding one
            return
        t = s32(tiles[2 * (cuda.gridDim.y - t)])
    position, sequence, window, splits = positions[t], sequences[t], s32(window), s32(splits)
    first, keys, splits_used = splits_of_row(position, window, splits)
    for part in range(cuda.blockIdx.z, splits_used, cuda.gridDim.z):
        begin = s32(first + part * keys)
        cuda.syncthreads()  # the split before this one is no longer in shared memory
        end = s32(min(position + 1, begin + keys))
        attend_split(q, k_cache, v_cache, pages, t, position, sequence, out, partials, counters, kv_heads, shared_by,
                     head_dim, lanes, subgroups, inverse_subgroups, factor, begin, end, s32(part), splits, splits_used,
                     False, max_score, exp_sum, acc, is_last)  # fmt: skip


@launch_bounds(min_blocks=2)
@cuda.jit
def attention_rows_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                          scales_at, out, partials, counters, kv_heads, shared_by, head_dim, window, lanes, subgroups,
                          inverse_subgroups, factor, splits, tiles, listed):  # fmt: skip
    """Many rows, with heads that share no keys."""
    if is_padding_token(tokens):
        return
    is_last = cuda.shared.array(1, np.int32)
    max_score = cuda.local.array(1, np.float32)
    exp_sum = cuda.local.array(1, np.float32)
    acc = cuda.local.array((1, 8), np.float32)
    pages = page_table, table_stride, log2_page, scales_at
    rows_attention(tokens, q, k_cache, v_cache, pages, positions, sequences, out, partials, counters, kv_heads,
                   shared_by, head_dim, window, lanes, subgroups, inverse_subgroups,
                   factor, splits, tiles, listed, max_score, exp_sum, acc, is_last)  # fmt: skip


@launch_bounds(min_blocks=2)
@cuda.jit
def attention_grouped_rows_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride,
                                  log2_page, scales_at, out, partials, counters, kv_heads, shared_by, head_dim, window,
                                  lanes, subgroups, inverse_subgroups, factor, splits, tiles,
                                  listed):  # fmt: skip
    """Many rows. Each block computes `HEADS_PER_BLOCK` query heads of one KV head of a row and reads a key once."""
    if is_padding_token(tokens):
        return
    is_last = cuda.shared.array(1, np.int32)
    max_score = cuda.local.array(HEADS_PER_BLOCK, np.float32)
    exp_sum = cuda.local.array(HEADS_PER_BLOCK, np.float32)
    acc = cuda.local.array((HEADS_PER_BLOCK, 8), np.float32)
    pages = page_table, table_stride, log2_page, scales_at
    rows_attention(tokens, q, k_cache, v_cache, pages, positions, sequences, out, partials, counters, kv_heads,
                   shared_by, head_dim, window, lanes, subgroups, inverse_subgroups,
                   factor, splits, tiles, listed, max_score, exp_sum, acc, is_last)  # fmt: skip


@cuda.jit
def attention_plain_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                           scales_at, out, kv_heads, shared_by, head_dim, window):  # fmt: skip
    """Attention for heads that are not whole 16 bytes. One block per head; one thread per key, then per element."""
    if is_padding_token(tokens):
        return
    pdl_sync()
    shared = cuda.shared.array(0, np.float32)  # a tile's weights, then the weighted values so far
    scratch = cuda.shared.array(32, np.float32)
    t, head, thread = cuda.blockIdx.y, cuda.blockIdx.x, cuda.threadIdx.x
    q_at = (t * kv_heads * shared_by + head) * head_dim
    pages, sequence, kv_head = (page_table, table_stride, log2_page), sequences[t], head // shared_by
    length = positions[t] + 1
    factor = LOG2_E / np.float32(math.sqrt(np.float32(head_dim)))
    max_score, exp_sum = LOWEST_SCORE, np.float32(0)
    for d in range(thread, head_dim, PLAIN_THREADS):
        shared[PLAIN_THREADS + d] = 0
    for first in range(first_visible(length, window), length, PLAIN_THREADS):
        score = LOWEST_SCORE
        if first + thread < length:
            score = np.float32(0)
            key = kv_index(pages, sequence, kv_head, first + thread, kv_heads, head_dim)
            for d in range(head_dim):
                score += q[q_at + d] * load_kv(k_cache, scales_at, key, head_dim, d)
            score *= factor
        new_max = max(max_score, block_max(score, scratch))
        weight = ex2_approx(score - new_max) if first + thread < length else np.float32(0)
        rescale = ex2_approx(max_score - new_max)
        exp_sum = exp_sum * rescale + block_sum(weight, scratch)
        shared[thread] = weight
        max_score = new_max
        cuda.syncthreads()
        for d in range(thread, head_dim, PLAIN_THREADS):
            value = shared[PLAIN_THREADS + d] * rescale
            for p in range(min(PLAIN_THREADS, length - first)):
                at = kv_index(pages, sequence, kv_head, first + p, kv_heads, head_dim)
                value += shared[p] * load_kv(v_cache, scales_at, at, head_dim, d)
            shared[PLAIN_THREADS + d] = value
        cuda.syncthreads()
    for d in range(thread, head_dim, PLAIN_THREADS):
        out[q_at + d] = shared[PLAIN_THREADS + d] / exp_sum
