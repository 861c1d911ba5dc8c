"""Solutions of docs/course/05-registry.md."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import numballama
from numballama import Error, fusion
from numballama.cpu import CpuBackend
from numballama.ir import Graph, rule
from numballama.reference import ReferenceBackend
from numballama.registry import kernel


def test_1_clip() -> None:
    @rule("clip", inputs=("x",), attrs=("low", "high"))
    def shape(inputs: Any, attrs: Any) -> Any:
        if attrs["low"] > attrs["high"]:
            raise Error("low is above high")
        return [(inputs[0].shape, "f32")]

    @kernel("clip", "reference", "f32")
    def definition(x: np.ndarray, low: float, high: float) -> np.ndarray:
        return np.clip(x, low, high)

    @kernel("clip", "cpu", "f32")
    def clip(worker, n_workers, tokens, x, out, low, high):  # type: ignore[no-untyped-def]
        for t in range(worker, tokens, n_workers):
            for k in range(x.shape[1]):
                out[t, k] = min(max(x[t, k], low), high)

    graph = Graph("clip")
    x = graph.input("x", (4, 9), "f32")
    graph.outputs = [graph.add("clip", x, out="y", low=-0.5, high=1.0).name]
    results = []
    for backend in (CpuBackend({}), ReferenceBackend({})):
        program = backend.program(graph)
        program.inputs["x"][:] = np.linspace(-2, 2, 36).reshape(4, 9)
        program.run(tokens=4)
        results.append(program.value("y").copy())
    assert np.array_equal(*results)
    with pytest.raises(Error, match="low is above high"):
        graph.add("clip", x, out="z", low=1.0, high=0.0)


@pytest.mark.slow
def test_2_replace() -> None:
    """`kernel_names` has the name of the function: it is ours. For a text that changes, compute something else."""
    passes = [name for name in fusion.FUSIONS if name != "residual"]  # it would join `add` with `linear`
    with numballama.compile(None, device="cpu", fusions=passes) as model:
        expected = model.generate("Once", temperature=0, max_tokens=12)
        assert "add" in model.program.kernel_names()

    @kernel("add", "cpu", "f32", "f32")
    def my_add(worker, n_workers, tokens, a, b, out):  # type: ignore[no-untyped-def]
        for t in range(worker, tokens, n_workers):
            for k in range(out.shape[1]):
                out[t, k] = a[t, k] + b[t, k]

    with numballama.compile(None, device="cpu", fusions=passes) as model:
        assert "my_add" in model.program.kernel_names()
        assert model.generate("Once", temperature=0, max_tokens=12) == expected


def test_3_a_state() -> None:
    @rule("running_max", inputs=("best", "x"), inplace={"out": "best"})
    def shape(inputs: Any, attrs: Any) -> Any:
        best, _ = inputs
        return [(best.shape, best.dtype)]

    @kernel("running_max", "cpu", "f32", "f32")
    def running_max(worker, n_workers, tokens, best, x):  # type: ignore[no-untyped-def]
        for k in range(worker, best.shape[0], n_workers):
            for t in range(tokens):
                best[k] = max(best[k], x[t, k])

    graph = Graph("the largest so far")
    x, best = graph.input("x", (1, 3), "f32"), graph.state("best", (3,), "f32")
    graph.outputs = [graph.add("running_max", best, x, out="best_after").name]
    program = CpuBackend({}).program(graph)
    for numbers in ([1, 5, 0], [4, 2, 0], [3, 3, 7]):
        program.inputs["x"][:] = numbers
        program.run(tokens=1)
    assert program.value("best").tolist() == [4, 5, 7]  # a state begins as zeros
