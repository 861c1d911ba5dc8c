"""The CUDA backend: weights, KV cache and arenas in device memory, and a token as one replay of a captured graph.

All device memory is taken when a program is made. A step's launches are captured once (and once more for long contexts,
where other kernels do better); a replay runs them all, each starting while the one before still ends (programmatic
dependent launch, on cards that have it). Token, position and the sampler's state lie in device memory, and the last
kernel of a step writes the new token where the next one reads it, so the next step is already under way when the host
hears of this one. It hears through a mailbox in its own memory.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import progress, registry
from ..checkpoint import Weight
from ..errors import NOT_NUMBERS, DeviceError, Error
from ..graph import fuse
from ..ir import DTYPES, Graph, Value
from ..kernel_cache import cuda_cache_directory
from ..memory import format_bytes
from ..plan import Plan, lower
from ..sampling import REPEAT_WINDOW, SETTINGS, SamplerState
from .compile_worker import compile_ahead
from .driver import Call, Device, Function, Memory, Pinned, Recording, compile_kernel
from .launch import ITEM_BYTES, Array, Gpu, Launch
from .weights import ALIGNMENT, Weights, aligned

AHEAD = 2
"""Steps that are put into the stream before the host has seen the token before them."""
MAILBOX = 64
"""Tokens that the device may be ahead of the host; a power of two above `AHEAD`."""
PATIENCE = 2000
"""Looks at the mailbox, some µs each, between two questions whether the device still works."""


class _Inputs:
    """What a run is told: the number of tokens, and the graph's inputs; one piece of memory on either side."""

    SLOTS = 8

    def __init__(self, device: Device, graph: Graph) -> None:
        self._device = device
        values = [value for value in graph.values.values() if value.kind == "input"]
        places, size = {}, ALIGNMENT
        for value in values:
            places[value.name] = size
            size += aligned(value.nbytes)
        self.nbytes = size
        self._pinned = Pinned(device, size * self.SLOTS)
        self.memory = Memory(device, size, "the inputs")
        self._used = 0
        self._mirror = np.zeros(size, np.uint8)
        self.tokens = self.memory.array(0, (1,), "i32")
        self.device = {v.name: self.memory.array(places[v.name], v.shape, v.dtype) for v in values}
        self._count = self._mirror[:4].view(np.int32)
        self.number = self.memory.array(8, (1,), "i64")
        self._first = self._mirror[8:16].view(np.int64)
        self.host = {
            v.name: self._mirror[places[v.name] :][: v.nbytes].view(DTYPES[v.dtype]).reshape(v.shape) for v in values
        }

    def send(self, tokens: int, number: int) -> None:
        """Put a copy of the inputs as they are now into the stream; the next step is the one after `number`."""
        self._count[0], self._first[0] = tokens, number
        slot = self._used % self.SLOTS
        if slot == 0 and self._used:
            self._device.synchronize()  # the copies out of all slots are done
        self._used += 1
        start = slot * self.nbytes
        self._pinned.bytes[start : start + self.nbytes] = self._mirror
        self._device.write(self.memory.address, self._pinned.address + start, self.nbytes)


class _Sampling:
    """The sampler's state on the device."""

    def __init__(self, device: Device) -> None:
        sizes = {
            "settings": (SETTINGS, "f64"),
            "recent": (REPEAT_WINDOW, "i32"),
            "counts": (1, "i64"),
            "state": (1, "u64"),
        }
        self._device, offset = device, 0
        self.nbytes = sum(aligned(count * ITEM_BYTES[dtype]) for count, dtype in sizes.values())
        self._pinned = Pinned(device, self.nbytes)
        self.memory = Memory(device, self.nbytes, "the sampler's state")
        self.arrays: dict[str, Array] = {}
        for name, (count, dtype) in sizes.items():
            self.arrays[name] = self.memory.array(offset, (count,), dtype)
            offset += aligned(count * ITEM_BYTES[dtype])

    def send(self, sampler: SamplerState) -> None:
        """Put a copy of a sampler's state into the stream; waits for what is in it first."""
        self._device.synchronize()
        for name, array in self.arrays.items():
            at = array.address - self.memory.address
            self._pinned.bytes[at : at + array.nbytes] = getattr(sampler, name).view(np.uint8)
        self._device.write(self.memory.address, self._pinned.address, self.nbytes)


@dataclass
class _Step:
    """A decode step that is in the stream, or done and not yet asked for."""

    number: int
    position: int
    sequence: int


class CudaProgram:
    """A plan bound to device memory: write `inputs`, call `run`, read `value`."""

    def __init__(self, backend: CudaBackend, plan: Plan) -> None:
        self._own: list[Memory] = []
        self._freed = False
        self._recordings: dict[Any, Recording] = {}
        try:
            self._bind(backend, plan)
        except BaseException:
            self.free()  # now: a traceback may keep this object for long
            raise

    def _bind(self, backend: CudaBackend, plan: Plan) -> None:
        device = backend.device
        self.plan, self.backend, self.head, self._device = plan, backend, plan.head, device
        self._inputs = _Inputs(device, plan.graph)
        self.inputs = self._inputs.host
        self._own.append(self._inputs.memory)
        self.arena = Memory(device, plan.arena_bytes, f"the arena of {plan.graph.name}")
        self._own.append(self.arena)
        device.fill(self.arena.address, 0, plan.arena_bytes)
        self.entries = 0
        """How often the host put work into the stream."""
        self._values = dict(self._inputs.device)
        placed = {value.name: value for step in plan.steps for value in step.scratch} | plan.graph.values
        for name, place in plan.placements.items():
            if name not in self._values:
                value = placed[name]
                self._values[name] = self.arena.array(place.offset, value.shape, value.dtype)
        for value in plan.graph.values.values():
            if value.kind == "state":
                self._values[value.name] = backend.states[plan.graph.root(value.name)]
            elif value.kind == "constant":
                self._values[value.name] = self._constant(plan.graph.constants[value.name])
        gpu = Gpu(device.processors, device.shared_limit, self._inputs.tokens, self._zeros)
        self.launches = [self._launches(gpu, index) for index in range(len(plan.steps))]
        self._turns = sorted({one.later[0] for step in self.launches for one in step if one.later})
        self._calls: dict[int, list[list[Call]]] = {}
        self._penalised = 0
        """How many tokens the last run had, if its logits are no longer as the plan left them."""
        self._tails: dict[int, list[Launch]] = {}
        self._tail_calls: dict[int, list[Call]] = {}
        self._mailbox = Pinned(device, 8 * MAILBOX)
        self._letters = self._mailbox.bytes.view(np.int64)
        self._made = 0
        self._steps: deque[_Step] = deque()
        self._sampler: tuple[SamplerState, int] | None = None
        self._last: tuple[int, int, int] | None = None
        self._gpu = gpu

    # Memory

    def _zeros(self, count: int) -> Array:
        memory = Memory(self._device, 4 * count, "counters")
        self._own.append(memory)
        self._device.fill(memory.address, 0, 4 * count)
        return memory.array(0, (count,), "i32")

    def _constant(self, numbers: Sequence[float]) -> Array:
        host = np.array(numbers, np.float32)
        memory = Memory(self._device, host.nbytes, "a constant")
        self._own.append(memory)
        self._device.write(memory.address, host.ctypes.data, host.nbytes)
        self._device.synchronize()
        return memory.array(0, host.shape, "f32")

    def _launches(self, gpu: Gpu, index: int) -> list[Launch]:
        """How a step is launched, by the function that the registry has for it."""
        step, graph = self.plan.steps[index], self.plan.graph
        operands: list[Any] = [
            self.backend.weights.operands[value.name] if value.kind == "weight" else self._values[value.name]
            for value in graph.operands(step.op.inputs)
        ]
        # an updated state is the memory of an input: the kernel has it already
        operands += [self._values[value.name] for value in graph.operands(step.op.outputs) if value.alias is None]
        named: dict[str, Value] = dict(zip(step.kernel.scratch, step.scratch, strict=True))
        for name in step.kernel.parameters[1 + len(operands) :]:
            if name not in named and name not in step.op.attrs:
                raise Error(f"kernel {step.kernel.name} wants {name}, which {step.op.kind} does not have")
            operands.append(self._values[named[name].name] if name in named else step.op.attrs[name])
        launches: list[Launch] = step.kernel.function(gpu, *operands)
        return launches

    @property
    def every_launch(self) -> list[list[Launch]]:
        """The launches of each step, those of all positions."""
        return [[one.at(reach) for reach in (0, *self._turns) for one in step] for step in self.launches]

    def value(self, name: str) -> np.ndarray:
        """A copy of a value's memory; what it holds outside its lifetime belongs to others."""
        if self._freed:
            raise Error("this model is closed; compile it again")
        self._device.make_current()
        self._settle()
        array = self._values[name]
        out = np.empty(array.shape, DTYPES[array.dtype])
        self._device.read(array.address, out)
        return out

    def write(self, name: str, numbers: np.ndarray) -> None:
        """Overwrite a value's memory."""
        array = self._values[name]
        numbers = np.ascontiguousarray(numbers, DTYPES[array.dtype])
        assert numbers.nbytes == array.nbytes
        self._device.make_current()
        self._device.write(array.address, numbers.ctypes.data, numbers.nbytes)
        self._device.synchronize()

    # Runs

    @property
    def calls(self) -> list[list[Call]]:
        """The launches of each step, made ready, as the inputs' positions want them."""
        return self._calls_at(self._reach(self._furthest(self.plan.tokens)))

    def _furthest(self, tokens: int) -> int:
        """The largest of the inputs' positions; 0 for a graph that has none."""
        return int(self.inputs["positions"][:tokens].max()) if "positions" in self.inputs else 0

    def ready(self) -> None:
        """Make the launches of all positions ready, so that none of it is left for when they come."""
        for reach in (0, *self._turns):
            self._calls_at(reach)

    def _reach(self, position: int) -> int:
        """The last of the positions at which launches change that a position has come to; 0 before the first."""
        return max((turn for turn in self._turns if turn <= position), default=0)

    def _calls_at(self, reach: int) -> list[list[Call]]:
        """Kernels that `CudaBackend.prepare` has not seen are compiled now."""
        if reach not in self._calls:
            self._calls[reach] = self.backend.ready([[one.at(reach) for one in step] for step in self.launches])
        return self._calls[reach]

    def run(self, tokens: int, begin: int = 0, end: int | None = None, sampler: SamplerState | None = None) -> int:
        """Run steps [begin, end) for the first `tokens` tokens of the inputs: one graph launch.

        With a sampler the next token is drawn on the device and returned. Raises `Error` for logits that are not
        numbers, `DeviceError` when the device fails.
        """
        last = len(self.plan.steps) if end is None else end
        if not (1 <= tokens <= self.plan.tokens and 0 <= begin <= last <= len(self.plan.steps)):
            raise Error(
                f"cannot run {tokens} tokens of {self.plan.tokens}, steps {begin} to {last} of {len(self.plan.steps)}"
            )
        self._take_turn()
        if sampler is not None:
            try:
                return self._next_token(tokens, sampler)
            except BaseException:  # Ctrl-C between a launch and its entry in the books, say: begin anew
                self._forget_steps()
                raise
        self._forget_steps()
        self._penalised = 0
        self._replay(tokens, begin, last)
        return 0

    def _replay(self, tokens: int, begin: int, end: int) -> None:
        """Steps [begin, end) for the inputs as they are."""
        reach = self._reach(self._furthest(tokens))
        self._inputs.send(tokens, self._made)
        self._play((begin, end, reach), lambda: self._slice(begin, end, reach))

    def _take_turn(self) -> None:
        """The KV cache and the sampler's state are shared: what another program has under way is void from here on."""
        if self._freed:
            raise Error("this model is closed; compile it again")
        self._device.make_current()
        before, self.backend.current = self.backend.current, self
        if before is not None and before is not self:
            before._forget_steps()
            before._penalised = 0  # nothing can be computed again: the KV cache may be another text's from here on

    def _slice(self, begin: int, end: int, reach: int) -> list[Call]:
        return [call for calls in self._calls_at(reach)[begin:end] for call in calls]

    def _play(self, key: Any, calls: Callable[[], list[Call]]) -> None:
        if key not in self._recordings:
            self._recordings[key] = Recording(self._device, calls())
        self._recordings[key].replay()
        self.entries += 1

    def _greedy(self, sampler: SamplerState) -> bool:
        return sampler.is_argmax and len(sampler.ids) == self._values["logits"].shape[1]

    def tail(self, drawn: int) -> list[Launch]:
        """What follows the plan: sampling among `drawn` tokens (0: the plan's own argmax), then the way back to its
        beginning.
        """
        if drawn not in self._tails:
            launches = []
            following = self._values["next"]
            if drawn:
                arrays = self.backend.sampling.arrays
                kernel = registry.find("sample", "cuda", ["f32"]).function
                launches += kernel(self._gpu, self._values["logits"], drawn, *arrays.values(), following)
            kernel = registry.find("advance", "cuda", ["i32"]).function
            launches += kernel(
                self._gpu, following, self._values["ids"], self._values["positions"], self._inputs.number,
                self._mailbox.address, MAILBOX,
            )  # fmt: skip
            self._tails[drawn] = launches
        return self._tails[drawn]

    def _tail(self, drawn: int) -> list[Call]:
        if drawn not in self._tail_calls:
            (self._tail_calls[drawn],) = self.backend.ready([self.tail(drawn)])
        return self._tail_calls[drawn]

    def _whole_step(self, drawn: int, reach: int) -> list[Call]:
        end = len(self.plan.steps) - (1 if drawn and self.plan.steps[-1].op.kind == "argmax" else 0)
        return self._slice(0, end, reach) + self._tail(drawn)

    def _next_token(self, tokens: int, sampler: SamplerState) -> int:
        drawn = 0 if self._greedy(sampler) else len(sampler.ids)
        position, sequence = int(self.inputs["positions"][tokens - 1]), int(self.inputs["sequences"][tokens - 1])
        token_in = int(self.inputs["ids"][tokens - 1])
        chained = (
            tokens == 1 and self.plan.tokens == 1 and self._last == (token_in, position, sequence)
            and self._sampler is not None and self._sampler[0] is sampler and self._sampler[1] == int(sampler.counts[0])
        )  # fmt: skip
        if not (chained and self._steps):
            self._forget_steps()
            if not chained:
                self._made += MAILBOX  # letters of steps that were forgotten, or never entered, match no later one
                self._inputs.send(tokens, self._made)
                if drawn:
                    self.backend.sampling.send(sampler)
            self._launch(drawn, position, sequence)
        if chained:
            ahead = self._steps[-1].position + 1
            limit = next(v.shape[2] for v in self.plan.graph.values.values() if v.kind == "state")
            while len(self._steps) <= AHEAD and ahead < limit:
                self._launch(drawn, ahead, sequence)
                ahead += 1
        token = self._await(self._steps[0].number)
        self._steps.popleft()
        if token < 0:
            if self._steps:  # the values of this step are what a person will want to see
                self._replay(tokens, 0, len(self.plan.steps))
            raise Error(NOT_NUMBERS)
        if drawn:
            sampler.recent[sampler.counts[0] % REPEAT_WINDOW] = token
            sampler.counts[0] += 1
            if sampler.settings[0] > 0:
                with np.errstate(over="ignore"):
                    sampler.state[0] += np.uint64(0x9E3779B97F4A7C15)
        self._penalised = tokens if drawn and sampler.settings[4] != 1 else 0
        self._sampler = sampler, int(sampler.counts[0])
        self._last = (token, position + 1, sequence)
        return token

    def _launch(self, drawn: int, position: int, sequence: int) -> None:
        reach = self._reach(position)
        self._play(("step", drawn, reach), lambda: self._whole_step(drawn, reach))
        self._made += 1
        self._steps.append(_Step(self._made, position, sequence))

    def _await(self, number: int) -> int:
        """The token of step `number`, once it lies in the mailbox."""
        looks = 0
        while True:
            letter = int(self._letters[number % MAILBOX])
            if letter >> 32 & 0x7FFFFFFF == number & 0x7FFFFFFF:
                return int(np.int64(letter).astype(np.int32))
            looks += 1
            if looks % PATIENCE == 0:
                done = not self._device.busy  # asked before the last look: a letter may come in between
                letter = int(self._letters[number % MAILBOX])
                if done and letter >> 32 & 0x7FFFFFFF != number & 0x7FFFFFFF:
                    raise DeviceError(f"{self._device}: the stream is done, but step {number} gave no token")
                time.sleep(0)

    def _forget_steps(self) -> None:
        """What was put into the stream ahead of the host is not wanted: its results are passed over."""
        self._steps.clear()
        self._last = None

    def _settle(self) -> None:
        """Compute the host's last step again, for its values to be read.

        That is if the device has gone ahead of the host, or the repeat penalty has changed the logits.
        """
        tokens = 1 if self._steps and self._last is not None else self._penalised
        if tokens:
            self._forget_steps()
            self._penalised = 0
            self._replay(tokens, 0, len(self.plan.steps))

    @property
    def nbytes(self) -> int:
        """Device memory of this program alone."""
        return sum(memory.nbytes for memory in self._own)

    def free(self) -> None:
        """Give the memory back."""
        self._freed = True
        self._recordings.clear()
        for memory in self._own:
            memory.free()


def _identity(launch: Launch) -> Any:
    """What a launch's machine code depends on, but for the device."""
    return getattr(launch.kernel, "py_func", launch.kernel), launch.kinds, launch.threads


class CudaBackend:
    """Weights and KV cache on one GPU."""

    name = "cuda"

    def __init__(self, weights: Mapping[str, Weight], device: str = "cuda") -> None:
        self.device = Device(device)
        self.notes: list[str] = []
        self.states: dict[str, Array] = {}
        self.compiled = {"hits": 0, "misses": 0}
        """Kernels that came from the cache, and kernels that were compiled."""
        self.current: CudaProgram | None = None
        """The program that ran last."""
        self._functions: dict[Any, Function] = {}
        self._prepared = False
        self._owned: list[Any] = []
        self.weights = Weights(self.device, weights)
        self._owned.append(self.weights)
        try:
            self.sampling = _Sampling(self.device)
        except BaseException:
            self.close()
            raise
        self._owned += [self.sampling.memory]

    @property
    def workers(self) -> int:
        """Streaming multiprocessors."""
        return self.device.processors

    @property
    def memory_bytes(self) -> int:
        """Device memory that weights, KV cache and programs have taken; running takes no more."""
        return sum(owned.nbytes for owned in self._owned)

    def program(
        self, graph: Graph, fusions: bool | Sequence[str] = True, report: progress.Report | None = None
    ) -> CudaProgram:
        """Fuse, lower and bind a graph. Kernels are compiled by `prepare`, for all programs together, or after it here;
        without it when a program first runs. `report(kernel, done, total)` is called before each kernel.
        """
        plan = lower(fuse(graph, self.name, fusions), self.name, self.device.processors)
        new = [
            v for v in plan.graph.values.values() if v.kind == "state" and v.alias is None and v.name not in self.states
        ]
        if new:
            memory = Memory(self.device, sum(aligned(v.nbytes) for v in new), "the KV cache")
            self._owned.append(memory)
            self.device.fill(memory.address, 0, memory.nbytes)
            offset = 0
            for value in new:
                self.states[value.name] = memory.array(offset, value.shape, value.dtype)
                offset += aligned(value.nbytes)
        program = CudaProgram(self, plan)
        self._owned.append(program)
        if self._prepared:
            self._load(program.every_launch, report)
        return program

    def ready(self, steps: Sequence[Sequence[Launch]]) -> list[list[Call]]:
        """Launches with their kernels compiled, or loaded from the cache, and loaded onto the device."""
        self._load(steps)
        return [
            [Call(self.device, self._functions[_identity(launch)], launch) for launch in launches] for launches in steps
        ]

    def _load(self, steps: Sequence[Sequence[Launch]], report: progress.Report | None = None) -> None:
        wanted = {_identity(launch): launch for launches in steps for launch in launches}
        missing = [launch for key, launch in wanted.items() if key not in self._functions]
        capability, cache = self.device.capability, cuda_cache_directory()
        compiled = compile_ahead(missing, capability, cache, report)
        for index, launch in enumerate(missing):
            if report and not compiled:
                report(launch.name, index, len(missing))
            code = compiled.get(index) or compile_kernel(launch.kernel, launch.kinds, capability, launch.threads, cache)
            self.compiled["hits" if code.cached else "misses"] += 1
            self._functions[_identity(launch)] = Function(self.device, code)

    def prepare(self, decode: CudaProgram, report: progress.Report | None = None) -> None:
        """Compile the kernels of all programs so far and of what follows a step: the first token need not wait."""
        vocab = decode.plan.graph.values["logits"].shape[1]
        programs = [owned for owned in self._owned if isinstance(owned, CudaProgram)]
        steps = [launches for program in programs for launches in program.every_launch]
        self._load([*steps, decode.tail(0), decode.tail(vocab)], report)
        self._prepared = True
        for program in programs:
            program.ready()

    def close(self) -> None:
        """Give all device memory back now."""
        try:
            self.device.make_current()
            self.device.synchronize()
        finally:  # also where the device has failed
            for owned in self._owned:
                owned.free()
            self._owned.clear()
            self._functions.clear()

    def __repr__(self) -> str:
        return f"<CudaBackend {self.device}, {format_bytes(self.weights.nbytes)} of weights>"
