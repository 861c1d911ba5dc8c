"""The plain operators as CUDA kernels: one thread per element, or one block or warp per row. Read this file first.

What a newcomer to CUDA needs to know:

- A kernel is a function that many threads run at the same time. Each finds out which one it is:
  `cuda.threadIdx.x` is its number in its *block* of `THREADS` threads, `cuda.blockIdx` is its block's number in the
  *grid* of blocks. Usually blockIdx.y is the token and `blockIdx.x * THREADS + threadIdx.x` the column.
- 32 neighbouring threads are a *warp*; they are its *lanes*. Lanes exchange values by shuffles, the threads of a block
  through shared memory (`cuda.shared.array`) and barriers (`cuda.syncthreads`). `cuda/kernels/reduce.py` has the sums
  and maxima that are built from these. Blocks do not wait for each other.
- Operands are pointers into device memory, without shapes. Rows lie one after the other: element k of token t is at
  `t * columns + k`. Sizes are arguments. float32 unless stated.
- The grid has room for the maximum number of tokens of a program. `is_padding_token(tokens)` is true in a block whose
  token this run does not have.
- `pdl_sync()` comes before a kernel reads another kernel's results or writes its own: on sm_90 a kernel is launched
  before the previous one has ended (programmatic dependent launch).

These kernels move little memory, so simplicity wins. What decides the speed of a model, matrix products and attention,
is in `cuda/kernels/`. `cuda/ops/` says with which grid and arguments each kernel is launched.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from .cuda.arithmetic import dp4a, ex2_approx, float_as_uint, uint_as_float
from .cuda.intrinsics import address, atom_add_1, griddepcontrol_launch_dependents, griddepcontrol_wait, ld_global_u32
from .cuda.kernels.common import (
    FULL_MASK,
    LOG2_E,
    first_visible,
    is_nan,
    is_padding_token,
    kv_index,
    load_kv,
    pdl_sync,
    silu_and_mul,
)
from .cuda.kernels.dequant import dequant_element
from .cuda.kernels.params import ELEMENTWISE_THREADS as THREADS
from .cuda.kernels.reduce import block_max, block_sum, is_replaced_by, warp_sum
from .cuda.quant_traits import has_scales, is_packed, load_element, scale_in, scale_word, store_element


@cuda.jit
def embedding_kernel(tokens, ids, table, stride, scales, scale_stride, shift, out, columns):
    """out[t] = row ids[t] of the table, dequantised. One thread per element."""
    if is_padding_token(tokens):
        return
    pdl_sync()
    t, k = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < columns:
        row = ids[t]
        if is_packed(table):
            value = dequant_element(table, address(table, 0) + row * stride, address(scales, row * scale_stride), k)
        else:
            value = load_element(table, address(table, 0) + row * stride, k)
        if has_scales(table) and not is_packed(table):
            at = row * scale_stride + (k >> shift)
            value *= scale_in(scales, ld_global_u32(scale_word(scales, at)), at)
        out[t * columns + k] = value


@cuda.jit
def rope_angles_kernel(tokens, positions, frequencies, out, pairs, scale):
    """cos and sin of position · frequency, times scale: out[t] is [cos of all pairs, sin of all pairs].
    One thread per pair.

    In float64: at position 100,000 a float32 angle would be off by 0.004.
    """
    if is_padding_token(tokens):
        return
    pdl_sync()
    t, i = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < pairs:
        angle = float(positions[t]) * float(frequencies[i])
        out[t * 2 * pairs + i] = math.cos(angle) * scale
        out[t * 2 * pairs + pairs + i] = math.sin(angle) * scale


@cuda.jit
def rmsnorm_kernel(tokens, x, weight, out, columns, eps):
    """x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, RMSNorm, 2019). One block per token."""
    if is_padding_token(tokens):
        return
    pdl_sync()
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
    """RMSNorm of every head by itself; `weight` is float32[head_dim]. One warp per head."""
    if is_padding_token(tokens):
        return
    pdl_sync()
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
    """x to int8 in groups, as llama2.c's runq: scale max|x| / 127, rounded half away from zero. One warp per group."""
    if is_padding_token(tokens):
        return
    pdl_sync()
    t, lane = cuda.blockIdx.y, cuda.threadIdx.x & 31
    g = cuda.blockIdx.x * (THREADS // 32) + (cuda.threadIdx.x >> 5)
    if g < groups:
        first, last = g * group, min(columns, (g + 1) * group)
        largest = np.int32(0)  # |x| as bits: integers in the same order, and every NaN is above infinity
        for k in range(first + lane, last, 32):
            largest = max(largest, np.int32(float_as_uint(x[t * columns + k]) & np.uint32(0x7FFFFFFF)))
        for i in range(5):
            largest = max(largest, cuda.shfl_xor_sync(FULL_MASK, largest, 16 >> i))
        # int8 has no NaN or infinity, so the group's scale carries it: it must show in the logits
        not_finite = largest >= 0x7F800000
        scale = np.float32(np.nan) if not_finite else uint_as_float(np.uint32(largest)) / np.float32(127)
        if lane == 0:
            scales[t * groups + g] = scale
        for k in range(first + lane, last, 32):
            ratio = x[t * columns + k] / scale if scale > 0 else np.float32(0)
            # a scale that is a denormal number may be far too small, hence the limit
            rounded = min(math.floor(abs(ratio) + np.float32(0.5)), np.float32(127))
            out[t * columns + k] = np.int8(rounded if ratio >= 0 else -rounded)


@cuda.jit
def bias_kernel(tokens, x, weight, out, columns):
    """out = x + weight, the same float32[columns] for every token. One thread per element."""
    if is_padding_token(tokens):
        return
    pdl_sync()
    row, k = cuda.blockIdx.y * columns, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < columns:
        out[row + k] = x[row + k] + weight[k]


@cuda.jit
def rope_kernel(tokens, x, angles, out, columns, head_dim, interleaved):
    """Rotate pairs of elements by the position's angles (Su et al., RoFormer, 2021). One thread per pair.

    A head's pairs are neighbours if `interleaved`, else elements i and i + head_dim / 2.
    """
    if is_padding_token(tokens):
        return
    pdl_sync()
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
def kv_write_kernel(tokens, x, cache, positions, sequences, page_table, table_stride, log2_page, heads, head_dim):
    """Write x, keys or values of each token, into the cache at the token's position, rounded to its type."""
    if is_padding_token(tokens):
        return
    pdl_sync()
    t, k = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < heads * head_dim:
        head = k // head_dim
        pages = page_table, table_stride, log2_page
        at = kv_index(pages, sequences[t], head, positions[t], heads, head_dim) + k - head * head_dim
        store_element(cache, at, x[t * heads * head_dim + k])


@cuda.jit
def rope_kv_write_kernel(tokens, q, angles, k, k_cache, positions, sequences, page_table, table_stride, log2_page, v,
                         v_cache, out, q_rows, kv_rows, head_dim, interleaved):  # fmt: skip
    """Write RoPE of queries to `out`, RoPE of keys and unchanged values to the caches. One thread per pair."""
    if is_padding_token(tokens):
        return
    griddepcontrol_launch_dependents()  # at once: attention copies keys of earlier runs
    t, pair, half = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x, head_dim // 2
    head = pair // half
    i = pair - head * half
    a = head * head_dim + (2 * i if interleaved else i)
    apart = 1 if interleaved else half
    of_query, of_key, at = a + apart < q_rows, a + apart < kv_rows, 0
    if of_key:  # inputs of the run, which no kernel writes
        pages = page_table, table_stride, log2_page
        at = kv_index(pages, sequences[t], head, positions[t], kv_rows // head_dim, head_dim) + a - head * head_dim
    griddepcontrol_wait()
    x = y = k0 = k1 = v0 = v1 = np.float32(0)
    cos, sin = angles[t * head_dim + i], angles[t * head_dim + half + i]
    if of_query:
        x, y = q[t * q_rows + a], q[t * q_rows + a + apart]
    if of_key:
        k0, k1 = k[t * kv_rows + a], k[t * kv_rows + a + apart]
        v0, v1 = v[t * kv_rows + a], v[t * kv_rows + a + apart]
    if of_query:  # all loads are in flight together: stores come last
        out[t * q_rows + a] = x * cos - y * sin
        out[t * q_rows + a + apart] = x * sin + y * cos
    if of_key:
        store_element(k_cache, at, k0 * cos - k1 * sin)
        store_element(k_cache, at + apart, k0 * sin + k1 * cos)
        store_element(v_cache, at, v0)
        store_element(v_cache, at + apart, v1)


@cuda.jit
def attention_scores_kernel(tokens, q, k_cache, positions, sequences, page_table, table_stride, log2_page,
                            scales_at, out, kv_heads, shared_by, head_dim, window):  # fmt: skip
    """out[t, head, p] = q · k[p] / sqrt(head_dim), -inf for positions p that token t does not see.

    One thread per position. `shared_by` query heads share a key head (grouped-query attention).
    """
    if is_padding_token(tokens):
        return
    pdl_sync()
    t, head = cuda.blockIdx.y, cuda.blockIdx.x
    heads, context = kv_heads * shared_by, table_stride << log2_page
    pages = page_table, table_stride, log2_page
    factor = np.float32(1) / np.float32(math.sqrt(np.float32(head_dim)))
    for p in range(cuda.threadIdx.x, context, THREADS):
        score = np.float32(-np.inf)
        if first_visible(positions[t] + 1, window) <= p <= positions[t]:
            key = kv_index(pages, sequences[t], head // shared_by, p, kv_heads, head_dim)
            score = np.float32(0)
            for d in range(head_dim):
                score += q[(t * heads + head) * head_dim + d] * load_kv(k_cache, scales_at, key, head_dim, d)
            score *= factor
        out[(t * heads + head) * context + p] = score


@cuda.jit
def softmax_kernel(tokens, x, out, columns):
    """out = exp(x - max(x)) / sum(exp(x - max(x))) of each row; without the maximum exponentials could overflow.

    One block per row: blockIdx.x is the head, blockIdx.y the token.
    """
    if is_padding_token(tokens):
        return
    pdl_sync()
    scratch = cuda.shared.array(32, np.float32)
    row = (cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x) * columns
    largest = np.float32(-np.inf)
    for i in range(cuda.threadIdx.x, columns, THREADS):
        largest = max(largest, x[row + i])
    largest = block_max(largest, scratch)
    total = np.float32(0)
    for i in range(cuda.threadIdx.x, columns, THREADS):
        power = ex2_approx((x[row + i] - largest) * LOG2_E)
        total += power
        out[row + i] = power
    total = block_sum(total, scratch)
    for i in range(cuda.threadIdx.x, columns, THREADS):
        out[row + i] /= total


@cuda.jit
def attention_values_kernel(tokens, weights, v_cache, positions, sequences, page_table, table_stride, log2_page,
                            scales_at, out, kv_heads, shared_by, head_dim, window):  # fmt: skip
    """out[t, head] = sum of weights[t, head, p] · v[p] over positions p that token t sees. One thread per dimension."""
    if is_padding_token(tokens):
        return
    pdl_sync()
    t, head = cuda.blockIdx.y, cuda.blockIdx.x
    row, context = t * kv_heads * shared_by + head, table_stride << log2_page
    pages = page_table, table_stride, log2_page
    for d in range(cuda.threadIdx.x, head_dim, THREADS):
        total = np.float32(0)
        for p in range(first_visible(positions[t] + 1, window), positions[t] + 1):
            value = kv_index(pages, sequences[t], head // shared_by, p, kv_heads, head_dim)
            total += weights[row * context + p] * load_kv(v_cache, scales_at, value, head_dim, d)
        out[row * head_dim + d] = total


@cuda.jit
def swiglu_kernel(tokens, gate, up, out, columns):
    """out = silu(gate) · up. One thread per element."""
    if is_padding_token(tokens):
        return
    pdl_sync()
    row, k = cuda.blockIdx.y * columns, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < columns:
        out[row + k] = silu_and_mul(gate[row + k], up[row + k])


@cuda.jit
def add_kernel(tokens, a, b, out, columns):
    """out = a + b. One thread per element."""
    if is_padding_token(tokens):
        return
    pdl_sync()
    row, k = cuda.blockIdx.y * columns, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < columns:
        out[row + k] = a[row + k] + b[row + k]


@cuda.jit
def rows_kernel(tokens, x, rows, out, columns):
    """out[t] = row rows[t] of x. One thread per element."""
    if is_padding_token(tokens):
        return
    pdl_sync()
    t, k = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < columns:
        out[t * columns + k] = x[rows[t] * columns + k]


@cuda.jit
def argmax_kernel(tokens, x, out, columns, values, places, counter):
    """out[t] = the first index of the largest element of row t; -1 if the row has a NaN.

    gridDim.x blocks share a row. Each leaves its maximum in `values` and its index in `places`; the block that finishes
    last, which `counter` tells, takes the maximum of these in a second pass.
    """
    if is_padding_token(tokens):
        return
    best_value = cuda.shared.array(32, np.float32)
    best_index = cuda.shared.array(32, np.int64)
    is_last = cuda.shared.array(1, np.int32)
    pdl_sync()
    t, parts = cuda.blockIdx.y, cuda.gridDim.x
    value, index = np.float32(-np.inf), np.int64(columns)
    for k in range(cuda.blockIdx.x * THREADS + cuda.threadIdx.x, columns, parts * THREADS):
        element = x[t * columns + k]
        if is_replaced_by(value, index, element, k):
            value, index = element, np.int64(k)
    for pass_number in range(2):
        for i in range(5):
            other = cuda.shfl_xor_sync(FULL_MASK, value, 16 >> i)
            other_index = np.int64(cuda.shfl_xor_sync(FULL_MASK, np.int32(index), 16 >> i))
            if is_replaced_by(value, index, other, other_index):
                value, index = other, other_index
        if cuda.threadIdx.x & 31 == 0:
            best_value[cuda.threadIdx.x >> 5], best_index[cuda.threadIdx.x >> 5] = value, index
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            for i in range(1, THREADS // 32):
                if is_replaced_by(value, index, best_value[i], best_index[i]):
                    value, index = best_value[i], best_index[i]
            if pass_number == 1:
                out[t] = -1 if is_nan(value) else min(index, columns - 1)
            else:
                values[t * parts + cuda.blockIdx.x], places[t * parts + cuda.blockIdx.x] = value, np.float32(index)
                is_last[0] = atom_add_1(address(counter, t)) == parts - 1
                if is_last[0]:
                    counter[t] = 0
        cuda.syncthreads()
        if pass_number == 1 or not is_last[0]:
            return
        value, index = np.float32(-np.inf), np.int64(columns)
        if cuda.threadIdx.x < parts:
            value = values[t * parts + cuda.threadIdx.x]
            index = np.int64(places[t * parts + cuda.threadIdx.x])


@cuda.jit
def linear_int8_kernel(tokens, xq, xs, weight, stride, scales, scale_stride, shift, residual, added, out, rows, columns,
                       group, groups):  # fmt: skip
    """out = W · x, plus `residual` if `added`; W and x are int8 with scales for the same groups. A warp a row of W.

    Products are summed as integers, four at a time by `dp4a`, if groups and rows are whole words of four elements; else
    one element at a time.
    """
    if is_padding_token(tokens):
        return
    pdl_sync()
    t, lane = cuda.blockIdx.y, cuda.threadIdx.x & 31
    row = cuda.blockIdx.x * (THREADS // 32) + (cuda.threadIdx.x >> 5)
    if row < rows:
        base, x_base = address(weight, 0) + row * stride, address(xq, 0) + t * columns
        total = np.float32(0)
        if has_scales(weight) and columns & 3 == 0 and group & 3 == 0:
            for k in range(4 * lane, columns, 128):
                at = row * scale_stride + (k >> shift)
                part = np.float32(dp4a(ld_global_u32(base + k), ld_global_u32(x_base + k), np.int32(0)))
                scale = scale_in(scales, ld_global_u32(scale_word(scales, at)), at)
                total += part * scale * xs[t * groups + k // group]
        else:
            for k in range(lane, columns, 32):
                product = load_element(weight, base, k) * load_element(xq, x_base, k)
                if has_scales(weight):
                    at = row * scale_stride + (k >> shift)
                    product *= scale_in(scales, ld_global_u32(scale_word(scales, at)), at)
                total += product * xs[t * groups + k // group]
        total = warp_sum(total)
        if lane == 0:
            out[t * rows + row] = total + residual[t * rows + row] if added else total
