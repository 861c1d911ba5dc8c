"""The protocols that every backend and program fulfils, and which backend a device's name gives."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import numballama
from numballama import backend as backends
from numballama.backend import Backend, Program, backend_class, choose_device, gpus_from, open_backend
from numballama.bench.debug import WatchedProgram
from numballama.config import ModelConfig
from numballama.cpu.backend import CpuBackend, CpuProgram
from numballama.errors import DOCTOR, NEXT_STEP, DeviceError, Error, UnsupportedError
from numballama.graph import PAGE_TABLE, KVLayout, Logits, build
from numballama.model import Model
from numballama.parallel.backend import ParallelBackend, ParallelProgram
from numballama.parallel.processes import ProcessBackend, ProcessProgram
from numballama.quantization.types import KV_TYPES
from numballama.reference import ReferenceBackend, ReferenceProgram
from numballama.sampling import SamplerTable, SamplingParams
from tests.helpers.cuda_host import missing_packages
from tests.helpers.paging import give_pages
from tests.helpers.random_models import random_checkpoint, save
from tests.helpers.sampling import choose_token, likeliest, log_softmax

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


PROGRAMS = (CpuProgram, ReferenceProgram, WatchedProgram, ParallelProgram, ProcessProgram)
BACKENDS = (CpuBackend, ReferenceBackend, ParallelBackend, ProcessBackend)


def takes_what_it_says(kind: type, protocol: type) -> None:
    for name, method in inspect.getmembers(protocol, inspect.isfunction):
        if not name.startswith("_"):
            declared, found = (inspect.signature(each).parameters for each in (method, getattr(kind, name)))
            assert list(found) == list(declared), f"{kind.__name__}.{name}"
            assert [each.default for each in found.values()] == [each.default for each in declared.values()], name


@pytest.mark.parametrize("kind", [*PROGRAMS, *BACKENDS], ids=lambda kind: kind.__name__)
def test_methods_take_what_the_protocols_say(kind: type) -> None:
    """`isinstance` compares names only, and mypy only what is passed as a protocol."""
    takes_what_it_says(kind, Program if kind in PROGRAMS else Backend)


@pytest.mark.skipif(bool(missing_packages()), reason=missing_packages())
def test_methods_on_a_gpu_take_what_the_protocols_say() -> None:
    from numballama.cuda.backend import CudaBackend
    from numballama.cuda.program import CudaProgram

    takes_what_it_says(CudaBackend, Backend)
    takes_what_it_says(CudaProgram, Program)


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


PAGED = KVLayout.of(CONFIG, 40, "f32", 3, page=8)
PROMPTS = {2: [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], 0: [8], 1: [9, 7, 9, 3, 2, 3, 8, 4]}
"""Slot → prompt, in the order of a run: of two pages, of one token, of a whole page."""
PARAMS = {
    0: SamplingParams(temperature=0),
    1: SamplingParams(temperature=1.5, top_k=0, seed=3),
    2: SamplingParams(temperature=0, repetition_penalty=1.5, logprobs=2),
}


def paged_program(backend: Backend, tokens: int, logits: Logits) -> Program:
    return backend.program(
        build(CONFIG, {name: weight.type for name, weight in WEIGHTS.items()}, PAGED, tokens, logits)
    )


def fill(program: Program, rows: Sequence[tuple[int, int, int]]) -> None:
    """Write rows of (id, position, slot)."""
    for place, name in enumerate(("ids", "positions", "sequences")):
        program.inputs[name][: len(rows)] = [row[place] for row in rows]


def alone(history: Sequence[int], params: SamplingParams, prompt: int) -> tuple[int, np.ndarray]:
    """What a slot samples after these tokens, of which `prompt` are the prompt: from the reference, all in one run."""
    reference = open_backend("reference", WEIGHTS)
    program = paged_program(reference, 20, "rows")
    give_pages(reference, PAGED)
    fill(program, [(token, position, 0) for position, token in enumerate(history)])
    program.inputs["rows"][0] = len(history) - 1
    program.run(len(history))
    table = SamplerTable(1, CONFIG.vocab_size)
    table.assign(0, params, history[:prompt], history[prompt:])
    return choose_token(table, program.value("logits")[0]), program.value("logits")[0]


@pytest.mark.parametrize("greedy", [False, True])
def test_rows_of_several_sequences_give_what_each_gives_alone(backend: Backend, greedy: bool) -> None:
    """Prompts of three slots in one run, then steps of all three, in both kinds of program; pages in any order."""
    prompt, step = paged_program(backend, 20, "rows"), paged_program(backend, 3, "all")
    give_pages(backend, PAGED, seed=4)
    table = SamplerTable(3, CONFIG.vocab_size)
    params = dict.fromkeys(PARAMS, PARAMS[0]) if greedy else PARAMS
    histories = {slot: list(ids) for slot, ids in PROMPTS.items()}
    for slot, ids in PROMPTS.items():
        table.assign(slot, params[slot], ids)
    rows = [(token, place, slot) for slot, ids in PROMPTS.items() for place, token in enumerate(ids)]
    fill(prompt, rows)
    prompt.inputs["rows"][:3] = np.cumsum([len(ids) for ids in PROMPTS.values()]) - 1
    ticket, program = prompt.submit(len(rows), 3, table), prompt
    for count in range(4):
        program.inputs["ids"][:] = 0  # they have been copied
        sampled = program.collect(ticket)
        assert len(sampled.tokens) == 3 and sampled.top_ids.shape == (3, 0 if greedy else 2)
        for row, slot in enumerate(PROMPTS):
            token, logits = alone(histories[slot], params[slot], len(PROMPTS[slot]))
            np.testing.assert_allclose(program.value("logits")[row], logits, rtol=1e-4, atol=1e-4)
            assert sampled.tokens[row] == token == table.last_token[slot]
            assert np.isnan(sampled.logprobs[row]) == (params[slot].logprobs is None)
            if params[slot].logprobs is not None:
                assert sampled.top_ids[row].tolist() == likeliest(logits, 2)
                assert abs(sampled.logprobs[row] - log_softmax(logits)[token]) < 1e-4
            histories[slot].append(token)
        assert table.generated.tolist() == [count + 1] * 3
        program = step if count % 2 == 0 else prompt
        fill(program, [(ids[-1], len(ids) - 1, slot) for slot, ids in histories.items()])
        prompt.inputs["rows"][:3] = range(3)
        ticket = program.submit(3, 3, table)


def test_rows_without_logits_only_write_the_cache(backend: Backend) -> None:
    """A run may sample for some of its sequences: the others' state is as it was, and their tokens are in the cache."""
    program = paged_program(backend, 20, "rows")
    give_pages(backend, PAGED, seed=1)
    table = SamplerTable(3, CONFIG.vocab_size)
    for slot, ids in PROMPTS.items():
        table.assign(slot, PARAMS[1], ids)
    first, last = PROMPTS[2], PROMPTS[1]
    rows = [(token, place, 2) for place, token in enumerate(first[:-1])]
    rows += [(token, place, 1) for place, token in enumerate(last)]
    fill(program, rows)
    program.inputs["rows"][0] = len(rows) - 1
    states = table.state.copy()
    sampled = program.collect(program.submit(len(rows), 1, table))
    assert sampled.tokens.tolist() == [alone(last, PARAMS[1], len(last))[0]]
    assert table.generated.tolist() == [0, 1, 0] and (table.state == states).tolist() == [True, False, True]
    fill(program, [(first[-1], len(first) - 1, 2)])
    program.inputs["rows"][0] = 0
    sampled = program.collect(program.submit(1, 1, table))
    assert sampled.tokens.tolist() == [alone(first, PARAMS[1], len(first))[0]]


def test_a_page_may_be_in_two_rows_of_the_page_table(backend: Backend) -> None:
    program = paged_program(backend, 20, "rows")
    pages = give_pages(backend, PAGED, seed=2)
    shared = PROMPTS[1]
    fill(program, [(token, place, 0) for place, token in enumerate(shared)])
    program.run(len(shared), 0, program.prefill_end)
    backend.set_pages(2, 0, [int(pages[0, 0])])
    fill(program, [(7, len(shared), 2), (3, len(shared), 1)])
    program.inputs["rows"][:2] = [1, 0]
    program.run(2, rows=2)
    want = alone([*shared, 7], PARAMS[0], len(shared))[1]
    np.testing.assert_allclose(program.value("logits")[1], want, rtol=1e-4, atol=1e-4)
    assert np.abs(program.value("logits")[0] - want).max() > 1e-2, "slot 1 has pages of its own"


def test_numbers_that_are_none_are_one_rows_own(backend: Backend) -> None:
    """A page of NaN: the row that reads it has the token -1, the other one its own."""
    program = paged_program(backend, 20, "rows")
    pages = give_pages(backend, PAGED, seed=3)
    program.run(1)  # the reference makes its cache when it is first used
    for name, memory in backend.states.items():  # type: ignore[attr-defined]
        if name != PAGE_TABLE:
            memory[pages[0, 0]] = np.nan
    table = SamplerTable(3, CONFIG.vocab_size)
    for settings in (PARAMS[0], PARAMS[1]):
        for slot in range(3):
            table.assign(slot, settings, [5])
        fill(program, [(5, 3, 0), (5, 0, 1)])
        program.inputs["rows"][:2] = range(2)
        sampled = program.collect(program.submit(2, 2, table))
        assert sampled.tokens.tolist() == [-1, alone([5], settings, 1)[0]]


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
    monkeypatch.setattr(bandwidth, "LEAST_BYTES", 1 << 20)
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


def test_auto_asks_for_no_packages_where_no_driver_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are of no use there; where a driver is loaded, the note names what is missing."""
    from numballama.cuda import driver

    def missing(*_: object) -> None:
        raise DeviceError(f"packages are missing; {NEXT_STEP}")

    monkeypatch.setattr(driver, "Device", missing)
    named = f"packages are missing; {DOCTOR}"
    for loaded, expected in ((tmp_path, named), (tmp_path / "none", "no NVIDIA driver is loaded")):
        monkeypatch.setattr(backends, "LOADED_DRIVER", (str(loaded),))
        assert choose_device("auto") == ("cpu", expected)
    with pytest.raises(DeviceError, match="gpus=2 is for GPUs: no NVIDIA driver is loaded; run `numballama doctor`"):
        choose_device("auto", 2)


def test_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are looked at before a file is opened."""
    from numballama.cuda import driver

    asked: list[str] = []

    def device(name: str) -> None:
        asked.append(name)
        if name == "cuda:3":
            raise DeviceError("device 'cuda:3': this machine has 3 CUDA devices")

    monkeypatch.setattr(driver, "Device", device)
    assert choose_device("cuda", 3) == ("cuda", "") and asked == ["cuda", "cuda:1", "cuda:2"]
    assert gpus_from("cuda:1", 2) == ["cuda:1", "cuda:2"]
    with pytest.raises(DeviceError, match="this machine has 3"):
        choose_device("cuda:1", 3)
    for other in ("cpu", "reference"):
        with pytest.raises(UnsupportedError, match=f"gpus=2 is for GPUs: on device='{other}'"):
            choose_device(other, 2)


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


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_cell_that_is_run_again_and_again(tmp_path: Path, device: str) -> None:
    """Models that were not closed: at most the one before is in memory, whenever Python would collect the others."""
    path, _ = save(tmp_path, "llama2c-v0", CONFIG)
    kept: list[weakref.ref[Backend]] = []
    gc.disable()
    try:
        for _ in range(4):
            model = numballama.compile(path, device=device)
            kept.append(weakref.ref(model.backend))
            assert [backend() is None for backend in kept[:-2]] == [True] * (len(kept) - 2)
    finally:
        gc.enable()
    model.close()
