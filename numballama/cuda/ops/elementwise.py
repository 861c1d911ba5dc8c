"""Operators that move little memory: how the kernels of `basic_kernels` are launched."""

from __future__ import annotations

from ...quantization.types import KV_TYPES as CACHE
from ...quantization.types import LINEAR_TYPES as MATRIX
from ...registry import kernel
from ..launch import Array, Gpu, KernelFile, Launch, Matrix

kernels = KernelFile("numballama.kernels_cuda")

THREADS = 256


def blocks_for(numbers: int) -> int:
    """Blocks that give each number a thread."""
    return -(-numbers // THREADS)


@kernel("embedding", "cuda", "i32", MATRIX)
def embedding(gpu: Gpu, ids: Array, table: Matrix, out: Array) -> list[Launch]:
    tokens, columns = out.shape
    weight = (table.payload, table.stride, table.scales, table.scale_stride, table.shift)
    arguments = (gpu.tokens, ids, *weight, out, columns)
    return [Launch(kernels.embedding_kernel, (blocks_for(columns), tokens), THREADS, arguments)]


@kernel("rope_angles", "cuda", "i32", "f32")
def rope_angles(gpu: Gpu, positions: Array, frequencies: Array, out: Array) -> list[Launch]:
    tokens, pairs = out.shape[0], frequencies.shape[0]
    grid = blocks_for(pairs), tokens
    return [Launch(kernels.rope_angles_kernel, grid, THREADS, (gpu.tokens, positions, frequencies, out, pairs))]


@kernel("rmsnorm", "cuda", "f32", "f32")
def rmsnorm(gpu: Gpu, x: Array, weight: Array, out: Array, eps: float) -> list[Launch]:
    return [Launch(kernels.rmsnorm_kernel, (1, x.shape[0]), THREADS, (gpu.tokens, x, weight, out, x.shape[1], eps))]


@kernel("head_norm", "cuda", "f32", "f32")
def head_norm(gpu: Gpu, x: Array, weight: Array, out: Array, eps: float) -> list[Launch]:
    tokens, columns = x.shape
    head_dim = weight.shape[0]
    grid = -(-columns // head_dim // (THREADS // 32)), tokens
    return [Launch(kernels.head_norm_kernel, grid, THREADS, (gpu.tokens, x, weight, out, columns, head_dim, eps))]


@kernel("quantize", "cuda", "f32")
def quantize(gpu: Gpu, x: Array, out: Array, scales: Array, group: int) -> list[Launch]:
    groups = scales.shape[1]
    grid = -(-groups // (THREADS // 32)), x.shape[0]
    return [Launch(kernels.quantize_kernel, grid, THREADS, (gpu.tokens, x, out, scales, x.shape[1], group, groups))]


@kernel("bias", "cuda", "f32", "f32")
def bias(gpu: Gpu, x: Array, weight: Array, out: Array) -> list[Launch]:
    tokens, columns = x.shape
    return [Launch(kernels.bias_kernel, (blocks_for(columns), tokens), THREADS, (gpu.tokens, x, weight, out, columns))]


@kernel("rope", "cuda", "f32", "f32")
def rope(gpu: Gpu, x: Array, angles: Array, out: Array, head_dim: int, interleaved: int) -> list[Launch]:
    tokens, columns = x.shape
    arguments = (gpu.tokens, x, angles, out, columns, head_dim, interleaved)
    return [Launch(kernels.rope_kernel, (blocks_for(columns // 2), tokens), THREADS, arguments)]


@kernel("kv_write", "cuda", "f32", CACHE, "i32", "i32")
def kv_write(gpu: Gpu, x: Array, cache: Array, positions: Array, sequences: Array) -> list[Launch]:
    _, heads, context, head_dim = cache.shape
    arguments = (gpu.tokens, x, cache, positions, sequences, heads, context, head_dim)
    return [Launch(kernels.kv_write_kernel, (blocks_for(heads * head_dim), x.shape[0]), THREADS, arguments)]


@kernel("rope_kv_write", "cuda", "f32", "f32", "f32", CACHE, "i32", "i32", "f32", CACHE)
def rope_kv_write(
    gpu: Gpu, q: Array, angles: Array, k: Array, k_cache: Array, positions: Array, sequences: Array, v: Array,
    v_cache: Array, out: Array, head_dim: int, interleaved: int,
) -> list[Launch]:  # fmt: skip
    tokens, q_rows = q.shape
    arguments = (
        gpu.tokens, q, angles, k, k_cache, positions, sequences, v, v_cache, out, q_rows, k.shape[1], head_dim,
        interleaved, k_cache.shape[2],
    )  # fmt: skip
    return [Launch(kernels.rope_kv_write_kernel, (blocks_for(q_rows // 2), tokens), THREADS, arguments)]


@kernel("swiglu", "cuda", "f32", "f32")
def swiglu(gpu: Gpu, gate: Array, up: Array, out: Array) -> list[Launch]:
    tokens, columns = out.shape
    return [Launch(kernels.swiglu_kernel, (blocks_for(columns), tokens), THREADS, (gpu.tokens, gate, up, out, columns))]


@kernel("add", "cuda", "f32", "f32")
def add(gpu: Gpu, a: Array, b: Array, out: Array) -> list[Launch]:
    tokens, columns = out.shape
    return [Launch(kernels.add_kernel, (blocks_for(columns), tokens), THREADS, (gpu.tokens, a, b, out, columns))]


@kernel("last", "cuda", "f32")
def last(gpu: Gpu, x: Array, out: Array) -> list[Launch]:
    columns = x.shape[1]
    return [Launch(kernels.last_kernel, (blocks_for(columns), 1), THREADS, (gpu.tokens, x, out, columns))]


ARGMAX_BLOCKS = 64


@kernel(
    "argmax",
    "cuda",
    "f32",
    values=lambda x, workers: (x[0], ARGMAX_BLOCKS),
    places=lambda x, workers: (x[0], ARGMAX_BLOCKS),
)
def argmax(gpu: Gpu, x: Array, out: Array, values: Array, places: Array) -> list[Launch]:
    tokens, columns = x.shape
    parts = min(ARGMAX_BLOCKS, -(-columns // THREADS))
    arguments = (gpu.tokens, x, out, columns, values, places, gpu.zeros(tokens))
    return [Launch(kernels.argmax_kernel, (parts, tokens), THREADS, arguments)]


def _launch_linear_int8(
    gpu: Gpu, xq: Array, xs: Array, weight: Matrix, residual: Array | None, out: Array, group: int
) -> list[Launch]:
    rows, columns = weight.shape
    matrix = (weight.payload, weight.stride, weight.scales, weight.scale_stride, weight.shift)
    arguments = (
        gpu.tokens, xq, xs, *matrix, residual or out, int(residual is not None), out, rows, columns, group, xs.shape[1],
    )  # fmt: skip
    return [Launch(kernels.linear_int8_kernel, (-(-rows // (THREADS // 32)), xq.shape[0]), THREADS, arguments)]


@kernel("linear", "cuda", "i8", "f32", "int8")
def linear_int8(gpu: Gpu, xq: Array, xs: Array, weight: Matrix, out: Array, group: int) -> list[Launch]:
    return _launch_linear_int8(gpu, xq, xs, weight, None, out, group)


@kernel("linear_add", "cuda", "i8", "f32", "int8", "f32")
def linear_add_int8(
    gpu: Gpu, xq: Array, xs: Array, weight: Matrix, residual: Array, out: Array, group: int
) -> list[Launch]:
    return _launch_linear_int8(gpu, xq, xs, weight, residual, out, group)
