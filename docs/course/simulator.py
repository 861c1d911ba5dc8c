"""Numba's CUDA simulator for the course: with warp shuffles and the PTX instructions of `numballama.cuda.intrinsics`.

Import this first, in a process with NUMBA_ENABLE_CUDASIM=1. `pages.py` and the tests do. Kernels are launched as on a
GPU, `kernel[blocks, threads](arrays…)`, and blocks are whole warps. The threads and instructions are those of
`tests/cuda/simulator`; here they take Numba's arrays.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import numpy as np

if find_spec("numba_cuda") is None:
    raise ModuleNotFoundError(
        "kernels for CUDA need numba-cuda, in its simulator too: pip install -e '.[cuda,test]' (on Linux)",
        name="numba_cuda",
    )

from tests.cuda.simulator import _Module, numba_simulator, simulation  # isort: skip (it replaces what kernels import)
from numba import cuda
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray, FakeWithinKernelCUDAArray
from numba.cuda.simulator.kernelapi import swapped_cuda_module

from numballama.cuda import intrinsics
from tests.helpers.cuda_host import install

_address, _ld_v4_f32 = intrinsics.address, intrinsics.ld_v4_f32


def _array_of(memory: Any) -> np.ndarray | None:
    """The NumPy array behind a kernel's argument; None for shared memory."""
    return memory._item._ary if isinstance(memory, FakeWithinKernelCUDAArray) else None


def address(memory: Any, index: int) -> int:
    """Address of an element of an array."""
    array = _array_of(memory)
    return _address(memory, index) if array is None else array.ctypes.data + int(index) * array.itemsize


def ld_v4_f32(memory: Any, index: int) -> tuple[Any, ...]:
    """Four float32 of an array, from an index that is a multiple of 4."""
    array = _array_of(memory)
    if array is None:
        return _ld_v4_f32(memory, index)
    assert index % 4 == 0, f"ld_v4_f32 at element {index}: not aligned to 16 bytes"
    return tuple(array.reshape(-1)[index : index + 4])


intrinsics.address, intrinsics.ld_v4_f32 = address, ld_v4_f32
_call = numba_simulator.FakeCUDAKernel.__call__


def _launch(kernel: Any, *arguments: Any) -> Any:
    """Launch a kernel. Asynchronous copies may read its arrays, and it may call device functions of other pages."""
    arrays = [each._ary if isinstance(each, FakeCUDAArray) else each for each in arguments]
    if not any(isinstance(array, np.ndarray) for array in arrays):  # a kernel of the package, on `HostDevice`
        return _call(kernel, *arguments)
    regions = [(a.ctypes.data, a.nbytes, "an array") for a in arrays if isinstance(a, np.ndarray)]
    simulation._regions = sorted(regions)
    simulation._starts = [start for start, _, _ in simulation._regions]
    context = _Module(kernel.grid_dim, kernel.block_dim, kernel.dynshared_size)
    numba_simulator.FakeCUDAModule = lambda *shape: context
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("course.") and name != __name__ and vars(module).get("cuda") is cuda:
                marker = FunctionType((lambda: None).__code__, vars(module))
                stack.enter_context(swapped_cuda_module(marker, context))
        return _call(kernel, *arguments)


numba_simulator.FakeCUDAKernel.__call__ = _launch
install(run=simulation.run, n_sms=2)  # and `CudaBackend` works, on a device whose memory is the host's
