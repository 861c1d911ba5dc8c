"""Six CUDA kernels for the attention of one token: out = softmax(q · Kᵀ / sqrt(D)) · V of each head, in float32.

q and out are [heads, D], keys and values [heads, length, D], all flat; D = 128. A step reads every key and every value
once and does four operations for each pair of them, so the floor is their bytes divided by the bandwidth of the memory.
`scratch` is float32 memory for kernels that leave scores or partial results there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from numballama.cuda.intrinsics import ld_v4_f32

FULL = 0xFFFFFFFF
D = 128
THREADS = 128
WARPS = THREADS // 32
LOWEST = np.float32(-1e30)
"""The maximum of no scores. Finite, because the difference of two infinities is NaN."""
SPLIT_KEYS = 256
"""Keys that a block of kernel 6 takes at least."""
PARTIAL = D + 2
"""Elements of a partial result: a maximum, a sum of exponentials, and D weighted values."""
STATE = WARPS * PARTIAL
"""float32 of shared memory for the partial results of a block's warps."""
SCALE = np.float32(1 / math.sqrt(D))


@cuda.jit(device=True)
def warp_sum(x):
    """Sum over the 32 lanes, in every lane."""
    x += cuda.shfl_xor_sync(FULL, x, 16)
    x += cuda.shfl_xor_sync(FULL, x, 8)
    x += cuda.shfl_xor_sync(FULL, x, 4)
    x += cuda.shfl_xor_sync(FULL, x, 2)
    return x + cuda.shfl_xor_sync(FULL, x, 1)


@cuda.jit
def thread_per_head(q, keys, values, scratch, out, heads, length):
    """1. The formula, one thread a head: scores, softmax, weighted sum, in three loops. A GPU has too few heads."""
    head = cuda.blockIdx.x * 32 + cuda.threadIdx.x
    if head < heads:
        first, row = head * length * D, head * length
        largest, total = LOWEST, np.float32(0)
        for p in range(length):
            score = np.float32(0)
            for d in range(D):
                score += q[head * D + d] * keys[first + p * D + d]
            scratch[row + p] = score * SCALE
            largest = max(largest, score * SCALE)
        for p in range(length):
            scratch[row + p] = math.exp(scratch[row + p] - largest)
            total += scratch[row + p]
        for d in range(D):
            value = np.float32(0)
            for p in range(length):
                value += scratch[row + p] * values[first + p * D + d]
            out[head * D + d] = value / total


@cuda.jit(device=True)
def softmax_of_block(scratch, row, length, shared):
    """exp(score - maximum) in place, by all threads of a block; returns the sum. Ends with a barrier."""
    me = cuda.threadIdx.x
    largest = LOWEST
    for p in range(me, length, THREADS):
        largest = max(largest, scratch[row + p])
    shared[me] = largest
    cuda.syncthreads()
    for i in range(THREADS):
        largest = max(largest, shared[i])
    cuda.syncthreads()
    total = np.float32(0)
    for p in range(me, length, THREADS):
        power = math.exp(scratch[row + p] - largest)
        scratch[row + p] = power
        total += power
    shared[me] = total
    cuda.syncthreads()
    total = np.float32(0)
    for i in range(THREADS):
        total += shared[i]
    return total


@cuda.jit
def block_per_head(q, keys, values, scratch, out, heads, length):
    """2. One block a head, one thread a key: 128 threads instead of one. But neighbours read from different keys."""
    shared = cuda.shared.array(THREADS, np.float32)
    head, me = cuda.blockIdx.x, cuda.threadIdx.x
    first, row = head * length * D, head * length
    for p in range(me, length, THREADS):
        score = np.float32(0)
        for d in range(D):
            score += q[head * D + d] * keys[first + p * D + d]
        scratch[row + p] = score * SCALE
    cuda.syncthreads()
    total = softmax_of_block(scratch, row, length, shared)
    cuda.syncthreads()
    for d in range(me, D, THREADS):  # a thread a dimension: neighbours read neighbouring values
        value = np.float32(0)
        for p in range(length):
            value += scratch[row + p] * values[first + p * D + d]
        out[head * D + d] = value / total


@cuda.jit
def warp_per_key(q, keys, values, scratch, out, heads, length):
    """3. One warp a key: the lanes read a key together, and shuffles add up its products."""
    shared = cuda.shared.array(THREADS, np.float32)
    head, me = cuda.blockIdx.x, cuda.threadIdx.x
    lane, warp = me & 31, me >> 5
    first, row = head * length * D, head * length
    for p in range(warp, length, WARPS):
        score = np.float32(0)
        for d in range(lane, D, 32):
            score += q[head * D + d] * keys[first + p * D + d]
        score = warp_sum(score)
        if lane == 0:
            scratch[row + p] = score * SCALE
    cuda.syncthreads()
    total = softmax_of_block(scratch, row, length, shared)
    cuda.syncthreads()
    for d in range(me, D, THREADS):
        value = np.float32(0)
        for p in range(length):
            value += scratch[row + p] * values[first + p * D + d]
        out[head * D + d] = value / total


@cuda.jit(device=True)
def merge(state, first, count, d):
    """Combine `count` partial results: (maximum, sum of exponentials, weighted value of dimension d)."""
    largest = LOWEST
    for i in range(count):
        largest = max(largest, state[first + i * PARTIAL])
    total, value = np.float32(0), np.float32(0)
    for i in range(count):
        shrink = math.exp(state[first + i * PARTIAL] - largest)
        total += shrink * state[first + i * PARTIAL + 1]
        value += shrink * state[first + i * PARTIAL + 2 + d]
    return largest, total, value


@cuda.jit
def online(q, keys, values, scratch, out, heads, length):
    """4. One pass: each warp keeps a running maximum, a sum of exponentials and weighted values. No score is stored.

    When a larger maximum comes, what has been summed so far is scaled down ("online softmax"). A lane has the elements
    lane, lane + 32, lane + 64 and lane + 96 of a key.
    """
    state = cuda.shared.array(STATE, np.float32)
    head, lane, warp = cuda.blockIdx.x, cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    own = head * D + lane
    largest, total = LOWEST, np.float32(0)
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for p in range(warp, length, WARPS):
        at = (head * length + p) * D + lane
        score = q[own] * keys[at] + q[own + 32] * keys[at + 32]
        score += q[own + 64] * keys[at + 64] + q[own + 96] * keys[at + 96]
        score = warp_sum(score) * SCALE
        new = max(largest, score)
        shrink, weight = math.exp(largest - new), math.exp(score - new)
        total = total * shrink + weight
        a, b = a * shrink + weight * values[at], b * shrink + weight * values[at + 32]
        c, d = c * shrink + weight * values[at + 64], d * shrink + weight * values[at + 96]
        largest = new
    mine = warp * PARTIAL
    if lane == 0:
        state[mine], state[mine + 1] = largest, total
    state[mine + 2 + lane], state[mine + 34 + lane] = a, b
    state[mine + 66 + lane], state[mine + 98 + lane] = c, d
    cuda.syncthreads()
    _, total, value = merge(state, 0, WARPS, cuda.threadIdx.x)  # a thread a dimension: THREADS is D
    out[head * D + cuda.threadIdx.x] = value / total


@cuda.jit(device=True)
def attend(q, keys, values, head, length, begin, end, state):
    """The pass of kernel 4 over keys [begin, end), with loads of 16 bytes. Ends with a barrier.

    A lane has the elements 4 · lane to 4 · lane + 3 of a key. Leaves the warps' results in `state`.
    """
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    q0, q1, q2, q3 = ld_v4_f32(q, head * D + 4 * lane)
    largest, total = LOWEST, np.float32(0)
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for p in range(begin + warp, end, WARPS):
        at = (head * length + p) * D + 4 * lane
        k0, k1, k2, k3 = ld_v4_f32(keys, at)
        v0, v1, v2, v3 = ld_v4_f32(values, at)  # now: it does not depend on the score
        score = warp_sum(q0 * k0 + q1 * k1 + q2 * k2 + q3 * k3) * SCALE
        new = max(largest, score)
        shrink, weight = math.exp(largest - new), math.exp(score - new)
        total = total * shrink + weight
        a, b = a * shrink + weight * v0, b * shrink + weight * v1
        c, d = c * shrink + weight * v2, d * shrink + weight * v3
        largest = new
    mine = warp * PARTIAL
    if lane == 0:
        state[mine], state[mine + 1] = largest, total
    state[mine + 2 + 4 * lane], state[mine + 3 + 4 * lane] = a, b
    state[mine + 4 + 4 * lane], state[mine + 5 + 4 * lane] = c, d
    cuda.syncthreads()


@cuda.jit
def vector_loads(q, keys, values, scratch, out, heads, length):
    """5. A lane loads 16 bytes at a time, and asks for the value before the score is known."""
    state = cuda.shared.array(STATE, np.float32)
    head, d = cuda.blockIdx.x, cuda.threadIdx.x
    attend(q, keys, values, head, length, 0, length, state)
    _, total, value = merge(state, 0, WARPS, d)
    out[head * D + d] = value / total


@cuda.jit
def split(q, keys, values, scratch, out, heads, length, splits):
    """6. Several blocks a head, each for a part of the keys, so that a few heads fill the GPU. `combine` follows."""
    state = cuda.shared.array(STATE, np.float32)
    head, part, d = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    size = (length + splits - 1) // splits
    attend(q, keys, values, head, length, part * size, min((part + 1) * size, length), state)
    largest, total, value = merge(state, 0, WARPS, d)
    mine = (head * splits + part) * PARTIAL
    if d == 0:
        scratch[mine], scratch[mine + 1] = largest, total
    scratch[mine + 2 + d] = value


@cuda.jit
def combine(scratch, out, splits):
    """The end of kernel 6: merge the parts of a head. Its launch is the barrier between blocks."""
    head, d = cuda.blockIdx.x, cuda.threadIdx.x
    _, total, value = merge(scratch, head * splits * PARTIAL, splits, d)
    out[head * D + d] = value / total


class Attention(NamedTuple):
    """A kernel's name, what queues it on (q, keys, values, scratch, out, heads, length, SMs), and the float32 of
    scratch that it needs for (heads, length, SMs)."""

    name: str
    launch: Callable[..., None]
    scratch: Callable[[int, int, int], int]


def splits_for(heads: int, length: int, sms: int) -> int:
    """Blocks that share a head: enough to give each SM two of them, if each has `SPLIT_KEYS` keys or more."""
    return max(1, min(-(-2 * sms // heads), length // SPLIT_KEYS))


def _one_launch(kernel: Any, heads_per_block: int = 1, threads: int = THREADS) -> Callable[..., None]:
    def launch(q: Any, keys: Any, values: Any, scratch: Any, out: Any, heads: int, length: int, sms: int) -> None:
        kernel[-(-heads // heads_per_block), threads](q, keys, values, scratch, out, heads, length)

    return launch


def _split(q: Any, keys: Any, values: Any, scratch: Any, out: Any, heads: int, length: int, sms: int) -> None:
    splits = splits_for(heads, length, sms)
    split[(heads, splits), THREADS](q, keys, values, scratch, out, heads, length, splits)
    combine[heads, THREADS](scratch, out, splits)


def _scores(heads: int, length: int, sms: int) -> int:
    return heads * length


KERNELS = [
    Attention("thread_per_head", _one_launch(thread_per_head, 32, 32), _scores),
    Attention("block_per_head", _one_launch(block_per_head), _scores),
    Attention("warp_per_key", _one_launch(warp_per_key), _scores),
    Attention("online", _one_launch(online), lambda heads, length, sms: 1),
    Attention("vector_loads", _one_launch(vector_loads), lambda heads, length, sms: 1),
    Attention("split", _split, lambda heads, length, sms: heads * splits_for(heads, length, sms) * PARTIAL),
]


def check(attention: Attention, heads: int, length: int, sms: int = 1) -> float:
    """Compare a kernel with NumPy in float64. Returns the largest error; raises `AssertionError` above 1e-4."""
    rng = np.random.default_rng(length)
    q = rng.standard_normal((heads, D), dtype=np.float32)
    keys, values = rng.standard_normal((2, heads, length, D), dtype=np.float32)
    out = cuda.to_device(np.full(heads * D, np.nan, np.float32))
    scratch = cuda.device_array(attention.scratch(heads, length, sms), np.float32)
    flat = [cuda.to_device(array.reshape(-1)) for array in (q, keys, values)]
    attention.launch(*flat, scratch, out, heads, length, sms)
    scores = np.einsum("hd,hpd->hp", q.astype(np.float64), keys) / math.sqrt(D)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = np.einsum("hp,hpd->hd", powers / powers.sum(axis=1, keepdims=True), values)
    error = float(np.abs(out.copy_to_host().reshape(heads, D) - expected).max())
    assert error < 1e-4, f"{attention.name}: error {error:.1e}"
    return error
