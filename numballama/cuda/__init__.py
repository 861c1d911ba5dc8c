"""The CUDA backend: plans run as `@cuda.jit` kernels on one NVIDIA GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import CudaBackend, CudaProgram

__all__ = ["CudaBackend", "CudaProgram"]


def __getattr__(name: str) -> Any:
    """Import the backend, and NVIDIA's packages with it, when it is first asked for."""
    if name in __all__:
        from . import backend

        return getattr(backend, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
