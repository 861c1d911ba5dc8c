"""Attention for many tokens, on tensor cores: 64 queries of one head with 64 keys at a time.

softmax(Q · Kᵀ / sqrt(head_dim)) · V in one pass over keys and values (Dao et al., FlashAttention-2, 2023).
Each of four warps has 16 queries: their fragments stay in registers, and so do the sums over values; scores become the
weights' fragments where they are. Tiles of K and V come into two stages of shared memory, one ahead of the one in use.
Operands are 16-bit in the cache's type, queries and weights rounded to it; sums, maxima and powers are float32.

A head of up to 64 numbers is filled up with zeros to 64, a longer one to 128. Queries may belong to any sequences and
have any positions: a tile's tokens are taken in runs of one sequence, and each sees the keys up to its own position.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..intrinsics import (
    address,
    await_all,
    close_copies,
    copy16,
    exp2,
    floats4,
    let_successor_start,
    shared_address,
    wait_for_predecessor,
)
from ..mma import (
    add_values,
    load_queries,
    mask_scores,
    most_of_rows,
    pack2,
    powers_of_2,
    put_rows,
    put_words4,
    scale_rows,
    score_keys,
    sums_of_rows,
    zeros32,
    zeros64,
)
from .common import ALL, LOG2_E, at_once, device
from .decode_attention import FAR_BELOW
from .params import PREFILL_ATTENTION_THREADS as THREADS
from .params import PREFILL_ATTENTION_TILE as TILE


@device
def put_queries(q, start, row_numbers, rows, head_dim, width, factor, k_cache, base):
    """A tile's queries, times `factor`, into rows of `width` numbers; zeros where there is none."""
    chunks = width // 8
    zero = np.float32(0)
    for n in range(cuda.threadIdx.x, TILE * chunks, THREADS):
        row, chunk = n // chunks, n & (chunks - 1)
        low, high = (zero, zero, zero, zero), (zero, zero, zero, zero)
        if row < rows and 8 * chunk < head_dim:
            at = start + row * row_numbers + 8 * chunk
            low, high = floats4(q, at), floats4(q, at + 4)
        put_words4(
            base + row * 2 * width + ((chunk ^ (row & 7)) << 4),
            pack2(k_cache, low[0] * factor, low[1] * factor), pack2(k_cache, low[2] * factor, low[3] * factor),
            pack2(k_cache, high[0] * factor, high[1] * factor), pack2(k_cache, high[2] * factor, high[3] * factor),
        )  # fmt: skip


@device
def fetch_tile(base, k_at, v_at, first, length, head_dim, width):
    """Start copying keys and values `first` to `first` + 63; zeros from `length` on, and beyond `head_dim`."""
    chunks = width // 8
    row, chunk = cuda.threadIdx.x // chunks, cuda.threadIdx.x & (chunks - 1)
    to = base + row * 2 * width + ((chunk ^ (row & 7)) << 4)
    step = THREADS // chunks  # a multiple of 8, so that all of a thread's rows are swizzled alike
    at = (first + row) * head_dim * 2 + chunk * 16
    here = length - first - row if 8 * chunk < head_dim else 0
    k_from, v_from, bytes_on = k_at + at, v_at + at, step * head_dim * 2
    for i in range(TILE // step):
        count = 16 if i * step < here else 0
        copy16(to + i * step * 2 * width, k_from, count)
        copy16(to + (TILE + i * step) * 2 * width, v_from, count)
        k_from += bytes_on
        v_from += bytes_on
    close_copies()


@device
def run_of_sequence(sequences, positions, first, begin, rows):
    """(end of the run of one sequence that begins with row `begin`, its largest position)."""
    sequence, lane = sequences[first + begin], cuda.threadIdx.x & 31
    end, newest = np.int32(rows), np.int32(-1)
    for i in range(2):
        row = lane + 32 * i
        if begin <= row < rows and sequences[first + row] != sequence:
            end = min(end, np.int32(row))
    for i in range(5):
        end = min(end, np.int32(cuda.shfl_xor_sync(ALL, end, 16 >> i)))
    for i in range(2):
        row = lane + 32 * i
        if begin <= row < end:
            newest = max(newest, np.int32(positions[first + row]))
    for i in range(5):
        newest = max(newest, np.int32(cuda.shfl_xor_sync(ALL, newest, 16 >> i)))
    return end, newest


@device
def of_four(a):
    """The largest of four neighbouring lanes, in each of them."""
    a = max(a, cuda.shfl_xor_sync(ALL, a, 1))
    return max(a, cuda.shfl_xor_sync(ALL, a, 2))


@device
def sum_of_four(a):
    """The sum over four neighbouring lanes, in each of them."""
    a += cuda.shfl_xor_sync(ALL, a, 1)
    return a + cuda.shfl_xor_sync(ALL, a, 2)


@device
def attend(tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, shared_by, context, head_dim, sums):
    """The whole of it; `sums` is a lane's part of 16 queries' values: as many numbers as half a padded head has."""
    # the last tokens have most keys: their blocks begin first
    first, head = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * TILE, cuda.blockIdx.y
    if first >= tokens[0]:
        return
    wait_for_predecessor()
    let_successor_start()
    shared = cuda.shared.array(0, np.float32)
    base, width, rows = shared_address(shared, 0), 2 * len(sums), min(TILE, tokens[0] - first)
    stage = 2 * TILE * 2 * width
    lane, warp, heads = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.gridDim.y
    factor = LOG2_E / np.float32(math.sqrt(np.float32(head_dim)))
    put_queries(
        q, (first * heads + head) * head_dim, heads * head_dim, rows, head_dim, width, factor, k_cache, base + stage
    )
    cuda.syncthreads()
    queries = load_queries(
        sums, base + stage + (warp * 16 + (lane & 15)) * 2 * width + (((lane >> 4) ^ (lane & 7)) << 4)
    )
    k_lane = base + ((lane & 7) + ((lane >> 4) << 3)) * 2 * width + ((((lane >> 3) & 1) ^ (lane & 7)) << 4)

    row0 = warp * 16 + (lane >> 2)
    row1 = row0 + 8
    position0 = positions[first + row0] if row0 < rows else np.int32(-1)
    position1 = positions[first + row1] if row1 < rows else np.int32(-1)
    most0, most1, total0, total1 = FAR_BELOW, FAR_BELOW, np.float32(0), np.float32(0)
    begin = 0
    while begin < rows:
        end, newest = run_of_sequence(sequences, positions, first, begin, rows)
        last0 = position0 if begin <= row0 < end else np.int32(-1)
        last1 = position1 if begin <= row1 < end else np.int32(-1)
        at = (sequences[first + begin] * kv_heads + head // shared_by) * context * head_dim
        k_at, v_at, length = address(k_cache, at), address(v_cache, at), newest + 1
        cuda.syncthreads()  # all have done with what lies in the stages
        fetch_tile(base, k_at, v_at, 0, length, head_dim, width)
        on = 0
        for key in range(0, length, TILE):
            await_all()
            cuda.syncthreads()
            if key + TILE < length:
                fetch_tile(base + stage - on, k_at, v_at, key + TILE, length, head_dim, width)
            scores = score_keys(k_cache, queries, k_lane + on)
            if key + TILE - 1 > min(last0, last1):
                of_lane = key + 2 * (lane & 3)
                scores = mask_scores(scores, last0 - of_lane, last1 - of_lane)
            higher = most_of_rows(scores, most0, most1)
            higher0, higher1 = of_four(higher[0]), of_four(higher[1])
            shrink0, shrink1 = exp2(most0 - higher0), exp2(most1 - higher1)
            most0, most1 = higher0, higher1
            weights = powers_of_2(scores, most0, most1)
            totals = sums_of_rows(weights, total0 * shrink0, total1 * shrink1)
            total0, total1 = totals[0], totals[1]
            sums = add_values(v_cache, scale_rows(sums, shrink0, shrink1), weights, k_lane + on + TILE * 2 * width)
            on = stage - on
        begin = end
    one = np.float32(1)
    sums = scale_rows(sums, one / sum_of_four(total0), one / sum_of_four(total1))
    at = ((first + row0) * heads + head) * head_dim + 2 * (lane & 3)
    put_rows(sums, address(out, at), address(out, at + 8 * heads * head_dim), head_dim if row0 < rows else 0,
             head_dim if row1 < rows else 0)  # fmt: skip


@at_once(2)
@cuda.jit
def attention_64_kernel(tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, shared_by, context, head_dim):
    """Heads of up to 64 numbers."""
    attend(tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, shared_by, context, head_dim, zeros32())


@at_once(2)
@cuda.jit
def attention_128_kernel(
    tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, shared_by, context, head_dim
):
    """Heads of up to 128 numbers."""
    attend(tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, shared_by, context, head_dim, zeros64())
