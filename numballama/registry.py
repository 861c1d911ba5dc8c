"""The one registry: (op, backend, operand types) → kernel. Kernels enter it where they are defined, by `@kernel`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import UnsupportedError

Types = str | tuple[str, ...]
"""What one operand may be: a type's name, several, or "*" for any."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class KernelRef:
    """A kernel named by its module and function. The module, and Numba with it, is imported when the kernel must be
    compiled: a start with cached kernels needs neither.
    """

    module: str
    name: str

    def load(self) -> Any:
        """The function, its module imported."""
        return getattr(importlib.import_module(self.module), self.name)

    def loaded(self) -> Any | None:
        """The function if its module has been imported already."""
        return self.load() if self.module in sys.modules else None


@dataclass(frozen=True)
class Kernel:
    """A function that computes an op on a backend for given operand types.

    `parameters` are the names of what follows the inputs and outputs: attributes of the op, and scratch arrays.
    `scratch` gives the shapes of the float32 scratch arrays, from the op's operand shapes and the number of workers.
    """

    op: str
    backend: str
    types: tuple[Types, ...]
    function: Callable[..., Any]
    scratch: dict[str, Callable[..., tuple[int, ...]]]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def parameters(self) -> list[str]:
        return list(inspect.signature(self.function).parameters)

    def accepts(self, types: Sequence[str]) -> bool:
        """Whether operands of these types fit."""
        return len(types) == len(self.types) and all(
            allowed == "*" or found == allowed or (isinstance(allowed, tuple) and found in allowed)
            for allowed, found in zip(self.types, types, strict=True)
        )


_kernels: dict[tuple[str, str], list[Kernel]] = {}


def kernel(op: str, backend: str, *types: Types, **scratch: Callable[..., tuple[int, ...]]) -> Callable[[F], F]:
    """Register the decorated function for `op` on `backend` with one entry of `types` for each input, in order.

    A keyword names a scratch parameter of the function; its value maps (input shapes, workers) to a shape.
    A later registration for the same types replaces the earlier one, so that a notebook cell can be run again.
    """

    def register(function: F) -> F:
        entries = _kernels.setdefault((op, backend), [])
        entries[:] = [entry for entry in entries if entry.types != types]
        entries.insert(0, Kernel(op, backend, types, function, scratch))
        return function

    return register


_HOMES = {
    "cpu": ("numballama.kernels_cpu", "numballama.cpu.kernels_int8"),
    "cpu-outline": ("numballama.kernels_outline",),
    "cuda": ("numballama.cuda.ops",),
    "reference": ("numballama.reference",),
}
"""The modules that register a backend's kernels when they are imported; they are, before the first question about
them."""


def load(backend: str) -> None:
    """Import the modules that register a backend's kernels, with what those import."""
    for home in _HOMES.get(backend, ()):
        importlib.import_module(home)


def _entries(op: str, backend: str) -> list[Kernel]:
    load(backend)
    return _kernels.get((op, backend), [])


def find(op: str, backend: str, types: Sequence[str]) -> Kernel:
    """The kernel for an op whose inputs have these types. Raises `UnsupportedError` naming what exists."""
    entries = _entries(op, backend)
    for entry in entries:
        if entry.accepts(types):
            return entry
    known = "; ".join(str(entry.types) for entry in entries) or "nothing"
    raise UnsupportedError(f"no {backend} kernel for {op}({', '.join(types)}); registered for this op: {known}")


def has(op: str, backend: str, types: Sequence[str]) -> bool:
    """Whether `find` would succeed. Fusion passes ask before they build an op that the backend lacks."""
    return any(entry.accepts(types) for entry in _entries(op, backend))
