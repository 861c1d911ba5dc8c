"""Every CPU kernel against the NumPy reference: a graph of one op, lowered and bound as for a model, its workers run in
any order.

Tolerances are the error bounds of `tests.helpers.bounds`: they follow from the data. Ops that only move or round
values are compared exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
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
from numballama.ir import DTYPES, Graph, Value
from numballama.kernels_cpu import MAX_EXPONENT, MIN_EXPONENT, exp
from numballama.quantization.activations import quantize_activations
from numballama.quantization.convert import dequantize, from_bf16, from_f16, to_bf16, to_f16
from numballama.quantization.types import BLOCKS, KV_TYPES, LINEAR_TYPES, VEC_DOT_TYPE
from numballama.reference import ReferenceBackend
from tests.helpers.bounds import as_weight, check_step, compiled, cpu_backend, poison, read, run_workers
from tests.helpers.paging import in_cache, shuffled_table

SIZES = st.one_of(
    st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 96, 100, 127, 128, 130, 160, 172, 192, 256])
)
GROUPS = st.sampled_from([1, 3, 32, 64, 96, 100, 128])


class Case:
    """A graph under construction with the data of its operands, drawn as it grows."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.graph = Graph("case")
        self.weights: dict[str, Weight] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.states: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.scale = np.float32(draw(st.sampled_from([1.0, 1.0, 1e-4, 1e4])))
        self.rows = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9]))
        self.tokens = draw(st.integers(1, self.rows))
        self.type = draw(st.sampled_from(LINEAR_TYPES))
        self.group = draw(GROUPS)

    def numbers(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32) * self.scale

    def columns(self) -> int:
        """Columns of a weight of this case's type: for block types whole blocks, here up to 8 small or 2 large ones."""
        columns: int = self.draw(SIZES)
        numbers, _ = BLOCKS.get(self.type, (1, 1))
        return min(-(-columns // min(numbers, 128)) * numbers, 512)

    def input(self, name: str, array: np.ndarray) -> Value:
        self.arrays[name] = array
        return self.graph.input(name, array.shape, {"f": "f32", "i": "i32"}[array.dtype.kind])

    def x(self, name: str, *shape: int) -> Value:
        return self.input(name, self.numbers(*shape))

    def weight(self, name: str, *shape: int, kind: str = "f32") -> Value:
        self.weights[name] = as_weight(self.numbers(*shape), kind, self.group, self.draw(st.booleans()))
        return self.graph.weight(name, shape, kind)

    def matrix(self, name: str, columns: int, kind: str | None = None) -> Value:
        return self.weight(name, self.draw(SIZES), columns, kind=kind or self.type)

    def done(self, *names: str) -> Graph:
        self.graph.outputs = list(names)
        return self.graph

    # parts of a model

    def norm(self, x: Value) -> Value:
        eps = self.draw(st.sampled_from([0.0, 1e-6, 1e-5, 0.5]))
        return self.graph.add("rmsnorm", x, self.weight("norm", x.shape[1]), out="h", eps=eps)

    def quantized(self) -> tuple[Value, Value]:
        """Int8 activations, as the op would have made them, and as inputs of the case: their group is the weight's."""
        self.type = "int8"
        columns = self.draw(SIZES)
        groups = -(-columns // self.group)
        xq = self.rng.integers(-127, 128, (self.rows, columns)).astype(np.int8)
        self.arrays["xq"] = xq
        value = self.graph.input("xq", xq.shape, "i8")
        return value, self.input("xs", np.abs(self.numbers(self.rows, groups)))

    def rounded(self) -> tuple[Value, ...]:
        """Activations as the op would have rounded them for a type of blocks, as inputs of the case."""
        self.type = self.draw(st.sampled_from(list(VEC_DOT_TYPE)))
        numbers = self.numbers(self.rows, self.columns())
        xq, xs, sums = quantize_activations(VEC_DOT_TYPE[self.type], numbers)
        self.arrays["xq"] = xq
        return self.graph.input("xq", xq.shape, "i8"), self.input("xs", xs), self.input("sums", sums)

    def linear(self, x: Value | tuple[Value, ...], name: str, kind: str | None = None) -> Value:
        if isinstance(x, tuple):
            attrs = {"group": self.group} if len(x) == 2 else {}
            return self.graph.add("linear", *x, self.matrix(name, x[0].shape[1]), out=f"{name}_out", **attrs)
        return self.graph.add("linear", x, self.matrix(name, x.shape[1], kind), out=f"{name}_out")

    def pair(self, x: Value | tuple[Value, ...]) -> Value:
        """The gate and the up projection have one height."""
        inputs = x if isinstance(x, tuple) else (x,)
        columns = inputs[0].shape[1]
        height, attrs = self.draw(SIZES), {"group": self.group} if len(inputs) == 2 else {}
        gate, up = (
            self.graph.add("linear", *inputs, self.weight(n, height, columns, kind=self.type), out=f"{n}_out", **attrs)
            for n in ("w1", "w3")
        )
        return self.graph.add("swiglu", gate, up, out="hidden")

    def heads(self) -> None:
        """The layout of a cache, and where each token of the run stands in it: no two at one place."""
        self.kv_heads, self.shared = self.draw(
            st.sampled_from([(1, 1), (1, 2), (1, 8), (2, 1), (2, 3), (3, 1), (2, 4)])
        )
        self.head_dim = self.draw(st.sampled_from([2, 4, 6, 8, 16, 18, 32, 48, 64, 66]))
        self.sequences, self.page = self.draw(st.integers(1, 3)), self.draw(st.sampled_from([1, 3, 4, 16, 32]))
        self.pages_per_sequence = self.draw(st.integers(1, 20 // self.page + 1))
        self.context = self.page * self.pages_per_sequence
        self.rows = min(self.rows, self.sequences * self.context)
        self.tokens = min(self.tokens, self.rows)
        places = self.rng.permutation(self.sequences * self.context)[: self.rows].astype(np.int32)
        self.positions = self.input("positions", places % self.context)
        self.sequence = self.input("sequences", places // self.context)
        table = shuffled_table(self.sequences, self.pages_per_sequence, self.draw(st.integers(0, 9)))
        self.states["page_table"] = table
        self.where = self.positions, self.sequence, self.graph.state("page_table", table.shape, "i32")
        self.interleaved = self.draw(st.integers(0, 1))
        self.window = self.draw(st.sampled_from([0, 0, 1, 2, 5, 100]))
        self.cache_type = self.draw(st.sampled_from(KV_TYPES))

    def cache(self, name: str) -> Value:
        shape = (1 + self.sequences * self.pages_per_sequence, self.kv_heads, self.page, self.head_dim)
        self.states[name] = in_cache(self.numbers(*shape), self.cache_type)
        return self.graph.state(name, shape, self.cache_type)

    def angles(self) -> Value:
        turns = self.rng.uniform(0, 2 * math.pi, (self.rows, self.head_dim // 2))
        return self.input("angles", np.concatenate([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32))

    def rope(self, x: Value, angles: Value) -> Value:
        return self.graph.add(
            "rope", x, angles, out=f"{x.name}_rope", head_dim=self.head_dim, interleaved=self.interleaved
        )

    def write(self, x: Value, name: str) -> Value:
        return self.graph.add("kv_write", x, self.cache(name), *self.where, out=f"{name}'")


Build = Callable[[Case], Graph]
CASES: dict[str, tuple[Build, tuple[str, ...]]] = {}
"""Kernel's name → how to draw a graph that lowers to it alone, and by which fusion passes."""


def case(name: str, *passes: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        CASES[name] = (build, passes)
        return build

    return register


@case("embedding")
def _(c: Case) -> Graph:
    table = c.matrix("table", c.columns())
    ids = c.input("ids", c.rng.integers(0, table.shape[0], c.rows).astype(np.int32))
    c.graph.add("embedding", ids, table, out="y")
    return c.done("y")


@case("rope_angles")
def _(c: Case) -> Graph:
    positions = c.input("positions", c.rng.integers(0, 200_000, c.rows).astype(np.int32))
    pairs = c.draw(st.integers(1, 33))
    theta = c.draw(st.sampled_from([1e4, 5e5]))
    frequencies = c.graph.constant("f", [theta ** (-i / pairs) for i in range(pairs)])
    c.graph.add("rope_angles", positions, frequencies, out="y", scale=c.draw(st.sampled_from([1.0, 0.75, 1.138])))
    return c.done("y")


@case("rmsnorm")
def _(c: Case) -> Graph:
    c.norm(c.x("x", c.rows, c.draw(SIZES)))
    return c.done("h")


@case("head_norm")
def _(c: Case) -> Graph:
    head_dim, eps = c.draw(SIZES), c.draw(st.sampled_from([0.0, 1e-6, 0.5]))
    x = c.x("x", c.rows, head_dim * c.draw(st.integers(1, 5)))
    return c.done(c.graph.add("head_norm", x, c.weight("norm", head_dim), out="y", eps=eps).name)


@case("quantize")
def _(c: Case) -> Graph:
    x = c.x("x", c.rows, c.draw(SIZES))
    c.arrays["x"][c.rng.random(c.rows) < 0.2] = 0
    c.graph.add("quantize", x, out=("q", "s"), group=c.group)
    return c.done("q", "s")


@case("linear")
def _(c: Case) -> Graph:
    return c.done(c.linear(c.x("x", c.rows, c.columns()), "w").name)


@case("linear_int8")
def _(c: Case) -> Graph:
    return c.done(c.linear(c.quantized(), "w").name)


@case("bias")
def _(c: Case) -> Graph:
    x = c.x("x", c.rows, c.draw(SIZES))
    return c.done(c.graph.add("bias", x, c.weight("b", x.shape[1]), out="y").name)


@case("rope")
def _(c: Case) -> Graph:
    c.heads()
    return c.done(c.rope(c.x("x", c.rows, c.kv_heads * c.head_dim), c.angles()).name)


@case("kv_write")
def _(c: Case) -> Graph:
    c.heads()
    c.write(c.x("x", c.rows, c.kv_heads * c.head_dim), "cache")
    return c.done()


@case("attention_scores")
def _(c: Case) -> Graph:
    c.heads()
    q = c.x("q", c.rows, c.kv_heads * c.shared * c.head_dim)
    c.graph.add("attention_scores", q, c.cache("k"), *c.where, out="y", window=c.window)
    return c.done("y")


@case("softmax")
def _(c: Case) -> Graph:
    x = c.x("x", c.rows, c.draw(st.integers(1, 5)), c.draw(SIZES))
    masked = c.rng.random(c.arrays["x"].shape) < c.draw(st.sampled_from([0, 0.5, 1]))
    masked[..., 0] = False  # a token always sees itself
    c.arrays["x"][masked] = -np.inf
    c.arrays["x"][c.rng.random(c.rows) < 0.2] = c.scale  # all equal
    c.graph.add("softmax", x, out="y")
    return c.done("y")


@case("attention_values")
def _(c: Case) -> Graph:
    c.heads()
    weights = np.abs(c.numbers(c.rows, c.kv_heads * c.shared, c.context))
    weights = c.input("weights", weights / weights.sum(axis=2, keepdims=True))
    c.graph.add("attention_values", weights, c.cache("v"), *c.where, out="y", window=c.window)
    return c.done("y")


@case("swiglu")
def _(c: Case) -> Graph:
    shape = c.rows, c.draw(SIZES)
    c.graph.add("swiglu", c.x("gate", *shape), c.x("up", *shape), out="y")
    return c.done("y")


@case("add")
def _(c: Case) -> Graph:
    shape = c.rows, c.draw(SIZES)
    c.graph.add("add", c.x("a", *shape), c.x("b", *shape), out="y")
    return c.done("y")


@case("rows")
def _(c: Case) -> Graph:
    x = c.x("x", c.rows, c.draw(SIZES))
    chosen = c.rng.integers(0, c.tokens, c.draw(st.integers(1, c.rows))).astype(np.int32)
    c.graph.add("rows", x, c.input("rows", chosen), out="y")
    return c.done("y")


@case("argmax")
def _(c: Case) -> Graph:
    x = c.x("x", c.rows, c.draw(SIZES))
    values = c.arrays["x"]
    if c.draw(st.booleans()):
        values[...] = np.round(values / c.scale)  # ties: the first wins
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    chosen = c.rng.random(values.shape) < c.draw(st.sampled_from([0, 0.1]))
    values[chosen] = c.rng.choice(special, chosen.sum())
    c.graph.add("argmax", x, out="y")
    return c.done("y")


@case("linear_add", "residual")
def _(c: Case) -> Graph:
    y = c.linear(c.x("x", c.rows, c.columns()), "w")
    c.graph.add("add", c.x("residual", *y.shape), y, out="y")
    return c.done("y")


@case("linear_add_int8", "residual")
def _(c: Case) -> Graph:
    y = c.linear(c.quantized(), "w")
    c.graph.add("add", c.x("residual", *y.shape), y, out="y")
    return c.done("y")


def _qkv_types(c: Case) -> Sequence[str]:
    """Mostly one type; files with a mixture exist too. Each mixture must be compiled, so only one is tested."""
    return c.draw(st.sampled_from([(c.type,) * 3, (c.type,) * 3, ("int8", "f32", "bf16")]))


@case("qkv", "qkv")
def _(c: Case) -> Graph:
    x = c.x("x", c.rows, c.columns())
    return c.done(*[c.linear(x, f"w{n}", kind).name for n, kind in zip("qkv", _qkv_types(c), strict=True)])


@case("qkv_int8", "qkv")
def _(c: Case) -> Graph:
    x = c.quantized()
    return c.done(*[c.linear(x, f"w{n}").name for n in "qkv"])


@case("gate_up", "gate_up")
def _(c: Case) -> Graph:
    return c.done(c.pair(c.x("x", c.rows, c.columns())).name)


@case("gate_up_int8", "gate_up")
def _(c: Case) -> Graph:
    return c.done(c.pair(c.quantized()).name)


@case("linear_blocks_int8")
def _(c: Case) -> Graph:
    return c.done(c.linear(c.rounded(), "w").name)


@case("linear_add_blocks_int8", "residual")
def _(c: Case) -> Graph:
    y = c.linear(c.rounded(), "w")
    c.graph.add("add", c.x("residual", *y.shape), y, out="y")
    return c.done("y")


@case("qkv_blocks_int8", "qkv")
def _(c: Case) -> Graph:
    x = c.rounded()
    return c.done(*[c.linear(x, f"w{n}").name for n in "qkv"])


@case("gate_up_blocks_int8", "gate_up")
def _(c: Case) -> Graph:
    return c.done(c.pair(c.rounded()).name)


def _rounding(c: Case, kind: str, most: int) -> Graph:
    """Numbers of any size, groups of zeros, ties, and numbers that are just as large as another's negative."""
    x = c.numbers(c.rows, most * c.draw(st.integers(1, 3)))
    ties = c.rng.integers(-254, 255, x.shape).astype(np.float32) / 2
    np.copyto(x, ties * c.scale, where=c.rng.random(x.shape[1]) < c.draw(st.sampled_from([0.0, 0.5, 1.0])))
    groups = x.reshape(c.rows, -1, 32)
    groups[c.rng.random(groups.shape[:2]) < 0.2] = 0
    c.graph.add(f"quantize_{kind}", c.input("x", x), out=("q", "s", "sums"))
    return c.done("q", "s", "sums")


for _kind, _most in (("q8_0", 32), ("q8_1", 32), ("q8_k", 256)):
    case(f"quantize_{_kind}")(partial(_rounding, kind=_kind, most=_most))


@case("norm_linear", "norm")
def _(c: Case) -> Graph:
    return c.done(c.linear(c.norm(c.x("x", c.rows, c.columns())), "w").name)


@case("norm_qkv", "qkv", "norm")
def _(c: Case) -> Graph:
    h = c.norm(c.x("x", c.rows, c.columns()))
    return c.done(*[c.linear(h, f"w{n}", kind).name for n, kind in zip("qkv", _qkv_types(c), strict=True)])


@case("norm_gate_up", "gate_up", "norm")
def _(c: Case) -> Graph:
    return c.done(c.pair(c.norm(c.x("x", c.rows, c.columns()))).name)


def _layer(c: Case) -> tuple[Value, Value, Value]:
    """RoPE and writes as a model has them: (rotated q, k cache, v cache)."""
    c.heads()
    if c.cache_type == "q8_0":  # written op by op
        c.cache_type = "f16"
    angles = c.angles()
    width = c.kv_heads * c.head_dim
    q, k, v = c.x("q", c.rows, width * c.shared), c.x("k", c.rows, width), c.x("v", c.rows, width)
    q, k = c.rope(q, angles), c.rope(k, angles)
    return q, c.write(k, "k_cache"), c.write(v, "v_cache")


@case("rope_kv_write", "rope_kv")
def _(c: Case) -> Graph:
    q, k_cache, _ = _layer(c)
    # the pass starts from the scores; the comparison below is of every step, so they do no harm
    c.graph.add("attention_scores", q, k_cache, *c.where, out="scores", window=c.window)
    return c.done("scores")


@case("attention", "attention")
def _(c: Case) -> Graph:
    c.heads()
    c.scale = min(
        c.scale, np.float32(4)
    )  # scores of 1e8 are known to a few units only: their exponentials mean nothing
    q = c.x("q", c.rows, c.kv_heads * c.shared * c.head_dim)
    scores = c.graph.add("attention_scores", q, c.cache("k"), *c.where, out="scores", window=c.window)
    p = c.graph.add("softmax", scores, out="p")
    c.graph.add("attention_values", p, c.cache("v"), *c.where, out="y", window=c.window)
    return c.done("y")


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
