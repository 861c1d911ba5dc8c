"""tiktoken's files: ids are those of merging by rank; damage is named with its offset."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from numballama.errors import FormatError
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.library import UNICODE_TO_BYTE
from tests.golden.lines import lines
from tests.golden.make_tokenizers import GOLDEN, digests
from tests.helpers.bpe import real, trained

PEERS: dict[str, Any] = json.loads(GOLDEN.read_text())


def tiktoken_file(path: Path, vocabulary: list[str]) -> Path:
    """A file with these tokens, which are written in GPT-2's characters, by rank."""
    tokens = (bytes(UNICODE_TO_BYTE[letter] for letter in token) for token in vocabulary)
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


def tiktoken_encode(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """tiktoken's algorithm: merge the pair of lowest rank, the leftmost of equals, until none is left."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def ranked() -> list[str]:
    """A vocabulary in the order of ranks: bytes, then what merges made."""
    found = json.loads(trained("llama-bpe", 1000).to_str())["model"]["vocab"]
    return sorted(found, key=lambda token: (len(token) > 1, found[token]))


@pytest.mark.slow
def test_tiktoken_files(tmp_path: Path) -> None:
    vocabulary = ranked()
    tokenizer = load_tokenizer(tiktoken_file(tmp_path / "tokenizer.model", vocabulary))
    ranks = {bytes(UNICODE_TO_BYTE[letter] for letter in token): rank for rank, token in enumerate(vocabulary)}
    cut = trained("llama-bpe", 300).pre_tokenizer
    for line in lines()[::3]:
        words = [bytes(UNICODE_TO_BYTE[letter] for letter in word) for word, _ in cut.pre_tokenize_str(line)]
        expected = [token for word in words for token in tiktoken_encode(ranks, word)]
        assert tokenizer.encode(line, bos=False) == expected
        assert tokenizer.decode(expected) == line
    names = [tokenizer.piece(token) for token in range(1000, 1256)]
    assert names[:2] == ["<|begin_of_text|>", "<|end_of_text|>"] and names[9] == "<|eot_id|>"
    assert names[2] == "<|reserved_special_token_0|>" and names[255] == "<|reserved_special_token_247|>"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (1256, 1000, 1001)
    assert tokenizer.encode("a<|eot_id|>", special=True)[::2] == [1000, 1009]
    assert 1009 not in tokenizer.encode("a<|eot_id|>")


def test_llama_3s_tiktoken_file_is_its_tokenizer_json(tmp_path: Path) -> None:
    if (path := real("llama3_2")) is None:
        pytest.skip("no real tokenizer llama3_2 in NUMBALLAMA_TEST_MODELS")
    json_ = load_tokenizer(path)
    vocabulary = [json_.piece(token) for token in range(128_000)]
    tokenizer = load_tokenizer(tiktoken_file(tmp_path / "tokenizer.model", vocabulary))
    assert [tokenizer.piece(token) for token in range(128_256)] == [json_.piece(token) for token in range(128_256)]
    assert digests([tokenizer.encode(line, bos=False) for line in lines()]) == PEERS["llama3_2"]["lines"]
    assert tokenizer.encode("hi") == json_.encode("hi")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1] + b"x\n", "found"),
        (lambda data: data.replace(b" 7\n", b" 8\n"), "a space and 7"),
        (lambda data: data + data[:5] + b" 1000\n", "a new token"),
        (lambda data: data + b"*** 1000\n", r"at byte \d"),
        (lambda data: data + base64.b64encode(b"x" * 2000) + b" 1000\n", "1 to 1,024 bytes"),
    ],
)
def test_damaged_tiktoken_files(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tiktoken_file(tmp_path / "tokenizer.model", ranked())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match=message):
        load_tokenizer(path)
