"""Operators that move little memory: one block a token (blockIdx.y), or one for some of its numbers."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from .cuda.intrinsics import (
    address,
    bits_of_f32,
    count_up,
    dp4a,
    f32_of_bits,
    has_scales,
    is_packed,
    let_successor_start,
    number,
    scale_in,
    scale_word,
    store_number,
    wait_for_predecessor,
    word,
)
from .cuda.kernels.common import ALL, beyond, block_sum, device, is_nan, sigmoid_times, warp_sum
from .cuda.kernels.dequant import number_at
from .cuda.kernels.params import ELEMENTWISE_THREADS as THREADS


@device
def begin():
    """What every kernel does before it touches what another one wrote."""
    wait_for_predecessor()
    let_successor_start()


@cuda.jit
def embedding_kernel(tokens, ids, table, stride, scales, scale_stride, shift, out, columns):
    if beyond(tokens):
        return
    begin()
    t, k = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < columns:
        row = ids[t]
        if is_packed(table):
            value = number_at(table, address(table, 0) + row * stride, address(scales, row * scale_stride), k)
        else:
            value = number(table, address(table, 0) + row * stride, k)
        if has_scales(table) and not is_packed(table):
            at = row * scale_stride + (k >> shift)
            value *= scale_in(scales, word(scale_word(scales, at)), at)
        out[t * columns + k] = value


@cuda.jit
def rope_angles_kernel(tokens, positions, frequencies, out, pairs):
    """In float64: at position 100,000 a float32 angle would be off by 0.004."""
    if beyond(tokens):
        return
    begin()
    t, i = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < pairs:
        angle = float(positions[t]) * float(frequencies[i])
        out[t * 2 * pairs + i] = math.cos(angle)
        out[t * 2 * pairs + pairs + i] = math.sin(angle)


@cuda.jit
def rmsnorm_kernel(tokens, x, weight, out, columns, eps):
    """x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, RMSNorm, 2019)."""
    if beyond(tokens):
        return
    begin()
    scratch = cuda.shared.array(32, np.float32)
    row = cuda.blockIdx.y * columns
    squares = np.float32(0)
    for k in range(cuda.threadIdx.x, columns, THREADS):
        squares += x[row + k] * x[row + k]
    squares = block_sum(squares, scratch)
    factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(columns) + eps))
    for k in range(cuda.threadIdx.x, columns, THREADS):
        out[row + k] = x[row + k] * factor * weight[k]


@cuda.jit
def head_norm_kernel(tokens, x, weight, out, columns, head_dim, eps):
    """RMSNorm of every head, a warp a head."""
    if beyond(tokens):
        return
    begin()
    head, lane = cuda.blockIdx.x * (THREADS // 32) + (cuda.threadIdx.x >> 5), cuda.threadIdx.x & 31
    if head * head_dim < columns:
        row = cuda.blockIdx.y * columns + head * head_dim
        squares = np.float32(0)
        for k in range(lane, head_dim, 32):
            squares += x[row + k] * x[row + k]
        squares = warp_sum(squares)
        factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(head_dim) + eps))
        for k in range(lane, head_dim, 32):
            out[row + k] = x[row + k] * factor * weight[k]


@cuda.jit
def quantize_kernel(tokens, x, out, scales, columns, group, groups):
    """Scale max|x| / 127 for each group, numbers rounded half away from zero, as llama2.c's runq. A warp a group."""
    if beyond(tokens):
        return
    begin()
    t, lane = cuda.blockIdx.y, cuda.threadIdx.x & 31
    g = cuda.blockIdx.x * (THREADS // 32) + (cuda.threadIdx.x >> 5)
    if g < groups:
        first, last = g * group, min(columns, (g + 1) * group)
        largest = np.int32(0)  # as bits, which order magnitudes and put every NaN above infinity
        for k in range(first + lane, last, 32):
            largest = max(largest, np.int32(bits_of_f32(x[t * columns + k]) & np.uint32(0x7FFFFFFF)))
        for i in range(5):
            largest = max(largest, cuda.shfl_xor_sync(ALL, largest, 16 >> i))
        # a NaN must show in the logits, and int8 has none: its group's scale carries it
        broken = largest >= 0x7F800000
        scale = np.float32(np.nan) if broken else f32_of_bits(np.uint32(largest)) / np.float32(127)
        if lane == 0:
            scales[t * groups + g] = scale
        for k in range(first + lane, last, 32):
            ratio = x[t * columns + k] / scale if scale > 0 else np.float32(0)
            # a scale that is a denormal number may be far too small
            rounded = min(math.floor(abs(ratio) + np.float32(0.5)), np.float32(127))
            out[t * columns + k] = np.int8(rounded if ratio >= 0 else -rounded)


@cuda.jit
def bias_kernel(tokens, x, weight, out, columns):
    if beyond(tokens):
        return
    begin()
    row, k = cuda.blockIdx.y * columns, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < columns:
        out[row + k] = x[row + k] + weight[k]


@cuda.jit
def rope_kernel(tokens, x, angles, out, columns, head_dim, interleaved):
    if beyond(tokens):
        return
    begin()
    t, pair, half = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x, head_dim // 2
    if pair < columns // 2:
        head = pair // half
        i = pair - head * half
        a = t * columns + head * head_dim + (2 * i if interleaved else i)
        b = a + (1 if interleaved else half)
        cos, sin = angles[t * head_dim + i], angles[t * head_dim + half + i]
        out[a] = x[a] * cos - x[b] * sin
        out[b] = x[a] * sin + x[b] * cos


@cuda.jit
def kv_write_kernel(tokens, x, cache, positions, sequences, heads, context, head_dim):
    if beyond(tokens):
        return
    begin()
    t, k = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < heads * head_dim:
        head = k // head_dim
        at = ((sequences[t] * heads + head) * context + positions[t]) * head_dim + k - head * head_dim
        store_number(cache, at, x[t * heads * head_dim + k])


@cuda.jit
def rope_kv_write_kernel(tokens, q, angles, k, k_cache, positions, sequences, v, v_cache, out, q_rows, kv_rows,
                         head_dim, interleaved, context):  # fmt: skip
    """Queries turned into `out`; keys turned and values copied into the cache. A thread a pair of numbers."""
    if beyond(tokens):
        return
    begin()
    t, pair, half = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x, head_dim // 2
    head = pair // half
    i = pair - head * half
    a = head * head_dim + (2 * i if interleaved else i)
    apart = 1 if interleaved else half
    cos, sin = angles[t * head_dim + i], angles[t * head_dim + half + i]
    if a + apart < q_rows:
        x, y = q[t * q_rows + a], q[t * q_rows + a + apart]
        out[t * q_rows + a] = x * cos - y * sin
        out[t * q_rows + a + apart] = x * sin + y * cos
    if a + apart < kv_rows:
        at = ((sequences[t] * (kv_rows // head_dim) + head) * context + positions[t]) * head_dim + a - head * head_dim
        x, y = k[t * kv_rows + a], k[t * kv_rows + a + apart]
        store_number(k_cache, at, x * cos - y * sin)
        store_number(k_cache, at + apart, x * sin + y * cos)
        store_number(v_cache, at, v[t * kv_rows + a])
        store_number(v_cache, at + apart, v[t * kv_rows + a + apart])


@cuda.jit
def swiglu_kernel(tokens, gate, up, out, columns):
    if beyond(tokens):
        return
    begin()
    row, k = cuda.blockIdx.y * columns, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < columns:
        out[row + k] = sigmoid_times(gate[row + k], up[row + k])


@cuda.jit
def add_kernel(tokens, a, b, out, columns):
    if beyond(tokens):
        return
    begin()
    row, k = cuda.blockIdx.y * columns, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < columns:
        out[row + k] = a[row + k] + b[row + k]


@cuda.jit
def last_kernel(tokens, x, out, columns):
    begin()
    k = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < columns:
        out[k] = x[(tokens[0] - 1) * columns + k]


@device
def better(value, index, other, other_index):
    """Whether `other` comes before `value` in the search for the largest: a NaN first of all, then the first index."""
    if is_nan(value) != is_nan(other):
        return is_nan(other)
    if is_nan(value) or value == other:
        return other_index < index
    return other > value


@cuda.jit
def argmax_kernel(tokens, x, out, columns, values, places, counter):
    """The first index of a row's largest number, -1 for a row with a NaN: a part a block, the last one joins them."""
    if beyond(tokens):
        return
    best_value = cuda.shared.array(32, np.float32)
    best_index = cuda.shared.array(32, np.int64)
    is_last = cuda.shared.array(1, np.int32)
    begin()
    t, parts = cuda.blockIdx.y, cuda.gridDim.x
    value, index = np.float32(-np.inf), np.int64(columns)
    for k in range(cuda.blockIdx.x * THREADS + cuda.threadIdx.x, columns, parts * THREADS):
        found = x[t * columns + k]
        if better(value, index, found, k):
            value, index = found, np.int64(k)
    for turn in range(2):
        for i in range(5):
            other = cuda.shfl_xor_sync(ALL, value, 16 >> i)
            other_index = np.int64(cuda.shfl_xor_sync(ALL, np.int32(index), 16 >> i))
            if better(value, index, other, other_index):
                value, index = other, other_index
        if cuda.threadIdx.x & 31 == 0:
            best_value[cuda.threadIdx.x >> 5], best_index[cuda.threadIdx.x >> 5] = value, index
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            for i in range(1, THREADS // 32):
                if better(value, index, best_value[i], best_index[i]):
                    value, index = best_value[i], best_index[i]
            if turn == 1:
                out[t] = -1 if is_nan(value) else min(index, columns - 1)
            else:
                values[t * parts + cuda.blockIdx.x], places[t * parts + cuda.blockIdx.x] = value, np.float32(index)
                is_last[0] = count_up(address(counter, t)) == parts - 1
                if is_last[0]:
                    counter[t] = 0
        cuda.syncthreads()
        if turn == 1 or not is_last[0]:
            return
        value, index = np.float32(-np.inf), np.int64(columns)
        if cuda.threadIdx.x < parts:
            value = values[t * parts + cuda.threadIdx.x]
            index = np.int64(places[t * parts + cuda.threadIdx.x])


@cuda.jit
def linear_int8_kernel(tokens, xq, xs, weight, stride, scales, scale_stride, shift, residual, added, out, rows, columns,
                       group, groups):  # fmt: skip
    """out = W · x, both int8 in the same groups, their products summed as integers by `dp4a`. A warp a row.

    The weight's rows are filled up to 16 bytes; x is read a number at a time where its words do not fit a group.
    """
    if beyond(tokens):
        return
    begin()
    t, lane = cuda.blockIdx.y, cuda.threadIdx.x & 31
    row = cuda.blockIdx.x * (THREADS // 32) + (cuda.threadIdx.x >> 5)
    if row < rows:
        base, x_base = address(weight, 0) + row * stride, address(xq, 0) + t * columns
        total = np.float32(0)
        if has_scales(weight) and columns & 3 == 0 and group & 3 == 0:
            for k in range(4 * lane, columns, 128):
                at = row * scale_stride + (k >> shift)
                part = np.float32(dp4a(word(base + k), word(x_base + k), np.int32(0)))
                scale = scale_in(scales, word(scale_word(scales, at)), at)
                total += part * scale * xs[t * groups + k // group]
        else:
            for k in range(lane, columns, 32):
                product = number(weight, base, k) * number(xq, x_base, k)
                if has_scales(weight):
                    at = row * scale_stride + (k >> shift)
                    product *= scale_in(scales, word(scale_word(scales, at)), at)
                total += product * xs[t * groups + k // group]
        total = warp_sum(total)
        if lane == 0:
            out[t * rows + row] = total + residual[t * rows + row] if added else total
