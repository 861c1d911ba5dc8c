"""`NUMBALLAMA_DEBUG`: print what runs, on stderr. 1: the graph; 2: also the plans; 3: also each step of each run.

At level 3 every run is done twice: first step by step, each step timed and printed, then as usual. A repeated step
writes the same values again, so the results are those of an ordinary run; only the speed is not. The exception is an op
of your own that computes a state from its old value, as a running sum does: it adds twice.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

import numpy as np

from ..backend import Backend, Program
from ..errors import Error
from ..ir import Graph
from ..plan import Plan
from ..sampling import Sampled, SamplerTable
from .traffic import step_bytes

VARIABLE = "NUMBALLAMA_DEBUG"
GRAPH, PLAN, STEPS = 1, 2, 3


def level() -> int:
    """The level that the environment sets; 0 if it sets none. Raises `Error` for values other than 0 to 3."""
    word = os.environ.get(VARIABLE, "").strip() or "0"
    if word not in ("0", "1", "2", "3"):
        raise Error(f"{VARIABLE} is {word!r}; choose 1 (graph), 2 (also plans), 3 (also each step of each run) or 0")
    return int(word)


def print_graph(graph: Graph) -> None:
    """Print the graph as declared, before any fusion."""
    if level() >= GRAPH:
        _print(str(graph))


def watched(program: Program, backend: Backend) -> Program:
    """The program itself or, at level 3, one that prints every step it runs. Prints the program's plan from level 2."""
    found = level()
    if found >= PLAN and program.plan is not None:
        _print(str(program.plan))
    return WatchedProgram(program, backend) if found >= STEPS else program


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class WatchedProgram:
    """A program that runs its steps one at a time, prints each, and then runs as usual for the result."""

    def __init__(self, program: Program, backend: Backend) -> None:
        self._program, self._backend = program, backend
        self._warm: set[tuple[int, str]] = set()

    @property
    def entries(self) -> int:
        """Number of times that the program was entered, including the entries for printing."""
        return self._program.entries

    @entries.setter
    def entries(self, count: int) -> None:
        self._program.entries = count

    @property
    def graph(self) -> Graph:
        """The program's graph."""
        return self._program.graph

    @property
    def plan(self) -> Plan | None:
        """The program's plan."""
        return self._program.plan

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """The program's inputs."""
        return self._program.inputs

    @property
    def prefill_end(self) -> int:
        """The program's `prefill_end`."""
        return self._program.prefill_end

    def value(self, name: str) -> np.ndarray:
        """A value of the last run."""
        return self._program.value(name)

    def kernel_names(self, tokens: int | None = None) -> list[str]:
        """The program's kernels."""
        return self._program.kernel_names(tokens)

    def run(self, tokens: int, begin: int = 0, end: int | None = None, rows: int = 1) -> None:
        """Run and print the steps one at a time, then run them as usual."""
        if begin:  # the run goes on from where it has stopped: steps that work in place must run once
            self._print_steps(tokens, begin, end, rows)
        else:
            self._print_steps(tokens, begin, end)
            self._program.run(tokens, begin, end, rows)

    def submit(self, tokens: int, rows: int, table: SamplerTable) -> int:
        """Run and print the steps one at a time, then start the run as usual."""
        ids = self.inputs["ids"][:tokens].copy()
        self.inputs["ids"][:tokens] = ids.clip(min=0)  # FEED is no row of the embedding; it is for `submit`
        self._print_steps(tokens, 0, None)
        self.inputs["ids"][:tokens] = ids
        return self._program.submit(tokens, rows, table)

    def collect(self, ticket: int) -> Sampled:
        """What the program's run sampled."""
        return self._program.collect(ticket)

    def _print_steps(self, tokens: int, begin: int, end: int | None, once_for: int = 0) -> None:
        """Run and print the steps. `once_for`: rows with logits of a run whose steps may run only once; else 0."""
        steps = range(begin, len(self.graph.ops) if end is None else end)
        if not steps:
            return  # a first call that only starts the workers
        position = int(self.inputs["positions"][tokens - 1]) if "positions" in self.inputs else 0
        positions = f"positions {position - tokens + 1} to {position}" if tokens > 1 else f"position {position}"
        _print(f"run of {self.graph.name}: {positions}, steps {steps.start} to {steps.stop - 1}")
        total = 0.0
        kernels = self.kernel_names()
        for index in steps:
            seconds = self._seconds(tokens, index, kernels[index], once_for)
            total += seconds
            _print(self._line(index, kernels[index], tokens, position, seconds))
        _print(f"  {total * 1e6:,.1f} µs in all, one step at a time")

    def _seconds(self, tokens: int, index: int, kernel: str, once_for: int) -> float:
        """Seconds of a step by the host's clock, without the work that only its first run does if it may run twice."""
        if not once_for and (index, kernel) not in self._warm:
            self._warm.add((index, kernel))
            self._program.run(tokens, index, index + 1)
        self._backend.synchronize()
        start = time.perf_counter()
        self._program.run(tokens, index, index + 1, once_for or 1)
        self._backend.synchronize()
        return time.perf_counter() - start

    def _line(self, index: int, kernel: str, tokens: int, position: int, seconds: float) -> str:
        graph = self.graph
        op = graph.ops[index]
        results = ", ".join(str(value) for value in graph.operands(op.outputs))
        nbytes = step_bytes(graph, op, self._backend.weight_nbytes, position, tokens)
        return f"  {index:4} {seconds * 1e6:10,.1f} µs {nbytes:14,} bytes  {kernel} ({op.kind}) → {results}"
