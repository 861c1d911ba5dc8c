"""Definition in NumPy of how llama.cpp quantises activations to int8 for products with block types.

Float32 rows [T, D] become int8 quants [T, D], float32 scales [T, D / group] and sums of the quants [T, D / sum_group];
`ACTIVATION_QUANT` has the sizes. The arithmetic is ggml's on x86 (quantize_row_q8_0, _q8_1, _q8_K), to the bit: a
product with the reciprocal of the scale, rounded to the nearest, ties to even.

Three cases that ggml leaves open:

- A group with NaN or infinity gets quants of 0 and a scale of NaN, which shows in the logits.
- A group whose values are all below 2^-120 gets quants of 0: the reciprocal of its scale might not be finite.
- A scale or sum beyond float16, which is infinite in ggml, stays float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .types import ACTIVATION_QUANT

Floats = npt.NDArray[np.float32]
Quants = npt.NDArray[np.int8]
Quantized = tuple[Quants, Floats, npt.NDArray[Any]]
"""Quants, scales, sums."""

MAX_QUANT = np.float32(127)
MIN_MAGNITUDE = np.float32(2.0**-120)
"""Groups whose largest magnitude is smaller become zeros."""


def quantize_activations(kind: str, rows: Floats) -> Quantized:
    """Quantise `rows` [T, D], whole groups, as `kind`, a key of `ACTIVATION_QUANT`. Returns quants, scales, sums."""
    way = ACTIVATION_QUANT[kind]
    with np.errstate(over="ignore", invalid="ignore"):  # NaN, infinity and large scales: see above
        quants, scales, sums = _QUANTIZERS[kind](rows.reshape(-1, way.group))
    tokens = len(rows)
    return quants.reshape(rows.shape), scales.reshape(tokens, -1), sums.reshape(tokens, rows.shape[1] // way.sum_group)


def _round_to_f16(values: Floats) -> Floats:
    """The nearest float16, as float32; values beyond float16 stay."""
    rounded = values.astype(np.float16).astype(np.float32)
    return np.where(np.isfinite(rounded), rounded, values)


def _quantize_symmetric(groups: Floats) -> tuple[Quants, Floats]:
    """Quants of each group, and its scale in float32: the largest magnitude / 127."""
    largest = np.abs(groups).max(axis=1, keepdims=True)
    finite = np.isfinite(largest)
    factors = np.divide(MAX_QUANT, largest, out=np.zeros_like(largest), where=finite & (largest >= MIN_MAGNITUDE))
    quants = np.rint(np.where(finite, groups, np.float32(0)) * factors).astype(np.int8)
    return quants, np.where(finite, largest / MAX_QUANT, np.float32(np.nan))


def _sums(quants: Quants, sum_group: int) -> npt.NDArray[np.int32]:
    return quants.reshape(len(quants), -1, sum_group).sum(axis=2, dtype=np.int32)


def _q8_0(groups: Floats) -> Quantized:
    """Scales are returned rounded to float16; the quants come from the unrounded ones."""
    quants, scales = _quantize_symmetric(groups)
    return quants, _round_to_f16(scales), _sums(quants, ACTIVATION_QUANT["q8_0"].sum_group)


def _q8_1(groups: Floats) -> Quantized:
    """As q8_0, but a sum is multiplied by the unrounded scale and rounded to float16."""
    quants, scales = _quantize_symmetric(groups)
    sums = _sums(quants, ACTIVATION_QUANT["q8_1"].sum_group).astype(np.float32)
    return quants, _round_to_f16(scales), _round_to_f16(scales * sums)


def _q8_k(groups: Floats) -> Quantized:
    """The value of largest magnitude, the first if there are several, becomes -127."""
    at = np.abs(groups).argmax(axis=1)[:, None]
    extreme = np.take_along_axis(groups, at, axis=1)
    finite = np.isfinite(groups).all(axis=1, keepdims=True)
    nonzero = finite & (np.abs(extreme) >= MIN_MAGNITUDE)
    factors = np.divide(-MAX_QUANT, extreme, out=np.zeros_like(extreme), where=nonzero)
    quants = np.rint(np.where(nonzero, groups, np.float32(0)) * factors).astype(np.int8)
    scales = np.divide(np.float32(1), factors, out=np.zeros_like(factors), where=nonzero)
    sums = _sums(quants, ACTIVATION_QUANT["q8_k"].sum_group)
    return quants, np.where(finite, scales, np.float32(np.nan)), sums


_QUANTIZERS: dict[str, Callable[[Floats], Quantized]] = {"q8_0": _q8_0, "q8_1": _q8_1, "q8_k": _q8_k}
