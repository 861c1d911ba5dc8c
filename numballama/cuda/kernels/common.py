"""Small device functions that kernels are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from ..intrinsics import bits_of_f32, exp2

ALL = 0xFFFFFFFF
"""Every lane of a warp."""
LOG2_E = np.float32(1.4426950408889634)


def device(function: Any) -> Any:
    """A function that kernels call; it becomes part of each of them."""
    return cuda.jit(device=True, forceinline=True)(function)


def at_once(blocks: int) -> Any:
    """Declare that so many blocks of a kernel, or of it and others, shall find room in a multiprocessor's registers."""

    def declare(kernel: Any) -> Any:
        kernel.py_func.min_blocks_per_sm = blocks
        return kernel

    return declare


@device
def warp_sum(x):
    """The sum of `x` over the 32 lanes, in every lane."""
    x += cuda.shfl_xor_sync(ALL, x, 16)
    x += cuda.shfl_xor_sync(ALL, x, 8)
    x += cuda.shfl_xor_sync(ALL, x, 4)
    x += cuda.shfl_xor_sync(ALL, x, 2)
    x += cuda.shfl_xor_sync(ALL, x, 1)
    return x


@device
def warp_sum2(a, b):
    """The sums of `a` and of `b` over the 32 lanes: of a in lanes 0 to 15, of b in the others."""
    high = cuda.threadIdx.x & 16
    x = (b if high else a) + cuda.shfl_xor_sync(ALL, a if high else b, 16)
    x += cuda.shfl_xor_sync(ALL, x, 8)
    x += cuda.shfl_xor_sync(ALL, x, 4)
    x += cuda.shfl_xor_sync(ALL, x, 2)
    x += cuda.shfl_xor_sync(ALL, x, 1)
    return x


@device
def warp_max(x):
    """The maximum of `x` over the 32 lanes, in every lane."""
    x = max(x, cuda.shfl_xor_sync(ALL, x, 16))
    x = max(x, cuda.shfl_xor_sync(ALL, x, 8))
    x = max(x, cuda.shfl_xor_sync(ALL, x, 4))
    x = max(x, cuda.shfl_xor_sync(ALL, x, 2))
    x = max(x, cuda.shfl_xor_sync(ALL, x, 1))
    return x


@device
def block_sum(x, scratch):
    """The sum of `x` over the block's threads, in every thread; `scratch` is shared float32[32]."""
    x = warp_sum(x)
    cuda.syncthreads()
    if cuda.threadIdx.x & 31 == 0:
        scratch[cuda.threadIdx.x >> 5] = x
    cuda.syncthreads()
    total = np.float32(0)
    for i in range(cuda.blockDim.x >> 5):
        total += scratch[i]
    return total


@device
def block_max(x, scratch):
    """The maximum of `x` over the block's threads, in every thread; `scratch` is shared float32[32]."""
    x = warp_max(x)
    cuda.syncthreads()
    if cuda.threadIdx.x & 31 == 0:
        scratch[cuda.threadIdx.x >> 5] = x
    cuda.syncthreads()
    largest = scratch[0]
    for i in range(1, cuda.blockDim.x >> 5):
        largest = max(largest, scratch[i])
    return largest


@device
def sigmoid_times(gate, up):
    """gate · sigmoid(gate) · up (Shazeer, GLU Variants, 2020)."""
    return gate / (np.float32(1) + exp2(-gate * LOG2_E)) * up


@device
def split(number, divisor, inverse):
    """(quotient, remainder) of numbers below two million, by float32: an integer division is a hundred instructions."""
    quotient = np.int64((np.float32(number) + np.float32(0.5)) * inverse)
    return quotient, number - quotient * divisor


@device
def beyond(tokens):
    """Whether this block's token, blockIdx.y, is not part of the run."""
    return cuda.gridDim.y > 1 and cuda.blockIdx.y >= tokens[0]


@device
def is_nan(x):
    """Whether x is no number, by its bits."""
    return (bits_of_f32(x) & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
