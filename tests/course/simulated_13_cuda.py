"""Solutions of docs/course/13-cuda.md, for Numba's simulator:

NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/course/simulated_13_cuda.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

THREADS = 64
FULL = 0xFFFFFFFF


@cuda.jit
def max_rows(x, values, places):  # type: ignore[no-untyped-def]
    best_value = cuda.shared.array(2, np.float32)
    best_place = cuda.shared.array(2, np.int32)
    t, lane, warp = cuda.blockIdx.x, cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    value, place = np.float32(-np.inf), np.int32(x.shape[1])
    for k in range(cuda.threadIdx.x, x.shape[1], THREADS):
        if x[t, k] > value:  # k grows, so the first of equals stays
            value, place = x[t, k], np.int32(k)
    apart = 16
    while apart > 0:
        other, its_place = cuda.shfl_xor_sync(FULL, value, apart), cuda.shfl_xor_sync(FULL, place, apart)
        if other > value or (other == value and its_place < place):
            value, place = other, its_place
        apart //= 2
    if lane == 0:
        best_value[warp], best_place[warp] = value, place
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        second = best_value[1] > best_value[0] or (best_value[1] == best_value[0] and best_place[1] < best_place[0])
        values[t], places[t] = best_value[1 if second else 0], best_place[1 if second else 0]


def test_1_maximum() -> None:
    x = np.random.default_rng(0).integers(0, 50, (3, 200)).astype(np.float32)  # with equal elements
    values, places = np.zeros(3, np.float32), np.zeros(3, np.int32)
    max_rows[3, THREADS](x, values, places)
    assert np.array_equal(values, x.max(axis=1)) and np.array_equal(places, x.argmax(axis=1))


@cuda.jit
def transpose(x, out):  # type: ignore[no-untyped-def]
    tile = cuda.shared.array(32 * 33, np.float32)  # 33: a column of the tile lies in 32 different banks
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    top, left = cuda.blockIdx.y * 32, cuda.blockIdx.x * 32
    for row in range(warp, 32, 2):
        tile[row * 33 + lane] = x[top + row, left + lane]
    cuda.syncthreads()
    for row in range(warp, 32, 2):
        out[left + row, top + lane] = tile[lane * 33 + row]


def test_2_transpose() -> None:
    x = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    out = np.zeros((64, 32), np.float32)
    transpose[(2, 1), 64](x, out)
    assert np.array_equal(out, x.T)


@cuda.jit
def without_barrier(x, out):  # type: ignore[no-untyped-def]
    partial = cuda.shared.array(THREADS, np.float32)
    me = cuda.threadIdx.x
    partial[me] = x[me]
    width = THREADS // 2
    while width > 0:
        if me < width:
            partial[me] += partial[me + width]
        cuda.syncthreads()
        width //= 2
    if me == 0:
        out[0] = partial[0]


def test_3_a_missing_barrier() -> None:
    """A thread adds a number that another warp has not written: shared memory begins as NaN here, and warps run in
    random order. On a GPU the other warp is often fast enough, so the result is often right."""
    x: Any = np.ones(THREADS, np.float32)
    results = []
    for _ in range(20):
        out = np.zeros(1, np.float32)
        without_barrier[1, THREADS](x, out)
        results.append(out[0])
    assert any(np.isnan(result) for result in results)
