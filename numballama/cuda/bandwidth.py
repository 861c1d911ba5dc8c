"""Measures a GPU's memory bandwidth by a copy, and describes the GPU for a benchmark's report."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError
from ..memory import format_bytes
from .driver import CudaGraph, Device, Memory, Stopwatch, versions
from .kernels.copy import BLOCK_ELEMENTS, copy

if TYPE_CHECKING:
    from .backend import CudaBackend

COPY_BYTES = 1 << 30
"""Bytes of the array that is copied: more than any cache holds."""
MIN_COPY_BYTES = 1 << 28
COPIES = 4
"""Copies in one measurement, one after the other."""


def measure_bandwidth(backend: CudaBackend, repeats: int = 7) -> float:
    """Bytes per second that a copy moves, those read and those written: the median of several measurements.

    Raises `DeviceError` if the device has too little free memory for two arrays.
    """
    device, block = backend.device, 4 * BLOCK_ELEMENTS
    nbytes = min(COPY_BYTES, device.free_bytes * 2 // 5) // block * block
    if nbytes < MIN_COPY_BYTES:
        raise DeviceError(
            f"{device}: its bandwidth cannot be measured with {format_bytes(device.free_bytes)} of free memory; "
            f"{format_bytes(3 * MIN_COPY_BYTES)} are needed beside the model"
        )
    memory = Memory(device, 2 * nbytes, "two arrays to copy")
    try:
        device.fill(memory.address, 0x55, 2 * nbytes)
        numbers = (nbytes // 4,)
        (launches,) = backend.prepare_launches(
            [copy(memory.array(0, numbers, "f32"), memory.array(nbytes, numbers, "f32"))]
        )
        copies, watch = CudaGraph(device, launches * COPIES), Stopwatch(device)
        watch.measure(copies.replay)
        seconds = statistics.median(watch.measure(copies.replay) for _ in range(repeats))
    finally:
        device.synchronize()
        memory.free()
    return 2 * nbytes * COPIES / seconds


def describe(device: Device) -> dict[str, Any]:
    """Facts for a benchmark's report: name, compute capability, multiprocessors, bytes of memory and of L2 cache, and
    the versions of driver and compiler.
    """
    return {
        "name": device.name,
        "compute_capability": "{}.{}".format(*device.capability),
        "multiprocessors": device.n_sms,
        "memory_bytes": device.total_bytes,
        "cache_bytes": device.cache_bytes,
        **versions(),
    }
