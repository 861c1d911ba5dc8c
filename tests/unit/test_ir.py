"""The intermediate representation: how a graph is built, and which mistakes `verify` finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import numballama.cpu.ops  # noqa: F401 (registers the kernels)
from numballama import ir
from numballama.errors import Error
from numballama.fusion import fuse
from numballama.ir import Graph, Op, Value, verify

Operand = tuple[tuple[int, ...], str]
T, D, K, N, S, H, KV, C, P = 3, 8, 6, 5, 2, 4, 2, 7, 4  # KV heads of size P; q has H heads
CACHE: Operand = ((S, KV, C, P), "f16")
IDS: Operand = ((T,), "i32")


def test_add_returns_one_value_or_a_tuple() -> None:
    graph = Graph("add")
    x = graph.input("x", (T, 10), "f32")
    assert isinstance(graph.add("softmax", x, out="y"), Value)
    assert isinstance(graph.add("quantize", x, out=("q", "s"), group=4), tuple)
    with pytest.raises(Error, match="2 outputs, 1 are named"):
        graph.add("quantize", x, out="z", group=4)


def test_unknown_op_names_the_known() -> None:
    graph = Graph("unknown")
    with pytest.raises(Error, match=r"unknown op convolve; known: add, all_gather, all_reduce, argmax"):
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
    cache, table = graph.state("cache", *CACHE), graph.state("t", (2, 3), "i32")
    h = graph.add("rmsnorm", x, graph.weight("w", (KV * P,), "f32"), out="h", eps=0.0)
    cache = graph.add("kv_write", h, cache, p, s, table, out="cache'")
    scores = graph.add("attention_scores", h, cache, p, s, table, out="scores", window=0)
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
    with pytest.raises(Error, match="constant c has 1 elements"):
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


def test_verify_attributes_of_a_fused_op() -> None:
    """An attribute of its body that the fused op's rule does not name would reach no kernel."""
    graph = fused()
    edit(graph, 0, attrs={"group": 4})
    verify(graph)
    edit(graph, 0, attrs={"window": 4})
    with pytest.raises(Error, match=r"linear_add has no attribute window; its attributes are \(group\)"):
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
        "  state    t: i32[2, 3]",
        "  weight   w: f32[8]",
        "  state    cache': f16[2, 2, 7, 4]",
        "     0 rmsnorm          (x, w) eps=0.0 → h: f32[3, 8]",
        "     1 kv_write         (h, cache, p, s, t) → cache': f16[2, 2, 7, 4]",
        "     2 attention_scores (h, cache', p, s, t) window=0 → scores: f32[3, 2, 21]",
        "     3 softmax          (scores) → y: f32[3, 2, 21]",
        "  outputs  y",
    ])  # fmt: skip
    assert repr(model()) == "<Graph model: 4 ops, 10 values>"
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
    again = graph.add("kv_write", graph.values["h"], graph.values["cache'"], *graph.operands("pst"), out="cache''")
    assert graph.root(again.name) == graph.root("cache'") == "cache"
    assert graph.root("h") == "h"
    twice = graph.add("add", graph.values["y"], graph.values["y"], out="2y")
    assert len(graph.consumers()["y"]) == 1 and twice.name == "2y", "an op that reads a value twice reads it once"


def test_replace_ops_drops_what_is_not_computed() -> None:
    graph = model()
    shorter = graph.replace_ops(graph.ops[:1])
    assert "h" in shorter.values and "scores" not in shorter.values and "x" in shorter.values
    assert "scores" in graph.values and len(graph.ops) == 4, "the graph itself is left as it was"


# Rules: names and in-place operands


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the rules that a test declares."""
    monkeypatch.setattr(ir, "RULES", dict(ir.RULES))


def same_shape(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[ir.Shaped]:
    return [(inputs[0].shape, inputs[0].dtype)]


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, r"rule of sub names no inputs; declare them like this: @rule\('sub', inputs=\('x', 'weight'\)"),
        ({"inputs": "ab"}, "names no inputs"),
        ({"inputs": ("a", "b"), "outputs": ()}, "names no outputs"),
        ({"inputs": ("a", "a")}, "has a twice"),
        ({"inputs": ("a", "b"), "outputs": ("a",)}, "has a twice"),
        ({"inputs": ("a",), "attrs": ("out",)}, "has out twice"),
        ({"inputs": ("a",), "inplace": {"out": "b"}}, r"output out updates input b; outputs are \(out\), inputs \(a\)"),
        ({"inputs": ("a",), "inplace": {"y": "a"}}, "output y updates input a"),
        ({"inputs": ("a",), "attrs": ("by",), "optional": ("on",)}, r"optional names on; its attributes are \(by\)"),
    ],
)
def test_a_rule_without_proper_names_is_refused(names: Mapping[str, Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        ir.rule("sub", **names)(same_shape)
    assert "sub" not in ir.RULES


@pytest.mark.usefixtures("own_rules")
def test_inputs_may_be_given_by_position() -> None:
    ir.rule("sub", ("a", "b"))(same_shape)
    assert ir.RULES["sub"].inputs == (("a", "b"),) and ir.RULES["sub"].outputs == ("out",)


@pytest.mark.usefixtures("own_rules")
def test_a_rule_is_held_to_its_names() -> None:
    ir.rule("scale", inputs=("x",), attrs=("by",))(same_shape)
    graph = Graph("scale")
    x = graph.input("x", (2,), "f32")
    with pytest.raises(Error, match=r"scale takes \(x\), found 2 inputs"):
        graph.add("scale", x, x, out="y")
    with pytest.raises(Error, match=r"has no attribute time; its attributes are \(by\)"):
        graph.add("scale", x, out="y", time=2.0)
    graph.add("scale", x, out="y", by=2.0)


@pytest.mark.usefixtures("own_rules")
def test_an_in_place_op_of_a_user_is_seen_as_one() -> None:
    """Its result shares the state's memory, and `verify` finds a read of the state as it was before."""
    ir.rule("accumulate", inputs=("total", "x"), inplace={"out": "total"})(same_shape)
    graph = Graph("running sum")
    x, total = graph.input("x", (4,), "f32"), graph.state("total", (4,), "f32")
    after = graph.add("accumulate", total, x, out="total'")
    assert (after.kind, after.alias, graph.root("total'")) == ("state", "total", "total")
    graph.outputs = [graph.add("add", after, x, out="y").name]
    verify(graph)
    graph.ops[1] = replace(graph.ops[1], inputs=("total", "x"))
    with pytest.raises(Error, match="reads total, which total' has updated"):
        verify(graph)


@pytest.mark.usefixtures("own_rules")
def test_in_place_wants_a_state_of_the_same_shape() -> None:
    ir.rule("accumulate", inputs=("total", "x"), inplace={"out": "total"})(same_shape)
    ir.rule("grow", inputs=("total",), inplace={"out": "total"})(lambda inputs, attrs: [((9,), "f32")])
    graph = Graph("no state")
    x = graph.input("x", (4,), "f32")
    with pytest.raises(Error, match=r"updates x: f32\[4\] in place, which must be a state and is of kind input"):
        graph.add("accumulate", x, x, out="y")
    with pytest.raises(Error, match=r"output out must be f32\[4\], found f32\[9\]"):
        graph.add("grow", graph.state("s", (4,), "f32"), out="s'")
