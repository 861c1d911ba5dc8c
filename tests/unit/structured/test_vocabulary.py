"""llguidance sees the bytes that each of our tokenizers decodes to."""

from __future__ import annotations

import builtins
import copy
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import numballama
from numballama.errors import UnsupportedError
from numballama.structured.checker import make_matcher
from numballama.structured.lark import regex_grammar, schema_grammar
from numballama.structured.schema import check_schema
from numballama.structured.vocabulary import VocabularyView, make_tokenizer, token_bytes
from numballama.tokenizers.base import Tokenizer, TokenKind
from tests.helpers.bpe import CHAT_CONFIG, save_json, trained

if TYPE_CHECKING:
    from llguidance import LLTokenizer

pytest.importorskip("llguidance")

STORY = Path(numballama.__file__).parent / "story.gguf"
TEXT = '{"name": "Zoë 🙂",\n  "n": [1, 2]}'


def check(tokenizer: Tokenizer) -> None:
    known = make_tokenizer(VocabularyView(tokenizer))
    tokens, special = token_bytes(tokenizer)
    assert len(tokens) == tokenizer.vocab_size == known.vocab_size - 1 == known.eos_token
    for token, data in enumerate(tokens):
        hidden = tokenizer.entry(token)[0] in (TokenKind.CONTROL, TokenKind.UNKNOWN)
        assert hidden == (token in special) == data.startswith(b"\xff")
        assert hidden or data == tokenizer.token_bytes(token).removeprefix(b"\xff")
    data = TEXT.encode()
    for end in range(len(data) + 1):  # also inside a character
        ids = tokenizer.encode_continuation(data[:end])
        assert b"".join(map(tokenizer.token_bytes, ids)) == data[:end]
    assert known.decode_bytes(VocabularyView(tokenizer)(TEXT)) == data


def test_sentencepiece_gguf_and_llama2c(tokenizer: Tokenizer) -> None:
    check(tokenizer)


def test_the_packaged_vocabulary() -> None:
    check(numballama.load_tokenizer(STORY))


REGEXES = (
    "[a-z0-9]{1,12}@[a-z]+x",
    '[^"]*"',
    "[A-Z][a-z]{3}( [a-z]+)*",
    "[a-zé]+!",
    "[a-zA-Z_][a-zA-Z0-9_]*",
    "[-_a-z]{2,20}",
)
STRINGS: tuple[dict[str, Any], ...] = (
    {}, {"maxLength": 2}, {"maxLength": 7}, {"minLength": 4, "maxLength": 24}, {"maxLength": 300}, {"format": "email"},
    {"format": "email", "maxLength": 20}, {"format": "uri"}, {"format": "hostname"}, {"format": "date"},
    {"pattern": "^[A-Za-z0-9_-]{1,64}$"}, {"pattern": "^[^a-z]+$"}, {"pattern": "[.]"},
)  # fmt: skip
GRAMMARS = [regex_grammar(each) for each in REGEXES] + [
    schema_grammar(check_schema({"type": "string", **each})) for each in STRINGS
]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[LLTokenizer, LLTokenizer]]:
    """Vocabularies with their tables, and without."""
    trained_here = save_json(tmp_path_factory.mktemp("bpe"), trained("llama-bpe"), CHAT_CONFIG)
    found = []
    for path in (STORY, trained_here):
        tables = make_tokenizer(VocabularyView(numballama.load_tokenizer(path)))
        found.append((tables, tables.with_slices([])))
    return found


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_tables_of_tokens_change_no_mask(grammar: str, vocabularies: list[tuple[LLTokenizer, LLTokenizer]]) -> None:
    for number, vocabulary in enumerate(vocabularies):
        for seed in range(6):
            rng, both = random.Random(97 * number + seed), [make_matcher(each, grammar) for each in vocabulary]
            for _ in range(20):
                mask = both[0].compute_bitmask()
                assert mask == both[1].compute_bitmask()
                bits = int.from_bytes(mask, "little")
                allowed = [token for token in range(vocabulary[0].vocab_size - 1) if bits >> token & 1]
                if not allowed:
                    break
                token = rng.choice(allowed)
                assert both[0].consume_token(token) and both[1].consume_token(token)
                if both[0].is_stopped():
                    break


def test_byte_level_bpe(tmp_path: Path) -> None:
    check(numballama.load_tokenizer(save_json(tmp_path, trained("llama-bpe"), CHAT_CONFIG)))


def test_tokens_without_a_row_are_empty(tokenizer: Tokenizer) -> None:
    tokenizer = copy.copy(tokenizer)  # it is shared between tests
    tokenizer.limit(300)
    tokens, special = token_bytes(tokenizer)
    assert set(tokens[300:]) == {b""} and max(special) < 300 and tokens[299]


def test_without_the_library_the_error_names_it(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UnsupportedError, match=r'pip install "numballama\[serve\]"'):
        make_tokenizer(VocabularyView(tokenizer))
    with pytest.raises(UnsupportedError, match=r'regex: .*pip install "numballama\[serve\]"'):
        numballama.structured.compile_constraint(numballama.SamplingParams(regex="a"), tokenizer)
