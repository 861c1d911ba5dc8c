"""What a user of `Model` sees: text in pieces, how it ends, what is refused, and that nothing disturbs the next
call."""

from __future__ import annotations

import codecs
import struct
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numballama
from numballama import ContextError, DeviceError, Error, Model, UnsupportedError
from numballama.config import ModelConfig
from numballama.cpu import CpuBackend
from numballama.generate import StopStringFilter
from numballama.model import Interrupted, Piece
from tests.helpers.bounds import shared_model, story_model
from tests.helpers.random_models import save

CHUNK = CpuBackend.prefill_chunk
TINY = ModelConfig(16, 24, 2, 4, 2, 300, 2 * CHUNK + 10)
WORDS = [
    " ",
    *"abcdefghijklmnopqrstuvwxyz",
    " the",
    "the",
    "th",
    "he",
    "ab",
    "abc",
    "é",
    "…",
    " a",
    " b",
    " story",
    "story",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama2.c tokenizer of 300 tokens: bytes, letters, a few words."""
    bytes_ = [b"<0x%02X>" % byte for byte in range(256)]
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *bytes_, *(word.encode() for word in WORDS)]
    pieces += [b"w%d" % index for index in range(300 - len(pieces))]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.bin"
    entries = (struct.pack("<fi", float(len(piece)), len(piece)) + piece for piece in pieces)
    path.write_bytes(struct.pack("<i", max(map(len, pieces))) + b"".join(entries))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"), "llama2c-v0", TINY, seed=5)[0]


@pytest.fixture
def model(file: Path, tokenizer: Path) -> Model:
    return shared_model(file, tokenizer, device="cpu")


@pytest.fixture
def scripted(file: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the model choose given tokens, or the bytes of a text, after any prompt."""
    with numballama.compile(file, tokenizer, device="cpu") as model:

        def speak(tokens: Sequence[int] | bytes) -> Model:
            script = iter([byte + 3 for byte in tokens] if isinstance(tokens, bytes) else tokens)
            monkeypatch.setattr(model, "_next", lambda stream, history, sampler: next(script))
            return model

        yield speak


def ids_of(model: Model, text: str) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode(text, bos=False)


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# The stream


def test_generate_is_the_stream_joined(model: Model) -> None:
    for seed in range(5):
        pieces = list(model.stream("the story", max_tokens=30, temperature=1.5, seed=seed))
        assert model.generate("the story", max_tokens=30, temperature=1.5, seed=seed) == joined(pieces)
        assert all(piece.finish_reason is None for piece in pieces[:-1])
        assert pieces[-1].finish_reason in ("length", "eos")
        assert str(pieces[0]) == pieces[0].text
        assert pieces[0].tokens_per_second == 0.0
        assert all(piece.tokens_per_second > 0 for piece in pieces[1:])


def test_tokens_are_those_of_the_reference(file: Path, tokenizer: Path, model: Model) -> None:
    oracle = shared_model(file, tokenizer, device="reference")
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
    """At a high temperature bytes come in any order; what is shown is what a strict decoder makes of all of them."""
    pieces = list(model.stream("ab", max_tokens=60, temperature=50.0, top_k=0, top_p=1.0, seed=seed))
    assert model.tokenizer is not None
    tokens = [piece.token for piece in pieces if piece.finish_reason != "eos"]
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
    assert [(piece.text, piece.finish_reason) for piece in pieces] == [("", None), ("\ufffd", "eos")]


# How a text ends


@pytest.mark.parametrize("ender", [1, 2])
def test_ends_at_eos_and_in_these_files_at_bos(scripted: Any, ender: int) -> None:
    pieces = list(scripted([262, 263, ender, 264]).stream("x", max_tokens=9))
    assert [piece.token for piece in pieces] == [262, 263, ender]
    assert [piece.finish_reason for piece in pieces] == [None, None, "eos"]
    assert pieces[-1].text == ""


def test_max_tokens(model: Model) -> None:
    assert model.generate("x", max_tokens=0) == "" and list(model.stream("x", max_tokens=0)) == []
    (piece,) = model.stream("x", max_tokens=1, temperature=0)
    assert piece.finish_reason in ("length", "eos")
    with pytest.raises(Error, match="max_tokens must be at least 0"):
        model.stream("x", max_tokens=-1)


def test_ends_where_the_context_is_full(file: Path, tokenizer: Path) -> None:
    """The last token that fits is computed from, what it gives is shown, and nothing more."""
    with numballama.compile(file, tokenizer, device="cpu", context=12) as model:
        for seed in range(20):
            pieces = list(model.stream("ab c", max_tokens=100, temperature=1.0, seed=seed))
            prompt = [1, *ids_of(model, "ab c")]
            if pieces[-1].finish_reason != "eos":
                assert pieces[-1].finish_reason == "context"
                assert len(prompt) + len(pieces) == 12 + 1
                assert len(model.session.tokens) == 12
                return
    pytest.fail("every text ended before the context did")


def test_a_prompt_may_fill_the_context_and_not_more(file: Path, tokenizer: Path) -> None:
    with numballama.compile(file, tokenizer, device="cpu", context=10) as model:
        word = "x" * 9
        assert len(ids_of(model, word)) == 10, "a space and nine letters"
        with pytest.raises(ContextError, match="the prompt has 11 tokens and the context 10"):
            model.generate(word)
        pieces = list(model.stream("x" * 8, temperature=0))
        assert len(pieces) == 1 and pieces[0].finish_reason in ("context", "eos")
        with pytest.raises(ContextError):
            model.logits(range(11))
        assert model.logits(range(10)).shape == (10, 300)


# Stop strings


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
    assert [(piece.text, piece.finish_reason) for piece in pieces] == [(" stor", None), ("y", "eos")]


@given(st.lists(st.text("ab.", max_size=4)), st.lists(st.text("ab.", max_size=4), max_size=3))
def test_stop_filter_by_its_definition(parts: list[str], stops: list[str]) -> None:
    """All that was shown is a prefix of the text before the first stop string; nothing that may begin one is shown."""
    text, wanted = "".join(parts), [stop for stop in stops if stop]
    seen, shown, filter_ = "", "", StopStringFilter(stops)
    for part in parts:
        if filter_.stopped:
            assert filter_.push(part) == ""
            continue
        seen += part
        shown += filter_.push(part)
        assert seen.startswith(shown)
        places = [seen.find(stop) for stop in wanted if stop in seen]
        assert filter_.stopped == bool(places)
        if places:
            assert shown == seen[: min(places)]
        else:
            held = seen[len(shown) :]
            assert not held or any(stop.startswith(held) for stop in wanted), "held back without need"
            assert not any(seen.endswith(stop[:n]) and n > len(held) for stop in wanted for n in range(1, len(stop)))
    if not filter_.stopped:
        assert shown + filter_.flush() == text
    assert filter_.flush() == ""


# What is refused


def test_prompts_that_are_refused(model: Model) -> None:
    with pytest.raises(Error, match="the prompt is empty"):
        model.generate("")
    with pytest.raises(ContextError, match="context"):
        model.generate("x" * 500)
    with pytest.raises(Error, match="not valid Unicode"):
        model.generate("\ud800")
    with pytest.raises(Error, match="temperature"):
        model.stream("x", temperature=-1)  # at once, not at the first piece
    assert model.generate("x", max_tokens=2, temperature=0) == model.generate("x", max_tokens=2, temperature=0)


@pytest.mark.parametrize(
    ("ids", "message"), [([], "empty"), ([1, 300], "token 1 of the prompt is 300"), ([-1], "is -1")]
)
def test_ids_that_are_refused(model: Model, ids: list[int], message: str) -> None:
    with pytest.raises(Error, match=message):
        model.logits(ids)


def test_logits_take_any_integers(model: Model) -> None:
    want = model.logits([1, 5, 299])
    assert want.shape == (3, 300) and want.dtype == np.float32
    for ids in (np.array([1, 5, 299]), (1, 5, 299), iter([1, 5, 299]), np.array([1, 5, 299], np.uint16)):
        np.testing.assert_array_equal(model.logits(ids), want)
    assert not np.shares_memory(model.logits([1]), model.logits([1])), "the caller owns them"


def test_without_a_tokenizer(file: Path) -> None:
    with numballama.compile(file, device="cpu") as model:
        assert model.tokenizer is None
        assert model.logits([1, 2]).shape == (2, 300)
        for call in (model.generate, model.stream):
            with pytest.raises(Error, match="carries no tokenizer"):
                call("x")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda"}, DeviceError, "cuda"),
        ({"device": "cuda:1"}, DeviceError, "cuda:1"),
        ({"device": "abacus"}, DeviceError, "unknown device 'abacus'"),
        ({"dtype": "f8"}, UnsupportedError, "dtype 'f8' is not supported; there are f32, f16, bf16, int8"),
        ({"kv_dtype": "int8"}, UnsupportedError, "kv_dtype 'int8' is not supported; there are f32, f16, bf16"),
        ({"context": 0}, Error, "context must be at least 1"),
        ({"context": 1 << 50}, ContextError, "KV cache"),
        ({"threads": 0}, Error, "threads must be at least 1"),
        ({"rope_pairing": "sideways"}, Error, "rope_pairing"),
        ({"rope_theta": 0.0}, Error, "rope_theta"),
        ({"norm_eps": -1.0}, Error, "norm_eps"),
        ({"fusions": ["magic"]}, Error, "unknown fusion magic"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(file: Path, options: dict[str, Any], error: type[Error], message: str) -> None:
    with pytest.raises(error, match=message):
        numballama.compile(file, **{"device": "cpu", **options})


def test_no_path_is_the_story_model_of_the_package() -> None:
    with numballama.compile(None, device="cpu") as model:
        assert model.path.name == "story.gguf"
        assert model.generate("Once upon a time", max_tokens=8, temperature=0).startswith(", there was a")


# What can be chosen


def test_overrides_change_the_model_and_the_notes(file: Path, model: Model) -> None:
    ids, own = [1, 5, 9, 30], model.logits([1, 5, 9, 30])
    assert any("rope_theta" in note and "assumed" in note for note in model.notes)
    for options in ({"rope_pairing": "half"}, {"rope_theta": 50.0}, {"norm_eps": 0.1}):
        with numballama.compile(file, device="cpu", **options) as other:  # type: ignore[arg-type]
            ((name, value),) = options.items()
            assert getattr(other.config, name) == value
            assert np.abs(other.logits(ids) - own).max() > 1e-3
            assert not any(name in note for note in other.notes)
            with numballama.compile(file, device="reference", **options) as oracle:  # type: ignore[arg-type]
                assert np.abs(other.logits(ids) - oracle.logits(ids)).max() < 1e-4


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8"])
def test_dtype_converts_linear_weights(file: Path, dtype: str) -> None:
    with numballama.compile(file, device="cpu", dtype=dtype) as model:
        types = {name: weight.type.name for name, weight in model.weights.items()}
        assert types["layers.0.wq"] == types["tok_embeddings"] == dtype  # tied: the table is the classifier
        assert types["norm"] == types["layers.1.ffn_norm"] == "f32"


def test_untied_embedding_table_keeps_its_type(tmp_path: Path) -> None:
    config = ModelConfig(16, 24, 1, 4, 2, 40, 8, tied_embeddings=False)
    path, _ = save(tmp_path, "llama2c-v0", config)
    with numballama.compile(path, device="cpu", dtype="int8") as model:
        assert model.weights["tok_embeddings"].type.name == "f32" and model.weights["output"].type.name == "int8"


@pytest.mark.parametrize(("kv_dtype", "size"), [(None, 4), ("f32", 4), ("f16", 2), ("bf16", 2)])
def test_kv_dtype(file: Path, kv_dtype: str | None, size: int) -> None:
    with numballama.compile(file, device="cpu", kv_dtype=kv_dtype, context=20) as model:
        assert model.kv.nbytes == 2 * TINY.n_layers * TINY.n_kv_heads * 20 * TINY.head_dim * size
        assert model.context == 20


def test_context_beyond_the_models_own_is_noted(file: Path) -> None:
    with numballama.compile(file, device="cpu", context=TINY.context + 1) as model:
        assert model.context == TINY.context + 1 and any("poor" in note for note in model.notes)
        assert np.isfinite(model.logits(np.arange(TINY.context + 1))).all()


def test_auto_says_what_it_chose(file: Path) -> None:
    with numballama.compile(file) as model:
        assert model.device == "cpu" and any("cpu" in note for note in model.notes)
        assert "cpu" in repr(model)
    with numballama.compile(file, device="reference") as oracle, pytest.raises(Error, match="no plan"):
        _ = oracle.plan


# Prompts through chunks


@pytest.mark.parametrize(
    "length", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1]
)
def test_prompt_lengths_around_the_chunk(file: Path, tokenizer: Path, model: Model, length: int) -> None:
    ids = [int(token) for token in np.random.default_rng(length).integers(3, 300, length)]
    want = shared_model(file, tokenizer, device="reference").logits(ids)
    assert np.abs(model.logits(ids) - want).max() < 1e-4
    model.session.rewind()
    model.session.prefill(ids)
    assert model.session.tokens == ids
    assert np.abs(model.session.logits - want[-1]).max() < 1e-4
    model.session.rewind(length // 2)
    model.session.prefill(ids[length // 2 :])
    assert np.abs(model.session.logits - want[-1]).max() < 1e-4


def test_session_refuses_what_does_not_fit(model: Model) -> None:
    model.session.rewind()
    model.session.prefill(list(range(3, 3 + TINY.context)))
    for call in (lambda: model.session.step(3), lambda: model.session.prefill([3, 4])):
        with pytest.raises(ContextError, match="do not fit"):
            call()
    model.session.rewind()


# One model, many users


def tokens_of(stream: Iterator[Piece]) -> list[int]:
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


def test_close_and_use_after(file: Path, tokenizer: Path) -> None:
    with numballama.compile(file, tokenizer, device="cpu") as model:
        stream = model.stream("ab", max_tokens=50, temperature=0)
        next(stream)
    for call in (
        lambda: model.generate("x"),
        lambda: model.logits([1]),
        lambda: next(stream),
        lambda: model.stream("x"),
    ):
        with pytest.raises(Error, match="closed"):
            call()
    model.close()  # again: nothing
    assert model.config.vocab_size == 300 and "Model" in repr(model)


class InterruptAt:
    """A program's `run` that is interrupted at its nth call, before or after the computation."""

    def __init__(self, run: Any, nth: int, after: bool) -> None:
        self.run, self.left, self.after = run, nth, after

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = self.run(*args, **options)
        if self.left == 0:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("which", ["_decode", "_prompt"])
def test_interrupt_keeps_the_text_and_the_model(
    model: Model, monkeypatch: pytest.MonkeyPatch, which: str, nth: int, after: bool
) -> None:
    prompt = "a story " * 10
    whole = list(model.stream(prompt, max_tokens=12, temperature=0.9, seed=3))
    program = getattr(model.session, which)
    interrupt = InterruptAt(program.run, nth, after)
    monkeypatch.setattr(program, "run", interrupt)
    if which == "_prompt" and nth > 2:
        assert model.generate(prompt, max_tokens=12, temperature=0.9, seed=3) == joined(whole), "two chunks, no more"
        return
    with pytest.raises(Interrupted) as caught:
        model.generate(prompt, max_tokens=12, temperature=0.9, seed=3)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.text == joined(whole[: 0 if which == "_prompt" else nth])
    assert model.generate(prompt, max_tokens=12, temperature=0.9, seed=3) == joined(whole)


def test_an_interrupted_stream_goes_on_where_it_was(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps of a run: the history has not grown, so the next run does the same again."""
    whole = tokens_of(model.stream("ab", max_tokens=6, temperature=0))
    session = model.session
    session.rewind()
    prompt = [1, *ids_of(model, "ab")]
    session.prefill(prompt)
    monkeypatch.setattr(session._decode, "run", InterruptAt(session._decode.run, 1, after=True))  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        session.step(whole[0])
    assert session.tokens == prompt
    session.step(whole[0])
    assert session.logits.argmax() == whole[1]


def test_damaged_weights_are_an_error_and_not_a_token(tmp_path: Path, tokenizer: Path) -> None:
    path, _ = save(tmp_path, "llama2c-v0", TINY)
    data = bytearray(path.read_bytes())
    data[28 + 4 * 300 * 16 + 4 : 28 + 4 * 300 * 16 + 8] = struct.pack("<f", float("nan"))  # second number of a norm
    path.write_bytes(data)
    for device in ("cpu", "reference"):
        with numballama.compile(path, tokenizer, device=device) as model:
            for settings in ({"temperature": 0}, {"seed": 1}, {"temperature": 0, "repeat_penalty": 2.0}):
                with pytest.raises(Error, match="not numbers"):
                    model.generate("ab", max_tokens=3, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), 1e38])
def test_damaged_weights_show_through_int8_activations(tmp_path: Path, tokenizer: Path, damage: float) -> None:
    """int8 has no NaN: the scales carry it to the logits."""
    path, _ = save(tmp_path, "llama2c-v2", TINY)
    data = bytearray(path.read_bytes())
    data[256 + 4 : 256 + 8] = struct.pack("<f", damage)  # second number of the first norm
    path.write_bytes(data)
    with numballama.compile(path, tokenizer, device="cpu") as model:
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
        data = [model.tokenizer.token_bytes(piece.token) for piece in pieces if piece.finish_reason != "eos"]
        strict = codecs.getincrementaldecoder("utf-8")("replace")
        for piece, following in pairwise(pieces):
            held += piece.text == "" and following.text != ""
        assert joined(pieces).replace("\ufffd", "") == "".join(map(strict.decode, data)).replace("\ufffd", "")
    assert held > 0, "no byte was ever held back: the test says nothing"
