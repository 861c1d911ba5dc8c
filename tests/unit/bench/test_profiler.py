"""The profile of a decode step: the bytes of its steps, their times, and the command that prints it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

import numballama
from numballama import loader
from numballama.bench.profiler import Profile, StepTime, profile
from numballama.bench.traffic import bytes_per_token
from numballama.config import ModelConfig
from numballama.errors import ContextError, DeviceError
from numballama.model import Model
from tests.helpers.random_models import random_checkpoint
from tests.unit.cli.test_main import run

CONFIG = ModelConfig(64, 96, 3, 4, 2, 50, 40, tied_embeddings=False)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    checkpoint = random_checkpoint(CONFIG)
    monkeypatch.setattr(loader, "open_checkpoint", lambda *arguments, **options: checkpoint)
    return numballama.compile("random", device="cpu", threads=1)


def test_bytes_are_those_of_weights_and_cache(model: Model) -> None:
    """Counted by hand: float32 weights, of the embedding one row; keys and values of position 7 written, of 0 to 7
    read; the page table, two rows of two pages, read by two fused operators a layer."""
    dim, hidden, kv = 64, 96, 32
    layer = 2 * dim + dim * dim + 2 * kv * dim + dim * dim + 3 * hidden * dim
    weights = 3 * layer + dim + 50 * dim + dim
    assert bytes_per_token(model, 7) == 4 * (weights + 3 * (8 + 1) * 2 * kv + 3 * 2 * 2 * 2)


def test_profile_of_a_model(model: Model, tmp_path: Path) -> None:
    found = profile(model, 7, 1e10)
    assert found.position == 7 and len(found.steps) == len(model.plan.steps)
    assert found.nbytes == bytes_per_token(model, 7)
    assert all(step.seconds > 0 for step in found.steps) and found.whole_s > 0
    rows = {(kind.name, kind.count) for kind in found.kinds}
    assert {("norm_qkv (wq wk wv)", 3), ("linear_add (wo)", 3), ("linear_add (w2)", 3)} <= rows
    assert sum(kind.count for kind in found.kinds) == len(found.steps)
    assert math.isclose(sum(kind.share for kind in found.kinds), 1)
    layers = [step.layer for step in found.steps if step.layer is not None]
    assert layers == sorted(layers) and {*layers} == {0, 1, 2}
    assert {layers.count(layer) for layer in (0, 1, 2)} == {len(layers) // 3}, "each layer has the same steps"
    assert [step.name for step in found.steps[-2:]] == ["norm_linear (output)", "argmax"]
    assert found.steps[-1].layer is found.steps[-2].layer is None, "they read the last layer, and are not in it"
    assert [part.part for part in found.parts] == ["embedding", "attention", "feed-forward", "classifier", "other"]
    assert sum(part.nbytes for part in found.parts) == found.nbytes
    assert found.prompt_s is not None and found.prompt_s > 0
    run, dim, hidden, kv = found.prompt, 64, 96, 32
    assert run is not None and (run.tokens, run.position, run.prompt) == (7, 6, None)
    assert len(run.steps) == len(found.steps) + 1, "one more chooses the row that has logits"
    matrices = 3 * (2 * dim * dim + 2 * kv * dim + 3 * hidden * dim)
    assert run.operations == 2 * (7 * matrices + 50 * dim) + 3 * 4 * dim * sum(range(1, 8))
    assert run.operations > 6 * found.operations and run.to_dict()["operations"] == run.operations
    assert [part.part for part in run.parts] == [part.part for part in found.parts]
    assert all(part.operations_per_second > 0 for part in run.parts if part.part in ("attention", "feed-forward"))
    assert model.logits([1, 2]).shape == (2, 50), "the model goes on as if nothing had happened"
    with pytest.raises(ContextError):
        profile(model, 40, 1e10)
    with pytest.raises(ContextError):
        profile(model, 41, 1e10)
    alone = profile(model, [], None)
    assert (alone.position, alone.prompt_s, alone.bandwidth, alone.floor_s) == (0, None, None, None)
    assert alone.prompt is None and profile(model, 1, None).prompt is None
    assert alone.to_dict()["rows"][0]["bandwidth_fraction"] is None and "unknown" in str(alone)


MADE = Profile(
    "a model",
    "a device",
    9,
    2e12,
    5e-6,
    (
        StepTime(0, "embedding", "tok_embeddings", "embedding", None, 1e-6, 4000, "embedding"),
        StepTime(1, "linear_add", "wo", "linear", 0, 2e-6, 2_000_000, "attention"),
        StepTime(2, "linear_add", "wo", "linear", 1, 4e-6, 2_000_000, "attention"),
        StepTime(3, "linear_add", "w2", "linear", 1, 1e-6, 2_000_000, "feed-forward"),
    ),
    3e-3,
)
WITH_PROMPT = replace(
    MADE,
    prompt=Profile(
        "a model",
        "a device",
        8,
        2e12,
        1e-3,
        (
            StepTime(0, "embedding", "tok_embeddings", "embedding", None, 1e-4, 36_000, "embedding"),
            StepTime(1, "linear_add", "wo", "gemm", 0, 7e-4, 2_000_000, "attention", 1_400_000_000),
        ),
        tokens=9,
    ),
)


def test_kinds_are_means_of_their_steps() -> None:
    embedding, wo, w2 = MADE.kinds
    assert (wo.count, w2.count, embedding.count) == (2, 1, 1)
    assert math.isclose(wo.seconds, 3e-6) and math.isclose(wo.share, 6 / 8)
    assert math.isclose(wo.rate, 2 / 3 * 1e12) and math.isclose(wo.bandwidth_fraction, 1 / 3)
    assert math.isclose(w2.bandwidth_fraction, 1)


def test_parts_are_sums_of_their_steps() -> None:
    embedding, attention, feed_forward = MADE.parts
    assert (attention.part, attention.count, attention.nbytes) == ("attention", 2, 4_000_000)
    assert math.isclose(attention.seconds, 6e-6) and math.isclose(attention.floor_s or 0, 2e-6)
    assert math.isclose(attention.bandwidth_fraction or 0, 1 / 3) and math.isclose(attention.share, 6 / 8)
    assert math.isclose(embedding.share + attention.share + feed_forward.share, 1)
    assert MADE.to_dict()["parts"][1]["floor_s"] == attention.floor_s


def test_a_model_profiles_itself(tiny_file: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth is measured once."""
    measured = []
    with numballama.compile(tiny_file, tokenizer=tiny_tokenizer, device="cpu", threads=1) as model:
        monkeypatch.setattr(model.backend, "measure_bandwidth", lambda: measured.append(1) or 1e10)
        text, ids = model.profile("ab"), model.profile([1, 2, 3])
        assert text.position == len(model.tokenizer.encode("ab")) and ids.position == 3 and len(measured) == 1
        assert text.bandwidth == 1e10 and "tiny" not in repr(text) and model.path.name in str(text)
        for wrong in ([], [-1], "", None):
            with pytest.raises(numballama.Error):
                model.profile(wrong)
    with numballama.compile(tiny_file, tokenizer=tiny_tokenizer, device="cpu", threads=1) as model:
        monkeypatch.setattr(model.backend, "measure_bandwidth", Mock(side_effect=DeviceError("too little is free")))
        assert model.profile("ab").bandwidth is None and "too little is free" in model.notes
    with (
        numballama.compile(tiny_file, tokenizer=tiny_tokenizer, device="reference") as model,
        pytest.raises(numballama.Error, match="no plan"),
    ):
        model.profile("ab")


# The command


@pytest.mark.slow
def test_bench_profile(models: Path, tmp_path: Path) -> None:
    words = [
        "bench",
        models / "stories260K.bin",
        "--device",
        "cpu",
        "--threads",
        1,
        "--prompt-tokens",
        8,
        "--tokens",
        8,
    ]
    trace = tmp_path / "trace.json"
    found = run(*words, "--repeats", 1, "--trace", trace, "--json")
    result = json.loads(found.stdout)
    assert result["device_memory_bytes"] is None and "gpu" not in result["machine"]
    assert result["profile"]["position"] == 12 and len(result["profile"]["steps"]) > 20
    assert len(json.loads(trace.read_text())["traceEvents"]) == len(result["profile"]["steps"]) + 4
    text = run(*words, "--repeats", 1, "--profile").stdout
    assert "tokens/s" in text and "one decode step of stories260K.bin on cpu" in text
    assert "whole step" in text and "whole run" in text and "feed-forward" in text and "\x1b" not in text


def test_the_reference_has_no_steps(models: Path) -> None:
    done = run("bench", models / "stories260K.bin", "--device", "reference", "--profile")
    assert done.returncode == 1 and "--device cpu" in done.stderr and done.stdout == ""


# On a GPU


@pytest.fixture
def gpu() -> str:
    try:
        from numballama.cuda.driver import Device

        Device()
    except DeviceError as error:
        pytest.skip(f"no GPU: {error}")
    return "cuda"


@pytest.mark.gpu
def test_bench_on_a_gpu(gpu: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = run("bench", "--device", gpu, "--prompt-tokens", 16, "--tokens", 32, "--trace", trace, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["machine"]["gpu"]["multiprocessors"] == result["threads"] > 0
    assert result["machine"]["gpu"]["cuda"] and result["device_memory_bytes"] > 5_000_000
    bandwidth = result["memory_bandwidth_bytes_per_second"]
    assert 1e10 < bandwidth < 2e13 and result["bandwidth_fraction"] == result["bytes_per_second"] / bandwidth
    profiled = result["profile"]
    assert profiled["bytes"] == sum(step["nbytes"] for step in profiled["steps"])
    assert 0.3 < profiled["sum_of_steps_s"] / profiled["whole_step_s"] < 3
    assert trace.is_file()


@pytest.mark.gpu
def test_profiling_leaves_the_model_as_it_was(gpu: str) -> None:
    with numballama.compile(None, device=gpu) as model:
        before = model.generate("Once upon a time", max_tokens=40, temperature=0)
        profile(model, 20, 1e12)
        assert model.generate("Once upon a time", max_tokens=40, temperature=0) == before
