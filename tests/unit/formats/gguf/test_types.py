"""Tensor types that the GGUF reader refuses, and rows that are not whole blocks."""

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
def test_unsupported_types_are_named_in_the_error(tmp_path: Path, kind: str) -> None:
    """Integers, Q8_1 and Q8_K, which are for activations, and all IQ, TQ, MXFP4 and similar types."""
    number = next(number for number, (name, *_) in TENSOR_TYPES.items() if name == kind)
    path = save(tmp_path / "m.gguf", ModelConfig(256, 256, 1, 4, 2, 300, 16))
    data = bytearray(
        edited(path, {}, drop="blk.0.attn_q.weight", extra=(tensor("blk.0.attn_q.weight", [256, 256], number),))
    )
    header = Header(map_file(path))
    # the new tensor is the last of the directory; its data begins behind all others'
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
def test_rows_that_are_not_whole_blocks_are_refused(tmp_path: Path, kind: str) -> None:
    """ggml cannot create such tensors either."""
    path = save(tmp_path / "m.gguf")
    data, name = bytearray(path.read_bytes()), b"blk.0.attn_q.weight"
    number = next(number for number, (name_, *_) in TENSOR_TYPES.items() if name_ == kind)
    struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 16, number)
    path = tmp_path / "other.gguf"
    path.write_bytes(data)
    with pytest.raises(
        FormatError, match=rf"a row of tensor {name.decode()} is not a whole number of {kind} blocks"
    ) as caught:
        open_checkpoint(path)
    assert (caught.value.expected, caught.value.found) == (256, 32)
