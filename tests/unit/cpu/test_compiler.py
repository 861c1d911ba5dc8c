"""The flags of compiled functions."""

from __future__ import annotations

import numba
import numpy as np

from numballama.cpu import compiler as jit


@jit.exact_device
def to_a_multiple_of_four(x: float) -> float:
    return (x + 2.0**54) - 2.0**54


@jit.device
def left_alone(x: float) -> float:
    return (x + 2.0**54) - 2.0**54


def test_exact_arithmetic_stays_so_in_kernels() -> None:
    """Numba has functions without flags of their own take their caller's, with which nothing would be rounded here."""

    @numba.njit(fastmath=jit.FAST_MATH)  # type: ignore[untyped-decorator]
    def kernel(x: np.ndarray, exact: np.ndarray, fast: np.ndarray) -> None:
        for i in range(x.shape[0]):
            exact[i], fast[i] = to_a_multiple_of_four(x[i]), left_alone(x[i])

    x = np.arange(16.0)
    exact, fast = np.empty_like(x), np.empty_like(x)
    kernel(x, exact, fast)
    np.testing.assert_array_equal(exact, 4 * np.round(x / 4))
    np.testing.assert_array_equal(fast, x, "no reordering: the caller's flags have done nothing")
