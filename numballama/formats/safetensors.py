"""The safetensors container: a length, a JSON directory, then the tensors. https://github.com/huggingface/safetensors

The safetensors library copies every tensor for NumPy, and does not support bfloat16 there. Here a tensor is a view of
the mapped file. Every length and offset is compared with the size of the file before it is used.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TypeGuard

import numpy as np

from ..checkpoint import Weight
from ..errors import FormatError, UnsupportedError
from ..files import MappedFile
from ..memory import ceil_div
from ..quantization.types import BF16, F16, F32, WeightType
from .json_reader import Keys, parse_object
from .tensors import TensorInfo, view_weight

DTYPES: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
"""Name of an element type → its bits."""

WEIGHT_TYPES: dict[str, tuple[WeightType, type[np.generic]]] = {
    "F32": (F32, np.float32),
    "F16": (F16, np.uint16),
    "BF16": (BF16, np.uint16),
    "F64": (F32, np.float64),
}
"""Element types that weights may have → (our type, element type in the file). float64 becomes float32."""

_MAX_DIMS = 8
_ALIGNMENT = 8


def looks_like(file: MappedFile) -> bool:
    """Whether the file begins with a length that fits it and a JSON object."""
    return file.data[8:9] == b"{" and int.from_bytes(file.data[:8], "little") < file.size


def directory(file: MappedFile) -> dict[str, TensorInfo]:
    """The tensors of a file by name, checked. Raises `FormatError` for a damaged file."""
    length = int.from_bytes(file.data[:8], "little")
    if file.size > 8 and file.data[8:9] != b"{":
        raise FormatError(
            "not a safetensors file",
            path=file.path,
            where=8,
            expected="{",
            found=ascii(file.data[:24].decode("latin-1")),
        )
    if file.size < 8 or length > file.size - 8:
        raise FormatError(
            "the file ends in its directory: was a download interrupted?",
            path=file.path,
            where=0,
            expected=f"a directory of at most {max(file.size - 8, 0):,} bytes",
            found=f"{length:,}",
        )
    keys = parse_object(file, 8, 8 + length, "the directory")
    tensors = {name: _info(file, keys, name, 8 + length) for name in keys.values if name != "__metadata__"}
    for before, after in pairwise(sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes))):
        if before.offset + before.nbytes > after.offset:
            raise FormatError(f"tensors {before.name} and {after.name} overlap", path=file.path, where=after.offset)
    return tensors


def _info(file: MappedFile, keys: Keys, name: str, start: int) -> TensorInfo:
    entry = Keys({name: keys.values[name]}, file.path, "the directory").inner(name)
    if entry is None:
        raise keys.fault(name, "an object")
    entry.what = f"tensor {name}"
    dtype = entry.text("dtype")
    if dtype not in DTYPES:
        raise UnsupportedError(f"{file.path}: tensor {name} has type {dtype[:30]!r}; known are {', '.join(DTYPES)}")
    shape, span = entry.values.get("shape"), entry.values.get("data_offsets")
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        raise entry.fault("shape", f"at most {_MAX_DIMS} whole numbers")
    if not _naturals(span) or len(span) != 2 or not span[0] <= span[1]:
        raise entry.fault("data_offsets", "a begin and an end")
    bits = math.prod(shape) * DTYPES[dtype]
    if bits % 8 or bits // 8 != span[1] - span[0]:
        raise entry.fault("data_offsets", f"{ceil_div(bits, 8):,} bytes for {dtype} {shape}")
    if span[1] > file.size - start:
        raise FormatError(
            "the file ends before its tensors: was a download interrupted?",
            path=file.path,
            where=f"tensor {name[:100]}",
            expected=f"at least {start + span[1]:,} bytes",
            found=f"{file.size:,}",
        )
    return TensorInfo(file, name, dtype, tuple(shape), start + span[0], span[1] - span[0])


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def view(info: TensorInfo, shape: tuple[int, ...]) -> Weight:
    """The tensor as a weight of `shape`: a matrix as a view of the file, a vector as float32.

    Raises `FormatError` for another shape and `UnsupportedError` for a type that weights cannot have.
    """
    if info.shape != shape:
        raise info.wrong_shape(shape)
    return view_weight(info, shape, WEIGHT_TYPES)


def header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The length and directory of a file that holds these tensors (name, element type, shape) one after another."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * DTYPES[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
