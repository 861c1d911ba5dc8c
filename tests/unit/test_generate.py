"""Generated text: what a stream yields and when, how a text ends, and that streams do not disturb each other."""

from __future__ import annotations

import codecs
import itertools
import signal
import struct
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import numballama
from numballama import (
    ContextError,
    Error,
    GenerationResponse,
    Interrupted,
    Model,
    SamplingParams,
)
from numballama.engine.request import Request, RequestState, TokenEvent, TokenLogprobs
from numballama.generate import StopStringFilter, TextPart, TextStream, TextStreams, text_parts
from numballama.sampling import Sampled
from tests.helpers.bounds import shared_model, story_model
from tests.helpers.random_models import save
from tests.helpers.sentencepiece_models import load
from tests.helpers.tiny import FIRST_BYTE, TINY, WORDS, InterruptAt, ids_of, joined


@pytest.fixture
def model(tiny_file: Path, tiny_tokenizer: Path) -> Model:
    return shared_model(tiny_file, tiny_tokenizer, device="cpu")


@pytest.fixture
def scripted(tiny_file: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the model choose given tokens, or the bytes of a text, after any prompt."""
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu") as model:
        runner = model.token_engine.runner
        collect = runner.collect

        def speak(tokens: Sequence[int] | bytes) -> Model:
            script = iter([byte + FIRST_BYTE for byte in tokens] if isinstance(tokens, bytes) else tokens)

            def collect_scripted(ticket: int) -> Sampled:
                sampled = collect(ticket)
                for row in range(len(sampled.tokens)):
                    sampled.tokens[row] = model._runner.table.last_token[0] = next(script)
                return sampled

            monkeypatch.setattr(runner, "collect", collect_scripted)
            return model

        yield speak


def test_generate_is_the_stream_joined(model: Model) -> None:
    for seed in range(5):
        pieces = list(model.stream("the story", max_tokens=30, temperature=1.5, seed=seed))
        assert model.generate("the story", max_tokens=30, temperature=1.5, seed=seed) == joined(pieces)
        assert all(piece.finish_reason is None for piece in pieces[:-1])
        assert pieces[-1].finish_reason in ("length", "stop")
        assert str(pieces[0]) == pieces[0].text
        assert pieces[0].tokens_per_second == 0.0
        assert all(piece.tokens_per_second > 0 for piece in pieces[1:])


def test_tokens_are_those_of_the_reference(tiny_file: Path, tiny_tokenizer: Path, model: Model) -> None:
    oracle = shared_model(tiny_file, tiny_tokenizer, device="reference")
    for settings in (
        {"temperature": 0},
        {"temperature": 0, "repeat_penalty": 1.3},
        {"seed": 4},
        {"top_k": 0, "seed": 8},
    ):
        streams = (m.stream("ab", max_tokens=40, **settings) for m in (model, oracle))  # type: ignore[arg-type]
        fast, slow = ([piece.token for piece in stream] for stream in streams)
        assert fast == slow


def test_a_seed_reproduces_and_no_seed_does_not(model: Model) -> None:
    def text(seed: int | None) -> str:
        return model.generate("the", max_tokens=30, temperature=2.0, top_k=0, top_p=1.0, seed=seed)

    assert text(3) == text(3) != text(4)
    assert len({text(None) for _ in range(4)}) > 1


def test_none_starts_from_bos_alone(model: Model) -> None:
    first = next(iter(model.stream(None, max_tokens=1, temperature=0)))
    assert first.token == model.logits([1])[0].argmax()
    pieces = list(model.stream("ab", max_tokens=1, temperature=0))
    assert pieces[0].token == model.logits([1, *ids_of(model, "ab")])[-1].argmax()


def test_continuation_keeps_its_leading_space_and_a_text_from_nothing_does_not(scripted: Any) -> None:
    """llama2.c's decoding drops the space after BOS; after a prompt it is the space between two words."""
    model = scripted([259 + WORDS.index(" the")] * 2)
    assert model.generate("story", max_tokens=2) == " the the"
    assert scripted([259 + WORDS.index(" the")] * 2).generate(None, max_tokens=2) == "the the"


@pytest.mark.parametrize("seed", range(6))
def test_characters_are_never_split(model: Model, seed: int) -> None:
    """At a high temperature bytes come in any order; the text is what a strict decoder makes of all of them."""
    pieces = list(model.stream("ab", max_tokens=60, temperature=50.0, top_k=0, top_p=1.0, seed=seed))
    assert model.tokenizer is not None
    tokens = [piece.token for piece in pieces if piece.finish_reason != "stop"]
    assert sum(3 <= token < 259 for token in tokens) > 10, "hardly any bytes: the test says nothing"
    decoder = model.tokenizer.decoder(strip_leading_space=False)
    assert joined(pieces) == "".join([*map(decoder.push, tokens), decoder.flush()])


def test_a_character_comes_with_its_last_byte(scripted: Any) -> None:
    text = "añ€😀z"
    pieces = list(scripted(text.encode()).stream("x", max_tokens=11))
    assert [piece.text for piece in pieces] == ["a", "", "ñ", "", "", "€", "", "", "", "😀", "z"]
    # cut inside a character: replacement characters, at the end and not before
    pieces = list(scripted(text.encode()).stream("x", max_tokens=9))
    assert [piece.text for piece in pieces][:8] == ["a", "", "ñ", "", "", "€", "", ""]
    assert pieces[8].text == "\ufffd" * 3 and pieces[8].finish_reason == "length"


def test_cut_character_at_eos(scripted: Any) -> None:
    pieces = list(scripted([0xE2 + 3, 2]).stream("x", max_tokens=9))
    assert [(piece.text, piece.finish_reason) for piece in pieces] == [("", None), ("\ufffd", "stop")]


# How a text ends


@pytest.mark.parametrize("ender", [1, 2])
def test_ends_at_eos_and_in_these_files_at_bos(scripted: Any, ender: int) -> None:
    pieces = list(scripted([262, 263, ender, 264]).stream("x", max_tokens=9))
    assert [piece.token for piece in pieces] == [262, 263, ender]
    assert [piece.finish_reason for piece in pieces] == [None, None, "stop"]
    assert [piece.stop_reason for piece in pieces] == [None, None, ender]
    assert pieces[-1].text == ""


def test_max_tokens(model: Model) -> None:
    assert model.generate("x", max_tokens=0) == "" and list(model.stream("x", max_tokens=0)) == []
    (piece,) = model.stream("x", max_tokens=1, temperature=0)
    assert piece.finish_reason in ("length", "stop")
    with pytest.raises(Error, match="max_tokens must be at least 0"):
        model.stream("x", max_tokens=-1)


def test_ends_where_the_context_is_full(tiny_file: Path, tiny_tokenizer: Path) -> None:
    """The last token that fits is computed, its successor is shown, and nothing more."""
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu", context=12) as model:
        for seed in range(20):
            pieces = list(model.stream("ab c", max_tokens=100, temperature=1.0, seed=seed))
            prompt = [1, *ids_of(model, "ab c")]
            if pieces[-1].finish_reason != "stop":
                assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("length", "context")
                assert len(prompt) + len(pieces) == 12 + 1
                return
    pytest.fail("every text ended before the context did")


def test_a_prompt_may_fill_the_context_and_not_more(tiny_file: Path, tiny_tokenizer: Path) -> None:
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu", context=10) as model:
        word = "x" * 9
        assert len(ids_of(model, word)) == 10, "a space and nine letters"
        with pytest.raises(ContextError, match="the prompt has 11 tokens and the context 10"):
            model.generate(word)
        pieces = list(model.stream("x" * 8, temperature=0))
        assert len(pieces) == 1 and pieces[0].stop_reason in ("context", 1, 2)
        with pytest.raises(ContextError):
            model.logits(range(11))
        assert model.logits(range(10)).shape == (10, 300)


# Stop strings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "stop", "shown", "reason"),
    [
        ("one. two", ".", "one", "stop"),
        ("one. two", ("two", "ne"), "o", "stop"),
        ("aaab!", "aab", "a", "stop"),
        ("abababc", "ababc", "ab", "stop"),
        ("almost sto", "stop", "almost sto", "length"),
        ("stop", "stop", "", "stop"),
        ("naïve", "ï", "na", "stop"),
        ("abc", "", "abc", "length"),
        ("abc", ("", "c"), "ab", "stop"),
    ],
)
def test_stop_strings(scripted: Any, text: str, stop: Any, shown: str, reason: str) -> None:
    """The tokens are bytes, so that every stop string lies across their borders."""
    pieces = list(scripted(text.encode()).stream("x", max_tokens=len(text.encode()), stop=stop))
    assert joined(pieces) == shown
    assert pieces[-1].finish_reason == reason
    assert scripted(text.encode()).generate("x", max_tokens=len(text.encode()), stop=stop) == shown


def test_stop_string_inside_one_token_and_held_text_at_eos(scripted: Any) -> None:
    story = 259 + WORDS.index(" story")
    assert scripted([story, story]).generate("x", max_tokens=9, stop="to") == " s"
    pieces = list(scripted([story, 2]).stream("x", max_tokens=9, stop="y!"))
    assert [(piece.text, piece.finish_reason) for piece in pieces] == [(" stor", None), ("y", "stop")]


@given(st.lists(st.text("ab.", max_size=4)), st.lists(st.text("ab.", max_size=4), max_size=3))
def test_stop_filter_by_its_definition(parts: list[str], stops: list[str]) -> None:
    """All that was shown is a prefix of the text before the first stop string; nothing that may begin one is shown."""
    text, wanted = "".join(parts), [stop for stop in stops if stop]
    seen, shown, filter_ = "", "", StopStringFilter(stops)
    for part in parts:
        if filter_.found is not None:
            assert filter_.push(part) == ""
            continue
        seen += part
        shown += filter_.push(part)
        assert seen.startswith(shown)
        places = [seen.find(stop) for stop in wanted if stop in seen]
        assert (filter_.found is not None) == bool(places)
        if places:
            assert shown == seen[: min(places)] and seen[min(places) :].startswith(filter_.found)
        else:
            held = seen[len(shown) :]
            assert not held or any(stop.startswith(held) for stop in wanted), "held back without need"
            assert not any(seen.endswith(stop[:n]) and n > len(held) for stop in wanted for n in range(1, len(stop)))
    if filter_.found is None:
        assert shown + filter_.flush() == text
    assert filter_.flush() == ""


@given(
    st.lists(st.tuples(st.text("ab.", max_size=3), st.sampled_from(["", "", "<e>", "a>"])), max_size=5),
    st.lists(st.sampled_from(["<e>", "a<e>", "b.", "<e>a", ">", "", "zz", "ba>"]), max_size=3),
)
def test_stop_filter_sees_names_of_control_tokens(parts: list[tuple[str, str]], stops: list[str]) -> None:
    """They count for stop strings and are never shown."""
    whole, visible, shown, filter_ = "", "", "", StopStringFilter(stops)
    for text, hidden in parts:
        shown += filter_.push(text, hidden)
        whole, visible = whole + text + hidden, visible + text
        places = [whole.find(stop) for stop in stops if stop and stop in whole]
        assert (filter_.found is not None) == bool(places)
        if places:
            before = whole[: min(places)]
            count = sum(1 for _ in before)
            marks = [flag for text, hidden in parts for flag in [True] * len(text) + [False] * len(hidden)]
            assert shown == "".join(c for c, flag in zip(before, marks[:count], strict=True) if flag)
            return
        assert visible.startswith(shown)
    assert shown + filter_.flush() == visible


def test_long_stop_strings_take_no_time() -> None:
    """Constant time a character, also where much of the text is a beginning of the stop string."""
    stops = StopStringFilter(["word " * 5000 + "!", "a" * 20_000 + "b"])
    shown = "".join(stops.push("word a") for _ in range(500)) + "".join(stops.push("aaaa") for _ in range(1000))
    assert stops.found is None and shown + stops.flush() == "word a" * 500 + "a" * 4000


def test_a_stop_string_may_be_a_control_token(scripted: Any) -> None:
    story = 259 + WORDS.index(" story")
    options: dict[str, Any] = {"max_tokens": 3, "ignore_eos": True}
    assert scripted([story, 2, story]).generate("x", **options) == " story story", "its name is not shown"
    pieces = list(scripted([story, 2, story]).stream("x", **options, stop="</s>"))
    assert [(piece.text, piece.stop_reason) for piece in pieces] == [(" story", None), ("", "</s>")]
    pieces = list(scripted([story, 2, story]).stream("x", **options, stop="y</s> st"))
    assert "".join(piece.text for piece in pieces) == " stor" and pieces[-1].stop_reason == "y</s> st"
    assert scripted([story, 2, story]).generate("x", max_tokens=3, ignore_eos=True, stop="y</s>!") == " story story"


# Text of events


def event(token: int, index: int = 0, **values: Any) -> TokenEvent:
    defaults: dict[str, Any] = {"finish_reason": None, "stop_reason": None, "logprobs": None}
    return TokenEvent(token, index, **{**defaults, **values}, prompt_tokens=5, cached_tokens=2)


def test_a_text_stream_passes_on_what_an_event_says(model: Model) -> None:
    assert model.tokenizer is not None
    stream = TextStream(model.tokenizer.decoder(strip_leading_space=False), ())
    logprobs = TokenLogprobs(-0.5, [(262, -0.5)])
    first = stream(event(FIRST_BYTE + ord("a"), 3, logprobs=logprobs))
    assert (first.text, first.token, first.index) == ("a", FIRST_BYTE + ord("a"), 3)
    assert (first.prompt_tokens, first.cached_tokens, first.logprobs) == (5, 2, logprobs)
    assert (first.finish_reason, first.tokens_per_second) == (None, 0.0)
    last = stream(event(FIRST_BYTE + 0xC3, finish_reason="length", stop_reason="context"))
    assert (last.text, last.finish_reason, last.stop_reason) == ("\ufffd", "length", "context")
    assert last.tokens_per_second > 0


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.sampled_from(["", "€", "ñ€", "b"]))
def test_sequences_of_a_request_do_not_share_held_text(tiny_tokenizer: Path, turns: list[int], stop: str) -> None:
    """Bytes of three texts in any order: each text is what its own bytes give, up to the stop string."""
    tokenizer = load(tiny_tokenizer)
    texts = ["añ€😀", "€€ab", "x…ñ€b"]
    left = [list(text.encode()) for text in texts]
    streams = TextStreams(lambda: tokenizer.decoder(strip_leading_space=False), (stop,), 3)
    shown, ended = ["", "", ""], [False] * 3
    for index in [*turns, *(index for index in range(3) for _ in range(40))]:
        if left[index] and not ended[index]:
            byte = left[index].pop(0)
            response = streams(event(FIRST_BYTE + byte, index, finish_reason=None if left[index] else "length"))
            shown[index] += response.text
            ended[index] = response.finish_reason is not None
            assert response.index == index
            assert (response.stop_reason == stop) == (response.finish_reason == "stop")
    assert all(ended)
    assert shown == [text.partition(stop)[0] if stop else text for text in texts]


@given(
    st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=12), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([(), (1, 2)]),
)
def test_parts_of_texts_are_what_each_token_adds(
    tiny_tokenizer: Path, texts: list[list[int]], sizes: list[int], strip: bool, shown: tuple[int, ...]
) -> None:
    """However many tokens are read at a time, whatever they are: those of control, of bytes, of whole words."""
    tokenizer = load(tiny_tokenizer)
    streams, each = (TextStreams(lambda: tokenizer.decoder(strip, shown), (), len(texts)) for _ in range(2))
    state = RequestState("a", streams, when_read=True)
    request: Request[GenerationResponse] = Request(SimpleNamespace(cancel_state=lambda state: None), state)  # type: ignore[arg-type]
    found: list[Any] = []
    want = [TextPart(index) for index in range(len(texts))]
    for place in range(max(map(len, texts))):
        for index, tokens in enumerate(texts):
            if place < len(tokens):
                last = "length" if place == len(tokens) - 1 else None
                found.append(event(tokens[place], index, finish_reason=last) if last else (tokens[place], index, 1.0))
                want[index].add(each(event(tokens[place], index, finish_reason=last)))
    got = [TextPart(index) for index in range(len(texts))]
    for size in itertools.cycle(sizes):
        taken, found = found[:size], found[size:]
        for part in text_parts(request, taken):
            whole = got[part.index]
            whole.texts += part.texts
            whole.tokens += part.tokens
            whole.logprobs += part.logprobs
            whole.finish_reason = part.finish_reason
        if not found:
            break
    assert got == want


def test_speed_counts_from_when_tokens_came(model: Model) -> None:
    """Not from when they are read."""
    assert model.tokenizer is not None
    stream = TextStream(model.tokenizer.decoder(), ())
    times = [100.0, 100.0, 100.25, 100.75]
    speeds = [stream(event(FIRST_BYTE + 97, time=each)).tokens_per_second for each in times]
    assert speeds == [0, 0, 8, 4]


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


# Settings


def test_params_and_keywords(model: Model) -> None:
    params = SamplingParams(max_tokens=9, temperature=1.5, seed=3)
    want = model.generate("the story", 9, temperature=1.5, seed=3)
    assert model.generate("the story", params=params) == want
    assert model.generate("the story", params=SamplingParams(seed=3), max_tokens=9, temperature=1.5) == want
    assert joined(list(model.stream("the story", params=params))) == want
    assert len(list(model.stream("the story", 2, params=params))) <= 2
    assert params == SamplingParams(max_tokens=9, temperature=1.5, seed=3)


def test_a_stream_is_a_generator(model: Model) -> None:
    """Closing it cancels its request, and an error can be raised in it."""
    closed, broken = (model.stream("ab", ignore_eos=True, max_tokens=40) for _ in range(2))
    assert "stream of responses" in repr(closed) and next(closed).text is not None
    closed.close()
    assert list(closed) == []
    next(broken)
    with pytest.raises(KeyboardInterrupt):
        broken.throw(KeyboardInterrupt)
    with pytest.raises(StopIteration):
        next(broken)
    assert model.generate("ab", max_tokens=1) is not None, "the next step of the engine sees that both have ended"
    assert model.engine().stats().running == 0


def test_settings_that_are_refused_at_once(model: Model) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises(Error, match="unknown sampling option heat; choose from max_tokens"):
            call("x", heat=1)  # type: ignore[call-overload, call-arg]
        with pytest.raises(Error, match="params must be SamplingParams"):
            call("x", params={"seed": 1})  # type: ignore[call-overload, arg-type]
    for prompt in ("x", ["x", "y"]):
        with pytest.raises(Error, match=r"n > 1 gives several texts, generate\(\) returns one"):
            model.generate(prompt, n=2)  # type: ignore[call-overload]


def test_max_tokens_none_goes_to_the_end_of_the_context(tiny_file: Path, tiny_tokenizer: Path) -> None:
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu", context=20) as model:
        responses = list(model.stream("ab", max_tokens=None, ignore_eos=True, temperature=1.0, seed=1))
        prompt = 1 + len(ids_of(model, "ab"))
        assert len(responses) == 20 - prompt + 1
        assert (responses[-1].finish_reason, responses[-1].stop_reason) == ("length", "context")


def test_ignore_eos(scripted: Any) -> None:
    """EOS, and in these files BOS, add no text and do not end it; ids of the caller's do."""
    tokens = [FIRST_BYTE + ord("a"), 2, 1, FIRST_BYTE + ord("b"), 2, 280, FIRST_BYTE + ord("c")]
    responses = list(scripted(tokens).stream("x", max_tokens=9, ignore_eos=True, stop_token_ids=[280]))
    assert joined(responses) == "ab" and [response.token for response in responses] == tokens[:6]
    assert (responses[-1].finish_reason, responses[-1].stop_reason) == ("stop", 280)


def test_stop_token_ids(scripted: Any) -> None:
    responses = list(scripted([262, 270, 271]).stream("x", max_tokens=9, stop_token_ids={270}))
    assert (responses[-1].token, responses[-1].finish_reason, responses[-1].stop_reason) == (270, "stop", 270)
    assert responses[-1].text == "" and len(responses) == 2
    assert list(scripted([262, 2]).stream("x", max_tokens=9, stop_token_ids={270}))[-1].stop_reason == 2


def test_stop_string_is_the_reason(scripted: Any) -> None:
    last = list(scripted(b"one. two").stream("x", max_tokens=9, stop=["two", ". "]))[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", ". ")
    last = list(scripted(b"one").stream("x", max_tokens=3, stop=["two"]))[-1]
    assert (last.finish_reason, last.stop_reason) == ("length", None)


def test_special_tokens_in_a_prompt(tiny_file: Path, models: Path) -> None:
    model = story_model(models, "stories260K", device="cpu")
    assert model.tokenizer is not None
    for special in (False, True):
        ids = model.tokenizer.encode("a</s>b", special=special)
        (first,) = model.stream("a</s>b", 1, temperature=0, special=special)
        assert first.prompt_tokens == len(ids)
        assert first.token == model.logits(ids)[-1].argmax()


def test_responses_say_what_was_read(model: Model) -> None:
    ids = [1, *ids_of(model, "the story")]
    first, *_, last = model.stream("the story", 3, temperature=0)
    assert first.prompt_tokens == last.prompt_tokens == len(ids) and first.cached_tokens == 0
    assert first.logprobs is None and first.index == 0
    assert numballama.Piece is GenerationResponse, "the old name"


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


# Damaged weights


def test_damaged_weights_are_an_error_and_not_a_token(tmp_path: Path, tiny_tokenizer: Path) -> None:
    path, _ = save(tmp_path, "llama2c-v0", TINY)
    data = bytearray(path.read_bytes())
    data[28 + 4 * 300 * 16 + 4 : 28 + 4 * 300 * 16 + 8] = struct.pack("<f", float("nan"))  # second number of a norm
    path.write_bytes(data)
    for device in ("cpu", "reference"):
        with numballama.compile(path, tiny_tokenizer, device=device) as model:
            for settings in ({"temperature": 0}, {"seed": 1}, {"temperature": 0, "repeat_penalty": 2.0}):
                with pytest.raises(Error, match="not numbers"):
                    model.generate("ab", max_tokens=3, **settings)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), 1e38])
def test_damaged_weights_show_through_int8_activations(tmp_path: Path, tiny_tokenizer: Path, damage: float) -> None:
    """int8 has no NaN: the scales carry it to the logits."""
    path, _ = save(tmp_path, "llama2c-v2", TINY)
    data = bytearray(path.read_bytes())
    data[256 + 4 : 256 + 8] = struct.pack("<f", damage)  # second number of the first norm
    path.write_bytes(data)
    with numballama.compile(path, tiny_tokenizer, device="cpu") as model:
        for settings in ({"temperature": 0}, {"seed": 1}):
            with pytest.raises(Error, match="not numbers"):
                model.generate("ab", max_tokens=3, **settings)  # type: ignore[arg-type]


# Real models


def test_stories_in_real_utf8(models: Path) -> None:
    """The 260K model at a very high temperature spells bytes: what is shown is valid text whose characters came
    whole."""
    model = story_model(models, "stories260K", device="cpu")
    assert model.tokenizer is not None
    held = 0
    for seed in range(10):
        pieces = list(model.stream("Über", max_tokens=100, temperature=30.0, top_k=0, top_p=1.0, seed=seed))
        data = [model.tokenizer.token_bytes(piece.token) for piece in pieces if piece.finish_reason != "stop"]
        strict = codecs.getincrementaldecoder("utf-8")("replace")
        for piece, following in pairwise(pieces):
            held += piece.text == "" and following.text != ""
        assert joined(pieces).replace("\ufffd", "") == "".join(map(strict.decode, data)).replace("\ufffd", "")
    assert held > 0, "no byte was ever held back: the test says nothing"
