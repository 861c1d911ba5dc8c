"""A plan bound to device memory: arena, inputs, launches, and the runs of its steps as CUDA graphs.

All device memory is allocated when a program is made. The launches of a run are captured once as a CUDA graph, and
again for long contexts, where other kernels are faster. A replay runs them all. On sm_90 each kernel starts before the
previous one has ended (programmatic dependent launch). `decode_pipeline` queues steps ahead of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CLOSED, Error
from ..ir import DTYPES, Graph, Value
from ..plan import Plan, Step
from ..sampling import SamplerTable
from .decode_pipeline import DecodePipeline
from .driver import CudaGraph, Device, Memory, Pinned, PreparedLaunch
from .launch import Array, Launch, LaunchContext, Matrix
from .weights import ALIGNMENT, aligned

if TYPE_CHECKING:
    from .backend import CudaBackend

GraphKey = tuple[str | int, ...]
"""Key of a captured graph: (first step, end, variant start), or ("step", tokens to sample from, variant start)."""


class RunInputs:
    """The inputs of a run: the number of tokens and the graph's inputs, in one block of memory on either side.

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
        self.nbytes = size
        self._pinned = Pinned(device, size * self.PINNED_COPIES)
        self.memory = Memory(device, size, "the inputs")
        self._sent = 0
        self._mirror = np.zeros(size, np.uint8)
        self._host_tokens = self._mirror[:4].view(np.int32)
        self._host_step = self._mirror[8:16].view(np.int64)
        self.host = {
            v.name: self._mirror[offsets[v.name] :][: v.nbytes].view(DTYPES[v.dtype]).reshape(v.shape) for v in values
        }
        self.tokens = self.memory.array(0, (1,), "i32")
        """i32[1] in device memory: tokens of the run."""
        self.step = self.memory.array(8, (1,), "i64")
        """i64[1] in device memory: the number of the last decode step; `advance` counts it up."""
        self.device = {v.name: self.memory.array(offsets[v.name], v.shape, v.dtype) for v in values}

    def send(self, tokens: int, step: int) -> None:
        """Enqueue a copy of the current inputs to the device. The decode step after it has number `step` + 1."""
        self._host_tokens[0], self._host_step[0] = tokens, step
        copy = self._sent % self.PINNED_COPIES
        if copy == 0 and self._sent:
            self._device.synchronize()  # all pinned copies have been read
        self._sent += 1
        start = copy * self.nbytes
        self._pinned.bytes[start : start + self.nbytes] = self._mirror
        self._device.write(self.memory.address, self._pinned.address + start, self.nbytes)


def bind_step(step: Step, graph: Graph, ctx: LaunchContext, operands: Mapping[str, Array | Matrix]) -> list[Launch]:
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
    launches: list[Launch] = step.kernel.function(ctx, *arguments)
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
        self.arena = Memory(device, plan.arena_bytes, f"the arena of {plan.graph.name}")
        self._owned.append(self.arena)
        device.fill(self.arena.address, 0, plan.arena_bytes)
        self.entries = 0
        """Number of times that the host has enqueued work in the stream."""
        self.values = self._place_values()
        self.ctx = LaunchContext(device.n_sms, device.shared_limit, self.run_inputs.tokens, self._zeros)
        operands = self.values | backend.weights.operands
        self.launches = [bind_step(step, plan.graph, self.ctx, operands) for step in plan.steps]
        """The launches of each step."""
        self.variant_starts = sorted({
            launch.long_context_variant[0] for step in self.launches for launch in step if launch.long_context_variant
        })  # fmt: skip
        """Positions at which some launches change to a faster variant."""
        self._prepared: dict[int, list[list[PreparedLaunch]]] = {}
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
        self.pipeline.recompute_last()
        array = self.array(name)
        out = np.empty(array.shape, DTYPES[array.dtype])
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
    def all_launches(self) -> list[list[Launch]]:
        """The launches of each step with all their variants."""
        return [
            [launch.variant_for(start) for start in (0, *self.variant_starts) for launch in step]
            for step in self.launches
        ]

    @property
    def prepared_launches(self) -> list[list[PreparedLaunch]]:
        """The prepared launches of each step, in the variants for the positions of the current inputs."""
        return self._prepared_from(self.variant_start(self.max_position(self.plan.tokens)))

    def prepare_variants(self) -> None:
        """Prepare the launches of all variants now, so that a long context does not wait for them later."""
        for start in (0, *self.variant_starts):
            self._prepared_from(start)

    def kernel_names(self) -> list[str]:
        """Names of the kernels that each step launches at the inputs' positions, joined by "+"."""
        return ["+".join(launch.name for launch in launches) for launches in self.prepared_launches]

    def max_position(self, tokens: int) -> int:
        """The largest position of the first `tokens` inputs; 0 for a graph without positions."""
        return int(self.inputs["positions"][:tokens].max()) if "positions" in self.inputs else 0

    def variant_start(self, position: int) -> int:
        """The largest of `variant_starts` that is not above a position; 0 before the first."""
        return max((start for start in self.variant_starts if start <= position), default=0)

    def _prepared_from(self, start: int) -> list[list[PreparedLaunch]]:
        """Each step's launches for positions from a variant's start on. Kernels not seen before are compiled now."""
        if start not in self._prepared:
            launches = [[launch.variant_for(start) for launch in step] for step in self.launches]
            self._prepared[start] = self.backend.prepare_launches(launches)
        return self._prepared[start]

    def prepared_steps(self, begin: int, end: int, start: int) -> list[PreparedLaunch]:
        """The launches of steps [begin, end), one after the other, in the variants from `start` on."""
        return [launch for step in self._prepared_from(start)[begin:end] for launch in step]

    def replay(self, key: GraphKey, launches: Callable[[], list[PreparedLaunch]]) -> None:
        """Enqueue a captured graph in the stream. The first time, `launches` gives the launches to capture."""
        if key not in self._graphs:
            self._graphs[key] = CudaGraph(self._device, launches())
        self._graphs[key].replay()
        self.entries += 1

    # Runs

    def run(self, tokens: int, begin: int = 0, end: int | None = None, sampler: SamplerTable | None = None) -> int:
        """Run steps [begin, end) for the first `tokens` tokens of the inputs: one graph launch.

        With a sampler, run all steps, sample the next token on the device and return it; without one, return 0. Raises
        `Error` if the logits hold NaN, `DeviceError` when the device fails.
        """
        last = len(self.plan.steps) if end is None else end
        if not (1 <= tokens <= self.plan.tokens and 0 <= begin <= last <= len(self.plan.steps)):
            raise Error(
                f"cannot run {tokens} tokens of {self.plan.tokens}, steps {begin} to {last} of {len(self.plan.steps)}"
            )
        self._claim_backend()
        if sampler is not None:
            return self.pipeline.next_token(tokens, sampler)
        self.pipeline.discard_pending()
        self.pipeline.logits_unchanged()
        self.run_steps(tokens, begin, last)
        return 0

    def run_steps(self, tokens: int, begin: int, end: int) -> None:
        """Run steps [begin, end) for the current inputs, without sampling."""
        start = self.variant_start(self.max_position(tokens))
        self.run_inputs.send(tokens, self.pipeline.launched)
        self.replay((begin, end, start), lambda: self.prepared_steps(begin, end, start))

    def _claim_backend(self) -> None:
        """Discard the steps that another program has queued: programs share the KV cache and the sampler's state."""
        self._require_open()
        self._device.make_current()
        before, self.backend.current = self.backend.current, self
        if before is not None and before is not self:
            before.pipeline.discard_pending()
            before.pipeline.logits_unchanged()  # its last step cannot be recomputed: the KV cache may change now
