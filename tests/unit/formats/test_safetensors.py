"""The safetensors container: errors name bad entries of its directory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from numballama.errors import Error, FormatError
from numballama.loader import open_checkpoint


def write(folder: Path, head: dict[str, Any] | bytes, data: bytes) -> None:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [16], "data_offsets": [0, 63]}, "data_offsets.*expected 64 bytes"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [0, 1 << 50]}, "data_offsets"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [0.0, 64.0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}, "overlap"),
        ({"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}, "shape"),
        ({"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}, "shape"),
        ({"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 64]}, "data_offsets"),
        ({"dtype": "F32", "shape": "16", "data_offsets": [0, 64]}, "shape"),
        ({"dtype": "F32", "data_offsets": [0, 64]}, "shape"),
        ({"dtype": 1, "shape": [16], "data_offsets": [0, 64]}, "dtype"),
        ([], "expected an object"),
        (None, "expected an object"),
    ],
)
def test_bad_directory_entries(copy: Callable[[str], Path], entry: object, message: str) -> None:
    folder = copy("llama")
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:start])
    write(folder, head | {NORM: entry}, data[start:])
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [("I64", [8], "wrong shape"), ("I32", [16], "type I32; supported are F32, F16, BF16"), ("X9", [16], "type 'X9'")],
)
def test_types_that_no_weight_has(copy: Callable[[str], Path], dtype: str, shape: list[int], message: str) -> None:
    folder = copy("llama")
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:start])
    head[NORM] |= {"dtype": dtype, "shape": shape}
    write(folder, head, data[start:])
    with pytest.raises(Error, match=message):
        open_checkpoint(folder)
