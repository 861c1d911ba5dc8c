"""Descriptions of launches: operands in device memory, a kernel's arguments by name, grid and shared memory.

Nothing here imports Numba or NVIDIA's packages: a kernel is named by a `KernelRef` until it must be compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from ..errors import UnsupportedError
from ..ir import nbytes_of
from ..quantization.types import LINEAR_TYPES, TYPE_TRAITS
from ..registry import KernelRef

if TYPE_CHECKING:
    from .nccl import Communicator

PAYLOAD_TYPE = {name: "int8" if TYPE_TRAITS[name].bits == 8 else name for name in LINEAR_TYPES}
"""Type of a weight → type of its payload in device memory. Scales are stored separately, so q8_0 becomes int8."""
QUANTIZED = tuple(dict.fromkeys(payload for payload in PAYLOAD_TYPE.values() if not TYPE_TRAITS[payload].is_float))
"""Types of payloads that have scales."""
ITEM_BYTES = {payload: TYPE_TRAITS[payload].storage.itemsize for payload in PAYLOAD_TYPE.values()}
ITEM_BYTES |= {"q8_0": 1, "i8": 1, "i32": 4, "i64": 8, "f64": 8, "u64": 8, "u8": 1, "u32": 4}
"""Type → bytes of an element. An element of "q4_0" and the other packed types is a byte with two 4-bit quants,
one of "q8_0" a quant of a KV cache."""


def _elements_per_16_bytes(payload: str) -> int:
    bits = TYPE_TRAITS[payload].bits
    stored = bits if bits >= 8 else 4  # the upper bits of q6_k lie with the scales
    return min(128 // stored, TYPE_TRAITS[payload].scale_group or 128)


ELEMENTS_PER_16_BYTES = {payload: _elements_per_16_bytes(payload) for payload in PAYLOAD_TYPE.values()}
"""Type of a payload → elements in 16 bytes of it. 16 bytes of q6_k hold the lower bits of 32 elements, in two groups of
16 with a scale each; they count as 16 here."""


@dataclass(frozen=True)
class Array:
    """Device memory with a shape, in C order. `dtype` is a key of `ITEM_BYTES`."""

    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        if self.dtype == "q8_0":
            return nbytes_of(self.shape, self.dtype)
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorMap:
    """A matrix [rows, columns] of 16-bit elements, described for TMA: boxes of `box_rows` × 64 columns.

    A row takes `stride` bytes, a multiple of 16. Boxes are swizzled by 128 bytes in shared memory, as `wgmma` reads
    them.
    """

    address: int
    dtype: str
    shape: tuple[int, ...]
    stride: int
    box_rows: int


Argument = Array | TensorMap | int | float
"""An argument of a kernel: an Array becomes a typed pointer, a TensorMap the address of the map in device memory as an
int64, an int an int64, a float a float32."""


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns] in device memory.

    A row of `payload` takes `stride` bytes, a multiple of 16, and is padded with zeros. Its scales are a row of a
    matrix of their own, `scale_stride` elements long; element k of the row uses scale number k >> `shift`. `repack`
    describes the scales of q4_1, q4_k and q6_k. A type without scales passes its payload as `scales`, which no kernel
    reads.
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
        """Bytes that a kernel reads to use the whole matrix."""
        scales = self.scale_stride * ITEM_BYTES[self.scales.dtype] if self.quantized else 0
        return self.shape[0] * (self.stride + scales)

    def arguments(self, name: str = "weight") -> dict[str, Argument]:
        """The five arguments that pass a weight to a kernel, whose parameter for the payload is called `name`."""
        return {
            name: self.payload,
            "stride": self.stride,
            "scales": self.scales,
            "scale_stride": self.scale_stride,
            "shift": self.shift,
        }


class CudaKernel(Protocol):
    """A `@cuda.jit` function."""

    @property
    def py_func(self) -> Callable[..., None]: ...


@dataclass(frozen=True)
class Specialization:
    """What a kernel's machine code depends on, besides the device: the kernel, its parameters and threads per block.

    `parameters` are (name, type) in order. A type is "f16*" for a pointer, "i64" or "f32" for a scalar. The names are
    compared with those of the kernel when it is compiled (`compiler.check_parameters`).
    """

    kernel: KernelRef | CudaKernel
    parameters: tuple[tuple[str, str], ...]
    threads: int

    @property
    def source(self) -> tuple[str, str]:
        """Module and qualified name of the kernel."""
        if isinstance(self.kernel, KernelRef):
            return self.kernel.module, self.kernel.name
        return self.kernel.py_func.__module__, self.kernel.py_func.__qualname__

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.source[1].rpartition(".")[2]

    @property
    def function(self) -> CudaKernel:
        """The `@cuda.jit` function; a `KernelRef`'s module is imported now."""
        kernel: CudaKernel = self.kernel.load() if isinstance(self.kernel, KernelRef) else self.kernel
        return kernel

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(type_ for _, type_ in self.parameters)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}: {type_}' for name, type_ in self.parameters)})"


RowKind = Literal["chunks", "single rows"]
"""Rows of a run: neighbours in one sequence, as in a prompt, or a row that stands alone, as in decoding."""


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid (blocks), threads per block, arguments and bytes of dynamic shared memory.

    `kernel` is a `@cuda.jit` function, or a `KernelRef` that names one. `arguments` maps each of its parameters to an
    argument, in the kernel's order. Write them as `named(tokens=…, x=…)`, so that swapped arguments are an error.
    """

    kernel: KernelRef | CudaKernel
    grid: tuple[int, ...]
    threads: int
    arguments: Mapping[str, Argument]
    shared_bytes: int = 0
    long_context_variant: tuple[int, Launch] | None = None
    """`(position, launch)`: a faster variant to use from this position on, such as split-K attention. It may have a
    variant for later positions itself.
    """
    only_for: RowKind | None = None
    """The launch is left out of runs that have no such rows."""
    cluster: int = 0
    """Blocks of a cluster, neighbours along blockIdx.z; at most 8, on sm_90 and newer (`clusters`). 0: no clusters.
    The kernel must share its work among gridDim.x clusters, whatever that is: fewer are launched if the device cannot
    run all at once.
    """

    @cached_property
    def specialization(self) -> Specialization:
        """The kernel and all that its machine code depends on."""
        parameters = tuple(
            (name, f"{a.dtype}*" if isinstance(a, Array) else "f32" if isinstance(a, float) else "i64")
            for name, a in self.arguments.items()
        )
        return Specialization(self.kernel, parameters, self.threads)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.specialization.name

    @property
    def function(self) -> CudaKernel:
        """The `@cuda.jit` function."""
        return self.specialization.function

    def variant_for(self, position: int) -> Launch:
        """The launch to use when the run's last token has this position."""
        variant = self.long_context_variant
        return variant[1].variant_for(position) if variant and position >= variant[0] else self

    @property
    def variant_starts(self) -> list[int]:
        """Positions at which this launch changes to another variant."""
        variant = self.long_context_variant
        return [variant[0], *variant[1].variant_starts] if variant else []


@dataclass(frozen=True)
class Collective:
    """An exchange between ranks by NCCL, in the place of a launch. It exchanges whole rows; those beyond the run's have
    any values.
    """

    kind: Literal["all_reduce", "all_gather", "gather_parts", "broadcast"]
    """out = the sum of `source` over ranks; one row of each, side by side; the rows of each rank at its place of
    `parts`; rank 0's tokens.
    """
    source: Array
    """[T, columns], of this rank."""
    out: Array
    counter: Array
    """i32 [1] in device memory: rows of the current run. It tells whether these are tokens or rows with logits."""
    numbers: int
    """Of a row of this rank."""
    parts: tuple[tuple[int, int], ...] = ()
    """For each rank where its rows come to, and how many numbers a row has."""
    only_for: ClassVar[None] = None
    variant_starts: ClassVar[tuple[int, ...]] = ()

    @property
    def name(self) -> str:
        return f"nccl_{self.kind}"

    def variant_for(self, position: int) -> Collective:
        """Itself, at all positions."""
        return self


Work = Launch | Collective
"""What a step does in the stream."""


@dataclass(frozen=True)
class Peers:
    """What a rank's kernels need to exchange values with ranks on other GPUs: see `kernels.collectives`."""

    rank: int
    exchange: Array
    """f32 [2, n]: this rank's inbox."""
    arrivals: Array
    """i32 [ranks, blocks, 16]: flags and counts, after `exchange` in the same memory."""
    addresses: Array
    """i64 [ranks] in device memory: where the memory of each rank begins, as this device reaches it."""
    shares: tuple[range, ...]
    """The columns of the logits that each rank computes."""
    borders: Array
    """i64 [ranks + 1] in device memory: where these begin, and the number of all."""
    stop: int
    """Address of a 32-bit word, in host memory that kernels reach. Once it is not 0, they no longer wait."""
    alike: bool = True
    """Whether all GPUs have the same kernels and tiles: the same capability and number of multiprocessors."""
    communicator: Communicator | None = None
    """NCCL, if that exchanges values. Then nobody uses `exchange`, `arrivals`, `addresses` and `stop`."""


@dataclass(frozen=True)
class LaunchContext:
    """Facts about the device and the program, for an operator's launch function."""

    n_sms: int
    """Streaming multiprocessors of the device."""
    shared_limit: int
    """Bytes of shared memory a block may have."""
    tokens: Array
    """i32[1] in device memory: number of tokens of the current run, at most the program's `max_tokens`."""
    tiles: Array
    """i32[1 + max_tokens, 2] in device memory: the run's rows in tiles, as `program.write_tiles` lists them."""
    zeros: Callable[[int], Array]
    """zeros(n): allocate n int32 for the program, initially 0. Kernels set them back to 0."""
    wgmma: bool = False
    """Whether kernels by wgmma may be used: on devices of compute capability 9.0 only, not in batch-invariant runs."""
    bulk_copies: bool = False
    """Whether the device has `cp.async.bulk`: from compute capability 9.0 on."""
    batch_invariant: bool = False
    """Whether all rows use the kernels for rows of many sequences, those of a prompt's chunk as well."""
    peers: Peers | None = None
    """The ranks with which the device shares a model, if it does."""


def scales_of(cache: Array) -> dict[str, Argument]:
    """The argument for kernels that know q8_0: bytes from the beginning of a cache's quants to that of its scales."""
    return named(scales_at=math.prod(cache.shape))


def named(**arguments: Argument) -> dict[str, Argument]:
    """The arguments of a launch, by the names of the kernel's parameters and in their order."""
    return arguments


def paged(cache: Array, positions: Array, sequences: Array, page_table: Array) -> dict[str, Argument]:
    """The arguments that tell a kernel where tokens lie in a KV cache [pages, n_kv_heads, page, head_dim].

    Raises `UnsupportedError` if the page is not a power of two: kernels shift and mask.
    """
    page = cache.shape[2]
    if page & (page - 1):
        raise UnsupportedError(f"a page of {page} tokens: kernels for CUDA want a power of two, such as 32")
    return named(
        positions=positions, sequences=sequences, page_table=page_table, table_stride=page_table.shape[1],
        log2_page=page.bit_length() - 1,
    )  # fmt: skip
