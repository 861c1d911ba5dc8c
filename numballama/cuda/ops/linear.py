"""The linear operators. Each is registered once, and uses `gemv` for few tokens and `gemm` for many.

`residual` is added to the result, `norm` is the weight of an RMSNorm before it. A fused operator needs weights of one
type: if a model mixes types, the ops are not fused.
"""

from __future__ import annotations

from ...memory import ceil_div
from ...quantization.types import FLOAT_KV_TYPES, LINEAR_TYPES
from ...registry import KernelRef, kernel
from ..kernels.params import ELEMENTWISE_THREADS
from ..launch import Array, Launch, LaunchContext, Matrix, named
from . import gemm, gemv
from .gemm import FEW, workspace_shape

LINEAR_INT8 = KernelRef("numballama.kernels_cuda", "linear_int8_kernel")


def linear(ctx: LaunchContext, x: Array, weight: Matrix, out: Array, workspace: Array) -> list[Launch]:
    if x.shape[0] > FEW:
        return gemm.linear(ctx, x, None, 0.0, [(weight, out)], None, workspace)
    return gemv.linear(ctx, x, None, 0.0, weight, None, out)


def linear_add(
    ctx: LaunchContext, x: Array, weight: Matrix, residual: Array, out: Array, workspace: Array
) -> list[Launch]:
    if x.shape[0] > FEW:
        return gemm.linear(ctx, x, None, 0.0, [(weight, out)], residual, workspace)
    return gemv.linear(ctx, x, None, 0.0, weight, residual, out)


def norm_linear(
    ctx: LaunchContext, x: Array, norm: Array, weight: Matrix, out: Array, workspace: Array, eps: float
) -> list[Launch]:
    if x.shape[0] > FEW:
        return gemm.linear(ctx, x, norm, eps, [(weight, out)], None, workspace)
    return gemv.linear(ctx, x, norm, eps, weight, None, out)


def gate_up(ctx: LaunchContext, x: Array, w1: Matrix, w3: Matrix, out: Array, workspace: Array) -> list[Launch]:
    if x.shape[0] > FEW:
        return gemm.gate_up(ctx, x, None, 0.0, w1, w3, out, workspace)
    return gemv.gate_up(ctx, x, None, 0.0, w1, w3, out)


def norm_gate_up(
    ctx: LaunchContext, x: Array, norm: Array, w1: Matrix, w3: Matrix, out: Array, workspace: Array, eps: float
) -> list[Launch]:
    if x.shape[0] > FEW:
        return gemm.gate_up(ctx, x, norm, eps, w1, w3, out, workspace)
    return gemv.gate_up(ctx, x, norm, eps, w1, w3, out)


def qkv(
    ctx: LaunchContext, x: Array, wq: Matrix, wk: Matrix, wv: Matrix, q: Array, k: Array, v: Array, workspace: Array
) -> list[Launch]:
    if x.shape[0] > FEW:
        return gemm.linear(ctx, x, None, 0.0, [(wq, q), (wk, k), (wv, v)], None, workspace)
    return gemv.qkv(ctx, x, None, 0.0, wq, wk, wv, q, k, v)


def norm_qkv(
    ctx: LaunchContext, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, q: Array, k: Array, v: Array,
    workspace: Array, eps: float,
) -> list[Launch]:  # fmt: skip
    if x.shape[0] > FEW:
        return gemm.linear(ctx, x, norm, eps, [(wq, q), (wk, k), (wv, v)], None, workspace)
    return gemv.qkv(ctx, x, norm, eps, wq, wk, wv, q, k, v)


def norm_qkv_rope(
    ctx: LaunchContext, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, angles: Array, k_cache: Array,
    positions: Array, sequences: Array, page_table: Array, v_cache: Array, out: Array, workspace: Array, eps: float,
    head_dim: int, interleaved: int,
) -> list[Launch]:  # fmt: skip
    if x.shape[0] > FEW:
        return gemm.norm_qkv_rope(
            ctx, x, norm, wq, wk, wv, angles, k_cache, positions, sequences, page_table, v_cache, out, workspace, eps,
            head_dim, interleaved,
        )  # fmt: skip
    return gemv.norm_qkv_rope(
        ctx, x, norm, wq, wk, wv, angles, k_cache, positions, sequences, page_table, v_cache, out, eps, head_dim,
        interleaved,
    )  # fmt: skip


for _type in LINEAR_TYPES:
    kernel("linear", "cuda", "f32", _type, workspace=workspace_shape(_type, 1, 1))(linear)
    kernel("linear_add", "cuda", "f32", _type, "f32", workspace=workspace_shape(_type, 1, 1))(linear_add)
    kernel("norm_linear", "cuda", "f32", "f32", _type, workspace=workspace_shape(_type, 2, 1))(norm_linear)
    kernel("gate_up", "cuda", "f32", _type, _type, workspace=workspace_shape(_type, 1, 2, results=1))(gate_up)
    kernel(
        "norm_gate_up", "cuda", "f32", "f32", _type, _type, workspace=workspace_shape(_type, 2, 2, results=1)
    )(norm_gate_up)  # fmt: skip
    kernel("qkv", "cuda", "f32", _type, _type, _type, workspace=workspace_shape(_type, 1, 3))(qkv)
    kernel("norm_qkv", "cuda", "f32", "f32", _type, _type, _type, workspace=workspace_shape(_type, 2, 3))(norm_qkv)
    for _cache in FLOAT_KV_TYPES:
        kernel(
            "norm_qkv_rope", "cuda", "f32", "f32", _type, _type, _type, "f32", _cache, "i32", "i32", "i32", _cache,
            workspace=workspace_shape(_type, 2, 3, whole=True, results=3),
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
