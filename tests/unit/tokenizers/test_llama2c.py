"""llama2.c's `tokenizer.bin`: ids are those of `run.c`; damaged files end in an error."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.errors import FormatError
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.llama2c import Llama2cTokenizer
from tests.helpers.sentencepiece_models import FIXED, llama2c_encode, load, write_bin


def test_reserved_pieces_cannot_be_spelled(tmp_path: Path) -> None:
    """Not even where every step on the way to them is a piece."""
    reserved = ["<unk>", "\n<s>\n", "\n</s>\n", "<0x41>"]
    steps = dict.fromkeys([*" <unk>\ns/0x41", *(text[:n] for text in reserved for n in range(2, len(text)))])
    pieces = [*FIXED, *(step.encode() for step in steps)]
    tokenizer = load_tokenizer(write_bin(tmp_path / "t.bin", pieces, [0.0] * len(pieces)))
    for text in reserved:
        assert min(tokenizer.encode(text, bos=False)) >= len(FIXED)


@pytest.mark.slow
@settings(max_examples=60)
@given(text=st.one_of(st.text(max_size=60), st.text("aeoth .,\n", max_size=80), st.text(" ", max_size=70)))
@pytest.mark.parametrize("name", ["tok512.bin", "tokenizer_llama2.bin"])
def test_bin_encodes_as_llama2c_with_real_vocabularies(models: Path, name: str, text: str) -> None:
    tokenizer = load(models / name)
    assert isinstance(tokenizer, Llama2cTokenizer)
    expected = llama2c_encode(tokenizer._pieces, tokenizer._scores, text)
    assert tokenizer.encode(text, bos=False) == expected


@given(text=st.text(max_size=60))
def test_bin_brings_any_text_back(models: Path, text: str) -> None:
    for name in ("tok512.bin", "tokenizer_llama2.bin"):
        tokenizer = load(models / name)
        assert tokenizer.decode(tokenizer.encode(text)) == text


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


def test_hostile_lengths(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    for longest, length in ((1 << 30, 1 << 30), (-1, 5), (0, 0), (5, -1), (5, (1 << 31) - 1)):
        path.write_bytes(struct.pack("<ifi", longest, 0, length) + b"abcde")
        with pytest.raises(FormatError, match=r"nor a sentencepiece model, nor a llama2\.c tokenizer\.bin.*at byte"):
            load_tokenizer(path)
    write_bin(path, [b"<unk>"] * 300, [0.0] * 300)
    with pytest.raises(FormatError, match="<0x00>"):
        load_tokenizer(path)
