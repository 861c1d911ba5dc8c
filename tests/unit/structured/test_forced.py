"""Forced text is found byte by byte, and its tokens are those that the tokenizer gives for the whole text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import numballama
from numballama.sampling import SamplingParams
from numballama.structured import compile_constraint
from numballama.structured.checker import make_matcher
from numballama.structured.constraint import GrammarConstraint
from numballama.structured.forced import MAX_BYTES, ForcedText, ForcedTokens, byte_vocabulary
from numballama.structured.lark import OPTIONS, regex_grammar
from numballama.structured.vocabulary import VocabularyView
from numballama.tokenizers.base import Tokenizer
from tests.helpers.bpe import CHAT_CONFIG, save_json, trained

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def story() -> Tokenizer:
    return numballama.load_tokenizer(Path(numballama.__file__).parent / "story.gguf")


def text_of(grammar: str) -> ForcedText:
    return ForcedText(make_matcher(byte_vocabulary(), grammar))


def bits(text: str) -> int:
    return sum(1 << byte for byte in text.encode())


def test_bytes_that_must_come_next() -> None:
    text = text_of(regex_grammar("abc(def|dxy)z?"))
    assert text.next() == (b"abcd", bits("ex"))
    assert text.next() == (b"abcd", bits("ex"))  # looking changes nothing
    text.push(b"ab")
    text.push(b"cdx")
    assert text.next() == (b"y", bits("z"))
    text.push(b"y")
    assert text.next() == (b"", bits("z"))  # it may end here
    text.push(b"z")
    assert text.next() == (b"", 0)
    assert text_of(regex_grammar("a[éè]b")).next()[0] == b"a\xc3"  # inside a character


@pytest.mark.parametrize("grammar", ['start: "a" start', 'start: "a"{400000}', "start: /a{400000}b/"])
def test_an_endless_text_is_found_in_parts(grammar: str) -> None:
    text = text_of(f"{grammar}\n{OPTIONS}")
    for _ in range(3):
        assert text.next() == (b"a" * MAX_BYTES, bits("a"))
        text.push(b"a" * MAX_BYTES)


def test_a_text_that_the_grammar_does_not_allow_forces_nothing() -> None:
    text = text_of(regex_grammar("abc"))
    text.push(b"x")
    assert text.next() == (b"", 0) == text.next()


VALUES = [
    {"name": "Lily", "age": 12345, "favourite colour": "blue"}, {"a": [1, 2, 3]}, "Once upon a time, there was a girl.",
    ["cat", "cattle", "  two  spaces", "\n\t", "é🙂"],
]  # fmt: skip


@pytest.mark.parametrize("kind", ["story", "bpe"])
def test_tokens_are_the_beginning_of_the_whole_texts(kind: str, story: Tokenizer, tmp_path: Path) -> None:
    """For each place up to which a text may be forced, whatever follows."""
    tokenizer = (
        story if kind == "story" else numballama.load_tokenizer(save_json(tmp_path, trained("llama-bpe"), CHAT_CONFIG))
    )
    view = VocabularyView(tokenizer)
    forced, found = ForcedTokens(view), 0
    for value in VALUES:
        for separators in ((",", ":"), (", ", ": ")):
            data = json.dumps(value, ensure_ascii=False, separators=separators).encode()
            ids = tokenizer.encode_continuation(data)
            for end in range(len(view.tokens[ids[0]]) + 1, len(data)):
                rest = data[len(view.tokens[ids[0]]) : end]
                tokens = list(forced.tokens(ids[0], rest, 1 << data[end] | bits("xyz 0")))
                assert tokens == ids[1 : 1 + len(tokens)]
                found += len(tokens)
    assert found > 100, "the test is about something"


def test_a_token_that_may_be_longer_is_left_to_the_model(story: Tokenizer) -> None:
    forced = ForcedTokens(VocabularyView(story))
    (bracket,) = story.encode_continuation(b"(")
    whole = tuple(story.encode_continuation(b" th"))
    assert forced.tokens(bracket, b" th", 0) == whole == forced.tokens(bracket, b" th", bits(")"))
    assert len(whole) == 1 and not forced.tokens(bracket, b" th", bits("e)"))  # the


def test_masks_that_may_force(story: Tokenizer) -> None:
    forced = ForcedTokens(VocabularyView(story))
    masks = np.zeros((3, -(-story.vocab_size // 32)), np.uint32)
    for row, text in enumerate(("a", "ab", "")):
        for byte in text.encode():
            (token,) = story.encode_continuation(bytes([byte]))
            masks[row, token >> 5] |= np.uint32(1 << (token & 31))
    assert forced.may_be_forced(masks).tolist() == [True, False, False]


def make(tokenizer: Tokenizer, stops: tuple[int, ...] = (2,), **options: object) -> GrammarConstraint:
    params = SamplingParams(**options)  # type: ignore[arg-type]
    found = compile_constraint(params, tokenizer, stop_token_ids=stops)
    assert found is not None
    constraint = found()
    assert isinstance(constraint, GrammarConstraint)
    return constraint


def test_a_constraint_accepts_what_it_forces(story: Tokenizer) -> None:
    (x,), (y,) = story.encode_continuation(b"x"), story.encode_continuation(b"y")
    constraint = make(story, regex="x(: hello!|y: good [bm])")
    assert constraint.accept(x) is False and constraint.forced == ()
    assert constraint.accept(y) is False
    decoded = b"".join(map(story.token_bytes, constraint.forced))
    assert b": good".startswith(decoded) and len(decoded) > 4
    mask = constraint.mask()
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    rest = b": good "[len(decoded) :]
    assert allowed and all((rest + b"b").startswith(d) or d[:-1] == rest for d in map(story.token_bytes, allowed))


def test_the_end_may_be_forced(story: Tokenizer) -> None:
    (x,) = story.encode_continuation(b"x")
    constraint = make(story, regex="xhello!|y")
    assert constraint.accept(x) is True
    assert b"".join(map(story.token_bytes, constraint.forced)) == b"hello!"


def test_what_forces_no_tokens(story: Tokenizer) -> None:
    (x,) = story.encode_continuation(b"x")
    for options in ({"regex": "xhello", "logprobs": 0}, {"grammar": 'start: "xhello" (<s> | "!")'}):
        constraint = make(story, **options)
        assert constraint.accept(x) is False and constraint.forced == ()


def test_a_stop_token_is_not_forced(story: Tokenizer) -> None:
    (x,), hello = story.encode_continuation(b"x"), story.encode_continuation(b"hello!")
    constraint = make(story, stops=(2, hello[-1]), regex="xhello!?")
    stopped = make(story, stops=(2, hello[0]), regex="xhello!!")
    assert len(hello) > 1
    constraint.accept(x)
    stopped.accept(x)
    assert hello[-1] not in constraint.forced and stopped.forced == ()
