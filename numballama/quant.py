"""Conversion between weight types, a chunk at a time, so that a few MB above the result are enough for any weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .checkpoint import Weight
from .config import BF16, F16, F32, Q8_0_BLOCK, Q8_0_BYTES, WeightType
from .errors import Error, UnsupportedError

DEFAULT_GROUP = 64
"""Numbers that share a scale in an int8 weight, unless the caller or the file says otherwise."""

_STORAGE = {"f32": np.float32, "f16": np.uint16, "bf16": np.uint16, "int8": np.int8, "q8_0": np.uint8}
_CHUNK = 1 << 18  # numbers in flight: 1 MB as float32, so a chunk and its temporaries stay in the L2 cache


def convert(weight: Weight, target: WeightType) -> Weight:
    """`weight` in another type; `weight` itself, not a copy, when it has that type already.

    Every conversion goes through float32 and rounds to the nearest: ties away from zero for int8 and q8_0 (C's
    roundf), to even for f16 and bf16. Finite numbers stay finite: what lies beyond the range of f16 or bf16 becomes
    the largest number of that type. Raises `Error` for a group size below 1, for rows that are no whole q8_0 blocks,
    and for NaN or infinity that shall become int8 or q8_0.
    """
    if weight.type == target:
        return weight
    if target.name not in _STORAGE:
        raise UnsupportedError(f"weight type {target.name!r} is not one of {', '.join(_STORAGE)}")
    if target.name == "int8" and target.group < 1:
        raise Error(f"an int8 group has at least one number, found a group size of {target.group}")
    if target.name == "q8_0" and weight.shape[-1] % Q8_0_BLOCK:
        raise Error(f"rows of {weight.shape[-1]} numbers are not a whole number of q8_0's blocks of {Q8_0_BLOCK}")
    numel, group = math.prod(weight.shape), Q8_0_BLOCK if target.name == "q8_0" else max(target.group, 1)
    data = np.empty(target.nbytes(numel) if target.name == "q8_0" else numel, _STORAGE[target.name])
    scales = np.empty(-(-numel // group), np.float32) if target.name == "int8" else None
    step = max(_CHUNK // group, 1) * group  # no group is cut in two
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        with np.errstate(over="ignore", invalid="ignore"):  # what NaN and infinity become is said above
            values = _decode(weight, start, stop)
            if scales is not None:
                _encode_int8(values, group, data[start:stop], scales[start // group : -(-stop // group)])
            elif target.name == "q8_0":
                _encode_q8_0(values, data[start // Q8_0_BLOCK * Q8_0_BYTES :][: values.size // Q8_0_BLOCK * Q8_0_BYTES])
            else:
                data[start:stop] = _ENCODERS[target.name](values)
    shape = (*weight.shape[:-1], -1) if target.name == "q8_0" else weight.shape
    return Weight(weight.shape, target, data.reshape(shape), scales)


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
    if weight.type.name == "q8_0":
        return _decode_q8_0(weight.data.reshape(-1), start, stop)
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


def _decode_q8_0(stored: npt.NDArray[np.uint8], start: int, stop: int) -> npt.NDArray[np.float32]:
    first = start // Q8_0_BLOCK
    blocks = stored.reshape(-1, Q8_0_BYTES)[first : -(-stop // Q8_0_BLOCK)]
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= blocks[:, :2].copy().view(np.float16)
    return values.reshape(-1)[start - first * Q8_0_BLOCK :][: stop - start]


def _encode_f16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return _saturate(values.astype(np.float16).view(np.uint16), values, infinity=0x7C00)


def _encode_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    wide = values.view(np.uint32)
    bits = ((wide + (0x7FFF + ((wide >> 16) & 1))) >> 16).astype(np.uint16)
    # The carry can turn a NaN into infinity or zero: NaNs are cut instead, with the quiet bit set so that one remains.
    nan = np.isnan(values)
    bits[nan] = (wide[nan] >> 16) | 0x40
    return _saturate(bits, values, infinity=0x7F80)


def _saturate(bits: npt.NDArray[np.uint16], values: npt.NDArray[np.float32], infinity: int) -> npt.NDArray[np.uint16]:
    """Step back from infinity to the largest number wherever the exact value was finite: logits of a model whose one
    weight became infinite are all NaN.
    """
    overflowed = ((bits & 0x7FFF) == infinity) & np.isfinite(values)
    bits[overflowed] -= 1
    return bits


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
    np.divide(_largest(rows), np.float32(127), out=scales)
    if not np.isfinite(scales).all():
        raise Error("a weight holds NaN or infinity, which int8 cannot express")
    # A scale of 0 is a group of zeros, or of numbers so small that max/127 underflows.
    payload[...] = _round(np.divide(rows, scales[:, None], out=np.zeros_like(rows), where=scales[:, None] != 0))


def _encode_q8_0(values: npt.NDArray[np.float32], out: npt.NDArray[np.uint8]) -> None:
    """As ggml's quantize_row_q8_0_ref does, to the bit: a product with the reciprocal of the scale before the scale
    itself is rounded to float16. Scales beyond float16 saturate; where the reciprocal overflows, they round to 0.
    """
    rows, blocks = values.reshape(-1, Q8_0_BLOCK), out.reshape(-1, Q8_0_BYTES)
    scales = _largest(rows) / np.float32(127)
    if not np.isfinite(scales).all():
        raise Error("a weight holds NaN or infinity, which q8_0 cannot express")
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > np.float32(2.0**-128))
    blocks[:, :2] = _encode_f16(scales)[:, None].view(np.uint8)
    blocks[:, 2:] = _round(rows * inverse[:, None]).astype(np.int8).view(np.uint8)


def _largest(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The largest magnitude of each row, zeros without a sign; NaN if it holds one."""
    return np.abs(np.maximum(rows.max(axis=1), -rows.min(axis=1)))


def _round(ratios: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """C's roundf, within [-127, 127]."""
    rounded = np.trunc(ratios)
    # Adding 0.5 before cutting would lift 0.49999997 to 1.
    rounded += np.copysign(np.abs(ratios - rounded) >= 0.5, ratios)
    # Only a subnormal scale, itself rounded coarsely, can leave the range.
    return np.clip(rounded, -127, 127, out=rounded)


_ENCODERS = {"f32": lambda values: values, "f16": _encode_f16, "bf16": _encode_bf16}
