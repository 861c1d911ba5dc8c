"""How llama.cpp rounds activations to int8 where it multiplies them with weights of blocks: the definition, in NumPy.

Float32 rows [T, D] become int8 numbers [T, D], float32 scales [T, D / group] and sums [T, D / run] of the int8 numbers
(`ACTIVATION_QUANT`). The arithmetic is that of ggml on x86 (quantize_row_q8_0, _q8_1, _q8_K), to the bit: a
product with the reciprocal of the scale, ties to even. Where ggml has no answer: a group with NaN or infinity has zeros
and a scale of NaN, which shows in the logits; groups all below 2^-120, whose reciprocal might not be finite, have
zeros; a scale or sum beyond float16, where ggml has infinity, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .types import ACTIVATION_QUANT

Floats = npt.NDArray[np.float32]
Rounded = tuple[npt.NDArray[np.int8], Floats, npt.NDArray[Any]]

LARGEST, LEAST = np.float32(127), np.float32(2.0**-120)


def quantize_activations(kind: str, rows: Floats) -> Rounded:
    """Round by the name of a way, a key of `ACTIVATION_QUANT`."""
    group, run, _ = ACTIVATION_QUANT[kind]
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # what infinity, NaN and a scale beyond float16 give is said above
        numbers, scales, sums = _ROUNDERS[kind](rows.reshape(-1, group))
    tokens = len(rows)
    return numbers.reshape(rows.shape), scales.reshape(tokens, -1), sums.reshape(tokens, rows.shape[1] // run)


def _half(numbers: Floats) -> Floats:
    rounded = numbers.astype(np.float16).astype(np.float32)
    return np.where(np.isfinite(rounded), rounded, numbers)


def _by_largest(groups: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Numbers, and scales in float32: the largest magnitude / 127."""
    largest = np.abs(groups).max(axis=1, keepdims=True)
    fine = np.isfinite(largest)
    factors = np.divide(LARGEST, largest, out=np.zeros_like(largest), where=fine & (largest >= LEAST))
    numbers = np.rint(np.where(fine, groups, np.float32(0)) * factors).astype(np.int8)
    return numbers, np.where(fine, largest / LARGEST, np.float32(np.nan))


def _sums(numbers: npt.NDArray[np.int8], run: int) -> npt.NDArray[np.int32]:
    return numbers.reshape(len(numbers), -1, run).sum(axis=2, dtype=np.int32)


def _q8_0(groups: Floats) -> Rounded:
    """Scales are kept as float16, but not those that numbers are rounded by."""
    numbers, scales = _by_largest(groups)
    return numbers, _half(scales), _sums(numbers, 32)


def _q8_1(groups: Floats) -> Rounded:
    """As q8_0; a sum is kept times its scale, which is not yet rounded, as float16."""
    numbers, scales = _by_largest(groups)
    return numbers, _half(scales), _half(scales * _sums(numbers, 32).astype(np.float32))


def _q8_k(groups: Floats) -> Rounded:
    """The first number of the largest magnitude becomes -127."""
    at = np.abs(groups).argmax(axis=1)[:, None]
    extreme = np.take_along_axis(groups, at, axis=1)
    broken = ~np.isfinite(groups).all(axis=1, keepdims=True)
    some = ~broken & (np.abs(extreme) >= LEAST)
    factors = np.divide(-LARGEST, extreme, out=np.zeros_like(extreme), where=some)
    numbers = np.rint(np.where(some, groups, np.float32(0)) * factors).astype(np.int8)
    scales = np.divide(np.float32(1), factors, out=np.zeros_like(factors), where=some)
    return numbers, np.where(broken, np.float32(np.nan), scales), _sums(numbers, 16)


_ROUNDERS: dict[str, Callable[[Floats], Rounded]] = {"q8_0": _q8_0, "q8_1": _q8_1, "q8_k": _q8_k}
