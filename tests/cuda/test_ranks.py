"""A model that ranks on GPUs share, each in a process, beside the same model on one GPU.

With one GPU both ranks are on it, and their processes take turns. `pytest -m multigpu` wants two.
"""

# ruff: noqa: E402
from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.cuda_host import require_gpu

require_gpu()

pytestmark = pytest.mark.gpu

import numballama
from numballama import DeviceError, Model, SamplingParams, backend
from numballama.config import HALF_SPLIT, ModelConfig
from numballama.cuda import nccl
from numballama.cuda.driver import Device
from numballama.export import export_model
from numballama.parallel.processes import ProcessBackend
from tests.cuda.checks import close
from tests.cuda.gpu import ROUNDED, SLACK
from tests.helpers.bounds import TOKENIZERS
from tests.helpers.random_models import save

CONFIG = ModelConfig(512, 1536, 2, 8, 2, 777, 700, rope_pairing=HALF_SPLIT)
"""Rows and halves of rows are whole blocks of every type; a prompt of 700 tokens is exchanged with flags."""
LIMIT_S = 2.0
"""Seconds from the end of a rank to the error."""


def second_card() -> str:
    """Why there are no two GPUs; empty if there are."""
    try:
        Device("cuda:1")
    except DeviceError as error:
        return str(error)
    return ""


TWO_CARDS = [pytest.mark.multigpu, pytest.mark.skipif(bool(second_card()), reason=f"no two GPUs: {second_card()}")]


@pytest.fixture(params=["one card", pytest.param("two cards", marks=TWO_CARDS)], autouse=True)
def cards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "one card":
        monkeypatch.setattr(backend, "gpus_from", lambda device, count: ["cuda:0"] * count)


@pytest.fixture
def by_nccl(cards: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL exchanges values, also between cards that reach each other's memory. It takes no two ranks on a card."""
    if "one card" in request.node.callspec.id:
        pytest.skip("NCCL wants a card for each rank")
    try:
        nccl.load()
    except DeviceError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("NUMBALLAMA_EXCHANGE", "nccl")


def compiled(path: Path, gpus: int, *tokenizer: Path, **options: Any) -> Model:
    return numballama.compile(path, *tokenizer, device="cuda", gpus=gpus, **options)


def processes_of(model: Model) -> Sequence[Any]:
    assert isinstance(model.backend, ProcessBackend)
    return model.backend.group.processes


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(8)
    return [rng.integers(0, CONFIG.vocab_size, 3 + 40 * number).tolist() for number in range(count)]


def generated(model: Model, params: SamplingParams, count: int) -> list[list[int]]:
    requests = [model.token_engine.submit(prompt, params) for prompt in prompts(count)]
    return [[event.token for event in request] for request in requests]


def check_alike(path: Path, bound: float, **options: Any) -> None:
    """Logits of prompts, which the kernels for many, some and few tokens compute, and of single tokens."""
    ids = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 690).tolist()
    with compiled(path, 1, **options) as one, compiled(path, 2, **options) as two:
        for some in (ids, ids[:100], ids[:20], ids[:5]):
            close(two.logits(some), one.logits(some), f"{len(some)} tokens", bound)
        with one.exclusive() as alone, two.exclusive() as shared:
            for token in ids[:20]:
                alone.step(token)
                shared.step(token)
                close(shared.logits, alone.logits, "a step", bound)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8", "q8_0", "q4_0"])
def test_logits_of_every_type(tmp_path: Path, dtype: str) -> None:
    path, _ = save(tmp_path, "llama2c-v1", CONFIG)
    check_alike(path, ROUNDED, dtype=dtype, rope_pairing=HALF_SPLIT)


@pytest.mark.parametrize("kind", ["q4_1", "q4_k", "q5_k", "q6_k"])
def test_logits_of_files(tmp_path: Path, kind: str) -> None:
    path, _ = save(tmp_path, "llama2c-v1", CONFIG)
    exported = tmp_path / "model.gguf"
    export_model(path, exported, "gguf", kind, rope_pairing=HALF_SPLIT)
    check_alike(exported, ROUNDED)


@pytest.mark.parametrize("kv", ["f32", "q8_0"])
def test_float32_is_as_exact_as_on_one_card(tmp_path: Path, kv: str) -> None:
    """Batch-invariant runs of float32 weights compute in float32 throughout."""
    path, _ = save(tmp_path, "llama2c-v1", CONFIG)
    check_alike(path, 1e-4 if kv == "f32" else ROUNDED, kv_dtype=kv, batch_invariant=True, rope_pairing=HALF_SPLIT)


def test_many_sequences_and_draws(tmp_path: Path) -> None:
    """The same tokens in batches of 1 to 8, and where others wait: greedy, drawn, with penalties, biases and log
    probabilities. Batch-invariant runs of float32 weights have 8 rows at most.
    """
    path, _ = save(tmp_path, "llama2c-v1", CONFIG)
    options: dict[str, Any] = {
        "max_sequences": 8, "batch_invariant": True, "kv_dtype": "f32", "rope_pairing": HALF_SPLIT,
    }  # fmt: skip
    with compiled(path, 1, **options) as one, compiled(path, 2, **options) as two:
        for params in (
            SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
            SamplingParams(temperature=1.2, seed=3, max_tokens=40, ignore_eos=True, top_p=0.9, logprobs=2),
            SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, repetition_penalty=1.3, logit_bias={5: 2.0}),
        ):
            for count in (1, 3, 12):
                assert generated(two, params, count) == generated(one, params, count)


def test_two_thousand_steps_of_a_real_model(models: Path) -> None:
    files = models / "stories260K.bin", models / TOKENIZERS["stories260K"]
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    texts = ["Once upon a time", "The dog", "Lily", "A cat and", "One day"]
    with compiled(files[0], 1, files[1], kv_dtype="f32") as one, compiled(files[0], 2, files[1], kv_dtype="f32") as two:
        for text in texts:
            assert two.generate(text, params=params) == one.generate(text, params=params)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0"])
def test_logits_by_nccl(tmp_path: Path, by_nccl: None, dtype: str) -> None:
    """Prompts that are exchanged in 128, 256 and 512 rows, and single tokens."""
    path, _ = save(tmp_path, "llama2c-v1", CONFIG)
    check_alike(path, ROUNDED, dtype=dtype, rope_pairing=HALF_SPLIT)


def test_logits_by_nccl_are_those_of_our_exchange(
    tmp_path: Path, by_nccl: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch-invariant runs of float32 weights differ in the order of sums at most, and two ranks have one order."""
    path, _ = save(tmp_path, "llama2c-v1", CONFIG)
    options: dict[str, Any] = {"kv_dtype": "f32", "batch_invariant": True, "rope_pairing": HALF_SPLIT}
    ids = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 100).tolist()
    with compiled(path, 2, **options) as model:
        assert any("NCCL" in note for note in model.notes)
        assert not any("all_reduce" in step.op.kind and step.op.body for step in model.program.plan.steps)
        found = model.logits(ids)
    monkeypatch.setenv("NUMBALLAMA_EXCHANGE", "peer")
    with compiled(path, 2, **options) as model:
        assert not any("NCCL" in note for note in model.notes)
        close(found, model.logits(ids), "by NCCL and by peers", 1e-4)


def test_many_sequences_and_draws_by_nccl(tmp_path: Path, by_nccl: None) -> None:
    """Logits of several rows come in unequal parts (777 columns); tokens come from rank 0."""
    test_many_sequences_and_draws(tmp_path)


def test_a_model_of_many_sequences_again_and_again_by_nccl(tmp_path: Path, by_nccl: None) -> None:
    """Graphs of all programs, also those made later; a closed model leaves nothing that the next one meets."""
    path, _ = save(tmp_path, "llama2c-v1", CONFIG)
    params, found = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), []
    for _ in range(2):
        with compiled(path, 2, max_sequences=16, rope_pairing=HALF_SPLIT) as model:
            found.append(generated(model, params, 12))
            with model.exclusive():
                seconds = model.backend.time_exchanges(model.graph, 16)
            assert seconds is not None and seconds > 0
    assert found[0] == found[1]


def check_end(model: Model, params: SamplingParams, how: signal.Signals, within_s: float) -> None:
    """A signal to rank 1 ends every request with an error within `within_s` seconds, and no process is left."""
    (process,) = processes_of(model)
    requests = [iter(model.token_engine.submit(prompt, params)) for prompt in prompts(6)]
    next(requests[0])
    started = time.monotonic()
    os.kill(process.pid, how)
    for request in requests:
        with pytest.raises(DeviceError, match=r"rank 1 (ended with signal SIGKILL|has given no sign of life)"):
            list(request)
    assert time.monotonic() - started < within_s
    model.close()
    assert process.poll() is not None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_ends_every_request_by_nccl(tmp_path: Path, by_nccl: None, how: signal.Signals) -> None:
    """Kernels of NCCL's wait for it. The next model works."""
    path, _ = save(tmp_path, "llama2c-v1", CONFIG)
    params = SamplingParams(max_tokens=600, ignore_eos=True)
    model = compiled(path, 2, max_sequences=4, rope_pairing=HALF_SPLIT)
    check_end(model, params, how, LIMIT_S + 2 * (how == signal.SIGSTOP))
    with compiled(path, 2, rope_pairing=HALF_SPLIT) as model:
        assert len(generated(model, SamplingParams(max_tokens=4, ignore_eos=True), 1)[0]) == 4


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_ends_every_request(tmp_path: Path, how: signal.Signals) -> None:
    """Also one that is stopped, after the time without a sign of life. All memory comes back."""
    path, _ = save(tmp_path, "llama2c-v1", CONFIG)
    device = Device()
    with compiled(path, 2, max_sequences=4, rope_pairing=HALF_SPLIT) as first:
        # the driver keeps what a context needs once, such as room for the kernels' stack
        list(first.token_engine.submit(prompts(1)[0], SamplingParams(max_tokens=4)))
    free = device.free_bytes
    model = compiled(path, 2, max_sequences=4, rope_pairing=HALF_SPLIT)
    check_end(model, SamplingParams(max_tokens=600, ignore_eos=True), how, LIMIT_S + (how == signal.SIGSTOP))
    assert free - device.free_bytes <= SLACK
