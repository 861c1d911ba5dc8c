"""The host's view of a GPU: devices, memory, loaded kernels, launches and CUDA graphs, through NVIDIA's driver API.

Kernels are launched by a driver call with plain integers. A launch by Numba takes 24 µs of host time, this one 8, and a
launch inside a CUDA graph less than one. `compiler` makes the machine code.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import NEXT_STEP, DeviceError
from ..memory import format_bytes
from .compiler import Cubin
from .launch import Array, Launch, TensorMap
from .nccl import PreparedCollective

try:
    from cuda.bindings import driver
except ImportError as error:  # pragma: no cover - the message is tested without the packages
    raise DeviceError(
        f"NVIDIA's Python packages are missing ({error}): pip install 'numballama[cuda]'; {NEXT_STEP}"
    ) from error

MIN_CAPABILITY = (7, 5)
"""The oldest compute capability that CUDA 13 compiles for."""


def check(result: tuple[Any, ...]) -> Any:
    """Check a driver call and return its values. Raises `DeviceError` with the driver's error name and text."""
    code, *values = result
    if int(code):
        _, name = driver.cuGetErrorName(code)
        _, text = driver.cuGetErrorString(code)
        message = " ".join(part.decode() for part in (name, text) if part)
        raise DeviceError(f"CUDA: {message or code}")
    return values[0] if len(values) == 1 else tuple(values)


@contextlib.contextmanager
def _current(context: Any) -> Iterator[None]:
    """Make a context current in this block. A finalizer runs on any thread and must leave that thread's context."""
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

    def handle(self) -> bytes:
        """64 bytes by which another process of this machine maps this memory (`MappedMemory`)."""
        made = check(driver.cuIpcGetMemHandle(self.address))
        return ctypes.string_at(int(made.getPtr()), HANDLE_BYTES)  # not every version of cuda.bindings has `reserved`


def _free(context: Any, address: int) -> None:
    with _current(context):
        driver.cuMemFree(address)


HANDLE_BYTES = 64
"""Bytes of the handle of memory that processes share."""


class MappedMemory:
    """Device memory of another process, and perhaps of another GPU, as this device reaches it. Not freed by `free`, but
    no longer mapped. Raises `DeviceError` where peer access is not possible.
    """

    def __init__(self, device: Device, handle: bytes) -> None:
        device.make_current()
        made = driver.CUipcMemHandle()
        ctypes.memmove(int(made.getPtr()), handle, HANDLE_BYTES)
        flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        self.address = int(check(driver.cuIpcOpenMemHandle(made, int(flags))))
        self.free = weakref.finalize(self, _unmap, device.context, self.address)


def _unmap(context: Any, address: int) -> None:
    with _current(context):
        driver.cuIpcCloseMemHandle(address)


class RegisteredMemory:
    """Host memory that exists already, whole pages, made accessible to a GPU. `address` is its address there."""

    def __init__(self, device: Device, memory: np.ndarray) -> None:
        device.make_current()
        flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
        self._memory = memory  # it must live until it is no longer registered
        where = memory.ctypes.data
        check(driver.cuMemHostRegister(where, memory.nbytes, flags))
        self.free = weakref.finalize(self, _unregister, device.context, where, memory)
        self.address = int(check(driver.cuMemHostGetDevicePointer(where, 0)))


def _unregister(context: Any, where: int, memory: np.ndarray) -> None:
    with _current(context):
        driver.cuMemHostUnregister(where)


class Pinned:
    """Host memory that the GPU can reach: `bytes` is a NumPy view of it, `address` its address on both sides."""

    def __init__(self, device: Device, nbytes: int) -> None:
        device.make_current()
        self.address = int(check(driver.cuMemHostAlloc(nbytes, driver.CU_MEMHOSTALLOC_PORTABLE)))
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))
        self.bytes[:] = 0
        self.free = weakref.finalize(self, _free_host, device.context, self.address)


def _free_host(context: Any, address: int) -> None:
    with _current(context):
        driver.cuMemFreeHost(address)


class Device:
    """A GPU with its own stream, in the process's primary context, which other libraries share."""

    def __init__(self, name: str = "cuda") -> None:
        match = re.fullmatch(r"cuda(?::(\d+))?", name)
        if not match:
            raise DeviceError(f"device {name!r} is not 'cuda' or 'cuda:N'")
        self.index = int(match[1] or 0)
        try:
            check(driver.cuInit(0))
            count = int(check(driver.cuDeviceGetCount()))
        except (DeviceError, RuntimeError, OSError) as error:
            raise DeviceError(f"device {name!r}: no usable NVIDIA driver was found ({error}); {NEXT_STEP}") from None
        if self.index >= count:
            found = f"this machine has {count} CUDA device{'s' * (count != 1)}"
            raise DeviceError(f"device {name!r}: {found}; {NEXT_STEP}")
        self._handle = check(driver.cuDeviceGet(self.index))
        self.name = check(driver.cuDeviceGetName(128, self._handle)).split(b"\0")[0].decode()
        self.capability = (self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR"))
        if self.capability < MIN_CAPABILITY:
            found = ".".join(map(str, self.capability))
            raise DeviceError(
                f"device {name!r}: {self.name} has compute capability {found}, at least 7.5 is needed; {NEXT_STEP}"
            )
        self.n_sms = self._attribute("MULTIPROCESSOR_COUNT")
        self.shared_limit = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self.cache_bytes = self._attribute("L2_CACHE_SIZE")
        self.context = check(driver.cuDevicePrimaryCtxRetain(self._handle))
        self.make_current()
        self.map_memory: list[Memory] = []
        """Memory of tensor maps."""
        self.free_maps: list[int] = []
        """Addresses there that no launch uses."""
        stream = check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = stream
        self._closed = weakref.finalize(self, _destroy_stream, self.context, stream)

    def _attribute(self, name: str) -> int:
        which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(check(driver.cuDeviceGetAttribute(which, self._handle)))

    def __str__(self) -> str:
        return f"cuda:{self.index} ({self.name})"

    def can_access(self, peer: Device) -> bool:
        """Whether kernels on this device can read and write memory of `peer`."""
        return bool(check(driver.cuDeviceCanAccessPeer(self._handle, peer._handle)))

    def link_attribute(self, peer: Device, name: str) -> int:
        """An attribute of the link to `peer`, such as "PERFORMANCE_RANK" (0 is the fastest) or "ACCESS_SUPPORTED"."""
        which = getattr(driver.CUdevice_P2PAttribute, f"CU_DEVICE_P2P_ATTRIBUTE_{name}")
        return int(check(driver.cuDeviceGetP2PAttribute(which, self._handle, peer._handle)))

    def make_current(self) -> None:
        """Make this device current for this thread's driver calls."""
        check(driver.cuCtxSetCurrent(self.context))

    @property
    def free_bytes(self) -> int:
        """Memory that is free now, as the driver reports it."""
        self.make_current()
        return int(check(driver.cuMemGetInfo())[0])

    @property
    def total_bytes(self) -> int:
        """Memory of the device."""
        self.make_current()
        return int(check(driver.cuMemGetInfo())[1])

    def synchronize(self) -> None:
        """Wait for all work in the stream. Raises `DeviceError` if a kernel failed."""
        check(driver.cuStreamSynchronize(self.stream))

    @property
    def busy(self) -> bool:
        """Whether the stream still has work. Raises `DeviceError` if a kernel failed."""
        (code,) = driver.cuStreamQuery(self.stream)
        if code == driver.CUresult.CUDA_ERROR_NOT_READY:
            return True
        check((code,))
        return False

    def write(self, address: int, source: int, nbytes: int) -> None:
        """Copy to the device, in the stream. The bytes at the host address `source` must not change until then."""
        check(driver.cuMemcpyHtoDAsync(address, source, nbytes, self.stream))

    def read(self, address: int, out: np.ndarray) -> None:
        """Copy from the device into a contiguous array, after all work in the stream."""
        check(driver.cuMemcpyDtoHAsync(out.ctypes.data, address, out.nbytes, self.stream))
        self.synchronize()

    def fetch(self, address: int, target: int, nbytes: int) -> None:
        """Copy to pinned memory at the host address `target`, in the stream."""
        check(driver.cuMemcpyDtoHAsync(target, address, nbytes, self.stream))

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        """Set bytes, in the stream."""
        check(driver.cuMemsetD8Async(address, byte, nbytes, self.stream))


def pairs_without_access(devices: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of GPUs, named "cuda:N", of which one does not reach the other's memory. Makes no context on any."""
    check(driver.cuInit(0))
    names = dict.fromkeys(devices)
    handles = {name: check(driver.cuDeviceGet(int(name.partition(":")[2] or 0))) for name in names}

    def reaches(one: str, other: str) -> bool:
        return bool(check(driver.cuDeviceCanAccessPeer(handles[one], handles[other])))

    return [pair for pair in itertools.combinations(names, 2) if not (reaches(*pair) and reaches(*reversed(pair)))]


def versions() -> dict[str, str | None]:
    """Versions of the driver (None if the system does not tell) and of the CUDA that it supports."""
    number = int(check(driver.cuDriverGetVersion()))
    found = None
    with contextlib.suppress(OSError):
        found = re.search(r" (\d+\.\d+[.\d]*) ", Path("/proc/driver/nvidia/version").read_text().partition("\n")[0])
    return {"driver": found[1] if found else None, "cuda": f"{number // 1000}.{number % 1000 // 10}"}


def _destroy_stream(context: Any, stream: Any) -> None:
    with _current(context):
        driver.cuStreamDestroy(stream)


# Kernels, launches and graphs


class LoadedKernel:
    """A kernel's machine code, loaded on a device."""

    def __init__(self, device: Device, code: Cubin) -> None:
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
        # one split between L1 and shared memory for all kernels: to change it, an SM must drain first, and the next
        # kernel could not start beside this one
        carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        check(driver.cuFuncSetAttribute(self.handle, carveout, 100))
        self._unload = weakref.finalize(self, _unload, device.context, self._module)


def _unload(context: Any, module: Any) -> None:
    with _current(context):
        driver.cuModuleUnload(module)


MAP_BYTES, MAPS_TOGETHER = 128, 512
"""Bytes of a tensor map; maps that are allocated together."""


class DeviceMap:
    """A tensor map in device memory, as the copy engine of sm_90 reads it."""

    def __init__(self, device: Device, matrix: TensorMap) -> None:
        kinds = driver.CUtensorMapDataType
        long, short = driver.cuuint64_t, driver.cuuint32_t
        made = check(driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if matrix.dtype == "bf16" else
            kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            2, matrix.address, [long(size) for size in reversed(matrix.shape)], [long(matrix.stride)],
            [short(64), short(matrix.box_rows)], [short(1), short(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ))  # fmt: skip
        free = device.free_maps
        if not free:
            memory = Memory(device, MAP_BYTES * MAPS_TOGETHER, "tensor maps")
            device.map_memory.append(memory)
            free += [memory.address + MAP_BYTES * i for i in range(MAPS_TOGETHER)]
        self.address = free.pop()
        device.write(self.address, int(made.getPtr()), MAP_BYTES)  # in the stream: after launches that had its place
        weakref.finalize(self, free.append, self.address)


def _early_start() -> Any:
    """The attribute of a launch that may begin before the one before it has ended."""
    attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value = value
    return attribute


def _cluster(blocks: int) -> Any:
    """The attribute of a launch in clusters of so many blocks, along z."""
    attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = 1, 1, blocks
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value = value
    return attribute


class PreparedLaunch:
    """A launch with the driver's structures, which are built once."""

    def __init__(self, device: Device, kernel: LoadedKernel, launch: Launch) -> None:
        if launch.shared_bytes > kernel.shared_limit:
            raise DeviceError(
                f"{device}: {launch.name} needs {launch.shared_bytes:,} bytes of shared memory, a block may have "
                f"{kernel.shared_limit:,}; use device='cpu'"
            )
        self.name, self.only_for = launch.name, launch.only_for
        self._kernel = kernel
        self._maps = {a: DeviceMap(device, a) for a in {*launch.arguments.values()} if isinstance(a, TensorMap)}
        values = tuple(
            self._maps[a].address if isinstance(a, TensorMap) else a.address if isinstance(a, Array) else a
            for a in launch.arguments.values()
        )
        types = tuple(ctypes.c_float if isinstance(a, float) else ctypes.c_int64 for a in launch.arguments.values())
        self._arguments = values, types
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*launch.grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes = launch.shared_bytes
        config.hStream = device.stream
        self._starts_early = device.capability >= (9, 0)
        if self._starts_early:
            attributes = [_cluster(launch.cluster)] * (launch.cluster > 0) + [_early_start()]  # last: see `after_all`
            config.attrs, config.numAttrs = attributes, len(attributes)
        if launch.cluster > 0:  # more would begin when the others have done all work
            most = check(driver.cuOccupancyMaxActiveClusters(kernel.handle, config)) // config.gridDimY
            if most == 0:  # a part of a GPU, which others have the rest of
                raise DeviceError(
                    f"{device}: {launch.name} needs {launch.cluster} multiprocessors at once that reach each other, "
                    f"which it does not have; use a whole GPU, or batch_invariant=True, which uses other kernels"
                )
            config.gridDimX = min(config.gridDimX, most)
        self._config = config

    def __call__(self) -> None:
        """Enqueue the launch in the stream."""
        check(driver.cuLaunchKernelEx(self._config, self._kernel.handle, self._arguments, 0))

    def after_all(self) -> None:
        """Enqueue the launch, to begin when all before it in the stream has ended."""
        self._config.numAttrs -= self._starts_early
        try:
            self()
        finally:
            self._config.numAttrs += self._starts_early


def enqueue(launches: Sequence[Callable[[], None]]) -> None:
    """Enqueue launches, one after the other. What follows a collective does not begin early: kernels of NCCL's do not
    say when it may.
    """
    before: Callable[[], None] | None = None
    for launch in launches:
        if isinstance(before, PreparedCollective) and isinstance(launch, PreparedLaunch):
            launch.after_all()
        else:
            launch()
        before = launch


_capturing = threading.Lock()
"""Held during a capture. A capture is of one stream, but the driver keeps its state for the whole process."""


class CudaGraph:
    """Launches captured as a CUDA graph, which one driver call replays."""

    def __init__(self, device: Device, launches: Sequence[Callable[[], None]]) -> None:
        self._device = device
        device.make_current()
        collecting = gc.isenabled()
        with _capturing:
            gc.disable()  # a finalizer that frees memory would invalidate the capture
            check(driver.cuStreamBeginCapture(
                device.stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            ))  # fmt: skip
            try:
                enqueue(launches)
                graph = check(driver.cuStreamEndCapture(device.stream))
            except BaseException:
                _abandon_capture(device.stream)
                raise
            finally:
                if collecting:
                    gc.enable()
        self._graph = check(driver.cuGraphInstantiate(graph, 0))
        check(driver.cuGraphDestroy(graph))
        self._destroy = weakref.finalize(self, _destroy_graph, device.context, self._graph)

    def replay(self) -> None:
        """Enqueue the whole graph in the stream."""
        check(driver.cuGraphLaunch(self._graph, self._device.stream))


def _abandon_capture(stream: Any) -> None:
    """End a capture that has failed, if it has not ended, and destroy what was captured: NCCL waits for that."""
    code, graph = driver.cuStreamEndCapture(stream)
    if not int(code):
        driver.cuGraphDestroy(graph)


def _destroy_graph(context: Any, graph: Any) -> None:
    with _current(context):
        driver.cuGraphExecDestroy(graph)


class Stopwatch:
    """Measures GPU time in a stream, in seconds."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._events = [check(driver.cuEventCreate(0)) for _ in range(2)]
        self._destroy = weakref.finalize(self, _destroy_events, device.context, self._events)

    def measure(self, action: Callable[[], object]) -> float:
        """Seconds that the device spends on the work that `action` puts into the stream."""
        check(driver.cuEventRecord(self._events[0], self._device.stream))
        action()
        check(driver.cuEventRecord(self._events[1], self._device.stream))
        self._device.synchronize()
        return float(check(driver.cuEventElapsedTime(*self._events))) / 1e3


def _destroy_events(context: Any, events: Sequence[Any]) -> None:
    with _current(context):
        for event in events:
            driver.cuEventDestroy(event)
