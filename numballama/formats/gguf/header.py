"""GGUF's container: reads the metadata and the tensor directory of an untrusted file.

Every count, length and offset is compared with the size of the file before it is used. A metadata value is decoded when
a getter is called; until then only its position is stored. So opening costs no more than the bytes that are there.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ...errors import FormatError, UnsupportedError
from ...files import MappedFile
from ...memory import round_up
from ...quantization.types import TYPE_TRAITS
from ..tensors import TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
"""Default of `general.alignment`, in bytes. The offset of every tensor is a multiple of it."""

MAX_ENTRIES, MAX_STRINGS, MAX_NAME, MAX_DIMS = 1 << 16, 1 << 22, 1 << 16, 4
"""Limits on: metadata keys, and tensors; strings and arrays in all arrays together; bytes of a name; dimensions. The
first two bound memory and time for large files. The largest vocabularies have 0.3 million tokens, 0.6 million merges.
"""


class ValueType(IntEnum):
    """Types of metadata values, numbered as in the format."""

    UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)


SCALARS: dict[ValueType, np.dtype[Any]] = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("<u1"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}

_UNREAD_TYPES = {
    9: ("Q8_1", 32, 40),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""Types that this package cannot read as weights. Their sizes are needed to check the directory of a file."""
_REMOVED_TYPES = {
    4: ("Q4_2", ""), 5: ("Q4_3", ""),
    31: ("Q4_0_4_4", "Q4_0"), 32: ("Q4_0_4_8", "Q4_0"), 33: ("Q4_0_8_8", "Q4_0"),
    36: ("IQ4_NL_4_4", "IQ4_NL"), 37: ("IQ4_NL_4_8", "IQ4_NL"), 38: ("IQ4_NL_8_8", "IQ4_NL"),
}  # fmt: skip
"""Types that ggml had once → (name, the type of the same values in another order)."""
_READ_TYPES = {
    traits.gguf_id: (traits.name.upper(), traits.block_size, traits.block_bytes)
    for traits in TYPE_TRAITS.values()
    if traits.gguf_id is not None
}
TENSOR_TYPES = dict(sorted((_READ_TYPES | _UNREAD_TYPES).items()))
"""ggml's number of a tensor type → (name, elements of a block, bytes of a block)."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
T = TypeVar("T")


@dataclass(frozen=True)
class Field:
    """Position of a metadata value: `count` items of `type` from byte `offset`. A scalar has `array` False.

    An array of arrays has type ARRAY. No key that this package reads has such a value, so no getter returns it.
    """

    type: ValueType
    offset: int
    count: int = 1
    array: bool = False

    def __str__(self) -> str:
        return f"an array of {self.count:,} {self.type.name}" if self.array else self.type.name


class Header:
    """Checked metadata and tensor directory of a GGUF file. Each type has a getter, which returns the value of a key.

    `fields` and `tensors` are in file order. Raises `FormatError` with the byte offset for a damaged file, and
    `UnsupportedError` for other versions, big-endian files and unknown tensor types. The getters raise `FormatError`
    naming the key when a value has another type.
    """

    def __init__(self, file: MappedFile) -> None:
        self.file, self.path, self.size, self._data = file, file.path, file.size, file.data
        self._at = 0
        self._strings_left = MAX_STRINGS
        self.fields: dict[str, Field] = {}
        self.tensors: dict[str, TensorInfo] = {}
        if self._data[:4] != MAGIC:
            raise self._fault("not a GGUF file", 0, "GGUF", bytes(self._data[:4]))
        self._at = 4
        self.version = self._read(_U32, "the version")
        if self.version not in VERSIONS:
            swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big") in VERSIONS
            what = "a big-endian file" if swapped else f"version {self.version:,}"
            advice = "convert the model again" if self.version < VERSIONS[0] else "a newer numballama may read it"
            advice = "the gguf package turns it: gguf-convert-endian FILE little" if swapped else advice
            raise UnsupportedError(
                f"{self.path}: GGUF, {what}; supported are versions 2 and 3, little-endian: {advice}"
            )
        n_tensors = self._count("tensors", 24)  # a name's length, no dimension, type and offset
        n_fields = self._count("metadata keys", 13)  # a name's length, type and a value of one byte
        for _ in range(n_fields):
            self._read_field()
        self.alignment = self._read_alignment()
        directory = [self._read_tensor() for _ in range(n_tensors)]
        self.data_offset = round_up(self._at, self.alignment)
        for info, where in directory:
            self._place(info, where)
        self._require_apart()

    # Metadata, decoded

    def integer(self, key: str, default: int | None = None) -> int | None:
        """The integer under a key, of any width; `default` when the key is missing."""
        return self._get(
            key, "an integer", lambda f: f.type in _INTEGERS and not f.array, lambda f: int(self._scalar(f)), default
        )

    def number(self, key: str, default: float | None = None) -> float | None:
        """The number under a key. A float32 becomes the shortest decimal that rounds to it, so that 1e-5 stays 1e-5."""
        wanted = (*_INTEGERS, ValueType.FLOAT32, ValueType.FLOAT64)
        return self._get(
            key, "a number", lambda f: f.type in wanted and not f.array, lambda f: float(str(self._scalar(f))), default
        )

    def flag(self, key: str, default: bool | None = None) -> bool | None:
        """The boolean under a key."""

        def decode(field: Field) -> bool:
            value = int(self._scalar(field))
            if value > 1:
                raise self._fault(f"metadata key {key} is neither true nor false", field.offset, "0 or 1", value)
            return bool(value)

        return self._get(key, "true or false", lambda f: f.type is ValueType.BOOL and not f.array, decode, default)

    def text(self, key: str, default: str | None = None, notes: list[str] | None = None) -> str | None:
        """The string under a key. Bytes that are not UTF-8 are an error, or U+FFFD and one of `notes` if given."""

        def decode(field: Field) -> str:
            length = _U64.unpack_from(self._data, field.offset)[0]
            data = self._data[field.offset + 8 : field.offset + 8 + length]
            try:
                return self._utf8(data, field.offset + 8, key)
            except FormatError as error:
                if notes is None:
                    raise
                notes.append(f"{error}; such bytes are read as \ufffd")
                return data.decode(errors="replace")

        return self._get(key, "a string", lambda f: f.type is ValueType.STRING and not f.array, decode, default)

    def numbers(self, key: str) -> npt.NDArray[Any] | None:
        """The array of numbers under a key: a view of the file, in the file's type. None when the key is missing."""

        def decode(field: Field) -> npt.NDArray[Any]:
            return np.frombuffer(self._data, SCALARS[field.type], field.count, field.offset)

        return self._get(key, "an array of numbers", lambda f: f.array and f.type in SCALARS, decode, None)

    def strings(self, key: str) -> list[bytes] | None:
        """The array of strings under a key, as bytes, because pieces may not be UTF-8. None when the key is missing."""

        def decode(field: Field) -> list[bytes]:
            data, offset, unpack = self._data, field.offset, _U64.unpack_from
            strings = []
            for _ in range(field.count):
                end = offset + 8 + unpack(data, offset)[0]
                strings.append(data[offset + 8 : end])
                offset = end
            return strings

        return self._get(key, "an array of strings", lambda f: f.array and f.type is ValueType.STRING, decode, None)

    def _get(
        self, key: str, expected: str, fits: Callable[[Field], bool], decode: Callable[[Field], T], default: T | None
    ) -> T | None:
        if (field := self.fields.get(key)) is None:
            return default
        if not fits(field):
            raise self._fault(f"metadata key {key} has the wrong type", field.offset, expected, field)
        return decode(field)

    def _scalar(self, field: Field) -> Any:
        return np.frombuffer(self._data, SCALARS[field.type], 1, field.offset)[0]

    # The file, read from front to back

    def _fault(self, message: str, where: int | str, expected: object, found: object) -> FormatError:
        return FormatError(message, path=self.path, where=where, expected=expected, found=found)

    def _require(self, nbytes: int, what: str) -> None:
        """Raise `FormatError` unless `nbytes` bytes follow."""
        if nbytes > self.size - self._at:
            left = self.size - self._at
            raise self._fault(f"the file ends in {what}", self._at, f"{nbytes:,} bytes", f"{left:,}")

    def _read(self, kind: struct.Struct, what: str) -> int:
        self._require(kind.size, what)
        value: int = kind.unpack_from(self._data, self._at)[0]
        self._at += kind.size
        return value

    def _count(self, what: str, min_bytes: int) -> int:
        """Read a count of entries, each of at least `min_bytes` bytes."""
        where, count = self._at, self._read(_U64, f"the number of {what}")
        limit = min((self.size - self._at) // min_bytes, MAX_ENTRIES)
        if count > limit:
            raise self._fault(f"too many {what} for this file", where, f"at most {limit:,}", f"{count:,}")
        return count

    def _name(self, what: str, least: int = 1, errors: str = "strict") -> str:
        where, length = self._at, self._read(_U64, f"the length of {what}'s name")
        if not least <= length <= MAX_NAME:
            raise self._fault(f"bad length of {what}'s name", where, f"{least} to {MAX_NAME:,}", f"{length:,}")
        self._require(length, f"{what}'s name")
        self._at += length
        return self._utf8(self._data[self._at - length : self._at], where + 8, f"{what}'s name", errors)

    def _utf8(self, data: bytes, where: int, what: str, errors: str = "strict") -> str:
        try:
            return data.decode(errors=errors)
        except UnicodeDecodeError as error:
            found = data[error.start : error.start + 4]
            raise self._fault(f"{what} is not UTF-8", where + error.start, "UTF-8", found) from None

    def _value_type(self, key: str) -> ValueType:
        where, number = self._at, self._read(_U32, f"the type of {key}")
        try:
            return ValueType(number)
        except ValueError:
            raise self._fault(f"metadata key {key} has an unknown type", where, "0 to 12", f"{number:,}") from None

    def _read_field(self) -> None:
        where, key = self._at, self._name("a metadata key", least=0, errors="backslashreplace")
        if key in self.fields:
            raise self._fault(f"metadata key {key} occurs twice", where, "distinct keys", key)
        kind, array, count = self._value_type(key), False, 1
        if kind is ValueType.ARRAY:
            array, kind = True, self._value_type(key)
            count = self._read(_U64, f"the length of {key}")
        self.fields[key] = Field(kind, self._at, count, array)
        nested = [(kind, count)]  # items that are still to be skipped, those that come first last
        while nested:
            kind, count = nested.pop()
            if kind is ValueType.STRING:
                self._skip_strings(key, count)
            elif kind is ValueType.ARRAY:
                if count:
                    self._spend(key, 1)
                    inner = self._value_type(key), self._read(_U64, f"the length of an array in {key}")
                    nested += [(kind, count - 1), inner]
            else:
                nbytes = count * SCALARS[kind].itemsize
                self._require(nbytes, f"metadata key {key}")
                self._at += nbytes

    def _spend(self, key: str, count: int) -> None:
        """Raise `FormatError` unless `count` more strings, or arrays in arrays, are within the limit."""
        if count > self._strings_left:
            raise self._fault(
                f"metadata key {key} has too many strings", self._at, f"at most {self._strings_left:,}", f"{count:,}"
            )
        self._strings_left -= count

    def _skip_strings(self, key: str, count: int) -> None:
        self._require(8 * count, f"metadata key {key}")
        self._spend(key, count)
        data, unpack, last, at = self._data, _U64.unpack_from, self.size - 8, self._at
        for _ in range(count):
            if at > last:
                break
            self._at, at = at, at + 8 + unpack(data, at)[0]
        else:
            if at <= self.size:
                self._at = at
                return
        raise self._fault(
            f"the file ends in a string of metadata key {key}",
            self._at,
            f"more than {at - self._at:,} bytes",
            f"{self.size - self._at:,}",
        )

    def _read_alignment(self) -> int:
        alignment = self.integer("general.alignment", DEFAULT_ALIGNMENT)
        assert alignment is not None
        if alignment <= 0 or alignment & (alignment - 1):
            where = self.fields["general.alignment"].offset
            raise self._fault("bad general.alignment", where, "a power of two", f"{alignment:,}")
        return alignment

    def _read_tensor(self) -> tuple[TensorInfo, int]:
        """Read a directory entry. Returns it, with an offset relative to the data, and the position of this offset."""
        where, name = self._at, self._name("a tensor")
        if name in self.tensors:
            raise self._fault(f"tensor {name} occurs twice", where, "distinct names", name)
        where, n_dims = self._at, self._read(_U32, f"the dimensions of tensor {name}")
        if n_dims > MAX_DIMS:
            raise self._fault(f"tensor {name} has too many dimensions", where, f"at most {MAX_DIMS}", f"{n_dims:,}")
        where, dims = self._at, [self._read(_U64, f"the dimensions of tensor {name}") for _ in range(n_dims)]
        if 0 in dims:
            raise self._fault(f"tensor {name} is empty", where, "positive dimensions", dims)
        where, number = self._at, self._read(_U32, f"the type of tensor {name}")
        if number in _REMOVED_TYPES:
            kind, same = _REMOVED_TYPES[number]
            instead = f"take the model in {same}" if same else "take a file of another quantisation"
            raise UnsupportedError(
                f"{self.path}: tensor {name} has type {kind}, which llama.cpp reads no longer: {instead}"
            )
        if number not in TENSOR_TYPES:
            known = ", ".join(kind for kind, *_ in TENSOR_TYPES.values())
            raise UnsupportedError(
                f"{self.path}: tensor {name} has type {number:,} (at byte {where:,}); known: {known}"
            )
        kind, block, block_bytes = TENSOR_TYPES[number]
        if (columns := dims[0] if dims else 1) % block:
            raise self._fault(f"a row of tensor {name} is not a whole number of {kind} blocks", where, block, columns)
        nbytes = math.prod(dims) // block * block_bytes
        where, offset = self._at, self._read(_U64, f"the offset of tensor {name}")
        if offset % self.alignment:
            expected = f"a multiple of {self.alignment}"
            raise self._fault(f"tensor {name} is not aligned", where, expected, f"offset {offset:,}")
        info = self.tensors[name] = TensorInfo(self.file, name, kind, tuple(reversed(dims)), offset, nbytes)
        return info, where

    def _place(self, info: TensorInfo, where: int) -> None:
        """Make the offset of a tensor relative to the file."""
        start = self.data_offset + info.offset
        if start + info.nbytes > self.size:
            raise self._fault(
                f"tensor {info.name}, {info.type} of shape {info.shape}, extends beyond the file: was a download "
                "interrupted?",
                where,
                f"a file of {start + info.nbytes:,} bytes",
                f"{self.size:,}",
            )
        self.tensors[info.name] = replace(info, offset=start)

    def _require_apart(self) -> None:
        ordered = sorted(self.tensors.values(), key=lambda info: info.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                raise self._fault(
                    f"tensors {before.name} and {after.name} overlap",
                    f"tensor {after.name}",
                    f"an offset from {before.offset + before.nbytes:,}",
                    f"{after.offset:,}",
                )


_INTEGERS = tuple(kind for kind, dtype in SCALARS.items() if dtype.kind in "ui" and kind is not ValueType.BOOL)


def require(value: T | None, header: Header, key: str) -> T:
    """`value`, read from the metadata key `key`. Raises `FormatError` when it is None."""
    if value is None:
        raise FormatError("a metadata key is missing", path=header.path, expected=key, found="no such key")
    return value
