"""A small model that chats, for the tests of conversations and of their encoding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import numballama
from numballama.model import Model
from tests.helpers.bpe import chat_model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with numballama.compile(path, threads=1) as model:
        yield model
