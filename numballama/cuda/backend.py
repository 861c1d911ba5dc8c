"""The CUDA backend: weights, KV cache and sampler state on one GPU, and the programs that run there."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .. import progress
from ..checkpoint import Weight
from ..errors import Error
from ..fusion import fuse
from ..ir import Graph
from ..kernel_cache import cuda_cache_directory
from ..memory import format_bytes
from ..plan import lower
from . import ops  # noqa: F401 (registers the kernels)
from .compile_worker import compile_ahead
from .compiler import compile_kernel
from .driver import Device, LoadedKernel, Memory, PreparedLaunch
from .launch import Array, Launch, Specialization
from .program import CudaProgram
from .sampler_table import DeviceSamplerTable
from .weights import Weights, aligned

if TYPE_CHECKING:
    from ..backend import BackendName, Program
    from ..quantization.types import ActivationType, KVType


class _Owned(Protocol):
    """Device memory that the backend frees when it is closed."""

    @property
    def nbytes(self) -> int: ...

    def free(self) -> object: ...


def _of_cuda(program: Program) -> CudaProgram:
    """The program, which must be one of this backend's."""
    if not isinstance(program, CudaProgram):
        raise Error(f"the CUDA backend cannot use a {type(program).__name__}; pass a program that it made")
    return program


class CudaBackend:
    """Weights and KV cache on one GPU."""

    name: ClassVar[BackendName] = "cuda"
    prefill_chunk: ClassVar[int] = 512
    default_kv_dtype: ClassVar[KVType] = "f16"
    activation_types: ClassVar[tuple[ActivationType, ...]] = ("f32",)
    in_host_memory: ClassVar[bool] = False

    def __init__(self, weights: Mapping[str, Weight], device: str = "cuda") -> None:
        self.device = Device(device)
        self.notes: list[str] = []
        self.states: dict[str, Array] = {}
        """The KV cache: device memory by the name of its value."""
        self.compiled = {"hits": 0, "misses": 0}
        """Number of kernels that came from the cache, and of kernels that were compiled."""
        self.current: CudaProgram | None = None
        """The program that ran last."""
        self._loaded: dict[Specialization, LoadedKernel] = {}
        self._prepared = False
        self._owned: list[_Owned] = []
        self.weights = Weights(self.device, weights)
        self._owned.append(self.weights)
        self._sampler_table: DeviceSamplerTable | None = None

    @property
    def workers(self) -> int:
        """Streaming multiprocessors."""
        return self.device.n_sms

    @property
    def memory_bytes(self) -> int:
        """Bytes of device memory that weights, KV cache and programs have allocated. A run allocates no more."""
        return sum(owned.nbytes for owned in self._owned)

    @property
    def description(self) -> str:
        """The GPU: number and name."""
        return str(self.device)

    def machine(self) -> dict[str, dict[str, Any]]:
        """The GPU's name, size and driver, as a benchmark reports them."""
        from .bandwidth import describe

        return {"gpu": describe(self.device)}

    def weight_nbytes(self, name: str) -> int:
        """Bytes of a weight in the layout that kernels read."""
        return int(self.weights.operands[name].nbytes)

    def measure_bandwidth(self) -> float:
        """Bytes per second that a copy reads and writes. Raises `DeviceError` if too little memory is free."""
        from .bandwidth import measure_bandwidth

        return measure_bandwidth(self)

    def time_steps(
        self, program: Program, kinds: Sequence[Hashable], nbytes: Sequence[int]
    ) -> tuple[list[float], float]:
        """Seconds of each step and of the whole run. Steps of a kind are measured together."""
        from .timing import time_steps

        return time_steps(_of_cuda(program), kinds, nbytes)

    def synchronize(self) -> None:
        """Wait until the stream is done. Raises `DeviceError` if a kernel failed."""
        self.device.make_current()
        self.device.synchronize()

    def program(
        self, graph: Graph, fusions: bool | Sequence[str] = True, report: progress.Report | None = None
    ) -> CudaProgram:
        """Fuse, lower and bind a graph.

        `prepare` compiles the kernels of all programs made before it. After `prepare`, kernels are compiled here.
        Without `prepare`, they are compiled when a program first runs. `report(kernel, done, total)` is called before
        each kernel.
        """
        plan = lower(fuse(graph, self.name, fusions), self.name, self.device.n_sms)
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
            self._compile_all(program.all_launches, report)
        return program

    def sampler_table(self, vocab_size: int) -> DeviceSamplerTable:
        """The state with which programs sample, in device memory; made when it is first needed."""
        if self._sampler_table is None:
            self._sampler_table = DeviceSamplerTable(self.device, 1, vocab_size)
            self._owned.append(self._sampler_table)
        return self._sampler_table

    def prepare_launches(self, steps: Sequence[Sequence[Launch]]) -> list[list[PreparedLaunch]]:
        """Compile the launches' kernels, or take them from the cache, load them and build the driver's structures."""
        self._compile_all(steps)
        return [
            [PreparedLaunch(self.device, self._loaded[launch.specialization], launch) for launch in launches]
            for launches in steps
        ]

    def _compile_all(self, steps: Sequence[Sequence[Launch]], report: progress.Report | None = None) -> None:
        """Compile and load the kernels that are not loaded yet."""
        wanted = dict.fromkeys(launch.specialization for launches in steps for launch in launches)
        missing = [kernel for kernel in wanted if kernel not in self._loaded]
        capability, cache = self.device.capability, cuda_cache_directory()
        compiled = compile_ahead(missing, capability, cache, report)
        for index, kernel in enumerate(missing):
            if report and not compiled:
                report(kernel.name, index, len(missing))
            code = compiled.get(index) or compile_kernel(kernel, capability, cache)
            self.compiled["hits" if code.cached else "misses"] += 1
            self._loaded[kernel] = LoadedKernel(self.device, code)

    def prepare(self, decode: Program, report: progress.Report | None = None) -> None:
        """Compile the kernels of all programs so far, and those of sampling, so that the first token does not wait."""
        decode = _of_cuda(decode)
        vocab = decode.array("logits").shape[1]
        programs = [owned for owned in self._owned if isinstance(owned, CudaProgram)]
        steps = [launches for program in programs for launches in program.all_launches]
        self._compile_all([*steps, decode.pipeline.tail(0), decode.pipeline.tail(vocab)], report)
        self._prepared = True
        for program in programs:
            program.prepare_variants()

    def close(self) -> None:
        """Free all device memory now."""
        try:
            self.device.make_current()
            self.device.synchronize()
        finally:  # also where the device has failed
            for owned in self._owned:
                owned.free()
            self._owned.clear()
            self._loaded.clear()

    def __repr__(self) -> str:
        return f"<CudaBackend {self.device}, {format_bytes(self.weights.nbytes)} of weights>"
