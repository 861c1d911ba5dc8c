"""Tokenizer files are recognised by their content; damaged and other files end in an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.errors import Error, FormatError, UnsupportedError
from numballama.formats.hf.text_files import read_text_files
from numballama.formats.tokenizer_files import load_tokenizer
from tests.helpers.bpe import save_json, trained

# ---- damage ----


@pytest.mark.slow
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


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = save_json(tmp_path, trained("smollm"))
    ids = load_tokenizer(path).encode("Once upon a time")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_tokenizer(path).encode("Once upon a time") == ids


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


def test_other_tokenizers_of_a_directory(tmp_path: Path, models: Path) -> None:
    """Mistral's name of a sentencepiece model; formats that are not read are named, by the model's error too."""
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(
        UnsupportedError, match=r"tekken\.json: Mistral's format .* is not read; give the tokenizer\.json"
    ):
        load_tokenizer(tmp_path)
    found = read_text_files(tmp_path)
    assert found.tokenizer is None and "tekken.json" in found.tokenizer_error and found.notes
    for name in ("tokenizer.model.v1", "tokenizer.model.v3"):
        (tmp_path / name).write_bytes((models / "tok512.model").read_bytes() if name.endswith("3") else b"older")
    assert load_tokenizer(tmp_path).vocab_size == 512


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "merges.txt"])
def test_a_file_beside_a_tokenizer_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        FormatError, match=f"not the tokenizer; expected one of tokenizer.json.*directory; found {name}"
    ):
        load_tokenizer(tmp_path / name)
