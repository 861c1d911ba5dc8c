"""The host's side of a GPU: devices, memory, compiled kernels, launches and captured graphs, through NVIDIA's driver.

Kernels go from Python to PTX (Numba), from PTX to machine code (nvJitLink) and into this package's cache; no step of
that needs a GPU. They are launched by the driver's own call with plain integers: Numba's launch takes 24 µs, this one
8, and a launch inside a captured graph less than one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import re
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..errors import DeviceError, Error
from ..kernel_cache import is_current
from ..memory import format_bytes
from ..registry import KernelRef
from .launch import Array, Launch

try:
    from cuda.bindings import driver, nvjitlink
except ImportError as error:  # pragma: no cover - the message is tested without the packages
    raise DeviceError(
        f"NVIDIA's Python packages are missing ({error}); install them with: pip install 'numballama[cuda]'"
    ) from error

OLDEST = (7, 5)
"""The oldest compute capability that CUDA 13 compiles for."""


def check(result: tuple[Any, ...]) -> Any:
    """The values of a driver call. Raises `DeviceError` with the driver's own name and words for a failure."""
    code, *values = result
    if int(code):
        _, name = driver.cuGetErrorName(code)
        _, text = driver.cuGetErrorString(code)
        words = " ".join(part.decode() for part in (name, text) if part)
        raise DeviceError(f"CUDA: {words or code}")
    return values[0] if len(values) == 1 else tuple(values)


@contextlib.contextmanager
def _inside(context: Any) -> Iterator[None]:
    """A context current for a moment: a finalizer runs on any thread, whose own context must stay."""
    driver.cuCtxPushCurrent(context)
    try:
        yield
    finally:
        driver.cuCtxPopCurrent()


# Devices and memory


class Memory:
    """Device memory, freed by `free` or with the last reference to it."""

    def __init__(self, device: Device, nbytes: int, what: str) -> None:
        self.nbytes = max(nbytes, 1)
        device.make_current()
        free = device.free_bytes
        if self.nbytes > free:
            raise DeviceError(f"{device}: {what} takes {format_bytes(nbytes)}, {format_bytes(free)} are free")
        self.address = int(check(driver.cuMemAlloc(self.nbytes)))
        self.free = weakref.finalize(self, _free, device.context, self.address)

    def array(self, offset: int, shape: tuple[int, ...], dtype: str) -> Array:
        """An array inside this memory."""
        return Array(self.address + offset, shape, dtype)


def _free(context: Any, address: int) -> None:
    with _inside(context):
        driver.cuMemFree(address)


class Pinned:
    """Host memory that the GPU can reach: `bytes` is a NumPy view of it, `address` its address on both sides."""

    def __init__(self, device: Device, nbytes: int) -> None:
        device.make_current()
        self.address = int(check(driver.cuMemHostAlloc(nbytes, driver.CU_MEMHOSTALLOC_PORTABLE)))
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))
        self.bytes[:] = 0
        self.free = weakref.finalize(self, _free_host, device.context, self.address)


def _free_host(context: Any, address: int) -> None:
    with _inside(context):
        driver.cuMemFreeHost(address)


class Device:
    """A GPU with a stream of its own, in the process's primary context, which other libraries share."""

    def __init__(self, name: str = "cuda") -> None:
        match = re.fullmatch(r"cuda(?::(\d+))?", name)
        if not match:
            raise DeviceError(f"device {name!r} is not 'cuda' or 'cuda:N'")
        self.index = int(match[1] or 0)
        try:
            check(driver.cuInit(0))
            count = int(check(driver.cuDeviceGetCount()))
        except (DeviceError, RuntimeError, OSError) as error:
            raise DeviceError(
                f"device {name!r}: no usable NVIDIA driver was found ({error}); use device='cpu'"
            ) from None
        if self.index >= count:
            raise DeviceError(f"device {name!r}: this machine has {count} CUDA device{'s' * (count != 1)}")
        self._handle = check(driver.cuDeviceGet(self.index))
        self.name = check(driver.cuDeviceGetName(128, self._handle)).split(b"\0")[0].decode()
        self.capability = (self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR"))
        if self.capability < OLDEST:
            found = ".".join(map(str, self.capability))
            raise DeviceError(
                f"device {name!r}: {self.name} has compute capability {found}; at least 7.5 is needed; use device='cpu'"
            )
        self.processors = self._attribute("MULTIPROCESSOR_COUNT")
        self.shared_limit = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self.cache_bytes = self._attribute("L2_CACHE_SIZE")
        self.context = check(driver.cuDevicePrimaryCtxRetain(self._handle))
        self.make_current()
        stream = check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = stream
        self._closed = weakref.finalize(self, _destroy_stream, self.context, stream)

    def _attribute(self, name: str) -> int:
        which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(check(driver.cuDeviceGetAttribute(which, self._handle)))

    def __str__(self) -> str:
        return f"cuda:{self.index} ({self.name})"

    def make_current(self) -> None:
        """Let this thread's driver calls be about this device."""
        check(driver.cuCtxSetCurrent(self.context))

    @property
    def free_bytes(self) -> int:
        """Memory that is free now, by the driver's word."""
        self.make_current()
        return int(check(driver.cuMemGetInfo())[0])

    @property
    def total_bytes(self) -> int:
        """Memory that the device has."""
        self.make_current()
        return int(check(driver.cuMemGetInfo())[1])

    def synchronize(self) -> None:
        """Wait until all that was put into the stream is done. Raises `DeviceError` if a kernel failed."""
        check(driver.cuStreamSynchronize(self.stream))

    @property
    def busy(self) -> bool:
        """Whether the stream has work left. Raises `DeviceError` if a kernel failed."""
        (code,) = driver.cuStreamQuery(self.stream)
        if code == driver.CUresult.CUDA_ERROR_NOT_READY:
            return True
        check((code,))
        return False

    def write(self, address: int, source: int, nbytes: int) -> None:
        """Copy to the device, in the stream; `source` is a host address that stays as it is until then."""
        check(driver.cuMemcpyHtoDAsync(address, source, nbytes, self.stream))

    def read(self, address: int, out: np.ndarray) -> None:
        """Copy from the device into a contiguous array, after all that is in the stream."""
        check(driver.cuMemcpyDtoHAsync(out.ctypes.data, address, out.nbytes, self.stream))
        self.synchronize()

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        """Set bytes, in the stream."""
        check(driver.cuMemsetD8Async(address, byte, nbytes, self.stream))


def versions() -> dict[str, str | None]:
    """The driver's version (None where the system does not tell), and that of CUDA that it brings."""
    number = int(check(driver.cuDriverGetVersion()))
    found = None
    with contextlib.suppress(OSError):
        found = re.search(r" (\d+\.\d+[.\d]*) ", Path("/proc/driver/nvidia/version").read_text().partition("\n")[0])
    return {"driver": found[1] if found else None, "cuda": f"{number // 1000}.{number % 1000 // 10}"}


def _destroy_stream(context: Any, stream: Any) -> None:
    with _inside(context):
        driver.cuStreamDestroy(stream)


# Kernels


@dataclass(frozen=True)
class Code:
    """A kernel in machine code for one compute capability, and what the assembler says of it."""

    machine: bytes
    entry: str
    registers: int
    stack_bytes: int
    local_bytes: int
    cached: bool = False


@dataclass(frozen=True)
class _Facts:
    entry: str
    registers: int
    stack_bytes: int
    local_bytes: int


def signature(kinds: Sequence[str]) -> tuple[Any, ...]:
    """Numba's types for kinds of arguments: "f16*" is a pointer, "i64" and "f32" are numbers."""
    from numba.cuda import types

    from .quant_traits import ELEMENT_TYPES

    return tuple(
        types.CPointer(ELEMENT_TYPES[kind[:-1]]) if kind.endswith("*") else ELEMENT_TYPES[kind] for kind in kinds
    )


@contextlib.contextmanager
def _pretending(capability: tuple[int, int]) -> Iterator[None]:
    """Let Numba compile the functions that a kernel calls for this capability: it asks the device at hand, if there is
    one. It keeps what it compiled, so a process compiles for one capability only.
    """
    from numba.cuda import dispatcher

    global _compiling_for
    if _compiling_for not in (None, capability):
        raise Error(f"this process compiles kernels for {_compiling_for}; for {capability} start another")
    _compiling_for = capability
    with _compiling:
        before = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
        try:
            yield
        finally:
            dispatcher.get_current_device = before


_compiling = threading.RLock()

_compiling_for: tuple[int, int] | None = None


def require_compiler() -> None:
    """Raise `DeviceError` unless Numba's CUDA compiler is numba-cuda's."""
    try:
        from numba import cuda
    except ImportError as error:
        raise DeviceError(f"numba.cuda cannot be imported ({error}): pip install 'numballama[cuda]'") from error
    if getattr(cuda, "implementation", "") != "NVIDIA":
        raise DeviceError("numba.cuda is not numba-cuda: install it with: pip install 'numballama[cuda]'")


def to_ptx(kernel: Any, kinds: Sequence[str], capability: tuple[int, int], threads: int) -> str:
    """PTX of a `@cuda.jit` kernel, or of one that a `KernelRef` names, for these arguments and at most `threads` threads a
    block.
    """
    require_compiler()
    from numba import cuda

    if isinstance(kernel, KernelRef):
        kernel = kernel.load()
    with _pretending(capability):
        bounds = (threads, getattr(kernel.py_func, "min_blocks_per_sm", 1))
        ptx, _ = cuda.compile_ptx(kernel.py_func, signature(kinds), cc=capability, launch_bounds=bounds)
    return str(ptx)


def assemble(ptx: str, capability: tuple[int, int]) -> Code:
    """Machine code from PTX, by nvJitLink. Raises `DeviceError` with its log when it refuses the PTX."""
    options = [f"-arch=sm_{capability[0]}{capability[1]}", "-verbose"]
    handle = nvjitlink.create(len(options), options)
    try:
        source = ptx.encode() + b"\0"
        try:
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, source, len(source), "kernel")
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            raise DeviceError(f"nvJitLink refuses a kernel: {log.decode(errors='replace').strip()}") from error
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
        machine = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, machine)
    finally:
        nvjitlink.destroy(handle)
    (entry,) = re.findall(r"\.entry\s+([\w$]+)", ptx)
    text = log.decode(errors="replace")
    registers, stack, local = (
        int(found[-1]) if (found := re.findall(pattern, text)) else -1
        for pattern in (r"used (\d+) registers", r"(\d+) stack\b", r"(\d+) bytes lmem")
    )
    return Code(bytes(machine), entry, registers, stack, local)


def compile_kernel(
    kernel: Any, kinds: Sequence[str], capability: tuple[int, int], threads: int, cache: Path | None
) -> Code:
    """A kernel in machine code, from the cache if it is there.

    `cache` is a folder that belongs to these very sources (`kernel_cache.cuda_cache_directory`), so that an entry is
    never stale; None, or a kernel that is not part of this package, is compiled anew.
    """
    path = cache_entry(kernel, kinds, capability, threads, cache)
    if path is not None:
        try:
            head, _, machine = path.read_bytes().partition(b"\n")
            facts = json.loads(head)
            if facts.pop("size") == len(machine):
                return Code(machine, **facts, cached=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass  # not there, or not whole: it is made again
    code = assemble(to_ptx(kernel, kinds, capability, threads), capability)
    path = cache_entry(kernel, kinds, capability, threads, cache)  # its file has been imported now
    if path is not None and is_current(path.parent):
        facts = asdict(_Facts(code.entry, code.registers, code.stack_bytes, code.local_bytes))
        _write_whole(path, json.dumps(facts | {"size": len(code.machine)}).encode() + b"\n" + code.machine)
    return code


def cache_entry(
    kernel: Any, kinds: Sequence[str], capability: tuple[int, int], threads: int, cache: Path | None
) -> Path | None:
    """The file that holds a kernel's machine code, once it is compiled; None for one that is not kept.

    Only this package's own files are part of what the folder is named by, so only their kernels are kept.
    """
    found = kernel.loaded() if isinstance(kernel, KernelRef) else kernel  # somebody may have put another in its place
    if found is None:
        module, name, source = kernel.module, kernel.name, _PACKAGE.parent / (kernel.module.replace(".", "/") + ".py")
    else:
        function = found.py_func
        module, name, source = function.__module__, function.__qualname__, Path(function.__code__.co_filename)
    if cache is None or not (source.is_relative_to(_PACKAGE) and source.is_file()):
        return None
    named = f"{module}.{name}({', '.join(kinds)}) {threads} sm_{capability}"
    return cache / f"{name.rpartition('.')[2]}-{hashlib.sha256(named.encode()).hexdigest()[:24]}.cubin"


_PACKAGE = Path(__file__).parent.parent


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all; a disk that is full costs only the cache."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        pass


class Function:
    """A kernel, loaded on a device."""

    def __init__(self, device: Device, code: Code) -> None:
        device.make_current()
        self.code = code
        self._module = check(driver.cuModuleLoadData(code.machine))
        self.handle = check(driver.cuModuleGetFunction(self._module, code.entry.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        fixed = check(
            driver.cuFuncGetAttribute(driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, self.handle)
        )
        self.shared_limit = device.shared_limit - int(fixed)
        check(driver.cuFuncSetAttribute(self.handle, limit, self.shared_limit))
        # one split between L1 and shared memory for all kernels: to change it, a multiprocessor must run empty first,
        # and the next kernel could not begin beside this one
        carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        check(driver.cuFuncSetAttribute(self.handle, carveout, 100))
        self._unload = weakref.finalize(self, _unload, device.context, self._module)


def _unload(context: Any, module: Any) -> None:
    with _inside(context):
        driver.cuModuleUnload(module)


class Call:
    """A launch made ready: the driver's structures are built once."""

    def __init__(self, device: Device, function: Function, launch: Launch) -> None:
        if launch.shared_bytes > function.shared_limit:
            raise DeviceError(
                f"{device}: {launch.name} wants {launch.shared_bytes:,} bytes of shared memory, a "
                f"block may have {function.shared_limit:,}; use device='cpu'"
            )
        self.name = launch.name
        self._function = function
        values, kinds = [], []
        for argument, kind in zip(launch.arguments, launch.kinds, strict=True):
            values.append(argument.address if isinstance(argument, Array) else argument)
            kinds.append(ctypes.c_float if kind == "f32" else ctypes.c_int64)
        self._arguments = tuple(values), tuple(kinds)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*launch.grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes = launch.shared_bytes
        config.hStream = device.stream
        if device.capability >= (9, 0):
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            value = driver.CUlaunchAttributeValue()
            value.programmaticStreamSerializationAllowed = 1
            attribute.value = value
            config.attrs, config.numAttrs = [attribute], 1
        self._config = config

    def __call__(self) -> None:
        """Put the launch into the stream."""
        check(driver.cuLaunchKernelEx(self._config, self._function.handle, self._arguments, 0))


_capturing = threading.Lock()
"""One capture at a time; only this thread's stream is captured, but the driver's bookkeeping is the process's."""


class Recording:
    """Launches captured as a graph, which the driver replays as one."""

    def __init__(self, device: Device, calls: Sequence[Callable[[], None]]) -> None:
        self._device = device
        device.make_current()
        collecting = gc.isenabled()
        with _capturing:
            gc.disable()  # memory freed meanwhile would spoil the capture
            check(driver.cuStreamBeginCapture(
                device.stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            ))  # fmt: skip
            try:
                for call in calls:
                    call()
            finally:
                graph = check(driver.cuStreamEndCapture(device.stream))
                if collecting:
                    gc.enable()
        self._graph = check(driver.cuGraphInstantiate(graph, 0))
        check(driver.cuGraphDestroy(graph))
        self._destroy = weakref.finalize(self, _destroy_graph, device.context, self._graph)

    def replay(self) -> None:
        """Put the whole graph into the stream."""
        check(driver.cuGraphLaunch(self._graph, self._device.stream))


def _destroy_graph(context: Any, graph: Any) -> None:
    with _inside(context):
        driver.cuGraphExecDestroy(graph)


class Stopwatch:
    """GPU time between two marks in a stream, in seconds."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._events = [check(driver.cuEventCreate(0)) for _ in range(2)]
        self._destroy = weakref.finalize(self, _destroy_events, device.context, self._events)

    def measure(self, action: Callable[[], object]) -> float:
        """Seconds that the device spends on what `action` puts into the stream."""
        check(driver.cuEventRecord(self._events[0], self._device.stream))
        action()
        check(driver.cuEventRecord(self._events[1], self._device.stream))
        self._device.synchronize()
        return float(check(driver.cuEventElapsedTime(*self._events))) / 1e3


def _destroy_events(context: Any, events: Sequence[Any]) -> None:
    with _inside(context):
        for event in events:
            driver.cuEventDestroy(event)
