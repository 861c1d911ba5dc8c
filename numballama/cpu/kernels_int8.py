"""Operators on the CPU with int8 activations and weights of GGUF blocks, as llama.cpp computes them.

The weight's type selects one of three ways to quantise activations (`VEC_DOT_TYPE`). `quantization.activations` defines
them, and these kernels agree with it to the bit. Conventions are those of `kernels_cpu`.
"""

from __future__ import annotations

import numpy as np

from ..kernels_cpu import add_columns, multiply_by_silu
from .activations_int8 import fill_offsets, float_of_bits, largest_bits, round_to_int8
from .compiler import device, exact_device
from .intrinsics import as_f32, f32_to
from .kv_cache import INT8_MAX, MIN_LARGEST
from .matmul import copy_sums, partition
from .panel_bytes import fill_panel_blocks
from .products_int8 import SHORT_PASS, TOKENS_OF_A_PASS
from .tiling import BYTES_COLUMNS, PANEL_ROWS, PANEL_TOKENS
from .vecdot import block_size
from .vecdot_int8 import dot_blocks_int8, dot_rows_int8, multiply_panel, panels_from, rows_at_once

INFINITY_BITS = 0x7F800000
"""Bits of float32 infinity. The bits of a NaN's magnitude are larger."""


@exact_device
def as_half(x):
    """x rounded to float16, as float32; x itself if it is too large for float16."""
    half = as_f32(f32_to(np.uint16(0), x))
    return half if abs(half) < np.float32(np.inf) else x


@exact_device
def scale_of(bits):
    """(scale, 1 / scale) of a group of 32 whose largest magnitude has these bits.

    int8 has no NaN, so a group with NaN or infinity gets scale NaN, which carries it to the logits. The second value is
    0 for a group that becomes zeros.
    """
    largest = float_of_bits(bits)
    if bits >= INFINITY_BITS:
        return np.float32(np.nan), np.float32(0)
    return largest / INT8_MAX, INT8_MAX / largest if largest >= MIN_LARGEST else np.float32(0)


@exact_device
def set_to_zero(out, t, first, count):
    for k in range(first, first + count):
        out[t, k] = 0


@exact_device
def quantize_32(x, t, g, out, scales):
    """Quantise group g of 32 of token t; returns its scale in float32 and the sum of its int8 elements."""
    columns = x.shape[1]
    at = t * columns + 32 * g
    scale, factor = scale_of(largest_bits(x, at))
    scales[t, g] = as_half(scale)
    if factor == 0:
        set_to_zero(out, t, 32 * g, 32)
        return scale, np.int32(0)
    return scale, round_to_int8(x, at, factor, out, at, 32)


@device
def quantize_groups_32(worker, n_workers, tokens, x, out, scales, sums, scaled):
    """Quantise a worker's groups of all tokens. If `scaled`, sums are multiplied by the scale, rounded to float16."""
    begin, end = partition(tokens * scales.shape[1], worker, n_workers, 1)
    for unit in range(begin, end):
        t, g = divmod(unit, scales.shape[1])
        scale, total = quantize_32(x, t, g, out, scales)
        if scaled:
            sums[t, g] = as_half(scale * np.float32(total))
        else:
            sums[t, g] = total


def quantize_q8_0(worker, n_workers, tokens, x, out, scales, sums):
    quantize_groups_32(worker, n_workers, tokens, x, out, scales, sums, False)


def quantize_q8_1(worker, n_workers, tokens, x, out, scales, sums):
    quantize_groups_32(worker, n_workers, tokens, x, out, scales, sums, True)


@exact_device
def quantize_256(x, t, g, out, scales, sums):
    """Quantise group g of 256 of token t: its first element of the largest magnitude becomes -127."""
    first = 256 * g
    bits = np.int32(0)
    for k in range(0, 256, 32):
        bits = max(bits, largest_bits(x, t * x.shape[1] + first + k))
    factor = np.float32(0)
    if bits >= INFINITY_BITS:
        scales[t, g] = np.nan
    elif float_of_bits(bits) < MIN_LARGEST:
        scales[t, g] = 0
    else:
        k = first
        while abs(x[t, k]) != float_of_bits(bits):
            k += 1
        factor = -INT8_MAX / x[t, k]
        scales[t, g] = np.float32(1) / factor
    if factor == 0:
        set_to_zero(out, t, first, 256)
    for run in range(16):
        at = t * x.shape[1] + first + 16 * run
        sums[t, 16 * g + run] = round_to_int8(x, at, factor, out, at, 16) if factor != 0 else 0


def quantize_q8_k(worker, n_workers, tokens, x, out, scales, sums):
    begin, end = partition(tokens * scales.shape[1], worker, n_workers, 1)
    for unit in range(begin, end):
        t, g = divmod(unit, scales.shape[1])
        quantize_256(x, t, g, out, scales, sums)


@device
def store_rows(out, t, r, values):
    """out[t, r + i] = values[i], a tuple."""
    for i in range(len(values)):
        out[t, r + i] = values[i]


@device
def matmul_blocks(weight, xq, xs, sums, out, worker, n_workers, tokens, panel_buffer):
    """A worker's columns of out = x · weightᵀ; returns their range.

    `panel_buffer` is float32[workers, n] with n of `panel_buffer_size`; it is used for `panels_from` tokens and more.
    """
    begin, end = partition(out.shape[1], worker, n_workers, PANEL_ROWS)
    if (
        tokens < panels_from(weight) or panel_buffer.shape[1] == 1
    ):  # a plan without the buffer: see `ops.FOR_MANY_TOKENS`
        many = rows_at_once(weight)
        whole = begin + (end - begin) // many * many
        for r in range(begin, whole, many):
            for t in range(tokens):
                store_rows(out, t, r, dot_rows_int8(weight, r, xq, xs, sums, t))
        for r in range(whole, end):
            for t in range(tokens):
                out[t, r] = dot_blocks_int8(weight, r, xq, xs, sums, t)
        return begin, end
    multiply_panels(weight, xq, xs, sums, out, begin, end, tokens, panel_buffer[worker])
    return begin, end


@device
def multiply_panels(weight, xq, xs, sums, out, begin, end, tokens, buffer):
    """out[t, r] for rows [begin, end) and all tokens, in panels of PANEL_ROWS rows and BYTES_COLUMNS columns."""
    quarter, size, width = PANEL_ROWS * BYTES_COLUMNS // 4, block_size(weight), out.shape[1]
    panel, scales, mins = buffer[:quarter], buffer[quarter:], buffer[quarter + quarter // 4 :]
    products, results = buffer[quarter + quarter // 2 :], out.reshape(-1)
    offsets = products[PANEL_TOKENS * PANEL_ROWS :]
    fill_offsets(weight, sums, tokens, offsets)
    passes = (tokens + TOKENS_OF_A_PASS - 1) // TOKENS_OF_A_PASS
    for r in range(begin, end, PANEL_ROWS):
        rows = min(PANEL_ROWS, end - r)
        for k in range(0, xq.shape[1], BYTES_COLUMNS):
            columns = min(BYTES_COLUMNS, xq.shape[1] - k)
            fill_panel_blocks(weight, r, end - 1, k // size, columns // size, panel, scales, mins)
            following = (r + PANEL_ROWS) * weight.shape[1] + k // size * PANEL_ROWS  # in the order of memory
            for t in range(0, tokens, TOKENS_OF_A_PASS):
                count = min(TOKENS_OF_A_PASS, tokens - t)
                where, ahead = (k, columns, t, tokens - 1), (following, t // TOKENS_OF_A_PASS, passes)
                target, at, stride = results, t * width + r, width
                if rows < PANEL_ROWS:
                    target, at, stride = products, 0, PANEL_ROWS
                    copy_sums(results, t * width + r, width, target, 0, stride, count, rows)
                if count <= SHORT_PASS:
                    multiply_panel(
                        weight, panel, scales, mins, xq, xs, sums, offsets, where, SHORT_PASS, target, at, stride, ahead
                    )
                else:
                    multiply_panel(
                        weight, panel, scales, mins, xq, xs, sums, offsets, where, TOKENS_OF_A_PASS, target, at, stride,
                        ahead,
                    )  # fmt: skip
                if rows < PANEL_ROWS:
                    copy_sums(target, 0, stride, results, t * width + r, width, count, rows)


def linear_blocks_int8(worker, n_workers, tokens, xq, xs, sums, weight, out, panel_buffer):
    matmul_blocks(weight, xq, xs, sums, out, worker, n_workers, tokens, panel_buffer)


def linear_add_blocks_int8(worker, n_workers, tokens, xq, xs, sums, weight, residual, out, panel_buffer):
    begin, end = matmul_blocks(weight, xq, xs, sums, out, worker, n_workers, tokens, panel_buffer)
    add_columns(residual, out, begin, end, tokens)


def qkv_blocks_int8(worker, n_workers, tokens, xq, xs, sums, wq, wk, wv, q, k, v, panel_buffer):
    matmul_blocks(wq, xq, xs, sums, q, worker, n_workers, tokens, panel_buffer)
    matmul_blocks(wk, xq, xs, sums, k, worker, n_workers, tokens, panel_buffer)
    matmul_blocks(wv, xq, xs, sums, v, worker, n_workers, tokens, panel_buffer)


def gate_up_blocks_int8(worker, n_workers, tokens, xq, xs, sums, w1, w3, out, gate_buffer, panel_buffer):
    begin, end = matmul_blocks(w1, xq, xs, sums, gate_buffer, worker, n_workers, tokens, panel_buffer)
    matmul_blocks(w3, xq, xs, sums, out, worker, n_workers, tokens, panel_buffer)
    multiply_by_silu(gate_buffer, out, begin, end, tokens)
