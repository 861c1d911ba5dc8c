"""Streams of one model that run together, lists of prompts, and Ctrl-C: none disturbs another."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from numballama import Error, GenerationResponse, Interrupted, Model, SamplingParams
from tests.helpers.bounds import shared_model
from tests.helpers.tiny import InterruptAt, joined


@pytest.fixture
def model(tiny_file: Path, tiny_tokenizer: Path) -> Model:
    return shared_model(tiny_file, tiny_tokenizer, device="cpu")


# One model, many users


def tokens_of(stream: Iterator[GenerationResponse]) -> list[int]:
    return [piece.token for piece in stream]


def test_two_streams_in_turns(model: Model) -> None:
    settings: list[dict[str, Any]] = [
        {"prompt": "ab", "seed": 1},
        {"prompt": "the story", "seed": 2, "repeat_penalty": 1.5},
    ]
    alone = [tokens_of(model.stream(max_tokens=12, **each)) for each in settings]
    streams = [model.stream(max_tokens=12, **each) for each in settings]
    together: list[list[int]] = [[], []]
    for turn in (0, 1, 0, 0, 1, 1, 1, 0, *[0, 1] * 10):
        together[turn] += [piece.token for piece in [next(streams[turn], None)] if piece]
        if turn:
            model.logits([5, 6])  # takes the KV cache too
    assert together == alone


def test_two_threads(model: Model) -> None:
    settings = [{"prompt": "ab", "seed": 1}, {"prompt": "the story", "seed": 2}]
    alone = [tokens_of(model.stream(max_tokens=20, **each)) for each in settings]  # type: ignore[arg-type]
    together: list[list[int]] = [[], []]

    def read(index: int) -> None:
        together[index] = tokens_of(model.stream(max_tokens=20, **settings[index]))  # type: ignore[arg-type]

    threads = [threading.Thread(target=read, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert together == alone


def interrupting(call: Any, nth: int, how: str) -> Any:
    """`call`, with Ctrl-C in its nth call: "before" or "after" it, as if a handler raised; or "signal", as it comes."""
    if how != "signal":
        return InterruptAt(call, nth, how == "after")
    left = [nth]

    def signalling(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            signal.raise_signal(signal.SIGINT)
        return call(*args, **options)

    return signalling


PROMPT = "a story " * 20


INTERRUPTED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "seed": 3, "ignore_eos": True}


@pytest.mark.parametrize("how", ["before", "after", "signal"])
@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("which", ["submit", "collect"])
def test_an_interrupt_keeps_the_text_and_the_model(
    model: Model, monkeypatch: pytest.MonkeyPatch, which: str, nth: int, how: str
) -> None:
    """Wherever it comes, runs of the prompt included: the text is what was yielded, and the model is as before."""
    with model.exclusive():
        pass  # forgets the prompt's pages
    whole = list(model.stream(PROMPT, **INTERRUPTED))
    assert 128 < whole[0].prompt_tokens <= 256, "two runs, of which the second samples"
    with model.exclusive():
        pass
    runner = model.token_engine.runner
    monkeypatch.setattr(runner, which, interrupting(getattr(runner, which), nth, how))
    with pytest.raises(Interrupted) as caught:
        model.generate(PROMPT, **INTERRUPTED)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.text == joined(whole[: max(nth - 2, 0)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert model.generate(PROMPT, **INTERRUPTED) == joined(whole)
    assert model.token_engine.stats().running == 0


@pytest.mark.parametrize("which", ["decode", "prompt"])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_kernel(model: Model, monkeypatch: pytest.MonkeyPatch, which: str, after: bool) -> None:
    """Others' streams go on as if nothing had happened."""
    whole = list(model.stream(PROMPT, **INTERRUPTED))
    with model.exclusive():
        pass
    other = model.stream("ab", **INTERRUPTED)
    begun = [next(other).token for _ in range(3)]
    program = getattr(model._runner, which)
    monkeypatch.setattr(program, "submit", InterruptAt(program.submit, 1, after))
    with pytest.raises(Interrupted):
        model.generate(PROMPT, **INTERRUPTED)
    assert model.generate(PROMPT, **INTERRUPTED) == joined(whole)
    assert begun + [piece.token for piece in other] == tokens_of(model.stream("ab", **INTERRUPTED))


@pytest.mark.parametrize(("length", "pages"), [(31, 0), (32, 0), (33, 1), (64, 1), (65, 2)])
def test_whole_pages_of_a_prompt_are_reused(model: Model, length: int, pages: int) -> None:
    """All but the last token may come from the cache, whose pages hold 32 tokens; the next token is the same."""
    with model.exclusive():
        pass
    ids = [1, *range(3, 3 + length - 1)]
    first = next(model.stream_ids(ids, 1, temperature=0))
    assert first.cached_tokens == 0
    for reuse in (True, False):
        again = next(model.stream_ids(ids, 1, temperature=0, reuse_prefix=reuse))
        assert again.cached_tokens == (32 * pages if reuse else 0) and again.token == first.token


# Several prompts


def test_a_list_of_prompts(model: Model) -> None:
    prompts = ["ab", None, "the story"]
    alone = [model.generate(prompt, 8, seed=3) for prompt in prompts]
    assert model.generate(prompts, 8, seed=3) == alone
    assert model.generate(tuple(prompts), params=SamplingParams(max_tokens=8, seed=3)) == alone
    each = [SamplingParams(seed=seed, temperature=1.5) for seed in (1, 2, 3)]
    alone = [model.generate(prompt, 8, params=params) for prompt, params in zip(prompts, each, strict=True)]
    assert model.generate(prompts, 8, params=each) == alone
    assert model.generate([]) == []


def test_lists_that_are_refused(model: Model) -> None:
    with pytest.raises(Error, match="2 prompts and 1 params"):
        model.generate(["a", "b"], params=[SamplingParams()])
    with pytest.raises(Error, match="single prompt"):
        model.generate("a", params=[SamplingParams()])  # type: ignore[call-overload]
    with pytest.raises(Error, match="the prompt is empty"):
        model.generate(["a", ""])
    for wrong in (7, b"ab", ["a", 7]):
        with pytest.raises(Error, match="the prompt must be a string"):
            model.generate(wrong)  # type: ignore[call-overload]


def test_an_interrupt_keeps_the_finished_texts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.generate(["ab", "the"], 5, temperature=0, ignore_eos=True)
    decode = model._runner.decode
    monkeypatch.setattr(decode, "submit", InterruptAt(decode.submit, 7, after=False))
    with pytest.raises(Interrupted) as caught:
        model.generate(["ab", "the"], 5, temperature=0, ignore_eos=True)
    assert caught.value.finished == whole[:1]
    assert caught.value.text and whole[1].startswith(caught.value.text) and caught.value.text != whole[1]
