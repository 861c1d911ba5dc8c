"""Writes to and reads from the KV cache on the CPU, in every type, equal the reference's, with NaN and infinity too."""

from __future__ import annotations

import numpy as np
import pytest

from numballama.cpu.backend import CpuBackend
from numballama.ir import Graph
from numballama.quantization.kv import stored
from numballama.quantization.types import KVType
from numballama.reference import ReferenceBackend

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "q8_0"), (40, "q8_0"), (6, "q8_0"), (6, "f16"), (8, "bf16"), (8, "f32")]
)
def test_cache_and_attention_equal_the_reference(head_dim: int, dtype: KVType) -> None:
    """Numbers beyond float16, a NaN, an infinity and very small numbers among the keys."""
    rng, shape, tokens = np.random.default_rng(0), (4, 2, 4, head_dim), 5
    x = rng.standard_normal((tokens, 2 * head_dim)).astype(np.float32)
    x[0, 0], x[1, 1], x[3, 3] = 1e9, np.nan, np.inf
    x[2] *= np.float32(1e-30)
    q = rng.standard_normal((tokens, 4 * head_dim)).astype(np.float32)
    graph = Graph("cache")
    given = graph.input("x", x.shape, "f32"), graph.state("cache", shape, dtype)
    where = *(graph.input(name, (tokens,), "i32") for name in ("p", "s")), graph.state("page_table", (2, 3), "i32")
    cache = graph.add("kv_write", *given, *where, out="cache'")
    scores = graph.add("attention_scores", graph.input("q", q.shape, "f32"), cache, *where, out="scores", window=0)
    weights = graph.add("softmax", scores, out="weights")
    graph.add("attention_values", weights, cache, *where, out="y", window=0)
    graph.outputs = ["y"]
    cpu, reference = CpuBackend({}), ReferenceBackend({})
    programs = [backend.program(graph, False) for backend in (cpu, reference)]
    for backend, program in zip((cpu, reference), programs, strict=True):
        backend.set_pages(0, 0, [3, 1, 2])
        for name, numbers in (("x", x), ("p", [4, 5, 6, 7, 0]), ("s", 0), ("q", q)):
            program.inputs[name][:] = numbers
        program.run(tokens)
    np.testing.assert_array_equal(stored(cpu.states["cache"], shape, dtype), programs[1].value("cache'"))
    got, want = (program.value("y") for program in programs)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    known = ~np.isnan(want)
    assert np.isfinite(want[known]).all() and known.any()
    assert np.abs(got - want)[known].max() <= 1e-5 * np.abs(want[known]).max()
