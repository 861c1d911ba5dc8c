"""Tokenizer, chat template and stop ids of a Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import numballama
from numballama.config import ModelConfig
from numballama.errors import Error, FormatError, UnsupportedError
from numballama.formats import tokenizer_files
from numballama.formats.hf import reader as hf
from numballama.formats.hf.writer import write_safetensors
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.loader import open_checkpoint
from numballama.tokenizers.bpe import BPETokenizer
from tests.helpers.hf_files import HF
from tests.helpers.random_models import random_checkpoint


def test_the_directorys_tokenizer(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is left out with a note, what is damaged is an error."""
    folder, asked = copy("llama"), []
    result: Error | None = None

    def load(path: Path) -> None:
        asked.append(path)
        if result is not None:
            raise result

    monkeypatch.setattr(tokenizer_files, "load_tokenizer", load)
    open_checkpoint(folder)
    assert asked == []
    (folder / "tokenizer.json").write_text("{}")
    open_checkpoint(folder)
    assert asked == [folder]
    result = UnsupportedError("of a kind to come")
    assert open_checkpoint(folder).notes == ["its tokenizer is left out: of a kind to come"]
    result = FormatError("damaged tokenizer")
    with pytest.raises(FormatError, match="damaged tokenizer"):
        open_checkpoint(folder)
    assert hf.read(folder, load_tokenizer=False).tokenizer is None


def test_text_from_a_directory(tmp_path: Path) -> None:
    """A tokenizer.json beside random weights: a prompt in, characters out."""
    shutil.copy(HF.parent / "small.json", tmp_path / "tokenizer.json")
    size = load_tokenizer(tmp_path).vocab_size
    config = ModelConfig(16, 24, 1, 2, 1, size + -size % 8, 64, rope_pairing="half")
    write_safetensors(tmp_path / "model", config, random_checkpoint(config).weights, eos_ids=(0,))
    shutil.move(tmp_path / "tokenizer.json", tmp_path / "model")
    with numballama.compile(tmp_path / "model", device="reference") as model:
        assert isinstance(model.tokenizer, BPETokenizer)
        assert model.tokenizer.decode(model.tokenizer.encode("Once upon a time")) == "Once upon a time"
        pieces = list(model.stream("Once", max_tokens=5, temperature=0))
    assert 1 <= len(pieces) <= 5
