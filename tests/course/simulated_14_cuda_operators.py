"""Solutions of docs/course/14-cuda-operators.md, for Numba's simulator:

NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/course/simulated_14_cuda_operators.py
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from numballama import reference

THREADS = 64
FULL = 0xFFFFFFFF
WARPS = THREADS // 32


@cuda.jit
def rope(x, angles, out, head_dim):  # type: ignore[no-untyped-def]
    t, pair = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    half = head_dim // 2
    if pair < x.shape[1] // 2:
        i = pair % half
        a = pair // half * head_dim + 2 * i
        cos, sin = angles[t, i], angles[t, half + i]
        out[t, a] = x[t, a] * cos - x[t, a + 1] * sin
        out[t, a + 1] = x[t, a] * sin + x[t, a + 1] * cos


def test_1_rope() -> None:
    rng = np.random.default_rng(0)
    x, turns = rng.standard_normal((2, 3 * 16)).astype(np.float32), rng.standard_normal((2, 8))
    angles = np.hstack([np.cos(turns), np.sin(turns)]).astype(np.float32)
    out = np.zeros_like(x)
    rope[(1, 2), THREADS](x, angles, out, 16)
    assert np.abs(out - reference.rope(x, angles, 16, 1)).max() < 1e-6


@cuda.jit
def head_norm(x, weight, out, eps):  # type: ignore[no-untyped-def]
    head_dim = weight.shape[0]
    t, lane = cuda.blockIdx.y, cuda.threadIdx.x & 31
    first = (cuda.blockIdx.x * (THREADS // 32) + (cuda.threadIdx.x >> 5)) * head_dim
    if first < x.shape[1]:  # the same for all lanes of a warp, so they reach the shuffles together
        squares = np.float32(0)
        for d in range(lane, head_dim, 32):
            squares += x[t, first + d] * x[t, first + d]
        for apart in (16, 8, 4, 2, 1):
            squares += cuda.shfl_xor_sync(FULL, squares, apart)
        factor = np.float32(1) / math.sqrt(squares / np.float32(head_dim) + eps)
        for d in range(lane, head_dim, 32):
            out[t, first + d] = x[t, first + d] * factor * weight[d]


def test_2_one_warp_a_head() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 3 * 40)).astype(np.float32), rng.standard_normal(40).astype(np.float32)
    out = np.zeros_like(x)
    head_norm[(2, 2), THREADS](x, weight, out, np.float32(1e-5))
    assert np.abs(out - reference.head_norm(x, weight, 1e-5)).max() < 1e-5


@cuda.jit
def softmax(x, out):  # type: ignore[no-untyped-def]
    maxima = cuda.shared.array(WARPS, np.float32)
    sums = cuda.shared.array(WARPS, np.float32)
    t, warp = cuda.blockIdx.x, cuda.threadIdx.x >> 5
    largest, total = np.float32(-1e30), np.float32(0)  # finite: -inf - -inf is NaN
    for k in range(cuda.threadIdx.x, x.shape[1], THREADS):
        new = max(largest, x[t, k])
        total = total * math.exp(largest - new) + math.exp(x[t, k] - new)
        largest = new
    for apart in (16, 8, 4, 2, 1):
        other, its_sum = cuda.shfl_xor_sync(FULL, largest, apart), cuda.shfl_xor_sync(FULL, total, apart)
        new = max(largest, other)
        total = total * math.exp(largest - new) + its_sum * math.exp(other - new)
        largest = new
    if cuda.threadIdx.x & 31 == 0:
        maxima[warp], sums[warp] = largest, total
    cuda.syncthreads()
    largest = max(maxima[0], maxima[1])
    total = sums[0] * math.exp(maxima[0] - largest) + sums[1] * math.exp(maxima[1] - largest)
    for k in range(cuda.threadIdx.x, x.shape[1], THREADS):
        out[t, k] = math.exp(x[t, k] - largest) / total


def test_3_softmax_in_one_pass() -> None:
    x = (100 * np.random.default_rng(0).standard_normal((3, 150))).astype(np.float32)
    x[1, 70:] = -np.inf
    out = np.zeros_like(x)
    softmax[3, THREADS](x, out)
    assert np.abs(out - reference.softmax(x)).max() < 1e-6
