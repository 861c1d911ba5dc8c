"""GGUF's container: damaged and hostile files are refused before they cost memory or time."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numballama
from numballama.errors import FormatError, UnsupportedError
from numballama.files import map_file
from numballama.formats.gguf.header import Header
from numballama.formats.gguf.reader import TENSOR_NAMES
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.loader import open_checkpoint
from numballama.quantization.types import Q8_0
from tests.helpers.gguf_files import (
    ARRAY,
    CONFIG,
    STRING,
    U32,
    array,
    container,
    edited,
    entry,
    letters,
    save,
    tensor,
    text,
    u32,
)


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_other_alignments(tmp_path: Path, alignment: int) -> None:
    gguf = pytest.importorskip("gguf")
    path, other = save(tmp_path / "m.gguf"), tmp_path / "other.gguf"
    w = gguf.GGUFWriter(other, "llama")
    w.add_custom_alignment(alignment)
    for field in gguf.GGUFReader(path).fields.values():
        if not field.name.startswith(("GGUF.", "general.")):
            w.add_key_value(field.name, field.contents(), field.types[0])
    opened = open_checkpoint(path)
    for name, weight in opened.weights.items():
        w.add_tensor(TENSOR_NAMES[name], weight.data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    again = open_checkpoint(other)
    assert again.config == opened.config
    for name, weight in opened.weights.items():
        np.testing.assert_array_equal(again.weights[name].data, weight.data)


def test_version_2_and_other_versions(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    for version, order, message in (
        (1, "<", "version 1; .*convert the model again"),
        (4, "<", "version 4; .*a newer numballama"),
        (3, ">", "big-endian.*gguf-convert-endian FILE little"),
        (2, "<", ""),
    ):
        struct.pack_into(f"{order}I", data, 4, version)
        path.write_bytes(data)
        if message:
            with pytest.raises(UnsupportedError, match=message):
                open_checkpoint(path)
    assert open_checkpoint(path).format == "GGUF v2"


HOSTILE = {
    "no GGUF": b"GGUX" + bytes(40),
    "the magic alone": b"GGUF",
    "half a count": b"GGUF" + struct.pack("<IQ", 3, 0) + b"\0\0",
    "many tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0) + bytes(100),
    "many keys": b"GGUF" + struct.pack("<IQQ", 3, 0, (1 << 64) - 1) + bytes(100),
    "more keys than bytes": b"GGUF" + struct.pack("<IQQ", 3, 0, 9) + bytes(100),
    "an array of 2^40": container([entry("a", ARRAY, array(U32, 1 << 40))], [], bytes(100)),
    "2^40 strings": container([entry("a", ARRAY, array(STRING, 1 << 40))], [], bytes(100)),
    "2^61 numbers": container([entry("a", ARRAY, array(10, 1 << 61))], [], bytes(100)),
    "arrays in arrays": container([entry("a", ARRAY, array(ARRAY, 1, array(U32, 1, bytes(4))))], []),
    "a long string": container([entry("a", STRING, struct.pack("<Q", 1 << 63))], [], bytes(50)),
    "a string of 2^64-1": container([entry("a", STRING, struct.pack("<Q", (1 << 64) - 1))], [], bytes(50)),
    "strings that end early": container([entry("a", ARRAY, array(STRING, 2, text("b") + b"\1"))], [], align=1),
    "a type of 13": container([entry("a", 13, bytes(8))], []),
    "a type of 13 in an array": container([entry("a", ARRAY, array(13, 1, bytes(8)))], []),
    "a key twice": container([u32("a", 1), u32("a", 1)], []),
    "an empty key": container([u32("", 1)], []),
    "a long key": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 40) + bytes(50),
    "a key that is no UTF-8": container([entry(b"\xff\xfe", U32, bytes(4))], []),
    "alignment 0": container([u32("general.alignment", 0)], []),
    "alignment 3": container([u32("general.alignment", 3)], []),
    "alignment as text": container([entry("general.alignment", STRING, text("32"))], []),
    "alignment 2^31": container([u32("general.alignment", 1 << 31)], [tensor("t", [1])], bytes(4)),
    "a tensor twice": container([], [tensor("t", [1]), tensor("t", [1], offset=32)], bytes(64)),
    "a tensor's name that is no UTF-8": container([], [tensor(b"\xc3", [1])], bytes(64)),
    "five dimensions": container([], [tensor("t", [1] * 5)], bytes(64)),
    "2^32-1 dimensions": container([], [text("t") + b"\xff" * 4 + bytes(50)], bytes(64)),
    "no numbers": container([], [tensor("t", [4, 0])], bytes(64)),
    "2^64 numbers and more": container([], [tensor("t", [1 << 63] * 4)], bytes(64)),
    "blocks cut apart": container([], [tensor("t", [33], 8)], bytes(64)),
    "off the grid": container([], [tensor("t", [1], offset=4)], bytes(64)),
    "behind the end": container([], [tensor("t", [16], offset=32)], bytes(64)),
    "far behind the end": container([], [tensor("t", [1], offset=1 << 63)], bytes(64)),
    "one on another": container([], [tensor("t", [16]), tensor("u", [1], offset=32)], bytes(128)),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("function", [open_checkpoint, load_tokenizer, numballama.inspect])
def test_hostile_containers(tmp_path: Path, what: str, function: Callable[[Path], Any]) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[what])
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(FormatError) as caught:
        function(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert time.perf_counter() - started < 1
    assert caught.value.path == path
    if what != "no GGUF":
        assert caught.value.where is not None or caught.value.expected is not None


def test_many_strings_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    count = (1 << 22) + 1
    path.write_bytes(container([entry("a", ARRAY, array(STRING, count, bytes(8 * count)))], []))
    started = time.perf_counter()
    with pytest.raises(FormatError, match="too many strings"):
        open_checkpoint(path)
    assert time.perf_counter() - started < 0.5


@pytest.mark.slow
def test_a_large_vocabulary_opens_quickly(tmp_path: Path) -> None:
    """32,000 pieces: the header in a few milliseconds, and next to no memory until they are asked for."""
    config = replace(CONFIG, vocab_size=32000)
    path = save(tmp_path / "m.gguf", config, Q8_0, tokenizer=letters(32000))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        Header(map_file(path))
        times.append(time.perf_counter() - started)
    assert min(times) < 0.05
    tracemalloc.start()
    header = Header(map_file(path))
    assert tracemalloc.get_traced_memory()[1] < 200_000
    assert len(header.strings("tokenizer.ggml.tokens") or []) == 32000
    open_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 16_000_000
    tracemalloc.stop()


# ---- metadata that nothing reads ----


@st.composite
def values(draw: st.DrawFn, depth: int = 0) -> tuple[int, bytes]:
    """(type, bytes) of a metadata value of any type, arrays in arrays among them."""
    kind = draw(st.sampled_from([*SIZES, STRING, *([ARRAY] * 3 if depth < 4 else [])]))
    if kind == STRING:
        return kind, text(draw(st.binary(max_size=5)))
    if kind != ARRAY:
        return kind, draw(st.binary(min_size=SIZES[kind], max_size=SIZES[kind]))
    inner = [draw(values(depth + 1)) for _ in range(draw(st.integers(0, 3)))]
    first = inner[0][0] if inner else draw(st.sampled_from([*SIZES, STRING, ARRAY]))
    same = [data for kind, data in inner if kind == first]
    return ARRAY, array(first, len(same), b"".join(same))


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(found=values(), key=st.binary(max_size=20))
def test_a_key_that_nothing_reads_may_hold_anything(
    tmp_path_factory: pytest.TempPathFactory, found: tuple[int, bytes], key: bytes
) -> None:
    path = save(tmp_path_factory.mktemp("m") / "m.gguf")
    whole, other = open_checkpoint(path), path.with_name("other.gguf")
    other.write_bytes(edited(path, {"a useless key": entry(key, *found)}))
    opened = open_checkpoint(other)
    assert opened.config == whole.config and opened.notes == whole.notes
    np.testing.assert_array_equal(opened.weights["norm"].data, whole.weights["norm"].data)


def test_a_key_that_is_read_must_not_be_an_array_of_arrays(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", tokenizer=letters(300))
    for key in ("llama.block_count", "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "general.architecture"):
        nested = entry(key, ARRAY, array(ARRAY, 1, array(U32, 1, bytes(4))))
        path.write_bytes(edited(save(path, tokenizer=letters(300)), {key: nested}))
        with pytest.raises(FormatError, match="wrong type"):
            open_checkpoint(path)


@pytest.mark.parametrize("depth", [1, 2, 10, 2000])
def test_deep_arrays_cost_no_stack(tmp_path: Path, depth: int) -> None:
    path = save(tmp_path / "m.gguf")
    data = array(ARRAY, 1) * depth + array(U32, 1, bytes(4))
    path.write_bytes(edited(path, {"deep": entry("deep", ARRAY, data)}))
    assert open_checkpoint(path).config.n_layers == 2


def test_arrays_in_arrays_are_counted(tmp_path: Path) -> None:
    """They cost time: as many as strings are allowed."""
    path = tmp_path / "m.gguf"
    path.write_bytes(container([entry("a", ARRAY, array(ARRAY, 1 << 40, array(U32, 0) * 1000))], []))
    with pytest.raises(FormatError):
        open_checkpoint(path)
