"""Fixtures that the tests of several modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.random_models import save
from tests.helpers.tiny import TINY, write_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a llama2.c tokenizer of 300 tokens."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.bin")


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of that vocabulary."""
    return save(tmp_path_factory.mktemp("tiny"), "llama2c-v0", TINY, seed=5)[0]
