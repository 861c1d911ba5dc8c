"""The golden models in Hugging Face's format, and changes to their JSON files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ELEMENTS = {
    "F32": np.float32,
    "F64": np.float64,
    "F16": np.float16,
    "BF16": np.uint16,
    "U32": np.uint32,
    "I32": np.int32,
}
"""Element type of a safetensors file → NumPy's."""

HF = Path(__file__).parents[1] / "golden" / "hf"


def edit(folder: Path, changes: dict[str, Any], name: str = "config.json") -> Path:
    """Replace keys of a JSON file; None removes a key."""
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def tensors(folder: Path, name: str = "model.safetensors") -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, bfloat16 as its bits."""
    data = (folder / name).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for key, entry in json.loads(data[8:start]).items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            array = np.frombuffer(data[start + begin : start + end], ELEMENTS[entry["dtype"]])
            found[key] = array.reshape(entry["shape"])
    return found


def save_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write a safetensors file; uint16 stands for the bits of bfloat16."""
    kinds = {str(np.dtype(element)): kind for kind, element in ELEMENTS.items()}
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in arrays.items():
        head[name] = {
            "dtype": kinds[str(array.dtype)], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes],
        }  # fmt: skip
        at += array.nbytes
    text = json.dumps(head).encode()
    path.unlink(missing_ok=True)  # an older one may be mapped
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in arrays.values()))
    return path
