"""The CUDA backend without a GPU: a device whose memory is the host's.

`install` puts it in the place of `cuda.driver`'s classes, wherever the backend uses them, for the rest of the process.
So the backend's code itself binds plans, weights and inputs. The caller chooses what a launch does: nothing where
kernels are only compiled (tests/cuda/test_assembly.py), or run by the simulator (tests/cuda/test_simulator.py).
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numballama.checkpoint import Weight
from numballama.config import ModelConfig
from numballama.graph import KVLayout, build
from numballama.ir import Graph
from tests.helpers.bounds import as_weight

ALIGNMENT = 256
"""Alignment of device memory, as the driver's."""


def missing_packages() -> str:
    """Why kernels cannot be compiled here; empty if they can."""
    for name in ("numba_cuda", "cuda.bindings", "cuda.bindings.nvjitlink"):
        try:
            found = find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{name} is not installed (pip install '.[cuda]')"
    return ""


def missing_gpu() -> str:
    """Why nothing can run on a GPU here; empty if it can."""
    if reason := missing_packages():
        return reason
    from numballama import DeviceError
    from numballama.cuda.driver import Device

    try:
        Device("cuda")
    except DeviceError as error:
        return str(error)
    return ""


def require_gpu() -> None:
    """Skip the test module that calls this, unless there is a GPU. To be called before it imports the backend."""
    if reason := missing_gpu():
        pytest.skip(f"no GPU to test: {reason}", allow_module_level=True)


def on_a_gpu(*values: object) -> Any:
    """A set of parameters of a test that needs a GPU."""
    reason = missing_gpu()
    return pytest.param(*values, marks=[pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=f"no GPU: {reason}")])


MIXTURES = {
    "q4_k_m": {"wv": "q6_k", "w2": "q6_k", "output": "q6_k", "": "q4_k"},
    "q5_k_m": {"wv": "q6_k", "w2": "q6_k", "output": "q6_k", "": "q5_k"},
    "all": {"wq": "q4_0", "wk": "q4_1", "wv": "q8_0", "w1": "q4_k", "w3": "q6_k", "wo": "f32", "w2": "q4_1", "": "f16"},
}
"""Types of matrices by the last part of their names, "" for the others: those of Q4_K_M and Q5_K_M files, and a
mixture of most types.
"""


def converted(weights: Mapping[str, Weight], kind: str, group: int = 32) -> dict[str, Weight]:
    """Matrices in another type, or in those of a mixture; norms and biases as they are."""
    types = MIXTURES.get(kind, {"": kind})
    result = dict(weights)
    for name, w in weights.items():
        if len(w.shape) == 2:
            own = types.get(name.rpartition(".")[2], types[""])
            result[name] = as_weight(w.data, own, group if own == "int8" else 0)
    return result


def graph_of(
    config: ModelConfig, weights: Mapping[str, Weight], kv: KVLayout, tokens: int, logits: str = "rows",
    int8_activations: bool = False,
) -> Graph:  # fmt: skip
    """The graph of a model with these weights."""
    return build(config, {name: w.type for name, w in weights.items()}, kv, tokens, logits, int8_activations)


# Memory


class HostMemory:
    """`driver.Memory`: aligned host memory; its address is real. Fresh memory is 0xAA, as no kernel may count on 0."""

    live: list[tuple[int, int, str]] = []  # noqa: RUF012
    """(address, bytes, what) of all allocations, in order of addresses."""
    epoch = 0
    """Counts allocations: an address may be reused after the next one."""

    def __init__(self, device: HostDevice, nbytes: int, what: str) -> None:
        self.nbytes = max(nbytes, 1)
        self._keep = np.full(self.nbytes + ALIGNMENT, 0xAA, np.uint8)
        self.address = -(-self._keep.ctypes.data // ALIGNMENT) * ALIGNMENT
        entry = (self.address, self.nbytes, what)
        bisect.insort(HostMemory.live, entry)
        HostMemory.epoch += 1
        self.free = weakref.finalize(self, HostMemory.live.remove, entry)

    def array(self, offset: int, shape: tuple[int, ...], dtype: str) -> Any:
        from numballama.cuda.launch import Array

        return Array(self.address + offset, shape, dtype)


class HostPinned(HostMemory):
    """`driver.Pinned`."""

    def __init__(self, device: HostDevice, nbytes: int) -> None:
        super().__init__(device, nbytes, "pinned memory")
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))
        self.bytes[:] = 0


class HostPeerMemory(HostMemory):
    """`driver.Memory` in a file without a name. Its handle, which is process and descriptor, is for other processes."""

    def __init__(self, device: HostDevice, nbytes: int, what: str) -> None:
        self._file = os.memfd_create(what)
        os.ftruncate(self._file, nbytes)
        self._map(self._file, nbytes, what)

    def _map(self, file: int, nbytes: int, what: str) -> None:
        self.nbytes, self._keep = nbytes, np.frombuffer(mmap.mmap(file, nbytes), np.uint8)
        self._note(self._keep.ctypes.data, what)

    def _note(self, address: int, what: str) -> None:
        self.address, entry = address, (address, self.nbytes, what)
        bisect.insort(HostMemory.live, entry)
        HostMemory.epoch += 1
        self.free = weakref.finalize(self, HostMemory.live.remove, entry)

    def handle(self) -> bytes:
        return f"{os.getpid()} {self._file}".encode().ljust(64)


class HostMappedMemory(HostPeerMemory):
    """`driver.MappedMemory`."""

    def __init__(self, device: HostDevice, handle: bytes) -> None:
        process, descriptor = handle.decode().split()
        file = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
        self._map(file, os.fstat(file).st_size, "the memory of another rank")
        os.close(file)


class HostRegisteredMemory(HostPeerMemory):
    """`driver.RegisteredMemory`."""

    def __init__(self, device: HostDevice, memory: np.ndarray) -> None:
        self.nbytes, self._keep = memory.nbytes, memory
        self._note(memory.ctypes.data, "memory of the host")


class HostDevice:
    """`driver.Device`, over host memory. `install` sets how many SMs it has: few, so that plans are small."""

    capability = (9, 0)
    n_sms = 2
    shared_limit = 99 << 10
    free_bytes = 1 << 34
    busy = False
    stream = 0

    def __init__(self, name: str = "cuda") -> None:
        self.name = name

    def __str__(self) -> str:
        return "the host"

    def make_current(self) -> None:
        """Does nothing: there is only one device."""

    def synchronize(self) -> None:
        """Does nothing: all work is done at once."""

    def write(self, address: int, source: int, nbytes: int) -> None:
        ctypes.memmove(address, source, nbytes)

    def read(self, address: int, out: np.ndarray) -> None:
        ctypes.memmove(out.ctypes.data, address, out.nbytes)

    def fetch(self, address: int, target: int, nbytes: int) -> None:
        ctypes.memmove(target, address, nbytes)

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        ctypes.memset(address, byte, nbytes)


class HostGraph:
    """`driver.CudaGraph`: the launches, one after the other."""

    def __init__(self, device: HostDevice, launches: Sequence[Callable[[], None]]) -> None:
        self._launches = list(launches)

    def replay(self) -> None:
        for launch in self._launches:
            launch()


def install(
    run: Callable[[Any], None] = lambda launch: None,
    compile_kernel: Callable[[Any, tuple[int, int], Path | None], Any] | None = None,
    capability: tuple[int, int] = (9, 0),
    n_sms: int = 2,
    patch: Callable[[Any, str, Any], None] = setattr,
) -> None:
    """Make the CUDA backend work on `HostDevice`: launches are passed to `run`, kernels to `compile_kernel`.

    It lasts for the rest of the process, unless `patch` is a `monkeypatch.setattr`.
    """
    from numballama.cuda import (
        backend,
        compiler,
        decode_pipeline,
        driver,
        nccl,
        peers,
        program,
        sampler_table,
        upload,
        weights,
    )
    from tests.helpers import repacked
    from tests.helpers.fake_nccl import FakeNccl

    class HostLaunch:
        def __init__(self, device: HostDevice, kernel: Any, launch: Any) -> None:
            self.name, self.launch, self.only_for = launch.name, launch, launch.only_for

        def __call__(self) -> None:
            if self.name == "repack_kernel":  # test_repack.py is about this one; here it only takes time
                repacked.run_launch(self.launch)
            else:
                run(self.launch)

    def nothing(*arguments: Any) -> Any:
        return compiler.Cubin(b"", "", 0, 0, 0)

    patch(HostDevice, "capability", capability)
    patch(HostDevice, "n_sms", n_sms)
    for name, replacement in {
        "Device": HostDevice,
        "Memory": HostMemory,
        "Pinned": HostPinned,
        "CudaGraph": HostGraph,
        "LoadedKernel": lambda device, code: code,
        "PreparedLaunch": HostLaunch,
        "compile_kernel": compile_kernel or nothing,
        "compile_ahead": lambda *arguments: {},
    }.items():
        users = [
            module
            for module in (backend, program, decode_pipeline, sampler_table, upload, weights)
            if hasattr(module, name)
        ]
        assert users, f"nothing uses {name} any more: tests/helpers/cuda_host.py stands in for it"
        for module in users:
            patch(module, name, replacement)
    patch(peers, "Memory", HostPeerMemory)
    patch(peers, "MappedMemory", HostMappedMemory)
    patch(peers, "RegisteredMemory", HostRegisteredMemory)
    patch(driver, "Device", HostDevice)  # `compile` asks whether there is a GPU
    patch(driver, "pairs_without_access", lambda devices: [])
    patch(nccl, "load", lambda: nccl.Library(FakeNccl(), "a stand-in"))
