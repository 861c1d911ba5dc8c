"""A row of logits: how the threads of a block read it, its largest logit, and what changes it before a token is chosen.

The row is logits[first : first + n]. Changes are mask, stop tokens, biases and penalties, in this order. All threads of
the block call each of these functions, with a barrier between two.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..arithmetic import uint_as_float
from ..intrinsics import ld_global_u32, ld_v4_f32
from .common import device
from .reduce import block_argmax, is_replaced_by


@device
def load4(logits, first, i, n, is_aligned):
    """Logits i to i + 3 of the row, -inf in place of those from n on. `is_aligned`: rows begin at 16 bytes."""
    if is_aligned and i + 3 < n:
        return ld_v4_f32(logits, first + i)
    a, b, c, d = logits[first + i], np.float32(-np.inf), np.float32(-np.inf), np.float32(-np.inf)
    if i + 1 < n:
        b = logits[first + i + 1]
    if i + 2 < n:
        c = logits[first + i + 2]
    if i + 3 < n:
        d = logits[first + i + 3]
    return a, b, c, d


@device
def larger(value, index, other, other_index):
    """The one of two (logit, token) that precedes in an argmax."""
    if is_replaced_by(value, index, other, np.int32(other_index)):
        return other, np.int32(other_index)
    return value, index


@device
def row_argmax(logits, first, n, is_aligned, values, indices):
    """(largest logit, its first token), in every thread; a NaN is larger than every number."""
    largest, token = np.float32(-np.inf), np.int32(n)
    for i in range(4 * cuda.threadIdx.x, n, 4 * cuda.blockDim.x):
        a, b, c, d = load4(logits, first, i, n, is_aligned)
        largest, token = larger(largest, token, a, i)
        largest, token = larger(largest, token, b, i + 1)
        largest, token = larger(largest, token, c, i + 2)
        largest, token = larger(largest, token, d, i + 3)
    return block_argmax(largest, token, values, indices)


@device
def apply_mask(logits, first, n, mask):
    """Set the logits of tokens whose bit is 0 in the words at the address `mask` to -inf."""
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        if (ld_global_u32(mask + 4 * (i >> 5)) >> np.uint32(i & 31)) & np.uint32(1) == 0:
            logits[first + i] = np.float32(-np.inf)


@device
def apply_biases(logits, first, n, biases, n_bias, n_stop):
    """Set the logits of stop tokens to -inf, then add the biases.

    At the address `biases`, an id and a float32 for each of `n_bias` biases, then for `n_stop` stop tokens.
    """
    for i in range(n_bias + cuda.threadIdx.x, n_bias + n_stop, cuda.blockDim.x):
        token = np.int64(ld_global_u32(biases + 8 * i))
        if token < n:
            logits[first + token] = np.float32(-np.inf)
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, n_bias, cuda.blockDim.x):
        token = np.int64(ld_global_u32(biases + 8 * i))
        if token < n:
            logits[first + token] += uint_as_float(ld_global_u32(biases + 8 * i + 4))
    cuda.syncthreads()


@device
def apply_repetition_penalty(logits, first, penalty, recent, n_recent):
    """Divide positive and multiply negative logits of the last `n_recent` tokens by `penalty`, each token once (Keskar
    et al., CTRL, 2019). `recent` is (pointer, index of the slot's first).
    """
    thread, (ring, begin) = cuda.threadIdx.x, recent
    if penalty != 1 and thread < n_recent:
        token, is_first = ring[begin + thread], True
        for i in range(thread):
            is_first = is_first and ring[begin + i] != token
        if is_first:
            logit = logits[first + token]
            logits[first + token] = logit / penalty if logit > 0 else logit * penalty


@device
def apply_output_penalties(logits, first, n, counts, frequency, presence):
    """Subtract OpenAI's penalties of tokens that were generated; int32 counts are at the address `counts`."""
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        count = ld_global_u32(counts + 4 * i)
        if count > 0:
            logits[first + i] = (logits[first + i] - frequency * np.float32(count)) - presence
