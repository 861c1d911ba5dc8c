"""Graphs of one operator, or of those that a fusion joins, with random shapes, types and data: one for each kernel.

Kernels of the CPU and of CUDA are compared with the reference on these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from hypothesis import strategies as st

from numballama.checkpoint import Weight
from numballama.ir import Graph, Value
from numballama.quantization.activations import quantize_activations
from numballama.quantization.types import BLOCKS, KV_TYPES, LINEAR_TYPES, VEC_DOT_TYPE
from tests.helpers.bounds import as_weight
from tests.helpers.paging import in_cache, shuffled_table

SIZES = st.one_of(
    st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 96, 100, 127, 128, 130, 160, 172, 192, 256])
)
GROUPS = st.sampled_from([1, 3, 32, 64, 96, 100, 128])


class Case:
    """A graph under construction with the data of its operands, drawn as it grows."""

    def __init__(self, draw: st.DrawFn) -> None:
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
