"""Tensor types of GGUF that are not read, and rows that cannot be."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from numballama.config import ModelConfig
from numballama.errors import FormatError, UnsupportedError
from numballama.files import map_file
from numballama.formats.gguf.header import TENSOR_TYPES, Header
from numballama.formats.gguf.reader import WEIGHT_TYPES
from numballama.loader import open_checkpoint
from tests.helpers.gguf_files import edited, save, tensor


@pytest.mark.parametrize("kind", sorted({name for name, *_ in TENSOR_TYPES.values()} - WEIGHT_TYPES.keys()))
def test_every_other_type_is_named(tmp_path: Path, kind: str) -> None:
    """Integers, the formats of sums, and all of IQ, TQ, MXFP4 and the like."""
    number = next(number for number, (name, *_) in TENSOR_TYPES.items() if name == kind)
    path = save(tmp_path / "m.gguf", ModelConfig(256, 256, 1, 4, 2, 300, 16))
    data = bytearray(
        edited(path, {}, drop="blk.0.attn_q.weight", extra=(tensor("blk.0.attn_q.weight", [256, 256], number),))
    )
    header = Header(map_file(path))
    # the last of the directory, and past all others
    offset = max(info.offset + info.nbytes for info in header.tensors.values()) - header.data_offset
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    struct.pack_into("<IQ", data, at, number, offset)
    path = tmp_path / "other.gguf"
    path.write_bytes(data + bytes(256 * 256 * 8))
    with pytest.raises(
        UnsupportedError, match=rf"tensor blk\.0\.attn_q\.weight has type {kind}; supported are F32, .*Q6_K"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_rows_of_no_whole_blocks_cannot_be(tmp_path: Path, kind: str) -> None:
    """ggml cannot make such tensors either."""
    path = save(tmp_path / "m.gguf")
    data, name = bytearray(path.read_bytes()), b"blk.0.attn_q.weight"
    number = next(number for number, (name_, *_) in TENSOR_TYPES.items() if name_ == kind)
    struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 16, number)
    path = tmp_path / "other.gguf"
    path.write_bytes(data)
    with pytest.raises(
        FormatError, match=rf"a row of tensor {name.decode()} is no whole number of {kind} blocks"
    ) as caught:
        open_checkpoint(path)
    assert (caught.value.expected, caught.value.found) == (256, 32)
