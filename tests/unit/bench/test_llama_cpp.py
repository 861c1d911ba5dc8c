"""What `bench --compare llama.cpp` needs, and the measurement itself where llama-cpp-python is installed."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest

from numballama import Error, FormatError
from numballama.bench.llama_cpp import LlamaCpp, require_llama_cpp
from numballama.loader import STORY_MODEL


def test_a_machine_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(Error, match='needs llama-cpp-python: pip install "llama-cpp-python"'):
        require_llama_cpp()


def test_only_gguf(monkeypatch: pytest.MonkeyPatch, tiny_file: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    for path in (tiny_file, tmp_path):
        with pytest.raises(FormatError, match=r"llama.cpp reads GGUF files only.*export MODEL FILE.gguf --to gguf"):
            require_llama_cpp(path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert require_llama_cpp(tmp_path / "a.gguf").__name__ == "llama_cpp"


def test_a_measurement() -> None:
    pytest.importorskip("llama_cpp")
    with closing(LlamaCpp(STORY_MODEL)) as model:
        found = model.measure(64, 1, 8, 4, 1)
    assert (found.engine, found.threads, found.prompt_tokens, found.tokens) == ("llama.cpp", 1, 8, 4)
    assert found.decode_tokens_per_second > 0 and found.time_to_first_token_s > 0
