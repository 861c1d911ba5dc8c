"""Compiles a kernel afresh, runs it on a GPU and compares the result: whether compiler and driver work together."""

from __future__ import annotations

import numpy as np
from cuda.bindings import nvjitlink

from ..errors import DeviceError
from . import compiler
from .driver import Device, LoadedKernel, Memory, PreparedLaunch
from .kernels.copy import BLOCK_ELEMENTS, copy
from .launch import Array

N = 16 * BLOCK_ELEMENTS
"""float32 elements that are copied."""


def compile_copy(capability: tuple[int, int]) -> compiler.Cubin:
    """Machine code of the copy kernel, compiled now and not taken from the cache. Needs no GPU."""
    array = Array(0, (N,), "f32")
    (launch,) = copy(array, array)
    return compiler.assemble(compiler.to_ptx(launch.specialization, capability), capability)


def run_copy(device: Device, code: compiler.Cubin) -> None:
    """Copy numbers on a device with `compile_copy`'s kernel. Raises `DeviceError` if they do not arrive."""
    numbers, found = np.arange(N, dtype=np.float32), np.empty(N, np.float32)
    memory = Memory(device, 2 * numbers.nbytes, "two arrays to copy")
    try:
        device.fill(memory.address, 0, 2 * numbers.nbytes)
        device.write(memory.address, numbers.ctypes.data, numbers.nbytes)
        source, out = memory.array(0, (N,), "f32"), memory.array(numbers.nbytes, (N,), "f32")
        (launch,) = copy(source, out)
        PreparedLaunch(device, LoadedKernel(device, code), launch)()
        device.read(out.address, found)
    finally:
        memory.free()
    if not np.array_equal(numbers, found):
        wrong = int((numbers != found).sum())
        raise DeviceError(f"{device}: a kernel ran, but {wrong:,} of {N:,} numbers that it copied are wrong")


def nvjitlink_version() -> str:
    """Version of the library that assembles kernels."""
    return "{}.{}".format(*nvjitlink.version())
