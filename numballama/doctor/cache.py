"""The state of a folder of compiled kernels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import kernel_cache
from ..memory import format_bytes


@dataclass(frozen=True)
class Cache:
    """How many kernels a folder holds, and why new ones are not kept there."""

    folder: str | None
    """None: there is no place for one."""
    kernels: int = 0
    nbytes: int = 0
    problem: str | None = None
    """Why kernels that are compiled now are not kept."""

    @classmethod
    def of(cls, folder: Path | None) -> Cache:
        """Of a folder that `kernel_cache.cache_directory` or `cuda_cache_directory` names."""
        if folder is None:
            no_place = f"{kernel_cache.no_place()}; {kernel_cache.ADVICE}"
            return cls(None, problem=no_place if kernel_cache.cache_root() is None else kernel_cache.NO_SOURCES)
        usage = kernel_cache.Usage.of(folder)
        problem = f"{usage.problem}; {kernel_cache.ADVICE}" if usage.problem else None
        return cls(str(folder), usage.entries, usage.nbytes, problem)

    def __str__(self) -> str:
        if self.folder is None:
            return f"not kept: {self.problem}"
        problem = f"; new ones are not kept: {self.problem}" if self.problem else ""
        return f"{self.folder} ({self.kernels:,} kernels, {format_bytes(self.nbytes)}{problem})"
