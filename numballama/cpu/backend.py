"""The CPU backend: binds a plan to memory and compiles its kernels. `executor` then runs it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numba
import numpy as np
from numba import types

from .. import memory
from ..checkpoint import Weight
from ..errors import Error
from ..fusion import fuse
from ..graph import NOT_CACHED, PAGE_TABLE
from ..host import environment, interrupts
from ..host.cgroup import cpu_quota, usable_cores
from ..ir import DTYPES, Graph, Value
from ..plan import ALIGNMENT, Plan, Step, lower
from ..quantization.kv import split_q8_0
from ..quantization.types import TYPE_TRAITS
from ..sampling import Sampled, SamplerTable
from ..validation import whole_number
from . import bandwidth, ops, timing
from .compiler import compile_step
from .executor import (
    ADDRESS,
    BEGIN,
    LOGITS,
    MAX_TOKENS,
    OF_ROWS,
    OPERANDS,
    OUT,
    ROWS,
    SAMPLER,
    describe_run,
    run_steps,
    threads_of_rank,
)
from .fork import refuse_forked
from .vecdot import RECORD_TYPES
from .workers import WorkerThreads

if TYPE_CHECKING:
    from ..backend import BackendName, Program
    from ..quantization.types import ActivationType, KVType


class CpuProgram:
    """A plan bound to memory: write `inputs`, call `run`, read `value`.

    `table` is the step table (see `executor`), `values` gives each value's memory as an array, `arena` is the memory of
    temporaries. `keep_alive` holds everything else that the addresses in the table point to.
    """

    def __init__(
        self,
        plan: Plan,
        table: np.ndarray,
        values: Mapping[str, np.ndarray],
        arena: np.ndarray,
        threads: WorkerThreads,
        keep_alive: object,
    ) -> None:
        self.plan, self.table, self.arena, self._threads = plan, table, arena, threads
        self._values, self._keep_alive = values, keep_alive
        self._record = describe_run(table)
        self._record_address = self._record.ctypes.data
        logits = values.get("logits", table)
        self._logits, self._slots = logits.ctypes.data, np.zeros(len(logits), np.int32)
        self._sampled = Sampled.empty(0, 0)
        self.inputs = {v.name: values[v.name] for v in plan.graph.values.values() if v.kind == "input"}
        self.graph, self.prefill_end = plan.graph, plan.prefill_end
        self.entries = 0
        """Number of calls into compiled code."""

    def value(self, name: str) -> np.ndarray:
        """The memory of a value, as an array of its shape. Outside the value's lifetime it may hold another's data."""
        return self._values[name]

    def kernel_names(self, tokens: int | None = None) -> list[str]:
        """Name of each step's kernel."""
        return [step.kernel.name for step in self.plan.steps]

    def run(self, tokens: int, begin: int = 0, end: int | None = None, rows: int = 1) -> None:
        """Run steps [begin, end) for the first `tokens` tokens of the inputs: one call into compiled code.

        `rows` of them have logits. Raises `Error` when a kernel failed, `DeviceError` in a forked child.
        """
        self._record[SAMPLER] = 0
        self._run_steps(tokens, begin, len(self.plan.steps) if end is None else end, rows)

    def submit(self, tokens: int, rows: int, table: SamplerTable) -> int:
        """Run all steps and sample a token for each of `rows` rows: one call into compiled code.

        Raises as `run` does. If all rows are greedy, the graph's own argmax gives their tokens.
        """
        if not 1 <= rows <= min(tokens, len(self._slots)):
            raise Error(f"cannot run {tokens} tokens of {self.plan.tokens} and sample for {rows} rows")
        slots, chosen = self._slots[:rows], self.inputs.get("rows")
        sequences = self.inputs["sequences"]
        slots[:] = sequences[:rows] if chosen is None else sequences[chosen[:rows]]
        n_top = table.top_logprobs(slots)
        self._sampled = sampled = Sampled.empty(rows, max(n_top, 0))
        end = len(self.plan.steps)
        if n_top < 0 and all(table.is_argmax(slot) for slot in slots.tolist()):
            self._record[SAMPLER] = 0
            self._run_steps(tokens, 0, end, rows)
            sampled.tokens[:] = self._values["next"][:rows]
            for slot, token in zip(slots.tolist(), sampled.tokens.tolist(), strict=True):
                if token >= 0:
                    table.accept(slot, token)
            return 0
        self._record[LOGITS:OUT] = self._logits, slots.ctypes.data, table.address
        self._record[OUT:] = sampled.addresses
        self._run_steps(tokens, 0, self.plan.sampling_start, rows)
        return 0

    def collect(self, ticket: int) -> Sampled:
        """What the last run sampled."""
        return self._sampled

    def _run_steps(self, tokens: int, begin: int, end: int, rows: int) -> None:
        if not (1 <= tokens <= self.plan.tokens and 0 <= begin <= end <= len(self.plan.steps)):
            raise Error(
                f"cannot run {tokens} tokens of {self.plan.tokens}, steps {begin} to {end} of {len(self.table)}"
            )
        self._record[BEGIN : ROWS + 1] = begin, end, tokens, rows
        with self._threads.region(self.plan.workers):
            self.entries += 1
            if run_steps(self._record_address, self.plan.workers, self._threads.address):
                raise Error("a kernel failed")


class CpuBackend:
    """Weights and KV cache in host memory, and programs that use them.

    `threads` is the number of workers that share a step. The maximum is Numba's number of threads; the default too,
    unless a container's CPU quota is below. `batch_invariant`: all runs use the kernels for few tokens, so that a row's
    bits do not depend on their number. `rank` is for several backends of this process that run at the same time: each
    has worker threads of its own. Raises `DeviceError` in a child that was forked after workers had started.
    """

    name: ClassVar[BackendName] = "cpu"
    prefill_chunk = 128
    default_kv_dtype: ClassVar[KVType] = "f32"
    activation_types: ClassVar[tuple[ActivationType, ...]] = ("f32", "int8")
    in_host_memory: ClassVar[bool] = True
    mixed_tokens: ClassVar[int] = 16
    lookahead: ClassVar[int] = 0
    decode_sizes: tuple[int, ...] = (1,)
    most_sequences: int | None = None
    failure = None

    def __init__(
        self, weights: Mapping[str, Weight], threads: int | None = None, batch_invariant: bool = False, rank: int = 0
    ) -> None:
        refuse_forked()
        self._threads = threads_of_rank(rank)
        limit, cores, quota = numba.config.NUMBA_NUM_THREADS, usable_cores(), cpu_quota()
        default = limit if environment.thread_limit() else min(limit, cores)
        threads = None if threads is None else whole_number("threads", threads, 1)
        self.weights = weights
        self._without = ops.FOR_MANY_TOKENS if batch_invariant else ()
        wanted = min(threads or default, limit)
        with interrupts.deferred():
            self.workers = self._threads.start(wanted)
        self.notes: list[str] = []
        if self.workers < wanted:
            self.notes.append(f"{wanted} threads wanted, {self.workers} used: the system starts no more")
        if quota is not None and threads is None and default < limit:
            self.notes.append(f"{default} threads, because this container has a quota of {quota:.3g} cores")
        if threads is not None and threads > limit:
            self.notes.append(f"{threads} threads asked for, {limit} used: set NUMBA_NUM_THREADS before Numba starts")
        self.states: dict[str, np.ndarray] = {}

    @property
    def description(self) -> str:
        """The name of the device."""
        return self.name

    @property
    def memory_bytes(self) -> int | None:
        """None: everything is in host memory."""
        return None

    def machine(self) -> dict[str, dict[str, Any]]:
        """Empty: a report describes the host anyway."""
        return {}

    def weight_nbytes(self, name: str) -> int:
        """Bytes of a weight: as in the file."""
        return self.weights[name].nbytes

    def measure_bandwidth(self) -> float | None:
        """Bytes per second that the workers together read from main memory."""
        return bandwidth.measure_bandwidth(self.workers)

    def time_steps(
        self, program: Program, kinds: Sequence[Hashable], nbytes: Sequence[int], tokens: int = 1
    ) -> tuple[list[float], float]:
        """Seconds of each step and of the whole run. Every step is timed by itself, whatever its kind."""
        return timing.time_steps(program, tokens)

    def time_exchanges(self, graph: Graph, tokens: int = 1) -> None:
        """None: one rank has the model."""

    def free_bytes(self) -> int | None:
        """Bytes of host memory that are free."""
        return memory.available_bytes()

    def discard_runs(self) -> None:
        """Does nothing: a run is done when `submit` returns."""

    def synchronize(self) -> None:
        """Does nothing: a run returns when its work is done."""

    def program(
        self,
        graph: Graph,
        fusions: bool | Sequence[str] = True,
        report: Callable[[str, int, int], None] | None = None,
    ) -> CpuProgram:
        """Fuse, lower, compile and bind a graph. `report(kernel, done, total)` is called before each compilation.

        Raises `UnsupportedError` where the CPU has no kernel, `Error` if the graph is not well formed or the arena does
        not fit in memory.
        """
        plan = lower(fuse(graph, self.name, fusions), self.name, self.workers, self._without)
        memory.require_available(plan.arena_bytes, f"the arena of {graph.name}", memory.SHORTER)
        arena = aligned_zeros(plan.arena_bytes)
        values: dict[str, np.ndarray] = {}
        placed = plan.graph.values | {value.name: value for step in plan.steps for value in step.scratch}
        for name, place in plan.placements.items():
            value = placed[name]
            place_bytes = arena[place.offset : place.offset + place.nbytes]
            values[name] = place_bytes.view(DTYPES[value.dtype]).reshape(value.shape)
        for value in plan.graph.values.values():
            if value.kind == "state" and value.alias is None and value.name not in self.states:
                state = aligned_zeros(value.nbytes).view(DTYPES[value.dtype])
                self.states[value.name] = state if value.dtype == "q8_0" else state.reshape(value.shape)
            if value.kind == "state":
                values[value.name] = self.states[plan.graph.root(value.name)]
            elif value.kind == "constant":
                values[value.name] = np.array(plan.graph.constants[value.name], np.float32)
        return self._bind(plan, values, arena, report)

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Write page numbers into a row of the page table, from entry `first` on."""
        self.states[PAGE_TABLE][slot, first : first + len(pages)] = pages

    def cache_page(self, page: int) -> Iterator[np.ndarray]:
        """Views of the keys and values of each layer in a page of the KV cache."""
        return (state[page] for name, state in self.states.items() if name not in NOT_CACHED)

    def close(self) -> None:
        """Does nothing: memory is freed with the last reference to it."""

    def prepare(self, decode: Program, report: Callable[[str, int, int], None] | None = None) -> None:
        """Compile or load the executor and the sampler and start the workers, before the first token needs them."""
        if report:
            report("run_steps", 0, 1)
        with interrupts.deferred():
            decode.run(1, 0, 0)

    def _bind(
        self,
        plan: Plan,
        values: Mapping[str, np.ndarray],
        arena: np.ndarray,
        report: Callable[[str, int, int], None] | None,
    ) -> CpuProgram:
        """Compile the plan's kernels and fill the step table."""
        kernels = {id(step.kernel): step.kernel for step in plan.steps}
        functions = {key: kernel.function for key, kernel in kernels.items()}
        named = {key: kernel.named for key, kernel in kernels.items()}
        bound = [self._operands(plan, step, named[id(step.kernel)], values) for step in plan.steps]
        needed = [(functions[id(step.kernel)], kinds) for step, (kinds, _) in zip(plan.steps, bound, strict=True)]
        unique = dict.fromkeys(needed)
        compiled: dict[Any, Any] = {}
        for done, (function, kinds) in enumerate(unique):
            if report:
                report(function.__name__, done, len(unique))
            compiled[function, kinds] = compile_step(function, list(kinds))
        table = np.zeros((len(bound), OPERANDS + max(len(slots) for _, slots in bound)), np.int64)
        for row, step, key, (_, slots) in zip(table, plan.steps, needed, bound, strict=True):
            row[ADDRESS], row[MAX_TOKENS], row[OF_ROWS] = compiled[key].address, step.max_tokens, step.of_rows
            row[OPERANDS : OPERANDS + len(slots)] = slots
        return CpuProgram(plan, table, values, arena, self._threads, (compiled, tuple(self.weights.values())))

    def _operands(
        self, plan: Plan, step: Step, named: Sequence[str], values: Mapping[str, np.ndarray]
    ) -> tuple[tuple[Any, ...], list[int]]:
        """Numba types and table slots of a kernel's arguments: inputs, outputs, then the `named` attributes and
        scratch.

        An output that updates a state in place shares the memory of an input, so it is not passed.
        """
        graph = plan.graph
        kinds: list[Any] = []
        slots: list[int] = []
        for value in graph.operands(step.op.inputs):
            kind, own_slots = (
                _weight_operand(self.weights[value.name]) if value.kind == "weight" else _operand(value, values)
            )
            kinds.append(kind)
            slots += own_slots
        results = [value for value in graph.operands(step.op.outputs) if value.alias is None]
        scratch = dict(zip(step.kernel.scratch, step.scratch, strict=True))
        for name in named:
            if name not in scratch and name not in step.op.attrs:
                raise Error(f"kernel {step.kernel.name} takes {name}, which {step.op} does not have")
            results.append(scratch.get(name) or step.op.attrs[name])
        for result in results:
            if isinstance(result, Value):
                kind, own_slots = _operand(result, values)
            elif isinstance(result, float):
                kind, own_slots = types.float64, [struct.unpack("<q", struct.pack("<d", result))[0]]
            else:
                kind, own_slots = types.int64, [int(result)]
            kinds.append(kind)
            slots += own_slots
        return tuple(kinds), slots


_ELEMENTS = {
    "f32": types.float32,
    "f16": types.uint16,
    "bf16": types.int16,
    "i8": types.int8,
    "i32": types.int32,
    **RECORD_TYPES,
}
"""dtype → Numba type of an element. The sign tells the two 16-bit formats apart (see `intrinsics.as_f32`)."""


def _array_operand(dtype: str, array: np.ndarray) -> tuple[Any, list[int]]:
    if not array.flags.c_contiguous:
        raise Error(f"an operand of shape {array.shape} is not contiguous")
    return types.Array(_ELEMENTS[dtype], array.ndim, "C"), [array.ctypes.data, *array.shape]


def _operand(value: Value, values: Mapping[str, np.ndarray]) -> tuple[Any, list[int]]:
    array = values[value.name]
    if value.dtype != "q8_0":
        return _array_operand(value.dtype, array)
    quants, scales = split_q8_0(array, value.shape)
    (kind, slots), (scale_kind, scale_slots) = _array_operand("i8", quants), _array_operand("f16", scales)
    return types.Tuple((kind, scale_kind)), [*slots, *scale_slots]


def _weight_operand(weight: Weight) -> tuple[Any, list[int]]:
    if weight.scales is None:
        name = weight.type.name
        return _array_operand(name, weight.data.view(TYPE_TRAITS[name].record))
    payload, slots = _array_operand("i8", weight.data)
    scales, scale_slots = _array_operand("f32", weight.scales)
    return types.Tuple((payload, scales, types.int64)), [*slots, *scale_slots, weight.type.group]


def aligned_zeros(nbytes: int) -> np.ndarray:
    """`nbytes` zero bytes, the first at a multiple of ALIGNMENT."""
    memory = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes]
