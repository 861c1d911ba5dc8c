"""The intermediate representation: named values, ops over them, and the checks of a well-formed graph.

A `Graph` is a list of ops in single assignment form. Every shape and type is known when an op is added: the op's rule
in `RULES` computes them from its inputs (`ops.py` has the rules). Nothing here depends on a device, a file format or a
model. A fused op keeps the ops that it replaced in `body`, which defines its meaning and its shapes.

A value has one of five kinds: "input" (written by the caller before a run), "weight", "constant" (elements stored in
the graph), "state" (kept from run to run: the KV cache) and "temp" (computed by an op). An op that updates a state
gives it a new name for the same memory (`Value.alias`), so that the data flow has the order of writes and reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np

from .errors import Error
from .memory import ceil_div
from .quantization.types import KV_BLOCK
from .visualize.graph import draw_graph

DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.uint16),
    "i8": np.dtype(np.int8),
    "i32": np.dtype(np.int32),
    "q8_0": np.dtype(np.uint8),
}
"""Types of the values that a plan places in memory. Weights may have others: they keep the layout of their file.

q8_0 is for states, the KV cache: int8 quants in the value's shape, then a float16 scale for every 32 of them along the
last dimension, of which the last may have fewer.
"""


def nbytes_of(shape: Sequence[int], dtype: str) -> int:
    """Bytes of an array of a type of `DTYPES`."""
    scales = math.prod(shape[:-1]) * ceil_div(shape[-1], KV_BLOCK) if dtype == "q8_0" else 0
    return math.prod(shape) * DTYPES[dtype].itemsize + 2 * scales


ValueKind = Literal["input", "weight", "constant", "state", "temp"]


@dataclass(frozen=True)
class Value:
    """A named array. `alias` is the state whose memory an updated state shares."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: ValueKind
    alias: str | None = None

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.shape, self.dtype)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Op:
    """One computation. `kind` is the op's name, `inputs` and `outputs` are names of values, `body` holds the ops that a
    fused op replaced.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    body: tuple[Op, ...] = ()

    def __str__(self) -> str:
        attrs = ", ".join(f"{name}={value}" for name, value in self.attrs.items())
        return f"{', '.join(self.outputs)} = {self.kind}({', '.join(self.inputs)})" + (f" {{{attrs}}}" if attrs else "")


Shaped = tuple[tuple[int, ...], str]
"""Shape and dtype of one output."""
Shapes = Callable[[Sequence[Value], Mapping[str, Any]], list[Shaped]]
"""shapes(inputs, attributes) → the shape and dtype of each output."""
Names = tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """The signature of an op. Kernels of every backend are compared with it when they are registered.

    `inputs` are the names of its inputs: one tuple for each number of operands that the op may take. `inplace` maps an
    output to the input whose memory it updates: such an output is not a separate operand.
    `shapes` computes the outputs' shapes and dtypes; None for a fused op, whose body gives them.
    `optional` are the attributes that a kernel may do without, because an operand carries them too. A kernel takes all
    others: if it ignored a value, it would silently compute something else.
    """

    kind: str
    inputs: tuple[Names, ...]
    outputs: Names
    attrs: Names
    inplace: Mapping[str, str]
    shapes: Shapes | None
    optional: Names = ()

    def inputs_of(self, count: int) -> Names:
        """The names of `count` inputs. Raises `Error` when the op does not take that many."""
        for names in self.inputs:
            if len(names) == count:
                return names
        wanted = " or ".join(f"({', '.join(names)})" for names in self.inputs)
        raise Error(f"{self.kind} takes {wanted}, found {count} inputs")

    @property
    def results(self) -> Names:
        """The outputs that are operands of a kernel: all that are not updated in place."""
        return tuple(name for name in self.outputs if name not in self.inplace)


RULES: dict[str, Rule] = {}
"""Op → its rule. `ops.py` has those of this package."""


def rule(
    kind: str,
    inputs: Sequence[str] | Sequence[Sequence[str]] = (),
    outputs: Sequence[str] = ("out",),
    attrs: Sequence[str] = (),
    inplace: Mapping[str, str] | None = None,
    optional: Sequence[str] = (),
) -> Callable[[Shapes], Shapes]:
    """Declare an op by the names of its inputs, outputs and attributes.

    The decorated function maps (input values, attributes) to the (shape, dtype) of each output, and raises `Error` for
    operands that do not fit. `inputs` may be several tuples, for an op that takes operands of different counts.
    `inplace={"out": "cache"}` says that output "out" is input "cache", updated. `optional` are those of `attrs` that a
    kernel may leave out. Raises `Error` for names that are missing, given twice, or in `inplace` or `optional` but not
    declared.
    """

    def register(function: Shapes) -> Shapes:
        RULES[kind] = _rule(kind, inputs, outputs, attrs, inplace, optional, function)
        return function

    return register


def fused_rule(
    kind: str,
    *,
    inputs: Sequence[str] | Sequence[Sequence[str]],
    outputs: Sequence[str] = ("out",),
    attrs: Sequence[str] = (),
    inplace: Mapping[str, str] | None = None,
    optional: Sequence[str] = (),
) -> None:
    """Declare an op that only fusion passes make. The ops that it replaces define its shapes and its meaning."""
    RULES[kind] = _rule(kind, inputs, outputs, attrs, inplace, optional, None)


def _rule(
    kind: str,
    inputs: Sequence[str] | Sequence[Sequence[str]],
    outputs: Sequence[str],
    attrs: Sequence[str],
    inplace: Mapping[str, str] | None,
    optional: Sequence[str],
    shapes: Shapes | None,
) -> Rule:
    example = f"@rule({kind!r}, inputs=('x', 'weight'), outputs=('out',), attrs=('eps',))"
    for what, given in (("inputs", inputs), ("outputs", outputs)):
        if isinstance(given, str) or not given:
            raise Error(f"the rule of {kind} names no {what}; declare them like this: {example}")
    several = tuple((names,) if isinstance(names, str) else tuple(names) for names in inputs)
    named = (tuple(name for (name,) in several),) if isinstance(inputs[0], str) else several
    made = Rule(kind, named, tuple(outputs), tuple(attrs), dict(inplace or {}), shapes, tuple(optional))
    for names in made.inputs:
        every = (*names, *made.results, *made.attrs)
        if twice := sorted({name for name in every if every.count(name) > 1}):
            raise Error(f"the rule of {kind} has {', '.join(twice)} twice; each name must be unique")
        for output, updated in made.inplace.items():
            if output not in made.outputs or updated not in names:
                raise Error(
                    f"the rule of {kind}: inplace says that output {output} updates input {updated}; outputs are "
                    f"({', '.join(made.outputs)}), inputs ({', '.join(names)})"
                )
    if unknown := [name for name in made.optional if name not in made.attrs]:
        raise Error(
            f"the rule of {kind}: optional names {', '.join(unknown)}; its attributes are ({', '.join(made.attrs)})"
        )
    return made


def expect(condition: bool, text: str) -> None:
    """Raise `Error` with this text unless the condition holds."""
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
        expect(value.name not in self.values, f"value {value.name} is assigned twice")
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
        """Declare memory that keeps its content from run to run."""
        return self._declare(Value(name, tuple(shape), dtype, "state"))

    def constant(self, name: str, elements: Sequence[float]) -> Value:
        """Declare a float32 vector whose elements are part of the graph."""
        self.constants[name] = elements
        return self._declare(Value(name, (len(elements),), "f32", "constant"))

    @overload
    def add(self, kind: str, *inputs: Value, out: str, **attrs: Any) -> Value: ...

    @overload
    def add(self, kind: str, *inputs: Value, out: Sequence[str], **attrs: Any) -> tuple[Value, ...]: ...

    def add(self, kind: str, *inputs: Value, out: str | Sequence[str], **attrs: Any) -> Value | tuple[Value, ...]:
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
        """The value that owns the memory of `name`: itself, or the state that it updates."""
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

    def _repr_html_(self) -> str:
        """The graph as a drawing with layers that unfold, for a notebook."""
        return draw_graph(self)

    def __repr__(self) -> str:
        return f"<Graph {self.name}: {len(self.ops)} ops, {len(self.values)} values>"


def _infer(op: Op, values: Mapping[str, Value]) -> list[Value]:
    """The output values of an op, by its rule or by its body. Raises `Error` when they do not fit."""
    missing = [name for name in op.inputs if name not in values]
    expect(not missing, f"{op.kind}: input {', '.join(missing)} is not defined before its use")
    rule = RULES.get(op.kind)
    if op.body:
        if rule is not None:
            _expect_attributes(op, rule)
        inner = {name: values[name] for name in op.inputs}
        for part in op.body:
            inner |= {value.name: value for value in _infer(part, inner)}
        expect(all(name in inner for name in op.outputs), f"{op.kind}: its body does not compute {op.outputs}")
        return [inner[name] for name in op.outputs]
    known = ", ".join(sorted(kind for kind, each in RULES.items() if each.shapes))
    if rule is None or rule.shapes is None:
        made_by = "; it is made by a fusion pass, and has no body here" if rule else ""
        raise Error(f"unknown op {op.kind}; known: {known}{made_by}")
    inputs = [values[name] for name in op.inputs]
    try:
        names = rule.inputs_of(len(inputs))
        _expect_attributes(op, rule)
        shaped = rule.shapes(inputs, op.attrs)
        expect(len(shaped) == len(op.outputs), f"has {len(shaped)} outputs, {len(op.outputs)} are named")
        return [
            _result(rule, names, inputs, which, name, shape, dtype)
            for which, name, (shape, dtype) in zip(rule.outputs, op.outputs, shaped, strict=True)
        ]
    except (Error, ValueError, IndexError, KeyError) as error:
        raise Error(f"{op.kind}({', '.join(map(str, inputs))}) {dict(op.attrs)}: {error}") from error


def _expect_attributes(op: Op, rule: Rule) -> None:
    """Raise `Error` for an attribute that the rule does not name: no kernel could take it."""
    unknown = sorted(set(op.attrs) - set(rule.attrs))
    names = ", ".join(rule.attrs)
    expect(not unknown, f"{op.kind} has no attribute {', '.join(unknown)}; its attributes are ({names})")


def _result(
    rule: Rule, names: Names, inputs: Sequence[Value], which: str, name: str, shape: tuple[int, ...], dtype: str
) -> Value:
    """The value `name`, which is output `which` of an op with this rule."""
    if which not in rule.inplace:
        return Value(name, shape, dtype, "temp")
    updated = inputs[names.index(rule.inplace[which])]
    expect(updated.kind == "state", f"updates {updated} in place, which must be a state and is of kind {updated.kind}")
    expect(
        (shape, dtype) == (updated.shape, updated.dtype),
        f"updates {updated} in place, so output {which} must be {updated.dtype}{list(updated.shape)}, found "
        f"{dtype}{list(shape)}",
    )
    return Value(name, shape, dtype, "state", updated.name)


def verify(graph: Graph) -> None:
    """Check single assignment, order, types and shapes, and that no op reads a state after another op has updated it.

    Raises `Error` naming the op.
    """
    known = {name: value for name, value in graph.values.items() if value.kind in ("input", "weight", "constant")}
    known |= {name: value for name, value in graph.values.items() if value.kind == "state" and value.alias is None}
    stale: dict[str, str] = {}
    for op in graph.ops:
        for name in op.inputs:
            expect(name not in stale, f"{op}: reads {name}, which {stale.get(name)} has updated")
        for value in _infer(op, known):
            expect(value.name not in known, f"{op}: {value.name} is assigned twice")
            expect(graph.values.get(value.name) == value, f"{op}: declared {graph.values.get(value.name)}, is {value}")
            known[value.name] = value
            if value.alias is not None:
                stale[value.alias] = value.name
    missing = [name for name in graph.outputs if name not in known]
    expect(not missing, f"graph outputs {missing} are never computed")
    for name, elements in graph.constants.items():
        expect(graph.values[name].shape == (len(elements),), f"constant {name} has {len(elements)} elements")
