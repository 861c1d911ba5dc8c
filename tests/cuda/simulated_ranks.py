"""Tests of a model that several GPUs share, each in a process in the simulator. Run by `test_simulator.py`, or by hand:

NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/cuda/simulated_ranks.py
"""

# ruff: noqa: E402
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cuda.simulator import simulation  # first: it replaces what kernels import
from tests.helpers.cuda_host import install

install(run=simulation.run, n_sms=2)


import os
import signal
import time
from dataclasses import replace

import numpy as np

import numballama
from numballama import DeviceError, Error, Model, SamplingParams, UnsupportedError
from numballama.config import ModelConfig
from numballama.cuda import driver
from numballama.cuda.ops.collectives import empty_parts
from numballama.host import environment
from numballama.parallel import communication, processes
from numballama.parallel.processes import ProcessBackend
from tests.helpers.random_models import save

CONFIG = ModelConfig(16, 24, 2, 4, 2, 40, 24, tied_embeddings=False)
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "RANK_PROCESS", "tests.cuda.simulated_rank_process")
    monkeypatch.setattr(environment, "refuse_simulator", lambda: None)


def compiled(folder: Path, ranks: int, sequences: int = 1) -> Model:
    """A model of float32, batch-invariant: such runs have the kernels for few rows, which the simulator knows."""
    path, _ = save(folder, "llama2c-v1", CONFIG)
    options: dict[str, Any] = {"kv_dtype": "f32", "batch_invariant": True, "max_sequences": sequences}
    return numballama.compile(path, device="cuda", gpus=ranks, **options)


def group_of(model: Model) -> processes.RankGroup:
    assert isinstance(model.backend, ProcessBackend)
    return model.backend.group


def tokens_of(model: Model, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """What the engine generates for prompts at the same time."""
    requests = [model.token_engine.submit(prompt, params) for prompt in prompts]
    return [[event.token for event in request] for request in requests]


def test_gpus_share_a_model(tmp_path: Path) -> None:
    """Logits, greedy and drawn tokens are those of one: prompts in chunks, two sequences at once, steps ahead of the
    host, log probabilities.
    """
    drawn = SamplingParams(temperature=1.0, seed=5, max_tokens=3, ignore_eos=True, logprobs=2)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [7, 2]]
    with compiled(tmp_path, 1) as one, compiled(tmp_path, 2) as two:
        (process,) = group_of(two).processes
        np.testing.assert_allclose(two.logits([3, 1, 4]), one.logits([3, 1, 4]), rtol=1e-4, atol=1e-5)
        for params, some in ((GREEDY, prompts), (drawn, prompts[1:])):
            assert tokens_of(two, some, params) == tokens_of(one, some, params)
        exchanged = sum(end - begin for begin, end in empty_parts(2, CONFIG.dim))
        assert two.backend.memory_bytes is not None and one.backend.memory_bytes is not None
        assert two.backend.memory_bytes > one.backend.memory_bytes + exchanged // 2
        assert "2 ranks in processes" in two.backend.description
        two.backend.synchronize()
    assert process.returncode == 0


def test_gpus_share_a_model_by_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where they do not reach each other's memory, with unequal parts of logits. NCCL is a stand-in
    (`tests/helpers/fake_nccl.py`).
    """
    monkeypatch.setitem(globals(), "CONFIG", replace(CONFIG, vocab_size=41))
    drawn = SamplingParams(temperature=1.0, seed=5, max_tokens=3, ignore_eos=True, logprobs=2)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [7, 2]]
    with compiled(tmp_path, 1) as one:
        want = one.logits([3, 1, 4])
        tokens = [tokens_of(one, prompts, GREEDY), tokens_of(one, prompts[1:], drawn)]
    monkeypatch.setattr(driver, "pairs_without_access", lambda devices: [tuple(devices)])
    with compiled(tmp_path, 2, sequences=3) as two:
        assert two.backend.description.endswith("2 ranks in processes, NCCL")
        assert "cuda:0 and cuda:1 do not reach each other's memory: NCCL 2.28.5 exchanges values, which is slower" in (
            two.notes
        )
        np.testing.assert_allclose(two.logits([3, 1, 4]), want, rtol=1e-4, atol=1e-5)
        assert [tokens_of(two, prompts, GREEDY), tokens_of(two, prompts[1:], drawn)] == tokens
        kinds = [step.op.kind for step in two.program.plan.steps]
        assert kinds.count("all_reduce") == 2 * CONFIG.n_layers and not any("linear_add_all" in kind for kind in kinds)
        two.backend.synchronize()


def test_a_rank_that_is_killed_ends_the_waits_of_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBALLAMA_EXCHANGE", "nccl")
    model = compiled(tmp_path, 2)
    (process,) = group_of(model).processes
    request = iter(model.token_engine.submit([3, 1], SamplingParams(max_tokens=20, ignore_eos=True)))
    next(request)
    os.kill(process.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(DeviceError, match="rank 1 ended with signal SIGKILL; the model must be compiled again"):
        list(request)
    assert time.monotonic() - started < 5
    model.close()
    assert process.returncode == -signal.SIGKILL


def test_exchanges_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By runs of nothing else, for one token and for two. The model gives the same logits before and after."""
    for name in ("TIMES", "RUNS", "REPEATS"):
        monkeypatch.setattr(communication, name, 1)
    with compiled(tmp_path, 2, sequences=2) as two:
        before = two.logits([3, 1])
        with two.exclusive():
            for tokens in (1, 2):
                found = two.backend.time_exchanges(two.graph, tokens)
                assert found is not None and found >= 0 and two.backend.time_exchanges(two.graph, tokens) == found
        np.testing.assert_array_equal(two.logits([3, 1]), before)


def test_a_rank_that_is_killed_ends_the_waits_of_kernels(tmp_path: Path) -> None:
    model = compiled(tmp_path, 2)
    (process,) = group_of(model).processes
    request = iter(model.token_engine.submit([3, 1], SamplingParams(max_tokens=20, ignore_eos=True)))
    next(request)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(DeviceError, match="rank 1 ended with signal SIGKILL; the model must be compiled again"):
        list(request)
    model.close()
    assert process.returncode == -signal.SIGKILL


def test_values_that_are_split(tmp_path: Path) -> None:
    """Rank 0 has a part of them: an error says so. What it has whole can be read."""
    with compiled(tmp_path, 2) as two:
        program = two.program
        two.logits([3, 1])
        assert program.value("logits").shape[1] == 40
        with pytest.raises(UnsupportedError, match=r"is split over 2 GPUs \(hidden\); compile with gpus=1"):
            program.value("layers.0.gate")
        with pytest.raises(Error, match=r"ranks have different steps.* gpus=1"):
            two.values([3, 1], "logits")
