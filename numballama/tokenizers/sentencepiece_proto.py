"""Reads and writes fields in protobuf's wire format. sentencepiece's Python interface does not give the types of pieces
and the normalisation of text, nor change them; both are fields of its `ModelProto`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import FormatError

_VARINT, _I64, _BYTES, _I32 = 0, 1, 2, 5


class Double(float):
    """A number of 64 bits on the wire, where a float has 32. sentencepiece has no such field."""


def message_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message. Values are int, float, `Double` or bytes, as the wire type says.

    Raises `FormatError` for a damaged message.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while shift < 70:
            if at >= len(message):
                break
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise FormatError("a damaged protobuf message", where=at, expected="a varint", found="none")

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == _VARINT:
            yield number, varint()
            continue
        length = {_I64: 8, _I32: 4}.get(wire) or (varint() if wire == _BYTES else len(message))
        if length > len(message) - at:
            raise FormatError(
                "a damaged protobuf message", where=at, expected=f"{length} bytes", found=len(message) - at
            )
        data, at = message[at : at + length], at + length
        if wire == _I64:
            yield number, Double(struct.unpack("<d", data)[0])
        else:
            yield number, data if wire == _BYTES else struct.unpack("<f", data)[0]


def known_fields(message: bytes, types: Mapping[int, type]) -> Iterator[tuple[int, Any]]:
    """The fields of a message that have a number and type of `types`.

    Others are unknown: protobuf, too, skips a field whose wire type is not that of its number.
    """
    return ((number, value) for number, value in message_fields(message) if type(value) is types.get(number))


def field_bytes(number: int, value: int | float | bytes) -> bytes:
    """A field of a message: a varint for an int, 64 or 32 bits for a `Double` or float, else a length and bytes."""
    if isinstance(value, Double):
        return _varint(number * 8 + _I64) + struct.pack("<d", value)
    if isinstance(value, float):
        return _varint(number * 8 + _I32) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number * 8 + _VARINT) + _varint(value)
    return _varint(number * 8 + _BYTES) + _varint(len(value)) + value


def message_bytes(fields: Iterable[tuple[int, int | float | bytes]]) -> bytes:
    """A message with these fields."""
    return b"".join(field_bytes(number, value) for number, value in fields)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])
