"""The time line of a decode step: what it says a step moves, how it measures, and what it writes."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import numballama
from numballama import loader
from numballama.bench import profiler as profile_step
from numballama.bench.benchmark import bytes_per_token
from numballama.bench.profiler import Profile, StepTime, profile, step_bytes_of_token
from numballama.config import ModelConfig
from numballama.errors import ContextError, DeviceError, Error
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
    read."""
    dim, hidden, kv = 64, 96, 32
    layer = 2 * dim + dim * dim + 2 * kv * dim + dim * dim + 3 * hidden * dim
    weights = 3 * layer + dim + 50 * dim + dim
    assert step_bytes_of_token(model, 7) == 4 * (weights + 3 * (8 + 1) * 2 * kv)
    assert math.isclose(step_bytes_of_token(model, 7), bytes_per_token(model, 7), rel_tol=0.02)


def test_profile_of_a_model(model: Model, tmp_path: Path) -> None:
    found = profile(model, 7, 1e10)
    assert found.position == 7 and len(found.steps) == len(model.plan.steps)
    assert found.nbytes == step_bytes_of_token(model, 7)
    assert all(step.seconds > 0 for step in found.steps) and found.whole_s > 0
    rows = {(row.name, row.count) for row in found.rows}
    assert {("norm_qkv (wq wk wv)", 3), ("linear_add (wo)", 3), ("linear_add (w2)", 3)} <= rows
    assert sum(row.count for row in found.rows) == len(found.steps)
    assert math.isclose(sum(row.share for row in found.rows), 1)
    assert {step.layer for step in found.steps} == {None, 0, 1, 2}
    assert model.logits([1, 2]).shape == (2, 50), "the model goes on as if nothing had happened"
    with pytest.raises(ContextError):
        profile(model, 40, 1e10)
    with pytest.raises(ContextError):
        profile(model, 41, 1e10)


MADE = Profile(
    "a model",
    "a device",
    9,
    2e12,
    5e-6,
    (
        StepTime(0, "embedding", "tok_embeddings", "embedding", None, 1e-6, 4000),
        StepTime(1, "linear_add", "wo", "linear", 0, 2e-6, 2_000_000),
        StepTime(2, "linear_add", "wo", "linear", 1, 4e-6, 2_000_000),
        StepTime(3, "linear_add", "w2", "linear", 1, 1e-6, 2_000_000),
    ),
)


def test_rows_are_means_of_their_kind() -> None:
    embedding, wo, w2 = MADE.rows
    assert (wo.count, w2.count, embedding.count) == (2, 1, 1)
    assert math.isclose(wo.seconds, 3e-6) and math.isclose(wo.share, 6 / 8)
    assert math.isclose(wo.rate, 2 / 3 * 1e12) and math.isclose(wo.bandwidth_fraction, 1 / 3)
    assert math.isclose(w2.bandwidth_fraction, 1)


def test_table_as_text() -> None:
    lines = MADE.as_text().splitlines()
    assert lines[0] == "one decode step of a model on a device, at position 9"
    assert lines[4].split() == ["linear_add", "(wo)", "linear", "2", "3.00", "2.00", "667", "33%", "75.0%"]
    assert lines[7].split() == ["sum", "4", "8.00", "6.00", "750", "38%", "100.0%"]
    assert lines[8].startswith("whole step, as it runs") and lines[8].split()[-5:] == [
        "5.00", "6.00", "1,201", "60%", "62.5%"
    ]  # fmt: skip
    assert len({len(line) for line in lines[3:6]}) == 1, "columns line up"


def test_table_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    MADE.show()
    shown = capsys.readouterr().out
    for word in ("linear_add (wo)", "667", "33%", "75.0%", "whole step", "2,000 GB/s"):
        assert word in shown


def test_trace_is_a_chrome_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    MADE.write_trace(path)
    trace = json.loads(path.read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["ph"] for event in trace["traceEvents"]} == {"M", "X"}
    whole, *steps = events
    assert whole["dur"] == pytest.approx(5) and whole["tid"] == 0
    assert [event["dur"] for event in steps] == pytest.approx([1, 2, 4, 1])
    assert [event["ts"] for event in steps] == pytest.approx([0, 1, 3, 7])
    assert {event["tid"] for event in steps} == {1} and {event["pid"] for event in events} == {1}
    assert steps[1]["args"]["bytes"] == 2_000_000 and steps[1]["args"]["layer"] == 0
    assert steps[1]["args"]["percent_of_bandwidth"] == pytest.approx(50)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"], "nothing is left beside it"
    with pytest.raises(Error, match="cannot be written"):
        MADE.write_trace(tmp_path / "no" / "folder.json")


# Measuring a GPU, on one that is made up


class MadeUpGpu:
    """A stream in which kernel k takes `times[k]` seconds and a replay `start` more; it counts what runs."""

    start = 3e-6

    def __init__(self, times: list[float]) -> None:
        self.times, self.clock, self.replays = times, 0.0, 0
        module = ModuleType("driver")
        gpu = self

        class CudaGraph:
            def __init__(self, device: Any, calls: list[int]) -> None:
                self.calls = calls

            def replay(self) -> None:
                gpu.replays += 1
                gpu.clock += gpu.start + sum(gpu.times[call] for call in self.calls)

        class Stopwatch:
            def __init__(self, device: Any) -> None:
                pass

            def measure(self, action: Any) -> float:
                before = gpu.clock
                action()
                return gpu.clock - before

        module.CudaGraph, module.Stopwatch = CudaGraph, Stopwatch  # type: ignore[attr-defined]
        self.module = module


def test_gpu_times_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind by itself, without what a replay takes beside its kernels; small steps many times over."""
    gpu = MadeUpGpu([1e-6, 20e-6, 5e-6, 22e-6, 5e-6, 60e-6])
    monkeypatch.setitem(sys.modules, "numballama.cuda.driver", gpu.module)
    ran: list[int] = []
    launches = [[n] for n in range(6)]
    program = SimpleNamespace(backend=SimpleNamespace(device=None), prepared_launches=launches, run=ran.append)
    sizes = [100, 40_000_000, 2000, 40_000_000, 2000, 200_000_000]
    times, whole = profile_step._time_gpu(program, ["a", "b", "c", "b", "c", "d"], sizes)
    assert times == pytest.approx([1e-6, 21e-6, 5e-6, 21e-6, 5e-6, 60e-6])
    assert whole == pytest.approx(sum(gpu.times) + gpu.start)
    assert ran == [1], "the inputs are sent once"


# The command


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
    assert "tokens/s" in text and "one decode step of stories260K.bin on cpu" in text and "whole step" in text


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
