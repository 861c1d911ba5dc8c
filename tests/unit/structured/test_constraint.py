"""A constraint allows what its grammar does, and stop tokens where the text may end."""

from __future__ import annotations

import gc
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numballama
from numballama.engine.sequence import BatchConstraint, Constraint
from numballama.errors import Error
from numballama.sampling import SamplingParams
from numballama.structured import compile_constraint
from numballama.structured.checker import make_matcher
from numballama.structured.constraint import BLOCK, Grammar, GrammarConstraint, GrammarError, MaskBlocks
from numballama.tokenizers.base import Tokenizer

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def story() -> Tokenizer:
    return numballama.load_tokenizer(Path(numballama.__file__).parent / "story.gguf")


def allowed(constraint: Constraint) -> set[int]:
    mask = constraint.mask()
    assert mask is not None and mask.dtype == np.uint32
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def make(tokenizer: Tokenizer, regex: str, vocab_size: int | None = None, stops: tuple[int, ...] = (2,)) -> Constraint:
    params = SamplingParams(regex=regex, logprobs=0)  # so nothing is forced
    found = compile_constraint(params, tokenizer, vocab_size=vocab_size, stop_token_ids=stops)
    assert found is not None
    return found()


def token(tokenizer: Tokenizer, text: str) -> int:
    (found,) = tokenizer.encode_continuation(text.encode())
    return found


def test_stop_tokens_are_allowed_where_the_text_may_end(story: Tokenizer) -> None:
    a, b, c = (token(story, text) for text in "abc")
    constraint = make(story, "ab*c?", stops=(1, 2, b))
    assert isinstance(constraint, BatchConstraint)
    assert a in allowed(constraint) and not {1, 2, b, c} & allowed(constraint)
    assert not constraint.accept(a)
    assert {1, 2, b, c} <= allowed(constraint)
    assert constraint.accept(c) is True  # nothing may follow


def test_a_text_token_that_ends_the_text_is_not_allowed_within(story: Tokenizer) -> None:
    a, b = token(story, "a"), token(story, "b")
    constraint = make(story, "a(b|c)a", stops=(2, b))
    constraint.accept(a)
    assert b not in allowed(constraint) and token(story, "c") in allowed(constraint)


def test_only_stop_tokens_where_the_text_may_not_end(story: Tokenizer) -> None:
    """No token can be chosen there, and it is not the model's fault. Other texts go on."""
    a, other = token(story, "a"), make(story, "ab")
    first = allowed(other)
    other.accept(a)
    stuck, going = make(story, "ab", stops=(2, *allowed(other))), make(story, "ab")
    message = "^regex allows only tokens of stop_token_ids here, where the text may not end: "
    results = GrammarConstraint.advance([(stuck, a), (going, a)])  # type: ignore[list-item]
    assert isinstance(results[0], GrammarError) and re.match(message, str(results[0])) and results[1] is False
    with pytest.raises(GrammarError, match=message):
        make(story, "ab", stops=(2, *first))


def test_a_mask_has_the_size_of_the_models_vocabulary(story: Tokenizer) -> None:
    for size in (story.vocab_size, story.vocab_size + 1, story.vocab_size + 200):
        constraint = make(story, "a+", size)
        for _ in range(3):
            mask = constraint.mask()
            assert mask is not None and mask.shape == (-(-size // 32),)
            assert max(allowed(constraint)) < story.vocab_size
            constraint.accept(token(story, "a"))


def test_texts_of_one_grammar_are_independent(story: Tokenizer) -> None:
    a, b = token(story, "a"), token(story, "b")
    one, other = make(story, "ab|ba"), make(story, "ab|ba")
    one.accept(a)
    assert {story.token_bytes(each) for each in allowed(one)} == {b"b"} and a in allowed(other)
    assert isinstance(one, GrammarConstraint) and isinstance(other, GrammarConstraint)
    assert GrammarConstraint.advance([(one, b), (other, b)]) == [True, False]
    assert {story.token_bytes(each) for each in allowed(other)} == {b"a"}


def test_a_token_that_is_not_allowed_fails_its_text_alone(story: Tokenizer) -> None:
    a, b = token(story, "a"), token(story, "b")
    one, other = make(story, "aaa"), make(story, "aaaa")
    results = GrammarConstraint.advance([(one, b), (other, a)])  # type: ignore[list-item]
    assert isinstance(results[0], Error) and "regex is too complex" in str(results[0]) and results[1] is False
    with pytest.raises(Error, match="allows no further token"):
        one.accept(a)
    assert not make(story, "aaa").accept(a)  # compiled again


def test_masks_are_borrowed_and_given_back() -> None:
    blocks = MaskBlocks(3)
    taken = [blocks.borrow() for _ in range(BLOCK + 1)]
    assert len({(id(block), row) for block, row in taken}) == BLOCK + 1
    blocks.give_back(*taken[7])
    again = blocks.borrow()
    assert again[0] is taken[7][0] and again[1] == taken[7][1]


def test_a_finished_text_gives_its_mask_back(story: Tokenizer) -> None:
    constraints = [make(story, "a{4}") for _ in range(2 * BLOCK)]
    assert isinstance(constraints[0], GrammarConstraint)
    blocks = constraints[0]._blocks
    free = len(blocks._free)
    del constraints
    gc.collect()
    assert len(blocks._free) == free + 2 * BLOCK


@pytest.mark.parametrize("regex", ["a|", "b*"])
def test_a_grammar_may_allow_the_empty_text(story: Tokenizer, regex: str) -> None:
    assert 2 in allowed(make(story, regex))


@pytest.mark.parametrize("regex", [r"[^\s\S]", "(|)"])
def test_a_grammar_must_allow_some_text(story: Tokenizer, regex: str) -> None:
    with pytest.raises(Error, match=r"regex (cannot be followed: no text fits it|allows only the empty text)"):
        make(story, regex)


def plain(grammar: Grammar, text: list[int], size: int, stops: tuple[int, ...]) -> set[int] | None:
    """What a text may go on with, from a matcher of its own. None: it has ended."""
    matcher = make_matcher(grammar.tokenizer, grammar._text)
    assert matcher.try_consume_tokens(text) == len(text)
    bits = set(np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")))
    tokens = {token for token in map(int, bits) if token != grammar.end}
    if matcher.is_stopped() or (grammar.end in bits and not tokens):
        return None
    return tokens | {s for s in stops if s < size} if grammar.end in bits else tokens - set(stops)


@pytest.mark.parametrize("extra", [0, 77])
def test_masks_of_many_texts_are_those_of_each_alone(story: Tokenizer, extra: int) -> None:
    """In any order, of several grammars with several copies, some of them ended or failed."""
    rng, size, stops = random.Random(4), story.vocab_size + extra, (2, token(story, "e"))
    options: list[dict[str, Any]] = [
        {"json_schema": {"properties": {"a": {"type": "string", "maxLength": 9}, "b": {"type": "integer"}}}},
        {"json_schema": {"type": "string", "format": "email"}},
        {"regex": "[a-e]+( [0-9]{2})*"},
    ]  # fmt: skip
    makers = []
    for each in options * 4:
        found = compile_constraint(SamplingParams(**each, logprobs=0), story, vocab_size=size, stop_token_ids=stops)
        assert found is not None
        makers.append(found)
    texts: dict[GrammarConstraint, list[int]] = {}
    for each_maker in makers * 2:
        constraint = each_maker()
        assert isinstance(constraint, GrammarConstraint)
        texts[constraint] = []
    assert all(len(constraint._grammar._copies) > 2 for constraint in texts), "the test is about something"
    for step in range(12):
        steps: list[tuple[GrammarConstraint, int]] = []
        for constraint, text in texts.items():
            allow = sorted(allowed(constraint) - set(stops))
            one = rng.choice(allow)
            if step == 6 and constraint is next(iter(texts)):
                one = next(each for each in range(3, size) if each not in allowed(constraint))
            steps.append((constraint, one))
            text.append(one)
        rng.shuffle(steps)
        for (constraint, _), result in zip(steps, GrammarConstraint.advance(steps), strict=True):
            if isinstance(result, Exception):
                assert step == 6 and constraint is next(iter(texts))
                continue
            expected = plain(constraint._grammar, texts[constraint], size, stops)
            assert result is (expected is None)
            assert result or allowed(constraint) == expected
        failed = next(iter(texts)) if step == 6 else None
        texts = {
            c: text for c, text in texts.items() if c is not failed and allowed(c) - set(stops)
            and plain(c._grammar, text, size, stops) is not None
        }  # fmt: skip
    assert texts, "the test is about something"
