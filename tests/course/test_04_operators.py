"""Solutions of docs/course/04-operators.md."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numballama import Error
from numballama.checkpoint import Weight
from numballama.cpu import CpuBackend
from numballama.ir import Graph, verify
from numballama.quantization.types import F32
from numballama.reference import ReferenceBackend


def run(graph: Graph, weights: dict[str, np.ndarray], backend: Any = CpuBackend, **inputs: np.ndarray) -> Any:
    program = backend({name: Weight(w.shape, F32, w) for name, w in weights.items()}).program(graph)
    for name, numbers in inputs.items():
        program.inputs[name][:] = numbers
    program.run(tokens=len(numbers))
    return program.value(graph.outputs[0]).copy()


def test_1_rmsnorm() -> None:
    """A float32 has 24 bits, and the sum of squares rounds at each addition, in an order that the compiler chooses."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, 200), dtype=np.float32), rng.standard_normal(200, dtype=np.float32)
    graph = Graph("a norm")
    y = graph.add(
        "rmsnorm", graph.input("x", x.shape, "f32"), graph.weight("w", weight.shape, "f32"), out="y", eps=1e-5
    )
    graph.outputs = [y.name]
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    assert np.abs(run(graph, {"w": weight}, x=x) / expected - 1).max() < 200 * 2.0**-24


def test_2_stale_state() -> None:
    graph = Graph("a stale cache")
    k, q = graph.input("k", (2, 8), "f32"), graph.input("q", (2, 8), "f32")
    where = (
        graph.input("positions", (2,), "i32"), graph.input("sequences", (2,), "i32"),
        graph.state("page_table", (2, 1), "i32"),
    )  # fmt: skip
    cache = graph.state("cache", (2, 2, 4, 4), "f32")
    graph.add("kv_write", k, cache, *where, out="cache'")
    graph.outputs = [graph.add("attention_scores", q, cache, *where, out="scores", window=0).name]
    with pytest.raises(Error, match="reads cache, which cache' has updated"):
        verify(graph)


def test_3_attention_from_parts() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 8), (5, 8), (5, 8)))
    graph = Graph("attention")
    scores = graph.add("linear", graph.input("q", q.shape, "f32"), graph.weight("k", k.shape, "f32"), out="scores")
    weights = graph.add("softmax", scores, out="weights")
    graph.outputs = [graph.add("linear", weights, graph.weight("v", (8, 5), "f32"), out="out").name]
    scaled = {"k": k / np.float32(np.sqrt(8)), "v": np.ascontiguousarray(v.T)}
    powers = np.exp(q @ k.T / np.sqrt(8))
    expected = powers / powers.sum(axis=1, keepdims=True) @ v
    assert np.allclose(run(graph, scaled, ReferenceBackend, q=q), expected, atol=1e-6)
