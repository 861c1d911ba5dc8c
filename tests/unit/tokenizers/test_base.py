"""Common behaviour of all tokenizers: special tokens, streams in whole characters, refused ids and text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.errors import Error
from numballama.tokenizers.base import Tokenizer


def test_bos_is_the_callers_choice(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hi") == [tokenizer.bos_id, *tokenizer.encode("hi", bos=False)]
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", bos=False) == []
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_control_tokens_in_text_stay_text(tokenizer: Tokenizer) -> None:
    text = "<s>hi</s> <unk><0x0A>"
    ids = tokenizer.encode(text, bos=False)
    assert not {0, 1, 2, 13} & set(ids)
    assert tokenizer.decode(ids) == text


def test_special_maps_control_tokens(tokenizer: Tokenizer) -> None:
    hi, you = tokenizer.encode("hi", bos=False), tokenizer.encode("you", bos=False)
    assert tokenizer.encode("<s>hi</s><s>you", bos=False, special=True) == [1, *hi, 2, 1, *you]
    assert tokenizer.encode("hi", special=True) == [1, *hi]


@given(ids=st.lists(st.one_of(st.integers(0, 511), st.integers(120, 258)), max_size=30))
def test_a_stream_is_the_text_in_whole_characters(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = tokenizer.decoder()
    parts = [decoder.push(token) for token in ids]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)
    assert decoder.flush() == ""
    for part, token in zip(parts, ids, strict=True):
        if tokenizer.piece(token).startswith("<0x") and tokenizer.token_bytes(token) >= b"\xc2":
            assert all(character == "\ufffd" for character in part)  # a lead byte completes nothing but a mistake


def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.decoder()
    assert [decoder.push(3 + byte) for byte in "🙂é".encode()] == ["", "", "", "🙂", "", "é"]
    assert decoder.push(3 + 0xF0) == ""
    assert decoder.push(3 + 0x9F) == ""
    assert decoder.flush() == "\ufffd\ufffd"
    # Any token that is no byte cuts a character short: what follows does not complete it.
    assert [decoder.push(token) for token in (3 + 0xC3, 2, 3 + 0xA9)] == ["", "\ufffd", "\ufffd"]


def test_the_first_space_goes_only_at_the_start(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b")
    assert tokenizer.decode(ids) == tokenizer.decode(ids[1:]) == "a b"
    decoder = tokenizer.decoder(strip_leading_space=False)
    assert "".join(map(decoder.push, ids)) == " a b"


@pytest.mark.parametrize("offset", [0, 1, 10**12])
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer, offset: int) -> None:
    for token in (tokenizer.vocab_size + offset, -1 - offset):
        for method in (tokenizer.piece, tokenizer.token_bytes, lambda i: tokenizer.decode([1, i])):
            with pytest.raises(Error, match="outside the vocabulary"):
                method(token)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    for special in (False, True):
        with pytest.raises(Error, match=r"U\+D83D at character 2"):
            tokenizer.encode("ab\ud83dc", special=special)


@given(data=st.binary(max_size=12) | st.text(max_size=8).map(lambda text: text.encode(errors="surrogatepass")))
def test_bytes_that_continue_a_text(tokenizer: Tokenizer, data: bytes) -> None:
    """No space is put in front, and they may begin and end inside a character."""
    ids = tokenizer.encode_continuation(data)
    assert b"".join(map(tokenizer.token_bytes, ids)) == data


def test_a_continuation_is_encoded_as_within_a_text(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("x\nOnce upon a time", bos=False)
    ids = tokenizer.encode_continuation(b" upon a time")
    assert whole[-len(ids) :] == ids
    assert tokenizer.eos_id not in tokenizer.encode_continuation(b"</s>")
