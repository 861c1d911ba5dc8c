"""Merging by score: ties, limits, and time that grows little faster than the text."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.base import Tokenizer

PAIRS = {"tok512": ("tok512.model", "tok512.bin"), "llama2": ("llama2_tokenizer.model", "tokenizer_llama2.bin")}


FIXED = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]


Pair: TypeAlias = tuple[Tokenizer, Tokenizer, SentencePieceProcessor]


_loaded: dict[Path, Tokenizer] = {}


def load(path: Path) -> Tokenizer:
    if path not in _loaded:
        _loaded[path] = load_tokenizer(path)
    return _loaded[path]


@pytest.fixture(params=[name for pair in PAIRS.values() for name in pair])
def tokenizer(request: pytest.FixtureRequest, models: Path) -> Tokenizer:
    return load(models / request.param)


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, models: Path) -> Pair:
    """(ours from .model, ours from .bin, the library)."""
    model, binary = (models / name for name in PAIRS[request.param])
    return load(model), load(binary), SentencePieceProcessor(str(model))


def write_bin(path: Path, pieces: Sequence[bytes], scores: Sequence[float]) -> Path:
    entries = (struct.pack("<fi", s, len(p)) + p for p, s in zip(pieces, scores, strict=True))
    path.write_bytes(struct.pack("<i", max(map(len, pieces))) + b"".join(entries))
    return path


def llama2c_encode(pieces: Sequence[bytes], scores: Sequence[float], text: str) -> list[int]:
    """run.c's encode(): look at every pair in each round. Control tokens and bytes cannot be spelled out."""
    vocabulary = {piece: token for token, piece in reversed(list(enumerate(pieces))) if token >= len(FIXED)}
    tokens: list[int] = []
    for character in " " + text if text else "":
        data = character.encode()
        tokens += [vocabulary[data]] if data in vocabulary else [byte + 3 for byte in data]
    while True:
        best_score, best_id, best_index = -1e10, -1, -1
        for index in range(len(tokens) - 1):
            token = vocabulary.get(pieces[tokens[index]] + pieces[tokens[index + 1]], -1)
            if token != -1 and scores[token] > best_score:
                best_score, best_id, best_index = scores[token], token, index
        if best_index == -1:
            return tokens
        tokens[best_index : best_index + 2] = [best_id]


def test_scores_that_llama2c_never_beats_do_not_merge(tmp_path: Path) -> None:
    pieces = [*FIXED, b" ", b"a", b"b", b"ab", b" a"]
    for score, merges in ((-1e10, False), (-9.9e9, True), (float("nan"), False)):
        path = write_bin(tmp_path / "t.bin", pieces, [*[0.0] * (len(FIXED) + 3), score, float("nan")])
        assert load_tokenizer(path).encode("ab", bos=False) == ([259, 262] if merges else [259, 260, 261])


few = st.text("ab ", max_size=5).map(str.encode)


scores_with_ties = st.one_of(st.integers(-3, 0).map(float), st.sampled_from([float("nan"), -1e10, float("inf"), -1e9]))


@pytest.mark.slow
@settings(max_examples=200)
@given(vocabulary=st.lists(st.tuples(few, scores_with_ties), max_size=25), text=st.text("ab é", max_size=40))
def test_bin_encodes_as_llama2c_where_scores_tie(
    tmp_path_factory: pytest.TempPathFactory, vocabulary: list[tuple[bytes, float]], text: str
) -> None:
    pieces = FIXED + [piece for piece, _ in vocabulary]
    scores = [0.0] * len(FIXED) + [score for _, score in vocabulary]
    tokenizer = load_tokenizer(write_bin(tmp_path_factory.getbasetemp() / "t.bin", pieces, scores))
    assert tokenizer.encode(text) == [1, *llama2c_encode(pieces, scores, text)]
    if b" " in pieces:  # else the space in front becomes a byte, which decoding keeps
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_prompts_are_quick(models: Path) -> None:
    """A quadratic algorithm would take hours."""
    tokenizer = load(models / "tokenizer_llama2.bin")
    for text in ("a" * 50_000, " " * 50_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
