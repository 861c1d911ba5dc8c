"""How fast this device's memory is: a copy of more than any cache holds, as a yardstick for every other kernel.

Each thread moves 16 bytes four times; the four loads are under way together. A block's loads lie side by side, so a
warp meets whole cache lines. Bytes moved are those read plus those written; the floor is their number divided by what
the memory can do.
"""

from __future__ import annotations

from numba import cuda

from ...kernels_cuda import begin
from ..intrinsics import floats4, store4
from ..launch import Array, Launch, named

THREADS = 256
BLOCK_NUMBERS = 4 * 4 * THREADS
"""float32 that a block moves."""


@cuda.jit
def copy_kernel(source, out):
    begin()
    at = cuda.blockIdx.x * BLOCK_NUMBERS + 4 * cuda.threadIdx.x
    a, b = floats4(source, at), floats4(source, at + 4 * THREADS)
    c, d = floats4(source, at + 8 * THREADS), floats4(source, at + 12 * THREADS)
    store4(out, at, a[0], a[1], a[2], a[3])
    store4(out, at + 4 * THREADS, b[0], b[1], b[2], b[3])
    store4(out, at + 8 * THREADS, c[0], c[1], c[2], c[3])
    store4(out, at + 12 * THREADS, d[0], d[1], d[2], d[3])


def copy(source: Array, out: Array) -> list[Launch]:
    """Copy float32 arrays that do not overlap; their length is a multiple of `BLOCK_NUMBERS`."""
    (numbers,) = source.shape
    assert source.shape == out.shape and source.dtype == out.dtype == "f32" and numbers % BLOCK_NUMBERS == 0
    return [Launch(copy_kernel, (numbers // BLOCK_NUMBERS,), THREADS, named(source=source, out=out))]
