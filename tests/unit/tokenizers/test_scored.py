"""Merging by score: ties, limits, and time that grows little faster than the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.formats.tokenizer_files import load_tokenizer
from tests.helpers.sentencepiece_models import FIXED, llama2c_encode, load, write_bin


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


@pytest.mark.slow
def test_long_prompts_are_quick(models: Path) -> None:
    """A quadratic algorithm would take hours."""
    tokenizer = load(models / "tokenizer_llama2.bin")
    for text in ("a" * 50_000, " " * 50_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
