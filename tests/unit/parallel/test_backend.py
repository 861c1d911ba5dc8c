"""Ranks in one process behind the interface of a backend: texts, batches, failures. Values: tests/models/test_ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numballama
from numballama import Model, SamplingParams, loader, model
from numballama.checkpoint import Weight
from numballama.errors import DeviceError, Error
from numballama.graph import KVLayout, build
from numballama.parallel.backend import ParallelBackend, ParallelProgram
from numballama.parallel.rank_memory import stop
from tests.helpers.paging import give_pages
from tests.helpers.random_models import SMALL, random_checkpoint

Compile = Callable[..., Model]


@pytest.fixture
def compile_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compile]:
    """compile_ranks(ranks, path, …): `numballama.compile` of a model that is split over this number of ranks."""
    opened: list[Model] = []

    def compile_ranks(ranks: int, path: Path | None = None, *arguments: Any, **options: Any) -> Model:
        checkpoint = loader.open_checkpoint(path)
        int8 = checkpoint.int8_activations or options.get("activations") == "int8"

        def open_ranks(
            device: Any, weights: dict[str, Weight], threads: int | None, invariant: bool, *others: Any
        ) -> ParallelBackend:
            return ParallelBackend(device, checkpoint.config, weights, ranks, threads, invariant, int8)

        with monkeypatch.context() as patch:
            patch.setattr(model, "open_backend", open_ranks)
            opened.append(numballama.compile(path, *arguments, device=options.pop("device", "cpu"), **options))
        return opened[-1]

    yield compile_ranks
    for each in opened:
        each.close()


GREEDY = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_story_of_several_ranks_is_that_of_one(compile_ranks: Compile, ranks: int) -> None:
    """The packaged model: Q8_0, tied. Its 704 hidden columns are 22 blocks: unequal parts; 8 ranks share 4 KV heads."""
    with numballama.compile(None, device="cpu") as one:
        want = one.generate("Once upon a time", params=GREEDY)
    several = compile_ranks(ranks, threads=1)
    assert several.generate("Once upon a time", params=GREEDY) == want
    assert several.plan.graph.values["layers.0.k_cache"].shape[1] == max(4 // ranks, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "threads"), [(2, 1), (2, 2), (4, 1)])
def test_a_real_model_writes_the_same_text(compile_ranks: Compile, models: Path, ranks: int, threads: int) -> None:
    """Greedy text of the float32 model of 260K parameters, whose hidden width of 172 has no block to split at."""
    files = models / "stories260K.bin", models / "tok512.bin"
    with numballama.compile(*files, device="cpu") as one:
        want = one.generate("Once", params=GREEDY)
    assert compile_ranks(ranks, *files, threads=threads).generate("Once", params=GREEDY) == want


@pytest.mark.slow
def test_the_reference_writes_the_same_text(compile_ranks: Compile, models: Path) -> None:
    files = models / "stories260K.bin", models / "tok512.bin"
    short = SamplingParams(temperature=0, max_tokens=12)
    with numballama.compile(*files, device="cpu") as one:
        want = one.generate("Once", params=short)
    assert compile_ranks(2, *files, device="reference").generate("Once", params=short) == want


@pytest.mark.slow
def test_many_sequences_at_once(compile_ranks: Compile) -> None:
    """Long prompts in chunks beside others that decode, sampled and greedy, cancelled and cached: as with one rank."""
    prompts = ["Once upon a time", "The dog", "A cat and a bird " * 40, "Once upon a time there"]
    greedy = SamplingParams(temperature=0, max_tokens=24)
    options = {"max_sequences": 3, "context": 400, "batch_invariant": True}
    with numballama.compile(None, device="cpu", **options) as one:
        want = one.generate(prompts, params=greedy)
    several = compile_ranks(2, threads=1, **options)
    with several.engine() as engine:
        cancelled = engine.submit("A long story", SamplingParams(max_tokens=300, temperature=1.0, seed=1))
        next(iter(cancelled))
        assert several.generate(prompts, params=greedy) == want
        cancelled.cancel()
        assert several.generate(prompts, params=greedy) == want
    sampled = SamplingParams(max_tokens=20, temperature=0.9, seed=3)
    first = several.generate("Once", params=sampled)
    assert several.generate("Once", params=sampled) == first


def small(ranks: int = 2, **options: Any) -> tuple[ParallelBackend, ParallelProgram]:
    """Ranks that share a small random model, and their program for two tokens."""
    weights = random_checkpoint(SMALL).weights
    backend = ParallelBackend("cpu", SMALL, weights, ranks, 1, **options)
    kv = KVLayout.of(SMALL, SMALL.context)
    program = backend.program(build(SMALL, {name: weight.type for name, weight in weights.items()}, kv, 2, "all"))
    give_pages(backend, kv)
    program.inputs["ids"][:], program.inputs["positions"][:] = [3, 4], [0, 1]
    return backend, program


def test_all_ranks_compute_the_same_logits() -> None:
    backend, program = small()
    program.run(2, rows=2)
    first, second = (rank.value("logits") for rank in program.programs)
    np.testing.assert_array_equal(first, second)
    assert np.isfinite(first).all() and program.entries == 2
    assert program.value("logits") is first and "rank 0 of 2" in str(program.plan)
    backend.close()
    with pytest.raises(Error, match="this model is closed"):
        program.run(2, rows=2)


def test_a_rank_that_fails_ends_the_run_and_the_next_run_is_right() -> None:
    """The others wait for it in a kernel; they are stopped, and the exchange begins anew."""
    backend, program = small()
    program.run(2, rows=2)
    want = program.value("logits").copy()
    for rank, step in ((1, program.programs[1].run), (0, program.programs[0].run)):

        def fail(*arguments: Any, **options: Any) -> None:
            raise MemoryError("no more")

        program.programs[rank].run = fail  # type: ignore[method-assign]
        failed = threading.Thread(target=partial(pytest.raises, MemoryError, program.run, 2, rows=2))
        failed.start()
        failed.join(10)
        assert not failed.is_alive(), "the other rank waits for ever"
        program.programs[rank].run = step  # type: ignore[method-assign]
        program.value("logits")[:] = 0
        program.run(2, rows=2)
        np.testing.assert_array_equal(program.value("logits"), want)
    backend.close()


def test_two_models_run_at_the_same_time() -> None:
    """Each rank needs the worker threads of its number: two groups that each had some of them would wait for ever."""
    groups = [small(), small()]
    for _, program in groups:
        program.run(2, rows=2)

    def run_often(program: ParallelProgram) -> None:
        for _ in range(300):
            program.run(2, rows=2)

    threads = [threading.Thread(target=run_often, args=(program,), daemon=True) for _, program in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    try:
        assert not any(thread.is_alive() for thread in threads), "each waits for the other"
    finally:
        for backend, _ in groups:  # ends the waits
            stop(backend.ranks[0].states["arrivals"])
    for backend, _ in groups:
        backend.close()


def test_steps_cannot_be_run_or_timed_by_themselves() -> None:
    backend, program = small()
    with pytest.raises(Error, match="ranks have different steps, so steps 1 to 2 cannot be run by themselves"):
        program.run(2, 1, 2)
    with pytest.raises(Error, match="steps of several ranks cannot be timed by themselves"):
        backend.time_steps(program, [], [])
    program.run(2, 0, 0)
    backend.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_is_refused() -> None:
    """Its ranks have no threads: it would wait for them for ever."""
    backend, program = small()
    program.run(2, rows=2)
    child = os.fork()
    if child == 0:
        try:
            program.run(2, rows=2)
        except DeviceError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    backend.close()


def test_weights_and_caches_of_ranks() -> None:
    backend, _ = small()
    whole = random_checkpoint(SMALL).weights
    assert backend.weight_nbytes("layers.0.wq") == whole["layers.0.wq"].nbytes
    assert backend.weight_nbytes("norm") == 2 * whole["norm"].nbytes, "each rank has it"
    pages = list(backend.cache_page(1))
    assert {page.shape[0] for page in pages} == {1} and len(pages) == 2 * 2 * SMALL.n_layers
    assert backend.description == "cpu, 2 ranks"
    backend.close()
