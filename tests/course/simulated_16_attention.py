"""Solutions of docs/course/16-attention.md, and checks of its kernels, for Numba's simulator:

NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/course/simulated_16_attention.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from course.attention import kernels
from course.attention.kernels import (
    KERNELS,
    LOWEST,
    PARTIAL,
    SCALE,
    STATE,
    THREADS,
    WARPS,
    Attention,
    D,
    check,
    merge,
    warp_sum,
)
from numba import cuda


@pytest.mark.parametrize("attention", KERNELS, ids=lambda attention: attention.name)
def test_kernel(attention: Attention) -> None:
    """One key, fewer keys than warps, and more."""
    for heads, length in ((1, 1), (2, 3), (1, 13)):
        check(attention, heads, length)


def test_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SPLIT_KEYS", 4)
    assert kernels.splits_for(1, 13, 2) == 3
    check(KERNELS[-1], 1, 13, sms=2)


@cuda.jit
def attend(q, keys, values, table, page, out, group, window, position):  # type: ignore[no-untyped-def]
    """`online` with all three: KV heads that are shared, a window (0: none), and pages of `page` keys."""
    state = cuda.shared.array(STATE, np.float32)
    head, lane, warp = cuda.blockIdx.x, cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    kv_heads = cuda.gridDim.x // group
    first = max(position + 1 - window, 0) if window > 0 else 0
    largest, total = LOWEST, np.float32(0)
    acc = cuda.local.array(4, np.float32)
    for i in range(4):
        acc[i] = 0
    for p in range(first + warp, position + 1, WARPS):
        # the address of a key: [pages, kv_heads, page, D]
        at = ((table[p // page] * kv_heads + head // group) * page + p % page) * D + lane
        score = np.float32(0)
        for i in range(4):
            score += q[head * D + lane + 32 * i] * keys[at + 32 * i]
        score = warp_sum(score) * SCALE
        new = max(largest, score)
        shrink, weight = math.exp(largest - new), math.exp(score - new)
        total = total * shrink + weight
        for i in range(4):
            acc[i] = acc[i] * shrink + weight * values[at + 32 * i]
        largest = new
    mine = warp * PARTIAL
    if lane == 0:
        state[mine], state[mine + 1] = largest, total
    for i in range(4):
        state[mine + 2 + lane + 32 * i] = acc[i]
    cuda.syncthreads()
    _, total, value = merge(state, 0, WARPS, cuda.threadIdx.x)
    out[head * D + cuda.threadIdx.x] = value / total


def run(heads: int, kv_heads: int, length: int, window: int, page: int) -> None:
    rng = np.random.default_rng(length)
    q = rng.standard_normal((heads, D), dtype=np.float32)
    pages = -(-length // page)
    keys, values = rng.standard_normal((2, pages + 2, kv_heads, page, D), dtype=np.float32)
    table = rng.permutation(pages + 2)[:pages].astype(np.int32)
    out = cuda.device_array(heads * D, np.float32)
    arrays = [cuda.to_device(array.reshape(-1)) for array in (q, keys, values)]
    attend[heads, THREADS](*arrays, cuda.to_device(table), page, out, heads // kv_heads, window, length - 1)
    for head in range(heads):
        own = head // (heads // kv_heads)
        k, v = (array[table, own].reshape(-1, D)[:length] for array in (keys, values))
        scores = k @ q[head] / math.sqrt(D)
        if window:
            scores[: max(length - window, 0)] = -np.inf
        powers = np.exp(scores - scores.max())
        assert np.abs(out.copy_to_host()[head * D : (head + 1) * D] - powers @ v / powers.sum()).max() < 1e-4


def test_1_grouped_query_attention() -> None:
    """Each key is read once for every query head of its group. A block that computes all of them reads it once."""
    run(heads=4, kv_heads=2, length=6, window=0, page=8)


def test_2_a_window() -> None:
    for window in (1, 3, 9):
        run(heads=1, kv_heads=1, length=7, window=window, page=8)


def test_3_pages() -> None:
    run(heads=1, kv_heads=1, length=10, window=0, page=4)
