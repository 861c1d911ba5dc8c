"""Tokens as text, and what is visible of a hostile one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import numballama
from numballama.engine.request import TokenLogprobs
from numballama.explain.tokens import alternatives, explained_tokens, token_text, visible
from tests.helpers.tiny import FIRST_BYTE


def test_texts_of_tokens(tiny_tokenizer: Path) -> None:
    tokenizer = numballama.load_tokenizer(tiny_tokenizer)
    (the,) = tokenizer.encode("the", bos=False)
    assert token_text(tokenizer, the) in ("the", " the")
    assert token_text(tokenizer, 1).strip() == "<s>"
    assert token_text(tokenizer, FIRST_BYTE + 0xF0) == "\\xf0"
    assert token_text(tokenizer, 300) == token_text(None, 300) == "<token 300>"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", " the"),
        ("né…", "né…"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\t", "a\\nb\\t"),
        ("\u202eevil", "\\u202eevil"),
        ("\u200b", "\\u200b"),
        ("狗🐕", "狗🐕"),
    ],
)
def test_every_character_is_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_probabilities() -> None:
    known = TokenLogprobs(math.log(0.25), [(7, math.log(0.5)), (5, math.log(0.25))])
    first, token = explained_tokens(None, [3, 5], [None, known])
    assert first.probability is None and first.alternatives == alternatives(None, []) == ()
    assert token.text == token.completes == "<token 5>" and token.probability == pytest.approx(0.25)
    assert [(a.id, a.text) for a in token.alternatives] == [(7, "<token 7>"), (5, "<token 5>")]
    assert [a.probability for a in token.alternatives] == pytest.approx([0.5, 0.25])


def test_characters_stand_where_they_become_whole(tiny_tokenizer: Path) -> None:
    tokenizer = numballama.load_tokenizer(tiny_tokenizer)
    ids = [1, *(FIRST_BYTE + byte for byte in "狗a".encode()), 300, FIRST_BYTE + 0xE7]
    tokens = explained_tokens(tokenizer, ids, [None] * len(ids))
    assert [token.completes for token in tokens] == [tokenizer.piece(1), "", "", "狗", "a", "<token 300>", ""]
    assert [token.text for token in tokens[1:4]] == ["\\xe7", "\\x8b", "\\x97"]
