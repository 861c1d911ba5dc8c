"""GGUF's tokenizer "llama": unused and user-defined pieces, and text without byte tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from numballama.tokenizers import gguf
from numballama.tokenizers.base import PieceType, Tokenizer, Vocabulary
from numballama.tokenizers.gguf import GgufTokenizer
from numballama.tokenizers.sentencepiece_proto import message_fields
from tests.helpers.sentencepiece_models import WORDS, through_gguf, trained


@given(text=st.text(st.characters(max_codepoint=0x300), max_size=30))
def test_without_byte_fallback_the_unknown_is_one_token(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    library, ours = _no_bytes(tmp_path_factory)
    assert ours.encode(text) == library.encode(text)


_cached: dict[str, tuple[Tokenizer, Tokenizer]] = {}  # hypothesis calls a test many times


def _no_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    if not _cached:
        _cached["no bytes"] = through_gguf(
            tmp_path_factory.mktemp("bytes"), trained(byte_fallback=False, vocab_size=90)
        )
    return _cached["no bytes"]


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def with_unused(proto: bytes, chosen: Callable[[bytes], bool]) -> bytes:
    """A sentencepiece model in which the normal pieces that are `chosen` are unused ones."""
    out = b""
    for number, value in message_fields(proto):
        if number == 1:
            piece = dict(message_fields(value))
            if piece.get(3, 1) == 1 and chosen(piece[1]):
                value += b"\x18" + bytes([PieceType.UNUSED])
        out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


@pytest.mark.parametrize("seed", range(4))
def test_unused_pieces_are_taken_apart_again(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    proto = with_unused(trained().serialized_model_proto(), lambda piece: rng.random() < 0.4)
    library, ours = through_gguf(tmp_path, SentencePieceProcessor(model_proto=proto))
    assert PieceType.UNUSED in library.vocabulary().types
    for _ in range(300):
        words = rng.choices([*WORDS, "▁", "x"], k=5)
        line = " ".join(words) + "".join(rng.choices("once upatimlgr ▁", k=20))
        assert ours.encode(line) == library.encode(line)


def test_pieces_of_the_users_own_come_first(tmp_path: Path) -> None:
    """Longest first, and the text between them is encoded separately: llama.cpp's rule, and its ids."""
    library, ours = through_gguf(tmp_path, trained(user_defined_symbols=["<sep>", "<sep>x", "▁▁"], vocab_size=390))
    sep, sepx, spaces = (next(t for t in range(390) if ours.piece(t) == p) for p in ("<sep>", "<sep>x", "  "))
    once, red = ours.encode("once", bos=False), ours.encode("red", bos=False)
    assert ours.encode("once<sep>red", bos=False) == [*once, sep, *red]
    assert ours.encode("<sep>xred<sep>", bos=False) == [sepx, *red, sep]
    assert ours.encode("once  red", bos=False) == [*once, spaces, *red]
    assert ours.decode([*once, sep, spaces]) == "once<sep>  "
    assert library.vocabulary().types[sep] == PieceType.USER_DEFINED
    assert ours.encode("<s>red<sep></s>", bos=False, special=True) == [1, *red, sep, 2]


def _made_of(pieces: str) -> GgufTokenizer:
    """Pieces that are separated by spaces; earlier ones are merged first. The first is the unknown token."""
    written = [piece.encode() for piece in pieces.split()]
    types = [PieceType.UNKNOWN] + [PieceType.NORMAL] * (len(written) - 1)
    scores = [-float(number) for number in range(len(written))]
    return GgufTokenizer(Vocabulary(written, scores, types, None, None, 0, add_bos=False))


WORD_PIECES = "? ▁▁ ▁▁▁ ▁ab ▁a ab bc a b c ▁"


@given(text=st.text("abc d▁", max_size=40))
def test_words_are_merged_as_in_the_whole_text(text: str) -> None:
    """Also where a word was seen before, a run of spaces is a piece, and unknown characters come together."""
    whole = _made_of(WORD_PIECES)
    whole.__dict__["_words_are_separate"] = False
    words = _made_of(WORD_PIECES)
    assert words._words_are_separate
    expected = whole.encode(text)
    assert words.encode(text) == expected and words.encode(text) == expected


def test_a_piece_may_reach_over_the_end_of_a_word() -> None:
    tokenizer = _made_of("? a▁b a▁ ▁a a b ▁")
    assert list(map(tokenizer.piece, tokenizer.encode("b a b"))) == ["▁", "b", "▁", "a▁b"]


def test_not_all_words_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MOST_WORDS", 2)
    tokenizer = _made_of(WORD_PIECES)
    for text in ("a", "ab", "abc", "c" * 4 * gguf.LONGEST_WORD, "bc"):
        assert list(map(tokenizer.piece, tokenizer.encode(text))) == list(
            map(tokenizer.piece, _made_of(WORD_PIECES).encode(text))
        )
        assert len(tokenizer._words) <= 2 and all(len(ids) <= gguf.LONGEST_WORD for ids in tokenizer._words.values())
