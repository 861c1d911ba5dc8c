"""Copies a large array, to measure the memory bandwidth that this device reaches. Other kernels are compared with it.

Shape: float32[n], n a multiple of `BLOCK_ELEMENTS`, larger than any cache. Each thread moves 16 bytes four times and
has all four loads in flight; a block's loads are contiguous, so a warp reads whole cache lines. Bytes moved are those
read plus those written; the floor is that number divided by the memory bandwidth.
"""

from __future__ import annotations

from numba import cuda

from ..intrinsics import ld_v4_f32, st_v4_f32
from ..launch import Array, Launch, named
from .common import pdl_sync

THREADS = 256
BLOCK_ELEMENTS = 4 * 4 * THREADS
"""float32 elements that one block moves."""


@cuda.jit
def copy_kernel(source, out):
    """out = source."""
    pdl_sync()
    at = cuda.blockIdx.x * BLOCK_ELEMENTS + 4 * cuda.threadIdx.x
    a, b = ld_v4_f32(source, at), ld_v4_f32(source, at + 4 * THREADS)
    c, d = ld_v4_f32(source, at + 8 * THREADS), ld_v4_f32(source, at + 12 * THREADS)
    st_v4_f32(out, at, a[0], a[1], a[2], a[3])
    st_v4_f32(out, at + 4 * THREADS, b[0], b[1], b[2], b[3])
    st_v4_f32(out, at + 8 * THREADS, c[0], c[1], c[2], c[3])
    st_v4_f32(out, at + 12 * THREADS, d[0], d[1], d[2], d[3])


def copy(source: Array, out: Array) -> list[Launch]:
    """Copy float32 arrays that do not overlap; their length is a multiple of `BLOCK_ELEMENTS`."""
    (elements,) = source.shape
    assert source.shape == out.shape and source.dtype == out.dtype == "f32" and elements % BLOCK_ELEMENTS == 0
    return [Launch(copy_kernel, (elements // BLOCK_ELEMENTS,), THREADS, named(source=source, out=out))]
