"""Text of a model's tokens: stop strings, of which none is half shown, and what each event adds."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama import GenerationResponse, Model
from numballama.engine.request import Request, RequestState, TokenEvent, TokenLogprobs
from numballama.generate import StopStringFilter, TextPart, TextStream, TextStreams, text_parts
from tests.helpers.bounds import shared_model
from tests.helpers.sentencepiece_models import load
from tests.helpers.tiny import FIRST_BYTE, WORDS, joined


@pytest.fixture
def model(tiny_file: Path, tiny_tokenizer: Path) -> Model:
    return shared_model(tiny_file, tiny_tokenizer, device="cpu")


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


def test_a_stop_string_that_an_incomplete_character_ends(scripted: Any) -> None:
    """At the end of the text its bytes become U+FFFD."""
    (first, last) = scripted(b"a\xc3").stream("x", max_tokens=2, stop="\ufffd")
    assert (first.text, last.text) == ("a", "") and (last.finish_reason, last.stop_reason) == ("stop", "\ufffd")


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


@given(
    st.lists(st.text("ab.", max_size=4), max_size=6),
    st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
    st.integers(0, 4),
)
def test_stop_filter_from_a_part_on(parts: list[str], stops: list[str], least: int) -> None:
    """A stop string ends the text if it ends behind the first parts. It may begin in them."""
    text, begin, filter_ = "".join(parts), len("".join(parts[:least])), StopStringFilter(stops)
    places = [
        (end, end - len(stop)) for end in range(begin + 1, len(text) + 1) for stop in stops if text[:end].endswith(stop)
    ]
    shown = ""
    for number, part in enumerate(parts):
        shown += filter_.push(part, may_end=number >= least)
        assert text.startswith(shown)
    assert (filter_.found is not None) == bool(places)
    if places:
        assert any(shown == text[:place] and text.startswith(filter_.found or "", place) for _, place in places)
    assert places or shown + filter_.flush() == text


def test_min_tokens_hold_stop_strings_back(scripted: Any) -> None:
    """As they hold back tokens that end a text; vLLM #21987."""
    options: dict[str, Any] = {"max_tokens": 8, "stop": [".", "xy"]}
    for least, shown, reason in (
        (1, "a", "."),
        (2, "a.b", "."),
        (4, "a.b.", "xy"),
        (6, "a.b.xy", "."),
        (7, "a.b.xy.", None),
    ):
        pieces = list(scripted(b"a.b.xy.c").stream("x", **options, min_tokens=least))
        found = next((piece.stop_reason for piece in pieces if piece.finish_reason == "stop"), None)
        assert joined(pieces).startswith(shown) and found == reason, least
        assert reason is None or joined(pieces) == shown


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
