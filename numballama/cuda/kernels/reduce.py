"""Reductions over the lanes of a warp and over the threads of a block.

Within a warp, values are exchanged by butterfly shuffles, so every lane gets the result. A block reduction writes one
value per warp to `scratch`, 32 elements of shared memory. It has two barriers: all threads of the block must call it.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from .common import FULL_MASK, device, is_nan


@device
def quad_max(x):
    """Maximum of `x` over four neighbouring lanes, in each of them."""
    x = max(x, cuda.shfl_xor_sync(FULL_MASK, x, 1))
    return max(x, cuda.shfl_xor_sync(FULL_MASK, x, 2))


@device
def quad_sum(x):
    """Sum of `x` over four neighbouring lanes, in each of them."""
    x += cuda.shfl_xor_sync(FULL_MASK, x, 1)
    return x + cuda.shfl_xor_sync(FULL_MASK, x, 2)


@device
def warp_sum(x):
    """Sum of `x` over the 32 lanes, in every lane."""
    x += cuda.shfl_xor_sync(FULL_MASK, x, 16)
    x += cuda.shfl_xor_sync(FULL_MASK, x, 8)
    x += cuda.shfl_xor_sync(FULL_MASK, x, 4)
    x += cuda.shfl_xor_sync(FULL_MASK, x, 2)
    x += cuda.shfl_xor_sync(FULL_MASK, x, 1)
    return x


@device
def warp_sum2(a, b):
    """Two sums over the 32 lanes with the shuffles of one: the sum of `a` in lanes 0 to 15, of `b` in the others."""
    high = cuda.threadIdx.x & 16
    x = (b if high else a) + cuda.shfl_xor_sync(FULL_MASK, a if high else b, 16)
    x += cuda.shfl_xor_sync(FULL_MASK, x, 8)
    x += cuda.shfl_xor_sync(FULL_MASK, x, 4)
    x += cuda.shfl_xor_sync(FULL_MASK, x, 2)
    x += cuda.shfl_xor_sync(FULL_MASK, x, 1)
    return x


@device
def warp_max(x):
    """Maximum of `x` over the 32 lanes, in every lane."""
    x = max(x, cuda.shfl_xor_sync(FULL_MASK, x, 16))
    x = max(x, cuda.shfl_xor_sync(FULL_MASK, x, 8))
    x = max(x, cuda.shfl_xor_sync(FULL_MASK, x, 4))
    x = max(x, cuda.shfl_xor_sync(FULL_MASK, x, 2))
    x = max(x, cuda.shfl_xor_sync(FULL_MASK, x, 1))
    return x


@device
def block_sum(x, scratch):
    """Sum of `x` over the block's threads, in every thread; `scratch` is shared float32[32]."""
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
    """Maximum of `x` over the block's threads, in every thread; `scratch` is shared float32[32]."""
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
def is_replaced_by(value, index, other, other_index):
    """Whether (other, other_index) precedes (value, index) in an argmax.

    A NaN counts as larger than every number. Of equal values, the one with the smaller index precedes.
    """
    if is_nan(value) != is_nan(other):
        return is_nan(other)
    if is_nan(value) or value == other:
        return other_index < index
    return other > value


@device
def block_argmax(value, index, values, indices):
    """(largest value of all threads, its first index), in every thread; a NaN is larger than every number.

    `values` and `indices` are shared float32[32] and int32[32].
    """
    for i in range(5):
        other = cuda.shfl_xor_sync(FULL_MASK, value, 16 >> i)
        other_index = cuda.shfl_xor_sync(FULL_MASK, index, 16 >> i)
        if is_replaced_by(value, index, other, other_index):
            value, index = other, other_index
    cuda.syncthreads()
    if cuda.threadIdx.x & 31 == 0:
        values[cuda.threadIdx.x >> 5], indices[cuda.threadIdx.x >> 5] = value, index
    cuda.syncthreads()
    value, index = values[0], indices[0]
    for i in range(1, cuda.blockDim.x >> 5):
        if is_replaced_by(value, index, values[i], indices[i]):
            value, index = values[i], indices[i]
    return value, index
