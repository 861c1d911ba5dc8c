"""Any value of a model's graph by name, as the model's own backend computes it.

A value that a fusion pass leaves out, or whose memory another value takes over, does not outlive a run. So the graph
is compiled once more as it is declared, one step for each op. A run stops after the op that computes a wanted value,
while its memory still holds it, and goes on from there. Steps that the wanted values do not need are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from .. import progress
from ..backend import Program
from ..bench import debug
from ..errors import Error
from ..graph import PAGE_TABLE
from ..ir import DTYPES, Graph, Op, Value
from ..memory import format_bytes, require_available
from ..quantization.convert import dequantize
from ..quantization.kv import stored

if TYPE_CHECKING:
    from ..model import Model
    from ..session import Session

RUN_BYTES = 128 << 20
"""Bytes that the operands of one op may take in a run: attention's scores take tokens · heads · context · 4."""
MOST_BYTES = 1 << 30
"""Bytes of the largest result of `ValueReader.read`."""


class GraphOf(Protocol):
    """graph_of(tokens): the graph for runs of up to `tokens` tokens, with the logits of every token and layer."""

    def __call__(self, tokens: int) -> Graph: ...


class Stop(NamedTuple):
    """A run that has just computed a value of tokens [start, end) of a text. `rows` [end - start, …] is the value.

    It may be a view of the arena: read it before the run goes on.
    """

    name: str
    start: int
    end: int
    rows: np.ndarray


class ValueReader:
    """Reads values of one model's graph. Compiles the graph without fusions when the first value is read."""

    def __init__(self, model: Model, graph_of: GraphOf) -> None:
        self._model, self._graph_of = model, graph_of
        self._program: Program | None = None
        self._graph: Graph | None = None

    @property
    def graph(self) -> Graph:
        """The graph as declared, for one token, with the logits of each layer: it has all names."""
        if self._graph is None:
            self._graph = self._graph_of(tokens=1)
        return self._graph

    @property
    def program(self) -> Program:
        """The program without fusions, for a part of a text. Raises `Error` if its arena does not fit in memory."""
        if self._program is None:
            backend = self._model.backend
            most = min(backend.prefill_chunk, self._model.context)
            tokens = max(tokens_of_a_run(self.graph, most), backend.decode_sizes[0])
            with progress.progress_bar("compiling kernels") as report:
                program = backend.program(self._graph_of(tokens=tokens), False, report)
            self._program = debug.watched(program, backend)
        return self._program

    def stops(self, session: Session, ids: Sequence[int], names: Iterable[str]) -> Iterator[Stop]:
        """Run a text, a part at a time, and stop where one of these values is computed. Ops compute all of them.

        `session` is that of `Model.exclusive`, and empty. `ids` fit its context.
        """
        program = self.program
        parts = segments(program.graph, names)
        for start, count in session.chunks(program, ids):
            for begin, end, results in parts:
                program.run(count, begin, end, rows=count)
                for name in results:
                    state = program.graph.values[name].kind == "state"
                    yield Stop(name, start, start + count, program.value(name)[: None if state else count])

    def close(self) -> None:
        """Drop the program, which holds memory."""
        self._program = None

    def read(self, text: Iterable[int], name: str) -> np.ndarray:
        """`Model.values`."""
        ids, graph = self._model.token_engine.validate(text), self.graph
        require_name(graph, name)
        value = graph.values[name]
        if value.kind == "weight":
            _require_size(name, 4 * math.prod(value.shape), "model.weights has it as the file stores it")
            return np.array(dequantize(self._model.weights[name]))
        if value.kind == "constant":
            return np.array(graph.constants[name], np.float32)
        if name == PAGE_TABLE:
            raise Error(f"{name} says where keys and values are, and is no result of a text; k_cache and v_cache are")
        if value.kind == "input":
            inputs = {"ids": ids, "positions": range(len(ids)), "sequences": [0] * len(ids)}
            return np.array(inputs[name], np.int32)
        if value.kind == "state":
            return self._read_cache(ids, value)
        columns, dtype = columns_of(graph, value, len(ids)), DTYPES[value.dtype]
        _require_size(name, len(ids) * math.prod(columns) * dtype.itemsize, "give fewer tokens")
        out = np.empty((len(ids), *columns), dtype)
        with self._model.exclusive() as session:
            for stop in self.stops(session, ids, [name]):
                out[stop.start : stop.end] = stop.rows[(slice(None), *map(slice, columns))]
        return out

    def _read_cache(self, ids: Sequence[int], value: Value) -> np.ndarray:
        """Keys or values of a layer as the KV cache holds them, float32 [tokens, n_kv_heads, head_dim]."""
        root = self.graph.root(value.name)
        names = (name for op in self.graph.ops for name in op.outputs)
        updated = next(name for name in names if self.graph.values[name].alias == root)
        _require_size(value.name, 4 * math.prod(value.shape), "a smaller context= or kv_tokens= takes less")
        with self._model.exclusive() as session:
            for stop in self.stops(session, ids, [updated]):
                memory = stop.rows
            # the reference holds float32 whatever the type
            held = memory if memory.dtype == np.float32 else stored(memory, value.shape, self._model.kv.dtype)
            _, heads, _, head_dim = value.shape
            # an exclusive session has pages 1, 2, …; page 0 is for padding
            return np.array(held[1:].transpose(0, 2, 1, 3).reshape(-1, heads, head_dim)[: len(ids)], np.float32)


def tokens_of_a_run(graph: Graph, most: int) -> int:
    """Tokens of a run, at most `most`, for which no op of a graph takes more than `RUN_BYTES`. `graph` is for one."""
    sizes = (
        sum(v.nbytes for v in graph.operands((*op.inputs, *op.outputs)) if v.kind in ("input", "temp"))
        for op in graph.ops
    )
    return max(1, min(most, RUN_BYTES // max(sizes)))


class Segment(NamedTuple):
    """Steps [begin, end) of a program, and the wanted values that its last step computes."""

    begin: int
    end: int
    results: tuple[str, ...]


def segments(graph: Graph, names: Iterable[str]) -> list[Segment]:
    """The steps that compute these values, in order. A segment ends where a value is wanted, or before a step that is
    not needed."""
    wanted = frozenset(names)
    needed = set(wanted)
    steps = {0}  # a run begins there: that is where the reference takes the inputs
    for index in reversed(range(len(graph.ops))):
        op = graph.ops[index]
        if not needed.isdisjoint(op.outputs):
            needed.update(op.inputs)
            steps.add(index)
    found: list[Segment] = []
    begin: int | None = None
    for index in sorted(steps):
        begin = index if begin is None else begin
        results = tuple(name for name in graph.ops[index].outputs if name in wanted)
        if results or index + 1 not in steps:
            found.append(Segment(begin, index + 1, results))
            begin = None
    return found


def columns_of(graph: Graph, value: Value, tokens: int) -> tuple[int, ...]:
    """Shape of a token's row of a value. Attention's scores and probabilities have a column for each token of the
    context; those after the text's end are left out."""
    makers: dict[str, Op] = {name: op for op in graph.ops for name in op.outputs}
    maker = makers[value.name]
    if maker.kind == "softmax":
        maker = makers.get(maker.inputs[0], maker)
    return (*value.shape[1:-1], tokens) if maker.kind == "attention_scores" else value.shape[1:]


def require_name(graph: Graph, name: str) -> None:
    """Raise `Error` unless the graph has a value of this name. The message lists near ones."""
    if not isinstance(name, str):
        raise Error(f"the name of a value must be a string, found {name!r:.200}; print(model.graph) lists them")
    if name not in graph.values:
        near = near_names(graph, name)
        meant = f"did you mean {', '.join(near)}? " if near else ""
        raise Error(f"the graph has no value {name!r:.200}; {meant}print(model.graph) lists all")


def near_names(graph: Graph, name: str) -> list[str]:
    """Up to five names that are near a wrong one: first those of the same layer."""
    prefix, dot, last = name.rpartition(".")
    same = [other.rpartition(".")[2] for other in graph.values if other.rpartition(".")[0] == prefix]
    begin_alike = [other for other in same if last and other.startswith(last[:4])]
    found = [f"{prefix}{dot}{other}" for other in (*begin_alike, *get_close_matches(last, same, cutoff=0.5))]
    return list(dict.fromkeys([*found, *get_close_matches(name, graph.values, cutoff=0.7)]))[:5]


def _require_size(name: str, nbytes: int, advice: str) -> None:
    if nbytes > MOST_BYTES:
        raise Error(f"{name} takes {format_bytes(nbytes)}, values() returns up to {format_bytes(MOST_BYTES)}; {advice}")
    require_available(nbytes, name, advice)
