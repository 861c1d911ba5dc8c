"""Rows of a weight times rows of activations, for every type of weight: what nearly all time and all bytes go into.

What a weight is: float32[N, K]; uint16[N, K] for float16; int16[N, K] for bfloat16; records [N, blocks of a row] for
GGUF's block types (see `blocks_cpu`); or (int8[N, K], float32 scales, group), number i of the flat payload having scale
i // group. `row_dot` and `decode_rows` are the only functions that tell them apart: a new kind of weight is one more
branch in each, a new block type a decoder in `blocks_cpu`.

Decoding reads every weight once and little else: the floor of a token is the bytes of the weights over the machine's
bandwidth. A prompt's chunk reuses each row for all its tokens: tiles of 4 rows x 4 tokens keep 16 sums in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from .compiler import FAST_MATH, device
from .intrinsics import BLOCK, as_f32, dot_block_int8, dot_int8, tile
from .vecdot import decode_blocks, dot_blocks

TILE = 4
_OPTIONS = {"fastmath": FAST_MATH, "error_model": "numpy"}


@device
def share(n, part, parts, grain):
    """[begin, end) of n items that `part` of `parts` does, in whole grains."""
    grains = (n + grain - 1) // grain
    begin, end = grains * part // parts * grain, grains * (part + 1) // parts * grain
    return min(begin, n), min(end, n)


def row_dot(weight: Any, row: int, x: Any, t: int) -> Any:
    """weight[row] · x[t]. x is float32[T, K], or (int8[T, K], float32 scales[T, G]) with the weight's groups."""


@overload(row_dot, jit_options=_OPTIONS)
def _row_dot(weight, row, x, t):
    if not isinstance(weight, types.BaseTuple):
        return _dot_blocks if isinstance(weight.dtype, types.Record) else _dot_plain
    return _dot_int8_int8 if isinstance(x, types.BaseTuple) else _dot_int8


def _dot_plain(weight, row, x, t):
    total = np.float32(0)
    for k in range(weight.shape[1]):
        total += as_f32(weight[row, k]) * x[t, k]
    return total


def _dot_blocks(weight, row, x, t):
    return dot_blocks(weight, row * weight.shape[1], x, t * x.shape[1], weight.shape[1])


def _dot_int8(weight, row, x, t):
    payload, scales, group = weight
    n = payload.shape[1]
    if n % BLOCK == 0 and group % BLOCK == 0:
        # groups run over the flat payload and may begin inside a row, but they consist of whole blocks
        first = row * n // BLOCK
        period = group // BLOCK
        return dot_int8(
            payload, row * n, scales, first // period, period - first % period, period, x, t * n, n // BLOCK
        )
    start, total = row * n, np.float32(0)
    k = 0
    while k < n:
        g = (start + k) // group
        end = min(n, (g + 1) * group - start)
        part = np.float32(0)
        for j in range(k, end):
            part += np.float32(payload[row, j]) * x[t, j]
        total += part * scales[g]
        k = end
    return total


def _dot_int8_int8(weight, row, x, t):
    payload, scales, group = weight
    xq, xs = x
    n = payload.shape[1]
    if n % BLOCK == 0 and group % BLOCK == 0:
        return dot_blocks_int8(payload, scales, group, row, xq, xs, t)
    start, total = row * n, np.float32(0)
    k = 0
    while k < n:  # both scales are constant up to the nearer end of the weight's and the input's group
        g = (start + k) // group
        end = min(n, (g + 1) * group - start, (k // group + 1) * group)
        part = np.int32(0)
        for j in range(k, end):
            part += np.int32(payload[row, j]) * np.int32(xq[t, j])
        total += np.float32(part) * (scales[g] * xs[t, k // group])
        k = end
    return total


@device
def dot_blocks_int8(payload, scales, group, row, xq, xs, t):
    """A row whose groups consist of whole blocks, as do those of its int8 input, which begin at that row's start."""
    n = payload.shape[1]
    start, total = row * n, np.float32(0)
    g, x_g = start // group, 0
    border, x_border = (g + 1) * group - start, group
    for k in range(0, n, BLOCK):
        if k >= border:
            g += 1
            border += group
        if k >= x_border:
            x_g += 1
            x_border += group
        total += np.float32(dot_block_int8(payload, start + k, xq, t * n + k)) * (scales[g] * xs[t, x_g])
    return total


def decode_rows(weight: Any, row: int, count: int, buffer: Any) -> Any:
    """Write rows [row, row + count) of a weight as float32 to `buffer`[>= count, K].

    Float32 rows are copied too: in a file they lie at any multiple of four bytes, and vectors that cross cache lines
    cost a quarter of a prompt's speed.
    """


@overload(decode_rows, jit_options=_OPTIONS)
def _decode_rows(weight, row, count, buffer):
    if isinstance(weight, types.BaseTuple):
        return _decode_int8
    return _decode_blocks if isinstance(weight.dtype, types.Record) else _decode_plain


def _decode_plain(weight, row, count, buffer):
    for r in range(count):
        for k in range(weight.shape[1]):
            buffer[r, k] = as_f32(weight[row + r, k])


def _decode_blocks(weight, row, count, buffer):
    for r in range(count):
        decode_blocks(weight, (row + r) * weight.shape[1], buffer, r * buffer.shape[1], weight.shape[1])


def _decode_int8(weight, row, count, buffer):
    payload, scales, group = weight
    n = payload.shape[1]
    for r in range(count):
        start = (row + r) * n
        k = 0
        while k < n:
            g = (start + k) // group
            end = min(n, (g + 1) * group - start)
            numbers, into = payload[row + r, k:end], buffer[r, k:end]
            for j in range(numbers.shape[0]):
                into[j] = np.float32(numbers[j]) * scales[g]
            k = end


@device
def multiply(weight, x, out, begin, end, tokens, buffer):
    """out[t, r] = weight[r] · x[t] for rows [begin, end) and all tokens."""
    if tokens < TILE:
        for r in range(begin, end):
            for t in range(tokens):
                out[t, r] = row_dot(weight, r, x, t)
        return
    for r in range(begin, end, TILE):
        decode_rows(weight, r, min(TILE, end - r), buffer)
        # past the end the last row and token are done again: the same numbers to the same place, and no remainder loops
        r1, r2, r3 = min(r + 1, end - 1), min(r + 2, end - 1), min(r + 3, end - 1)
        for t in range(0, tokens, TILE):
            t1, t2, t3 = min(t + 1, tokens - 1), min(t + 2, tokens - 1), min(t + 3, tokens - 1)
            a, b, c, d = tile(buffer, 0, r1 - r, r2 - r, r3 - r, x, t, t1, t2, t3, x.shape[1])
            out[t, r], out[t, r1], out[t, r2], out[t, r3] = a
            out[t1, r], out[t1, r1], out[t1, r2], out[t1, r3] = b
            out[t2, r], out[t2, r1], out[t2, r2], out[t2, r3] = c
            out[t3, r], out[t3, r1], out[t3, r2], out[t3, r3] = d


@device
def multiply_int8(weight, xq, xs, out, begin, end, tokens):
    """out[t, r] = weight[r] · (xq[t] · xs[t]): a row stays in the nearest cache for all tokens."""
    x = (xq, xs)
    for r in range(begin, end):
        for t in range(tokens):
            out[t, r] = row_dot(weight, r, x, t)


@device
def project(weight, x, out, part, parts, tokens, rows):
    """This part's share of a linear layer; returns the columns of `out` that it wrote."""
    begin, end = share(out.shape[1], part, parts, TILE)
    multiply(weight, x, out, begin, end, tokens, rows[part])
    return begin, end


@device
def project_int8(weight, xq, xs, out, part, parts, tokens):
    """The same with int8 activations."""
    begin, end = share(out.shape[1], part, parts, TILE)
    multiply_int8(weight, xq, xs, out, begin, end, tokens)
    return begin, end
