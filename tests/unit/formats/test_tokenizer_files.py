"""Tokenizers against their definitions: llama2.c's loop written naively, and the sentencepiece library itself."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from numballama.errors import Error, FormatError
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.base import Tokenizer
from numballama.tokenizers.scored import Llama2cTokenizer

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
    """What run.c's encode() does: every round, look at every pair. Control tokens and bytes cannot be spelled out."""
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


# ---- encoding ----


def test_scores_that_llama2c_never_beats_do_not_merge(tmp_path: Path) -> None:
    pieces = [*FIXED, b" ", b"a", b"b", b"ab", b" a"]
    for score, merges in ((-1e10, False), (-9.9e9, True), (float("nan"), False)):
        path = write_bin(tmp_path / "t.bin", pieces, [*[0.0] * (len(FIXED) + 3), score, float("nan")])
        assert load_tokenizer(path).encode("ab", bos=False) == ([259, 262] if merges else [259, 260, 261])


def test_reserved_pieces_cannot_be_spelled(tmp_path: Path) -> None:
    """Not even where every step on the way to them is a piece."""
    reserved = ["<unk>", "\n<s>\n", "\n</s>\n", "<0x41>"]
    steps = dict.fromkeys([*" <unk>\ns/0x41", *(text[:n] for text in reserved for n in range(2, len(text)))])
    pieces = [*FIXED, *(step.encode() for step in steps)]
    tokenizer = load_tokenizer(write_bin(tmp_path / "t.bin", pieces, [0.0] * len(pieces)))
    for text in reserved:
        assert min(tokenizer.encode(text, bos=False)) >= len(FIXED)


few = st.text("ab ", max_size=5).map(str.encode)
scores_with_ties = st.one_of(st.integers(-3, 0).map(float), st.sampled_from([float("nan"), -1e10, float("inf"), -1e9]))


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


@settings(max_examples=60)
@given(text=st.one_of(st.text(max_size=60), st.text("aeoth .,\n", max_size=80), st.text(" ", max_size=70)))
@pytest.mark.parametrize("name", ["tok512.bin", "tokenizer_llama2.bin"])
def test_bin_encodes_as_llama2c_with_real_vocabularies(models: Path, name: str, text: str) -> None:
    tokenizer = load(models / name)
    assert isinstance(tokenizer, Llama2cTokenizer)
    expected = llama2c_encode(tokenizer._pieces, tokenizer._scores, text)
    assert tokenizer.encode(text, bos=False) == expected


words = st.lists(
    st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ.,!?'\"-0123456789:;()", min_size=1, max_size=9), max_size=15
)


@settings(max_examples=60)
@given(words=words)
def test_model_and_bin_agree_on_ordinary_text(pair: Pair, words: list[str]) -> None:
    model, binary, library = pair
    text = " ".join(words)
    assert model.encode(text) == binary.encode(text) == [1, *library.encode(text)]


def test_model_and_bin_agree_on_a_story(pair: Pair) -> None:
    text = "Once upon a time, there was a little girl named Lily. She said: “I'd like a café crème!”\nThe end."
    model, binary, _ = pair
    assert model.encode(text) == binary.encode(text)
    assert model.decode(model.encode(text)) == binary.decode(binary.encode(text)) == text


def test_ids_of_a_known_sentence(models: Path) -> None:
    for name in PAIRS["llama2"]:
        assert load(models / name).encode("Hello world") == [1, 15043, 3186]


def test_long_prompts_are_quick(models: Path) -> None:
    """Quadratic, these would take hours."""
    tokenizer = load(models / "tokenizer_llama2.bin")
    for text in ("a" * 50_000, " " * 50_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


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


# ---- decoding ----


@given(text=st.text(max_size=60))
def test_bin_brings_any_text_back(models: Path, text: str) -> None:
    for name in ("tok512.bin", "tokenizer_llama2.bin"):
        tokenizer = load(models / name)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(max_size=60))
def test_model_brings_text_back_as_the_library_does(pair: Pair, text: str) -> None:
    model, _, library = pair
    ids = model.encode(text, bos=False)
    assert ids == library.encode(text)
    assert model.decode(ids) == library.decode(ids)
    if model.vocab_size == 32000:  # tok512 itself folds repeated spaces; the library takes ▁ for a space
        assert model.decode(ids) == text.replace("▁", " ")


@settings(max_examples=200)
@given(data=st.data())
def test_any_ids_decode_as_in_the_library(pair: Pair, data: st.DataObject) -> None:
    model, binary, library = pair
    common = st.one_of(
        st.integers(0, 2), st.integers(3, 258), st.sampled_from(library.encode("  a é  the▁")), st.integers(0, 511)
    )
    ids = data.draw(st.lists(common, max_size=25))
    assert model.decode(ids) == library.decode(ids)
    if model.vocab_size == 32000:
        assert binary.decode(ids) == library.decode(ids)


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


def test_bytes_and_pieces(pair: Pair) -> None:
    model, binary, library = pair
    for token in range(model.vocab_size):
        assert model.piece(token) == binary.piece(token) == library.id_to_piece(token)
        assert model.token_bytes(token) == binary.token_bytes(token) or token == 0  # its look is the model's choice
    assert model.token_bytes(1) == model.token_bytes(2) == b""
    assert model.token_bytes(3 + 0xFF) == b"\xff"
    assert model.token_bytes(np.int64(13)) == b"\n"


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


# ---- damage ----


def test_truncated_bin(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "t.bin", [*FIXED, b" ", b"a", b" a"], [0.0] * (len(FIXED) + 3))
    data = path.read_bytes()
    assert load_tokenizer(path).encode("a", bos=False) == [261]
    for size in [*range(1, 60), *range(len(data) - 40, len(data))]:
        path.write_bytes(data[:size])
        with contextlib.suppress(FormatError):
            assert load_tokenizer(path).vocab_size < 262  # cut between two tokens: nothing in the file tells
    path.write_bytes(data + b"\0")
    with pytest.raises(FormatError, match="score and length"):
        load_tokenizer(path)


@settings(max_examples=100)
@given(edits=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=5))
@pytest.mark.parametrize("name", ["tok512.bin", "tok512.model"])
def test_damaged_files_end_in_an_error_or_in_a_tokenizer(
    models: Path, tmp_path: Path, name: str, edits: list[tuple[int, int]]
) -> None:
    data = bytearray((models / name).read_bytes())
    for offset, byte in edits:
        data[-offset if offset % 2 else offset] = byte
    path = tmp_path / "damaged"
    path.write_bytes(data)
    try:
        tokenizer = load_tokenizer(path)
    except Error:
        return
    tokenizer.decode(range(tokenizer.vocab_size))
    tokenizer.encode("Once upon a time 🙂\0", special=True)


@given(data=st.binary(max_size=200), sentencepiece_like=st.booleans())
def test_random_bytes_are_no_tokenizer(tmp_path: Path, data: bytes, sentencepiece_like: bool) -> None:
    path = tmp_path / "random"
    path.write_bytes(b"\n" + data if sentencepiece_like else data)
    with pytest.raises(Error):
        load_tokenizer(path)


def test_hostile_lengths(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    for longest, length in ((1 << 30, 1 << 30), (-1, 5), (0, 0), (5, -1), (5, (1 << 31) - 1)):
        path.write_bytes(struct.pack("<ifi", longest, 0, length) + b"abcde")
        with pytest.raises(FormatError, match=r"nor a sentencepiece model, nor a llama2\.c tokenizer\.bin.*at byte"):
            load_tokenizer(path)
    write_bin(path, [b"<unk>"] * 300, [0.0] * 300)
    with pytest.raises(FormatError, match="<0x00>"):
        load_tokenizer(path)


def test_other_tokenizer_files_are_named(tmp_path: Path, models: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b'{\n  "version": "1.0"}')
    with pytest.raises(FormatError, match=r"not a tokenizer\.json"):
        load_tokenizer(path)
    with pytest.raises(FormatError):
        load_tokenizer(models / "stories260K.bin")
    with pytest.raises(Error, match="no such file"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(FormatError, match="a directory without a tokenizer"):
        load_tokenizer(tmp_path)
