"""Damaged and hostile checkpoints: each ends in an Error that says where the file is wrong."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from numballama.config import NAMED_SHAPES, ModelConfig
from numballama.errors import Error, FormatError, UnsupportedError
from numballama.export import WRITERS
from numballama.formats.llama2c import kuiper, layout, llama2c
from numballama.loader import open_checkpoint
from tests.helpers.random_models import SMALL, save

CONFIG_AT = {"llama2c-v0": 0, "llama2c-v1": 8, "llama2c-v2": 8, "kuiper": 0, "kuiper-int8": 0}


def layout_of(name: str, config: ModelConfig, group: int = 64) -> layout.Layout:
    return {
        "llama2c-v0": lambda: llama2c.legacy_layout(config),
        "llama2c-v1": lambda: llama2c.v1_layout(config),
        "llama2c-v2": lambda: llama2c.v2_layout(config, group),
        "kuiper": lambda: llama2c.legacy_layout(config),
        "kuiper-int8": lambda: kuiper.int8_layout(config, group),
    }[name]()


def boundaries(plan: layout.Layout) -> Iterator[tuple[int, str]]:
    """(offset, what begins there) of the header, every tensor and every vector of scales."""
    yield 0, "the header"
    for tensor, offset in plan.sections():
        yield offset, tensor.name
        if tensor.type.group:
            yield offset + tensor.numel, f"the scales of {tensor.name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIG_AT)
@pytest.mark.parametrize("tied", [True, False])
def test_truncation_at_every_boundary_names_the_tensor(tmp_path: Path, name: str, tied: bool) -> None:
    config = replace(SMALL, tied_embeddings=tied, qkv_bias=name == "kuiper")
    path, _ = save(tmp_path, name, config)
    data, plan = path.read_bytes(), layout_of(name, config)
    assert len(data) == plan.nbytes
    for boundary, begins in boundaries(plan):
        for size in {boundary - 1, boundary, boundary + 1} & set(range(len(data))):
            path.write_bytes(data[:size])
            with pytest.raises(FormatError) as caught:
                open_checkpoint(path)
            assert caught.value.path == path
            if size > plan.header_size:
                assert caught.value.found == f"{size:,} bytes"
                assert plan.locate(size) in str(caught.value)
            if size == boundary > plan.header_size:
                assert plan.locate(size) == begins


@pytest.mark.parametrize("name", CONFIG_AT)
def test_trailing_bytes_are_counted(tmp_path: Path, name: str) -> None:
    path, _ = save(tmp_path, name)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"abc")
    with pytest.raises(FormatError, match="3 bytes follow the last tensor") as caught:
        open_checkpoint(path)
    assert caught.value.where == size


@pytest.mark.parametrize("name", CONFIG_AT)
@pytest.mark.parametrize("field", layout.FIELDS)
@pytest.mark.parametrize("value", [0, -1, 1, 1 << 16, (1 << 31) - 1, -(1 << 31)])
def test_header_fields_that_cannot_be(tmp_path: Path, name: str, field: str, value: int) -> None:
    path, _ = save(tmp_path, name)
    data = bytearray(path.read_bytes())
    where = CONFIG_AT[name] + 4 * layout.FIELDS.index(field)
    struct.pack_into("<i", data, where, value)
    path.write_bytes(data)
    if field == "context" and name in ("llama2c-v1", "llama2c-v2", "kuiper-int8") and value in (1, 1 << 16):
        assert open_checkpoint(path).config.context == value  # nothing in these files is as long as the context
        return
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    signed = field == "vocab_size" and name in ("llama2c-v0", "kuiper", "kuiper-int8")
    if value <= 0 and not (signed and value < 0):
        assert (caught.value.where, caught.value.expected, caught.value.found) == (where, "a positive number", value)


@pytest.mark.parametrize(
    ("field", "value"), [("n_heads", 5), ("n_heads", 24), ("n_kv_heads", 4), ("n_kv_heads", 12), ("dim", 25)]
)
@pytest.mark.parametrize("name", CONFIG_AT)
def test_header_fields_that_do_not_belong_together(tmp_path: Path, name: str, field: str, value: int) -> None:
    path, _ = save(tmp_path, name)
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, CONFIG_AT[name] + 4 * layout.FIELDS.index(field), value)
    path.write_bytes(data)
    at_fault = "n_heads" if field == "dim" else field
    with pytest.raises(FormatError, match="a divisor of") as caught:
        open_checkpoint(path)
    assert caught.value.where == CONFIG_AT[name] + 4 * layout.FIELDS.index(at_fault)


@pytest.mark.parametrize("group", [0, -1, -(1 << 31), layout.MAX_GROUP + 1, (1 << 31) - 1])
@pytest.mark.parametrize(("name", "where"), [("llama2c-v2", 37), ("kuiper-int8", 28)])
def test_group_sizes_that_cannot_be(tmp_path: Path, name: str, where: int, group: int) -> None:
    path, _ = save(tmp_path, name)
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, where, group)
    path.write_bytes(data)
    with pytest.raises(FormatError):
        open_checkpoint(path)


def test_version_and_flag_are_checked(tmp_path: Path) -> None:
    path, _ = save(tmp_path, "llama2c-v1")
    data = bytearray(path.read_bytes())
    data[4] = 3
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match="version 3; supported are 0"):
        open_checkpoint(path)
    data[4], data[36] = 1, 2
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"shared_classifier.*at byte 36"):
        open_checkpoint(path)
    data[:4] = b"24kb"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="no known magic"):
        open_checkpoint(path)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    name=st.sampled_from([name for name in WRITERS if name != "safetensors"]),  # that is a directory: test_hf.py
    edits=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_headers_end_in_an_error_and_cost_nothing(
    tmp_path_factory: pytest.TempPathFactory, name: str, edits: list[tuple[int, int]]
) -> None:
    path, _ = save(tmp_path_factory.getbasetemp(), name)
    data = bytearray(path.read_bytes())
    for offset, byte in edits:
        data[offset] = byte
    path.write_bytes(data)
    tracemalloc.start()
    try:
        opened = open_checkpoint(path)
        assert sum(weight.nbytes for weight in opened.weights.values()) <= len(data)
    except Error:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1e6


@settings(max_examples=150)
@given(data=st.binary(max_size=400), magic=st.booleans(), version=st.integers(0, 3))
def test_random_bytes_end_in_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, magic: bool, version: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.bin"
    path.write_bytes(llama2c.MAGIC + struct.pack("<i", version) + data if magic else data)
    with pytest.raises(Error):
        open_checkpoint(path)


@given(st.lists(st.integers(1, (1 << 31) - 1), min_size=7, max_size=7))
def test_sizes_that_overflow_are_only_numbers(tmp_path_factory: pytest.TempPathFactory, fields: list[int]) -> None:
    dim, hidden_dim, n_layers, n_heads, _, vocab_size, context = fields
    heads = n_heads % 8 + 1
    fields = [
        dim // heads // 2 * heads * 2,
        hidden_dim,
        n_layers % 1024 + 1,
        heads,
        1,
        vocab_size,
        context % (1 << 24) + 1,
    ]
    assume(fields[0] != int.from_bytes(llama2c.MAGIC, "little"))  # then it is a later version's file
    path = tmp_path_factory.getbasetemp() / "huge.bin"
    for header in (b"", llama2c.MAGIC + b"\1\0\0\0"):
        path.write_bytes((header + struct.pack("<7i", *fields)).ljust(300, b"\1"))
        with pytest.raises(FormatError):
            open_checkpoint(path)


def test_opening_a_large_model_reads_and_allocates_nothing(tmp_path: Path) -> None:
    config = NAMED_SHAPES["TinyLlama-1.1B"]
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.write(llama2c.MAGIC + struct.pack("<i7iB", 1, *(getattr(config, name) for name in layout.FIELDS), 0))
        file.truncate(llama2c.v1_layout(config).nbytes)  # 4.4 GB, of which no block is allocated
    tracemalloc.start()
    opened = open_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(weight.nbytes for weight in opened.weights.values()) == path.stat().st_size - 256
    assert peak < 1e6
