"""A time line of one decode step: which kernel, how long, and how much of the floor that the memory sets.

On a GPU every kind of step is measured by itself: the launches of all layers' instances of it, captured as one graph,
so that no weight is met twice and each kernel starts while the one before ends, as in a real step. Before each such
measurement a whole step runs, so that caches hold what they hold in a real one. On the CPU each step of a real run is
timed. Neighbours of different kinds overlap in a real step, so the sum is not the whole: both are shown.

A step's floor is its bytes divided by the measured bandwidth. Its bytes are the weights and the part of the KV cache
that it reads, and what it writes into the cache; activations stay in caches.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from ..errors import Error
from ..files import atomic_write
from ..ir import Graph
from ..model import Model
from ..plan import Step

ROUNDS = 9
CPU_ROUNDS = 40
SMALL_BYTES = 1 << 20
"""A step that moves less is repeated within a measurement: what it meets in a cache it also does in a real step."""
SMALL_REPEATS = 24
WHOLE_STEPS = 10
"""Whole steps, one behind the other, in a measurement."""


@dataclass(frozen=True)
class StepTime:
    """A step of the plan, measured. `layer` is None outside of the layers; `weights` are the short names it reads."""

    index: int
    op: str
    weights: str
    kernel: str
    layer: int | None
    seconds: float
    nbytes: int

    @property
    def name(self) -> str:
        """The op, with the weights that tell it from others of its kind."""
        return f"{self.op} ({self.weights})" if self.weights else self.op


@dataclass(frozen=True)
class Row:
    """All steps of a kind: `seconds` and `nbytes` are one step's, on average; `share` is of the sum of all steps."""

    name: str
    kernel: str
    count: int
    seconds: float
    nbytes: float
    rate: float
    bandwidth_fraction: float
    """The floor as a share of the time: 1 is as fast as memory allows."""
    share: float


@dataclass(frozen=True)
class Profile:
    """A measured decode step at `position` of a context; `bandwidth` is the memory's, in bytes a second."""

    model: str
    device: str
    position: int
    bandwidth: float
    whole_s: float
    steps: tuple[StepTime, ...]

    @property
    def sum_s(self) -> float:
        """Seconds of all steps, each measured by itself."""
        return sum(step.seconds for step in self.steps)

    @property
    def nbytes(self) -> int:
        """Bytes that a decode step must move."""
        return sum(step.nbytes for step in self.steps)

    @property
    def rows(self) -> list[Row]:
        """The steps by kind, in the order in which the kinds first come."""
        kinds: dict[tuple[str, str], list[StepTime]] = {}
        for step in self.steps:
            kinds.setdefault((step.name, step.kernel), []).append(step)
        rows = []
        for (name, kernel), steps in kinds.items():
            seconds = sum(step.seconds for step in steps)
            nbytes = sum(step.nbytes for step in steps)
            rate = nbytes / seconds
            rows.append(Row(
                name, kernel, len(steps), seconds / len(steps), nbytes / len(steps), rate, rate / self.bandwidth,
                seconds / self.sum_s,
            ))  # fmt: skip
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON; units are in the keys."""
        return {
            "model": self.model,
            "device": self.device,
            "position": self.position,
            "memory_bandwidth_bytes_per_second": self.bandwidth,
            "whole_step_s": self.whole_s,
            "sum_of_steps_s": self.sum_s,
            "bytes": self.nbytes,
            "rows": [asdict(row) for row in self.rows],
            "steps": [asdict(step) for step in self.steps],
        }

    def trace(self) -> dict[str, Any]:
        """The steps one after the other as a Chrome trace, for chrome://tracing or ui.perfetto.dev."""
        names = {0: "whole step, as it runs", 1: "its steps, each measured by itself"}
        events: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": f"{self.model} on {self.device}"}},
            *({"name": "thread_name", "ph": "M", "pid": 1, "tid": n, "args": {"name": t}} for n, t in names.items()),
            self._event("decode step", "whole", 0, 0.0, self.whole_s, self.nbytes),
        ]
        start = 0.0
        for step in self.steps:
            event = self._event(step.name, step.kernel, 1, start, step.seconds, step.nbytes)
            event["args"] |= {"step": step.index, "kernel": step.kernel}
            if step.layer is not None:
                event["args"]["layer"] = step.layer
            events.append(event)
            start += step.seconds
        return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"position": self.position}}

    def _event(self, name: str, kind: str, row: int, start: float, seconds: float, nbytes: int) -> dict[str, Any]:
        rate = nbytes / seconds
        return {
            "name": name, "cat": kind, "ph": "X", "pid": 1, "tid": row, "ts": start * 1e6, "dur": seconds * 1e6,
            "args": {
                "bytes": nbytes, "gigabytes_per_second": rate / 1e9,
                "percent_of_bandwidth": 100 * rate / self.bandwidth,
            },
        }  # fmt: skip

    def write_trace(self, path: str | PathLike[str]) -> None:
        """Write the trace, whole or not at all. Raises `Error` where that is impossible."""
        with atomic_write(path) as file:
            file.write(json.dumps(self.trace(), indent=1).encode() + b"\n")

    # As text

    @property
    def _title(self) -> str:
        return f"one decode step of {self.model} on {self.device}, at position {self.position:,}"

    @property
    def _cells(self) -> list[tuple[str, ...]]:
        cells: list[tuple[str, ...]] = [
            (
                row.name, row.kernel, f"{row.count}", f"{row.seconds * 1e6:,.2f}", f"{row.nbytes / 1e6:,.2f}",
                f"{row.rate / 1e9:,.0f}", f"{row.bandwidth_fraction:.0%}", f"{row.share:.1%}",
            )
            for row in self.rows
        ]  # fmt: skip
        count, nbytes = f"{len(self.steps)}", f"{self.nbytes / 1e6:,.2f}"
        for name, seconds in (("sum", self.sum_s), ("whole step, as it runs", self.whole_s)):
            rate = self.nbytes / seconds
            share = f"{seconds / self.sum_s:.1%}"
            times = f"{seconds * 1e6:,.2f}", nbytes, f"{rate / 1e9:,.0f}", f"{rate / self.bandwidth:.0%}"
            cells.append((name, "", count, *times, share))
        return cells

    @property
    def _note(self) -> str:
        return (
            f"% of memory: of the {self.bandwidth / 1e9:,.0f} GB/s that it gives here; more comes from caches. "
            "Steps overlap: the whole is not the sum."
        )

    def as_text(self) -> str:
        """The table for a pipe: columns of text."""
        lines = [HEADINGS, *self._cells]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]

        def line(cells: Sequence[str]) -> str:
            padded = [
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(padded).rstrip()

        rule = "-" * (sum(widths) + 2 * len(widths) - 2)
        body = [line(cells) for cells in self._cells]
        return "\n".join([self._title, line(HEADINGS), rule, *body[:-2], rule, *body[-2:], self._note])

    def show(self) -> None:
        """The table for a person at a terminal."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self._title, caption=self._note, caption_justify="left")
        for i, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if i < 2 else "right", overflow="fold")
        *steps, total, whole = self._cells
        for cells in steps:
            table.add_row(*cells)
        table.add_section()
        table.add_row(*total)
        table.add_row(*whole)
        Console().print(table)


HEADINGS = ("step", "kernel", "count", "µs each", "MB", "GB/s", "% of memory", "share")


def weight_bytes(model: Model) -> Callable[[str], int]:
    """name → bytes that a step reads to use the whole of a weight, where it lies: a GPU has its own layout."""
    if model.device.startswith("cuda"):
        operands = model._backend.weights.operands
        return lambda name: int(operands[name].nbytes)
    return lambda name: model.weights[name].nbytes


def step_bytes(graph: Graph, step: Step, nbytes_of: Callable[[str], int], position: int) -> int:
    """Bytes that a step must move for one token at `position`: weights, of an embedding table one row, and KV cache."""
    writes = any(graph.values[name].kind == "state" for name in step.op.outputs)
    total = 0
    for value in graph.operands(step.op.inputs):
        if value.kind == "weight":
            rows = value.shape[0] if step.op.kind == "embedding" else 1
            total += nbytes_of(value.name) // rows
        elif value.kind == "state":
            sequences, _, context, _ = value.shape
            total += value.nbytes // (sequences * context) * (1 if writes else position + 1)
    return total


def step_bytes_of_token(model: Model, position: int) -> int:
    """Bytes that a decode step of a model with a plan must move."""
    plan, nbytes_of = model.plan, weight_bytes(model)
    return sum(step_bytes(plan.graph, step, nbytes_of, position) for step in plan.steps)


def profile(model: Model, position: int, bandwidth: float) -> Profile:
    """Measure every step of one decode step, after `position` tokens of context.

    `bandwidth` is what floors are computed with, in bytes a second. Raises `Error` on the reference, which has no plan,
    `ContextError` if the position is outside of the context.
    """
    plan, nbytes_of = model.plan, weight_bytes(model)
    with model.exclusive(), model.reset_session() as session:
        program: Any = model._decode
        if position:
            session.prefill([token % model.config.vocab_size for token in range(1, position + 1)])
        session.set_inputs(program, [0])
        sizes = [step_bytes(plan.graph, step, nbytes_of, position) for step in plan.steps]
        if model.device.startswith("cuda"):
            kernels = ["+".join(call.name for call in calls) for calls in program.prepared_launches]
            names = [_describe(step)[0] for step in plan.steps]
            times, whole = _time_gpu(program, list(zip(names, kernels, sizes, strict=True)), sizes)
        else:
            kernels = [step.kernel.name for step in plan.steps]
            times, whole = _time_cpu(program)
    steps = []
    for index, (step, kernel, seconds, nbytes) in enumerate(zip(plan.steps, kernels, times, sizes, strict=True)):
        weights, layer = _describe(step)
        steps.append(StepTime(index, step.op.kind, weights, kernel.removesuffix("_kernel"), layer, seconds, nbytes))
    device = str(getattr(model._backend, "device", model.device))
    return Profile(model.path.name, device, position, bandwidth, whole, tuple(steps))


def _describe(step: Step) -> tuple[str, int | None]:
    """Short names of a step's matrices, and its layer."""
    layer = None
    for name in (*step.op.inputs, *step.op.outputs):
        if name.startswith("layers."):
            layer = int(name.split(".")[1])
            break
    matrices = [name.rpartition(".")[2] for name in step.op.inputs if "/" not in name]
    known = [name for name in matrices if name in MATRICES]
    return " ".join(known), layer


MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "tok_embeddings", "output")


def _time_cpu(program: Any) -> tuple[list[float], float]:
    """Seconds of each step and of the whole, medians; what entering compiled code takes is not a step's."""

    def seconds(begin: int, end: int) -> float:
        start = time.perf_counter()
        program.run(1, begin, end)
        return time.perf_counter() - start

    count = len(program.plan.steps)
    rounds = [[seconds(i, i + 1) for i in range(count)] for _ in range(CPU_ROUNDS + 1)][1:]
    entry = statistics.median(seconds(0, 0) for _ in range(CPU_ROUNDS))
    whole = statistics.median(seconds(0, count) for _ in range(CPU_ROUNDS))
    steps = [max(statistics.median(times) - entry, 1e-9) for times in zip(*rounds, strict=True)]
    return steps, max(whole - entry, 1e-9)


def _time_gpu(program: Any, kinds: Sequence[Any], sizes: Sequence[int]) -> tuple[list[float], float]:
    """Seconds of each step and of the whole; `kinds` says which steps are alike, and `sizes` what each moves."""
    from ..cuda.driver import CudaGraph, Stopwatch

    device = program.backend.device
    watch = Stopwatch(device)
    program.run(1)  # the inputs lie on the device now, and stay
    whole = CudaGraph(device, [call for calls in program.prepared_launches for call in calls])

    def median(indices: Sequence[int]) -> float:
        """Of these steps, one behind the other. The device is busy when they are asked for: the host is not timed."""
        recording = CudaGraph(device, [call for index in indices for call in program.prepared_launches[index]])

        def once() -> float:
            whole.replay()
            return watch.measure(recording.replay)

        once()
        return statistics.median(once() for _ in range(ROUNDS))

    groups: dict[Any, list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    least = min(range(len(sizes)), key=sizes.__getitem__)
    few, many = median([least]), median([least] * 33)
    start = max(0.0, few - (many - few) / 32)  # what a replay takes beside its kernels
    times = [0.0] * len(kinds)
    for indices in groups.values():
        repeats = -(-SMALL_REPEATS // len(indices)) if sizes[indices[0]] < SMALL_BYTES else 1
        each = (median(indices * repeats) - start) / (len(indices) * repeats)
        for index in indices:
            times[index] = max(each, 1e-9)

    def several() -> None:
        for _ in range(WHOLE_STEPS):
            whole.replay()

    several()
    return times, statistics.median(watch.measure(several) for _ in range(ROUNDS)) / WHOLE_STEPS


def require_plan(model: Model) -> None:
    """Raise `Error` for a model that cannot be profiled, before anything is measured."""
    if model.device == "reference":
        raise Error("the reference has no plan whose steps could be timed; pass --device cpu or --device cuda")
