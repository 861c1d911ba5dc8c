"""Conversion between weight types, in chunks: besides the result it takes a few MB, however large the weight is."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint import Weight
from ..errors import Error, UnsupportedError
from ..host.cgroup import usable_cores
from ..memory import ceil_div
from .blocks import (
    DECODERS,
    ENCODERS,
    REPACKERS,
    ROUNDING,
    decode,
    encode_f16,
    max_magnitude,
    repack,
    round_half_away,
    saturate,
)
from .search import SEARCHING, encode
from .types import BF16, BLOCKS, F16, F32, WeightType

DEFAULT_GROUP = 64
"""Default number of elements that share a scale in an int8 weight."""

EXACT = REPACKERS.keys() - ROUNDING
"""Pairs (type, target) of block types that `convert` converts without changing a value."""

_TARGETS = ("f32", "f16", "bf16", "int8", *ENCODERS, *SEARCHING)
_CHUNK = 1 << 18  # elements: 1 MB as float32, so a chunk and its temporaries stay in the L2 cache


def convert(weight: Weight, target: WeightType, importance: npt.NDArray[np.float32] | None = None) -> Weight:
    """Convert `weight` to another type. Returns `weight` itself, not a copy, when it has that type already.

    `importance`, float32 [columns], says how much the error of a column counts, for types of `search`.

    q5_0 and iq4_nl to q8_0, and q3_k to q6_k, are exact: blocks are repacked; iq4_xs to q8_0 rounds scales. Every other
    conversion goes through float32 and rounds to the nearest value. Ties go away from zero for int8 and q8_0 (C's
    roundf), to even for f16 and bf16, and upwards for q4_0 and q4_1; q5_0, q5_1 and K-quants search for the scales with
    the least error. Finite values stay finite: those beyond the range of f16 or bf16 become its largest value.

    Raises `UnsupportedError` for a type that cannot be written, and `Error` for a group size below 1, for rows that are
    not whole blocks, and for NaN or infinity where the target is int8 or a block type.
    """
    if weight.type == target:
        return weight
    if (weight.type.name, target.name) in REPACKERS:
        return _repack(weight, target)
    if target.name not in _TARGETS:
        raise UnsupportedError(f"weight type {target.name!r} is not one of {', '.join(_TARGETS)}")
    if target.name == "int8" and target.group < 1:
        raise Error(f"an int8 group has at least one element, found a group size of {target.group}")
    numel, traits = math.prod(weight.shape), target.traits
    if traits.is_block and weight.shape[-1] % traits.block_size:
        raise Error(
            f"rows of {weight.shape[-1]} elements are not a whole number of {target}'s blocks of {traits.block_size}"
        )
    group = traits.block_size if traits.is_block else max(target.group, 1)
    data = np.empty(numel // traits.block_size * traits.block_bytes // traits.storage.itemsize, traits.storage)
    scales = np.empty(ceil_div(numel, group), np.float32) if target.name == "int8" else None
    step = max(_CHUNK // group, 1) * group  # no group is cut in two

    def convert_part(start: int) -> None:
        stop = min(start + step, numel)
        groups = slice(start // group, ceil_div(stop, group))
        with np.errstate(over="ignore", invalid="ignore"):  # the docstring says what becomes of NaN and infinity
            values = _decode(weight, start, stop)
            if scales is not None:
                _encode_int8(values, group, data[start:stop], scales[groups])
            elif traits.is_block:
                rows, blocks = values.reshape(-1, group), data.reshape(-1, traits.block_bytes)
                encode(target.name, rows, blocks[groups], _of_blocks(importance, rows, start))
            else:
                data[start:stop] = _FLOAT_ENCODERS[target.name](values)

    parts = range(0, numel, step)
    if target.name in SEARCHING and len(parts) > 1:  # these are slow, and NumPy lets other threads run meanwhile
        with ThreadPoolExecutor(min(usable_cores(), len(parts))) as pool:
            for _ in pool.map(convert_part, parts):
                pass
    else:
        for start in parts:
            convert_part(start)
    shape = (*weight.shape[:-1], -1) if traits.is_block else weight.shape
    return Weight(weight.shape, target, data.reshape(shape), scales)


def _of_blocks(
    importance: npt.NDArray[np.float32] | None, rows: npt.NDArray[np.float32], start: int
) -> npt.NDArray[np.float32] | None:
    """The importance of each element of blocks [n, block_size], the first of which is element `start` of the weight."""
    if importance is None:
        return None
    of_row = importance.reshape(-1, rows.shape[1])
    return of_row[(start // rows.shape[1] + np.arange(len(rows))) % len(of_row)]


def _repack(weight: Weight, target: WeightType) -> Weight:
    old = weight.data.reshape(-1, weight.type.traits.block_bytes)
    ratio = weight.type.traits.block_size // target.traits.block_size
    new = np.empty((len(old) * ratio, target.traits.block_bytes), np.uint8)
    step = max(_CHUNK // weight.type.traits.block_size, 1)
    for start in range(0, len(old), step):
        part = slice(start * ratio, (start + step) * ratio)
        repack(weight.type.name, target.name, old[start : start + step], new[part])
    return Weight(weight.shape, target, new.reshape(*weight.shape[:-1], -1))


def dequantize(weight: Weight) -> npt.NDArray[np.float32]:
    """The elements of `weight` as float32 in its shape. Returns the stored array itself if it is float32 already."""
    return convert(weight, F32).data


def relative_error(source: Weight, result: Weight) -> float:
    """Relative RMS error of `result`: root mean squared error, divided by the root mean square of `source`."""
    squared_error = total = 0.0
    for start in range(0, numel := math.prod(source.shape), _CHUNK):
        stop = min(start + _CHUNK, numel)
        values = _decode(source, start, stop).astype(np.float64)
        total += float(values @ values)
        values -= _decode(result, start, stop)
        squared_error += float(values @ values)
    return math.sqrt(squared_error / total) if squared_error and total else 0.0


def quantize_int8(
    values: npt.NDArray[np.float32], group: int = DEFAULT_GROUP
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantise float32 `values` → (int8 payload in their shape, a float32 scale for each group of the flat array).

    The scale of a group is max|x| / 127, so 0 for a group of zeros. The last group may be short. Raises `Error` for
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
    """Elements `start` to `stop` of the flat weight as float32: a view when they are stored as float32."""
    if weight.type.name in DECODERS:
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
        values = np.repeat(weight.scales[first : ceil_div(stop, group)], group)[start - first * group :][: stored.size]
        values *= stored
        return values
    raise UnsupportedError(f"weight type {weight.type} is not one of {', '.join(_TARGETS)}")


def _decode_blocks(name: str, stored: npt.NDArray[np.uint8], start: int, stop: int) -> npt.NDArray[np.float32]:
    size, nbytes = BLOCKS[name]
    first = start // size
    values = decode(name, stored.reshape(-1, nbytes)[first : ceil_div(stop, size)])
    return values.reshape(-1)[start - first * size :][: stop - start]


def _encode_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    wide = values.view(np.uint32)
    bits = ((wide + (0x7FFF + ((wide >> 16) & 1))) >> 16).astype(np.uint16)
    # The carry can turn a NaN into infinity or zero: truncate NaNs, and set the quiet bit so that they stay NaN.
    nan = np.isnan(values)
    bits[nan] = (wide[nan] >> 16) | 0x40
    return saturate(bits, values, infinity=0x7F80)


def _encode_int8(
    values: npt.NDArray[np.float32], group: int, payload: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]
) -> None:
    """Fill `payload` and `scales` with whole groups. The last one may be short."""
    whole = values.size // group * group
    if whole:
        _quantize_rows(values[:whole].reshape(-1, group), payload[:whole].reshape(-1, group), scales[: whole // group])
    if whole < values.size:
        _quantize_rows(values[None, whole:], payload[None, whole:], scales[-1:])


def _quantize_rows(
    rows: npt.NDArray[np.float32], payload: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]
) -> None:
    np.divide(max_magnitude(rows), np.float32(127), out=scales)
    if not np.isfinite(scales).all():
        raise Error("a weight holds NaN or infinity, which int8 cannot express")
    # A scale of 0: the group is zeros, or max/127 underflows. A denormal scale may be too small, hence the clip.
    ratios = np.divide(rows, scales[:, None], out=np.zeros_like(rows), where=scales[:, None] != 0)
    payload[...] = round_half_away(np.clip(ratios, -127, 127, out=ratios))


_FLOAT_ENCODERS = {"f32": lambda values: values, "f16": encode_f16, "bf16": _encode_bf16}
