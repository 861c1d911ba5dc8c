"""The CPU backend: a plan becomes a table of integers, and one compiled function walks it with all workers at once.

A row of the table is a step: the kernel's address, the most tokens it handles, then its operands as addresses,
extents and numbers. All workers walk the whole table and wait for each other after each step, 0.1-0.3 us a step;
starting workers anew for each would cost ten times that. No Python runs between steps.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# A worker that has nothing to do sleeps soon: libgomp's own patience takes the core from whatever else is running, our
# other worker included. Read when Numba starts its threads; a user's setting stands.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numba
import numpy as np
from numba import get_num_threads, prange, set_num_threads, types

from .. import memory, progress
from ..checkpoint import Weight
from ..errors import FORKED, NOT_NUMBERS, DeviceError, Error
from ..graph import fuse
from ..ir import DTYPES, Graph, Value
from ..plan import ALIGNMENT, Plan, Step, lower
from ..sampling import REPEAT_WINDOW, SETTINGS, SamplerState, SamplingParams
from ..validation import whole_number
from .compiler import compile_step, device, jit
from .intrinsics import atomic_add, atomic_load, call_step, f32_at, f64_at, i32_at, i64_at, pause, u64_at, yield_core
from .sampling import sample
from .vecdot import KINDS, RECORDS

ROSTER, ARRIVED, PARTS, STATUS, SYNC = 0, 8, 16, 24, 32
"""Elements of the int64 array by which workers agree, each in a cache line of its own."""
CLOSED = 1 << 32
SPINS = 2000
"""Rounds a worker waits at full attention (some 50 us) before it begins to let others have the core."""
PATIENCE = 20000
"""Rounds of yielding, at least some ms, after which a region starts without the workers that did not come."""

ASK_AGAIN = 500
"""Runs after which a program that had to do with fewer workers asks for all of them again."""

ADDRESS, ROWS, OPERANDS = 0, 1, 2
"""Columns of the step table."""


@device
def wait(sync, index, least):
    """Until sync[index] >= least: spin, then yield, so that more workers than cores still finish."""
    rounds = 0
    while atomic_load(sync, index) < least:
        rounds += 1
        if rounds < SPINS:
            pause()
        else:
            yield_core()


@device
def muster(worker, workers, sync):
    """(part, parts) of this worker, once it is clear how many there are; (-1, 0) for one that comes too late.

    A threading layer may run fewer threads than asked for (OMP_THREAD_LIMIT), one after the other. Waiting for all
    would then last for ever, so the first worker closes the roster after a while and the region goes on with those
    present.
    """
    ticket = atomic_add(sync, ROSTER, 1)
    if ticket >= CLOSED:
        return -1, 0
    if ticket == 0:
        rounds = 0
        while atomic_load(sync, ROSTER) < workers and rounds < SPINS + PATIENCE:
            rounds += 1
            if rounds < SPINS:
                pause()
            else:
                yield_core()
        atomic_add(sync, PARTS, atomic_add(sync, ROSTER, CLOSED))
    wait(sync, PARTS, 1)
    parts = atomic_load(sync, PARTS)
    return (worker if parts == workers else ticket), parts


@device
def march(table, stride, begin, end, tokens, part, parts, sync):
    """All steps [begin, end), as one of `parts` workers."""
    for step in range(begin, end):
        row = i64_at(table + step * stride, OPERANDS)
        code = call_step(row[ADDRESS], table + step * stride + 8 * OPERANDS, part, parts, min(tokens, row[ROWS]))
        if code != 0:
            atomic_add(sync, STATUS, 1)
        if parts > 1:
            atomic_add(sync, ARRIVED, 1)
            wait(sync, ARRIVED, (step - begin + 1) * parts)


@jit(parallel=True)
def walk(table, stride, begin, end, tokens, workers, agreed):
    """Run steps [begin, end) of a table for `tokens` tokens; returns how many parts of kernels failed.

    `table` and `agreed` (SYNC int64) are addresses and `stride` is a row's bytes: for an array Numba would allocate a
    record at each call.
    """
    sync = i64_at(agreed, SYNC)
    for i in range(sync.shape[0]):  # a slice would be a parallel region of its own
        sync[i] = 0
    if workers == 1:
        march(table, stride, begin, end, tokens, 0, 1, sync)
    else:
        for worker in prange(workers):
            part, parts = muster(np.int64(worker), workers, sync)
            if part >= 0:
                march(table, stride, begin, end, tokens, part, parts, sync)
    return sync[STATUS]


@jit
def walk_and_sample(
    table, stride, begin, end, tokens, workers, agreed, logits, vocab_size, settings, recent, counts, state, ids, drawn
):
    """`walk`, then the next token by `sampler.sample`, whose arrays come as addresses; -2 if a kernel failed."""
    if walk(table, stride, begin, end, tokens, workers, agreed) != 0:
        return -2
    return sample(
        f32_at(logits, vocab_size),
        f64_at(settings, SETTINGS),
        i32_at(recent, REPEAT_WINDOW),
        i64_at(counts, 1),
        u64_at(state, 1),
        i32_at(ids, drawn),
    )


_region = threading.Lock()
"""One parallel region at a time: Numba's workqueue layer aborts on two, and OpenMP would share the cores out badly."""


def _new_lock() -> None:
    global _region
    _region = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # a thread that held it is not in the child to let it go

_used_by: set[int] = set()
"""Processes, this one and those it was forked from, that have started workers."""


def refuse_forked() -> None:
    """Raise `DeviceError` in a child that was forked after workers had started: they did not survive it."""
    if _used_by - {os.getpid()}:
        raise DeviceError(FORKED)


@contextlib.contextmanager
def parallel_region(workers: int) -> Iterator[None]:
    """The only parallel region of this process, with Numba's number of threads set, and put back afterwards."""
    refuse_forked()
    with _region:
        _used_by.add(os.getpid())
        before = get_num_threads()
        if before != workers:
            set_num_threads(workers)
        try:
            yield
        finally:
            if before != workers:
                set_num_threads(before)


class CpuProgram:
    """A plan bound to memory: write `inputs`, call `run`, read `value`."""

    def __init__(
        self, plan: Plan, table: np.ndarray, values: Mapping[str, np.ndarray], arena: np.ndarray, keep: Any
    ) -> None:
        self.plan, self.table, self.arena = plan, table, arena
        self._values, self._keep = values, keep
        self._sync = np.zeros(SYNC, np.int64)
        self._addresses = table.ctypes.data, table.strides[0]
        self._agreed = self._sync.ctypes.data
        logits = values.get("logits", table)
        self._logits = logits.ctypes.data, logits.shape[-1]
        self._workers = plan.workers
        self._short_rosters = 0
        self.inputs = {v.name: values[v.name] for v in plan.graph.values.values() if v.kind == "input"}
        self.head = plan.head
        self.entries = 0
        """How often compiled code was entered."""

    def value(self, name: str) -> np.ndarray:
        """The memory of a value, as an array of its shape; what it holds outside its lifetime belongs to others."""
        return self._values[name]

    def run(self, tokens: int, begin: int = 0, end: int | None = None, sampler: SamplerState | None = None) -> int:
        """Run steps [begin, end) for the first `tokens` tokens of the inputs: one call into compiled code.

        With a sampler the next token is returned: drawn from the logits in the same call, or the graph's own argmax
        where that is what the sampler's settings come down to. Raises `Error` when a kernel failed or the logits are
        not numbers, `DeviceError` in a forked child.
        """
        greedy = sampler is not None and sampler.is_argmax and len(sampler.ids) == self._logits[1]
        if greedy:
            sampler = None
        if end is None:
            # the graph's argmax is for greedy choice; a sampler makes its own
            end = len(self.plan.steps) - (sampler is not None and self.plan.steps[-1].op.kind == "argmax")
        if not (1 <= tokens <= self.plan.tokens and 0 <= begin <= end <= len(self.plan.steps)):
            raise Error(
                f"cannot run {tokens} tokens of {self.plan.tokens}, steps {begin} to {end} of {len(self.table)}"
            )
        workers = self._workers
        with parallel_region(workers):
            self.entries += 1
            if sampler is None:
                token = -2 if walk(*self._addresses, begin, end, tokens, workers, self._agreed) else 0
            else:
                sampling = (*self._logits, *sampler.addresses)
                token = walk_and_sample(*self._addresses, begin, end, tokens, workers, self._agreed, *sampling)
        if self.plan.workers > 1:
            self._learn(int(self._sync[PARTS]) if workers > 1 else 1)
        if token == 0 and greedy:
            token = self._values["next"][0]
        if token < 0:
            raise Error("a kernel failed" if token == -2 else NOT_NUMBERS)
        return int(token)

    def _learn(self, present: int) -> None:
        """A threading layer that keeps giving fewer workers than asked for is not waited for, but asked again later."""
        self._short_rosters = self._short_rosters + 1 if present < self._workers else 0
        if self._short_rosters == 3:
            progress.log.info("only %d of %d workers come: going on with %d", present, self._workers, present)
            self._workers, self._short_rosters = present, 0
        if self._workers < self.plan.workers and self.entries % ASK_AGAIN == 0:
            self._workers = self.plan.workers


class CpuBackend:
    """Weights and KV cache on the CPU. `threads` is how many workers share a step; at most Numba's own number."""

    name = "cpu"

    def __init__(self, weights: Mapping[str, Weight], threads: int | None = None) -> None:
        refuse_forked()
        limit = numba.config.NUMBA_NUM_THREADS
        threads = None if threads is None else whole_number("threads", threads, 1)
        self.weights = weights
        self.workers = min(threads or limit, limit)
        self.notes: list[str] = []
        if threads is not None and threads > limit:
            self.notes.append(f"{threads} threads asked for, {limit} used: set NUMBA_NUM_THREADS before Numba starts")
        self.states: dict[str, np.ndarray] = {}

    def program(
        self,
        graph: Graph,
        fusions: bool | Sequence[str] = True,
        report: Callable[[str, int, int], None] | None = None,
    ) -> CpuProgram:
        """Fuse, lower, compile and bind a graph. `report(kernel, done, total)` is called before each kernel."""
        plan = lower(fuse(graph, self.name, fusions), self.name, self.workers)
        memory.require_available(plan.arena_bytes, f"the arena of {graph.name}", memory.SHORTER)
        arena = _aligned_zeros(plan.arena_bytes)
        values: dict[str, np.ndarray] = {}
        placed = plan.graph.values | {value.name: value for step in plan.steps for value in step.scratch}
        for name, place in plan.placements.items():
            value = placed[name]
            place_bytes = arena[place.offset : place.offset + place.nbytes]
            values[name] = place_bytes.view(DTYPES[value.dtype]).reshape(value.shape)
        for value in plan.graph.values.values():
            if value.kind == "state" and value.alias is None and value.name not in self.states:
                self.states[value.name] = _aligned_zeros(value.nbytes).view(DTYPES[value.dtype]).reshape(value.shape)
            if value.kind == "state":
                values[value.name] = self.states[plan.graph.root(value.name)]
            elif value.kind == "constant":
                values[value.name] = np.array(plan.graph.constants[value.name], np.float32)
        return self._bind(plan, values, arena, report)

    def close(self) -> None:
        """Nothing is held that the last reference does not free."""

    def prepare(self, decode: CpuProgram, report: Callable[[str, int, int], None] | None = None) -> None:
        """Compile or load what walks and samples, and start the workers, so that the first token need not wait."""
        if report:
            report("walk", 0, 1)
        decode.run(1, 0, 0)
        decode.run(1, 0, 0, SamplerState(SamplingParams(seed=0), decode.value("logits").shape[1]))

    def _bind(
        self,
        plan: Plan,
        values: Mapping[str, np.ndarray],
        arena: np.ndarray,
        report: Callable[[str, int, int], None] | None,
    ) -> CpuProgram:
        bound = [self._operands(plan, step, values) for step in plan.steps]
        wanted = dict.fromkeys(
            (step.kernel.function, kinds) for step, (kinds, _) in zip(plan.steps, bound, strict=True)
        )
        compiled: dict[Any, Any] = {}
        for done, (function, kinds) in enumerate(wanted):
            if report:
                report(function.__name__, done, len(wanted))
            compiled[function, kinds] = compile_step(function, list(kinds))
        table = np.zeros((len(bound), OPERANDS + max(len(slots) for _, slots in bound)), np.int64)
        for row, step, (kinds, slots) in zip(table, plan.steps, bound, strict=True):
            row[ADDRESS], row[ROWS] = compiled[step.kernel.function, kinds].address, step.rows
            row[OPERANDS : OPERANDS + len(slots)] = slots
        return CpuProgram(plan, table, values, arena, (compiled, tuple(self.weights.values())))

    def _operands(self, plan: Plan, step: Step, values: Mapping[str, np.ndarray]) -> tuple[tuple[Any, ...], list[int]]:
        """Numba types and table slots of a step's operands: inputs, outputs, then attributes and scratch by name."""
        graph = plan.graph
        kinds: list[Any] = []
        slots: list[int] = []
        for value in graph.operands(step.op.inputs):
            kind, numbers = (
                _weight_operand(self.weights[value.name]) if value.kind == "weight" else _operand(value, values)
            )
            kinds.append(kind)
            slots += numbers
        # an updated state is the memory of an input: the kernel has it already
        results = [value for value in graph.operands(step.op.outputs) if value.alias is None]
        named = dict(zip(step.kernel.scratch, step.scratch, strict=True))
        for name in step.kernel.parameters[3 + len(kinds) + len(results) :]:
            if name not in named and name not in step.op.attrs:
                raise Error(f"kernel {step.kernel.name} wants {name}, which {step.op.kind} does not have")
            results.append(named.get(name) or step.op.attrs[name])
        for result in results:
            if isinstance(result, Value):
                kind, numbers = _operand(result, values)
            elif isinstance(result, float):
                kind, numbers = types.float64, [struct.unpack("<q", struct.pack("<d", result))[0]]
            else:
                kind, numbers = types.int64, [int(result)]
            kinds.append(kind)
            slots += numbers
        return tuple(kinds), slots


_ELEMENTS = {
    "f32": types.float32,
    "f16": types.uint16,
    "bf16": types.int16,
    "i8": types.int8,
    "i32": types.int32,
    **KINDS,
}
"""How kernels see each type; signedness tells the two 16-bit formats apart (see `lowlevel_cpu.as_f32`)."""


def _array_operand(dtype: str, array: np.ndarray) -> tuple[Any, list[int]]:
    if not array.flags.c_contiguous:
        raise Error(f"an operand of shape {array.shape} is not contiguous")
    return types.Array(_ELEMENTS[dtype], array.ndim, "C"), [array.ctypes.data, *array.shape]


def _operand(value: Value, values: Mapping[str, np.ndarray]) -> tuple[Any, list[int]]:
    return _array_operand(value.dtype, values[value.name])


def _weight_operand(weight: Weight) -> tuple[Any, list[int]]:
    if weight.scales is None:
        name = weight.type.name
        return _array_operand(name, weight.data.view(RECORDS[name]) if name in RECORDS else weight.data)
    payload, slots = _array_operand("i8", weight.data)
    scales, scale_slots = _array_operand("f32", weight.scales)
    return types.Tuple((payload, scales, types.int64)), [*slots, *scale_slots, weight.type.group]


def _aligned_zeros(nbytes: int) -> np.ndarray:
    memory = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes]
