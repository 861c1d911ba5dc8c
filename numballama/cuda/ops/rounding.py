"""Rows in 16 bits: how the kernel of `kernels/rounding.py` is launched, for `gemm` and `wgmma_gemm`."""

from __future__ import annotations

from ...memory import ceil_div, round_up
from ...registry import KernelRef
from ..launch import Array, Launch, LaunchContext, named

ROUND = KernelRef("numballama.cuda.kernels.rounding", "round_kernel")


def round_rows(
    ctx: LaunchContext, x: Array, stride: int, out: Array, scales: Array, padded: int, norm: Array | None = None,
    eps: float = 0.0, exchanged: bool = False, every_row: int = 0, split: int = 0,
) -> Launch:  # fmt: skip
    """The launch that rounds rows of x, `stride` elements apart: see `kernels/rounding.py`."""
    rows, columns = x.shape
    arguments = named(
        tokens=ctx.tokens, every_row=every_row, x=x, stride=stride, norm=norm or x, normed=int(norm is not None),
        eps=eps, out=out, scales=scales, columns=columns, padded=padded, exchanged=int(exchanged), split=split,
    )  # fmt: skip
    threads = min(1024, max(64, round_up(ceil_div(padded, 16), 32)))  # a row in registers, 16 elements a thread
    return Launch(ROUND, (rows,), threads, arguments)
