"""`torch.save`'s files without PyTorch: a pickle written operation by operation, and a stored member per tensor."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

STORAGES = {
    "float32": "Float",
    "float64": "Double",
    "float16": "Half",
    "uint16": "BFloat16",
    "int32": "Int",
    "bool": "Bool",
    "int64": "Long",
}
"""Element type of an array → PyTorch's name; uint16 stands for the bits of bfloat16."""


def protocol_4(data: bytes) -> bytes:
    """A pickle of protocol 2 as one of protocol 4, such as `torch.save(…, pickle_protocol=4)` writes: in a frame, and
    with names that are texts on the stack, which are remembered."""

    def on_the_stack(name: re.Match[bytes]) -> bytes:
        return b"".join(b"\x8c" + bytes([len(text)]) + text + b"\x94" for text in name.groups()) + b"\x93\x94"

    body = re.sub(rb"c([a-z._]+)\n(\w+)\n", on_the_stack, data.removeprefix(b"\x80\2"))
    return b"\x80\4\x95" + struct.pack("<Q", len(body)) + body


def save_torch(path: Path, tensors: Mapping[str, np.ndarray], protocol: int = 2) -> Path:
    """Write the arrays as `torch.save` writes a state_dict, with a pickle of protocol 2 or 4. Arrays that are the same
    object share a storage.

    Those in Fortran's order are written as they lie; others must be in C order.
    """
    keys: dict[int, str] = {}
    items = b""
    for name, array in tensors.items():
        key = keys.setdefault(id(array), str(len(keys)))
        kind = STORAGES[str(array.dtype)]
        storage = b"(" + _text("storage") + f"ctorch\n{kind}Storage\n".encode() + _text(key) + _text("cpu")
        storage += _number(array.size) + b"tQ"
        strides = [stride // array.itemsize for stride in array.strides]
        items += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _number(0)
        items += _numbers(array.shape) + _numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        data = b"\x80\2ccollections\nOrderedDict\n)R(" + items + b"u."
        file.writestr("archive/data.pkl", protocol_4(data) if protocol == 4 else data)
        file.writestr("archive/byteorder", "little")
        for array in {id(array): array for array in tensors.values()}.values():
            file.writestr(f"archive/data/{keys[id(array)]}", array.tobytes("F" if _is_fortran(array) else "C"))
        file.writestr("archive/version", "3\n")
    return path


def _is_fortran(array: np.ndarray) -> bool:
    return array.flags.f_contiguous and not array.flags.c_contiguous


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _numbers(values: object) -> bytes:
    return b"(" + b"".join(_number(int(value)) for value in values) + b"t"  # type: ignore[attr-defined]
