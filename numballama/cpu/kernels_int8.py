"""Operators on the CPU whose activations are rounded to int8, as llama.cpp does it for weights of blocks.

Three ways of rounding, by the weight's type (`VEC_DOT_TYPE`); what each stores is in `quantization.activations`, which
this agrees with to the bit. Conventions as in `kernels_cpu`.
"""

from __future__ import annotations

import numpy as np

from ..kernels_cpu import add_columns, silu_times
from ..quantization.types import ACTIVATION_QUANT, VEC_DOT_TYPE
from ..registry import kernel
from .compiler import device, exact_device
from .intrinsics import as_f32, f32_to
from .matmul import TILE, share
from .vecdot_int8 import (
    PANEL,
    STRETCH,
    TOGETHER,
    TOKENS,
    dot_blocks_int8,
    float_of_bits,
    interleave,
    largest_bits,
    multiply_panel,
    round_to_int8,
    unpack_blocks,
)

WEIGHTS = tuple(VEC_DOT_TYPE)
SUMS = tuple(dict.fromkeys(way.sum_dtype for way in ACTIVATION_QUANT.values()))

LARGEST = np.float32(127)
NOT_FINITE = 0x7F800000
"""Bits of infinity: those of larger magnitudes are NaN's."""
LEAST = np.float32(2.0**-120)
"""Groups whose largest magnitude is below become zeros: the reciprocal of their scale might not be finite."""


@exact_device
def as_half(x):
    """The nearest float16, as float32; beyond float16 the number itself."""
    half = as_f32(f32_to(np.uint16(0), x))
    return half if abs(half) < np.float32(np.inf) else x


@exact_device
def scale_of(bits):
    """(scale, factor) of a group of 32 whose largest magnitude has these bits. A NaN must show in the logits, and int8
    has none: its group's scale carries it, as infinity's does.
    """
    largest = float_of_bits(bits)
    if bits >= NOT_FINITE:
        return np.float32(np.nan), np.float32(0)
    return largest / LARGEST, LARGEST / largest if largest >= LEAST else np.float32(0)


@exact_device
def clear(out, t, first, count):
    for k in range(first, first + count):
        out[t, k] = 0


@exact_device
def quantize_32(x, t, g, out, scales):
    """Group g of token t by its largest magnitude; returns its scale in float32 and the sum of its numbers."""
    columns = x.shape[1]
    at = t * columns + 32 * g
    scale, factor = scale_of(largest_bits(x, at))
    scales[t, g] = as_half(scale)
    if factor == 0:
        clear(out, t, 32 * g, 32)
        return scale, np.int32(0)
    return scale, round_to_int8(x, at, factor, out, at, 32)


@device
def quantize_groups_32(part, parts, tokens, x, out, scales, sums, scaled):
    """This part's groups of all tokens, and of each the sum of its numbers; `scaled`, that by the scale, as a half."""
    begin, end = share(tokens * scales.shape[1], part, parts, 1)
    for unit in range(begin, end):
        t, g = divmod(unit, scales.shape[1])
        scale, total = quantize_32(x, t, g, out, scales)
        if scaled:
            sums[t, g] = as_half(scale * np.float32(total))
        else:
            sums[t, g] = total


@kernel("quantize_q8_0", "cpu", "f32")
def quantize_q8_0(part, parts, tokens, x, out, scales, sums):
    quantize_groups_32(part, parts, tokens, x, out, scales, sums, False)


@kernel("quantize_q8_1", "cpu", "f32")
def quantize_q8_1(part, parts, tokens, x, out, scales, sums):
    quantize_groups_32(part, parts, tokens, x, out, scales, sums, True)


@exact_device
def quantize_256(x, t, g, out, scales, sums):
    """Group g of token t by the first number of the largest magnitude, which becomes -127."""
    first = 256 * g
    bits = np.int32(0)
    for k in range(0, 256, 32):
        bits = max(bits, largest_bits(x, t * x.shape[1] + first + k))
    factor = np.float32(0)
    if bits >= NOT_FINITE:
        scales[t, g] = np.nan
    elif float_of_bits(bits) < LEAST:
        scales[t, g] = 0
    else:
        k = first
        while abs(x[t, k]) != float_of_bits(bits):
            k += 1
        factor = -LARGEST / x[t, k]
        scales[t, g] = np.float32(1) / factor
    if factor == 0:
        clear(out, t, first, 256)
    for run in range(16):
        at = t * x.shape[1] + first + 16 * run
        sums[t, 16 * g + run] = round_to_int8(x, at, factor, out, at, 16) if factor != 0 else 0


@kernel("quantize_q8_k", "cpu", "f32")
def quantize_q8_k(part, parts, tokens, x, out, scales, sums):
    begin, end = share(tokens * scales.shape[1], part, parts, 1)
    for unit in range(begin, end):
        t, g = divmod(unit, scales.shape[1])
        quantize_256(x, t, g, out, scales, sums)


def _scratch(workers, columns):
    """For each worker: a panel, two factors a run of 16 at the least, a stage and what a panel's product gives."""
    return workers, 4 * columns + 2 * columns + PANEL * STRETCH // 4 + TOKENS * PANEL


@device
def fill_panel(weight, row, end, panel, scales, least, stage):
    """PANEL rows of a weight from `row` on; past the end the last one is taken again."""
    blocks, numbers = weight.shape[1], panel.shape[0] // (PANEL // 4) // weight.shape[1]
    at_once = STRETCH // numbers
    for b in range(0, blocks, at_once):
        count = min(at_once, blocks - b)
        for lane in range(PANEL):
            unpack_blocks(weight, min(row + lane, end - 1), b, count, lane, stage, scales, least)
        interleave(stage, count * numbers // TOGETHER, panel, b * numbers)


@device
def project(weight, xq, xs, sums, out, part, parts, tokens, scratch):
    """This part's share of a linear layer; returns the columns of `out` that it wrote."""
    begin, end = share(out.shape[1], part, parts, PANEL)
    if tokens < TILE:
        for r in range(begin, end):
            for t in range(tokens):
                out[t, r] = dot_blocks_int8(weight, r, xq, xs, sums, t)
        return begin, end
    k = xq.shape[1]
    mine = scratch[part]
    panel, scales, least = mine[: 4 * k], mine[4 * k : 5 * k], mine[5 * k : 6 * k]
    stage, result = mine[6 * k : 6 * k + PANEL * STRETCH // 4], mine[6 * k + PANEL * STRETCH // 4 :]
    for r in range(begin, end, PANEL):
        fill_panel(weight, r, end, panel, scales, least, stage)
        for t in range(0, tokens, TOKENS):
            multiply_panel(weight, panel, scales, least, xq, xs, sums, t, tokens - 1, result)
            for i in range(min(TOKENS, tokens - t)):
                for c in range(min(PANEL, end - r)):
                    out[t + i, r + c] = result[i * PANEL + c]
    return begin, end


@kernel("linear", "cpu", "i8", "f32", SUMS, WEIGHTS, rows=lambda x, s, m, w, workers: _scratch(workers, x[1]))
def linear_blocks_int8(part, parts, tokens, xq, xs, sums, weight, out, rows):
    project(weight, xq, xs, sums, out, part, parts, tokens, rows)


@kernel(
    "linear_add", "cpu", "i8", "f32", SUMS, WEIGHTS, "f32", rows=lambda x, s, m, w, r, workers: _scratch(workers, x[1])
)
def linear_add_blocks_int8(part, parts, tokens, xq, xs, sums, weight, residual, out, rows):
    begin, end = project(weight, xq, xs, sums, out, part, parts, tokens, rows)
    add_columns(residual, out, begin, end, tokens)


@kernel(
    "qkv",
    "cpu",
    "i8",
    "f32",
    SUMS,
    WEIGHTS,
    WEIGHTS,
    WEIGHTS,
    rows=lambda x, s, m, q, k, v, workers: _scratch(workers, x[1]),
)
def qkv_blocks_int8(part, parts, tokens, xq, xs, sums, wq, wk, wv, q, k, v, rows):
    project(wq, xq, xs, sums, q, part, parts, tokens, rows)
    project(wk, xq, xs, sums, k, part, parts, tokens, rows)
    project(wv, xq, xs, sums, v, part, parts, tokens, rows)


@kernel(
    "gate_up",
    "cpu",
    "i8",
    "f32",
    SUMS,
    WEIGHTS,
    WEIGHTS,
    gate=lambda x, s, m, w1, w3, workers: (x[0], w1[0]),
    rows=lambda x, s, m, w1, w3, workers: _scratch(workers, x[1]),
)
def gate_up_blocks_int8(part, parts, tokens, xq, xs, sums, w1, w3, out, gate, rows):
    begin, end = project(w1, xq, xs, sums, gate, part, parts, tokens, rows)
    project(w3, xq, xs, sums, out, part, parts, tokens, rows)
    silu_times(gate, out, begin, end, tokens)
