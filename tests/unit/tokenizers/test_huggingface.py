"""`tokenizer.json`, and what the files beside it say about BOS and EOS."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from numballama.errors import Error, FormatError
from numballama.formats.hf.text_files import read_text_files
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.bpe import BPETokenizer
from tests.golden.make_tokenizers import SMALL
from tests.helpers.bpe import CHAT_CONFIG, save_json, trained


@pytest.mark.parametrize(
    ("bos", "config", "expected"),
    [
        (False, {}, (False, False)),
        (True, {}, (True, False)),
        (True, CHAT_CONFIG, (True, False)),
        (True, CHAT_CONFIG | {"add_bos_token": False}, (False, False)),
        (False, CHAT_CONFIG | {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        (False, {"add_bos_token": True}, (False, False)),  # there is no BOS
        (False, CHAT_CONFIG | {"add_bos_token": None}, (False, False)),
        (False, {"bos_token": {"content": "<|begin_of_text|>"}, "add_bos_token": True}, (True, False)),
    ],
)
def test_bos_and_eos(tmp_path: Path, bos: bool, config: dict[str, Any], expected: tuple[bool, bool]) -> None:
    """tokenizer_config.json decides, as in transformers; without it the post-processor."""
    tokenizer = load_tokenizer(save_json(tmp_path, trained(bos=bos), config))
    first, last = (tokenizer.special_tokens[token] for token in ("<|begin_of_text|>", "<|im_end|>"))
    plain = tokenizer.encode("hi", bos=False)
    assert tokenizer.encode("hi") == [first] * expected[0] + plain + [last] * expected[1]
    assert (tokenizer.add_bos, tokenizer.add_eos) == expected
    if "eos_token" in config:
        assert tokenizer.eos_id == last


def test_the_special_tokens_map_names_them_too(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_json(tmp_path, trained(), None, special_tokens_map=CHAT_CONFIG))
    assert tokenizer.piece(tokenizer.bos_id or 0) == "<|begin_of_text|>"
    assert tokenizer.piece(tokenizer.eos_id or 0) == "<|im_end|>"


def test_what_a_directory_says(tmp_path: Path) -> None:
    config = CHAT_CONFIG | {"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}
    save_json(tmp_path, trained(), config, generation_config={"eos_token_id": [603, 601]}, config={"eos_token_id": 2})
    found = read_text_files(tmp_path)
    assert isinstance(found.tokenizer, BPETokenizer)
    assert (found.chat_template, found.stop_token_ids, found.notes) == ("d", (603, 601), ())
    assert read_text_files(tmp_path, load_tokenizer=False).tokenizer is None
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("j")
    assert (read_text_files(tmp_path).chat_template, read_text_files(tmp_path).stop_token_ids) == ("j", (2,))
    library = Library(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    save_json(tmp_path, library)
    assert "WordPiece" in read_text_files(tmp_path).notes[0] and read_text_files(tmp_path).tokenizer is None
    empty = tmp_path / "empty"
    empty.mkdir()
    assert read_text_files(empty) == replace(
        found, tokenizer=None, chat_templates={}, template_tokens={}, stop_token_ids=()
    )
    with pytest.raises(Error, match="no such directory"):
        read_text_files(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config", "[]", r"tokenizer_config\.json: not a JSON object"),
        ("tokenizer_config", "{", r"tokenizer_config\.json: not JSON"),
        ("tokenizer_config", "[" * 100_000, "not JSON"),
        ("tokenizer_config", '{"add_bos_token": "yes"}', "add_bos_token; expected true or false; found 'yes'"),
        ("tokenizer_config", '{"chat_template": 7}', "chat_template; expected a template"),
        ("generation_config", '{"eos_token_id": ["x"]}', "eos_token_id; expected a token id"),
        ("tokenizer", "{}", r"not a tokenizer\.json"),
        ("tokenizer", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 99999999}, "merges": []}}', "tokens"),
        ("tokenizer", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "1 to 1,048,576"),
        (
            "tokenizer",
            '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
            "not a",
        ),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    save_json(tmp_path, trained(vocab_size=300))
    (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(FormatError, match=message):
        read_text_files(tmp_path)


@settings(max_examples=60)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_json_ends_in_an_error_or_in_a_tokenizer(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL.read_bytes())
    for offset, byte in edits:
        data[offset % len(data)] = byte
    path = tmp_path / "tokenizer.json"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    try:
        tokenizer = load_tokenizer(path)
        tokenizer.encode("Once upon a time 🙂\0 <s>", special=True)
    except Error:
        return
    tokenizer.decode(range(tokenizer.vocab_size))
