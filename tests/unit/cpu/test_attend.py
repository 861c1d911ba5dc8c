"""Attention of heads that share keys and values: the definition in float64, and the same bits however heads are shared
out."""

from __future__ import annotations

import numpy as np
import pytest

from numballama.ir import Graph
from numballama.quantization.convert import to_f16
from numballama.quantization.kv import split_q8_0, stored
from numballama.quantization.types import KVType
from tests.helpers.bounds import compiled, cpu_backend, run_workers

KV_HEADS, PAGE, PAGES, TOKENS = 2, 8, 4, 3


def attention(heads: int, head_dim: int, dtype: KVType, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel computes, and what it should be, for sequences whose last page is not full."""
    rng, shape = np.random.default_rng(0), (PAGES, KV_HEADS, PAGE, head_dim)
    graph, backend = Graph("case"), cpu_backend(workers=workers)
    q = graph.input("q", (TOKENS, heads * head_dim), "f32")
    k, v = (graph.state(name, shape, dtype) for name in ("k", "v"))
    where = *(graph.input(name, (TOKENS,), "i32") for name in ("p", "s")), graph.state("page_table", (1, 3), "i32")
    weights = graph.add("softmax", graph.add("attention_scores", q, k, *where, out="scores", window=0), out="weights")
    graph.add("attention_values", weights, v, *where, out="y", window=0)
    graph.outputs = ["y"]
    program = compiled(backend, graph, ["attention"])
    assert program.kernel_names() == ["attention"]
    backend.set_pages(0, 0, [2, 3, 1])
    program.inputs["q"][:] = rng.standard_normal((TOKENS, heads * head_dim))
    program.inputs["p"][:], program.inputs["s"][:] = (20, 7, 0), 0
    caches = []
    for name in ("k", "v"):
        if dtype == "q8_0":
            quants, scales = split_q8_0(backend.states[name], shape)
            quants[:] = rng.integers(-127, 128, quants.shape)
            scales[:] = to_f16(rng.random(scales.shape, np.float32) / 64)
        else:
            numbers = rng.standard_normal(shape).astype(np.float32)
            backend.states[name][:] = numbers if dtype == "f32" else to_f16(numbers)
        cache = stored(backend.states[name], shape, dtype).astype(np.float64)
        caches.append(cache[[2, 3, 1]].transpose(1, 0, 2, 3).reshape(KV_HEADS, 3 * PAGE, head_dim))
    run_workers(program, TOKENS, 0, range(workers))
    wanted = np.empty((TOKENS, heads, head_dim))
    for t, position in enumerate(program.inputs["p"]):
        for h, query in enumerate(program.inputs["q"][t].reshape(heads, head_dim).astype(np.float64)):
            keys, values = (cache[h // (heads // KV_HEADS), : position + 1] for cache in caches)
            shares = np.exp(keys @ query / np.sqrt(head_dim))
            wanted[t, h] = shares @ values / shares.sum()
    return program.value("y").copy(), wanted.reshape(TOKENS, -1)


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [(8, 72, "f32"), (8, 40, "f16"), (8, 40, "q8_0"), (8, 4, "f32"), (2, 72, "f32"), (20, 64, "f32"), (14, 64, "q8_0")],
)
def test_all_ways_to_share_out_heads_give_the_same_bits(heads: int, head_dim: int, dtype: KVType) -> None:
    """One worker computes 4 heads that share keys as 2 and 2, 7 as 3, 2 and 2, and 10 as 8 and 2; others share them.

    Heads of 4 elements go one by one, and those of 40 and 72 have elements beyond whole groups of vectors.
    """
    first, wanted = attention(heads, head_dim, dtype, 1)
    assert np.abs(first - wanted).max() <= 1e-5 * np.abs(wanted).max()
    for workers in (2, 3, 5, 9):
        np.testing.assert_array_equal(
            attention(heads, head_dim, dtype, workers)[0], first, err_msg=f"{workers} workers"
        )
