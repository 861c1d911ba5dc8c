"""Binding: what a program accepts, and how it reports a failed kernel."""

from __future__ import annotations

import numpy as np
import pytest

from numballama import registry
from numballama.errors import Error
from numballama.ir import Graph
from numballama.plan import ALIGNMENT
from numballama.sampling import SamplerTable, SamplingParams
from tests.helpers.bounds import compiled, cpu_backend
from tests.helpers.graphs import SMALL, llama
from tests.helpers.random_models import random_checkpoint


def doubled(tokens: int = 4) -> Graph:
    graph = Graph("doubled")
    x = graph.input("x", (tokens, 8), "f32")
    graph.outputs = [graph.add("add", x, x, out="y").name]
    return graph


@pytest.mark.parametrize(("tokens", "begin", "end"), [(0, 0, 1), (5, 0, 1), (1, 1, 0), (1, 0, 2), (1, -1, 1)])
def test_a_run_outside_the_plan_is_refused(tokens: int, begin: int, end: int) -> None:
    program = compiled(cpu_backend(), doubled())
    with pytest.raises(Error, match="cannot run"):
        program.run(tokens, begin, end)


def test_only_the_tokens_of_the_run_are_computed() -> None:
    program = compiled(cpu_backend(), doubled())
    program.inputs["x"][:], program.value("y")[:] = 3, -1
    program.run(2)
    np.testing.assert_array_equal(program.value("y")[:, 0], [6, 6, -1, -1])


def test_values_are_aligned() -> None:
    program = compiled(cpu_backend(), doubled())
    assert all(program.value(name).ctypes.data % ALIGNMENT == 0 for name in ("x", "y"))


def test_a_kernel_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_kernels", {key: list(found) for key, found in registry._kernels.items()})

    @registry.kernel("add", "cpu", "f32", "f32")
    def failing(worker, n_workers, tokens, a, b, out):  # type: ignore[no-untyped-def]
        if tokens == 3:
            raise ValueError("three")

    program = compiled(cpu_backend(), doubled())
    program.run(2)
    with pytest.raises(Error, match="a kernel failed"):
        program.run(3)


@pytest.mark.parametrize(("tokens", "rows"), [(0, 1), (5, 1), (2, 3), (4, 5)])
def test_a_sampling_run_that_does_not_fit_is_refused(tokens: int, rows: int) -> None:
    graph = llama(tokens=4)
    program = compiled(cpu_backend(random_checkpoint(SMALL).weights), graph)
    table = SamplerTable(1, SMALL.vocab_size)
    with pytest.raises(Error, match="cannot run"):
        program.submit(tokens, rows, table)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_kernel_that_fails_in_a_sampling_run_is_an_error(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    monkeypatch.setattr(registry, "_kernels", {key: list(found) for key, found in registry._kernels.items()})

    @registry.kernel("add", "cpu", "f32", "f32")
    def failing(worker, n_workers, tokens, a, b, out):  # type: ignore[no-untyped-def]
        raise ValueError("always")

    graph = Graph("failing")
    graph.input("sequences", (4,), "i32")
    x = graph.input("x", (4, 8), "f32")
    graph.outputs = [graph.add("argmax", graph.add("add", x, x, out="logits"), out="next").name]
    program = compiled(cpu_backend(), graph)
    table = SamplerTable(1, 8)
    table.assign(0, SamplingParams(temperature=temperature, seed=1))
    with pytest.raises(Error, match="a kernel failed"):
        program.submit(1, 1, table)
