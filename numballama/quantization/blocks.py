"""GGUF's block types in NumPy: decoding of blocks to float32 exactly as ggml does, and encoding where that is exact too
(`search` has the encoders of other types).

Blocks are bytes, uint8 (blocks, block_bytes), or records, one a block, whose fields `TYPE_TRAITS` names. Values are
float32 (blocks, block_size). Layouts and arithmetic are those of ggml-common.h and ggml-quants.c. Elements of a block's
second half often lie in the high bits of its first half's bytes. The factors of a scale multiply exactly in float32 (11
bits of a float16 times at most 8 and 6), so the order of these products does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import Error
from .types import TYPE_TRAITS

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Records = npt.NDArray[np.void]


def records(name: str, blocks: Bytes) -> Records:
    """A view of blocks [n, block_bytes] as records [n]."""
    records: Records = blocks.view(TYPE_TRAITS[name].record)[:, 0]
    return records


def decode(name: str, blocks: Bytes) -> Floats:
    """Values [n, block_size] of blocks [n, block_bytes]. NaN and infinity where a scale is not finite."""
    return DECODERS[name](records(name, blocks))


def encode(name: str, rows: Floats, blocks: Bytes) -> None:
    """Fill blocks [n, block_bytes] with values [n, block_size], as ggml's quantize_row_…_ref do, to the bit.

    Scales beyond float16 saturate. A block so small that its scale's reciprocal overflows becomes 0. Raises `Error` for
    NaN and infinity.
    """
    if not np.isfinite(rows).all():
        raise Error(f"a weight holds NaN or infinity, which {name} cannot express")
    ENCODERS[name](rows, records(name, blocks))


def encode_f16(values: Floats) -> npt.NDArray[np.uint16]:
    """Float16 bit patterns, rounded to nearest even. Finite values beyond float16 become its largest."""
    return saturate(values.astype(np.float16).view(np.uint16), values, infinity=0x7C00)


def saturate(bits: npt.NDArray[np.uint16], values: Floats, infinity: int) -> npt.NDArray[np.uint16]:
    """Replace infinity by the largest finite value where `values` are finite, because one infinite weight would make
    all logits NaN. Changes `bits` and returns it.
    """
    overflowed = ((bits & 0x7FFF) == infinity) & np.isfinite(values)
    bits[overflowed] -= 1
    return bits


# Decoding


def _half(bits: npt.NDArray[Any]) -> Floats:
    """Float16 bits [n] as a float32 column [n, 1]."""
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)[:, None]


def _unpack(packed: Bytes, bits: int, run: int) -> Bytes:
    """Unpack integers of `bits` bits, [n, bytes] → [n, bytes · 8 / bits]: of each run of `run` bytes first the lowest
    bits of all bytes, then the next ones.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    quants = (packed.reshape(len(packed), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)
    return quants.reshape(len(packed), -1)


def pack(quants: Bytes, bits: int, run: int) -> Bytes:
    """The inverse of `_unpack`: integers of `bits` bits, [n, block_size] → [n, bytes]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(quants.reshape(len(quants), -1, 8 // bits, run) << shifts, axis=2)
    return packed.reshape(len(quants), -1)


def _dequantize(scales: Floats, quants: npt.NDArray[np.integer], mins: Floats | None = None) -> Floats:
    """scales · quants - mins: quants [n, block_size], and scales and mins [n, groups] for equal runs of them."""
    values = scales[:, :, None] * quants.reshape(*scales.shape, -1).astype(np.float32)
    if mins is not None:
        values -= mins[:, :, None]
    return values.reshape(quants.shape)


def _q8_0(block: Records) -> Floats:
    return block["qs"] * _half(block["d"])


def _q4_0(block: Records) -> Floats:
    return _half(block["d"]) * (_unpack(block["qs"], 4, 16).view(np.int8) - np.int8(8))


def _q4_1(block: Records) -> Floats:
    return _half(block["d"]) * _unpack(block["qs"], 4, 16) + _half(block["m"])


def _q5_quants(block: Records) -> Bytes:
    return _unpack(block["qs"], 4, 16) | _unpack(block["qh"], 1, 1) << np.uint8(4)


def _q5_0_quants(block: Records) -> npt.NDArray[np.int8]:
    return _q5_quants(block).view(np.int8) - np.int8(16)


def _q5_0(block: Records) -> Floats:
    return _half(block["d"]) * _q5_0_quants(block)


def _q5_1(block: Records) -> Floats:
    return _half(block["d"]) * _q5_quants(block) + _half(block["m"])


def _q2_k(block: Records) -> Floats:
    scales = _half(block["d"]) * (block["scales"] & 15)
    return _dequantize(scales, _unpack(block["qs"], 2, 32), _half(block["dmin"]) * (block["scales"] >> 4))


def _q3_k_scales_and_quants(block: Records) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """Scales [n, 16] and quants [n, 256], both signed."""
    scales = _unpack(block["scales"][:, :8], 4, 8) | _unpack(block["scales"][:, 8:], 2, 4) << 4
    quants = _unpack(block["qs"], 2, 32) | _unpack(block["hmask"], 1, 32) << 2
    return scales.view(np.int8) - np.int8(32), quants.view(np.int8) - np.int8(4)


def _q3_k(block: Records) -> Floats:
    scales, quants = _q3_k_scales_and_quants(block)
    return _dequantize(_half(block["d"]) * scales, quants)


def _scales_and_mins(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Scales [n, 8] and minimums [n, 8] of 6 bits, which q4_k and q5_k keep in 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        np.hstack([first & 63, third & 15 | (first >> 2) & 48]),
        np.hstack([second & 63, third >> 4 | (second >> 2) & 48]),
    )


def _q4_k(block: Records) -> Floats:
    scales, mins = _scales_and_mins(block["scales"])
    return _dequantize(_half(block["d"]) * scales, _unpack(block["qs"], 4, 32), _half(block["dmin"]) * mins)


def _q5_k(block: Records) -> Floats:
    scales, mins = _scales_and_mins(block["scales"])
    quants = _unpack(block["qs"], 4, 32) | _unpack(block["qh"], 1, 32) << 4
    return _dequantize(_half(block["d"]) * scales, quants, _half(block["dmin"]) * mins)


def _q6_k(block: Records) -> Floats:
    quants = _unpack(block["ql"], 4, 64) | _unpack(block["qh"], 2, 32) << 4
    return _dequantize(_half(block["d"]) * block["scales"], quants.view(np.int8) - np.int8(32))


def _iq4_quants(name: str, block: Records) -> npt.NDArray[np.int8]:
    """What the quants stand for, signed."""
    return np.array(TYPE_TRAITS[name].codebook, np.int8)[_unpack(block["qs"], 4, 16)]


def _iq4_nl(block: Records) -> Floats:
    return _half(block["d"]) * _iq4_quants("iq4_nl", block)


def _iq4_xs_scales(block: Records) -> Floats:
    """Scales [n, 8] from 6 bits: the lowest four of two of them in a byte, the others of all eight in 16 bits."""
    high = np.ascontiguousarray(block["scales_h"]).view(np.uint8).reshape(-1, 2)
    scales = _unpack(block["scales_l"], 4, 1) | _unpack(high, 2, 1) << np.uint8(4)
    return _half(block["d"]) * (scales.view(np.int8) - np.int8(32))


def _iq4_xs(block: Records) -> Floats:
    return _dequantize(_iq4_xs_scales(block), _iq4_quants("iq4_xs", block))


DECODERS: dict[str, Callable[[Records], Floats]] = {
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
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
}


# Repacking: the same values in another type


def _q5_0_to_q8_0(block: Records, out: Records) -> None:
    out["d"] = block["d"]
    out["qs"] = _q5_0_quants(block)


def _q3_k_to_q6_k(block: Records, out: Records) -> None:
    out["d"] = block["d"]
    out["scales"], signed = _q3_k_scales_and_quants(block)
    quants = (signed + np.int8(32)).view(np.uint8)
    out["ql"], out["qh"] = pack(quants & np.uint8(15), 4, 64), pack(quants >> np.uint8(4), 2, 32)


def _iq4_nl_to_q8_0(block: Records, out: Records) -> None:
    out["d"] = block["d"]
    out["qs"] = _iq4_quants("iq4_nl", block)


def _iq4_xs_to_q8_0(block: Records, out: Records) -> None:
    """Eight blocks of each. A scale is rounded to float16."""
    out["d"] = encode_f16(_iq4_xs_scales(block)).reshape(-1)
    out["qs"] = _iq4_quants("iq4_xs", block).reshape(len(out), -1)


REPACKERS: dict[tuple[str, str], Callable[[Records, Records], None]] = {
    ("q5_0", "q8_0"): _q5_0_to_q8_0,
    ("q3_k", "q6_k"): _q3_k_to_q6_k,
    ("iq4_nl", "q8_0"): _iq4_nl_to_q8_0,
    ("iq4_xs", "q8_0"): _iq4_xs_to_q8_0,
}
"""(type, another type that can hold all its values) → function that fills blocks of the second type."""
ROUNDING = frozenset([("iq4_xs", "q8_0")])
"""Those of `REPACKERS` that round scales. The others are exact."""


def repack(name: str, target: str, blocks: Bytes, out: Bytes) -> None:
    """Fill `out` [m, bytes of a block of `target`] with the values of `blocks`. (name, target) is in `REPACKERS`."""
    REPACKERS[name, target](records(name, blocks), records(target, out))


# Encoding


def _reciprocal(scales: Floats) -> Floats:
    """1 / scale, or 0 where that is beyond float32."""
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=np.abs(scales) > np.float32(2.0**-128))


def _nibbles(quants: Floats) -> Bytes:
    """Quants truncated to integers from 0 to 15, two a byte: the first half of a row in the low four bits."""
    nibbles = np.minimum(quants, np.float32(15)).astype(np.uint8)
    half = nibbles.shape[1] // 2
    return nibbles[:, :half] | (nibbles[:, half:] << np.uint8(4))


def _encode_q8_0(rows: Floats, block: Records) -> None:
    """The quants come from the scale before it is rounded to float16."""
    scales = max_magnitude(rows)[:, None] / np.float32(127)
    block["d"] = encode_f16(scales)[:, 0]
    block["qs"] = round_half_away(rows * _reciprocal(scales)).astype(np.int8)


def _encode_q4_0(rows: Floats, block: Records) -> None:
    """The value of largest magnitude, the first if there are several, becomes -8."""
    extreme = np.take_along_axis(rows, np.abs(rows).argmax(axis=1, keepdims=True), axis=1)
    scales = extreme / np.float32(-8)
    block["d"] = encode_f16(scales)[:, 0]
    block["qs"] = _nibbles(rows * _reciprocal(scales) + np.float32(8.5))


def _encode_q4_1(rows: Floats, block: Records) -> None:
    mins = rows.min(axis=1, keepdims=True)
    scales = (rows.max(axis=1, keepdims=True) - mins) / np.float32(15)  # infinite if the range is beyond float32
    block["d"] = encode_f16(np.minimum(scales, np.finfo(np.float32).max))[:, 0]
    block["m"] = encode_f16(mins)[:, 0]
    block["qs"] = _nibbles(np.nan_to_num((rows - mins) * _reciprocal(scales)) + np.float32(0.5))


ENCODERS: dict[str, Callable[[Floats, Records], None]] = {
    "q8_0": _encode_q8_0,
    "q4_0": _encode_q4_0,
    "q4_1": _encode_q4_1,
}


def max_magnitude(rows: Floats) -> Floats:
    """The largest magnitude of each row, never -0.0. NaN if the row holds one."""
    magnitudes: Floats = np.abs(np.maximum(rows.max(axis=1), -rows.min(axis=1)))
    return magnitudes


def round_half_away(ratios: Floats) -> Floats:
    """Round to the nearest integer, ties away from zero (C's roundf), within [-127, 127]."""
    rounded = np.trunc(ratios)
    # Not trunc(ratio + 0.5): that would lift 0.49999997 to 1.
    rounded += np.copysign(np.abs(ratios - rounded) >= 0.5, ratios)
    # Only a subnormal scale, which is itself rounded coarsely, gives values outside the range.
    return np.clip(rounded, -127, 127, out=rounded)
