"""`compile` and `Model`: refused arguments, choices, and behaviour after `close`."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numballama
from numballama import (
    ContextError,
    DeviceError,
    Error,
    GenerationResponse,
    Model,
    SamplingParams,
    UnsupportedError,
    memory,
    validation,
)
from numballama.backend import choose_device
from numballama.checkpoint import Weight
from numballama.config import ModelConfig
from numballama.engine.model_runner import SATURATED
from numballama.export import WRITERS
from numballama.generate import TextEngine
from numballama.quantization.types import F32
from tests.helpers.bounds import shared_model
from tests.helpers.processes import run_python
from tests.helpers.random_models import random_checkpoint, save
from tests.helpers.sampling import likeliest, log_softmax
from tests.helpers.tiny import TINY


@pytest.fixture
def model(tiny_file: Path, tiny_tokenizer: Path) -> Model:
    return shared_model(tiny_file, tiny_tokenizer, device="cpu")


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
    ("ids", "message"),
    [
        ([], "empty"),
        ([1, 300], "token 1 of the prompt is 300"),
        ([-1], "is -1"),
        *(
            (wrong, "must be a sequence of whole numbers")
            for wrong in (b"ab", {1, 2}, {1: 2}, "12", None, [1.5] * 9999)
        ),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_ids_that_are_refused(model: Model, ids: Any, message: str) -> None:
    with pytest.raises(Error, match=message) as refused:
        model.logits(ids)
    assert len(str(refused.value)) < 300


def test_logits_take_any_integers(model: Model) -> None:
    want = model.logits([1, 5, 299])
    assert want.shape == (3, 300) and want.dtype == np.float32
    for ids in (np.array([1, 5, 299]), (1, 5, 299), iter([1, 5, 299]), np.array([1, 5, 299], np.uint16)):
        np.testing.assert_array_equal(model.logits(ids), want)
    assert not np.shares_memory(model.logits([1]), model.logits([1])), "the caller owns them"


def test_without_a_tokenizer(tiny_file: Path) -> None:
    with numballama.compile(tiny_file, device="cpu") as model:
        assert model.tokenizer is None
        assert model.logits([1, 2]).shape == (2, 300)
        for call in (model.generate, model.stream):
            with pytest.raises(Error, match="carries no tokenizer"):
                call("x")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:99"}, DeviceError, "cuda:99"),
        ({"device": "abacus"}, DeviceError, "unknown device 'abacus'"),
        ({"dtype": "f8"}, UnsupportedError, "dtype 'f8' is not supported; choose from f32, f16, bf16, int8"),
        ({"kv_dtype": "int8"}, UnsupportedError, "kv_dtype 'int8' is not supported; choose from f32, f16, bf16, q8_0"),
        ({"context": 0}, Error, "context must be at least 1"),
        ({"context": 1 << 50}, ContextError, "KV cache"),
        ({"threads": 0}, Error, "threads must be at least 1"),
        ({"rope_pairing": "sideways"}, Error, "rope_pairing"),
        ({"rope_theta": 0.0}, Error, "rope_theta"),
        ({"norm_eps": -1.0}, Error, "norm_eps"),
        ({"fusions": ["magic"]}, Error, "unknown fusion magic"),
        ({"max_sequences": 0}, Error, "max_sequences must be at least 1, found 0"),
        ({"max_sequences": 1 << 40}, Error, "max_sequences must be at most 1,024, found 1,099,511,627,776"),
        ({"max_sequences": 1.5}, Error, "max_sequences must be"),
        ({"max_sequences": None}, Error, "max_sequences must be"),
        ({"kv_tokens": 0}, Error, "kv_tokens must be at least 1, found 0"),
        ({"kv_tokens": "many"}, Error, "kv_tokens must be"),
        ({"kv_tokens": 1 << 50}, ContextError, "a KV cache for 1,125,899,906,842,624 tokens .* a smaller kv_tokens="),
        ({"gpus": 2}, UnsupportedError, "gpus=2 is for GPUs: on device='cpu' all cores share the model, threads="),
        ({"gpus": 0}, Error, "gpus must be at least 1, found 0"),
        ({"gpus": np.array([1, 1])}, Error, "gpus must be a whole number"),
        ({"dtype": np.array(["f16", "f32"])}, UnsupportedError, "dtype array.* is not supported; choose from f32"),
        ({"kv_dtype": np.array([1, 2])}, UnsupportedError, "kv_dtype array.* is not supported; choose from f32"),
        ({"batch_invariant": "false"}, Error, "batch_invariant must be True or False, found 'false'"),
        ({"fusions": None}, Error, "fusions must be True or False, found None"),
        ({"norm_eps": True}, Error, "norm_eps must be a number"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(tiny_file: Path, options: dict[str, Any], error: type[Error], message: str) -> None:
    with pytest.raises(error, match=message):
        numballama.compile(tiny_file, **{"device": "cpu", **options})


def test_names_of_other_libraries_are_told_ours(tiny_file: Path) -> None:
    ours = [*inspect.signature(numballama.compile).parameters]
    with pytest.raises(Error) as found:
        numballama.compile(tiny_file, nonsense=1, rubbish=2)  # type: ignore[call-arg]
    assert str(found.value) == f"unknown option of compile() nonsense, rubbish; choose from {', '.join(ours)}"
    more = {"tokeniser": "tokenizer", "contxt": "context", "temperature": "temperature (generate())"}
    more |= {"max_new_tokens": "max_tokens (generate())"}
    for name, meant in {**validation.OTHER_OPTIONS, **more}.items():
        assert name not in ours
        with pytest.raises(Error) as found:
            numballama.compile(tiny_file, **{name: 1, "context": 8})
        assert str(found.value).startswith(f"unknown option of compile() {name}: use {meant}. Choose from model_path, ")
    for meant in validation.OTHER_OPTIONS.values():  # it names one of ours, or where else to look
        assert re.match("|".join(ours), meant) or re.search(r"variable HF_|generate\(\)|model\.\w+\(|logging", meant), (
            meant
        )
    for name, why in validation.NEEDLESS_OPTIONS.items():
        with pytest.raises(Error, match=re.escape(f"{name}: leave it out, {why}")):
            numballama.compile(tiny_file, **{name: 1})
    with pytest.raises(Error, match="unknown option of compile\\(\\) model: use model_path, the first argument"):
        numballama.compile(model=tiny_file)  # type: ignore[call-arg]


def test_no_path_is_the_story_model_of_the_package() -> None:
    with numballama.compile(None, device="cpu") as model:
        assert model.path.name == "story.gguf"
        assert model.generate("Once upon a time", max_tokens=8, temperature=0).startswith(", there was a")


@pytest.mark.slow
def test_overrides_change_the_model_and_the_notes(tiny_file: Path, model: Model) -> None:
    ids, own = [1, 5, 9, 30], model.logits([1, 5, 9, 30])
    assert any("rope_theta" in note and "assumed" in note for note in model.notes)
    for options in ({"rope_pairing": "half"}, {"rope_theta": 50.0}, {"norm_eps": 0.1}):
        with numballama.compile(tiny_file, device="cpu", **options) as other:  # type: ignore[arg-type]
            ((name, value),) = options.items()
            assert getattr(other.config, name) == value
            assert np.abs(other.logits(ids) - own).max() > 1e-3
            assert not any(name in note for note in other.notes)
            with numballama.compile(tiny_file, device="reference", **options) as oracle:  # type: ignore[arg-type]
                assert np.abs(other.logits(ids) - oracle.logits(ids)).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8"])
def test_dtype_converts_linear_weights(tiny_file: Path, dtype: str) -> None:
    with numballama.compile(tiny_file, device="cpu", dtype=dtype) as model:
        types = {name: weight.type.name for name, weight in model.weights.items()}
        assert types["layers.0.wq"] == types["tok_embeddings"] == dtype  # tied: the table is the classifier
        assert types["norm"] == types["layers.1.ffn_norm"] == "f32"


def test_untied_embedding_table_keeps_its_type(tmp_path: Path) -> None:
    config = ModelConfig(16, 24, 1, 4, 2, 40, 8, tied_embeddings=False)
    path, _ = save(tmp_path, "llama2c-v0", config)
    with numballama.compile(path, device="cpu", dtype="int8") as model:
        assert model.weights["tok_embeddings"].type.name == "f32" and model.weights["output"].type.name == "int8"


@pytest.mark.slow
@pytest.mark.parametrize(("kv_dtype", "size"), [(None, 4), ("f32", 4), ("f16", 2), ("bf16", 2)])
def test_kv_dtype(tiny_file: Path, kv_dtype: str | None, size: int) -> None:
    with numballama.compile(tiny_file, device="cpu", kv_dtype=kv_dtype, context=20) as model:
        tokens = 2 * 32  # the page of 20 tokens, and page 0
        assert model.kv.nbytes == 2 * TINY.n_layers * TINY.n_kv_heads * tokens * TINY.head_dim * size
        assert model.context == 20


def test_context_beyond_the_models_own_is_noted(tiny_file: Path) -> None:
    with numballama.compile(tiny_file, device="cpu", context=TINY.context + 1) as model:
        assert model.context == TINY.context + 1 and any(
            f"trained for {TINY.context}, beyond that" in note for note in model.notes
        )
        assert np.isfinite(model.logits(np.arange(TINY.context + 1))).all()


def test_auto_says_what_it_chose(tiny_file: Path) -> None:
    with numballama.compile(tiny_file) as model:
        assert model.device == choose_device("auto")[0]
        assert any(f"device {model.device}, chosen because" in note for note in model.notes)
        assert model.device in repr(model)
    with numballama.compile(tiny_file, device="reference") as oracle, pytest.raises(Error, match="no plan"):
        _ = oracle.plan


def test_close_and_use_after(tiny_file: Path, tiny_tokenizer: Path) -> None:
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu") as model:
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


# Many sequences

MANY = 4
PROMPTS = ["ab", None, "the story", "a story " * 9, "abc the abc", "q"]
OPTIONS: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}


@pytest.fixture
def many(tiny_file: Path, tiny_tokenizer: Path) -> Model:
    return shared_model(tiny_file, tiny_tokenizer, device="cpu", max_sequences=MANY)


def params_of(number: int) -> SamplingParams:
    """Greedy and seeded settings in turn."""
    return SamplingParams(**OPTIONS, temperature=number % 2 * 1.2, seed=number)


def tokens_of(responses: Iterable[GenerationResponse]) -> list[int]:
    return [response.token for response in responses]


def tokens_alone(model: Model) -> list[list[int]]:
    """What each of PROMPTS gives with `params_of` its number, one after the other in a model of one sequence."""
    return [tokens_of(model.stream(prompt, params=params_of(n))) for n, prompt in enumerate(PROMPTS)]


def test_max_sequences_and_kv_tokens_give_the_cache(many: Model, tiny_file: Path) -> None:
    assert (many.max_sequences, many.kv.slots) == (MANY, MANY)
    assert many.kv.tokens >= MANY * many.context, "every sequence may have the whole context"
    with numballama.compile(tiny_file, device="reference", max_sequences=3, kv_tokens=100) as model:
        assert model.kv.tokens == 128 and model.kv.slots == 3, "whole pages"


def test_a_list_of_prompts_gives_what_each_gives_alone(many: Model, model: Model) -> None:
    alone = [model.generate(prompt, params=params_of(n)) for n, prompt in enumerate(PROMPTS)]
    steps = many.token_engine.stats().steps
    assert many.generate(PROMPTS, params=[params_of(n) for n in range(len(PROMPTS))]) == alone
    assert many.token_engine.stats().steps - steps < 12 * len(PROMPTS) / 2, "they share steps"
    greedy = [model.generate(prompt, temperature=0, **OPTIONS) for prompt in PROMPTS]
    assert many.generate(tuple(PROMPTS), temperature=0, **OPTIONS) == greedy


def test_streams_read_in_turns_give_what_each_gives_alone(many: Model, model: Model) -> None:
    """Also if others take the device, and the whole cache, between two responses."""
    alone = tokens_alone(model)
    streams = [many.stream(prompt, params=params_of(n)) for n, prompt in enumerate(PROMPTS)]
    together: list[list[int]] = [[] for _ in PROMPTS]
    for turn in [0, 3, 3, 1, *range(len(PROMPTS)), 5, 5, 5, *[n for _ in range(13) for n in range(len(PROMPTS))]]:
        together[turn] += tokens_of(response for response in [next(streams[turn], None)] if response is not None)
        if turn == 3 and len(together[3]) % 3 == 0:
            assert many.logits([5, 6]).shape == (2, 300)
    assert together == alone


def test_logits_are_the_same_while_streams_run(many: Model) -> None:
    ids = [1, *range(3, 80)]
    want = many.logits(ids)
    stream = many.stream("the story", **OPTIONS, temperature=0)
    whole = tokens_of(many.stream("the story", **OPTIONS, temperature=0))
    got = tokens_of([next(stream), next(stream)])
    np.testing.assert_array_equal(many.logits(ids), want)
    assert got + tokens_of(stream) == whole


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_several_texts_of_one_prompt(many: Model, model: Model, temperature: float) -> None:
    """Text i is the one of the seed + i; the prompt is computed once."""
    ids = [1, *range(3, 73)]
    settings = SamplingParams(**OPTIONS, temperature=temperature, seed=40, n=5)
    with many.exclusive():
        pass  # empties the cache
    before = many.token_engine.stats().prompt_tokens
    texts, tokens = [""] * 5, [[] for _ in range(5)]  # type: ignore[var-annotated]
    for response in many.engine().submit(ids, settings):
        texts[response.index] += response.text
        tokens[response.index].append(response.token)
    computed = many.token_engine.stats().prompt_tokens - before
    assert computed <= len(ids) + 4 * (len(ids) - 64), "of the others what is not in whole pages"
    for index in range(5):
        own = list(model.stream_ids(ids, params=settings.override({"n": 1, "seed": 40 + index})))
        assert tokens[index] == tokens_of(own)
        assert texts[index] == "".join(response.text for response in own)
    assert {response.index for response in many.stream("ab", 2, n=3)} == {0, 1, 2}


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs(many: Model, count: int) -> None:
    """Of the model's own logits, whatever changes the choice."""
    assert many.tokenizer is not None
    ids = many.tokenizer.encode("the story", bos=True)
    other = many.stream("ab", **OPTIONS, seed=1)
    next(other)  # without log probabilities, in the same runs
    responses = list(many.stream("the story", **OPTIONS, logprobs=count, temperature=1.2, seed=5, repeat_penalty=1.3))
    logits = many.logits([*ids, *tokens_of(responses)])
    for response, row in zip(responses, logits[len(ids) - 1 :], strict=False):
        want = log_softmax(row)
        assert response.logprobs is not None and len(response.logprobs.top) == count
        assert abs(response.logprobs.logprob - want[response.token]) < 1e-4
        assert [token for token, _ in response.logprobs.top] == likeliest(row, count)
        assert all(abs(logprob - want[token]) < 1e-4 for token, logprob in response.logprobs.top)
    assert all(response.logprobs is None for response in other)


def test_an_engine_for_threads(many: Model, model: Model) -> None:
    alone = tokens_alone(model)
    found: dict[int, list[int]] = {}
    with many.engine() as engine:

        def read(number: int) -> None:
            which = number % len(PROMPTS)
            found[number] = tokens_of(engine.submit(PROMPTS[which], params_of(which), priority=number % 3))

        threads = [threading.Thread(target=read, args=(number,)) for number in range(18)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        stats = engine.stats()
    assert [found[number] for number in range(18)] == [alone[number % len(PROMPTS)] for number in range(18)]
    assert (stats.running, stats.waiting) == (0, 0) and stats.requests >= 18
    assert many.generate("ab", params=params_of(0)), "without the thread the reader steps"


def test_an_engine_for_asyncio(many: Model, model: Model) -> None:
    alone = tokens_alone(model)

    async def read(engine: TextEngine, number: int) -> list[int]:
        request = engine.submit(PROMPTS[number], params_of(number), request_id=f"mine-{number}")
        return [response.token async for response in request]

    async def main() -> list[list[int]]:
        with many.engine() as engine:
            tasks = [asyncio.create_task(read(engine, number)) for number in range(len(PROMPTS))]
            endless = engine.submit("ab", SamplingParams(max_tokens=None, ignore_eos=True), request_id="endless")
            await anext(aiter(endless))
            assert engine.cancel("endless") and not engine.cancel("nobody")
            twice = engine.submit("ab", request_id="twice")
            with pytest.raises(Error, match="the id 'twice' is running; choose another id"):
                engine.submit("ab", request_id="twice")
            twice.cancel()
            return await asyncio.wait_for(asyncio.gather(*tasks), 120)

    assert asyncio.run(main()) == alone


def test_a_prompt_that_can_never_fit_the_pages_is_refused_at_once(tiny_file: Path, tiny_tokenizer: Path) -> None:
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu", max_sequences=2, kv_tokens=32) as model:
        assert model.context == TINY.context and model.kv.tokens == 32
        for call in (model.stream_ids, model.engine().submit, model.logits):
            with pytest.raises(ContextError, match=r"has 33 tokens and all pages of the KV cache 32; .* kv_tokens="):
                call([5] * 33)
        assert model.logits([5] * 32).shape == (32, 300)
        # alone, a text ends where all pages are full; two of them take turns
        responses = list(model.stream_ids([5] * 10, max_tokens=None, temperature=0, ignore_eos=True))
        assert len(responses) == 32 - 10 + 1 and responses[-1].stop_reason == "context"
        requests = [model.engine().submit([5] * 10, params_of(0).override({"max_tokens": None})) for _ in range(3)]
        assert [tokens_of(request) for request in requests] == [tokens_of(responses)] * 3


def test_preemption_changes_no_token(tiny_file: Path, tiny_tokenizer: Path, model: Model) -> None:
    """Four sequences that need three pages each, in five pages."""
    prompts = [[1, *range(start, start + 29)] for start in (3, 40, 80, 120)]
    settings = [params_of(n).override({"max_tokens": 50}) for n in range(4)]
    alone = [tokens_of(model.stream_ids(ids, params=own)) for ids, own in zip(prompts, settings, strict=True)]
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu", max_sequences=4, kv_tokens=160) as small:
        requests = [small.engine().submit(ids, own) for ids, own in zip(prompts, settings, strict=True)]
        assert [tokens_of(request) for request in requests] == alone
        assert sum(request.preemptions for request in requests) > 0


def test_little_memory_is_noted(tiny_file: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 700_000)
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu", max_sequences=64) as model:
        (note,) = [note for note in model.notes if "KV cache" in note]
        assert f"the KV cache holds {model.kv.tokens:,} tokens, not 64 × {TINY.context}: 683.6 KiB are free" in note
        assert TINY.context <= model.kv.tokens < 64 * TINY.context and model.kv.nbytes < 0.9 * 700_000
        assert model.generate("ab", 3)
    with pytest.raises(ContextError, match="kv_tokens"):
        numballama.compile(tiny_file, device="cpu", max_sequences=64, kv_tokens=64 * TINY.context)


@pytest.mark.parametrize("started", [False, True])
def test_closing_ends_what_runs(tiny_file: Path, tiny_tokenizer: Path, started: bool) -> None:
    """Readers that wait in threads get the error; so do those that have not begun to read."""
    model = numballama.compile(tiny_file, tiny_tokenizer, device="cpu", max_sequences=2, context=4096)
    engine, ended, endless = model.engine(), list[str](), SamplingParams(max_tokens=None, ignore_eos=True)
    if started:
        engine.__enter__()
    begun = threading.Semaphore(0)

    def read() -> None:
        try:
            for response in engine.submit("ab", endless):
                if response.tokens_per_second == 0:
                    begun.release()
        except Error as error:
            ended.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(3)]
    unread = engine.submit("ab", endless)
    for thread in threads:
        thread.start()
    assert begun.acquire(timeout=60)
    model.close()
    for thread in threads:
        thread.join(60)
    assert len(ended) == 3 and all("closed" in message for message in ended)
    for call in (lambda: list(unread), model.engine, lambda: engine.submit("ab"), lambda: model.generate("ab")):
        with pytest.raises(Error, match="closed"):
            call()


FORKED = """
import json, os, threading
import numballama
from numballama import DeviceError

model = numballama.compile(None, threads=1)
held, done = threading.Event(), threading.Event()

def hold():
    with model.exclusive():  # as in the middle of a token
        held.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
pid = os.fork()
if pid == 0:
    try:
        model.generate("Once", max_tokens=2)
    except DeviceError:
        os._exit(7)
    os._exit(8)
done.set()
thread.join()
print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_a_lock_is_held_gets_an_error() -> None:
    assert run_python(FORKED) == 7


LEFT = """
import json, os, signal
import numballama
from numballama import DeviceError

codes = []
for block in ("model", "engine", "exclusive"):
    with numballama.compile(None, threads=2, context=64) as model:
        before = model.generate("Once", max_tokens=3, temperature=0)
        with model.engine() if block == "engine" else model.exclusive() if block == "exclusive" else model:
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)
                model._runner.check_page = lambda page: os._exit(9)  # the device is the parent's
                try:
                    model.logits([1])
                except DeviceError:
                    forked = True
        if pid == 0:
            model.close()
            model.close()
            break
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if block != "model":
            codes.append(model.generate("Once", max_tokens=3, temperature=0) == before)
if pid == 0:
    raise SystemExit(7 if forked else 8)
print(json.dumps(codes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_leaves_the_blocks_of_its_parent() -> None:
    assert run_python(LEFT) == [7, 7, True, 7, True]


@pytest.mark.parametrize("how", ["generate", "logits", "both"])
@pytest.mark.parametrize("scale", [1.0, 1e7])
def test_a_cache_that_saturates_is_among_the_notes(
    tmp_path: Path, tiny_tokenizer: Path, how: str, scale: float
) -> None:
    weights = dict(random_checkpoint(TINY).weights)
    value = weights["layers.0.wv"]
    weights["layers.0.wv"] = Weight(value.shape, F32, value.data * np.float32(scale))
    WRITERS["llama2c-v0"](tmp_path / "m.bin", TINY, weights)
    with numballama.compile(tmp_path / "m.bin", tiny_tokenizer, device="reference", kv_dtype="f16") as model:
        before = len(model.notes)
        for _ in range(2):
            if how != "logits":
                model.generate("ab", max_tokens=2, temperature=0)
            if how != "generate":
                model.logits([1, 5, 9])
        assert model.notes[before:] == [SATURATED] * (scale > 1)
