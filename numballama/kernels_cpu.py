"""Every operator on the CPU: arrays and scalars in, arrays out.

A kernel does part `part` of `parts` of its op for the first `tokens` tokens; all parts together do the whole, and
they run at once, so each writes its own share and reads nothing that another part of the same step writes. After the
inputs and outputs come the op's attributes and scratch arrays, by name. Shapes: T tokens at most, D the model's
width, K and N a weight's columns and rows, S sequences, C the cache's length.
"""

from __future__ import annotations

import math

import numpy as np

from .cpu.compiler import device, ordered_device
from .cpu.intrinsics import as_f32, f32_to, power_of_two
from .cpu.matmul import TILE, decode_rows, project, project_int8, share
from .quantization.types import KV_TYPES as CACHE
from .quantization.types import LINEAR_TYPES as LINEAR
from .registry import kernel


@device
def normalise(x, weight, eps, out, t):
    """out[t] = x[t] / sqrt(mean(x[t]²) + eps) · weight (Zhang and Sennrich, RMSNorm, 2019)."""
    n = x.shape[1]
    squares = np.float32(0)
    for k in range(n):
        squares += x[t, k] * x[t, k]
    scale = np.float32(1 / math.sqrt(squares / n + eps))
    for k in range(n):
        out[t, k] = x[t, k] * scale * weight[k]


SMALLEST, LARGEST = np.float32(-86.5), np.float32(88.72)
"""Where `exp` ends: below it gives 0, above infinity."""


@ordered_device
def exp(x):
    """e^x in float32 to 1.03 units in the last place, in operations that a compiler makes vectors of.

    x = n ln 2 + r, a polynomial for e^r with r within ±ln 2 / 2, and n into the exponent (Moshier, Cephes, 1989). In
    this order: in another, the two parts of ln 2 would be one, and r lose its last digits.
    """
    y = np.float32(min(max(x, SMALLEST), LARGEST))
    n = np.float32(math.floor(y * np.float32(1.44269504) + np.float32(0.5)))
    r = y - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    value = (p * r * r + r + np.float32(1)) * power_of_two(np.int32(n) - np.int32(1)) * np.float32(2)
    value = np.float32(0) if x < SMALLEST else np.float32(np.inf) if x > LARGEST else value
    return x if x != x else value


@device
def silu_times(gate, out, begin, end, tokens):
    """out · gate · sigmoid(gate), into `out`, which holds `up`, in columns [begin, end) (Shazeer, GLU Variants, 2020).

    Over slices, counted from 0: an index that might be negative, for all that Numba knows, keeps LLVM from vectors.
    """
    one = np.float32(1)
    for t in range(tokens):
        g, o = gate[t, begin:end], out[t, begin:end]
        for k in range(g.shape[0]):
            o[k] *= g[k] / (one + exp(-g[k]))


# Kernels of the ops as the graph declares them.


@kernel("embedding", "cpu", "i32", LINEAR)
def embedding(part, parts, tokens, ids, table, out):
    begin, end = share(tokens, part, parts, 1)
    for t in range(begin, end):
        decode_rows(table, ids[t], 1, out[t : t + 1])


@kernel("rope_angles", "cpu", "i32", "f32")
def rope_angles(part, parts, tokens, positions, frequencies, out):
    """In float64: at position 100,000 a float32 angle would be off by 0.004."""
    pairs = frequencies.shape[0]
    begin, end = share(tokens, part, parts, 1)
    for t in range(begin, end):
        for i in range(pairs):
            angle = float(positions[t]) * frequencies[i]
            out[t, i] = math.cos(angle)
            out[t, pairs + i] = math.sin(angle)


@kernel("rmsnorm", "cpu", "f32", "f32")
def rmsnorm(part, parts, tokens, x, weight, out, eps):
    begin, end = share(tokens, part, parts, 1)
    for t in range(begin, end):
        normalise(x, weight, eps, out, t)


@kernel("head_norm", "cpu", "f32", "f32")
def head_norm(part, parts, tokens, x, weight, out, eps):
    head_dim = weight.shape[0]
    heads = x.shape[1] // head_dim
    begin, end = share(tokens * heads, part, parts, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        d = h * head_dim
        normalise(x[t : t + 1, d : d + head_dim], weight, eps, out[t : t + 1, d : d + head_dim], 0)


@kernel("quantize", "cpu", "f32")
def quantize(part, parts, tokens, x, out, scales, group):
    """Scale max|x| / 127 for each group, numbers rounded half away from zero, as llama2.c's runq does."""
    n = x.shape[1]
    begin, end = share(tokens * scales.shape[1], part, parts, 1)
    for unit in range(begin, end):
        t, g = divmod(unit, scales.shape[1])
        first, last = g * group, min(n, (g + 1) * group)
        numbers, into = x[t, first:last], out[t, first:last]
        largest, broken = np.float32(0), False
        for k in range(numbers.shape[0]):
            largest = max(largest, abs(numbers[k]))
            broken |= not abs(numbers[k]) < np.float32(np.inf)
        # a NaN must show in the logits, and int8 has none: its group's scale carries it
        scale = np.float32(np.nan) if broken else largest / np.float32(127)
        scales[t, g] = scale
        for k in range(numbers.shape[0]):
            ratio = numbers[k] / scale if scale > 0 else np.float32(0)
            into[k] = np.int8(math.floor(abs(ratio) + np.float32(0.5)) * (1 if ratio >= 0 else -1))


@kernel("linear", "cpu", "f32", LINEAR, rows=lambda x, w, workers: (workers, TILE, w[1]))
def linear(part, parts, tokens, x, weight, out, rows):
    project(weight, x, out, part, parts, tokens, rows)


@kernel("linear", "cpu", "i8", "f32", "int8")
def linear_int8(part, parts, tokens, xq, xs, weight, out):
    project_int8(weight, xq, xs, out, part, parts, tokens)


@kernel("bias", "cpu", "f32", "f32")
def bias(part, parts, tokens, x, weight, out):
    begin, end = share(out.shape[1], part, parts, 16)
    for t in range(tokens):
        for k in range(begin, end):
            out[t, k] = x[t, k] + weight[k]


@device
def turn(x, angles, interleaved, out):
    """RoPE of one head: pair i of x turned by the angle with cosine angles[i] and sine angles[pairs + i]."""
    pairs = x.shape[0] // 2
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        cos, sin = angles[i], angles[pairs + i]
        out[a] = f32_to(out[a], x[a] * cos - x[b] * sin)
        out[b] = f32_to(out[b], x[a] * sin + x[b] * cos)


@kernel("rope", "cpu", "f32", "f32")
def rope(part, parts, tokens, x, angles, out, head_dim, interleaved):
    heads = x.shape[1] // head_dim
    begin, end = share(tokens * heads, part, parts, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        d = h * head_dim
        turn(x[t, d : d + head_dim], angles[t], interleaved, out[t, d : d + head_dim])


@kernel("kv_write", "cpu", "f32", CACHE, "i32", "i32")
def kv_write(part, parts, tokens, x, cache, positions, sequences):
    heads, head_dim = cache.shape[1], cache.shape[3]
    begin, end = share(tokens * heads, part, parts, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        row = cache[sequences[t], h, positions[t]]
        for d in range(head_dim):
            row[d] = f32_to(row[d], x[t, h * head_dim + d])


@device
def first_seen(position, window):
    """The first position that a token sees: `window` positions in all, itself included; all if that is 0."""
    return max(position + 1 - window, 0) if window > 0 else 0


@device
def score(q, cache, length, scale, scores):
    """scores[p] = q · cache[p] · scale for positions p < length, of one head."""
    for p in range(length):
        total = np.float32(0)
        for d in range(q.shape[0]):
            total += q[d] * as_f32(cache[p, d])
        scores[p] = total * scale


@device
def softmax_in_place(x, length):
    """exp(x) / sum(exp(x)) of the first `length` numbers, shifted by their maximum so that no exponential overflows."""
    largest = np.float32(-np.inf)
    for i in range(length):
        largest = max(largest, x[i])
    total = np.float32(0)
    for i in range(length):
        x[i] = exp(x[i] - largest)
        total += x[i]
    for i in range(length):
        x[i] /= total


@device
def weigh(weights, cache, length, out):
    """out = sum over positions p < length of weights[p] · cache[p], of one head."""
    for d in range(out.shape[0]):
        out[d] = 0
    p = 0
    while p + 4 <= length:  # four positions a pass: a quarter of the loads and stores of `out`
        w0, w1, w2, w3 = weights[p], weights[p + 1], weights[p + 2], weights[p + 3]
        for d in range(out.shape[0]):
            out[d] += (w0 * as_f32(cache[p, d]) + w1 * as_f32(cache[p + 1, d])) + (
                w2 * as_f32(cache[p + 2, d]) + w3 * as_f32(cache[p + 3, d])
            )
        p += 4
    for rest in range(p, length):
        for d in range(out.shape[0]):
            out[d] += weights[rest] * as_f32(cache[rest, d])


@kernel("attention_scores", "cpu", "f32", CACHE, "i32", "i32")
def attention_scores(part, parts, tokens, q, k_cache, positions, sequences, out, window):
    head_dim, heads = k_cache.shape[3], out.shape[1]
    shared = heads // k_cache.shape[1]
    begin, end = share(tokens * heads, part, parts, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        first, end_seen, scale = first_seen(positions[t], window), positions[t] + 1, np.float32(1 / math.sqrt(head_dim))
        keys = k_cache[sequences[t], h // shared, first:]
        score(q[t, h * head_dim : (h + 1) * head_dim], keys, end_seen - first, scale, out[t, h, first:])
        out[t, h, :first] = -np.inf
        out[t, h, end_seen:] = -np.inf


@kernel("softmax", "cpu", "f32")
def softmax(part, parts, tokens, x, out):
    begin, end = share(tokens * x.shape[1], part, parts, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, x.shape[1])
        for i in range(x.shape[2]):
            out[t, h, i] = x[t, h, i]
        softmax_in_place(out[t, h], x.shape[2])


@kernel("attention_values", "cpu", "f32", CACHE, "i32", "i32")
def attention_values(part, parts, tokens, weights, v_cache, positions, sequences, out, window):
    head_dim, heads = v_cache.shape[3], weights.shape[1]
    shared = heads // v_cache.shape[1]
    begin, end = share(tokens * heads, part, parts, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        first = first_seen(positions[t], window)
        values, length = v_cache[sequences[t], h // shared, first:], positions[t] + 1 - first
        weigh(weights[t, h, first:], values, length, out[t, h * head_dim : (h + 1) * head_dim])


@kernel("swiglu", "cpu", "f32", "f32")
def swiglu(part, parts, tokens, gate, up, out):
    begin, end = share(out.shape[1], part, parts, 16)
    for t in range(tokens):
        for k in range(begin, end):
            out[t, k] = up[t, k]
    silu_times(gate, out, begin, end, tokens)


@kernel("add", "cpu", "f32", "f32")
def add(part, parts, tokens, a, b, out):
    begin, end = share(out.shape[1], part, parts, 16)
    for t in range(tokens):
        for k in range(begin, end):
            out[t, k] = a[t, k] + b[t, k]


@kernel("last", "cpu", "f32")
def last(part, parts, tokens, x, out):
    begin, end = share(out.shape[1], part, parts, 16)
    for k in range(begin, end):
        out[0, k] = x[tokens - 1, k]


@device
def sortable(bits):
    """An int32 that sorts as the float32 with these bits does; both zeros are 0."""
    sign = bits >> np.int32(31)
    return ((bits & np.int32(0x7FFFFFFF)) ^ sign) - sign


@kernel("argmax", "cpu", "f32")
def argmax(part, parts, tokens, x, out):
    """The first index of each row's largest number; -1 for a row with a NaN.

    Floats are compared as integers that sort like them, for which the compiler has a vector maximum whatever NaN
    means. A NaN is what has more than infinity's bits, whatever its sign: x86 makes those of inf - inf negative.
    """
    begin, end = share(tokens, part, parts, 1)
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


# Kernels of the ops that the fusion passes build.


@device
def add_columns(residual, out, begin, end, tokens):
    """out += residual in columns [begin, end)."""
    for t in range(tokens):
        o, x = out[t, begin:end], residual[t, begin:end]
        for k in range(o.shape[0]):
            o[k] += x[k]


@kernel("linear_add", "cpu", "f32", LINEAR, "f32", rows=lambda x, w, residual, workers: (workers, TILE, w[1]))
def linear_add(part, parts, tokens, x, weight, residual, out, rows):
    begin, end = project(weight, x, out, part, parts, tokens, rows)
    add_columns(residual, out, begin, end, tokens)


@kernel("linear_add", "cpu", "i8", "f32", "int8", "f32")
def linear_add_int8(part, parts, tokens, xq, xs, weight, residual, out):
    begin, end = project_int8(weight, xq, xs, out, part, parts, tokens)
    add_columns(residual, out, begin, end, tokens)


@kernel("qkv", "cpu", "f32", LINEAR, LINEAR, LINEAR, rows=lambda x, q, k, v, workers: (workers, TILE, q[1]))
def qkv(part, parts, tokens, x, wq, wk, wv, q, k, v, rows):
    project(wq, x, q, part, parts, tokens, rows)
    project(wk, x, k, part, parts, tokens, rows)
    project(wv, x, v, part, parts, tokens, rows)


@kernel("qkv", "cpu", "i8", "f32", "int8", "int8", "int8")
def qkv_int8(part, parts, tokens, xq, xs, wq, wk, wv, q, k, v):
    project_int8(wq, xq, xs, q, part, parts, tokens)
    project_int8(wk, xq, xs, k, part, parts, tokens)
    project_int8(wv, xq, xs, v, part, parts, tokens)


@kernel(
    "gate_up",
    "cpu",
    "f32",
    LINEAR,
    LINEAR,
    gate=lambda x, w1, w3, workers: (x[0], w1[0]),
    rows=lambda x, w1, w3, workers: (workers, TILE, w1[1]),
)
def gate_up(part, parts, tokens, x, w1, w3, out, gate, rows):
    begin, end = project(w1, x, gate, part, parts, tokens, rows)
    project(w3, x, out, part, parts, tokens, rows)
    silu_times(gate, out, begin, end, tokens)


@kernel("gate_up", "cpu", "i8", "f32", "int8", "int8", gate=lambda x, xs, w1, w3, workers: (x[0], w1[0]))
def gate_up_int8(part, parts, tokens, xq, xs, w1, w3, out, gate):
    begin, end = project_int8(w1, xq, xs, gate, part, parts, tokens)
    project_int8(w3, xq, xs, out, part, parts, tokens)
    silu_times(gate, out, begin, end, tokens)


@device
def normalise_all(x, weight, eps, out, tokens):
    """Every worker normalises for itself, into its own part of the scratch: less work than waiting for another's."""
    for t in range(tokens):
        normalise(x, weight, eps, out, t)


@kernel(
    "norm_linear",
    "cpu",
    "f32",
    "f32",
    LINEAR,
    h=lambda x, norm, w, workers: (workers, *x),
    rows=lambda x, norm, w, workers: (workers, TILE, w[1]),
)
def norm_linear(part, parts, tokens, x, norm, weight, out, eps, h, rows):
    normalise_all(x, norm, eps, h[part], tokens)
    project(weight, h[part], out, part, parts, tokens, rows)


@kernel(
    "norm_qkv",
    "cpu",
    "f32",
    "f32",
    LINEAR,
    LINEAR,
    LINEAR,
    h=lambda x, norm, q, k, v, workers: (workers, *x),
    rows=lambda x, norm, q, k, v, workers: (workers, TILE, q[1]),
)
def norm_qkv(part, parts, tokens, x, norm, wq, wk, wv, q, k, v, eps, h, rows):
    normalise_all(x, norm, eps, h[part], tokens)
    project(wq, h[part], q, part, parts, tokens, rows)
    project(wk, h[part], k, part, parts, tokens, rows)
    project(wv, h[part], v, part, parts, tokens, rows)


@kernel(
    "norm_gate_up",
    "cpu",
    "f32",
    "f32",
    LINEAR,
    LINEAR,
    h=lambda x, norm, w1, w3, workers: (workers, *x),
    gate=lambda x, norm, w1, w3, workers: (x[0], w1[0]),
    rows=lambda x, norm, w1, w3, workers: (workers, TILE, w1[1]),
)
def norm_gate_up(part, parts, tokens, x, norm, w1, w3, out, eps, h, gate, rows):
    normalise_all(x, norm, eps, h[part], tokens)
    begin, end = project(w1, h[part], gate, part, parts, tokens, rows)
    project(w3, h[part], out, part, parts, tokens, rows)
    silu_times(gate, out, begin, end, tokens)


@kernel("rope_kv_write", "cpu", "f32", "f32", "f32", CACHE, "i32", "i32", "f32", CACHE)
def rope_kv_write(
    part, parts, tokens, q, angles, k, k_cache, positions, sequences, v, v_cache, out, head_dim, interleaved
):
    """Queries are turned into `out`; keys are turned straight into the cache, and values copied."""
    heads, kv_heads = q.shape[1] // head_dim, k_cache.shape[1]
    begin, end = share(tokens * heads, part, parts, 1)
    for unit in range(begin, end):
        t, h = divmod(unit, heads)
        d = h * head_dim
        turn(q[t, d : d + head_dim], angles[t], interleaved, out[t, d : d + head_dim])
        if h < kv_heads:
            turn(k[t, d : d + head_dim], angles[t], interleaved, k_cache[sequences[t], h, positions[t]])
            row = v_cache[sequences[t], h, positions[t]]
            for i in range(head_dim):
                row[i] = f32_to(row[i], v[t, d + i])


@kernel(
    "attention",
    "cpu",
    "f32",
    CACHE,
    "i32",
    "i32",
    CACHE,
    scores=lambda q, k_cache, positions, sequences, v_cache, workers: (workers, k_cache[2]),
)
def attention(part, parts, tokens, q, k_cache, positions, sequences, v_cache, out, window, scores):
    """A head of a token at a time; later tokens see more positions, so units are dealt out like cards."""
    head_dim = k_cache.shape[3]
    heads = q.shape[1] // head_dim
    shared = heads // k_cache.shape[1]
    scale = np.float32(1 / math.sqrt(head_dim))
    for unit in range(part, tokens * heads, parts):
        t, h = divmod(unit, heads)
        s, d, first = sequences[t], h * head_dim, first_seen(positions[t], window)
        length = positions[t] + 1 - first
        score(q[t, d : d + head_dim], k_cache[s, h // shared, first:], length, scale, scores[part])
        softmax_in_place(scores[part], length)
        weigh(scores[part], v_cache[s, h // shared, first:], length, out[t, d : d + head_dim])
