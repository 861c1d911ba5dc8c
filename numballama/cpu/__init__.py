"""The CPU backend: plans run as Numba `@njit` kernels with all cores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import CpuBackend, CpuProgram

__all__ = ["CpuBackend", "CpuProgram"]


def __getattr__(name: str) -> Any:
    """Import the backend, and Numba with it, when it is first used."""
    if name in __all__:
        from . import backend

        return getattr(backend, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
