"""Solutions of docs/course/08-parameters.md."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numballama import loader

SIZES = DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 16, 24, 2, 4, 2, 40, 32
KV = DIM // HEADS * KV_HEADS
SHAPES = [
    (VOCAB, DIM), (LAYERS, DIM), (LAYERS, DIM, DIM), (LAYERS, KV, DIM), (LAYERS, KV, DIM), (LAYERS, DIM, DIM),
    (LAYERS, DIM), (LAYERS, HIDDEN, DIM), (LAYERS, DIM, HIDDEN), (LAYERS, HIDDEN, DIM), (DIM,),
    (CONTEXT, DIM // HEADS // 2), (CONTEXT, DIM // HEADS // 2),
]  # fmt: skip


def write(path: Path, tied: bool = True) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = SHAPES if tied else [*SHAPES, (VOCAB, DIM)]
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    header = struct.pack("<7i", *SIZES[:5], VOCAB if tied else -VOCAB, CONTEXT)
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays))
    return arrays


def test_1_offsets(tmp_path: Path) -> None:
    path = tmp_path / "tiny.bin"
    write(path)
    weights = loader.open_checkpoint(path).weights
    for layer in range(LAYERS):
        offset = 28 + 4 * (VOCAB * DIM + LAYERS * DIM + layer * DIM * DIM)
        found = np.frombuffer(path.read_bytes(), np.float32, DIM * DIM, offset).reshape(DIM, DIM)
        assert np.array_equal(found, weights[f"layers.{layer}.wq"].data)


def test_2_not_tied(tmp_path: Path) -> None:
    path = tmp_path / "untied.bin"
    arrays = write(path, tied=False)
    checkpoint = loader.open_checkpoint(path)
    assert not checkpoint.config.tied_embeddings
    assert np.array_equal(checkpoint.weights["output"].data, arrays[-1])


class Reader:
    """Compares each length with the bytes that are left. An element of an array has at least one byte."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(f"{count} bytes at {self.at}, but the file has {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        assert kind == 4, "this solution has arrays of uint32 only"
        return list(struct.unpack(f"<{count}I", self.take(4 * count)))


def test_3_a_bounded_reader() -> None:
    assert Reader(struct.pack("<Q", 5) + b"llama").string() == "llama"
    assert Reader(struct.pack("<IQ2I", 4, 2, 7, 8)).array() == [7, 8]
    with pytest.raises(ValueError, match="1099511627776 bytes at 8"):
        Reader(struct.pack("<Q", 1 << 40) + b"llama").string()
    with pytest.raises(ValueError, match="but the file has"):
        Reader(struct.pack("<IQ", 4, 1 << 40)).array()
