"""Six kernels for out[n] = w[n] · x on one core, from a plain loop to int8 blocks.

Shapes: w [rows, columns], x [columns], out [rows]. Each row is read once and used once, so the time cannot be below the
bytes of w divided by the bandwidth of the memory: that is the floor. Kernels 1 to 4 read the same float32 and approach
it; kernels 5 and 6 lower it, because they read fewer bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numballama.cpu.compiler import jit
from numballama.cpu.intrinsics import BLOCK, as_f32, dot_int8
from numballama.quantization.convert import quantize_int8, to_f16

GROUP = 64
"""Elements of a row that share a scale in kernel 6."""


@jit(fastmath=False)
def in_order(w, x, out):
    """1. One sum, added in the order of the source: each addition waits for the one before, some 4 cycles each."""
    for n in range(w.shape[0]):
        total = np.float32(0)
        for k in range(w.shape[1]):
            total += w[n, k] * x[k]
        out[n] = total


@jit(fastmath=False)
def four_sums(w, x, out):
    """2. Four sums by turns: four additions are under way at a time, still one number each."""
    for n in range(w.shape[0]):
        a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        whole = w.shape[1] // 4 * 4
        for k in range(0, whole, 4):
            a += w[n, k] * x[k]
            b += w[n, k + 1] * x[k + 1]
            c += w[n, k + 2] * x[k + 2]
            d += w[n, k + 3] * x[k + 3]
        for k in range(whole, w.shape[1]):
            a += w[n, k] * x[k]
        out[n] = (a + b) + (c + d)


@jit(fastmath={"reassoc"})
def reassociated(w, x, out):
    """3. The loop of kernel 1, but the compiler may add in another order: it uses several sums, each a vector."""
    for n in range(w.shape[0]):
        total = np.float32(0)
        for k in range(w.shape[1]):
            total += w[n, k] * x[k]
        out[n] = total


@jit(fastmath={"reassoc", "contract"})
def contracted(w, x, out):
    """4. A product and an addition may become one instruction, a fused multiply-add."""
    for n in range(w.shape[0]):
        total = np.float32(0)
        for k in range(w.shape[1]):
            total += w[n, k] * x[k]
        out[n] = total


@jit(fastmath={"reassoc", "contract"})
def half(w, x, out):
    """5. Weights in float16, as their bits in uint16: half the bytes. `as_f32` converts a vector of them at a time."""
    for n in range(w.shape[0]):
        total = np.float32(0)
        for k in range(w.shape[1]):
            total += as_f32(w[n, k]) * x[k]
        out[n] = total


@jit(fastmath={"reassoc", "contract"})
def int8_blocks(w, x, out):
    """6. Weights in int8 with a float32 scale for 64: about a quarter of the bytes.

    `dot_int8` handles blocks of 32 as LLVM vectors, and its sums stay in vectors to the end of the row. LLVM does not
    vectorise such a loop well by itself. The intrinsic takes flat indices.
    """
    quants, scales = w
    columns, period = quants.shape[1], GROUP // BLOCK
    for n in range(quants.shape[0]):
        first = n * columns // GROUP
        out[n] = dot_int8(quants, n * columns, scales, first, period, period, x, 0, columns // BLOCK)


@jit(fastmath={"reassoc"})
def read(w):
    """The floor: a sum of everything, which reads each byte once and does nothing else."""
    total = np.float32(0)
    flat = w.reshape(-1)
    for i in range(flat.shape[0]):
        total += flat[i]
    return total


def as_it_is(w: np.ndarray) -> Any:
    return w


def as_int8(w: np.ndarray) -> Any:
    return quantize_int8(w, GROUP)


KERNELS: list[tuple[Any, Callable[[np.ndarray], Any], float]] = [
    (in_order, as_it_is, 1e-5),
    (four_sums, as_it_is, 1e-5),
    (reassociated, as_it_is, 1e-5),
    (contracted, as_it_is, 1e-5),
    (half, to_f16, 1e-3),
    (int8_blocks, as_int8, 2e-2),
]
"""(kernel, function that makes its weights of float32, largest relative error of the result)."""


def nbytes(w: Any) -> int:
    """Bytes of a kernel's weights."""
    return sum(part.nbytes for part in w) if isinstance(w, tuple) else w.nbytes


def check(kernel: Any, weights: Callable[[np.ndarray], Any], tolerance: float, rows: int, columns: int) -> float:
    """Compare a kernel with NumPy in float64. Returns the relative error. Raises `AssertionError` if it is large."""
    rng = np.random.default_rng(rows)
    w, x = rng.standard_normal((rows, columns), dtype=np.float32), rng.standard_normal(columns, dtype=np.float32)
    out = np.full(rows, np.nan, np.float32)
    kernel(weights(w), x, out)
    expected = w.astype(np.float64) @ x
    error = float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
    assert error < tolerance, f"{kernel.__name__}: relative error {error:.1e}, expected below {tolerance:.0e}"
    return error
