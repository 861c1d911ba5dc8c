"""Matrix products of activations and weights of every type. Nearly all time and memory traffic of a model is here.

Shapes: x is [T, K] and a weight has N rows of K elements; out[t, n] = x[t] · weight[n]. A weight is one of

* float32[N, K]; uint16[N, K], which holds float16; int16[N, K], which holds bfloat16;
* records[N, blocks of a row] of a GGUF block type (see `vecdot`);
* (int8[N, K], float32 scales, group): element i of the flat payload has scale i // group.

Only `row_dot` and `dequantize_rows` tell them apart. A new storage needs a branch in each of these, a new block type a
decoder in `vecdot`.

A single token reads every weight once and little else, so its minimum time is the weights' bytes divided by the memory
bandwidth. A chunk of a prompt uses each row for all its tokens: tiles of 4 rows × 4 tokens keep 16 sums in registers
with AVX-512, panels of 16 rows × 6 tokens keep 12 vectors of sums in the 16 registers of other CPUs (`panel_f32`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from .compiler import FAST_MATH, device
from .intrinsics import BLOCK, as_f32, cpu_features, dot_block_int8, dot_int8, tile
from .panel_bytes import fill_panel_blocks, prefetch_blocks
from .panel_f32 import expand_panel, fill_panel_plain, multiply_panel_f32, transpose_panel
from .tiling import LONG_PANEL, MANY_TOKENS, PANEL_COLUMNS, PANEL_ROWS, TILE
from .vecdot import block_size, dequantize_blocks, dot_blocks

_OPTIONS = {"fastmath": FAST_MATH, "error_model": "numpy"}


@device
def partition(n, worker, n_workers, grain):
    """[begin, end): a worker's share of range(n). It is in multiples of `grain`, except at the end of the range."""
    grains = (n + grain - 1) // grain
    begin, end = grains * worker // n_workers * grain, grains * (worker + 1) // n_workers * grain
    return min(begin, n), min(end, n)


def row_dot(weight: Any, row: int, x: Any, t: int) -> Any:
    """weight[row] · x[t] as float32. x is float32[T, K], or (int8[T, K], float32 scales[T, G]) in the weight's groups.

    Numba replaces this function by one for the types of weight and x (`overload`).
    """


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
        # a group may begin inside a row, because groups divide the flat payload, but it consists of whole blocks
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
        subtotal = np.float32(0)
        for j in range(k, end):
            subtotal += np.float32(payload[row, j]) * x[t, j]
        total += subtotal * scales[g]
        k = end
    return total


def _dot_int8_int8(weight, row, x, t):
    payload, scales, group = weight
    xq, xs = x
    n = payload.shape[1]
    if n % BLOCK == 0 and group % BLOCK == 0:
        return dot_whole_blocks(payload, scales, group, row, xq, xs, t)
    start, total = row * n, np.float32(0)
    k = 0
    while k < n:  # both scales are constant up to the end of the weight's group or of the input's
        g = (start + k) // group
        end = min(n, (g + 1) * group - start, (k // group + 1) * group)
        subtotal = np.int32(0)
        for j in range(k, end):
            subtotal += np.int32(payload[row, j]) * np.int32(xq[t, j])
        total += np.float32(subtotal) * (scales[g] * xs[t, k // group])
        k = end
    return total


@device
def dot_whole_blocks(payload, scales, group, row, xq, xs, t):
    """payload[row] · xq[t] where all groups consist of whole blocks of BLOCK elements.

    The weight's groups divide its flat payload, so one may begin inside the row. Groups of x begin with each row.
    """
    n = payload.shape[1]
    start, total = row * n, np.float32(0)
    g, x_g = start // group, 0
    group_end, x_group_end = (g + 1) * group - start, group
    for k in range(0, n, BLOCK):
        if k >= group_end:
            g += 1
            group_end += group
        if k >= x_group_end:
            x_g += 1
            x_group_end += group
        total += np.float32(dot_block_int8(payload, start + k, xq, t * n + k)) * (scales[g] * xs[t, x_g])
    return total


def dequantize_rows(weight: Any, row: int, count: int, first: int, columns: int, buffer: Any) -> Any:
    """Write columns [first, first + columns) of rows [row, row + count) of a weight to float32 `buffer`[>= count, n].

    Of a block type, columns are whole blocks. Float32 rows are copied too: in a file they are aligned to four bytes
    only, and vector loads that cross cache lines cost a quarter of a prompt's speed.

    Numba replaces this function by one for the weight's type (`overload`).
    """


@overload(dequantize_rows, jit_options=_OPTIONS)
def _dequantize_rows(weight, row, count, first, columns, buffer):
    if isinstance(weight, types.BaseTuple):
        return _dequantize_int8
    return _dequantize_blocks if isinstance(weight.dtype, types.Record) else _dequantize_plain


def _dequantize_plain(weight, row, count, first, columns, buffer):
    for r in range(count):
        source, target = weight[row + r, first : first + columns], buffer[r]
        for k in range(source.shape[0]):
            target[k] = as_f32(source[k])


def _dequantize_blocks(weight, row, count, first, columns, buffer):
    size = block_size(weight)
    for r in range(count):
        start = (row + r) * weight.shape[1] + first // size
        dequantize_blocks(weight, start, buffer, r * buffer.shape[1], columns // size)


def _dequantize_int8(weight, row, count, first, columns, buffer):
    payload, scales, group = weight
    for r in range(count):
        start = (row + r) * payload.shape[1]
        k = first
        while k < first + columns:
            g = (start + k) // group
            end = min(first + columns, (g + 1) * group - start)
            source, target = payload[row + r, k:end], buffer[r, k - first : end - first]
            for j in range(source.shape[0]):
                target[j] = np.float32(source[j]) * scales[g]
            k = end


IN_TILES = cpu_features().get("avx512f", False)
"""Whether the CPU has registers for 16 sums and their operands."""
GRAIN = TILE if IN_TILES else PANEL_ROWS
"""Rows of a weight that a worker takes at a time for TILE and more tokens."""


def multiply_rows(weight: Any, x: Any, out: Any, begin: int, end: int, tokens: int, buffer: Any) -> Any:
    """out[t, r] = weight[r] · x[t] for rows [begin, end) and at least TILE tokens. `buffer` is flat.

    Numba replaces this function by one for the CPU (`overload`).
    """


@overload(multiply_rows, jit_options=_OPTIONS)
def _multiply_rows(weight, x, out, begin, end, tokens, buffer):
    return multiply_tiles if IN_TILES else multiply_panels


def multiply_tiles(weight, x, out, begin, end, tokens, buffer):
    """In tiles of TILE rows and TILE tokens."""
    columns = x.shape[1]
    rows = buffer[: TILE * columns].reshape(TILE, columns)
    for r in range(begin, end, TILE):
        dequantize_rows(weight, r, min(TILE, end - r), 0, columns, rows)
        # past the end, compute the last row and token again: this writes the same values and avoids remainder loops
        r1, r2, r3 = min(r + 1, end - 1), min(r + 2, end - 1), min(r + 3, end - 1)
        for t in range(0, tokens, TILE):
            t1, t2, t3 = min(t + 1, tokens - 1), min(t + 2, tokens - 1), min(t + 3, tokens - 1)
            a, b, c, d = tile(rows, 0, r1 - r, r2 - r, r3 - r, x, t, t1, t2, t3, columns)
            out[t, r], out[t, r1], out[t, r2], out[t, r3] = a
            out[t1, r], out[t1, r1], out[t1, r2], out[t1, r3] = b
            out[t2, r], out[t2, r1], out[t2, r2], out[t2, r3] = c
            out[t3, r], out[t3, r1], out[t3, r2], out[t3, r3] = d


def fill_panel(weight: Any, row: int, end: int, first: int, columns: int, panel: Any, buffer: Any) -> Any:
    """Write columns [first, first + columns) of PANEL_ROWS rows of a weight as a panel; from row `end` on anything.

    `columns` is at most PANEL_COLUMNS. `buffer` is flat, for what is between.
    """


@overload(fill_panel, jit_options=_OPTIONS)
def _fill_panel(weight, row, end, first, columns, panel, buffer):
    if isinstance(weight, types.BaseTuple):
        return _fill_panel_int8
    return _fill_panel_blocks if isinstance(weight.dtype, types.Record) else _fill_panel_plain


def _fill_panel_plain(weight, row, end, first, columns, panel, buffer):
    width = weight.shape[1]
    following = row * width + first + PANEL_COLUMNS
    if first + PANEL_COLUMNS >= width:
        following = (row + PANEL_ROWS) * width
    fill_panel_plain(weight, row, end - 1, first, columns, following, panel)


def _fill_panel_int8(weight, row, end, first, columns, panel, buffer):
    rows = buffer[: PANEL_ROWS * PANEL_COLUMNS].reshape(PANEL_ROWS, PANEL_COLUMNS)
    dequantize_rows(weight, row, min(PANEL_ROWS, end - row), first, columns, rows)
    transpose_panel(rows, columns, panel)


def _fill_panel_blocks(weight, row, end, first, columns, panel, buffer):
    size, quarter = block_size(weight), PANEL_ROWS * PANEL_COLUMNS // 4
    packed, scales, mins = buffer[:quarter], buffer[quarter : 2 * quarter], buffer[2 * quarter :]
    fill_panel_blocks(weight, row, end - 1, first // size, columns // size, packed, scales, mins)
    expand_panel(weight, packed, scales, mins, columns, panel)


def prefetch_panel(weight: Any, row: int, first: int, columns: int, begin: int, end: int, of: int) -> Any:
    """Prefetch parts [begin, end) of `of` parts of what follows a panel of these columns, in the order of memory.

    All of it at once would be more cache lines than a core can wait for.

    Numba replaces this function by one for the weight's type (`overload`).
    """


@overload(prefetch_panel, jit_options=_OPTIONS)
def _prefetch_panel(weight, row, first, columns, begin, end, of):
    if isinstance(weight, types.BaseTuple) or not isinstance(weight.dtype, types.Record):
        return _prefetch_nothing
    return _prefetch_blocks


def _prefetch_nothing(weight, row, first, columns, begin, end, of):
    pass


def _prefetch_blocks(weight, row, first, columns, begin, end, of):
    size = block_size(weight)
    count = columns // size * PANEL_ROWS
    start, stop = count * begin // of, count * end // of
    prefetch_blocks(weight, (row + PANEL_ROWS) * weight.shape[1] + first // size * PANEL_ROWS + start, stop - start)


@device
def copy_sums(source, i, step, target, j, stride, tokens, rows):
    """Copy `rows` numbers of each of some tokens: token t's are at i + t · step, and go to j + t · stride."""
    for t in range(tokens):
        for r in range(rows):
            target[j + t * stride + r] = source[i + t * step + r]


def multiply_panels(weight, x, out, begin, end, tokens, buffer):
    """In panels of PANEL_ROWS rows, for 6 or 4 tokens at a time.

    For few tokens a panel stays in the first-level cache. For many it is read from the second, which keeps up, and a
    pass, whose beginning and end cost more, is longer. It is filled PANEL_COLUMNS columns at a time.
    """
    size = PANEL_ROWS * PANEL_COLUMNS
    panel, rest = buffer[: LONG_PANEL * size], buffer[LONG_PANEL * size :]
    width, results = out.shape[1], out.reshape(-1)
    most = LONG_PANEL * PANEL_COLUMNS if tokens >= MANY_TOKENS else PANEL_COLUMNS
    for r in range(begin, end, PANEL_ROWS):
        count = min(PANEL_ROWS, end - r)
        for k in range(0, x.shape[1], most):
            columns = min(most, x.shape[1] - k)
            for c in range(0, columns, PANEL_COLUMNS):
                fill_panel(weight, r, end, k + c, min(PANEL_COLUMNS, columns - c), panel[c * PANEL_ROWS :], rest)
            step = tokens if count == PANEL_ROWS else 6
            for t in range(0, tokens, step):
                stop, target, at, stride = min(t + step, tokens), results, t * width + r, width
                if count < PANEL_ROWS:  # rows that fill no panel: their sums are in `rest` meanwhile
                    target, at, stride = rest, 0, PANEL_ROWS
                    copy_sums(results, t * width + r, width, rest, 0, PANEL_ROWS, stop - t, count)
                multiply_tokens(weight, r, panel, columns, x, k, t, stop, target, at, stride, k > 0)
                if count < PANEL_ROWS:
                    copy_sums(rest, 0, PANEL_ROWS, results, t * width + r, width, stop - t, count)


@device
def multiply_tokens(weight, row, panel, columns, x, k, t, end, out, at, stride, more):
    """Multiply a panel with columns from k on of tokens [t, end): see `multiply_panel_f32`."""
    while t < end:
        left = end - t
        if left <= 4 or left == 7 or left == 8:
            prefetch_panel(weight, row, k, columns, t, min(t + 4, end), end)
            multiply_panel_f32(panel, columns, x, k, t, end - 1, 4, out, at, stride, more)
            t, at = t + 4, at + 4 * stride
        else:
            prefetch_panel(weight, row, k, columns, t, min(t + 6, end), end)
            multiply_panel_f32(panel, columns, x, k, t, end - 1, 6, out, at, stride, more)
            t, at = t + 6, at + 6 * stride


@device
def matmul_rows(weight, x, out, begin, end, tokens, buffer):
    """out[t, r] = weight[r] · x[t] for rows [begin, end) and all tokens. `buffer` is flat."""
    if tokens < TILE or len(buffer) == 1:  # a plan without the buffer: see `ops.FOR_MANY_TOKENS`
        for r in range(begin, end):
            for t in range(tokens):
                out[t, r] = row_dot(weight, r, x, t)
    else:
        multiply_rows(weight, x, out, begin, end, tokens, buffer)


@device
def matmul_rows_int8(weight, xq, xs, out, begin, end, tokens):
    """out[t, r] = weight[r] · (xq[t] · xs[t]). A row stays in the first-level cache for all tokens."""
    x = (xq, xs)
    for r in range(begin, end):
        for t in range(tokens):
            out[t, r] = row_dot(weight, r, x, t)


@device
def matmul(weight, x, out, worker, n_workers, tokens, dequant_buffer):
    """A worker's columns of out = x · weightᵀ; returns their range. `dequant_buffer` is float32[workers, n]."""
    begin, end = partition(out.shape[1], worker, n_workers, TILE if tokens < TILE else GRAIN)
    matmul_rows(weight, x, out, begin, end, tokens, dequant_buffer[worker])
    return begin, end


@device
def matmul_int8(weight, xq, xs, out, worker, n_workers, tokens):
    """Like `matmul`, with x in int8: xq[T, K] with scales xs[T, G]."""
    begin, end = partition(out.shape[1], worker, n_workers, TILE)
    matmul_rows_int8(weight, xq, xs, out, begin, end, tokens)
    return begin, end
