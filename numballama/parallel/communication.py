"""What communication costs: the time of a run's exchanges between ranks, without what ranks compute in between."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ..errors import Error
from ..ir import DTYPES, Graph, Op, Value
from ..visualize.parts import is_exchange
from .shard import Shard

TIMES = 8
"""How often a measured run has the exchanges: the more, the less it matters how long the start of a run takes."""
RUNS, REPEATS = 4, 5
"""Runs that are timed together, and how often they are."""
INPUTS = ("ids", "positions", "sequences")
"""Inputs of a run, which the programs of all backends have."""


def exchanged_text(graphs: Sequence[Graph]) -> str:
    """What the ranks exchange in a run: `graphs` are theirs for a decode step, before any fusion. Bytes are those that
    a rank writes, its part to each of the others.
    """
    lines, total, others = [f"what {len(graphs)} ranks exchange for each token:"], 0, len(graphs) - 1
    parts = Counter[tuple[str, tuple[int, ...]]]()
    for ops in zip(*([op for op in graph.ops if is_exchange(op)] for graph in graphs), strict=True):
        given = (graph.values[op.inputs[0]] for graph, op in zip(graphs, ops, strict=True))
        parts[ops[0].kind, tuple(math.prod(v.shape[1:]) * DTYPES[v.dtype].itemsize for v in given)] += 1
    for (kind, sizes), count in parts.items():
        total += count * max(sizes) * others
        each = f"{sizes[0]:,}" if len({*sizes}) == 1 else f"{min(sizes):,} to {max(sizes):,}"
        lines.append(f"  {count:5} {kind:11} {each} bytes from each rank to each other")
    return "\n".join([*lines, f"  together up to {total:,} bytes that a rank writes"])


class Runnable(Protocol):
    """What is needed of a program to time it."""

    def run(self, tokens: int, begin: int = 0, end: int | None = None, rows: int = 1) -> None:
        """Run it for the first `tokens` tokens of its inputs, as `backend.Program` does."""

    def value(self, name: str) -> np.ndarray:
        """A value of the last run, once that is done."""


def exchanges_of(graph: Graph, tokens: int, times: int) -> Graph:
    """A graph with the exchanges of a rank's graph, `times` times one after the other, for `tokens` tokens.

    `graph` is what `shard` makes of a decode step of several ranks. In between nothing is computed: each `all_reduce`
    adds embeddings, each `all_gather` has the logits of one product. Raises `Error` for a graph without exchanges.
    """
    gather = graph.first("all_gather")
    reduces = [index for index, op in enumerate(graph.ops[:gather]) if op.kind == "all_reduce"]
    if gather == len(graph.ops) or not reduces:
        raise Error(f"{graph.name} has no exchanges: shard it for several ranks first")
    return _Exchanges(graph, tokens).run(reduces, gather, times)


class _Exchanges:
    """One run of `exchanges_of`. `found` has the values of the new graph by their names in the old one."""

    def __init__(self, graph: Graph, tokens: int) -> None:
        self.old, self.new = graph, Graph(f"exchanges of {graph.name}")
        self.found: dict[str, Value] = {name: self.new.input(name, (tokens,), "i32") for name in INPUTS}

    def run(self, reduces: Sequence[int], gather: int, times: int) -> Graph:
        old, new = self.old, self.new
        self._add(old.ops[old.first("embedding")])
        x = self.found[old.ops[old.first("embedding")].outputs[0]]
        self.found[old.ops[reduces[-1]].outputs[0]] = x  # the classifier's input, as if no layer had changed it
        for op in old.ops[reduces[-1] + 1 : gather]:
            self._add(op)
        for index in range(times):
            suffix = f".{index}" if index < times - 1 else ""
            for each in (*reduces, gather):
                self._exchange(old.ops[each], x, suffix)
        for op in old.ops[gather + 1 :]:
            self._add(op)
        new.outputs = [self.found[name].name for name in old.outputs]
        return new

    def _operand(self, name: str) -> Value:
        """The value that an op reads. A weight or the memory of all ranks is declared when it is first read."""
        if name not in self.found:
            value = self.old.values[name]
            declare = self.new.weight if value.kind == "weight" else self.new.state
            self.found[name] = declare(value.name, value.shape, value.dtype)
        return self.found[name]

    def _add(self, op: Op) -> None:
        """Append an op as it is."""
        results = self.new.add(op.kind, *map(self._operand, op.inputs), out=op.outputs, **op.attrs)
        self.found |= dict(zip(op.outputs, results, strict=True))

    def _exchange(self, op: Op, x: Value, suffix: str) -> None:
        """Append an exchange: of `x`, or of the rank's logits. Its outputs have names with this suffix."""
        own, *shared = op.inputs
        roots = [self.old.root(name) for name in shared]
        given = x if op.kind == "all_reduce" else self._operand(own)
        names = [f"{name}{suffix}" for name in op.outputs]
        out, *updated = self.new.add(op.kind, given, *map(self._operand, roots), out=names, **op.attrs)
        self.found |= dict(zip(roots, updated, strict=True))  # the next exchange reads what this one has updated
        self.found[op.outputs[0]] = out


def seconds_of_exchanges(
    shards: Sequence[Shard], tokens: int, program_of: Callable[[Sequence[Shard]], Runnable]
) -> float:
    """Seconds that the exchanges of a run of `tokens` tokens take on all ranks; a median.

    `shards` are the ranks' graphs of a decode step, `program_of` makes a program of each rank's part of a graph. All
    ranks come to each exchange at the same time: in a decode step a rank also waits for those that compute longer. Each
    exchange is a step of its own, also where fusion joins it with a linear op. Raises `DeviceError` if a rank fails.
    """

    def made(times: int) -> Runnable:
        return program_of([Shard(exchanges_of(part.graph, tokens, times)) for part in shards])

    few, many = made(1), made(1 + TIMES)
    differences: list[float] = []
    for repeat in range(REPEATS + 1):
        difference = _seconds(many, tokens) - _seconds(few, tokens)
        if repeat:  # the first warms up
            differences.append(difference / TIMES)
    return max(statistics.median(differences), 0.0)


def _seconds(program: Runnable, tokens: int) -> float:
    """Seconds of a run. A device may be behind the host: the runs are done when a value of the last can be read."""
    start = time.perf_counter()
    for _ in range(RUNS):
        program.run(tokens, rows=tokens)
    program.value("next")
    return (time.perf_counter() - start) / RUNS
