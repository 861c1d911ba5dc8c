"""Conversion between weight types, a chunk at a time, so that a few MB above the result are enough for any weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint import Weight
from ..errors import Error, UnsupportedError
from . import blocks as quant_blocks
from .blocks import encode_f16, largest, round_half_away, saturate
from .types import BF16, BLOCKS, F16, F32, WeightType

DEFAULT_GROUP = 64
"""Numbers that share a scale in an int8 weight, unless the caller or the file says otherwise."""

EXACT = frozenset(quant_blocks.REPACKERS)
"""(type, another) for block types that `convert` turns into another without changing a number."""

_STORAGE: dict[str, type[np.generic]] = {"f32": np.float32, "f16": np.uint16, "bf16": np.uint16, "int8": np.int8}
_STORAGE |= dict.fromkeys(quant_blocks.ENCODERS, np.uint8)
_CHUNK = 1 << 18  # numbers in flight: 1 MB as float32, so a chunk and its temporaries stay in the L2 cache


def convert(weight: Weight, target: WeightType) -> Weight:
    """`weight` in another type; `weight` itself, not a copy, when it has that type already.

    q5_0 becomes q8_0 and q3_k becomes q6_k as it is, for these hold the same numbers. Every other conversion goes
    through float32 and rounds to the nearest: ties away from zero for int8 and q8_0 (C's
    roundf), to even for f16 and bf16, upwards for q4_0 and q4_1. Finite numbers stay finite: what lies beyond the
    range of f16 or bf16 becomes the largest number of that type. Raises `Error` for a group size below 1, for rows that
    are no whole blocks, and for NaN or infinity that shall become int8 or blocks.
    """
    if weight.type == target:
        return weight
    if repack := quant_blocks.REPACKERS.get((weight.type.name, target.name)):
        return _repack(weight, target, repack)
    if target.name not in _STORAGE:
        raise UnsupportedError(f"weight type {target.name!r} is not one of {', '.join(_STORAGE)}")
    if target.name == "int8" and target.group < 1:
        raise Error(f"an int8 group has at least one number, found a group size of {target.group}")
    numel, group, nbytes = math.prod(weight.shape), max(target.group, 1), 0
    if blocks := target.name in BLOCKS:
        group, nbytes = BLOCKS[target.name]
        if weight.shape[-1] % group:
            raise Error(f"rows of {weight.shape[-1]} numbers are not a whole number of {target}'s blocks of {group}")
    data = np.empty(target.nbytes(numel) if blocks else numel, _STORAGE[target.name])
    scales = np.empty(-(-numel // group), np.float32) if target.name == "int8" else None
    step = max(_CHUNK // group, 1) * group  # no group is cut in two
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        with np.errstate(over="ignore", invalid="ignore"):  # what NaN and infinity become is said above
            values = _decode(weight, start, stop)
            if scales is not None:
                _encode_int8(values, group, data[start:stop], scales[start // group : -(-stop // group)])
            elif blocks:
                rows = values.reshape(-1, group)
                quant_blocks.encode(target.name, rows, data.reshape(-1, nbytes)[start // group :][: len(rows)])
            else:
                data[start:stop] = _ENCODERS[target.name](values)
    shape = (*weight.shape[:-1], -1) if blocks else weight.shape
    return Weight(weight.shape, target, data.reshape(shape), scales)


def _repack(weight: Weight, target: WeightType, repack: Callable[[quant_blocks.Bytes], quant_blocks.Bytes]) -> Weight:
    (numbers, old_bytes), (_, new_bytes) = BLOCKS[weight.type.name], BLOCKS[target.name]
    old = weight.data.reshape(-1, old_bytes)
    new = np.empty((len(old), new_bytes), np.uint8)
    step = max(_CHUNK // numbers, 1)
    for start in range(0, len(old), step):
        new[start : start + step] = repack(old[start : start + step])
    return Weight(weight.shape, target, new.reshape(*weight.shape[:-1], -1))


def dequantize(weight: Weight) -> npt.NDArray[np.float32]:
    """The numbers of `weight` as float32 in its shape; the stored array itself if it is float32 already."""
    return convert(weight, F32).data


def relative_error(source: Weight, result: Weight) -> float:
    """How far the numbers of `result` are from those of `source`: root mean squared error over root mean square."""
    wrong = total = 0.0
    for start in range(0, numel := math.prod(source.shape), _CHUNK):
        stop = min(start + _CHUNK, numel)
        values = _decode(source, start, stop).astype(np.float64)
        total += float(values @ values)
        values -= _decode(result, start, stop)
        wrong += float(values @ values)
    return math.sqrt(wrong / total) if wrong and total else 0.0


def quantize_int8(
    values: npt.NDArray[np.float32], group: int = DEFAULT_GROUP
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantise float32 `values` → (int8 payload in their shape, float32 scales, one a group of the flat array).

    A group's scale is max|x| / 127; a group of zeros gets scale 0, and the last group may be short. Raises `Error` for
    NaN, infinity and a group size below 1.
    """
    weight = convert(Weight(values.shape, F32, values), WeightType("int8", group))
    assert weight.scales is not None
    return weight.data, weight.scales


def to_f16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Float32 `values` → IEEE half bit patterns in their shape, rounded to nearest even, saturating at ±65504."""
    return convert(Weight(values.shape, F32, values), F16).data


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Float32 `values` → bfloat16 bit patterns in their shape, rounded to nearest even, saturating; NaN stays NaN."""
    return convert(Weight(values.shape, F32, values), BF16).data


def from_f16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """IEEE half bit patterns → float32 in their shape, exactly."""
    return dequantize(Weight(bits.shape, F16, bits))


def from_bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Bfloat16 bit patterns → float32 in their shape, exactly."""
    return dequantize(Weight(bits.shape, BF16, bits))


def _decode(weight: Weight, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Numbers `start` to `stop` of the flat weight as float32: a view when they are stored so."""
    if weight.type.name in quant_blocks.DECODERS:
        return _decode_blocks(weight.type.name, weight.data, start, stop)
    stored: npt.NDArray[Any] = weight.data.reshape(-1)[start:stop]
    if weight.type.name == "f32":
        return stored
    if weight.type.name == "f16":
        return stored.view(np.float16).astype(np.float32)
    if weight.type.name == "bf16":
        bits = stored.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if weight.type.name == "int8" and weight.scales is not None:
        group = weight.type.group
        first = start // group
        values = np.repeat(weight.scales[first : -(-stop // group)], group)[start - first * group :][: stored.size]
        values *= stored
        return values
    raise UnsupportedError(f"weight type {weight.type} is not one of {', '.join(_STORAGE)}")


def _decode_blocks(name: str, stored: npt.NDArray[np.uint8], start: int, stop: int) -> npt.NDArray[np.float32]:
    numbers, nbytes = BLOCKS[name]
    first = start // numbers
    values = quant_blocks.decode(name, stored.reshape(-1, nbytes)[first : -(-stop // numbers)])
    return values.reshape(-1)[start - first * numbers :][: stop - start]


def _encode_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    wide = values.view(np.uint32)
    bits = ((wide + (0x7FFF + ((wide >> 16) & 1))) >> 16).astype(np.uint16)
    # The carry can turn a NaN into infinity or zero: NaNs are cut instead, with the quiet bit set so that one remains.
    nan = np.isnan(values)
    bits[nan] = (wide[nan] >> 16) | 0x40
    return saturate(bits, values, infinity=0x7F80)


def _encode_int8(
    values: npt.NDArray[np.float32], group: int, payload: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]
) -> None:
    """Fill `payload` and `scales` with whole groups, of which the last may be short."""
    whole = values.size // group * group
    if whole:
        _quantize_rows(values[:whole].reshape(-1, group), payload[:whole].reshape(-1, group), scales[: whole // group])
    if whole < values.size:
        _quantize_rows(values[None, whole:], payload[None, whole:], scales[-1:])


def _quantize_rows(
    rows: npt.NDArray[np.float32], payload: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]
) -> None:
    np.divide(largest(rows), np.float32(127), out=scales)
    if not np.isfinite(scales).all():
        raise Error("a weight holds NaN or infinity, which int8 cannot express")
    # A scale of 0 is a group of zeros, or of numbers so small that max/127 underflows; a denormal one may be too small.
    ratios = np.divide(rows, scales[:, None], out=np.zeros_like(rows), where=scales[:, None] != 0)
    payload[...] = round_half_away(np.clip(ratios, -127, 127, out=ratios))


_ENCODERS = {"f32": lambda values: values, "f16": encode_f16, "bf16": _encode_bf16}
