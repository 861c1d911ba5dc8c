"""Six CUDA kernels for out[n] = w[n] · x in float32, from one thread a row to a ring of asynchronous copies.

w is flat, row after row: element k of row n is w[n * columns + k]. `columns` is a multiple of 256. Each weight is read
once and used once, so the floor is the bytes of w divided by the bandwidth of the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from numballama.cuda.intrinsics import (
    address,
    cp_async_16,
    cp_async_commit,
    cp_async_wait_all,
    cp_async_wait_group,
    ld_v4_f32,
    shared_address,
)

FULL = 0xFFFFFFFF
THREADS = 128
WARPS = THREADS // 32
STAGES = 4
"""Slots of a warp's ring in kernel 6; a power of two. Three copies are under way while the fourth is used."""
RING = WARPS * STAGES * 128
"""float32 of shared memory in kernel 6. Numba wants the size of a shared array as a constant, not as an expression."""


@cuda.jit(device=True)
def warp_sum(x):
    """Sum over the 32 lanes, in every lane."""
    x += cuda.shfl_xor_sync(FULL, x, 16)
    x += cuda.shfl_xor_sync(FULL, x, 8)
    x += cuda.shfl_xor_sync(FULL, x, 4)
    x += cuda.shfl_xor_sync(FULL, x, 2)
    return x + cuda.shfl_xor_sync(FULL, x, 1)


@cuda.jit
def thread_per_row(w, x, out, rows, columns):
    """1. One thread a row. The 32 threads of a warp load from 32 rows: 32 accesses to memory for one load."""
    row = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if row < rows:
        total = np.float32(0)
        for k in range(columns):
            total += w[row * columns + k] * x[k]
        out[row] = total


@cuda.jit
def block_per_row(w, x, out, rows, columns):
    """2. One block a row: neighbouring threads load neighbouring weights. They add up in shared memory, 8 barriers."""
    partial = cuda.shared.array(THREADS, np.float32)
    row, me = cuda.blockIdx.x, cuda.threadIdx.x
    total = np.float32(0)
    for k in range(me, columns, THREADS):
        total += w[row * columns + k] * x[k]
    partial[me] = total
    cuda.syncthreads()
    width = THREADS // 2
    while width > 0:
        if me < width:
            partial[me] += partial[me + width]
        cuda.syncthreads()
        width //= 2
    if me == 0:
        out[row] = partial[0]


@cuda.jit
def warp_per_row(w, x, out, rows, columns):
    """3. One warp a row: five shuffles instead of barriers, and warps do not wait for each other."""
    row, lane = cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5), cuda.threadIdx.x & 31
    if row < rows:
        total = np.float32(0)
        for k in range(lane, columns, 32):
            total += w[row * columns + k] * x[k]
        total = warp_sum(total)
        if lane == 0:
            out[row] = total


@cuda.jit
def vector_loads(w, x, out, rows, columns):
    """4. A lane loads 16 bytes at a time: a quarter of the instructions, and 512 bytes of a row a warp."""
    row, lane = cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5), cuda.threadIdx.x & 31
    if row < rows:
        total = np.float32(0)
        for k in range(4 * lane, columns, 128):
            a, b, c, d = ld_v4_f32(w, row * columns + k)
            e, f, g, h = ld_v4_f32(x, k)
            total += a * e + b * f + c * g + d * h
        total = warp_sum(total)
        if lane == 0:
            out[row] = total


@cuda.jit
def two_rows(w, x, out, rows, columns):
    """5. A warp takes two rows and two pieces of each: four loads are under way, and x is loaded once for both rows."""
    row, lane = 2 * (cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5)), cuda.threadIdx.x & 31
    if row < rows:
        first, second = row * columns, min(row + 1, rows - 1) * columns  # the last row twice if their number is odd
        total, other = np.float32(0), np.float32(0)
        for k in range(4 * lane, columns, 256):
            a, b, c, d = ld_v4_f32(w, first + k)
            e, f, g, h = ld_v4_f32(w, second + k)
            i, j, m, n = ld_v4_f32(w, first + k + 128)
            o, p, q, r = ld_v4_f32(w, second + k + 128)
            x0, x1, x2, x3 = ld_v4_f32(x, k)
            total += a * x0 + b * x1 + c * x2 + d * x3
            other += e * x0 + f * x1 + g * x2 + h * x3
            x0, x1, x2, x3 = ld_v4_f32(x, k + 128)
            total += i * x0 + j * x1 + m * x2 + n * x3
            other += o * x0 + p * x1 + q * x2 + r * x3
        total, other = warp_sum(total), warp_sum(other)
        if lane == 0:
            out[row] = total
            if row + 1 < rows:
                out[row + 1] = other


@cuda.jit
def ring(w, x, out, rows, columns):
    """6. Copies run ahead of the arithmetic, over the ends of rows: memory is never idle between two rows.

    A few blocks stay on each SM and take row after row. `cp.async` copies 16 bytes to shared memory without holding a
    register or a thread. A lane reads only what it copied itself, so no barrier is needed.
    """
    slots = cuda.shared.array(RING, np.float32)
    warp, lane = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
    all_warps = cuda.gridDim.x * WARPS
    row = cuda.blockIdx.x * WARPS + warp
    mine = warp * (STAGES * 128) + 4 * lane  # this lane's 16 bytes of the warp's first slot
    next_row, next_k = row, 4 * lane  # what is copied next
    for stage in range(STAGES - 1):
        if next_row < rows:
            cp_async_16(shared_address(slots, mine + stage * 128), address(w, next_row * columns + next_k), 16)
        cp_async_commit()
        next_k += 128
        if next_k >= columns:
            next_row, next_k = next_row + all_warps, 4 * lane
    stage = 0
    while row < rows:
        total = np.float32(0)
        for k in range(4 * lane, columns, 128):
            if next_row < rows:
                slot = mine + ((stage + STAGES - 1) & (STAGES - 1)) * 128  # the slot that was used last
                cp_async_16(shared_address(slots, slot), address(w, next_row * columns + next_k), 16)
            cp_async_commit()
            next_k += 128
            if next_k >= columns:
                next_row, next_k = next_row + all_warps, 4 * lane
            cp_async_wait_group(3)  # STAGES - 1 newer copies may be under way
            a, b, c, d = ld_v4_f32(slots, mine + (stage & (STAGES - 1)) * 128)
            e, f, g, h = ld_v4_f32(x, k)
            total += a * e + b * f + c * g + d * h
            stage += 1
        total = warp_sum(total)
        if lane == 0:
            out[row] = total
        row += all_warps
    cp_async_wait_all()


class Gemv(NamedTuple):
    """A kernel, and its number of blocks for (rows, SMs of the GPU)."""

    kernel: Any
    blocks: Callable[[int, int], int]


KERNELS = [
    Gemv(thread_per_row, lambda rows, sms: -(-rows // THREADS)),
    Gemv(block_per_row, lambda rows, sms: rows),
    Gemv(warp_per_row, lambda rows, sms: -(-rows // WARPS)),
    Gemv(vector_loads, lambda rows, sms: -(-rows // WARPS)),
    Gemv(two_rows, lambda rows, sms: -(-rows // (2 * WARPS))),
    Gemv(ring, lambda rows, sms: min(8 * sms, -(-rows // WARPS))),
]


def launch(gemv: Gemv, w: Any, x: Any, out: Any, sms: int) -> None:
    """Queue a kernel on device arrays: w flat, x and out."""
    rows, columns = out.shape[0], x.shape[0]
    gemv.kernel[gemv.blocks(rows, sms), THREADS](w, x, out, rows, columns)


def check(gemv: Gemv, rows: int, columns: int, sms: int = 1) -> float:
    """Compare a kernel with NumPy in float64. Returns the relative error; raises `AssertionError` above 1e-5."""
    rng = np.random.default_rng(rows)
    w, x = rng.standard_normal((rows, columns), dtype=np.float32), rng.standard_normal(columns, dtype=np.float32)
    out = cuda.to_device(np.full(rows, np.nan, np.float32))
    launch(gemv, cuda.to_device(w.reshape(-1)), cuda.to_device(x), out, sms)
    expected = w.astype(np.float64) @ x
    error = float(np.linalg.norm(out.copy_to_host() - expected) / np.linalg.norm(expected))
    assert error < 1e-5, f"{gemv.kernel.__name__}: relative error {error:.1e}"
    return error
