"""The linear operators. Each is registered once: `gemv` for one token, `skinny` for up to 128, `gemm` for more.

float32 weights have no kernel in `skinny`: `gemv` multiplies them with up to `FEW` tokens, and `gemm` with more.

`residual` is added to the result, `norm` is the weight of an RMSNorm before it. A fused operator needs weights of one
type, but values may have another than queries and keys (`MIXED`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ...memory import ceil_div
from ...quantization.types import FLOAT_KV_TYPES, LINEAR_TYPES
from ...registry import KernelRef, kernel
from ..kernels.params import ELEMENTWISE_THREADS
from ..launch import Array, Launch, LaunchContext, Matrix, named
from . import gemm, gemv, skinny
from .collectives import Sums
from .gemm import FEW

LINEAR_INT8 = KernelRef("numballama.kernels_cuda", "linear_int8_kernel")

EXACT = 1
"""Up to this number of tokens, `gemv` multiplies all types; it does not round activations to 16 bits."""


def _kernels_for(ctx: LaunchContext, x: Array, weight: Matrix) -> Literal["gemv", "skinny", "gemm"]:
    """The kernels that are fastest for x and a weight of this type."""
    tokens, in_float32 = x.shape[0], weight.payload.dtype == "f32"
    if tokens <= (FEW if in_float32 else EXACT):
        return "gemv"
    return "skinny" if tokens <= skinny.MOST and not in_float32 else "gemm"


def _linear(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, weight: Matrix, residual: Array | None, out: Array,
    workspace: Array,
) -> list[Launch]:  # fmt: skip
    kernels = _kernels_for(ctx, x, weight)
    if kernels == "gemv":
        return gemv.linear(ctx, x, norm, eps, weight, residual, out)
    if kernels == "skinny":
        return skinny.linear(ctx, x, norm, eps, weight, residual, out, workspace)
    return gemm.linear(ctx, x, norm, eps, [(weight, out)], residual, workspace)


def _gate_up(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, w1: Matrix, w3: Matrix, out: Array, workspace: Array
) -> list[Launch]:
    kernels = _kernels_for(ctx, x, w1)
    if kernels == "gemv":
        return gemv.gate_up(ctx, x, norm, eps, w1, w3, out)
    if kernels == "skinny":
        return skinny.gate_up(ctx, x, norm, eps, w1, w3, out, workspace)
    return gemm.gate_up(ctx, x, norm, eps, w1, w3, out, workspace)


def _qkv(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, weights: tuple[Matrix, Matrix, Matrix],
    outs: tuple[Array, Array, Array], workspace: Array,
) -> list[Launch]:  # fmt: skip
    kernels = _kernels_for(ctx, x, weights[0])
    if kernels == "gemv":
        return gemv.qkv(ctx, x, norm, eps, *weights, *outs)
    if kernels == "skinny":
        return skinny.qkv(ctx, x, norm, eps, weights, outs, workspace)
    return gemm.linear(ctx, x, norm, eps, list(zip(weights, outs, strict=True)), None, workspace)


def linear(ctx: LaunchContext, x: Array, weight: Matrix, out: Array, workspace: Array) -> list[Launch]:
    return _linear(ctx, x, None, 0.0, weight, None, out, workspace)


def linear_add(
    ctx: LaunchContext, x: Array, weight: Matrix, residual: Array, out: Array, workspace: Array
) -> list[Launch]:
    return _linear(ctx, x, None, 0.0, weight, residual, out, workspace)


def _linear_all_reduce(
    ctx: LaunchContext, x: Array, weight: Matrix, residual: Array | None, out: Array, workspace: Array, sums: Sums
) -> list[Launch]:
    kernels = _kernels_for(ctx, x, weight)
    if kernels == "gemv":
        return gemv.linear_all_reduce(ctx, x, weight, residual, out, sums)
    if kernels == "skinny":
        return skinny.linear_all_reduce(ctx, x, weight, residual, out, workspace, sums)
    return gemm.linear_all_reduce(ctx, x, weight, residual, out, workspace, sums)


def linear_all_reduce(
    ctx: LaunchContext, x: Array, weight: Matrix, exchange: Array, arrivals: Array, out: Array, workspace: Array,
    rank: int, half: int,
) -> list[Launch]:  # fmt: skip
    return _linear_all_reduce(ctx, x, weight, None, out, workspace, Sums(exchange, arrivals, rank, half))


def linear_add_all_reduce(
    ctx: LaunchContext, x: Array, weight: Matrix, residual: Array, exchange: Array, arrivals: Array, out: Array,
    workspace: Array, rank: int, half: int,
) -> list[Launch]:  # fmt: skip
    return _linear_all_reduce(ctx, x, weight, residual, out, workspace, Sums(exchange, arrivals, rank, half))


def norm_linear(
    ctx: LaunchContext, x: Array, norm: Array, weight: Matrix, out: Array, workspace: Array, eps: float
) -> list[Launch]:
    return _linear(ctx, x, norm, eps, weight, None, out, workspace)


def gate_up(ctx: LaunchContext, x: Array, w1: Matrix, w3: Matrix, out: Array, workspace: Array) -> list[Launch]:
    return _gate_up(ctx, x, None, 0.0, w1, w3, out, workspace)


def norm_gate_up(
    ctx: LaunchContext, x: Array, norm: Array, w1: Matrix, w3: Matrix, out: Array, workspace: Array, eps: float
) -> list[Launch]:
    return _gate_up(ctx, x, norm, eps, w1, w3, out, workspace)


def qkv(
    ctx: LaunchContext, x: Array, wq: Matrix, wk: Matrix, wv: Matrix, q: Array, k: Array, v: Array, workspace: Array
) -> list[Launch]:
    return _qkv(ctx, x, None, 0.0, (wq, wk, wv), (q, k, v), workspace)


def norm_qkv(
    ctx: LaunchContext, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, q: Array, k: Array, v: Array,
    workspace: Array, eps: float,
) -> list[Launch]:  # fmt: skip
    return _qkv(ctx, x, norm, eps, (wq, wk, wv), (q, k, v), workspace)


def norm_qkv_rope(
    ctx: LaunchContext, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, angles: Array, k_cache: Array,
    positions: Array, sequences: Array, page_table: Array, v_cache: Array, out: Array, workspace: Array, eps: float,
    head_dim: int, interleaved: int,
) -> list[Launch]:  # fmt: skip
    kernels = _kernels_for(ctx, x, wq)
    if kernels == "skinny":
        return skinny.norm_qkv_rope(
            ctx, x, norm, wq, wk, wv, angles, k_cache, positions, sequences, page_table, v_cache, out, workspace, eps,
            head_dim, interleaved,
        )  # fmt: skip
    if kernels == "gemm":
        return gemm.norm_qkv_rope(
            ctx, x, norm, wq, wk, wv, angles, k_cache, positions, sequences, page_table, v_cache, out, workspace, eps,
            head_dim, interleaved,
        )  # fmt: skip
    return gemv.norm_qkv_rope(
        ctx, x, norm, wq, wk, wv, angles, k_cache, positions, sequences, page_table, v_cache, out, eps, head_dim,
        interleaved,
    )  # fmt: skip


def _workspace(
    dtype: str, first: int, count: int, *, paired: bool = False, rope: bool = False, mixed: bool = False
) -> Callable[..., tuple[int, ...]]:
    """The workspace of an operator whose operands from number `first` on are `count` weights of type `dtype`; some have
    another type if `mixed`.
    """
    larger = gemm.workspace_shape(dtype, first, count, whole=rope, results=3 if rope else int(paired))
    return skinny.workspace_shape(dtype, first, count, paired, 3 if rope else 0, larger, mixed)


MIXED = {"q4_k": "q6_k", "q5_k": "q6_k"}
"""Type of queries and keys → that of values where it is another one, as in half of the layers of Q4_K_M files."""


def _mixed_workspace(kinds: tuple[str, str], first: int, rope: bool = False) -> Callable[..., tuple[int, ...]]:
    """The workspace for weights of queries, keys and values of two types: the larger of what each type wants."""
    each = [_workspace(kind, first, 3, rope=rope, mixed=True) for kind in kinds]

    def shape(*operands: tuple[int, ...], workers: int) -> tuple[int, ...]:
        return max(one(*operands, workers=workers) for one in each)

    return shape


for _type in LINEAR_TYPES:
    kernel("linear", "cuda", "f32", _type, workspace=_workspace(_type, 1, 1))(linear)
    kernel("linear_add", "cuda", "f32", _type, "f32", workspace=_workspace(_type, 1, 1))(linear_add)
    kernel("linear_all_reduce", "cuda", "f32", _type, "f32", "i32", workspace=_workspace(_type, 1, 1))(
        linear_all_reduce
    )
    kernel("linear_add_all_reduce", "cuda", "f32", _type, "f32", "f32", "i32", workspace=_workspace(_type, 1, 1))(
        linear_add_all_reduce
    )
    kernel("norm_linear", "cuda", "f32", "f32", _type, workspace=_workspace(_type, 2, 1))(norm_linear)
    kernel("gate_up", "cuda", "f32", _type, _type, workspace=_workspace(_type, 1, 2, paired=True))(gate_up)
    kernel(
        "norm_gate_up", "cuda", "f32", "f32", _type, _type, workspace=_workspace(_type, 2, 2, paired=True)
    )(norm_gate_up)  # fmt: skip
    kernel("qkv", "cuda", "f32", _type, _type, _type, workspace=_workspace(_type, 1, 3))(qkv)
    kernel("norm_qkv", "cuda", "f32", "f32", _type, _type, _type, workspace=_workspace(_type, 2, 3))(norm_qkv)
    for _cache in FLOAT_KV_TYPES:
        kernel(
            "norm_qkv_rope", "cuda", "f32", "f32", _type, _type, _type, "f32", _cache, "i32", "i32", "i32", _cache,
            workspace=_workspace(_type, 2, 3, rope=True),
        )(norm_qkv_rope)  # fmt: skip


for _type, _other in MIXED.items():
    _kinds = _type, _other
    kernel("qkv", "cuda", "f32", _type, _type, _other, workspace=_mixed_workspace(_kinds, 1))(qkv)
    kernel("norm_qkv", "cuda", "f32", "f32", _type, _type, _other, workspace=_mixed_workspace(_kinds, 2))(norm_qkv)
    for _cache in FLOAT_KV_TYPES:
        kernel(
            "norm_qkv_rope", "cuda", "f32", "f32", _type, _type, _other, "f32", _cache, "i32", "i32", "i32", _cache,
            workspace=_mixed_workspace(_kinds, 2, rope=True),
        )(norm_qkv_rope)  # fmt: skip


# int8 activations


def _linear_int8(
    ctx: LaunchContext, xq: Array, xs: Array, weight: Matrix, residual: Array | None, out: Array, group: int
) -> list[Launch]:
    rows, columns = weight.shape
    arguments = named(
        tokens=ctx.tokens, xq=xq, xs=xs, **weight.arguments(), residual=residual or out,
        added=int(residual is not None), out=out, rows=rows, columns=columns, group=group, groups=xs.shape[1],
    )  # fmt: skip
    grid = ceil_div(rows, ELEMENTWISE_THREADS // 32), xq.shape[0]
    return [Launch(LINEAR_INT8, grid, ELEMENTWISE_THREADS, arguments)]


@kernel("linear", "cuda", "i8", "f32", "int8")
def linear_int8(ctx: LaunchContext, xq: Array, xs: Array, weight: Matrix, out: Array, group: int) -> list[Launch]:
    return _linear_int8(ctx, xq, xs, weight, None, out, group)


@kernel("linear_add", "cuda", "i8", "f32", "int8", "f32")
def linear_add_int8(
    ctx: LaunchContext, xq: Array, xs: Array, weight: Matrix, residual: Array, out: Array, group: int
) -> list[Launch]:
    return _linear_int8(ctx, xq, xs, weight, residual, out, group)
