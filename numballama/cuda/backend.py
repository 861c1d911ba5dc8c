"""The CUDA backend: weights, KV cache and sampler state on one GPU, and the programs that run there."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from .. import progress
from ..checkpoint import Weight
from ..errors import Error
from ..fusion import FUSIONS, fuse
from ..graph import NOT_CACHED, PAGE_TABLE
from ..ir import DTYPES, Graph
from ..kernel_cache import cuda_cache_directory
from ..memory import format_bytes
from ..plan import lower
from . import ops  # noqa: F401 (registers the kernels)
from .compile_worker import compile_ahead
from .compiler import compile_kernel
from .decode_pipeline import LOOKAHEAD, Mailbox
from .driver import Device, LoadedKernel, Memory, PreparedLaunch
from .kernels.params import PROMPT_CHUNK
from .launch import Array, Launch, Matrix, Peers, Specialization, Work
from .nccl import PreparedCollective
from .ops import skinny
from .ops.gemm import FEW
from .program import CudaProgram, Prepared
from .sampler_table import DeviceSamplerTable, Staging
from .weights import Weights, aligned

if TYPE_CHECKING:
    from ..backend import BackendName, Program
    from ..quantization.types import ActivationType, KVType


class _Owned(Protocol):
    """Device memory that the backend frees when it is closed."""

    @property
    def nbytes(self) -> int: ...

    def free(self) -> object: ...


RESERVED_BYTES = 256 << 20
"""Bytes of device memory that are kept for programs, captured graphs and compiled kernels."""


def _of_cuda(program: Program) -> CudaProgram:
    """The program, which must be one of this backend's."""
    if not isinstance(program, CudaProgram):
        raise Error(f"the CUDA backend cannot use a {type(program).__name__}; pass a program that it made")
    return program


class CudaBackend:
    """Weights and KV cache on one GPU."""

    name: ClassVar[BackendName] = "cuda"
    prefill_chunk = PROMPT_CHUNK
    default_kv_dtype: ClassVar[KVType] = "f16"
    activation_types: ClassVar[tuple[ActivationType, ...]] = ("f32",)
    in_host_memory: ClassVar[bool] = False
    mixed_tokens: ClassVar[int] = 128
    lookahead: ClassVar[int] = LOOKAHEAD
    decode_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
    most_sequences: int | None = None
    failure = None

    def __init__(self, weights: Mapping[str, Weight], device: str = "cuda", batch_invariant: bool = False) -> None:
        self.device = Device(device)
        self.notes: list[str] = []
        self.states: dict[str, Array] = {}
        """The KV cache: device memory by the name of its value."""
        self.compiled = {"hits": 0, "misses": 0}
        """Number of kernels that came from the cache, and of kernels that were compiled."""
        self.current: CudaProgram | None = None
        """The program that ran last."""
        self.peers: Peers | None = None
        """The ranks on other GPUs with which this one shares a model, once it has joined them."""
        self._loaded: dict[Specialization, LoadedKernel] = {}
        self._prepared = False
        self._owned: list[_Owned] = []
        self.weights = Weights(self.device, weights)
        self._owned.append(self.weights)
        self.batch_invariant = batch_invariant
        if batch_invariant:
            self._use_one_family()
        self._sampler_table: DeviceSamplerTable | None = None
        self._arena: Memory | None = None
        try:
            self._page_writes = Staging(self.device)
            self.mailbox = Mailbox(self.device)
        except BaseException:
            self.close()
            raise
        self._owned.append(self.mailbox.memory)

    def _use_one_family(self) -> None:
        """Keep to runs whose rows all have the same bits: `gemv` where a matrix is float32, else `skinny`."""
        in_float32 = any(
            isinstance(each, Matrix) and each.payload.dtype == "f32" for each in self.weights.operands.values()
        )
        most = FEW if in_float32 else skinny.MOST
        self.prefill_chunk = self.most_sequences = most
        self.decode_sizes = tuple(size for size in type(self).decode_sizes if 1 < size <= most)

    def join(self, peers: Peers) -> None:
        """Be a rank of a model: programs that are made from now on exchange values with the others."""
        self.peers = peers
        self.states |= {"exchange": peers.exchange, "arrivals": peers.arrivals}

    @property
    def by_nccl(self) -> bool:
        """Whether NCCL exchanges this rank's values."""
        return self.peers is not None and self.peers.communicator is not None

    @property
    def workers(self) -> int:
        """Streaming multiprocessors."""
        return self.device.n_sms

    @property
    def memory_bytes(self) -> int:
        """Bytes of device memory that weights, KV cache, programs and exchanges have allocated. A run allocates no
        more.
        """
        exchanged = self.peers.exchange.nbytes + self.peers.arrivals.nbytes if self.peers else 0
        return exchanged + sum(owned.nbytes for owned in self._owned)

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
        self, program: Program, kinds: Sequence[Hashable], nbytes: Sequence[int], tokens: int = 1
    ) -> tuple[list[float], float]:
        """Seconds of each step and of the whole run. Steps of a kind are measured together."""
        from .timing import time_steps

        return time_steps(_of_cuda(program), kinds, nbytes, tokens)

    def time_exchanges(self, graph: Graph, tokens: int = 1) -> None:
        """None: one rank has the model."""

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
        if self.by_nccl:  # NCCL adds up what is complete: no linear step sends its results itself
            named = fusions if not isinstance(fusions, bool) else FUSIONS if fusions else ()
            fusions = [name for name in named if name != "all_reduce"]
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
            self._compile_all([*program.all_launches, *program.pipeline.all_launches()], report)
            self._capture(program)
        return program

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Write page numbers into row `slot` of the page table, from entry `first` on: a copy in the stream, before all
        later runs.

        Raises `Error` for entries that the table does not have.
        """
        table = self.states[PAGE_TABLE]
        rows, columns = table.shape
        if not (0 <= slot < rows and 0 <= first <= first + len(pages) <= columns):
            raise Error(f"entries {first} to {first + len(pages)} of row {slot}: the page table is {rows} by {columns}")
        self.device.make_current()
        numbers = np.array(pages, np.int32)
        self._page_writes.write(table.address + 4 * (slot * columns + first), numbers.view(np.uint8))

    def cache_page(self, page: int) -> Iterator[np.ndarray]:
        """Copies of the keys and values of each layer in a page of the KV cache. Waits until the device is idle."""
        self.device.make_current()
        for name, state in self.states.items():
            if name not in NOT_CACHED:
                held = np.empty(state.shape[1:], DTYPES[state.dtype])
                self.device.read(state.address + page * held.nbytes, held)
                yield held

    def sampler_table(self, vocab_size: int) -> DeviceSamplerTable:
        """The state with which programs sample, a row for each slot of the page table; made when it is first needed."""
        if self._sampler_table is None:
            slots = self.states[PAGE_TABLE].shape[0] - 1
            self._sampler_table = DeviceSamplerTable(self.device, slots, vocab_size)
            self._owned.append(self._sampler_table)
        return self._sampler_table

    def arena(self, nbytes: int, what: str) -> Memory:
        """Memory for the temporaries of a program. Programs share it: only one runs at a time."""
        if self._arena is None or self._arena.nbytes < nbytes:
            self._arena = Memory(self.device, nbytes, what)
            self._owned.append(self._arena)
            self.device.fill(self._arena.address, 0, nbytes)
        return self._arena

    def free_bytes(self) -> int | None:
        """Bytes of device memory that the KV cache may take: what is free, without a share for programs."""
        free = self.device.free_bytes
        return max(free - max(free // 16, RESERVED_BYTES), 0)

    def discard_runs(self) -> None:
        """Wait until the device is idle, and forget the tickets of runs in flight."""
        self.synchronize()
        self.mailbox.resume()
        for owned in self._owned:
            if isinstance(owned, CudaProgram):
                owned.pipeline.discard()

    def prepare_launches(self, steps: Sequence[Sequence[Work]]) -> list[list[Prepared]]:
        """Compile the launches' kernels, or take them from the cache, load them and build the driver's structures."""
        self._compile_all(steps)
        return [[self._prepare_one(launch) for launch in launches] for launches in steps]

    def _prepare_one(self, launch: Work) -> Prepared:
        if isinstance(launch, Launch):
            return PreparedLaunch(self.device, self._loaded[launch.specialization], launch)
        assert self.peers is not None and self.peers.communicator is not None
        return PreparedCollective(self.device, self.peers.communicator, launch, launch.source.shape[0])

    def _compile_all(self, steps: Sequence[Sequence[Work]], report: progress.Report | None = None) -> None:
        """Compile and load the kernels that are not loaded yet."""
        wanted = dict.fromkeys(
            launch.specialization for launches in steps for launch in launches if isinstance(launch, Launch)
        )
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
        programs = [owned for owned in self._owned if isinstance(owned, CudaProgram)]
        steps = [launches for program in programs for launches in program.all_launches]
        tails = [launches for program in programs for launches in program.pipeline.all_launches()]
        self._compile_all([*steps, *tails], report)
        self._prepared = True
        for program in programs:
            program.prepare_variants()
            self._capture(program)

    def _capture(self, program: CudaProgram) -> None:
        """Capture a program's graphs now if there may be several sequences: others would wait for it.

        Not with NCCL: all ranks must capture its calls at the same time, as they do when a graph first runs.
        """
        if self.states[PAGE_TABLE].shape[0] > 2 and not self.by_nccl:
            program.pipeline.capture()

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
