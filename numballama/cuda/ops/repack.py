"""The launch that repacks blocks of a GGUF file during the upload. It is not an operator of a graph."""

from __future__ import annotations

from ...memory import ceil_div
from ...registry import KernelRef
from ..kernels.params import ELEMENTWISE_THREADS as THREADS
from ..launch import Array, Launch, Matrix, named
from ..repack import RUN

REPACK = KernelRef("numballama.cuda.kernels.repack", "repack_kernel")


def repack(source: Array, first: int, runs: int, weight: Matrix) -> Launch:
    """Repack `runs` runs of `RUN` elements, number `first` of the weight and those after it, whole blocks.

    `source` f16 [n] are these blocks as in the file. Bytes of padding are not written.
    """
    arguments = named(
        source=source, first=first, runs=runs, runs_of_row=weight.shape[1] // RUN, payload=weight.payload,
        scales=weight.scales, scale_stride=weight.scale_stride,
    )  # fmt: skip
    return Launch(REPACK, (ceil_div(runs, THREADS),), THREADS, arguments)
