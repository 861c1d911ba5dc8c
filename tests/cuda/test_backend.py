"""The CUDA backend's memory and devices on a GPU: all memory is freed, and runs allocate none."""

# ruff: noqa: E402
from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.cuda_host import require_gpu
from tests.helpers.random_models import random_checkpoint, save

require_gpu()

pytestmark = pytest.mark.gpu

import numballama
from numballama import ContextError, DeviceError, SamplingParams
from numballama.checkpoint import Weight
from numballama.config import ModelConfig
from numballama.cuda import backend as cuda
from numballama.cuda import driver
from numballama.engine.model_runner import SATURATED
from numballama.export import WRITERS
from numballama.model import Model
from tests.cuda.gpu import SHAPE, SLACK, told
from tests.helpers.sampling import make_sampler


def test_close_gives_the_memory_back(card: driver.Device, tmp_path: Path) -> None:
    """Memory is freed at once, according to the driver."""
    path, _ = save(tmp_path, "llama2c-v0", ModelConfig(1024, 4096, 4, 8, 8, 8192, 2048))
    numballama.compile(path, device="cuda", context=16).close()  # what the driver keeps for good, it has now
    gc.collect()
    before = card.free_bytes
    model = numballama.compile(path, device="cuda", kv_dtype="f32")
    taken = before - card.free_bytes
    assert taken >= model._checkpoint.nbytes + model.kv.nbytes
    assert abs(taken - model.backend.memory_bytes) < 16 << 20
    model.close()
    assert before - card.free_bytes < SLACK


@pytest.mark.parametrize(("owner", "name"), [(cuda.CudaBackend, "prepare"), (cuda.CudaBackend, "program"),
                                             (driver.Device, "write"), (driver.LoadedKernel, "__init__")])  # fmt: skip
def test_an_exception_gives_the_memory_back(
    card: driver.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """Memory is freed at once, while the traceback still holds every object, as in a notebook."""
    path, _ = save(tmp_path, "llama2c-v0", ModelConfig(1024, 4096, 4, 8, 8, 8192, 512))
    numballama.compile(path, device="cuda", context=16).close()
    gc.collect()
    before, left, method = card.free_bytes, [4 if name != "prepare" else 1], getattr(owner, name)
    if name == "program":
        left = [2]

    def failing(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] <= 0:
            raise MemoryError("a test's")
        return method(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(MemoryError, match="a test's") as caught:
            numballama.compile(path, device="cuda")
    assert before - card.free_bytes < SLACK
    assert caught.value is not None
    with numballama.compile(path, device="cuda") as model:
        assert np.isfinite(model.logits([1, 2])).all()


def test_a_hundred_models_one_after_the_other(card: driver.Device, tmp_path: Path) -> None:
    """The driver keeps some MB for good now and then; what models left behind would grow all the time."""
    path, _ = save(tmp_path, "llama2c-v0", SHAPE)
    want, free = None, []
    for turn in range(100):
        with numballama.compile(path, device="cuda") as model:
            logits = model.logits([1, 2, 3])
            told(model, make_sampler(300, seed=1), 1, [1, 2, 3])
        want = logits if want is None else want
        np.testing.assert_array_equal(logits, want)
        if turn % 19 == 4:
            gc.collect()
            free.append(card.free_bytes)
    taken = -np.diff(free)
    assert len(taken) == 5 and np.median(taken) <= 0, f"bytes in every 19 models: {taken}"
    assert taken.sum() < 4 * SLACK


def test_a_cell_that_is_run_again_and_again(card: driver.Device, tmp_path: Path) -> None:
    """`model = compile(…)`, never closed: the model before goes when its name is taken, or with the next collection."""
    path, _ = save(tmp_path, "llama2c-v0", ModelConfig(512, 1024, 2, 8, 8, 4096, 512))
    for turn in range(12):
        model = numballama.compile(path, device="cuda")
        assert model.logits([1]).shape == (1, 4096)
        if turn == 1:
            gc.collect()
            before = card.free_bytes
    gc.collect()
    assert before - card.free_bytes < SLACK
    model.close()


def test_running_takes_no_memory(card: driver.Device, model: Model) -> None:
    told(model, make_sampler(300, seed=1), 5)
    told(model, make_sampler(300, temperature=0), 5)
    before = card.free_bytes
    told(model, make_sampler(300, seed=2), 60)
    told(model, make_sampler(300, temperature=0), 60)
    assert card.free_bytes == before


@pytest.mark.parametrize("device", ["cuda:99", "cuda:", "cuda:x", "cuda:-1", "cudax"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(DeviceError):
        numballama.compile(None, device=device)


def test_a_model_that_does_not_fit(card: driver.Device, tmp_path: Path) -> None:
    """The error comes before anything is computed, and no memory stays allocated."""
    path, _ = save(tmp_path, "llama2c-v0", ModelConfig(64, 64, 1, 32, 32, 64, 64))
    before, needed = card.free_bytes, 2 * 64 * 2  # bytes of keys and values of a token
    with pytest.raises(ContextError, match=r"a KV cache for .* takes .* are free"):
        numballama.compile(path, device="cuda", context=2 * card.total_bytes // needed)
    assert before - card.free_bytes < SLACK


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_cache_that_saturates_is_among_the_notes(tmp_path: Path, scale: float) -> None:
    """After the first prompt, with runs in flight; the tokens are those of a cache that nobody looked at."""
    weights = dict(random_checkpoint(SHAPE).weights)
    value = weights["layers.0.wv"]
    weights["layers.0.wv"] = Weight(value.shape, value.type, value.data * np.float32(scale))
    WRITERS["llama2c-v0"](tmp_path / "m.bin", SHAPE, weights)
    texts = []
    for watched in (True, False):
        with numballama.compile(tmp_path / "m.bin", device="cuda", kv_dtype="f16") as model:
            if not watched:
                model._runner._note = None
            before = len(model.notes)
            request = model.token_engine.submit([1, 5, 9], SamplingParams(temperature=0, max_tokens=8))
            texts.append([event.token for event in request])
            model.logits([1, 5, 9])
            assert model.notes[before:] == [SATURATED] * (watched and scale > 1)
    assert texts[0] == texts[1] and len(texts[0]) == 8
