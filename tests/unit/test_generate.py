"""Generated text: what a stream yields and when, how a text ends, and settings."""

from __future__ import annotations

import codecs
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import numballama
from numballama import ContextError, Error, GenerationResponse, Model, SamplingParams
from tests.helpers.bounds import shared_model, story_model
from tests.helpers.random_models import save
from tests.helpers.tiny import FIRST_BYTE, TINY, WORDS, ids_of, joined


@pytest.fixture
def model(tiny_file: Path, tiny_tokenizer: Path) -> Model:
    return shared_model(tiny_file, tiny_tokenizer, device="cpu")


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
