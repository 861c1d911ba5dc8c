"""Solutions of docs/course/15-gemv.md, and checks of its kernels, for Numba's simulator:

NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/course/simulated_15_gemv.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from course.gemv.kernels import KERNELS, THREADS, WARPS, Gemv, check, warp_sum
from numba import cuda

from numballama.cuda.arithmetic import cvt_f32_f16
from numballama.cuda.intrinsics import ld_v4_f32


@pytest.mark.parametrize("gemv", KERNELS, ids=lambda gemv: gemv.kernel.__name__)
def test_kernel(gemv: Gemv) -> None:
    """Rows that fill no block, one row, and several rows for each warp of the ring."""
    for rows, columns in ((1, 256), (5, 512), (35, 256)):
        check(gemv, rows, columns)


@cuda.jit
def gate_up(w1, w3, x, out, rows, columns):  # type: ignore[no-untyped-def]
    row, lane = cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5), cuda.threadIdx.x & 31
    if row < rows:
        gate, up = np.float32(0), np.float32(0)
        for k in range(4 * lane, columns, 128):
            a, b, c, d = ld_v4_f32(w1, row * columns + k)
            e, f, g, h = ld_v4_f32(w3, row * columns + k)
            x0, x1, x2, x3 = ld_v4_f32(x, k)
            gate += a * x0 + b * x1 + c * x2 + d * x3
            up += e * x0 + f * x1 + g * x2 + h * x3
        gate, up = warp_sum(gate), warp_sum(up)
        if lane == 0:
            out[row] = gate / (np.float32(1) + math.exp(-gate)) * up


def put(*arrays: np.ndarray) -> list[object]:
    return [cuda.to_device(array.reshape(-1)) for array in arrays]


def test_1_two_kernels_in_one() -> None:
    """One launch instead of three. gate and up, 4 bytes a row each, are neither written nor read again: 16 bytes."""
    rng = np.random.default_rng(0)
    w1, w3 = rng.standard_normal((2, 5, 256), dtype=np.float32) / np.float32(16)
    x = rng.standard_normal(256, dtype=np.float32)
    out = cuda.device_array(5, np.float32)
    gate_up[2, THREADS](*put(w1, w3, x), out, 5, 256)
    gate = w1 @ x
    assert np.abs(out.copy_to_host() - gate / (1 + np.exp(-gate)) * (w3 @ x)).max() < 1e-5


@cuda.jit
def half(words, x, out, rows, columns):  # type: ignore[no-untyped-def]
    row, lane = cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5), cuda.threadIdx.x & 31
    if row < rows:
        total = np.float32(0)
        for pair in range(lane, columns // 2, 32):
            word = words[row * (columns // 2) + pair]
            total += cvt_f32_f16(word) * x[2 * pair] + cvt_f32_f16(word >> np.uint32(16)) * x[2 * pair + 1]
        total = warp_sum(total)
        if lane == 0:
            out[row] = total


def test_2_float16() -> None:
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((5, 128)).astype(np.float16), rng.standard_normal(128, dtype=np.float32)
    out = cuda.device_array(5, np.float32)
    half[2, THREADS](*put(w.view(np.uint32), x), out, 5, 128)
    assert np.abs(out.copy_to_host() - w.astype(np.float32) @ x).max() < 1e-4


@cuda.jit
def block_shares_a_row(w, x, out, rows, columns):  # type: ignore[no-untyped-def]
    partial = cuda.shared.array(WARPS, np.float32)
    row, lane, warp = cuda.blockIdx.x, cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    total = np.float32(0)
    for k in range(128 * warp + 4 * lane, columns, 128 * WARPS):
        a, b, c, d = ld_v4_f32(w, row * columns + k)
        e, f, g, h = ld_v4_f32(x, k)
        total += a * e + b * f + c * g + d * h
    total = warp_sum(total)
    if lane == 0:
        partial[warp] = total
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        out[row] = (partial[0] + partial[1]) + (partial[2] + partial[3])


def test_3_few_rows() -> None:
    shared = Gemv(block_shares_a_row, lambda rows, sms: rows)
    for columns in (256, 1024):
        check(shared, 3, columns)
