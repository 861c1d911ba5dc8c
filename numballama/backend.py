"""The protocols `Backend` and `Program`, which every device implements, and `open_backend`, which opens a device.

A backend holds the weights and the KV cache of one device and makes a `Program` of each graph. `cpu` and `cuda` lower
the graph to a plan; `reference` interprets it. Everything that runs a model (`Session`, `Model`, the benchmark, the
profiler) uses these two protocols and no backend's own class.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable
from weakref import WeakSet

import numpy as np

from .checkpoint import Checkpoint, Weight
from .errors import DOCTOR, NEXT_STEP, DeviceError, UnsupportedError
from .host import environment, interrupts
from .ir import Graph
from .kernel_cache import cuda_cache_directory
from .plan import Plan
from .progress import Report
from .quantization.policy import Dtype
from .quantization.types import ActivationType, KVType
from .sampling import Sampled, SamplerTable
from .validation import flag

BackendName = Literal["cpu", "cuda", "reference"]


@runtime_checkable
class Program(Protocol):
    """A graph made ready to run on a device: write `inputs`, call `run`, read `value`."""

    entries: int
    """Number of times that the host has entered compiled code or started work on the device."""

    @property
    def graph(self) -> Graph:
        """The graph that runs: after fusion, if the backend fuses."""

    @property
    def plan(self) -> Plan | None:
        """The graph lowered for the device. None on the reference, which interprets the graph."""

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """Arrays in host memory that the next run reads: `ids`, `positions`, `sequences` int32 [tokens], and `rows`.

        `sequences` are slots of the page table, `rows` the numbers of the rows with logits, int32 [rows at most].
        """

    @property
    def prefill_end(self) -> int:
        """Index of the first step that only rows with logits need. A run without such rows stops there."""

    def value(self, name: str) -> np.ndarray:
        """A value of the last run, in its declared shape. The next run may overwrite it."""

    def run(self, tokens: int, begin: int = 0, end: int | None = None, rows: int = 1) -> None:
        """Run steps [begin, end) for the first `tokens` tokens of the inputs.

        `rows` is how many of them have logits: the first ones of the input `rows` name them. Raises `Error` if a kernel
        fails, `DeviceError` if the device fails.
        """

    def submit(self, tokens: int, rows: int, table: SamplerTable) -> int:
        """Start a run of all steps that samples a token for each of `rows` rows with logits; returns its ticket.

        Inputs are copied. An id of FEED stands for the token that its row's slot has sampled last. Without the input
        `rows`, every token has logits. Up to `Backend.lookahead` + 1 runs may be in flight; on the CPU the run is done
        when this returns. Raises as `run` does.
        """

    def collect(self, ticket: int) -> Sampled:
        """Wait for a run and return what it sampled. Tickets are collected in order, each once.

        A row whose logits hold NaN has token -1. Raises `DeviceError` if the device fails.
        """

    def kernel_names(self, tokens: int | None = None) -> list[str]:
        """Names of each step's kernels at the positions in `inputs`; several names are joined by "+". With `tokens`,
        those of the last run, which was for this number of tokens.
        """


@runtime_checkable
class Backend(Protocol):
    """Weights and KV cache of one device, and the programs that use them."""

    name: ClassVar[BackendName]
    prefill_chunk: int
    """Maximum number of prompt tokens in one run."""
    default_kv_dtype: ClassVar[KVType]
    """Element type of the KV cache unless the user chooses one."""
    activation_types: ClassVar[tuple[ActivationType, ...]]
    """Types that the inputs of linear layers may be quantised to."""
    in_host_memory: ClassVar[bool]
    """Whether weights and KV cache are in host memory."""
    mixed_tokens: ClassVar[int]
    """Maximum number of rows of a run in which others decode beside a prompt: they must not wait for long."""
    lookahead: ClassVar[int]
    """Runs that may be submitted before the one whose tokens are awaited is done. 0: `submit` does the work."""
    decode_sizes: tuple[int, ...]
    """Numbers of sequences for which a program of their own decodes faster than one for a chunk of a prompt. The first
    is the least number of rows that a program has.
    """
    most_sequences: int | None
    """Maximum number of sequences in one run, if the backend has one."""

    @property
    def workers(self) -> int:
        """Number of workers that share a step: threads of a CPU, multiprocessors (SMs) of a GPU."""

    @property
    def notes(self) -> list[str]:
        """Deviations from what the caller requested, one sentence each."""

    @property
    def description(self) -> str:
        """The device in one line, such as "cuda:0 (NVIDIA H200)"."""

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of device memory that weights, KV cache and programs take. None if they are in host memory."""

    @property
    def failure(self) -> DeviceError | None:
        """Why the device cannot be used any more, as far as that is known without using it."""

    def machine(self) -> dict[str, dict[str, Any]]:
        """Facts about the device for a benchmark's report, as JSON values. Empty if the device is the host."""

    def program(self, graph: Graph, fusions: bool | Sequence[str] = True, report: Report | None = None) -> Program:
        """Fuse, lower and bind a graph. `fusions` are all, none, or those of these names."""

    def prepare(self, decode: Program, report: Report | None = None) -> None:
        """Compile or load everything that would delay the first token. `decode` is the program for one sequence."""

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Write page numbers into row `slot` of the page table, from entry `first` on. Later runs see them."""

    def cache_page(self, page: int) -> Iterator[np.ndarray]:
        """What a page of the KV cache holds after all runs so far: keys and values of each layer, in host memory.

        [n_kv_heads, page, head_dim] each, of the cache's type (16-bit types as their bits), or float32. Not for q8_0.
        """

    def weight_nbytes(self, name: str) -> int:
        """Bytes of a weight as this backend stores it."""

    def measure_bandwidth(self) -> float | None:
        """Measure the device's memory bandwidth in bytes per second. None on the reference, where it means nothing.

        Raises `DeviceError` if too little memory is free to measure with.
        """

    def time_steps(
        self, program: Program, kinds: Sequence[Hashable], nbytes: Sequence[int], tokens: int = 1
    ) -> tuple[list[float], float]:
        """Seconds of each step of a program for the first `tokens` of its inputs, and of the whole run; medians.

        `kinds` and `nbytes` have one entry per step. Steps of equal kind do the same work on different weights and may
        be measured together. `nbytes` are the bytes that a step must move. Raises `Error` on the reference.
        """

    def time_exchanges(self, graph: Graph, tokens: int = 1) -> float | None:
        """Seconds that ranks need at least to exchange values in a run of a decode graph for `tokens` tokens.

        It is measured once for a number of tokens. None if one rank has the model. Raises `DeviceError` if a rank
        fails.
        """

    def free_bytes(self) -> int | None:
        """Bytes that the KV cache may take. None if the system does not tell."""

    def discard_runs(self) -> None:
        """Wait until the device is idle, and forget the tickets of runs in flight."""

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""

    def close(self) -> None:
        """Free what the device holds. The backend and its programs cannot be used afterwards."""


LOADED_DRIVER = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
"""Of these a loaded NVIDIA driver shows at least one, the last in Windows' WSL."""


def choose_device(device: str, gpus: int = 1) -> tuple[str, str]:
    """The device to use, the first of `gpus`, and for "auto" the reason for the choice ("" otherwise).

    Raises `DeviceError` for an unknown name, and for "cuda" or "cuda:N" without such GPUs or without the packages that
    they need: another device is never used in its place. Raises `UnsupportedError` for several `gpus` on another
    device.
    """
    chosen, why = _choose_device(device)
    if gpus > 1:
        if _backend_name(chosen) != "cuda":
            if device == "auto":
                raise DeviceError(f"gpus={gpus} is for GPUs: {why}; {NEXT_STEP}")
            raise UnsupportedError(
                f"gpus={gpus} is for GPUs: on device={device!r} all cores share the model, threads= says how many"
            )
        for each in gpus_from(chosen, gpus)[1:]:
            _choose_device(each)
    return chosen, why


def gpus_from(device: str, count: int) -> list[str]:
    """The devices of a model that `count` GPUs share: "cuda" is the first one, "cuda:N" another, and those after it."""
    first = int(device.partition(":")[2] or 0)
    return [f"cuda:{first + rank}" for rank in range(count)]


def _choose_device(device: str) -> tuple[str, str]:
    if not isinstance(device, str):
        raise DeviceError(f"device must be a string, found {device!r}")
    if device == "auto":
        has_gpu = False
        try:
            from .cuda.driver import Device

            found, has_gpu = Device(), True
            environment.refuse_simulator()
            cuda_cache_directory()
            return "cuda", f"this machine has {found}"
        except DeviceError as error:
            if not has_gpu and os.name == "posix" and not any(map(os.path.exists, LOADED_DRIVER)):
                return "cpu", "no NVIDIA driver is loaded"  # NVIDIA's packages would be of no use
            return "cpu", str(error).replace(NEXT_STEP, DOCTOR)
    if _backend_name(device) == "cuda":
        try:
            from .cuda.driver import Device
        except DeviceError as error:
            raise DeviceError(f"device {device!r}: {error}") from error.__cause__
        Device(device)  # now: before a file is opened
        environment.refuse_simulator()
        cuda_cache_directory()
    return device, ""


def _backend_name(device: str) -> BackendName:
    if device in ("cpu", "reference"):
        return "cpu" if device == "cpu" else "reference"
    if device.partition(":")[0] == "cuda":
        return "cuda"
    raise DeviceError(f"unknown device {device!r}; choose from 'cpu', 'cuda', 'cuda:N', 'reference' and 'auto'")


def backend_class(device: str, batch_invariant: bool = False) -> type[Backend]:
    """The class of a device's backend; its class attributes are known before a weight is read.

    Raises `UnsupportedError` for `batch_invariant` on the reference.
    """
    name = _backend_name(device)
    if flag("batch_invariant", batch_invariant) and name == "reference":
        raise UnsupportedError(
            "batch_invariant is not supported by the reference, whose products of one row and of several differ in the "
            "last bits: use the CPU or a GPU"
        )
    if name == "cuda":
        from .cuda.backend import CudaBackend

        return CudaBackend
    if name == "cpu":
        with interrupts.deferred():
            environment.import_numba()
            from .cpu.backend import CpuBackend

        return CpuBackend
    from .reference import ReferenceBackend

    return ReferenceBackend


def open_backend(
    device: str,
    weights: Mapping[str, Weight],
    threads: int | None = None,
    batch_invariant: bool = False,
    gpus: int = 1,
    checkpoint: Checkpoint | None = None,
    dtype: Dtype | None = None,
) -> Backend:
    """A backend that holds `weights` on `device`: "cpu", "cuda", "cuda:N", "reference" or "auto".

    Several `gpus`, from `device` on, share the model: a process for each opens the file of `checkpoint` and converts
    its part of the weights to `dtype`, as `weights` are.

    `threads` is the number of workers on the CPU (default: Numba's number of threads). `batch_invariant`: a row's
    result has the same bits in runs of any size. Raises `DeviceError` as `choose_device` does, `UnsupportedError` for
    `batch_invariant` on the reference.
    """
    if device == "auto":
        device, _ = choose_device(device)
    backend_class(device, batch_invariant)
    name = _backend_name(device)
    opened: Backend
    if gpus > 1:
        from .parallel.processes import ProcessBackend

        assert checkpoint is not None
        devices, int8 = gpus_from(device, gpus), checkpoint.int8_activations
        path, config = checkpoint.path, checkpoint.config
        shared = ProcessBackend(path, config, weights, devices, threads, batch_invariant, int8, dtype)
        opened = cast("Backend", shared)  # what others have as class attributes are those of its first rank
    elif name == "cuda":
        from .cuda.backend import CudaBackend

        opened = CudaBackend(weights, device, batch_invariant)
    elif name == "cpu":
        with interrupts.deferred():
            environment.import_numba()
            from .cpu.backend import CpuBackend

        opened = CpuBackend(weights, threads, batch_invariant)
    else:
        from .reference import ReferenceBackend

        opened = ReferenceBackend(weights, threads)
    _OPENED.add(opened)
    return opened


_OPENED: WeakSet[Backend] = WeakSet()


def collect_forgotten() -> None:
    """Free the memory of backends that no variable refers to any more, before more is allocated.

    A model and its parts refer to each other, so Python frees one that was not closed some time later. A notebook's
    cell that is run again and again would have several in memory.
    """
    if _OPENED:
        gc.collect()
