"""Solutions of docs/course/12-dot.md."""

from __future__ import annotations

import numpy as np
import pytest
from course.dot.kernels import KERNELS, as_it_is, check, contracted

from numballama.cpu.compiler import jit


@pytest.mark.slow
def test_1_where_is_the_limit() -> None:
    """In a cache kernels 3 and 4 gain most: there the memory no longer waits. Kernel 1 is limited by its additions."""
    for kernel, weights, tolerance in KERNELS:
        for rows, columns in ((1, 64), (3, 192), (5, 1024)):
            check(kernel, weights, tolerance, rows, columns)


@jit(fastmath={"reassoc", "contract"})
def two_rows(w, x, out):  # type: ignore[no-untyped-def]
    for n in range(0, w.shape[0], 2):
        other = min(n + 1, w.shape[0] - 1)  # of an odd number of rows, the last is computed twice
        a, b = np.float32(0), np.float32(0)
        for k in range(w.shape[1]):
            a += w[n, k] * x[k]
            b += w[other, k] * x[k]
        out[n], out[other] = a, b


def test_2_two_rows() -> None:
    for rows in (1, 2, 7):
        check(two_rows, as_it_is, 1e-5, rows, 100)


def test_3_nan() -> None:
    """`fastmath=True` includes the LLVM flags nnan and ninf: results for NaN and infinity are undefined."""
    w, out = np.ones((3, 64), np.float32), np.empty(3, np.float32)
    w[1, 5], w[2, 7] = np.nan, np.inf
    contracted(w, np.ones(64, np.float32), out)
    assert out[0] == 64 and np.isnan(out[1]) and out[2] == np.inf
