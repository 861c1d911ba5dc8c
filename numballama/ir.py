"""The intermediate representation: named values, ops over them, and what makes a graph well formed.

A `Graph` is a list of ops in single assignment form. Every shape and type is known when an op is added: the op's rule
in `RULES` computes them from its inputs. Nothing here knows of a device, a file or a llama. A fused op keeps the ops
it replaced in `body`: they are its meaning, and its shapes follow from them.

Values are of five kinds: "input" (written by the caller before a run), "weight", "constant" (numbers the graph
carries), "state" (outlives a run: the KV cache) and "temp" (computed by an op). An op that updates a state gives it a
new name that stands for the same memory (`Value.alias`), so that the order of writes and reads is in the data flow.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import Error
from .quantization.types import ACTIVATION_QUANT, VEC_DOT_TYPE

DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.uint16),
    "i8": np.dtype(np.int8),
    "i32": np.dtype(np.int32),
}
"""Types of values that occupy memory of a plan. Weights may have further types, whose bytes their file lays out."""


@dataclass(frozen=True)
class Value:
    """A named array. `alias` is the state whose memory an updated state shares."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    alias: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Op:
    """One computation, named by `kind`, over values' names. `body` is what a fused op replaced."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    body: tuple[Op, ...] = ()

    def __str__(self) -> str:
        attrs = ", ".join(f"{name}={value}" for name, value in self.attrs.items())
        return f"{', '.join(self.outputs)} = {self.kind}({', '.join(self.inputs)})" + (f" {{{attrs}}}" if attrs else "")


Shaped = tuple[tuple[int, ...], str]
Rule = Callable[[Sequence[Value], Mapping[str, Any]], list[Shaped]]
RULES: dict[str, Rule] = {}


def rule(kind: str) -> Callable[[Rule], Rule]:
    """Declare an op: the decorated function maps (inputs, attributes) to the (shape, dtype) of each output."""

    def register(function: Rule) -> Rule:
        RULES[kind] = function
        return function

    return register


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise Error(text)


class Graph:
    """Ops in the order they may run, over named values."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[str, Value] = {}
        self.ops: list[Op] = []
        self.outputs: list[str] = []
        self.constants: dict[str, Sequence[float]] = {}

    def _declare(self, value: Value) -> Value:
        _expect(value.name not in self.values, f"value {value.name} is assigned twice")
        self.values[value.name] = value
        return value

    def input(self, name: str, shape: Sequence[int], dtype: str) -> Value:
        """Declare an operand that the caller writes before each run."""
        return self._declare(Value(name, tuple(shape), dtype, "input"))

    def weight(self, name: str, shape: Sequence[int], dtype: str) -> Value:
        """Declare a weight; asking again for the same name gives the same value (tied embeddings)."""
        value = Value(name, tuple(shape), dtype, "weight")
        return self.values[name] if self.values.get(name) == value else self._declare(value)

    def state(self, name: str, shape: Sequence[int], dtype: str) -> Value:
        """Declare memory that outlives a run."""
        return self._declare(Value(name, tuple(shape), dtype, "state"))

    def constant(self, name: str, numbers: Sequence[float]) -> Value:
        """Declare a float32 vector whose numbers are part of the graph."""
        self.constants[name] = numbers
        return self._declare(Value(name, (len(numbers),), "f32", "constant"))

    def add(self, kind: str, *inputs: Value, out: str | Sequence[str], **attrs: Any) -> Any:
        """Append an op; the types and shapes of its outputs follow from its rule.

        Returns its output `Value`, or a tuple when `out` is a sequence. Raises `Error` when the rule refuses the
        inputs.
        """
        names = (out,) if isinstance(out, str) else tuple(out)
        op = Op(kind, tuple(value.name for value in inputs), names, attrs)
        results = tuple(self._declare(value) for value in _infer(op, self.values))
        self.ops.append(op)
        return results[0] if isinstance(out, str) else results

    def consumers(self) -> dict[str, list[Op]]:
        """Value name → the ops that read it, in order."""
        readers: dict[str, list[Op]] = {name: [] for name in self.values}
        for op in self.ops:
            for name in dict.fromkeys(op.inputs):
                readers[name].append(op)
        return readers

    def first(self, kind: str) -> int:
        """Index of the first op of this kind, or the number of ops if there is none."""
        return next((index for index, op in enumerate(self.ops) if op.kind == kind), len(self.ops))

    def root(self, name: str) -> str:
        """The value whose memory `name` stands for: itself, or the state it updates."""
        alias = self.values[name].alias
        return name if alias is None else self.root(alias)

    def operands(self, names: Iterable[str]) -> list[Value]:
        return [self.values[name] for name in names]

    def replace_ops(self, ops: Sequence[Op]) -> Graph:
        """A graph of these ops over the same declarations; values that no op computes any more are dropped."""
        new = Graph(self.name)
        computed = {name for op in ops for name in op.outputs}
        new.values = {name: value for name, value in self.values.items() if value.kind != "temp" or name in computed}
        new.ops, new.outputs, new.constants = list(ops), list(self.outputs), dict(self.constants)
        return new

    def __str__(self) -> str:
        lines = [f"graph {self.name}"]
        for value in self.values.values():
            if value.kind != "temp":
                lines.append(f"  {value.kind:8} {value}")
        width = max((len(op.kind) for op in self.ops), default=0)
        for index, op in enumerate(self.ops):
            results = ", ".join(str(value) for value in self.operands(op.outputs))
            attrs = "".join(f" {name}={value}" for name, value in op.attrs.items())
            lines.append(f"  {index:4} {op.kind:{width}} ({', '.join(op.inputs)}){attrs} → {results}")
        return "\n".join([*lines, f"  outputs  {', '.join(self.outputs)}"])

    def _repr_svg_(self) -> str:
        """The graph, for a notebook: an op below the last of those it reads from, a line from each of them."""
        depth: dict[str, int] = {}
        spots: dict[str, tuple[int, int]] = {}
        rows: dict[int, int] = {}
        boxes, lines = [], []
        for op in self.ops:
            level = 1 + max((depth.get(name, -1) for name in op.inputs), default=-1)
            x, y = rows.get(level, 0) * 250 + 10, level * 44 + 10
            rows[level] = rows.get(level, 0) + 1
            for name in dict.fromkeys(op.inputs):
                if name in spots:
                    from_x, from_y = spots[name]
                    lines.append(f'<path d="M{from_x},{from_y} L{x + 115},{y}" stroke="#99a"/>')
            for name in op.outputs:
                depth[name], spots[name] = level, (x + 115, y + 28)
            title = html.escape(str(op))
            boxes.append(
                f'<g><title>{title}</title><rect x="{x}" y="{y}" width="230" height="28" fill="#eef" stroke="#556"/>'
                f'<text x="{x + 8}" y="{y + 18}"><tspan font-weight="bold">{html.escape(op.kind)}</tspan> '
                f"{html.escape(op.outputs[0])}</text></g>"
            )
        width, height = max(rows.values(), default=1) * 250 + 10, len(rows) * 44 + 10
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            f'font-size="11"><rect width="{width}" height="{height}" fill="#fff"/>{"".join(lines + boxes)}</svg>'
        )

    def __repr__(self) -> str:
        return f"<Graph {self.name}: {len(self.ops)} ops, {len(self.values)} values>"


def _infer(op: Op, values: Mapping[str, Value]) -> list[Value]:
    """The output values of an op, by its rule or by its body. Raises `Error` when they do not fit."""
    missing = [name for name in op.inputs if name not in values]
    _expect(not missing, f"{op.kind}: input {', '.join(missing)} is not defined before its use")
    if op.body:
        inner = {name: values[name] for name in op.inputs}
        for part in op.body:
            inner |= {value.name: value for value in _infer(part, inner)}
        _expect(all(name in inner for name in op.outputs), f"{op.kind}: its body does not compute {op.outputs}")
        return [inner[name] for name in op.outputs]
    _expect(op.kind in RULES, f"unknown op {op.kind}; known: {', '.join(sorted(RULES))}")
    inputs = [values[name] for name in op.inputs]
    try:
        shaped = RULES[op.kind](inputs, op.attrs)
    except (Error, ValueError, IndexError, KeyError) as error:
        raise Error(f"{op.kind}({', '.join(map(str, inputs))}) {dict(op.attrs)}: {error}") from error
    _expect(len(shaped) == len(op.outputs), f"{op.kind} has {len(shaped)} outputs, {len(op.outputs)} are named")
    alias = op.inputs[1] if op.kind == "kv_write" else None
    return [
        Value(name, shape, dtype, "temp" if alias is None else "state", alias)
        for name, (shape, dtype) in zip(op.outputs, shaped, strict=True)
    ]


def verify(graph: Graph) -> None:
    """Check single assignment, order, types, shapes and that no op reads a state that was since updated.

    Raises `Error` naming the op.
    """
    known = {name: value for name, value in graph.values.items() if value.kind in ("input", "weight", "constant")}
    known |= {name: value for name, value in graph.values.items() if value.kind == "state" and value.alias is None}
    stale: dict[str, str] = {}
    for op in graph.ops:
        for name in op.inputs:
            _expect(name not in stale, f"{op}: reads {name}, which {stale.get(name)} has updated")
        for value in _infer(op, known):
            _expect(value.name not in known, f"{op}: {value.name} is assigned twice")
            _expect(graph.values.get(value.name) == value, f"{op}: declared {graph.values.get(value.name)}, is {value}")
            known[value.name] = value
            if value.alias is not None:
                stale[value.alias] = value.name
    missing = [name for name in graph.outputs if name not in known]
    _expect(not missing, f"graph outputs {missing} are never computed")
    for name, numbers in graph.constants.items():
        _expect(graph.values[name].shape == (len(numbers),), f"constant {name} has {len(numbers)} numbers")


# The ops. T is the number of tokens of a run, C the length of the KV cache, S the number of sequences it holds.


@rule("embedding")
def _embedding(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """ids[T], table[V, D] → the rows of the table, [T, D]"""
    ids, table = inputs
    _expect(ids.dtype == "i32" and len(ids.shape) == 1 and len(table.shape) == 2, "wants ids i32[T] and a table[V, D]")
    return [((ids.shape[0], table.shape[1]), "f32")]


@rule("rope_angles")
def _rope_angles(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """positions[T], frequencies[P] → cos, then sin, of position · frequency, [T, 2P]"""
    positions, frequencies = inputs
    _expect(positions.dtype == "i32" and len(frequencies.shape) == 1, "wants positions i32[T] and frequencies[P]")
    return [((positions.shape[0], 2 * frequencies.shape[0]), "f32")]


@rule("rmsnorm")
def _rmsnorm(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """x[T, D], weight[D] → x / sqrt(mean(x²) + eps) · weight"""
    x, weight = inputs
    _expect(x.dtype == "f32" and weight.shape == x.shape[1:] and attrs["eps"] >= 0, "wants x f32[T, D], weight[D], eps")
    return [(x.shape, "f32")]


@rule("head_norm")
def _head_norm(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """x[T, heads · head_dim], weight[head_dim] → each head of x as `rmsnorm` does a whole row"""
    x, weight = inputs
    _expect(x.dtype == "f32" and len(x.shape) == 2 and attrs["eps"] >= 0, "wants x f32[T, heads · head_dim] and eps")
    _expect(len(weight.shape) == 1 and x.shape[1] % weight.shape[0] == 0, "x must consist of heads as wide as weight")
    return [(x.shape, "f32")]


@rule("quantize")
def _quantize(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """x[T, D] → int8 x[T, D] and one scale for each `group` numbers of a row, [T, ceil(D / group)]"""
    (x,) = inputs
    _expect(x.dtype == "f32" and len(x.shape) == 2 and attrs["group"] > 0, "wants x f32[T, D] and a positive group")
    return [(x.shape, "i8"), ((x.shape[0], -(-x.shape[1] // attrs["group"])), "f32")]


def _rounded(kind: str, shape: tuple[int, ...]) -> list[Shaped]:
    group, run, sums = ACTIVATION_QUANT[kind]
    _expect(len(shape) == 2 and shape[1] % group == 0, f"wants x[T, D] in whole groups of {group}")
    return [(shape, "i8"), ((shape[0], shape[1] // group), "f32"), ((shape[0], shape[1] // run), sums)]


def _rounding(kind: str) -> Rule:
    """x[T, D] → int8 x[T, D], the scale of each group, sums of runs of them: see `ACTIVATION_QUANT`"""

    def shapes(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
        (x,) = inputs
        _expect(x.dtype == "f32", "wants x f32[T, D]")
        return _rounded(kind, x.shape)

    return shapes


for _kind in ACTIVATION_QUANT:
    rule(f"quantize_{_kind}")(_rounding(_kind))


@rule("linear")
def _linear(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """x[T, K], weight[N, K] → x · weightᵀ; or, quantised in groups, xq[T, K], xs[T, ceil(K / group)], weight; or, a
    weight of blocks, what `quantize_…` makes of x, then the weight"""
    x, weight = inputs[0], inputs[-1]
    _expect(
        len(inputs) in ((3, 4) if x.dtype == "i8" else (2,)), "wants (x, weight), (xq, xs, weight) or (xq, xs, s, w)"
    )
    if len(inputs) == 4:
        _expect(weight.dtype in VEC_DOT_TYPE, f"weights of {weight.dtype} have no sums")
        kind = VEC_DOT_TYPE[weight.dtype]
        given = [(value.shape, value.dtype) for value in inputs[:3]]
        _expect(given == _rounded(kind, x.shape), f"a weight of {weight.dtype} wants x as quantize_{kind} makes it")
    elif x.dtype == "i8":
        _expect(
            inputs[1].shape == (x.shape[0], -(-x.shape[1] // attrs["group"])), "wants one scale for each group of x"
        )
    _expect(len(weight.shape) == 2 and x.shape[1] == weight.shape[1], "x[T, K] must fit weight[N, K]")
    return [((x.shape[0], weight.shape[0]), "f32")]


@rule("bias")
def _bias(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """x[T, N], bias[N] → x + bias"""
    x, bias = inputs
    _expect(x.dtype == "f32" and bias.shape == x.shape[1:], "wants x f32[T, N] and bias[N]")
    return [(x.shape, "f32")]


@rule("rope")
def _rope(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """x[T, heads · head_dim], angles[T, head_dim] → every pair of a head's dimensions turned by its angle"""
    x, angles = inputs
    _expect(x.shape[1] % attrs["head_dim"] == 0, "x must consist of whole heads")
    _expect(angles.shape == (x.shape[0], attrs["head_dim"]), "wants angles[T, head_dim]")
    return [(x.shape, "f32")]


@rule("kv_write")
def _kv_write(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """x[T, kv_heads · head_dim], cache[S, kv_heads, C, head_dim], positions[T], sequences[T] → the cache, updated"""
    x, cache, positions, sequences = inputs
    _expect(len(cache.shape) == 4 and x.shape[1] == cache.shape[1] * cache.shape[3], "x must fit the cache's heads")
    _expect(positions.shape == sequences.shape == x.shape[:1], "wants a position and a sequence for each token")
    return [(cache.shape, cache.dtype)]


@rule("attention_scores")
def _attention_scores(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """q[T, heads · head_dim], k cache, positions, sequences → q · k / sqrt(head_dim), [T, heads, C]: -inf where a token
    does not see, after its position and, if `window` > 0, at its position - window and before"""
    q, cache = inputs[:2]
    heads, rest = divmod(q.shape[1], cache.shape[3])
    _expect(rest == 0 and heads % cache.shape[1] == 0, "q's heads must be a multiple of the cache's")
    _expect(attrs["window"] >= 0, "wants a window, 0 for none")
    return [((q.shape[0], heads, cache.shape[2]), "f32")]


@rule("softmax")
def _softmax(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """x[T, …, n] → exp(x) / sum(exp(x)) over the last dimension"""
    return [(inputs[0].shape, "f32")]


@rule("attention_values")
def _attention_values(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """probabilities[T, heads, C], v cache, positions, sequences → weighted sum of the values that a token sees (see
    attention_scores), [T, heads · head_dim]"""
    weights, cache = inputs[:2]
    _expect(weights.shape[2] == cache.shape[2], "probabilities must cover the cache")
    _expect(attrs["window"] >= 0, "wants a window, 0 for none")
    return [((weights.shape[0], weights.shape[1] * cache.shape[3]), "f32")]


@rule("swiglu")
def _swiglu(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """gate[T, H], up[T, H] → gate · sigmoid(gate) · up"""
    gate, up = inputs
    _expect(gate.shape == up.shape, "gate and up must have one shape")
    return [(gate.shape, "f32")]


@rule("add")
def _add(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """a, b → a + b"""
    a, b = inputs
    _expect(a.shape == b.shape, "a and b must have one shape")
    return [(a.shape, "f32")]


@rule("last")
def _last(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """x[T, D] → the row of the last token of the run, [1, D]"""
    return [((1, inputs[0].shape[1]), "f32")]


@rule("argmax")
def _argmax(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[Shaped]:
    """x[T, V] → the index of each row's largest number (the first of equals), i32[T]"""
    return [(inputs[0].shape[:1], "i32")]
