"""Every operator on the CPU: a plain function of arrays and scalars that writes its outputs.

Each of `n_workers` workers calls a kernel at the same time, and worker number `worker` computes its share for the first
`tokens` tokens. It writes its own share only, and reads nothing that another worker writes in the same step. After
these three parameters come the op's inputs and outputs as its rule in `ops` names them, then attributes and float32
scratch arrays by name. `cpu.ops` registers each kernel for types of inputs and gives the shapes of its scratch arrays;
`cpu.compiler` compiles it with Numba for the types that a model needs.

Shapes: T tokens at most, D the model's width, K and N a weight's columns and rows. A KV cache is [pages, kv_heads,
page, head_dim]; `ops` says how positions of a sequence are found in it.
"""

from __future__ import annotations

import math

import numpy as np

from .cpu.attend import LANES, memory_of, page_scores, page_values
from .cpu.compiler import device, ordered_device
from .cpu.intrinsics import power_of_two, saturate_to
from .cpu.kv_cache import add_weighted, kv_rows, kv_shape, qk_dot, row_count, store_row
from .cpu.matmul import dequantize_rows, matmul, matmul_int8, partition
from .cpu.tiling import SCORE_HEADS


@device
def normalize(x, weight, eps, out, t):
    """out[t] = x[t] / sqrt(mean(x[t]²) + eps) · weight (Zhang and Sennrich, RMSNorm, 2019)."""
    n = x.shape[1]
    squares = np.float32(0)
    for k in range(n):
        squares += x[t, k] * x[t, k]
    scale = np.float32(1 / math.sqrt(squares / n + eps))
    for k in range(n):
        out[t, k] = x[t, k] * scale * weight[k]


MIN_EXPONENT, MAX_EXPONENT = np.float32(-86.5), np.float32(88.72)
"""Range of `exp`: below it the result is 0, above it infinity."""


@ordered_device
def exp(x):
    """e^x in float32 to 1.03 units in the last place, in operations that a compiler can vectorise.

    x = n ln 2 + r with r within ±ln 2 / 2. A polynomial gives e^r, and n goes into the exponent (Cephes, 1989).
    ln 2 is split into two constants. Reordered operations would join them to one, and r would lose its last digits.
    """
    y = np.float32(min(max(x, MIN_EXPONENT), MAX_EXPONENT))
    n = np.floor(y * np.float32(1.44269504) + np.float32(0.5))
    r = y - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    value = (p * r * r + r + np.float32(1)) * power_of_two(n - np.float32(1)) * np.float32(2)
    value = np.float32(0) if x < MIN_EXPONENT else np.float32(np.inf) if x > MAX_EXPONENT else value
    return x if x != x else value


@device
def multiply_by_silu(gate, out, begin, end, tokens):
    """out *= gate · sigmoid(gate) in columns [begin, end); `out` holds `up` before (Shazeer, GLU Variants, 2020).

    Loops over slices from 0 on. LLVM does not vectorise an index that Numba believes may be negative.
    """
    one = np.float32(1)
    for t in range(tokens):
        g, o = gate[t, begin:end], out[t, begin:end]
        for k in range(g.shape[0]):
            o[k] *= g[k] / (one + exp(-g[k]))


# Kernels of the ops that `graph` declares


def embedding(worker, n_workers, tokens, ids, table, out):
    begin, end = partition(tokens, worker, n_workers, 1)
    for t in range(begin, end):
        dequantize_rows(table, ids[t], 1, 0, out.shape[1], out[t : t + 1])


def rope_angles(worker, n_workers, tokens, positions, frequencies, out, scale):
    """cos, then sin, of position · frequency, times scale.

    In float64: a float32 angle is off by 0.004 at position 100,000.
    """
    pairs = frequencies.shape[0]
    begin, end = partition(tokens, worker, n_workers, 1)
    for t in range(begin, end):
        for i in range(pairs):
            angle = float(positions[t]) * frequencies[i]
            out[t, i] = math.cos(angle) * scale
            out[t, pairs + i] = math.sin(angle) * scale


def rmsnorm(worker, n_workers, tokens, x, weight, out, eps):
    begin, end = partition(tokens, worker, n_workers, 1)
    for t in range(begin, end):
        normalize(x, weight, eps, out, t)


def head_norm(worker, n_workers, tokens, x, weight, out, eps):
    head_dim = weight.shape[0]
    heads = x.shape[1] // head_dim
    begin, end = partition(tokens * heads, worker, n_workers, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        d = h * head_dim
        normalize(x[t : t + 1, d : d + head_dim], weight, eps, out[t : t + 1, d : d + head_dim], 0)


def quantize(worker, n_workers, tokens, x, out, scales, group):
    """Each group's scale is max|x| / 127. Elements are rounded half away from zero, as llama2.c's runq does."""
    n = x.shape[1]
    begin, end = partition(tokens * scales.shape[1], worker, n_workers, 1)
    for unit in range(begin, end):
        t, g = divmod(unit, scales.shape[1])
        first, last = g * group, min(n, (g + 1) * group)
        source, target = x[t, first:last], out[t, first:last]
        largest, not_finite = np.float32(0), False
        for k in range(source.shape[0]):
            largest = max(largest, abs(source[k]))
            not_finite |= not abs(source[k]) < np.float32(np.inf)
        # int8 has no NaN, so the scale carries it to the logits, where it is reported
        scale = np.float32(np.nan) if not_finite else largest / np.float32(127)
        scales[t, g] = scale
        for k in range(source.shape[0]):
            ratio = source[k] / scale if scale > 0 else np.float32(0)
            target[k] = np.int8(math.floor(abs(ratio) + np.float32(0.5)) * (1 if ratio >= 0 else -1))


def linear(worker, n_workers, tokens, x, weight, out, dequant_buffer):
    matmul(weight, x, out, worker, n_workers, tokens, dequant_buffer)


def linear_int8(worker, n_workers, tokens, xq, xs, weight, out):
    matmul_int8(weight, xq, xs, out, worker, n_workers, tokens)


def bias(worker, n_workers, tokens, x, weight, out):
    begin, end = partition(out.shape[1], worker, n_workers, 16)
    for t in range(tokens):
        for k in range(begin, end):
            out[t, k] = x[t, k] + weight[k]


@device
def apply_rope(x, angles, interleaved, out):
    """RoPE of one head: rotate pair i of x by the angle whose cosine is angles[i] and whose sine is angles[pairs + i].

    Pair i is elements 2i and 2i + 1 if `interleaved`, else i and pairs + i.
    """
    pairs = x.shape[0] // 2
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        cos, sin = angles[i], angles[pairs + i]
        out[a] = saturate_to(out[a], x[a] * cos - x[b] * sin)
        out[b] = saturate_to(out[b], x[a] * sin + x[b] * cos)


def rope(worker, n_workers, tokens, x, angles, out, head_dim, interleaved):
    heads = x.shape[1] // head_dim
    begin, end = partition(tokens * heads, worker, n_workers, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        d = h * head_dim
        apply_rope(x[t, d : d + head_dim], angles[t], interleaved, out[t, d : d + head_dim])


@device
def kv_index(page_table, sequence, head, position, page):
    """Index of the rows of one sequence and KV head in a KV cache, from `position` to the end of its page.

    `cache[kv_index(…)]` is [rows, head_dim]; its row 0 belongs to `position`. `page` is the number of tokens in a page.
    `cpu.kv_cache` reads and writes these rows.
    All kernels address caches by this.
    """
    return page_table[sequence, position // page], head, slice(position % page, None)


def kv_write(worker, n_workers, tokens, x, cache, positions, sequences, page_table):
    heads, page, head_dim = kv_shape(cache)
    begin, end = partition(tokens * heads, worker, n_workers, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        store_row(cache, kv_index(page_table, sequences[t], h, positions[t], page), x, t, h * head_dim)


@device
def first_visible(position, window):
    """The first position that a token attends to: it sees `window` positions, its own included, or all if 0."""
    return max(position + 1 - window, 0) if window > 0 else 0


@device
def sortable(bits):
    """The bits of a float32 as an int32 that sorts like it, and back. Both zeros give 0."""
    sign = bits >> np.int32(31)
    return np.int32(((bits & np.int32(0x7FFFFFFF)) ^ sign) - sign)  # Numba subtracts as int64


@device
def softmax_in_place(x, length):
    """x = exp(x) / sum(exp(x)) over the first `length` elements. Subtracts their maximum, so that nothing overflows."""
    bits, top = x.view(np.int32), np.int32(-0x80000000)
    for i in range(length):
        top = np.int32(max(top, sortable(bits[i])))  # a maximum of integers is a vector instruction
    largest = np.int32(sortable(top)).view(np.float32)
    total = np.float32(0)
    for i in range(length):
        x[i] = exp(x[i] - largest)
        total += x[i]
    for i in range(length):
        x[i] /= total


@device
def attend_keys(q, k_cache, page_table, sequence, head, first, end, scale, scores):
    """scores[i] = q · key · scale, with the key of position first + i, for positions [first, end) of one KV head."""
    position = first
    while position < end:
        keys = kv_rows(k_cache, kv_index(page_table, sequence, head, position, kv_shape(k_cache)[1]))
        count = min(row_count(keys), end - position)
        qk_dot(q, keys, count, scale, scores[position - first :])
        position += count


@device
def attend_values(weights, v_cache, page_table, sequence, head, first, end, out):
    """out = sum of weights[i] · value, with the value of position first + i, for positions [first, end)."""
    for d in range(out.shape[0]):
        out[d] = 0
    position = first
    while position < end:
        values = kv_rows(v_cache, kv_index(page_table, sequence, head, position, kv_shape(v_cache)[1]))
        count = min(row_count(values), end - position)
        add_weighted(weights[position - first :], values, count, out)
        position += count


def attention_scores(worker, n_workers, tokens, q, k_cache, positions, sequences, page_table, out, window):
    (kv_heads, _, head_dim), heads = kv_shape(k_cache), out.shape[1]
    group, scale = heads // kv_heads, np.float32(1 / math.sqrt(head_dim))
    begin, end = partition(tokens * heads, worker, n_workers, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        first, end_visible = first_visible(positions[t], window), positions[t] + 1
        query = q[t, h * head_dim : (h + 1) * head_dim]
        attend_keys(query, k_cache, page_table, sequences[t], h // group, first, end_visible, scale, out[t, h, first:])
        out[t, h, :first] = -np.inf
        out[t, h, end_visible:] = -np.inf


def softmax(worker, n_workers, tokens, x, out):
    begin, end = partition(tokens * x.shape[1], worker, n_workers, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, x.shape[1])
        for i in range(x.shape[2]):
            out[t, h, i] = x[t, h, i]
        softmax_in_place(out[t, h], x.shape[2])


def attention_values(worker, n_workers, tokens, weights, v_cache, positions, sequences, page_table, out, window):
    (kv_heads, _, head_dim), heads = kv_shape(v_cache), weights.shape[1]
    group = heads // kv_heads
    begin, end = partition(tokens * heads, worker, n_workers, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        first, end_visible = first_visible(positions[t], window), positions[t] + 1
        head_out = out[t, h * head_dim : (h + 1) * head_dim]
        attend_values(
            weights[t, h, first:], v_cache, page_table, sequences[t], h // group, first, end_visible, head_out
        )


def swiglu(worker, n_workers, tokens, gate, up, out):
    begin, end = partition(out.shape[1], worker, n_workers, 16)
    for t in range(tokens):
        for k in range(begin, end):
            out[t, k] = up[t, k]
    multiply_by_silu(gate, out, begin, end, tokens)


def add(worker, n_workers, tokens, a, b, out):
    begin, end = partition(out.shape[1], worker, n_workers, 16)
    for t in range(tokens):
        for k in range(begin, end):
            out[t, k] = a[t, k] + b[t, k]


def rows(worker, n_workers, tokens, x, rows, out):
    begin, end = partition(out.shape[1], worker, n_workers, 16)
    for t in range(tokens):
        for k in range(begin, end):
            out[t, k] = x[rows[t], k]


def argmax(worker, n_workers, tokens, x, out):
    """The first index of each row's largest element; -1 for a row with a NaN.

    Compares floats as integers that sort like them: their maximum is a vector instruction and NaN needs no care. A NaN
    has a magnitude above infinity's. Its sign does not matter: x86 gives inf - inf a negative one.
    """
    begin, end = partition(tokens, worker, n_workers, 1)
    for t in range(begin, end):
        bits = x[t].view(np.int32)
        largest, magnitude = np.int32(-0x80000000), np.int32(0)
        for i in range(bits.shape[0]):
            largest = max(largest, sortable(bits[i]))
            magnitude = max(magnitude, bits[i] & np.int32(0x7FFFFFFF))
        index = 0
        while sortable(bits[index]) != largest:
            index += 1
        out[t] = -1 if magnitude > 0x7F800000 else index


# Kernels of the ops that fusion passes build


@device
def add_columns(residual, out, begin, end, tokens):
    """out += residual in columns [begin, end)."""
    for t in range(tokens):
        o, x = out[t, begin:end], residual[t, begin:end]
        for k in range(o.shape[0]):
            o[k] += x[k]


def linear_add(worker, n_workers, tokens, x, weight, residual, out, dequant_buffer):
    begin, end = matmul(weight, x, out, worker, n_workers, tokens, dequant_buffer)
    add_columns(residual, out, begin, end, tokens)


def linear_add_int8(worker, n_workers, tokens, xq, xs, weight, residual, out):
    begin, end = matmul_int8(weight, xq, xs, out, worker, n_workers, tokens)
    add_columns(residual, out, begin, end, tokens)


def qkv(worker, n_workers, tokens, x, wq, wk, wv, q, k, v, dequant_buffer):
    matmul(wq, x, q, worker, n_workers, tokens, dequant_buffer)
    matmul(wk, x, k, worker, n_workers, tokens, dequant_buffer)
    matmul(wv, x, v, worker, n_workers, tokens, dequant_buffer)


def qkv_int8(worker, n_workers, tokens, xq, xs, wq, wk, wv, q, k, v):
    matmul_int8(wq, xq, xs, q, worker, n_workers, tokens)
    matmul_int8(wk, xq, xs, k, worker, n_workers, tokens)
    matmul_int8(wv, xq, xs, v, worker, n_workers, tokens)


def gate_up(worker, n_workers, tokens, x, w1, w3, out, gate_buffer, dequant_buffer):
    begin, end = matmul(w1, x, gate_buffer, worker, n_workers, tokens, dequant_buffer)
    matmul(w3, x, out, worker, n_workers, tokens, dequant_buffer)
    multiply_by_silu(gate_buffer, out, begin, end, tokens)


def gate_up_int8(worker, n_workers, tokens, xq, xs, w1, w3, out, gate_buffer):
    begin, end = matmul_int8(w1, xq, xs, gate_buffer, worker, n_workers, tokens)
    matmul_int8(w3, xq, xs, out, worker, n_workers, tokens)
    multiply_by_silu(gate_buffer, out, begin, end, tokens)


@device
def normalize_all(x, weight, eps, out, tokens):
    """RMSNorm of all tokens. Every worker computes all of it: that takes less time than waiting at a barrier."""
    for t in range(tokens):
        normalize(x, weight, eps, out, t)


def norm_linear(worker, n_workers, tokens, x, norm, weight, out, eps, normed, dequant_buffer):
    normalize_all(x, norm, eps, normed[worker], tokens)
    matmul(weight, normed[worker], out, worker, n_workers, tokens, dequant_buffer)


def norm_qkv(worker, n_workers, tokens, x, norm, wq, wk, wv, q, k, v, eps, normed, dequant_buffer):
    normalize_all(x, norm, eps, normed[worker], tokens)
    matmul(wq, normed[worker], q, worker, n_workers, tokens, dequant_buffer)
    matmul(wk, normed[worker], k, worker, n_workers, tokens, dequant_buffer)
    matmul(wv, normed[worker], v, worker, n_workers, tokens, dequant_buffer)


def norm_gate_up(worker, n_workers, tokens, x, norm, w1, w3, out, eps, normed, gate_buffer, dequant_buffer):
    normalize_all(x, norm, eps, normed[worker], tokens)
    begin, end = matmul(w1, normed[worker], gate_buffer, worker, n_workers, tokens, dequant_buffer)
    matmul(w3, normed[worker], out, worker, n_workers, tokens, dequant_buffer)
    multiply_by_silu(gate_buffer, out, begin, end, tokens)


def rope_kv_write(
    worker, n_workers, tokens, q, angles, k, k_cache, positions, sequences, page_table, v, v_cache, out, head_dim,
    interleaved,
):  # fmt: skip
    """Write RoPE of the queries to `out`, RoPE of the keys to the key cache and the values to the value cache."""
    heads, kv_heads = q.shape[1] // head_dim, k_cache.shape[1]
    begin, end = partition(tokens * heads, worker, n_workers, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        d = h * head_dim
        apply_rope(q[t, d : d + head_dim], angles[t], interleaved, out[t, d : d + head_dim])
        if h < kv_heads:
            place = kv_index(page_table, sequences[t], h, positions[t], k_cache.shape[2])
            apply_rope(k[t, d : d + head_dim], angles[t], interleaved, k_cache[place][0])
            store_row(v_cache, place, v, t, d)


@device
def head_scores(q, at, heads, k_cache, page_table, sequence, kv_head, first, end, scale, v_cache, scores):
    """scores[h, i] = query of head h · key · scale, with the key of position first + i, for positions [first, end).

    The queries of `heads` heads lie one after the other in flat q from `at` on. All attend to one KV head. What is read
    next is prefetched: keys, in the end the first values.
    """
    position, (_, page, head_dim) = first, kv_shape(k_cache)
    while position < end:
        keys = kv_rows(k_cache, kv_index(page_table, sequence, kv_head, position, page))
        count = min(row_count(keys), end - position)
        if position + count < end:
            following = kv_index(page_table, sequence, kv_head, position + count, page)
            ahead, size = memory_of(kv_rows(k_cache, following))
        else:
            ahead, size = memory_of(kv_rows(v_cache, kv_index(page_table, sequence, kv_head, first, page)))
        page_scores(q, at, heads, head_dim, keys, count, scale, scores, position - first, ahead, size)
        position += count


@device
def head_values(weights, heads, v_cache, page_table, sequence, kv_head, first, end, out, at):
    """out of head h = sum of weights[h, i] · value, with the value of position first + i. Heads are as above."""
    position, (_, page, head_dim) = first, kv_shape(v_cache)
    while position < end:
        values = kv_rows(v_cache, kv_index(page_table, sequence, kv_head, position, page))
        count, ahead, size = min(row_count(values), end - position), 0, 0
        if position + count < end:
            following = kv_index(page_table, sequence, kv_head, position + count, page)
            ahead, size = memory_of(kv_rows(v_cache, following))
        page_values(weights, position - first, heads, head_dim, values, count, out, at, ahead, size)
        position += count


@device
def attend(t, h, heads, q, k_cache, positions, sequences, page_table, v_cache, out, window, scores):
    """Attention of heads [h, h + heads) of token t, which attend to one KV head."""
    kv_heads, _, head_dim = kv_shape(k_cache)
    kv_head, scale, at = h * kv_heads * head_dim // q.shape[1], np.float32(1 / math.sqrt(head_dim)), h * head_dim
    first, end, sequence = first_visible(positions[t], window), positions[t] + 1, sequences[t]
    if head_dim % LANES != 0:
        for d in range(at, at + heads * head_dim, head_dim):
            query, result = q[t, d : d + head_dim], out[t, d : d + head_dim]
            attend_keys(query, k_cache, page_table, sequence, kv_head, first, end, scale, scores[0])
            softmax_in_place(scores[0], end - first)
            attend_values(scores[0], v_cache, page_table, sequence, kv_head, first, end, result)
        return
    flat = t * q.shape[1] + at
    head_scores(q, flat, heads, k_cache, page_table, sequence, kv_head, first, end, scale, v_cache, scores)
    for row in range(heads):
        softmax_in_place(scores[row], end - first)
    out[t, at : at + heads * head_dim] = 0
    head_values(scores, heads, v_cache, page_table, sequence, kv_head, first, end, out, flat)


def attention(worker, n_workers, tokens, q, k_cache, positions, sequences, page_table, v_cache, out, window, scores):
    """Workers take up to SCORE_HEADS heads of a token in turn, if they share keys and values: later tokens see more.

    Of one token a worker takes some of the heads. With more workers than that takes, a head at a time.
    """
    kv_heads, _, head_dim = kv_shape(k_cache)
    heads = q.shape[1] // head_dim
    group, own = heads // kv_heads, scores[worker]
    parts = (group + SCORE_HEADS - 1) // SCORE_HEADS
    together, single = tokens > 1 and tokens * kv_heads * parts >= n_workers, n_workers > heads
    begin, end = partition(heads, worker, n_workers, 1)
    if together or single:
        unit, step, units = worker, n_workers, tokens * (kv_heads * parts if together else heads)
    else:  # a unit is a head of a token; up to SCORE_HEADS units are computed at once
        unit, step, units = 0, 1, tokens * (end - begin)
    while unit < units:  # one call of `attend` in the source: each would be compiled by itself
        count = 1
        if together:
            t, place = divmod(unit, kv_heads * parts)
            kv_head, part = divmod(place, parts)
            h, count = kv_head * group + part * SCORE_HEADS, min(SCORE_HEADS, group - part * SCORE_HEADS)
        elif single:
            t, h = divmod(unit, heads)
        else:
            t, h = divmod(unit, end - begin)
            h += begin
            count = step = min(SCORE_HEADS, end - h, group - h % group)
        attend(t, h, count, q, k_cache, positions, sequences, page_table, v_cache, out, window, own)
        unit += step
