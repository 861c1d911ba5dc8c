"""The intermediate representation: what every op's rule gives and refuses, and what `verify` finds in a broken
graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from numballama import ir, kernels_cpu  # noqa: F401  (fills the registry)
from numballama.errors import Error
from numballama.graph import fuse
from numballama.ir import Graph, Op, Value, verify
from numballama.quantization.types import VEC_DOT_TYPE

Operand = tuple[tuple[int, ...], str]
T, D, K, N, S, H, KV, C, P = 3, 8, 6, 5, 2, 4, 2, 7, 4  # KV heads of size P; q has H heads
CACHE: Operand = ((S, KV, C, P), "f16")
IDS: Operand = ((T,), "i32")
CASES: dict[str, tuple[list[Operand], dict[str, Any], list[Operand]]] = {
    "embedding": ([IDS, ((9, D), "int8")], {}, [((T, D), "f32")]),
    "rope_angles": ([IDS, ((P // 2,), "f32")], {}, [((T, P), "f32")]),
    "rmsnorm": ([((T, D), "f32"), ((D,), "f32")], {"eps": 1e-5}, [((T, D), "f32")]),
    "head_norm": ([((T, H * P), "f32"), ((P,), "f32")], {"eps": 1e-6}, [((T, H * P), "f32")]),
    "quantize": ([((T, D), "f32")], {"group": 3}, [((T, D), "i8"), ((T, 3), "f32")]),
    "quantize_q8_0": ([((T, 64), "f32")], {}, [((T, 64), "i8"), ((T, 2), "f32"), ((T, 2), "i32")]),
    "quantize_q8_1": ([((T, 64), "f32")], {}, [((T, 64), "i8"), ((T, 2), "f32"), ((T, 2), "f32")]),
    "quantize_q8_k": ([((T, 512), "f32")], {}, [((T, 512), "i8"), ((T, 2), "f32"), ((T, 32), "i32")]),
    "linear": ([((T, K), "f32"), ((N, K), "bf16")], {}, [((T, N), "f32")]),
    "bias": ([((T, N), "f32"), ((N,), "f32")], {}, [((T, N), "f32")]),
    "rope": ([((T, H * P), "f32"), ((T, P), "f32")], {"head_dim": P, "interleaved": 1}, [((T, H * P), "f32")]),
    "kv_write": ([((T, KV * P), "f32"), CACHE, IDS, IDS], {}, [CACHE]),
    "attention_scores": ([((T, H * P), "f32"), CACHE, IDS, IDS], {"window": 3}, [((T, H, C), "f32")]),
    "softmax": ([((T, H, C), "f32")], {}, [((T, H, C), "f32")]),
    "attention_values": ([((T, H, C), "f32"), CACHE, IDS, IDS], {"window": 0}, [((T, H * P), "f32")]),
    "swiglu": ([((T, N), "f32"), ((T, N), "f32")], {}, [((T, N), "f32")]),
    "add": ([((T, N), "f32"), ((T, N), "f32")], {}, [((T, N), "f32")]),
    "last": ([((T, D), "f32")], {}, [((1, D), "f32")]),
    "argmax": ([((T, N), "f32")], {}, [((T,), "i32")]),
}
REFUSED: list[tuple[str, list[Operand], dict[str, Any]]] = [
    ("embedding", [((T,), "f32"), ((9, D), "f32")], {}),
    ("embedding", [((T, 1), "i32"), ((9, D), "f32")], {}),
    ("embedding", [IDS, ((9,), "f32")], {}),
    ("embedding", [IDS], {}),
    ("rope_angles", [((T,), "f32"), ((2,), "f32")], {}),
    ("rope_angles", [IDS, ((2, 2), "f32")], {}),
    ("rmsnorm", [((T, D), "f32"), ((D + 1,), "f32")], {"eps": 1e-5}),
    ("rmsnorm", [((T, D), "i8"), ((D,), "f32")], {"eps": 1e-5}),
    ("rmsnorm", [((T, D), "f32"), ((D,), "f32")], {"eps": -1.0}),
    ("rmsnorm", [((T, D), "f32"), ((D,), "f32")], {}),
    ("quantize", [((T, D), "f32")], {"group": 0}),
    ("quantize", [((T, D), "f32")], {}),
    ("quantize", [((T, D), "i8")], {"group": 4}),
    ("quantize", [((T,), "f32")], {"group": 4}),
    ("quantize_q8_0", [((T, 33), "f32")], {}),
    ("quantize_q8_0", [((64,), "f32")], {}),
    ("quantize_q8_1", [((T, 64), "i8")], {}),
    ("quantize_q8_k", [((T, 64), "f32")], {}),
    ("linear", [((T, 64), "i8"), ((T, 2), "f32"), ((T, 2), "i32"), ((N, 64), "q4_1")], {}),
    ("linear", [((T, 64), "i8"), ((T, 2), "f32"), ((T, 2), "f32"), ((N, 64), "q4_0")], {}),
    ("linear", [((T, 64), "i8"), ((T, 1), "f32"), ((T, 2), "i32"), ((N, 64), "q8_0")], {}),
    ("linear", [((T, 512), "i8"), ((T, 16), "f32"), ((T, 16), "i32"), ((N, 512), "q4_k")], {}),
    ("linear", [((T, 64), "i8"), ((T, 2), "f32"), ((T, 2), "i32"), ((N, 64), "f16")], {}),
    ("linear", [((T, 64), "f32"), ((T, 2), "f32"), ((T, 2), "i32"), ((N, 64), "q8_0")], {}),
    ("linear", [((T, K), "f32"), ((N, K + 1), "f32")], {}),
    ("linear", [((T, K), "f32"), ((N,), "f32")], {}),
    ("linear", [((T, K), "i8"), ((N, K), "int8")], {"group": 3}),
    ("linear", [((T, K), "i8"), ((T, 3), "f32"), ((N, K), "int8")], {"group": 3}),
    ("linear", [((T, K), "f32"), ((T, 2), "f32"), ((N, K), "int8")], {"group": 3}),
    ("bias", [((T, N), "f32"), ((N + 1,), "f32")], {}),
    ("bias", [((T, N), "i32"), ((N,), "f32")], {}),
    ("rope", [((T, H * P + 1), "f32"), ((T, P), "f32")], {"head_dim": P, "interleaved": 1}),
    ("rope", [((T, H * P), "f32"), ((T, P + 2), "f32")], {"head_dim": P, "interleaved": 1}),
    ("rope", [((T, H * P), "f32"), ((T + 1, P), "f32")], {"head_dim": P, "interleaved": 1}),
    ("kv_write", [((T, KV * P + 1), "f32"), CACHE, IDS, IDS], {}),
    ("kv_write", [((T, KV * P), "f32"), ((KV, C, P), "f32"), IDS, IDS], {}),
    ("kv_write", [((T, KV * P), "f32"), CACHE, ((T + 1,), "i32"), IDS], {}),
    ("kv_write", [((T, KV * P), "f32"), CACHE, IDS, ((1,), "i32")], {}),
    ("head_norm", [((T, H * P), "f32"), ((P + 1,), "f32")], {"eps": 1e-6}),
    ("head_norm", [((T, H, P), "f32"), ((P,), "f32")], {"eps": 1e-6}),
    ("head_norm", [((T, H * P), "f32"), ((P,), "f32")], {}),
    ("attention_scores", [((T, 3 * P), "f32"), CACHE, IDS, IDS], {"window": 0}),
    ("attention_scores", [((T, H * P + 1), "f32"), CACHE, IDS, IDS], {"window": 0}),
    ("attention_scores", [((T, H * P), "f32"), CACHE, IDS, IDS], {}),
    ("attention_scores", [((T, H * P), "f32"), CACHE, IDS, IDS], {"window": -1}),
    ("attention_values", [((T, H, C + 1), "f32"), CACHE, IDS, IDS], {"window": 0}),
    ("attention_values", [((T, H, C), "f32"), CACHE, IDS, IDS], {"window": -1}),
    ("swiglu", [((T, N), "f32"), ((T, N + 1), "f32")], {}),
    ("add", [((T, N), "f32"), ((1, N), "f32")], {}),
    ("softmax", [], {}),
    ("last", [((T,), "f32")], {}),
    ("argmax", [], {}),
]


OUTPUTS = {kind: len(results) for kind, (_, _, results) in CASES.items()}


def declare(graph: Graph, operands: Sequence[Operand]) -> list[Value]:
    """Each operand by what may hold it: 16-bit rank 4 is a cache, other types only weights have, or an input."""
    kinds = {4: graph.state, 2: graph.weight}
    return [
        (kinds.get(len(shape), graph.input) if dtype not in ir.DTYPES or dtype == "f16" else graph.input)(
            f"x{i}", shape, dtype
        )
        for i, (shape, dtype) in enumerate(operands)
    ]


def test_every_rule_has_a_case() -> None:
    rules = {
        kind for kind, rule in ir.RULES.items() if rule.__module__ != "numballama.bench"
    }  # its probe is no model's op
    assert set(CASES) == rules
    assert {kind for kind, _, _ in REFUSED} == rules


@pytest.mark.parametrize("kind", CASES)
def test_rule_infers(kind: str) -> None:
    operands, attrs, results = CASES[kind]
    graph = Graph("one")
    names = [f"y{i}" for i in range(len(results))]
    got = graph.add(kind, *declare(graph, operands), out=names, **attrs)
    assert [(value.shape, value.dtype) for value in got] == results
    assert [value.name for value in got] == names
    aliased = kind == "kv_write"
    assert all((value.kind, value.alias) == (("state", "x1") if aliased else ("temp", None)) for value in got)
    assert all(graph.values[value.name] is value for value in got)
    graph.outputs = names
    verify(graph)


@pytest.mark.parametrize(("kind", "operands", "attrs"), REFUSED)
def test_rule_refuses(kind: str, operands: list[Operand], attrs: dict[str, Any]) -> None:
    graph = Graph("one")
    inputs = declare(graph, operands)
    count = len(graph.values)
    with pytest.raises(Error, match=kind):
        graph.add(kind, *inputs, out=["y", "z", "s"][: OUTPUTS.get(kind, 1)], **attrs)
    assert not graph.ops and len(graph.values) == count, "a refused op leaves no trace"


def test_linear_of_int8_activations() -> None:
    graph = Graph("int8")
    x = graph.input("x", (T, 10), "f32")
    q, s = graph.add("quantize", x, out=("q", "s"), group=4)
    y = graph.add("linear", q, s, graph.weight("w", (N, 10), "int8"), out="y", group=4)
    assert (y.shape, y.dtype) == ((T, N), "f32")
    verify(graph)


@pytest.mark.parametrize("kind", VEC_DOT_TYPE)
def test_linear_of_blocks_and_rounded_activations(kind: str) -> None:
    graph = Graph("blocks")
    x = graph.input("x", (T, 512), "f32")
    rounded = graph.add(f"quantize_{VEC_DOT_TYPE[kind]}", x, out=("q", "s", "sums"))
    y = graph.add("linear", *rounded, graph.weight("w", (N, 512), kind), out="y")
    assert (y.shape, y.dtype) == ((T, N), "f32")
    verify(graph)


def test_add_returns_one_value_or_a_tuple() -> None:
    graph = Graph("add")
    x = graph.input("x", (T, 10), "f32")
    assert isinstance(graph.add("softmax", x, out="y"), Value)
    assert isinstance(graph.add("quantize", x, out=("q", "s"), group=4), tuple)
    with pytest.raises(Error, match="2 outputs, 1 are named"):
        graph.add("quantize", x, out="z", group=4)


def test_unknown_op_names_the_known() -> None:
    graph = Graph("unknown")
    with pytest.raises(Error, match=r"unknown op convolve; known: add, argmax"):
        graph.add("convolve", graph.input("x", (1,), "f32"), out="y")


@pytest.mark.parametrize("again", ["input", "state", "weight", "constant", "op"])
def test_single_assignment(again: str) -> None:
    graph = Graph("twice")
    x = graph.input("x", (2, 3), "f32")
    declarations: dict[str, Callable[[], object]] = {
        "input": lambda: graph.input("x", (2, 3), "f32"),
        "state": lambda: graph.state("x", (2, 3), "f32"),
        "weight": lambda: graph.weight("x", (2, 3), "f32"),
        "constant": lambda: graph.constant("x", [1.0]),
        "op": lambda: graph.add("softmax", x, out="x"),
    }
    with pytest.raises(Error, match="x is assigned twice"):
        declarations[again]()


def test_a_weight_may_be_asked_for_again_but_not_as_another() -> None:
    graph = Graph("tied")
    table = graph.weight("table", (9, 4), "f32")
    assert graph.weight("table", (9, 4), "f32") is table
    for shape, dtype in (((9, 5), "f32"), ((9, 4), "f16")):
        with pytest.raises(Error, match="table is assigned twice"):
            graph.weight("table", shape, dtype)


# verify: each of these graphs was made well formed by `add`, then broken by hand


def model() -> Graph:
    """A cache, written and read, and something after it."""
    graph = Graph("model")
    x, p, s = graph.input("x", (T, KV * P), "f32"), graph.input("p", (T,), "i32"), graph.input("s", (T,), "i32")
    cache = graph.state("cache", *CACHE)
    h = graph.add("rmsnorm", x, graph.weight("w", (KV * P,), "f32"), out="h", eps=0.0)
    cache = graph.add("kv_write", h, cache, p, s, out="cache'")
    scores = graph.add("attention_scores", h, cache, p, s, out="scores", window=0)
    graph.outputs = [graph.add("softmax", scores, out="y").name]
    verify(graph)
    return graph


def edit(graph: Graph, index: int, **changes: Any) -> None:
    graph.ops[index] = replace(graph.ops[index], **changes)


def test_verify_use_before_definition() -> None:
    graph = model()
    graph.ops[2], graph.ops[3] = graph.ops[3], graph.ops[2]
    with pytest.raises(Error, match="softmax: input scores is not defined before its use"):
        verify(graph)
    graph = model()
    edit(graph, 3, inputs=("nothing",))
    with pytest.raises(Error, match="input nothing is not defined"):
        verify(graph)
    graph = model()
    edit(graph, 2, inputs=("h", "cache'", "p", "s"))
    del graph.ops[1]
    with pytest.raises(Error, match="cache' is not defined"):
        verify(graph)


def test_verify_double_assignment() -> None:
    graph = model()
    graph.ops.append(graph.ops[-1])
    with pytest.raises(Error, match="y is assigned twice"):
        verify(graph)


def test_verify_stale_state() -> None:
    graph = model()
    edit(graph, 2, inputs=("h", "cache", "p", "s"))
    with pytest.raises(Error, match="reads cache, which cache' has updated"):
        verify(graph)


@pytest.mark.parametrize(
    "wrong",
    [{"shape": (T, H, C)}, {"dtype": "f16"}, {"kind": "input"}, {"alias": "cache"}],
    ids=lambda w: next(iter(w)),
)
def test_verify_declaration_that_is_not_what_the_op_gives(wrong: Mapping[str, Any]) -> None:
    graph = model()
    graph.values["scores"] = replace(graph.values["scores"], **wrong)
    with pytest.raises(Error, match="scores" if "kind" in wrong else "declared scores"):
        verify(graph)


def test_verify_undeclared_value() -> None:
    graph = model()
    del graph.values["scores"]
    with pytest.raises(Error, match="declared None, is scores"):
        verify(graph)


def test_verify_outputs_are_computed() -> None:
    graph = model()
    graph.outputs.append("z")
    with pytest.raises(Error, match="z"):
        verify(graph)


def test_verify_constants() -> None:
    graph = model()
    graph.constant("c", [1.0, 2.0])
    graph.constants["c"] = [1.0]
    with pytest.raises(Error, match="constant c has 1 numbers"):
        verify(graph)


def fused() -> Graph:
    graph = Graph("fused")
    x, residual = graph.input("x", (T, D), "f32"), graph.input("r", (T, D), "f32")
    y = graph.add("linear", x, graph.weight("w", (D, D), "f32"), out="y")
    graph.outputs = [graph.add("add", residual, y, out="z").name]
    result = fuse(graph, "cpu", ["residual"])
    assert [op.kind for op in result.ops] == ["linear_add"]
    verify(result)
    return result


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda body: body[:1], "does not compute"),
        (lambda body: body[1:], "input y is not defined"),
        (lambda body: (body[1], body[0]), "input y is not defined"),
        (lambda body: (replace(body[0], kind="swiglu"), body[1]), "swiglu"),
        (lambda body: (body[0], Op("argmax", ("y",), ("z",))), "declared z"),
        (lambda body: (body[0], Op("nonsense", ("r", "y"), ("z",))), "unknown op"),
        (lambda body: (replace(body[0], inputs=("x", "other")), body[1]), "other is not defined"),
    ],
)
def test_verify_body_of_a_fused_op(body: Callable[[tuple[Op, ...]], tuple[Op, ...]], message: str) -> None:
    graph = fused()
    edit(graph, 0, body=body(graph.ops[0].body))
    with pytest.raises(Error, match=message):
        verify(graph)


def test_verify_fused_op_without_body() -> None:
    graph = fused()
    edit(graph, 0, body=())
    with pytest.raises(Error, match="unknown op linear_add"):
        verify(graph)


# The rest


def test_printed_form() -> None:
    assert str(model()) == "\n".join([
        "graph model",
        "  input    x: f32[3, 8]",
        "  input    p: i32[3]",
        "  input    s: i32[3]",
        "  state    cache: f16[2, 2, 7, 4]",
        "  weight   w: f32[8]",
        "  state    cache': f16[2, 2, 7, 4]",
        "     0 rmsnorm          (x, w) eps=0.0 → h: f32[3, 8]",
        "     1 kv_write         (h, cache, p, s) → cache': f16[2, 2, 7, 4]",
        "     2 attention_scores (h, cache', p, s) window=0 → scores: f32[3, 2, 7]",
        "     3 softmax          (scores) → y: f32[3, 2, 7]",
        "  outputs  y",
    ])  # fmt: skip
    assert repr(model()) == "<Graph model: 4 ops, 9 values>"
    assert str(model().ops[0]) == "h = rmsnorm(x, w) {eps=0.0}"
    assert str(Graph("empty")) == "graph empty\n  outputs  "


def test_bytes_of_a_value() -> None:
    for dtype, size in {"f32": 4, "f16": 2, "bf16": 2, "i8": 1, "i32": 4}.items():
        assert Value("x", (3, 5), dtype, "temp").nbytes == 15 * size == np.zeros((3, 5), ir.DTYPES[dtype]).nbytes


def test_consumers_and_root() -> None:
    graph = model()
    readers = graph.consumers()
    assert [op.kind for op in readers["h"]] == ["kv_write", "attention_scores"]
    assert [op.kind for op in readers["cache'"]] == ["attention_scores"]
    assert readers["y"] == []
    again = graph.add("kv_write", graph.values["h"], graph.values["cache'"], *graph.operands("ps"), out="cache''")
    assert graph.root(again.name) == graph.root("cache'") == "cache"
    assert graph.root("h") == "h"
    twice = graph.add("add", graph.values["y"], graph.values["y"], out="2y")
    assert len(graph.consumers()["y"]) == 1 and twice.name == "2y", "an op that reads a value twice reads it once"


def test_replace_ops_drops_what_is_not_computed() -> None:
    graph = model()
    shorter = graph.replace_ops(graph.ops[:1])
    assert "h" in shorter.values and "scores" not in shorter.values and "x" in shorter.values
    assert "scores" in graph.values and len(graph.ops) == 4, "the graph itself is left as it was"
