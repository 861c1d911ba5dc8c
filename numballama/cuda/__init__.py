"""The CUDA backend: plans run as `@cuda.jit` kernels on one NVIDIA GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import CudaBackend
    from .program import CudaProgram

__all__ = ["CudaBackend", "CudaProgram"]


def __getattr__(name: str) -> Any:
    """Import the backend, and NVIDIA's packages with it, only when it is used."""
    if name in __all__:
        from . import backend, program

        return getattr(program if name == "CudaProgram" else backend, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
