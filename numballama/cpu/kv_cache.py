"""The KV cache in memory, as kernels of the CPU write and read it.

A cache [pages, kv_heads, page, head_dim] is an array of float32, float16 or bfloat16, or a pair for q8_0: int8 quants
in this shape, and a float16 scale for each block of 32 of them along head_dim; the last may be shorter. Only this file
tells them apart. `place` is an index of `kernels_cpu.kv_index`: rows of one page and head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .compiler import FAST_MATH, exact_device
from .intrinsics import FLOAT, add_lanes, as_f32, load_block, saturate_to

BLOCK = 32
"""Elements that share a scale."""
INT8_MAX = np.float32(127)
MIN_LARGEST = np.float32(2.0**-120)
"""A block whose largest magnitude is smaller becomes zeros: the reciprocal of its scale might not be finite."""
ROUNDER = np.float32(1.5 * 2.0**23)
_OPTIONS = {"fastmath": FAST_MATH, "error_model": "numpy"}


@intrinsic  # type: ignore[untyped-decorator]
def dot_quants(typingctx: Any, quants: Any, i: Any, x: Any, j: Any) -> Any:
    """Dot product of 32 int8 quants from flat index i and 32 float32 of x from j."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        w = builder.sitofp(load_block(context, builder, sig.args[0], *args[:2]), ir.VectorType(FLOAT, BLOCK))
        v = load_block(context, builder, sig.args[2], *args[2:])
        return add_lanes(builder, builder.fmul(w, v))

    return types.float32(quants, types.int64, x, types.int64), codegen


def kv_shape(cache: Any) -> Any:
    """(kv_heads, page, head_dim) of a cache."""


@overload(kv_shape, jit_options=_OPTIONS)
def _kv_shape(cache):
    if isinstance(cache, types.BaseTuple):
        return lambda cache: (cache[0].shape[1], cache[0].shape[2], cache[0].shape[3])
    return lambda cache: (cache.shape[1], cache.shape[2], cache.shape[3])


def kv_rows(cache: Any, place: Any) -> Any:
    """The rows of one head at `place`: an array [rows, head_dim], or (quants, scales)."""


@overload(kv_rows, jit_options=_OPTIONS)
def _kv_rows(cache, place):
    if isinstance(cache, types.BaseTuple):
        return lambda cache, place: (cache[0][place], cache[1][place])
    return lambda cache, place: cache[place]


def row_count(rows: Any) -> Any:
    """Number of the rows that `kv_rows` returned."""


@overload(row_count, jit_options=_OPTIONS)
def _row_count(rows):
    if isinstance(rows, types.BaseTuple):
        return lambda rows: rows[0].shape[0]
    return lambda rows: rows.shape[0]


def store_row(cache: Any, place: Any, x: Any, t: int, first: int) -> Any:
    """Write x[t, first], x[t, first + 1] … to the first row at `place`, in the cache's type."""


@overload(store_row, jit_options=_OPTIONS)
def _store_row(cache, place, x, t, first):
    return _quantize_row if isinstance(cache, types.BaseTuple) else _round_row


def _round_row(cache, place, x, t, first):
    row = cache[place][0]
    for d in range(row.shape[0]):
        row[d] = saturate_to(row[d], x[t, first + d])


def _quantize_row(cache, place, x, t, first):
    quants, scales = cache[0][place][0], cache[1][place][0]
    for block in range(scales.shape[0]):
        begin = BLOCK * block
        end = min(begin + BLOCK, quants.shape[0])
        scales[block] = quantize_block(x[t, first + begin : first + end], quants[begin:end], scales[block])


@exact_device
def quantize_block(x, quants, like):
    """Quantise a block as ggml's quantize_row_q8_0. Returns its scale as float16, the type of `like`.

    int8 has no NaN: a block with NaN or infinity gets the scale NaN, which carries it to the logits.
    """
    largest, not_finite = np.float32(0), False
    for d in range(x.shape[0]):
        largest = max(largest, abs(x[d]))
        not_finite |= not abs(x[d]) < np.float32(np.inf)
    factor = np.float32(0) if not_finite or largest < MIN_LARGEST else INT8_MAX / largest
    for d in range(x.shape[0]):
        # adding 1.5 · 2^23 rounds to an integer, ties to even
        quants[d] = np.int8((x[d] * factor + ROUNDER) - ROUNDER) if factor > 0 else np.int8(0)
    return saturate_to(like, np.float32(np.nan) if not_finite else largest / INT8_MAX)


def qk_dot(q: Any, keys: Any, length: int, scale: Any, scores: Any) -> Any:
    """scores[i] = q · keys[i] · scale for i < length, of one head."""


@overload(qk_dot, jit_options=_OPTIONS)
def _qk_dot(q, keys, length, scale, scores):
    return _qk_dot_quants if isinstance(keys, types.BaseTuple) else _qk_dot_floats


def _qk_dot_floats(q, keys, length, scale, scores):
    for i in range(length):
        total = np.float32(0)
        for d in range(q.shape[0]):
            total += q[d] * as_f32(keys[i, d])
        scores[i] = total * scale


def _qk_dot_quants(q, keys, length, scale, scores):
    quants, scales = keys
    n = quants.shape[1]
    whole = n // BLOCK
    for i in range(length):
        total = np.float32(0)
        for block in range(whole):
            at = BLOCK * block
            total += dot_quants(quants, i * n + at, q, at) * as_f32(scales[i, block])
        rest = np.float32(0)
        for d in range(BLOCK * whole, n):
            rest += np.float32(quants[i, d]) * q[d]
        if n > BLOCK * whole:
            total += rest * as_f32(scales[i, whole])
        scores[i] = total * scale


def add_weighted(weights: Any, values: Any, length: int, out: Any) -> Any:
    """out += sum over i < length of weights[i] · values[i], of one head."""


@overload(add_weighted, jit_options=_OPTIONS)
def _add_weighted(weights, values, length, out):
    return _add_weighted_quants if isinstance(values, types.BaseTuple) else _add_weighted_floats


def _add_weighted_floats(weights, values, length, out):
    i = 0
    while i + 4 <= length:  # four positions a pass: a quarter of the loads and stores of `out`
        w0, w1, w2, w3 = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        for d in range(out.shape[0]):
            out[d] += (w0 * as_f32(values[i, d]) + w1 * as_f32(values[i + 1, d])) + (
                w2 * as_f32(values[i + 2, d]) + w3 * as_f32(values[i + 3, d])
            )
        i += 4
    for rest in range(i, length):
        for d in range(out.shape[0]):
            out[d] += weights[rest] * as_f32(values[rest, d])


def _add_weighted_quants(weights, values, length, out):
    quants, scales = values
    for i in range(length):
        for block in range(scales.shape[1]):
            factor = weights[i] * as_f32(scales[i, block])
            begin, end = BLOCK * block, min(BLOCK * block + BLOCK, out.shape[0])
            o, v = out[begin:end], quants[i, begin:end]
            for d in range(o.shape[0]):
                o[d] += factor * np.float32(v[d])
