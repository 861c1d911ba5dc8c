"""Every CPU kernel against the NumPy reference: a graph of one op, lowered and bound as for a model, its workers run in
any order.

Tolerances are the error bounds of `tests.helpers.bounds`: they follow from the data. Ops that only move or round
values are compared exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama import registry
from numballama.checkpoint import Weight
from numballama.cpu.backend import CpuProgram
from numballama.cpu.compiler import FAST_MATH
from numballama.ir import DTYPES, Graph
from numballama.kernels_cpu import MAX_EXPONENT, MIN_EXPONENT, exp
from numballama.quantization.convert import dequantize, from_bf16, from_f16, to_bf16, to_f16
from numballama.quantization.types import BLOCKS, LINEAR_TYPES
from numballama.reference import ReferenceBackend
from tests.helpers.bounds import as_weight, check_step, compiled, cpu_backend, poison, read, run_workers
from tests.kernels.cases import CASES, Case


def test_every_kernel_has_a_property() -> None:
    registered = [kernel for (_, backend), found in registry._kernels.items() if backend == "cpu" for kernel in found]
    kernels = [kernel.name for kernel in registered if kernel.built_in]
    assert len(kernels) == len(set(kernels)), "two kernels of one name cannot be told apart in a plan"
    elsewhere = {"all_reduce", "all_gather"}  # tests/kernels/cpu/test_collectives.py: they need several ranks
    assert set(kernels) == set(CASES) | elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=40)
def test_kernel_agrees_with_reference(name: str, data: st.DataObject) -> None:
    build, passes = CASES[name]
    c = Case(data.draw)
    graph = build(c)
    workers = data.draw(st.integers(1, 5), "workers")
    backend = cpu_backend(c.weights, workers)
    backend.states |= {state: array.copy() for state, array in c.states.items()}
    program = compiled(backend, graph, passes)
    assert program.plan.steps[0].kernel.name == name
    program.arena[:] = 0xFF  # inputs too: what lies after the run's tokens is nobody's
    for operand, array in c.arrays.items():
        program.inputs[operand][: c.tokens] = array[: c.tokens]
    order = data.draw(st.permutations(range(workers)), "order of the workers")
    reference = ReferenceBackend(c.weights)
    for step in range(len(program.plan.steps)):
        check_step(program, step, c.tokens, reference, lambda step=step: run_workers(program, c.tokens, step, order))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_all_workers_at_once_give_what_they_give_one_by_one(threads: int) -> None:
    """All workers at once, through the real executor: the same bits, because no sum is split between workers."""
    rng = np.random.default_rng(threads)
    graph = Graph("executor")
    x = graph.input("x", (5, 65), "f32")
    h = graph.add("rmsnorm", x, graph.weight("n", (65,), "f32"), out="h", eps=1e-5)
    y = graph.add("linear", h, graph.weight("w", (77, 65), "f32"), out="y")
    graph.outputs = [graph.add("argmax", y, out="z").name, "y"]
    weights = {n: as_weight(rng.standard_normal(s, dtype=np.float32)) for n, s in (("n", (65,)), ("w", (77, 65)))}
    results = []
    for at_once in (True, False):
        program = compiled(cpu_backend(weights, threads), graph)
        poison(program)
        program.inputs["x"][:] = np.random.default_rng(9).standard_normal((5, 65), dtype=np.float32)
        if at_once:
            program.run(3)
        else:
            for step in range(len(program.plan.steps)):
                run_workers(program, 3, step, range(threads))
        results.append((program.value("y")[:3].copy(), program.value("z")[:3].copy()))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert np.isfinite(results[0][0]).all()


# Numbers at the edges


def run_op(kind: str, *arrays: np.ndarray, outputs: Sequence[str] = ("y",), **attrs: Any) -> list[np.ndarray]:
    """Run one op of plain inputs with one worker."""
    graph = Graph("one")
    inputs = [graph.input(f"x{i}", a.shape, {"f": "f32", "i": "i32"}[a.dtype.kind]) for i, a in enumerate(arrays)]
    graph.add(kind, *inputs, out=outputs, **attrs)
    graph.outputs = list(outputs)
    program = compiled(cpu_backend(), graph)
    poison(program)
    for i, array in enumerate(arrays):
        program.inputs[f"x{i}"][:] = array
    program.run(len(arrays[0]))
    return [program.value(name).copy() for name in outputs]


def f32(*rows: Sequence[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_argmax_of_special_rows() -> None:
    inf, nan = np.inf, np.nan
    x = f32(
        [1, 2, 2, 0], [7, 7, 7, 7], [-inf] * 4, [-inf, -inf, -5, -inf], [1, inf, inf, 0], [-0.0, 0.0, 0.0, -1],
        [nan, 1, 2, 3], [1, 2, 3, nan], [nan] * 4, [inf, nan, inf, 1], [-nan, 1, 2, 3], [1, -nan, inf, 3],
        [3.4e38, inf, 0, 0], [-1e-45, 1e-45, 0, 0],
    )  # fmt: skip
    (y,) = run_op("argmax", x)
    # a NaN made by the processor, such as inf - inf on x86, has its sign bit set: it counts like any other
    assert y.tolist() == [1, 0, 0, 2, 1, 0, -1, -1, -1, -1, -1, -1, 1, 1]


def test_softmax_of_special_rows() -> None:
    inf = np.inf
    x = f32(
        [0, 0, 0, 0], [-inf, -inf, 3, -inf], [1e30, -1e30, 1e30, 0], [-3e38, -3e38, -3e38, -inf], [88, 200, -200, 89]
    )
    (y,) = run_op("softmax", x[:, None])
    np.testing.assert_array_equal(y[:4, 0], f32([0.25] * 4, [0, 0, 1, 0], [0.5, 0, 0.5, 0], [1 / 3, 1 / 3, 1 / 3, 0]))
    assert y[4, 0, 1] == 1 and y[4, 0].sum() == 1


def test_softmax_of_nan_is_nan() -> None:
    (y,) = run_op("softmax", f32([0, np.nan, 1])[:, None])
    assert np.isnan(y).all()


def test_swiglu_where_the_exponential_overflows() -> None:
    gate = f32([-1e4, -100, -88.8, 100, 1e4, 3e38, 0, -0.0])
    (y,) = run_op("swiglu", gate, np.full_like(gate, 2))
    assert np.isfinite(y[0, :5]).all()
    np.testing.assert_allclose(y[0], [0, 0, 0, 200, 2e4, np.inf, 0, 0], atol=1e-30)


@numba.njit(fastmath=FAST_MATH)  # type: ignore[untyped-decorator]
def exponentials(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(x.shape[0]):
        out[i] = exp(x[i])


@pytest.mark.slow
def test_exp_is_good_to_a_unit_in_kernels() -> None:
    """Of all float32 numbers in its range the worst has 1.023. Reordered, as its callers may be, it would be 4.6."""
    x = np.concatenate(
        [np.linspace(a, b, 300_001, dtype=np.float32) for a, b in ((MIN_EXPONENT, MAX_EXPONENT), (-1, 1))]
    )
    found = np.empty_like(x)
    exponentials(x, found)
    wanted = np.exp(x.astype(np.float64))
    assert (np.abs(found - wanted) <= 1.03 * np.spacing(wanted.astype(np.float32))).all()


def test_quantize_of_special_rows() -> None:
    """From 1e-36 to 2e36: beyond, 127 / largest or x · 127 overflows, which the compiler may make of x / (largest /
    127)."""
    x = f32([0, 0, 0], [127, -127, 63.4], [1e36, -2.5e36, 1], [1e-30, -1e-30, 0], [-0.0, 0, 0])
    q, s = run_op("quantize", x, outputs=("q", "s"), group=3)
    assert q.tolist() == [[0, 0, 0], [127, -127, 63], [51, -127, 0], [127, -127, 0], [0, 0, 0]]
    assert s[0] == 0 == s[4]
    assert abs(s[1, 0] - 1) <= 2.0**-23


def test_quantize_rounds_halves_away_from_zero() -> None:
    x = np.zeros((1, 128), np.float32)
    x[0, :7] = (
        128,
        3,
        -3,
        5,
        -5,
        7,
        0.99,
    )  # scale 128/127: no tie. In the second group the scale is 2: ties at odd numbers
    x[0, 64:71] = 254, 3, -3, 5, -5, 7, -1
    q, s = run_op("quantize", x, outputs=("q", "s"), group=64)
    if s[0, 1] == 2:  # where 254 · (1/127) rounds to 2
        assert q[0, 64:71].tolist() == [127, 2, -2, 3, -3, 4, -1]
    assert q[0, :7].tolist() == [127, 3, -3, 5, -5, 7, 1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_cache_rounds_every_kind_of_number_to_the_nearest(dtype: str) -> None:
    """All patterns of the format, what lies half-way between neighbours, overflow, subnormals, infinities and NaN."""
    bits = np.arange(0x7F80 if dtype == "bf16" else 0x7C00, dtype=np.uint16)
    exact = from_bf16(bits) if dtype == "bf16" else from_f16(bits)
    middle = ((exact[:-1].astype(np.float64) + exact[1:]) / 2).astype(np.float32)
    parts = [exact, middle, np.nextafter(middle, 0), np.nextafter(middle, np.float32(np.inf))]
    parts.append(f32([65519.9, 65520, 1e5, 3.4028235e38, np.inf, np.nan, 1e-45, 2.0**-25, 2.0**-24])[0])
    numbers = np.concatenate([*parts, *(-p for p in parts)])
    numbers = np.resize(numbers, -(-numbers.size // 64) * 64)
    graph = Graph("cache")
    tokens = numbers.size // 64
    x, positions = graph.input("x", (tokens, 64), "f32"), graph.input("p", (tokens,), "i32")
    cache, table = graph.state("cache", (1, 1, tokens, 64), dtype), graph.state("page_table", (1, 1), "i32")
    graph.add("kv_write", x, cache, positions, graph.input("s", (tokens,), "i32"), table, out="cache'")
    program = compiled(cpu_backend(), graph)
    program.inputs["x"][:] = numbers.reshape(tokens, 64)
    program.inputs["p"][:], program.inputs["s"][:] = range(tokens), 0
    program.run(tokens)
    got = program.value("cache").reshape(-1)
    with np.errstate(over="ignore"):
        want = (to_f16 if dtype == "f16" else to_bf16)(numbers)
    nan = np.isnan(numbers)
    assert not np.isinf(read(program, "cache", 0).reshape(-1)[np.isfinite(numbers)]).any()  # the largest number instead
    assert np.isinf(read(program, "cache", 0).reshape(-1)[np.isinf(numbers)]).all()
    np.testing.assert_array_equal(got[~nan], want[~nan])
    assert np.isnan(read(program, "cache", 0).reshape(-1)[nan]).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_16_bit_weight_decodes_exactly(kind: str) -> None:
    """Every pattern of the format, subnormals and infinities with it, through a table look-up."""
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(1024, 64)
    graph = Graph("table")
    table = graph.weight("table", bits.shape, kind)
    graph.add("embedding", graph.input("ids", (1024,), "i32"), table, out="y")
    graph.outputs = ["y"]
    weight = Weight(bits.shape, as_weight(np.ones((1, 1), np.float32), kind).type, bits)
    program = compiled(cpu_backend({"table": weight}, 3), graph)
    program.inputs["ids"][:] = range(1024)
    run_workers(program, 1024, 0, range(3))
    want = dequantize(weight)
    got = program.value("y")
    np.testing.assert_array_equal(got, want)
    assert DTYPES[kind].itemsize == 2 and np.isnan(want).any() and np.isinf(want).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", LINEAR_TYPES)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1e15, 1e30])
def test_linear_of_huge_and_small_numbers(kind: str, magnitude: float) -> None:
    rng = np.random.default_rng(3)
    graph, n = Graph("linear"), 3 * max(32, BLOCKS.get(kind, (0, 0))[0])
    graph.add("linear", graph.input("x", (4, n), "f32"), graph.weight("w", (9, n), kind), out="y")
    graph.outputs = ["y"]
    weights = {"w": as_weight(rng.standard_normal((9, n), dtype=np.float32), kind, 32)}
    program: CpuProgram = compiled(cpu_backend(weights), graph)
    program.inputs["x"][:] = rng.standard_normal((4, n), dtype=np.float32) * np.float32(magnitude)
    for tokens in (1, 4):
        check_step(program, 0, tokens, ReferenceBackend(weights), lambda t=tokens: run_workers(program, t, 0, [0]))


def test_rmsnorm_of_huge_and_small_rows() -> None:
    """Squares stay in float32's range up to 1e18; below 1e-10 eps is all that counts."""
    for magnitude in (1e-30, 1e-10, 1e10, 1e17):
        graph = Graph("norm")
        graph.add("rmsnorm", graph.input("x", (2, 33), "f32"), graph.weight("w", (33,), "f32"), out="y", eps=1e-5)
        graph.outputs = ["y"]
        weights = {"w": as_weight(np.linspace(-2, 2, 33, dtype=np.float32))}
        program = compiled(cpu_backend(weights), graph)
        program.inputs["x"][:] = np.random.default_rng(0).standard_normal((2, 33)) * magnitude
        check_step(program, 0, 2, ReferenceBackend(weights), lambda p=program: run_workers(p, 2, 0, [0]))
