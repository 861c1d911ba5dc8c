"""The protocols that every backend and program fulfils, and which backend a device's name gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import numballama
from numballama import backend as backends
from numballama.backend import Backend, Program, backend_class, choose_device, open_backend
from numballama.bench.debug import WatchedProgram
from numballama.config import ModelConfig
from numballama.errors import DeviceError, Error
from numballama.graph import KVLayout, build
from numballama.model import Model
from numballama.quantization.types import KV_TYPES
from tests.helpers.random_models import random_checkpoint, save

CONFIG = ModelConfig(16, 24, 2, 4, 2, 30, 40)
WEIGHTS = random_checkpoint(CONFIG).weights
GRAPH = build(CONFIG, {name: weight.type for name, weight in WEIGHTS.items()}, KVLayout.of(CONFIG, 40, "f32"), 4)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    opened = open_backend(request.param, WEIGHTS, 1)
    yield opened
    opened.close()


def test_the_protocols_are_fulfilled(backend: Backend) -> None:
    assert isinstance(backend, Backend)
    program = backend.program(GRAPH)
    assert isinstance(program, Program)
    assert isinstance(WatchedProgram(program, backend), Program)
    assert type(backend) is backend_class(backend.name)


def test_what_a_backend_says_of_itself(backend: Backend) -> None:
    assert backend.prefill_chunk > 1 and backend.default_kv_dtype in KV_TYPES
    assert backend.activation_types[0] == "f32" and backend.in_host_memory
    assert (backend.workers, backend.notes, backend.memory_bytes) == (1, [], None)
    assert backend.description == backend.name and backend.machine() == {}
    assert backend.weight_nbytes("layers.0.wq") == 4 * 16 * 16


def test_programs_of_all_backends_agree(backend: Backend) -> None:
    program = backend.program(GRAPH)
    backend.prepare(program)
    program.inputs["ids"][:3], program.inputs["positions"][:3] = [1, 2, 3], [0, 1, 2]
    before = program.entries
    program.inputs["rows"][0] = 2
    program.run(3)
    assert program.entries >= before
    expected = open_backend("reference", WEIGHTS).program(GRAPH)
    expected.inputs["ids"][:3], expected.inputs["positions"][:3] = [1, 2, 3], [0, 1, 2]
    expected.inputs["rows"][0] = 2
    expected.run(3)
    np.testing.assert_allclose(program.value("logits"), expected.value("logits"), rtol=1e-4, atol=1e-4)
    assert program.graph.ops[program.prefill_end].kind == "rows"
    assert len(program.kernel_names()) == len(program.graph.ops)
    assert (program.plan is None) == (backend.name == "reference")
    backend.synchronize()


def test_steps_are_timed_on_the_cpu_only() -> None:
    cpu, reference = open_backend("cpu", WEIGHTS, 1), open_backend("reference", WEIGHTS)
    program = cpu.program(GRAPH)
    count = len(program.graph.ops)
    steps, whole = cpu.time_steps(program, list(range(count)), [0] * count)
    assert len(steps) == count and min(steps) > 0 and whole > 0
    with pytest.raises(Error, match="no plan whose steps"):
        reference.time_steps(reference.program(GRAPH), [], [])


def test_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    from numballama.cpu import bandwidth

    monkeypatch.setattr(bandwidth, "READ_BYTES", 1 << 22)
    found = open_backend("cpu", WEIGHTS, 1).measure_bandwidth()
    assert found is not None and 1e8 < found < 1e13
    assert open_backend("reference", WEIGHTS).measure_bandwidth() is None


@pytest.mark.parametrize("open_", [choose_device, backend_class, lambda device: open_backend(device, WEIGHTS)])
def test_unknown_devices(open_: object) -> None:
    assert callable(open_)
    with pytest.raises(DeviceError, match="unknown device 'gpu'; choose from 'cpu', 'cuda'"):
        open_("gpu")


def test_a_device_is_named_by_a_string() -> None:
    with pytest.raises(DeviceError, match="must be a string, found 0"):
        choose_device(0)  # type: ignore[arg-type]


def test_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == ("cpu", "") and choose_device("reference") == ("reference", "")
    device, reason = choose_device("auto")
    assert device in ("cpu", "cuda") and reason
    monkeypatch.setattr(backends, "choose_device", lambda device: ("cpu", "of a test"))
    assert open_backend("auto", WEIGHTS, 1).name == "cpu"


def test_cuda_is_never_replaced_by_another_device(tmp_path: Path) -> None:
    if choose_device("auto")[0] == "cuda":
        assert choose_device("cuda") == ("cuda", "")
        return
    path, _ = save(tmp_path, "llama2c-v0")
    for action in (lambda: choose_device("cuda"), lambda: numballama.compile(path, device="cuda")):
        with pytest.raises(DeviceError, match="cuda"):
            action()


def test_a_closed_model_has_neither_backend_nor_program(tmp_path: Path) -> None:
    path, _ = save(tmp_path, "llama2c-v0")
    model = Model(path, device="reference")
    assert model.backend.name == "reference" and model.program.plan is None
    with pytest.raises(Error, match="has no plan"):
        _ = model.plan
    model.close()
    for name in ("backend", "program", "plan"):
        with pytest.raises(Error, match="closed"):
            getattr(model, name)
