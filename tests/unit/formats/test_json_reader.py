"""JSON of untrusted files: size, nesting and repeated keys."""

from __future__ import annotations

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
