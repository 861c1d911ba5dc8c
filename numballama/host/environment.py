"""Environment variables that make Numba fail, found before Numba is imported."""

from __future__ import annotations


def check_numba() -> None:
    pass
