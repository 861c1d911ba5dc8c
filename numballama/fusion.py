"""Fusion passes: `Graph` → `Graph` with groups of ops replaced by one op that a backend has a kernel for.

Each pass can be switched off, and the logits stay the same. A fused op keeps the ops that it replaced in its `body`,
which defines its meaning and its shapes. Before these passes, `parallel.shard` splits a model's graph for several
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from . import registry
from .errors import Error
from .ir import Graph, Op
from .validation import flag, strings

Groups = Iterable[tuple[str, list[Op]]]


def _producers(graph: Graph) -> dict[str, Op]:
    return {name: op for op in graph.ops for name in op.outputs}


def _only_reader(graph: Graph, readers: Mapping[str, list[Op]], op: Op, kind: str) -> Op | None:
    """The op of this kind that reads all results of `op`, if no other op reads any of them."""
    users = {id(user): user for name in op.outputs for user in readers[name]}
    if len(users) != 1 or any(name in graph.outputs for name in op.outputs):
        return None
    (user,) = users.values()
    return user if user.kind == kind else None


def _attention(graph: Graph) -> Groups:
    """Scores, softmax and the weighted sum. Scores are in a worker's scratch array instead of the arena."""
    readers = graph.consumers()
    for op in graph.ops:
        if op.kind == "attention_scores":
            softmax = _only_reader(graph, readers, op, "softmax")
            values = softmax and _only_reader(graph, readers, softmax, "attention_values")
            if softmax and values and op.inputs[2:] == values.inputs[2:]:
                yield "attention", [op, softmax, values]


def _qkv(graph: Graph) -> Groups:
    """The three linear ops for queries, keys and values, which read one input."""
    for users in graph.consumers().values():
        linears = [op for op in users if op.kind == "linear"]
        if len(linears) == 3 and len({op.inputs[:-1] for op in linears}) == 1:
            yield "qkv", linears


def _gate_up(graph: Graph) -> Groups:
    """The gate and up projections of a feed-forward network, and SwiGLU of their results."""
    made, readers = _producers(graph), graph.consumers()
    for op in graph.ops:
        if op.kind == "swiglu":
            pair = [made.get(name) for name in op.inputs]
            if (
                all(p and p.kind == "linear" and _only_reader(graph, readers, p, "swiglu") is op for p in pair)
                and len({p.inputs[:-1] for p in pair if p}) == 1
            ):
                yield "gate_up", [*(p for p in pair if p), op]


def _addition(graph: Graph, readers: Mapping[str, list[Op]], op: Op) -> Op | None:
    """The op that adds the result of a linear op to the residual stream."""
    add = _only_reader(graph, readers, op, "add") if op.kind == "linear" else None
    return add if add and add.inputs[1] == op.outputs[0] else None


def _residual(graph: Graph) -> Groups:
    """A linear op whose result is added to the residual stream."""
    readers = graph.consumers()
    for op in graph.ops:
        if add := _addition(graph, readers, op):
            yield "linear_add", [op, add]


def _all_reduce(graph: Graph) -> Groups:
    """A linear op whose result is added up over ranks, and on rank 0 the addition of the residual before.

    All ranks must fuse the same sums, whatever other passes have run: those that name a half of the memory.
    """
    readers = graph.consumers()
    for op in graph.ops:
        if op.kind in ("linear", "linear_add"):
            add = _addition(graph, readers, op)
            user = _only_reader(graph, readers, add or op, "all_reduce")
            if user and "half" in user.attrs:
                kind = "linear_add" if add else op.kind
                yield f"{kind}_all_reduce", [op, *([add] if add else []), user]


def _rope_kv(graph: Graph) -> Groups:
    """RoPE of queries and keys, and both writes to the KV cache."""
    made, place = _producers(graph), {id(op): index for index, op in enumerate(graph.ops)}
    for op in graph.ops:
        if op.kind in ("attention", "attention_scores"):
            rope_q, write_k = made.get(op.inputs[0]), made.get(op.inputs[1])
            rope_k = write_k and made.get(write_k.inputs[0])
            if not (rope_q and rope_k and write_k):
                continue
            write_v = graph.ops[place[id(write_k)] + 1]
            kinds = [part.kind for part in (rope_q, rope_k, write_k, write_v)]
            if kinds == ["rope", "rope", "kv_write", "kv_write"] and write_k.inputs[2:] == write_v.inputs[2:]:
                yield "rope_kv_write", [rope_q, rope_k, write_k, write_v]


def _norm(graph: Graph) -> Groups:
    """A norm and the linear step that reads it. Every worker computes the norm: that costs less than a barrier."""
    readers = graph.consumers()
    for op in graph.ops:
        if op.kind == "rmsnorm":
            for kind in ("linear", "qkv", "gate_up"):
                if user := _only_reader(graph, readers, op, kind):
                    yield f"norm_{kind}", [op, user]


def _qkv_rope(graph: Graph) -> Groups:
    """A norm, three linear ops, RoPE and both writes to the KV cache. One worker computes both rows of a RoPE pair."""
    readers = graph.consumers()
    for op in graph.ops:
        if op.kind == "norm_qkv" and (user := _only_reader(graph, readers, op, "rope_kv_write")):
            yield "norm_qkv_rope", [op, user]


FUSIONS: dict[str, Callable[[Graph], Groups]] = {
    "attention": _attention,
    "qkv": _qkv,
    "gate_up": _gate_up,
    "residual": _residual,
    "all_reduce": _all_reduce,
    "rope_kv": _rope_kv,
    "norm": _norm,
    "qkv_rope": _qkv_rope,
}
"""The passes, in the order in which they run."""


def operand_types(graph: Graph, inputs: Iterable[str]) -> list[str]:
    """Types of an op's inputs, as the registry names them."""
    return [graph.values[name].dtype for name in inputs]


def fuse(graph: Graph, backend: str, passes: bool | Sequence[str] = True) -> Graph:
    """Run fusion passes: all (True), none (False) or those named. A group without a kernel on `backend` is not fused.

    Raises `Error` for a pass that does not exist.
    """
    if isinstance(passes, Sequence):
        names = list(strings("fusions", passes))
    else:
        names = list(FUSIONS) if flag("fusions", passes) else []
    if unknown := set(names) - set(FUSIONS):
        raise Error(f"unknown fusion {', '.join(sorted(unknown))}; choose from {', '.join(FUSIONS)}")
    for name in (n for n in FUSIONS if n in names):
        graph = _join(graph, list(FUSIONS[name](graph)), backend)
    return graph


def _join(graph: Graph, groups: list[tuple[str, list[Op]]], backend: str) -> Graph:
    """Replace each group by one op, at the position of its last member. If another op reads a result before that, try
    the position of the first member.
    """
    readers = graph.consumers()
    place = {id(op): index for index, op in enumerate(graph.ops)}
    made = {name: index for index, op in enumerate(graph.ops) for name in op.outputs}
    replaced: dict[int, Op | None] = {}
    for kind, group in groups:
        members = {id(op) for op in group}
        inside = {name for op in group for name in op.outputs}
        inputs = tuple(dict.fromkeys(name for op in group for name in op.inputs if name not in inside))
        outside = {name: [op for op in readers[name] if id(op) not in members] for op in group for name in op.outputs}
        outputs = tuple(name for name, users in outside.items() if users or name in graph.outputs)
        if not registry.has(kind, backend, operand_types(graph, inputs)) or members & replaced.keys():
            continue
        first, *_, last = sorted(members, key=place.__getitem__)
        if any(place[id(op)] < place[last] for users in outside.values() for op in users):
            if any(made.get(name, -1) > place[first] for name in inputs):
                continue
            last = first
        attrs: dict[str, Any] = {}
        body: list[Op] = []
        for op in group:
            attrs |= op.attrs
            body += op.body or [op]
        replaced |= dict.fromkeys(members)
        replaced[last] = Op(kind, inputs, outputs, attrs, tuple(body))
    ops = [replaced.get(id(op), op) for op in graph.ops]
    return graph.replace_ops([op for op in ops if op is not None])
