"""Uploads weights: several threads read a file into pinned memory, the device copies from there and repacks blocks.

There are two pinned buffers. While the device copies from one, threads fill the other one with the next piece of the
file: one thread reads 2 to 6 GB/s of what the system has in memory already, the copy takes up to 50. Repacking is a
kernel behind each copy, so the host only reads.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np

from ..checkpoint import Weight
from ..host.cgroup import usable_cores
from ..kernel_cache import cuda_cache_directory
from ..memory import ceil_div
from ..quantization.types import BLOCKS
from .compiler import compile_kernel
from .driver import Device, LoadedKernel, Memory, Pinned, PreparedLaunch
from .launch import Matrix, Specialization
from .ops.repack import repack
from .repack import RUN

STAGING = 32 << 20
"""Bytes of each pinned buffer."""
LEAST_READ = 1 << 18
"""Fewest bytes that are worth a thread's while."""
MAX_THREADS = 8
"""Most threads that read: more are no faster than the copy."""


class Upload:
    """Copies to device memory in a `with` block, at whose end all are done."""

    def __init__(self, device: Device, nbytes: int) -> None:
        """`nbytes` is the number of bytes to come. Raises `DeviceError` if memory cannot be allocated."""
        self._device = device
        self._size = max(min(STAGING, nbytes), 256)
        self._pinned = [Pinned(device, self._size) for _ in range(2)]
        self._buffers = itertools.cycle(self._pinned)
        self._blocks: Memory | None = None
        self._kernels: dict[Specialization, LoadedKernel] = {}
        self._threads = min(usable_cores(), MAX_THREADS)
        self._pool = ThreadPoolExecutor(self._threads, "upload")

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._device.synchronize()
        finally:
            self._pool.shutdown()
            for buffer in self._pinned:
                buffer.free()
            if self._blocks is not None:
                self._blocks.free()

    def copy(self, address: int, source: np.ndarray) -> None:
        """Copy contiguous bytes to a device address."""
        for start in range(0, source.size, self._size):
            self._send(address + start, source[start : start + self._size])

    def repack(self, weight: Weight, target: Matrix) -> None:
        """Copy a weight of blocks and repack it into the memory of `target`, whose padding becomes zeros."""
        block_size, block_bytes = BLOCKS[weight.type.name]
        device, scales = self._device, target.scales
        device.fill(scales.address, 0, scales.nbytes)
        if self._blocks is None:
            self._blocks = Memory(device, self._size, "blocks to repack")
        blocks = weight.data.reshape(-1, block_bytes)
        together = max(self._size // block_bytes, 1)
        for first in range(0, len(blocks), together):
            piece = blocks[first : first + together].reshape(-1)
            self._send(self._blocks.address, piece)
            source = self._blocks.array(0, (piece.size // 2,), "f16")
            runs = block_size // RUN
            launch = repack(source, first * runs, piece.size // block_bytes * runs, target)
            kernel = self._kernels.get(launch.specialization)
            if kernel is None:
                code = compile_kernel(launch.specialization, device.capability, cuda_cache_directory())
                kernel = self._kernels[launch.specialization] = LoadedKernel(device, code)
            PreparedLaunch(device, kernel, launch)()

    def _send(self, address: int, piece: np.ndarray) -> None:
        buffer = next(self._buffers)
        step = max(ceil_div(piece.size, self._threads), LEAST_READ)

        def read(start: int) -> None:
            buffer.bytes[start : min(start + step, piece.size)] = piece[start : start + step]

        list(self._pool.map(read, range(0, piece.size, step)))
        self._device.synchronize()  # the copy from the other buffer, which ran while this one was filled
        self._device.write(address, buffer.address, piece.size)
