"""A plan bound to device memory: arena, inputs, launches, and the runs of its steps as CUDA graphs.

All device memory is allocated when a program is made. The launches of a run are captured once as a CUDA graph, and
again for long contexts, where other kernels are faster. A replay runs them all. On sm_90 each kernel starts before the
previous one has ended (programmatic dependent launch). `decode_pipeline` queues steps ahead of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CLOSED, Error
from ..graph import PAGE_TABLE
from ..ir import DTYPES, Graph, Value
from ..plan import Plan, Step
from ..sampling import Sampled, SamplerTable
from .decode_pipeline import DecodePipeline
from .driver import CudaGraph, Device, Memory, Pinned, PreparedLaunch
from .kernels.params import PREFILL_ATTENTION_TILE, WGMMA_ATTENTION_TILE
from .launch import Array, LaunchContext, Matrix, RowKind, Work
from .nccl import PreparedCollective
from .ops import joins
from .weights import ALIGNMENT, aligned

if TYPE_CHECKING:
    from .backend import CudaBackend

GraphKey = tuple[str | int, ...]
"""Key of a captured graph: (first step, end, variant start, …), or ("run", kind of tail, variant start, …), followed by
the kinds of rows in the run, and with NCCL by how many rows it exchanges. Of a run with NCCL those after the plan have
("sample", ) or ("receive", rows …).
"""
Prepared = PreparedLaunch | PreparedCollective
"""A launch, or NCCL in its place, ready to be enqueued."""
LEAST_EXCHANGED = 128
"""NCCL exchanges as many rows as a graph was captured for: this times a power of two, at most the program's tokens."""


def rows_to_exchange(rows: int, most: int, least: int, factor: int) -> int:
    """`least` times a power of `factor` that has room for `rows`, at most `most`: few, as each has its graph."""
    count = least
    while count < rows:
        count *= factor
    return min(count, most)


def _read_once(plan: Plan) -> list[bool]:
    """For each step but the last, whether only the next one reads what it computes, once."""
    graph, consumers = plan.graph, plan.graph.consumers()
    return [
        all(
            name not in graph.outputs and consumers.get(name) == [following.op] and following.op.inputs.count(name) == 1
            for name in step.op.outputs
        )
        for step, following in pairwise(plan.steps)
    ]


def tile_rows(capability: tuple[int, int]) -> int:
    """Rows of a tile of the kernel that computes attention for prompts on a card."""
    return WGMMA_ATTENTION_TILE if capability == (9, 0) else PREFILL_ATTENTION_TILE


def write_tiles(positions: np.ndarray, sequences: np.ndarray, most: int, out: np.ndarray) -> None:
    """List the rows of a run in tiles i32[1 + at least T, 2], for attention of prompts and of single rows.

    `out[0]` is (tiles, single rows). The tiles follow: (first row, rows), up to `most` rows of one sequence whose
    positions follow each other; those with most keys first. Single rows, without such a neighbour, are listed from the
    end on: (row, 1).
    """
    joined = (sequences[1:] == sequences[:-1]) & (positions[1:] == positions[:-1] + 1)
    if len(joined) and joined.all():  # a prompt alone, whose first token waits for this
        first = np.arange(0, len(positions), most)[::-1]
        out[0] = len(first), 0
        out[1 : 1 + len(first), 0] = first
        out[1 : 1 + len(first), 1] = most
        out[1, 1] = len(positions) - first[0]
        return
    starts = np.concatenate([[0], 1 + np.flatnonzero(~joined)])
    lengths = np.diff(starts, append=len(positions))
    alone = starts[lengths == 1]
    starts, lengths = starts[lengths > 1], lengths[lengths > 1]
    each = -(-lengths // most)
    chunk = np.repeat(np.arange(len(starts)), each)
    inside = most * (np.arange(len(chunk)) - (np.cumsum(each) - each)[chunk])
    first = starts[chunk] + inside
    order = np.argsort(-positions[first], kind="stable")
    out[0] = len(first), len(alone)
    out[1 : 1 + len(first), 0] = first[order]
    out[1 : 1 + len(first), 1] = np.minimum(most, (lengths[chunk] - inside)[order])
    if len(alone):
        out[-len(alone) :, 0], out[-len(alone) :, 1] = alone[::-1], 1


class RunInputs:
    """The inputs of a run: numbers of tokens and of rows with logits, the graph's inputs and the run's tiles, in one
    block of memory on either side.

    The host writes `host`; `send` copies it to the device.
    """

    PINNED_COPIES = 8
    """Maximum number of runs whose inputs wait in the stream."""

    def __init__(self, device: Device, graph: Graph) -> None:
        self._device = device
        values = [value for value in graph.values.values() if value.kind == "input"]
        offsets, size = {}, ALIGNMENT
        for value in values:
            offsets[value.name] = size
            size += aligned(value.nbytes)
        where = [graph.values.get(name) for name in ("positions", "sequences")]
        self.max_tokens = where[0].shape[0] if all(where) and where[0] else 0
        tiles_at, tiles_shape = size, (1 + self.max_tokens, 2)
        size += aligned(8 * tiles_shape[0])
        logits = graph.values.get("logits")
        self.max_rows = logits.shape[0] if logits is not None else 1
        slots_at = size
        size += aligned(4 * self.max_rows)
        self.nbytes = size
        self._pinned = Pinned(device, size * self.PINNED_COPIES)
        self.memory = Memory(device, size, "the inputs")
        self._sent = 0
        self._mirror = np.zeros(size, np.uint8)
        self._host_counts = self._mirror[:8].view(np.int32)
        self.host = {
            v.name: self._mirror[offsets[v.name] :][: v.nbytes].view(DTYPES[v.dtype]).reshape(v.shape) for v in values
        }
        self._host_slots = self._mirror[slots_at:][: 4 * self.max_rows].view(np.int32)
        self._host_tiles = self._mirror[tiles_at:][: 8 * tiles_shape[0]].view(np.int32).reshape(tiles_shape)
        self.tiles = self.memory.array(tiles_at, tiles_shape, "i32")
        """i32[1 + max tokens, 2] in device memory: what `write_tiles` wrote."""
        self.tokens = self.memory.array(0, (1,), "i32")
        """i32[1] in device memory: tokens of the run."""
        self.rows = self.memory.array(4, (1,), "i32")
        """i32[1] in device memory: rows of the run with logits."""
        self.slots = self.memory.array(slots_at, (self.max_rows,), "i32")
        """i32[most rows with logits] in device memory: the slot of each row that is sampled."""
        self.device = {v.name: self.memory.array(offsets[v.name], v.shape, v.dtype) for v in values}

    @property
    def row_kinds(self) -> tuple[RowKind, ...]:
        """What kinds of rows the run has that was sent last."""
        kinds: tuple[RowKind, RowKind] = ("chunks", "single rows")
        return tuple(kind for kind, count in zip(kinds, self._host_tiles[0], strict=True) if count)

    def send(self, tokens: int, rows: int, slots: np.ndarray | None = None) -> None:
        """Enqueue a copy of the current inputs to the device. `slots` are those of the `rows` rows that are sampled."""
        self._host_counts[:] = tokens, rows
        if slots is not None:
            self._host_slots[:rows] = slots
        if self.max_tokens > 1:
            positions, sequences = self.host["positions"][:tokens], self.host["sequences"][:tokens]
            write_tiles(positions, sequences, tile_rows(self._device.capability), self._host_tiles)
        copy = self._sent % self.PINNED_COPIES
        if copy == 0 and self._sent:
            self._device.synchronize()  # all pinned copies have been read
        self._sent += 1
        start = copy * self.nbytes
        self._pinned.bytes[start : start + self.nbytes] = self._mirror
        self._device.write(self.memory.address, self._pinned.address + start, self.nbytes)


def bind_step(step: Step, graph: Graph, ctx: LaunchContext, operands: Mapping[str, Array | Matrix]) -> list[Work]:
    """The launches of a plan's step, from the launch function that the registry has for it.

    `operands` maps the names of values and of the step's scratch to device memory. Raises `Error` for a launch function
    that has a parameter which the operator does not provide.
    """
    arguments: list[Array | Matrix | float] = [operands[value.name] for value in graph.operands(step.op.inputs)]
    # an output that updates an input in place is that input's memory: it is not a separate operand
    arguments += [operands[value.name] for value in graph.operands(step.op.outputs) if value.alias is None]
    scratch: dict[str, Value] = dict(zip(step.kernel.scratch, step.scratch, strict=True))
    for name in step.kernel.named:
        if name not in scratch and name not in step.op.attrs:
            raise Error(
                f"kernel {step.kernel.name} has a parameter {name}, but {step.op.kind} has no attribute or scratch of "
                f"that name; it has {', '.join([*step.op.attrs, *scratch]) or 'none'}"
            )
        arguments.append(operands[scratch[name].name] if name in scratch else step.op.attrs[name])
    launches: list[Work] = step.kernel.function(ctx, *arguments)
    return launches


class CudaProgram:
    """A plan bound to device memory: write `inputs`, call `run`, read `value`."""

    def __init__(self, backend: CudaBackend, plan: Plan) -> None:
        self._owned: list[Memory] = []
        self._freed = False
        self._graphs: dict[GraphKey, CudaGraph] = {}
        try:
            self._bind(backend, plan)
        except BaseException:
            self.free()  # now: a traceback may keep this object alive for long
            raise

    def _bind(self, backend: CudaBackend, plan: Plan) -> None:
        device = backend.device
        self.plan, self.graph, self.backend, self._device = plan, plan.graph, backend, device
        self.prefill_end = plan.prefill_end
        self.run_inputs = RunInputs(device, plan.graph)
        self.inputs = self.run_inputs.host
        self._owned.append(self.run_inputs.memory)
        self.arena = backend.arena(plan.arena_bytes, f"the arena of {plan.graph.name}")
        self.entries = 0
        """Number of times that the host has enqueued work in the stream."""
        self.values = self._place_values()
        self.ctx = LaunchContext(
            device.n_sms,
            device.shared_limit,
            self.run_inputs.tokens,
            self.run_inputs.tiles,
            self._zeros,
            device.capability == (9, 0) and not backend.batch_invariant,  # which changes kernels from 17 rows on
            device.capability >= (9, 0),
            backend.batch_invariant,
            backend.peers,
        )
        of_rows = replace(self.ctx, tokens=self.run_inputs.rows)
        operands = self.values | backend.weights.operands
        self.launches = [
            bind_step(step, plan.graph, of_rows if step.of_rows else self.ctx, operands) for step in plan.steps
        ]
        """The launches of each step."""
        self._by_nccl = backend.by_nccl
        joins.join(self.launches, _read_once(plan), cache(lambda count: self._constant([1.0] * count)))
        self.variant_starts = sorted({
            start for step in self.launches for launch in step for start in launch.variant_starts
        })  # fmt: skip
        """Positions at which some launches change to a faster variant."""
        self._prepared: dict[int, list[list[Prepared]]] = {}
        self.pipeline = DecodePipeline(self)
        self._owned.append(self.pipeline.sampled.memory)

    def _place_values(self) -> dict[str, Array | Matrix]:
        """Allocate device memory for each value and scratch array, except weights."""
        plan, values = self.plan, dict[str, Array | Matrix](self.run_inputs.device)
        placed = {value.name: value for step in plan.steps for value in step.scratch} | plan.graph.values
        for name, place in plan.placements.items():
            if name not in values:
                values[name] = self.arena.array(place.offset, placed[name].shape, placed[name].dtype)
        for value in plan.graph.values.values():
            if value.kind == "state":
                values[value.name] = self.backend.states[plan.graph.root(value.name)]
            elif value.kind == "constant":
                values[value.name] = self._constant(plan.graph.constants[value.name])
        return values

    # Memory

    def array(self, name: str) -> Array:
        """The device memory of a value that is not a weight."""
        value = self.values[name]
        assert isinstance(value, Array)
        return value

    def _zeros(self, count: int) -> Array:
        memory = Memory(self._device, 4 * count, "counters")
        self._owned.append(memory)
        self._device.fill(memory.address, 0, 4 * count)
        return memory.array(0, (count,), "i32")

    def _constant(self, elements: Sequence[float]) -> Array:
        host = np.array(elements, np.float32)
        memory = Memory(self._device, host.nbytes, "a constant")
        self._owned.append(memory)
        self._device.write(memory.address, host.ctypes.data, host.nbytes)
        self._device.synchronize()
        return memory.array(0, host.shape, "f32")

    def value(self, name: str) -> np.ndarray:
        """A copy of a value's memory. Outside the value's lifetime the memory holds other values."""
        self._require_open()
        self._device.make_current()
        array = self.array(name)
        shape = (array.nbytes,) if array.dtype == "q8_0" else array.shape
        out = np.empty(shape, DTYPES[array.dtype])
        self._device.read(array.address, out)
        return out

    def write(self, name: str, elements: np.ndarray) -> None:
        """Overwrite a value's memory."""
        array = self.array(name)
        elements = np.ascontiguousarray(elements, DTYPES[array.dtype])
        assert elements.nbytes == array.nbytes
        self._device.make_current()
        self._device.write(array.address, elements.ctypes.data, elements.nbytes)
        self._device.synchronize()

    @property
    def nbytes(self) -> int:
        """Device memory of this program alone."""
        return sum(memory.nbytes for memory in self._owned)

    def free(self) -> None:
        """Free the memory."""
        self._freed = True
        self._graphs.clear()
        for memory in self._owned:
            memory.free()

    def _require_open(self) -> None:
        if self._freed:
            raise Error(CLOSED)

    # Launches

    @property
    def all_launches(self) -> list[list[Work]]:
        """The launches of each step with all their variants."""
        return [
            [launch.variant_for(start) for start in (0, *self.variant_starts) for launch in step]
            for step in self.launches
        ]

    @property
    def prepared_launches(self) -> list[list[Prepared]]:
        """The prepared launches of each step, in the variants for the positions of the current inputs."""
        return self._prepared_from(self.variant_start(self.max_position(self.plan.tokens)))

    def launches_of_run(self, tokens: int) -> list[list[Prepared]]:
        """The launches of each step as the last run of `tokens` tokens has them: in the variants for their positions,
        and for the kinds of rows that it had.
        """
        start, kinds = self.variant_start(self.max_position(tokens)), self.run_inputs.row_kinds
        return [self.prepared_steps(index, index + 1, start, kinds) for index in range(len(self.plan.steps))]

    def prepare_variants(self) -> None:
        """Prepare the launches of all variants now, so that a long context does not wait for them later."""
        for start in (0, *self.variant_starts):
            self._prepared_from(start)

    def kernel_names(self, tokens: int | None = None) -> list[str]:
        """Names of the kernels that each step launches at the inputs' positions, joined by "+". With the number of
        `tokens` of the run that was last, without kernels for kinds of rows that it did not have.
        """
        steps = self.prepared_launches if tokens is None else self.launches_of_run(tokens)
        return ["+".join(launch.name for launch in launches) for launches in steps]

    def max_position(self, tokens: int) -> int:
        """The largest position of the first `tokens` inputs; 0 for a graph without positions."""
        return int(self.inputs["positions"][:tokens].max()) if "positions" in self.inputs else 0

    @property
    def context_limit(self) -> int:
        """Tokens that fit a row of the page table; 0 for a graph without a KV cache."""
        states = [value for value in self.graph.values.values() if value.kind == "state"]
        pages = max((value.shape[2] for value in states if len(value.shape) == 4), default=0)
        return pages * max((value.shape[1] for value in states if value.name == PAGE_TABLE), default=0)

    def variant_start(self, position: int) -> int:
        """The largest of `variant_starts` that is not above a position; 0 before the first."""
        return max((start for start in self.variant_starts if start <= position), default=0)

    def _prepared_from(self, start: int) -> list[list[Prepared]]:
        """Each step's launches for positions from a variant's start on. Kernels not seen before are compiled now."""
        if start not in self._prepared:
            launches = [[launch.variant_for(start) for launch in step] for step in self.launches]
            self._prepared[start] = self.backend.prepare_launches(launches)
        return self._prepared[start]

    def prepared_steps(
        self, begin: int, end: int, start: int, kinds: Collection[RowKind] = ("chunks", "single rows")
    ) -> list[Prepared]:
        """The launches of steps [begin, end), one after the other, in the variants from `start` on, for runs that have
        rows of these kinds.
        """
        return [
            launch
            for step in self._prepared_from(start)[begin:end]
            for launch in step
            if launch.only_for is None or launch.only_for in kinds
        ]

    def exchanged(self, tokens: int, rows: int) -> tuple[int, ...]:
        """(tokens, rows with logits) that NCCL exchanges in a run with `tokens` and `rows`; empty without NCCL.

        All ranks find the same: they have the same runs.
        """
        if not self._by_nccl:
            return ()
        most, most_rows = self.plan.tokens, self.run_inputs.max_rows
        if "rows" not in self.inputs:  # made for this number of sequences
            return most, most_rows
        return (
            rows_to_exchange(tokens, most, min(LEAST_EXCHANGED, most), 2), rows_to_exchange(rows, most_rows, 1, 4)
        )  # fmt: skip

    def sized(self, launches: Sequence[Prepared], counts: Sequence[int]) -> list[Prepared]:
        """The launches, whose collectives exchange as many rows as `exchanged` says."""

        def rows_of(launch: PreparedCollective) -> int:
            return counts[launch.collective.counter == self.run_inputs.rows]

        return [
            replace(launch, rows=rows_of(launch)) if isinstance(launch, PreparedCollective) else launch
            for launch in launches
        ]

    def capture(self, key: GraphKey, launches: list[Prepared]) -> None:
        """Capture a graph, unless it has been."""
        if key not in self._graphs:
            self._graphs[key] = CudaGraph(self._device, launches)

    def replay(self, key: GraphKey, launches: Callable[[], list[Prepared]]) -> None:
        """Enqueue a captured graph in the stream. The first time, `launches` gives the launches to capture."""
        if key not in self._graphs:
            self._graphs[key] = CudaGraph(self._device, launches())
        self._graphs[key].replay()
        self.entries += 1

    # Runs

    def run(self, tokens: int, begin: int = 0, end: int | None = None, rows: int = 1) -> None:
        """Run steps [begin, end) for the first `tokens` tokens of the inputs: one graph launch. `rows` of them have
        logits.

        Raises `DeviceError` when the device fails.
        """
        last = len(self.plan.steps) if end is None else end
        if not (1 <= tokens <= self.plan.tokens and 0 <= begin <= last <= len(self.plan.steps)):
            raise Error(
                f"cannot run {tokens} tokens of {self.plan.tokens}, steps {begin} to {last} of {len(self.plan.steps)}"
            )
        self._claim_backend()
        self.pipeline.forget()
        self.run_steps(tokens, begin, last, rows)

    def submit(self, tokens: int, rows: int, table: SamplerTable | None) -> int:
        """Start a run of all steps that samples a token for each of `rows` rows: one graph launch. Returns a ticket.

        Without a table rank 0 samples, and this rank receives the tokens; nobody collects them here.
        """
        if not (1 <= rows <= tokens <= self.plan.tokens):
            raise Error(f"cannot run {tokens} tokens of {self.plan.tokens} and sample for {rows} rows")
        self._claim_backend()
        return self.pipeline.submit(tokens, rows, table)

    def collect(self, ticket: int) -> Sampled:
        """Wait for a run and return what it sampled. Raises `DeviceError` when the device fails."""
        self._device.make_current()
        return self.pipeline.collect(ticket)

    def run_steps(self, tokens: int, begin: int, end: int, rows: int = 1) -> None:
        """Run steps [begin, end) for the current inputs, without sampling."""
        start = self.variant_start(self.max_position(tokens))
        self.run_inputs.send(tokens, rows)
        kinds, counts = self.run_inputs.row_kinds, self.exchanged(tokens, rows)
        self.replay(
            (begin, end, start, *kinds, *counts),
            lambda: self.sized(self.prepared_steps(begin, end, start, kinds), counts),
        )

    def _claim_backend(self) -> None:
        """Tell the program that ran before that its next run follows another's: programs share the KV cache."""
        self._require_open()
        self._device.make_current()
        before, self.backend.current = self.backend.current, self
        if before is not None and before is not self:
            before.pipeline.forget()
