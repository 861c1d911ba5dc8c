"""`compile` and `Model`: refused arguments, choices, and behaviour after `close`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numballama
from numballama import (
    ContextError,
    DeviceError,
    Error,
    Model,
    UnsupportedError,
)
from numballama.config import ModelConfig
from tests.helpers.bounds import shared_model
from tests.helpers.processes import run_python
from tests.helpers.random_models import save
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
        ({"device": "cuda"}, DeviceError, "cuda"),
        ({"device": "cuda:1"}, DeviceError, "cuda:1"),
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
        ({"max_sequences": 2}, UnsupportedError, "max_sequences=2 is not supported by this version: leave it at 1"),
        ({"gpus": 2}, UnsupportedError, "gpus=2 is not supported"),
        ({"kv_tokens": 4096}, UnsupportedError, "kv_tokens=4096 is not supported"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(tiny_file: Path, options: dict[str, Any], error: type[Error], message: str) -> None:
    with pytest.raises(error, match=message):
        numballama.compile(tiny_file, **{"device": "cpu", **options})


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
        assert model.kv.nbytes == 2 * TINY.n_layers * TINY.n_kv_heads * 20 * TINY.head_dim * size
        assert model.context == 20


def test_context_beyond_the_models_own_is_noted(tiny_file: Path) -> None:
    with numballama.compile(tiny_file, device="cpu", context=TINY.context + 1) as model:
        assert model.context == TINY.context + 1 and any("trained for 138, beyond that" in note for note in model.notes)
        assert np.isfinite(model.logits(np.arange(TINY.context + 1))).all()


def test_auto_says_what_it_chose(tiny_file: Path) -> None:
    with numballama.compile(tiny_file) as model:
        assert model.device == "cpu" and any("cpu" in note for note in model.notes)
        assert "cpu" in repr(model)
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
