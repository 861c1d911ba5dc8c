"""The words in which kernels tell how they are launched: operands in device memory, and a `Launch`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..quantization.types import LINEAR_TYPES, TYPE_TRAITS
from ..registry import KernelRef

PAYLOAD_TYPE = {name: "int8" if TYPE_TRAITS[name].bits == 8 else name for name in LINEAR_TYPES}
"""Type of a weight → type of its payload in device memory. Scales are stored apart, so that of q8_0 is int8."""
QUANTIZED = tuple(dict.fromkeys(payload for payload in PAYLOAD_TYPE.values() if not TYPE_TRAITS[payload].is_float))
"""Types of payloads that have scales."""
ITEM_BYTES = {payload: TYPE_TRAITS[payload].storage.itemsize for payload in PAYLOAD_TYPE.values()}
ITEM_BYTES |= {"i8": 1, "i32": 4, "i64": 8, "f64": 8, "u64": 8, "u8": 1, "u32": 4}
"""Bytes of an element. One of "q4_0" and the other packed types is a byte, which holds two 4-bit numbers."""


def _elements_per_16_bytes(payload: str) -> int:
    bits = TYPE_TRAITS[payload].bits
    stored = bits if bits >= 8 else 4  # the upper bits of q6_k lie with the scales
    return min(128 // stored, TYPE_TRAITS[payload].scale_group or 128)


ELEMENTS_PER_16_BYTES = {payload: _elements_per_16_bytes(payload) for payload in PAYLOAD_TYPE.values()}
"""Type of a payload → elements in 16 bytes of it. Those of q6_k hold the lower bits of 32 elements, in two groups of 16
that have scales of their own: here it has 16."""
STAGED_BYTES = 544
"""Distance of two rows of 128 float32 that `st_shared_sums` writes: rows of the same lanes lie in different banks."""


@dataclass(frozen=True)
class Array:
    """Device memory with a shape, in C order. `dtype` is a key of `ITEM_BYTES`."""

    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Matrix:
    """A weight in device memory: rows 16-byte aligned, `stride` bytes apart, their scales in a matrix of their own.

    Rows are filled up with zeros to whole 16 bytes. Scale number k >> `shift` of a row belongs to its number k;
    `scale_stride` counts scales; `blocks_cuda` tells what those of q4_1, q4_k and q6_k are. A type without scales has
    the payload for `scales`, which nobody reads.
    """

    shape: tuple[int, ...]
    payload: Array
    stride: int
    scales: Array
    scale_stride: int = 0
    shift: int = 0

    @property
    def quantized(self) -> bool:
        return self.payload.dtype in QUANTIZED

    @property
    def nbytes(self) -> int:
        """Bytes that a kernel reads to use all of it."""
        scales = self.scale_stride * ITEM_BYTES[self.scales.dtype] if self.quantized else 0
        return self.shape[0] * (self.stride + scales)


Argument = Array | int | float


class KernelFile:
    """The `KernelRef`s of a module, as its attributes."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> KernelRef:
        if name.startswith("_"):
            raise AttributeError(name)
        return KernelRef(self._module, name)


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid (blocks), threads a block, arguments and dynamic shared memory.

    `kernel` is a `@cuda.jit` function, or a `KernelRef` that names one. Arrays become typed pointers, int an int64, float
    a float32.
    """

    kernel: Any
    grid: tuple[int, ...]
    threads: int
    arguments: tuple[Argument, ...]
    shared_bytes: int = 0
    later: tuple[int, Launch] | None = None
    """(position, launch): another one does the same, and does it better once a run's tokens have come so far."""

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.source[1].rpartition(".")[2]

    @property
    def source(self) -> tuple[str, str]:
        """Module and name of the kernel."""
        if isinstance(self.kernel, KernelRef):
            return self.kernel.module, self.kernel.name
        return self.kernel.py_func.__module__, self.kernel.py_func.__qualname__

    @property
    def function(self) -> Any:
        """The `@cuda.jit` function."""
        return self.kernel.load() if isinstance(self.kernel, KernelRef) else self.kernel

    def at(self, position: int) -> Launch:
        """What does it best for tokens up to a position."""
        return self.later[1] if self.later and position >= self.later[0] else self

    @property
    def kinds(self) -> tuple[str, ...]:
        """Types of the arguments, as `driver.compile_kernel` takes them."""
        return tuple(
            f"{a.dtype}*" if isinstance(a, Array) else "f32" if isinstance(a, float) else "i64" for a in self.arguments
        )


@dataclass(frozen=True)
class Gpu:
    """What the functions that bind operators may ask of the device and of the program they bind for."""

    processors: int
    """Streaming multiprocessors."""
    shared_limit: int
    """Bytes of shared memory a block may have."""
    tokens: Array
    """i32[1]: how many tokens the run at hand has; at most the program's."""
    zeros: Callable[[int], Array]
    """zeros(n): n int32 of the program's own, 0 at first; kernels leave them 0."""
