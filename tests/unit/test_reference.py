"""The reference against definitions that are written out, and the interpreter around it.

Every backend is compared with the reference (tests/kernels, tests/models); here it is compared with plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from numballama import reference
from numballama.checkpoint import Weight
from numballama.errors import Error
from numballama.ir import Graph
from numballama.ops import CELL
from numballama.quantization.types import F32
from numballama.reference import ReferenceBackend, run_ranks
from tests.helpers.graphs import SMALL, llama
from tests.helpers.random_models import random_checkpoint
from tests.helpers.sampling import make_sampler

Numbers = Callable[..., np.ndarray]


@pytest.fixture
def numbers() -> Numbers:
    """numbers(*shape): random float32, the same in each test."""
    rng = np.random.default_rng(5)
    return lambda *shape: rng.standard_normal(shape, dtype=np.float32)


def test_norms(numbers: Numbers) -> None:
    x, weight = numbers(3, 8), numbers(8)
    for row, result in zip(x.tolist(), reference.rmsnorm(x, weight, 1e-5), strict=True):
        scale = 1 / math.sqrt(sum(number**2 for number in row) / 8 + 1e-5)
        np.testing.assert_allclose(result, [n * scale * w for n, w in zip(row, weight.tolist(), strict=True)])
    by_head = reference.head_norm(x, weight[:4], 1e-5)
    np.testing.assert_allclose(by_head[:, 4:], reference.rmsnorm(x[:, 4:], weight[:4], 1e-5))


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rope_rotates_pairs(numbers: Numbers, interleaved: int) -> None:
    """As complex numbers: each pair is multiplied by e^(i · position · frequency)."""
    x, positions, frequencies = numbers(2, 8), np.array([0, 3]), np.array([1.0, 0.25])
    out = reference.rope(x, reference.rope_angles(positions, frequencies, 1.0), 4, interleaved)
    np.testing.assert_array_equal(out[0], x[0])
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    for head in (0, 4):
        for (a, b), frequency in zip(pairs, frequencies, strict=True):
            expected = complex(x[1, head + a], x[1, head + b]) * np.exp(3j * frequency)
            assert complex(out[1, head + a], out[1, head + b]) == pytest.approx(expected)
    scaled = reference.rope(x, reference.rope_angles(positions, frequencies, 1.5), 4, interleaved)
    np.testing.assert_allclose(scaled, 1.5 * out, rtol=1e-12)


@pytest.mark.parametrize(("window", "first"), [(0, 0), (2, 3), (9, 0)])
def test_attention_sees_the_past_of_its_own_sequence(numbers: Numbers, window: int, first: int) -> None:
    """A token at position 4 of sequence 1: keys and values from `first` to 4; two heads share those of one KV head."""
    q, keys, values = numbers(1, 8), numbers(2, 1, 6, 4), numbers(2, 1, 6, 4)
    where = np.array([4]), np.array([1]), np.array([[0], [1]])
    scores = reference.attention_scores(q, keys, *where, window)
    assert scores.shape == (1, 2, 6) and np.isneginf(scores[0, :, 5]).all() and np.isneginf(scores[0, :, :first]).all()
    weights = reference.softmax(scores)
    np.testing.assert_allclose(weights.sum(axis=-1), 1)
    out = reference.attention_values(weights, values, *where, window)
    q, keys, values = (array.astype(np.float64) for array in (q, keys, values))
    for head in (0, 1):
        powers = [math.exp(sum(q[0, 4 * head + d] * keys[1, 0, p, d] for d in range(4)) / 2) for p in range(first, 5)]
        for d in range(4):
            expected = sum(power * values[1, 0, first + n, d] for n, power in enumerate(powers)) / sum(powers)
            assert out[0, 4 * head + d] == pytest.approx(expected)


def test_kv_write_writes_each_token_at_its_place(numbers: Numbers) -> None:
    cache, x = np.zeros((4, 2, 3, 2), np.float32), numbers(2, 4)
    out = reference.kv_write(x, cache, np.array([5, 0]), np.array([0, 1]), np.array([[1, 3], [2, 0], [0, 0]]))
    assert out is cache
    assert cache[3, :, 2].ravel().tolist() == x[0].tolist() and cache[2, :, 0].ravel().tolist() == x[1].tolist()
    assert np.count_nonzero(cache) == 8


def test_argmax_takes_the_first_of_equals_and_refuses_nan() -> None:
    x = np.array([[1, 3, 3], [0, np.nan, 9]], np.float32)
    assert reference.argmax(x).tolist() == [1, -1]
    assert reference.rows(x[:, :1], np.array([1, 0, 1])).tolist() == [[0], [1], [0]]


def test_linear_of_int8_is_linear_of_what_it_stands_for(numbers: Numbers) -> None:
    x, weight = numbers(2, 10), numbers(3, 10)
    xq, xs = reference.quantize(x, 4)
    stands_for = xq * np.repeat(xs, 4, axis=1)[:, :10]
    assert np.abs(stands_for - x).max() <= xs.max() / 2 * (1 + 1e-6)
    product = reference.linear(stands_for, weight)
    np.testing.assert_allclose(reference.linear_int8(xq, xs, weight, 4), product, rtol=1e-5)
    assert product[1, 2] == pytest.approx(math.fsum(stands_for[1, k] * weight[2, k] for k in range(10)), rel=1e-5)


def test_swiglu_and_add(numbers: Numbers) -> None:
    gate, up = numbers(2, 3), numbers(2, 3)
    out = reference.swiglu(gate, up)
    assert out[1, 2] == pytest.approx(gate[1, 2] / (1 + math.exp(-gate[1, 2])) * up[1, 2], rel=1e-6)
    assert reference.add(gate, up)[0, 1] == float(gate[0, 1]) + float(up[0, 1])
    assert reference.bias(gate, up[0])[1, 0] == float(gate[1, 0]) + float(up[0, 0])


def test_every_value_of_the_graph_as_declared_is_kept() -> None:
    weights = random_checkpoint(SMALL).weights
    graph = llama(tokens=3)
    program = ReferenceBackend(weights).program(graph, fusions=True)
    assert program.graph is graph and program.plan is None
    program.inputs["ids"][:], program.inputs["positions"][:] = (1, 2, 3), range(3)
    program.run(3)
    for op in graph.ops:
        for name in op.outputs:
            assert program.value(name).shape == graph.values[name].shape
    assert program.kernel_names()[:2] == ["rope_angles", "embedding"]
    sampler = make_sampler(SMALL.vocab_size, temperature=0)
    program.inputs["rows"][0] = 2
    (token,) = program.collect(program.submit(3, 1, sampler)).tokens
    assert token == program.value("logits")[0].argmax() == program.value("next")[0]


def test_logits_that_are_not_numbers_give_no_token() -> None:
    weights = random_checkpoint(SMALL).weights
    weights["norm"] = Weight(weights["norm"].shape, F32, np.full(weights["norm"].shape, np.nan, np.float32))
    program = ReferenceBackend(weights).program(llama())
    sampled = program.collect(program.submit(1, 1, make_sampler(SMALL.vocab_size, temperature=0)))
    assert sampled.tokens.tolist() == [-1]


def test_large_models_are_kept_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "F64_BUDGET", 100)
    weights = random_checkpoint(SMALL).weights
    large = ReferenceBackend(weights)
    assert large.weight("norm").dtype == np.float32
    monkeypatch.undo()
    assert ReferenceBackend(weights).weight("norm").dtype == np.float64


def test_nothing_can_be_timed() -> None:
    backend = ReferenceBackend({})
    graph = Graph("one")
    x = graph.input("x", (1, 4), "f32")
    graph.outputs = [graph.add("add", x, x, out="y").name]
    with pytest.raises(Error, match="the reference has no plan"):
        backend.time_steps(backend.program(graph), ["add"], [16])


def exchanging(rank: int, *kinds: str) -> Graph:
    """A rank's graph of such exchanges of its input x [2, 3], one after the other."""
    graph = Graph("exchanges")
    x, exchange = graph.input("x", (2, 3), "f32"), graph.state("exchange", (2, 12), "f32")
    arrivals = graph.state("arrivals", (2, 1, CELL), "i32")
    for n, kind in enumerate(kinds):
        where = {"begin": 3 * rank, "columns": 6} if kind == "all_gather" else {}
        names = f"y{n}", f"exchange.{n}", f"arrivals.{n}"
        _, exchange, arrivals = graph.add(kind, x, exchange, arrivals, out=names, rank=rank, **where)
    graph.outputs = ["y0"]
    return graph


def test_ranks_exchange_values(numbers: Numbers) -> None:
    programs = [ReferenceBackend({}).program(exchanging(rank, "all_reduce", "all_gather")) for rank in range(2)]
    x = [numbers(2, 3), numbers(2, 3)]
    for program, own in zip(programs, x, strict=True):
        program.inputs["x"][:] = own
    run_ranks(programs, 2, 0, [None, None], 2)
    for program in programs:
        np.testing.assert_allclose(program.value("y0"), x[0] + x[1], rtol=1e-6)
        np.testing.assert_array_equal(program.value("y1"), np.hstack(x))


def test_ranks_that_exchange_different_values_are_refused() -> None:
    def programs(*kinds: tuple[str, ...]) -> list[reference.ReferenceProgram]:
        return [ReferenceBackend({}).program(exchanging(rank, *own)) for rank, own in enumerate(kinds)]

    with pytest.raises(Error, match=r"ranks must exchange the same values: y0, .* = all_reduce.*; y0, .* = all_gather"):
        run_ranks(programs(("all_reduce",), ("all_gather",)), 1, 0, [None, None], 1)
    with pytest.raises(Error, match=r"ranks must exchange the same values: .*; None"):
        run_ranks(programs(("all_reduce", "all_reduce"), ("all_reduce",)), 1, 0, [None, None], 1)
    with pytest.raises(Error, match=r"all_reduce.*: this is the graph of one rank, and the others do not run"):
        programs(("all_reduce",))[0].run(1)
