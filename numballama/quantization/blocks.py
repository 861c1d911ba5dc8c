"""GGUF's block types: bytes of blocks to numbers, exactly as ggml computes them, and for some types back.

A function takes or returns rows of one block each: uint8 (blocks, bytes of a block) and float32 (blocks, numbers of a
block), sizes in `BLOCKS`. Layouts and arithmetic: ggml-common.h and ggml-quants.c of ggml; numbers in a block's
second half often lie in the high bits of its first half's bytes. Products of a block's factors are exact in float32
(11 bits of a float16 times at most 8 and 6), so how they are ordered shows nowhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import Error

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def decode(name: str, blocks: Bytes) -> Floats:
    """The numbers of blocks of the type called `name`; NaN and infinity where a scale is not finite."""
    return DECODERS[name](blocks)


def encode(name: str, rows: Floats, blocks: Bytes) -> None:
    """Fill `blocks` with rows of numbers, one row a block, as ggml's quantize_row_…_ref do, to the bit.

    Scales beyond float16 saturate; blocks so small that a scale's reciprocal overflows become 0. Raises `Error` for NaN
    and infinity.
    """
    if not np.isfinite(rows).all():
        raise Error(f"a weight holds NaN or infinity, which {name} cannot express")
    ENCODERS[name](rows, blocks)


def encode_f16(values: Floats) -> npt.NDArray[np.uint16]:
    """Float16 bit patterns, rounded to nearest even; finite numbers beyond float16 become its largest."""
    return saturate(values.astype(np.float16).view(np.uint16), values, infinity=0x7C00)


def saturate(bits: npt.NDArray[np.uint16], values: Floats, infinity: int) -> npt.NDArray[np.uint16]:
    """Step back from infinity to the largest number wherever the exact value was finite: logits of a model whose one
    weight became infinite are all NaN.
    """
    overflowed = ((bits & 0x7FFF) == infinity) & np.isfinite(values)
    bits[overflowed] -= 1
    return bits


# Reading


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of each block, as a column."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _fields(packed: Bytes, bits: int, run: int) -> Bytes:
    """(blocks, n · 8 / bits) numbers of `bits` bits: of each run of bytes first all lowest fields, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = (packed.reshape(len(packed), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)
    return fields.reshape(len(packed), -1)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8) * _half(blocks, 0)


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_fields(blocks[:, 2:], 4, 16).view(np.int8) - np.int8(8))


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _fields(blocks[:, 4:], 4, 16) + _half(blocks, 2)


def _q5_0_integers(blocks: Bytes) -> npt.NDArray[np.int8]:
    fifth = _fields(blocks[:, 2:6], 1, 1)
    return (_fields(blocks[:, 6:], 4, 16) | fifth << 4).view(np.int8) - np.int8(16)


def _q5_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _q5_0_integers(blocks)


def _q5_1(blocks: Bytes) -> Floats:
    fifth = _fields(blocks[:, 4:8], 1, 1)
    return _half(blocks, 0) * (_fields(blocks[:, 8:], 4, 16) | fifth << 4) + _half(blocks, 2)


def _scaled(scales: Floats, numbers: npt.NDArray[np.integer], least: Floats | None = None) -> Floats:
    """scales · numbers - least, with a scale for each equal run of a block's numbers."""
    runs = scales[:, :, None] * numbers.reshape(*scales.shape, -1).astype(np.float32)
    if least is not None:
        runs -= least[:, :, None]
    return runs.reshape(numbers.shape)


def _q2_k(blocks: Bytes) -> Floats:
    scales = _half(blocks, 80) * (blocks[:, :16] & 15)
    return _scaled(scales, _fields(blocks[:, 16:80], 2, 32), _half(blocks, 82) * (blocks[:, :16] >> 4))


def _q3_k_integers(blocks: Bytes) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """16 scales and 256 numbers."""
    scales = _fields(blocks[:, 96:104], 4, 8) | _fields(blocks[:, 104:108], 2, 4) << 4
    numbers = _fields(blocks[:, 32:96], 2, 32) | _fields(blocks[:, :32], 1, 32) << 2
    return scales.view(np.int8) - np.int8(32), numbers.view(np.int8) - np.int8(4)


def _q3_k(blocks: Bytes) -> Floats:
    scales, numbers = _q3_k_integers(blocks)
    return _scaled(_half(blocks, 108) * scales, numbers)


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The eight scales and the eight least numbers of 6 bits that q4_k and q5_k keep in 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        np.hstack([first & 63, third & 15 | (first >> 2) & 48]),
        np.hstack([second & 63, third >> 4 | (second >> 2) & 48]),
    )


def _q4_k(blocks: Bytes) -> Floats:
    scales, least = _six_bits(blocks[:, 4:16])
    return _scaled(_half(blocks, 0) * scales, _fields(blocks[:, 16:], 4, 32), _half(blocks, 2) * least)


def _q5_k(blocks: Bytes) -> Floats:
    scales, least = _six_bits(blocks[:, 4:16])
    numbers = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << 4
    return _scaled(_half(blocks, 0) * scales, numbers, _half(blocks, 2) * least)


def _q6_k(blocks: Bytes) -> Floats:
    numbers = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << 4
    return _scaled(_half(blocks, 208) * blocks[:, 192:208].view(np.int8), numbers.view(np.int8) - np.int8(32))


DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


# The same numbers in another type


def _q5_0_to_q8_0(blocks: Bytes) -> Bytes:
    return np.hstack([blocks[:, :2], _q5_0_integers(blocks).view(np.uint8)])


def _q3_k_to_q6_k(blocks: Bytes) -> Bytes:
    scales, numbers = _q3_k_integers(blocks)
    fields = (numbers + np.int8(32)).view(np.uint8)
    nibbles = (fields & 15).reshape(-1, 2, 2, 64)
    pairs = (fields >> 4).reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    low = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(-1, 128)
    high = np.bitwise_or.reduce(pairs, axis=2).reshape(-1, 64)
    return np.hstack([low, high, scales.view(np.uint8), blocks[:, 108:]])


REPACKERS: dict[tuple[str, str], Callable[[Bytes], Bytes]] = {
    ("q5_0", "q8_0"): _q5_0_to_q8_0,
    ("q3_k", "q6_k"): _q3_k_to_q6_k,
}
"""(type, another that holds every number it can hold) → blocks of the one to blocks of the other, exactly."""


# Writing


def _reciprocal(scales: Floats) -> Floats:
    """1 / scale; 0 for scales whose reciprocal is beyond float32."""
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=np.abs(scales) > np.float32(2.0**-128))


def _put_half(blocks: Bytes, at: int, values: Floats) -> None:
    blocks[:, at : at + 2] = encode_f16(values).view(np.uint8)


def _put_nibbles(blocks: Bytes, at: int, numbers: Floats) -> None:
    """Cut to integers from 0 to 15, the first half in the low four bits."""
    nibbles = np.minimum(numbers, np.float32(15)).astype(np.uint8)
    half = nibbles.shape[1] // 2
    blocks[:, at:] = nibbles[:, :half] | (nibbles[:, half:] << 4)


def _encode_q8_0(rows: Floats, blocks: Bytes) -> None:
    """A product with the reciprocal of the scale before the scale itself is rounded to float16."""
    scales = largest(rows)[:, None] / np.float32(127)
    _put_half(blocks, 0, scales)
    blocks[:, 2:] = round_half_away(rows * _reciprocal(scales)).astype(np.int8).view(np.uint8)


def _encode_q4_0(rows: Floats, blocks: Bytes) -> None:
    """The number of largest magnitude, the first if there are several, becomes -8."""
    extreme = np.take_along_axis(rows, np.abs(rows).argmax(axis=1, keepdims=True), axis=1)
    scales = extreme / np.float32(-8)
    _put_half(blocks, 0, scales)
    _put_nibbles(blocks, 2, rows * _reciprocal(scales) + np.float32(8.5))


def _encode_q4_1(rows: Floats, blocks: Bytes) -> None:
    least = rows.min(axis=1, keepdims=True)
    scales = (rows.max(axis=1, keepdims=True) - least) / np.float32(15)  # infinite if the range is beyond float32
    _put_half(blocks, 0, np.minimum(scales, np.finfo(np.float32).max))
    _put_half(blocks, 2, least)
    _put_nibbles(blocks, 4, np.nan_to_num((rows - least) * _reciprocal(scales)) + np.float32(0.5))


ENCODERS: dict[str, Callable[[Floats, Bytes], None]] = {
    "q8_0": _encode_q8_0,
    "q4_0": _encode_q4_0,
    "q4_1": _encode_q4_1,
}


def largest(rows: Floats) -> Floats:
    """The largest magnitude of each row, zeros without a sign; NaN if it holds one."""
    found: Floats = np.abs(np.maximum(rows.max(axis=1), -rows.min(axis=1)))
    return found


def round_half_away(ratios: Floats) -> Floats:
    """C's roundf, within [-127, 127]."""
    rounded = np.trunc(ratios)
    # Adding 0.5 before cutting would lift 0.49999997 to 1.
    rounded += np.copysign(np.abs(ratios - rounded) >= 0.5, ratios)
    # Only a subnormal scale, itself rounded coarsely, can leave the range.
    return np.clip(rounded, -127, 127, out=rounded)
