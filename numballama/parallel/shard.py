"""The pass that makes a rank's graph of a model's graph: `shard`. It runs before the passes of `fusion`.

Every value has a layout: whole on each rank, split along a dimension of `Shares`, or partial, which is a part of a sum
over all ranks. Layouts follow from those of an op's inputs. A linear op whose input is whole has some rows of its
weight and gives a split value; one whose input is split has some columns and gives a partial one. `all_reduce` makes a
partial value whole where it is added to the residual stream, and `all_gather` makes the logits whole.

Rank 0 alone adds what must be added once, a bias and the residual, to its part of the sum before `all_reduce`: so
`linear_add` is a step there as it is without ranks, and no rank needs a step for the addition after `all_reduce`.

Logits are gathered, not the likeliest tokens of each rank: penalties, masks and log-probabilities need all of them.
Rank 0 samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from ..errors import Error, UnsupportedError
from ..ir import Graph, Op, Value, verify
from ..ops import CELL
from ..quantization.types import ACTIVATION_QUANT, WeightType
from .shares import Dimension, Shares, dimension_of

Layout = Dimension | Literal["whole", "partial"]

_WHERE: tuple[Layout, ...] = ("whole", "whole", "whole")  # positions, sequences, page table
SPLIT_OPS: dict[str, tuple[tuple[Layout, ...], Layout]] = {
    "kv_write": (("kv", "kv", *_WHERE), "kv"),
    "attention_scores": (("heads", "kv", *_WHERE), "heads"),
    "softmax": (("heads",), "heads"),
    "attention_values": (("heads", "kv", *_WHERE), "heads"),
    "swiglu": (("hidden", "hidden"), "hidden"),
}
"""Op → layouts of its inputs, and of its output."""
OF_EACH_PART = ("rope", "head_norm", "quantize", *(f"quantize_{name}" for name in ACTIVATION_QUANT))
"""Ops that compute each head, or each group of columns, by itself: their results are split as the first input is."""


@dataclass
class Shard:
    """A rank's graph, and what has become of the values of the whole model's graph.

    `layouts` and `names` are by a value's name there; `names` gives its name here. They differ for what only rank 0
    adds: on another rank the sum has the name of what is added to.
    """

    graph: Graph
    layouts: dict[str, Layout] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def shard(
    graph: Graph, types: Mapping[str, WeightType], shares: Shares, rank: int, workers: int = 1, size: int | None = None
) -> Shard:
    """A rank's graph. `graph` is the whole model's, as `graph.build` makes it, `types` those of the rank's weights.

    `workers` is how many workers of a rank exchange values, `size` how many numbers are exchanged at once, by default
    those of `shares`. The result is verified, and so is that each value has the
    layout that its readers need. With one rank it is the same graph. Raises `UnsupportedError` for ops that cannot be
    split, and for int8 activations in groups that the rank's weight does not have.
    """
    if shares.ranks == 1:
        names = {name: name for name in graph.values}
        return Shard(graph, dict.fromkeys(names, "whole"), names)
    made = _Pass(graph, types, shares, rank, (workers, size or shares.exchange_size)).run()
    verify(made.graph)
    return made


def verify_ranks(graphs: Sequence[Graph]) -> None:
    """Check that all ranks exchange the same values in the same order, and that gathered parts cover all columns.

    Each would wait for another otherwise. Raises `Error` naming the ops.
    """
    of_ranks = [[op for op in graph.ops if op.kind in ("all_reduce", "all_gather")] for graph in graphs]
    if len({len(ops) for ops in of_ranks}) > 1:
        raise Error(f"ranks exchange {', '.join(str(len(ops)) for ops in of_ranks)} values, not equally many")
    for ops in zip(*of_ranks, strict=True):
        given = [graph.values[op.inputs[0]].shape for graph, op in zip(graphs, ops, strict=True)]
        results = {
            (op.kind, *(graph.values[name] for name in op.outputs)) for graph, op in zip(graphs, ops, strict=True)
        }
        where = "; ".join(f"rank {rank}: {op}" for rank, op in enumerate(ops))
        if len(results) > 1 or [op.attrs["rank"] for op in ops] != list(range(len(ops))):
            raise Error(f"ranks exchange different values: {where}")
        if ops[0].kind == "all_gather":
            borders = [op.attrs["begin"] for op in ops] + [ops[0].attrs["columns"]]
            widths = [end - begin for begin, end in pairwise(borders)]
            if borders[0] != 0 or widths != [shape[1] for shape in given]:
                raise Error(f"the parts of ranks do not cover all columns once: {where}")


class _Pass:
    """One run of `shard`. `new` grows op by op; `shard.names` and `shard.layouts` say what it has so far."""

    def __init__(
        self, graph: Graph, types: Mapping[str, WeightType], shares: Shares, rank: int, exchange: tuple[int, int]
    ) -> None:
        self.old, self.types, self.shares, self.rank = graph, types, shares, rank
        self.new = Graph(f"{graph.name}, rank {rank} of {shares.ranks}")
        self.shard = Shard(self.new)
        for value in graph.values.values():
            if value.kind == "input":
                self._record(value.name, self.new.input(value.name, value.shape, value.dtype), "whole")
        self.shared = (
            self.new.state("exchange", (2, exchange[1]), "f32"),
            self.new.state("arrivals", (shares.ranks, exchange[0], CELL), "i32"),
        )
        """The memory of all ranks, after the last exchange so far."""
        self.exchanges = self.sums = 0
        self.biased = set[str]()
        """Names, in the old graph, of partial values to which rank 0 has added a bias."""

    def run(self) -> Shard:
        for op in self.old.ops:
            if op.body:
                raise Error(f"{op.kind} is a fused op: shard a graph before its ops are fused")
            if op.kind == "linear":
                self._linear(op)
            elif op.kind == "bias":
                self._bias(op)
            elif op.kind == "add" and "partial" in map(self.shard.layouts.get, op.inputs):
                self._add_to_stream(op)
            elif op.kind in OF_EACH_PART and self._layout(op.inputs[0]) != "partial":
                layouts: list[Layout] = ["whole"] * len(op.inputs)
                layouts[0] = self._layout(op.inputs[0])
                self._keep(op, layouts, layouts[0])
            elif op.kind in SPLIT_OPS:
                self._keep(op, *SPLIT_OPS[op.kind])
            else:
                self._keep(op, ["whole"] * len(op.inputs), "whole")
        for name in self.old.outputs:
            self.new.outputs.append(self._operand(name, "whole").name)
        return self.shard

    def _record(self, name: str, value: Value, layout: Layout) -> None:
        self.shard.names[name], self.shard.layouts[name] = value.name, layout

    def _layout(self, name: str) -> Layout:
        """The layout of an input, or of a value that an op has computed."""
        return self.shard.layouts[name]

    def _operand(self, name: str, layout: Layout) -> Value:
        """A value of the new graph, in the layout that an op needs. A state or constant is declared on its first use.

        Raises `UnsupportedError` for a value that has another layout.
        """
        if name not in self.shard.names:
            value = self.old.values[name]
            own: Layout = layout if value.kind != "weight" else dimension_of(name) or "whole"
            self._record(name, self._declare(value, own), own)
        if (found := self.shard.layouts[name]) != layout:
            raise UnsupportedError(
                f"{self.shares.ranks} ranks cannot share the model: {name} is {found} on a rank, and an op that reads "
                f"it needs it {layout}"
            )
        return self.new.values[self.shard.names[name]]

    def _declare(self, value: Value, layout: Layout) -> Value:
        if value.kind == "weight":
            return self._weight(value.name)
        if value.kind == "constant":
            return self.new.constant(value.name, self.old.constants[value.name])
        pages, _, *rest = value.shape
        heads = len(self.shares.kv[self.rank])
        return self.new.state(value.name, (pages, heads, *rest) if layout == "kv" else value.shape, value.dtype)

    def _weight(self, name: str, part_of: str | None = None) -> Value:
        """The rank's part of a weight. `part_of` is the weight that it is a part of, if that has another name."""
        part = self.shares.part(name, self.rank)
        shape = list(self.old.values[part_of or name].shape)
        if part.axis is not None:
            shape[part.axis] = part.end - part.begin
        return self.new.weight(name, shape, self.types[name].name)

    def _keep(self, op: Op, inputs: Sequence[Layout], output: Layout) -> None:
        """Append an op as it is, on the rank's parts of its inputs."""
        operands = [self._operand(name, layout) for name, layout in zip(op.inputs, inputs, strict=True)]
        for name, value in zip(op.outputs, self.new.add(op.kind, *operands, out=op.outputs, **op.attrs), strict=True):
            self._record(name, value, output)

    def _linear(self, op: Op) -> None:
        """Some rows of the weight if x is whole, some columns if it is split."""
        *x, weight = op.inputs
        (out,) = op.outputs
        name = "output" if weight == "tok_embeddings" else weight  # a tied classifier has rows of the embedding
        dimension, layout = dimension_of(name), self._layout(x[0])
        if dimension is None or layout not in ("whole", dimension):
            raise UnsupportedError(f"{op}: nothing says how {weight} is split where its input is {layout}")
        if layout == "whole" and self.shares.part(name, self.rank).axis != 0:
            raise UnsupportedError(f"{op}: {weight} is split by columns, and its input is whole")
        group = op.attrs.get("group", self.types[name].group)
        if len(x) > 1 and group != self.types[name].group:
            raise UnsupportedError(
                f"{self.shares.ranks} ranks cannot share {weight} with int8 activations: it is cut inside of its "
                f"groups of {group}"
            )
        operands = [self._operand(each, layout) for each in x]
        result: Layout = "partial" if layout != "whole" else dimension
        if dimension != "vocab":
            self._record(out, self.new.add("linear", *operands, self._weight(name), out=out, **op.attrs), result)
            return
        part = self.new.add("linear", *operands, self._weight(name, weight), out=f"{out}_part", **op.attrs)
        share = self.shares.elements("vocab", self.rank)
        where = {"begin": share.start, "columns": self.shares.config.vocab_size}
        self._exchange("all_gather", part, out, **where)

    def _bias(self, op: Op) -> None:
        """The rank's elements for split x. To a part of a sum it is added once, by rank 0."""
        x, weight = op.inputs
        layout = self._layout(x)
        if layout == "partial":
            part = self._operand(x, "partial")
            if self.rank == 0:
                part = self.new.add("bias", part, self._weight(weight), out=op.outputs[0])
            self._record(op.outputs[0], part, "partial")
            self.biased.add(op.outputs[0])
            return
        if dimension_of(weight) != (None if layout == "whole" else layout):
            raise UnsupportedError(f"{op}: nothing says how {weight} is split where its input is {layout}")
        self._keep(op, (layout, layout), layout)

    def _add_to_stream(self, op: Op) -> None:
        """Rank 0 adds the residual to its part of the sum. The sum of all parts is the result."""
        (out,), layouts = op.outputs, [self._layout(name) for name in op.inputs]
        if sorted(layouts) != ["partial", "whole"]:
            raise UnsupportedError(f"{op}: its inputs are {' and '.join(layouts)}, a sum and a whole value are needed")
        operands = [self._operand(name, layout) for name, layout in zip(op.inputs, layouts, strict=True)]
        part = operands[layouts.index("partial")]
        if self.rank == 0:
            part = self.new.add("add", *operands, out=f"{out}_part")
        self.sums += 1
        # after a bias, which only rank 0 has, no rank may fuse the sum with a linear op
        half = {} if self.biased & {*op.inputs} else {"half": self.sums & 1}
        self._exchange("all_reduce", part, out, **half)

    def _exchange(self, kind: str, part: Value, out: str, **attrs: int) -> None:
        """Append an op that makes a value whole from the parts of all ranks."""
        self.exchanges += 1
        names = (out, *(f"{self.new.root(state.name)}.{self.exchanges}" for state in self.shared))
        whole, *shared = self.new.add(kind, part, *self.shared, out=names, rank=self.rank, **attrs)
        self.shared = (shared[0], shared[1])
        self._record(out, whole, "whole")
