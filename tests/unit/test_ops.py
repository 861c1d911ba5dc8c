"""The rule of every op: shapes for operands that fit, and errors for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from numballama import ir, ops
from numballama.errors import Error
from numballama.ir import Graph, Value, verify
from numballama.quantization.types import VEC_DOT_TYPE

Operand = tuple[tuple[int, ...], str]
T, D, K, N, S, H, KV, C, P = 3, 8, 6, 5, 2, 4, 2, 7, 4  # KV heads of size P; q has H heads
CACHE: Operand = ((S, KV, C, P), "f16")  # S pages of C tokens
IDS: Operand = ((T,), "i32")
TABLE: Operand = ((3, 2), "i32")
EXCHANGE: Operand = ((2, 13), "f32")  # of two ranks
ARRIVALS: Operand = ((2, 1, ops.CELL), "i32")
STATES = {"kv_write": ["x1"], "all_reduce": [None, "x1", "x2"], "all_gather": [None, "x1", "x2"]}
"""Op → the state that each of its outputs updates. Outputs of others are new values."""
CASES: dict[str, tuple[list[Operand], dict[str, Any], list[Operand]]] = {
    "embedding": ([IDS, ((9, D), "int8")], {}, [((T, D), "f32")]),
    "rope_angles": ([IDS, ((P // 2,), "f32")], {"scale": 1.0}, [((T, P), "f32")]),
    "rmsnorm": ([((T, D), "f32"), ((D,), "f32")], {"eps": 1e-5}, [((T, D), "f32")]),
    "head_norm": ([((T, H * P), "f32"), ((P,), "f32")], {"eps": 1e-6}, [((T, H * P), "f32")]),
    "quantize": ([((T, D), "f32")], {"group": 3}, [((T, D), "i8"), ((T, 3), "f32")]),
    "quantize_q8_0": ([((T, 64), "f32")], {}, [((T, 64), "i8"), ((T, 2), "f32"), ((T, 2), "i32")]),
    "quantize_q8_1": ([((T, 64), "f32")], {}, [((T, 64), "i8"), ((T, 2), "f32"), ((T, 2), "f32")]),
    "quantize_q8_k": ([((T, 512), "f32")], {}, [((T, 512), "i8"), ((T, 2), "f32"), ((T, 32), "i32")]),
    "linear": ([((T, K), "f32"), ((N, K), "bf16")], {}, [((T, N), "f32")]),
    "bias": ([((T, N), "f32"), ((N,), "f32")], {}, [((T, N), "f32")]),
    "rope": ([((T, H * P), "f32"), ((T, P), "f32")], {"head_dim": P, "interleaved": 1}, [((T, H * P), "f32")]),
    "kv_write": ([((T, KV * P), "f32"), CACHE, IDS, IDS, TABLE], {}, [CACHE]),
    "attention_scores": ([((T, H * P), "f32"), CACHE, IDS, IDS, TABLE], {"window": 3}, [((T, H, 2 * C), "f32")]),
    "softmax": ([((T, H, C), "f32")], {}, [((T, H, C), "f32")]),
    "attention_values": ([((T, H, 2 * C), "f32"), CACHE, IDS, IDS, TABLE], {"window": 0}, [((T, H * P), "f32")]),
    "swiglu": ([((T, N), "f32"), ((T, N), "f32")], {}, [((T, N), "f32")]),
    "add": ([((T, N), "f32"), ((T, N), "f32")], {}, [((T, N), "f32")]),
    "rows": ([((T, D), "f32"), ((2,), "i32")], {}, [((2, D), "f32")]),
    "all_reduce": ([((T, N), "f32"), EXCHANGE, ARRIVALS], {"rank": 1}, [((T, N), "f32"), EXCHANGE, ARRIVALS]),
    "all_gather": (
        [((T, N), "f32"), EXCHANGE, ARRIVALS],
        {"rank": 1, "begin": 3, "columns": N + 4},
        [((T, N + 4), "f32"), EXCHANGE, ARRIVALS],
    ),
    "argmax": ([((T, N), "f32")], {}, [((T,), "i32")]),
}
REFUSED: list[tuple[str, list[Operand], dict[str, Any]]] = [
    ("embedding", [((T,), "f32"), ((9, D), "f32")], {}),
    ("embedding", [((T, 1), "i32"), ((9, D), "f32")], {}),
    ("embedding", [IDS, ((9,), "f32")], {}),
    ("embedding", [IDS], {}),
    ("rope_angles", [((T,), "f32"), ((2,), "f32")], {"scale": 1.0}),
    ("rope_angles", [IDS, ((2, 2), "f32")], {"scale": 1.0}),
    ("rope_angles", [IDS, ((2,), "f32")], {"scale": 0.0}),
    ("rope_angles", [IDS, ((2,), "f32")], {}),
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
    ("kv_write", [((T, KV * P + 1), "f32"), CACHE, IDS, IDS, TABLE], {}),
    ("kv_write", [((T, KV * P), "f32"), ((KV, C, P), "f32"), IDS, IDS, TABLE], {}),
    ("kv_write", [((T, KV * P), "f32"), CACHE, ((T + 1,), "i32"), IDS, TABLE], {}),
    ("kv_write", [((T, KV * P), "f32"), CACHE, IDS, ((1,), "i32"), TABLE], {}),
    ("kv_write", [((T, KV * P), "f32"), CACHE, IDS, IDS, IDS], {}),
    ("attention_scores", [((T, H * P), "f32"), CACHE, IDS, IDS, ((3, 2), "f32")], {"window": 0}),
    ("head_norm", [((T, H * P), "f32"), ((P + 1,), "f32")], {"eps": 1e-6}),
    ("head_norm", [((T, H, P), "f32"), ((P,), "f32")], {"eps": 1e-6}),
    ("head_norm", [((T, H * P), "f32"), ((P,), "f32")], {}),
    ("attention_scores", [((T, 3 * P), "f32"), CACHE, IDS, IDS, TABLE], {"window": 0}),
    ("attention_scores", [((T, H * P + 1), "f32"), CACHE, IDS, IDS, TABLE], {"window": 0}),
    ("attention_scores", [((T, H * P), "f32"), CACHE, IDS, IDS, TABLE], {}),
    ("attention_scores", [((T, H * P), "f32"), CACHE, IDS, IDS, TABLE], {"window": -1}),
    ("attention_values", [((T, H, C + 1), "f32"), CACHE, IDS, IDS, TABLE], {"window": 0}),
    ("attention_values", [((T, H, 2 * C), "f32"), CACHE, IDS, IDS, TABLE], {"window": -1}),
    ("swiglu", [((T, N), "f32"), ((T, N + 1), "f32")], {}),
    ("add", [((T, N), "f32"), ((1, N), "f32")], {}),
    ("softmax", [], {}),
    ("rows", [((T, D), "f32"), ((2,), "f32")], {}),
    ("rows", [((T, D), "f32"), ((2, 1), "i32")], {}),
    ("all_reduce", [((T, 7), "f32"), EXCHANGE, ARRIVALS], {"rank": 0}),
    ("all_reduce", [((T, N), "f32"), EXCHANGE, ARRIVALS], {"rank": 2}),
    ("all_reduce", [((T, N), "f32"), EXCHANGE, ARRIVALS], {"rank": -1}),
    ("all_reduce", [((T, N), "i8"), EXCHANGE, ARRIVALS], {"rank": 0}),
    ("all_reduce", [((T, N), "f32"), EXCHANGE, ((2, 1, 8), "i32")], {"rank": 0}),
    ("all_reduce", [((T, N), "f32"), ((1, 13), "f32"), ARRIVALS], {"rank": 0}),
    ("all_gather", [((T, N), "f32"), EXCHANGE, ARRIVALS], {"rank": 0, "begin": 1, "columns": N}),
    ("all_gather", [((T, N), "f32"), EXCHANGE, ARRIVALS], {"rank": 0, "begin": -1, "columns": N}),
    ("all_gather", [((T, N), "f32"), EXCHANGE, ARRIVALS], {"rank": 0, "begin": 0, "columns": 14}),
    ("argmax", [], {}),
]


OUTPUTS = {kind: len(results) for kind, (_, _, results) in CASES.items()}


def declare(graph: Graph, operands: Sequence[Operand]) -> list[Value]:
    """Each operand by what may hold it: 16-bit rank 4 is a cache, other types only weights have, or an input."""
    kinds = {4: graph.state, 2: graph.weight}

    def declare_one(name: str, shape: tuple[int, ...], dtype: str) -> Value:
        if (shape, dtype) in (EXCHANGE, ARRIVALS):
            return graph.state(name, shape, dtype)
        return (kinds.get(len(shape), graph.input) if dtype not in ir.DTYPES or dtype == "f16" else graph.input)(
            name, shape, dtype
        )

    return [declare_one(f"x{i}", *operand) for i, operand in enumerate(operands)]


def test_every_rule_has_a_case() -> None:
    rules = {
        kind for kind, rule in ir.RULES.items() if rule.shapes is not None
    }  # others are fused: their bodies give them
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
    states = STATES.get(kind, [None] * len(got))
    assert [value.alias for value in got] == states
    assert [value.kind for value in got] == ["state" if alias else "temp" for alias in states]
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
