"""Fixtures that the tests of several modules share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

import numballama
from numballama.model import Model
from numballama.sampling import Sampled
from numballama.tokenizers.base import Tokenizer
from tests.helpers.hf_files import HF
from tests.helpers.random_models import save
from tests.helpers.sentencepiece_models import PAIRS, Pair, load
from tests.helpers.tiny import FIRST_BYTE, TINY, write_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a llama2.c tokenizer of 300 tokens."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.bin")


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of that vocabulary."""
    return save(tmp_path_factory.mktemp("tiny"), "llama2c-v0", TINY, seed=5)[0]


@pytest.fixture
def scripted(tiny_file: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the model choose given tokens, or the bytes of a text, after any prompt."""
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu") as model:
        runner = model.token_engine.runner
        collect = runner.collect

        def speak(tokens: Sequence[int] | bytes) -> Model:
            script = iter([byte + FIRST_BYTE for byte in tokens] if isinstance(tokens, bytes) else tokens)

            def collect_scripted(ticket: int) -> Sampled:
                sampled = collect(ticket)
                for row in range(len(sampled.tokens)):
                    sampled.tokens[row] = model._runner.table.last_token[0] = next(script)
                return sampled

            monkeypatch.setattr(runner, "collect", collect_scripted)
            return model

        yield speak


@pytest.fixture(params=[name for pair in PAIRS.values() for name in pair])
def tokenizer(request: pytest.FixtureRequest, models: Path) -> Tokenizer:
    return load(models / request.param)


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, models: Path) -> Pair:
    """(ours from .model, ours from .bin, the library)."""
    model, binary = (models / name for name in PAIRS[request.param])
    return load(model), load(binary), SentencePieceProcessor(str(model))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a golden model, to be changed."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(HF / f"{name}-0", tmp_path / name, dirs_exist_ok=True))

    return make
