"""JSON of untrusted files: size, nesting and repeated keys."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from numballama.errors import FormatError
from numballama.loader import open_checkpoint

HOSTILE = {
    "a length beyond the file": struct.pack("<Q", 1 << 62) + b"{}",
    "seven bytes": b"\1\0\0\0\0\0\0",
    "no JSON": struct.pack("<Q", 4) + b"{{{{" + bytes(8),
    "deep JSON": struct.pack("<Q", 100_000) + b'{"a":' * 20_000,
    "a long number": struct.pack("<Q", 20_006) + b'{"a":' + b"9" * 20_000 + b"}",
    "no UTF-8": struct.pack("<Q", 8) + b'{"\xff\xfe":1' + bytes(8),
    "a key twice": struct.pack("<Q", 15) + b'{"a":{},"a":{}}' + bytes(8),
    "too long a directory": struct.pack("<Q", 5 << 20) + b'{"a":[' + b"{}," * (5 << 20 >> 1),
    "many objects": struct.pack("<Q", 3 << 20) + (b'{"a":[' + b"{}," * ((3 << 20) // 3 - 5) + b"{}]}").ljust(3 << 20),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_directories(copy: Callable[[str], Path], what: str) -> None:
    folder = copy("llama")
    (folder / "model.safetensors").write_bytes(HOSTILE[what])
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(FormatError):
        open_checkpoint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(HOSTILE[what]) + 100_000_000
    assert time.perf_counter() - started < 10  # traced; 2 s untraced


# ---- what the peers accept ----


def edited(folder: Path, name: str, change: Callable[[str], str], encoding: str = "utf-8") -> Path:
    path = folder / name
    text = change(path.read_text())
    path.write_bytes(text.encode(encoding))
    return folder


NAMES = ("config.json", "generation_config.json", "model.safetensors.index.json")


@pytest.mark.parametrize("name", NAMES)
def test_a_byte_order_mark(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("qwen3-f16-sharded")
    whole = open_checkpoint(folder)
    opened = open_checkpoint(edited(folder, name, lambda text: text, "utf-8-sig"))
    assert opened.config == whole.config and opened.stop_token_ids == whole.stop_token_ids


@pytest.mark.parametrize("name", NAMES)
def test_of_equal_keys_the_last_counts(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("qwen3-f16-sharded")
    whole = open_checkpoint(folder)
    values = json.loads((folder / name).read_text())
    first = dict.fromkeys(values, "nonsense")
    doubled = json.dumps(first)[:-1] + ", " + json.dumps(values)[1:]
    opened = open_checkpoint(edited(folder, name, lambda text: doubled))
    assert opened.config == whole.config and opened.stop_token_ids == whole.stop_token_ids


def test_of_equal_tensors_the_last_counts(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:start])
    entry = json.dumps({"model.norm.weight": head["model.norm.weight"]})
    text = (entry[:-1] + ", " + json.dumps(head)[1:]).encode()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[start:])
    assert open_checkpoint(folder).config.n_layers == 2
