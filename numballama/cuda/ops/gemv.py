"""Linear layers for a few tokens: sizes, and how the kernels of `gemv_kernels` are launched."""

from __future__ import annotations

from ...quantization.types import KV_TYPES as CACHE
from ...quantization.types import LINEAR_TYPES as MATRIX
from ...registry import kernel
from ..launch import ELEMENTS_PER_16_BYTES, QUANTIZED, Argument, Array, Gpu, KernelFile, Launch, Matrix

kernels = KernelFile("numballama.cuda.kernels.gemv")

WARPS = 8
THREADS = 32 * WARPS
CHUNK_BYTES, SCALE_BYTES = 512, 128
"""Of a chunk of a row: 16 bytes a lane, and a word a lane with their scale. A stage has two chunks of each row."""
SCALES_AT = 2 * CHUNK_BYTES
"""Where a row's scales lie in a stage; a lane's are 12 bytes a lane nearer than its payload."""
SIX_AT, SIX_SCALES_AT, SIX_FACTORS_AT = CHUNK_BYTES, CHUNK_BYTES + 256, CHUNK_BYTES + 256 + SCALE_BYTES
"""Where in a row of q6_k the upper two bits lie, the words with scales and those with their factor."""
LANE_STEP = 132
"""Distance of a chunk's rows of x in float32: so that writing it meets no bank twice either (`products`)."""


def stage_of(payload: str) -> tuple[int, int, int]:
    """By the payload's type: a lane's numbers of a chunk, bytes of a row of a stage, float32 places of a chunk of x.

    On the device: `products.numbers_together`, `row_bytes` and `x_step`.
    """
    numbers = ELEMENTS_PER_16_BYTES[payload]
    if payload in QUANTIZED:
        six = payload == "q6_k"
        return numbers, SIX_FACTORS_AT + SCALE_BYTES if six else 2 * (CHUNK_BYTES + SCALE_BYTES), numbers * 24 + 64
    return numbers, 2 * CHUNK_BYTES, numbers // 4 * LANE_STEP


DEPTH = 4
"""Stages of a warp's ring."""
TWO_FIT = 80 << 10
"""Least bytes of shared memory of a block: two kernels' blocks then share a multiprocessor of an H200, but not three.
With three, blocks of the third bunch up where the first one's end early, and other multiprocessors have nothing to do.
"""


def _shape(gpu: Gpu, weight: Matrix, pairs: int, tokens: int) -> tuple[tuple[int, int], tuple[int, ...], int]:
    """Grid, the last arguments (slices to ahead) and the bytes of shared memory of a `stream`."""
    blocks = min(gpu.processors, pairs)
    mine = -(-pairs // blocks)
    numbers, row, step = stage_of(weight.payload.dtype)
    chunks = -(-weight.shape[1] // (32 * numbers))
    # a stage's time for each stage of the busiest warp, and half of one for each pair's sums to meet
    slices = min((1, 2, 4, 8), key=lambda n: -(-mine // (WARPS // n)) * (-(-chunks // (2 * n)) + 0.5))
    ring = WARPS * DEPTH * 2 * row // 4
    sums = ring + (chunks + 1) * step
    partial = sums + WARPS
    places = slices, slices.bit_length() - 1, ring, sums, partial, chunks, *divmod(pairs, blocks), DEPTH - 1
    return (blocks, tokens), places, max(4 * (partial + 2 * mine * slices), min(TWO_FIT, gpu.shared_limit))


def _launch_linear(
    gpu: Gpu, x: Array, norm: Array | None, eps: float, weight: Matrix, residual: Array | None, out: Array
) -> list[Launch]:
    rows, columns = weight.shape
    grid, places, shared = _shape(gpu, weight, -(-rows // 2), x.shape[0])
    arguments: tuple[Argument, ...] = (
        gpu.tokens, x, norm or x, int(norm is not None), eps, weight.payload, weight.stride, weight.scales,
        weight.scale_stride, weight.shift, residual or x, int(residual is not None), out, rows, columns, *places,
    )  # fmt: skip
    return [Launch(kernels.linear_kernel, grid, THREADS, arguments, shared)]


@kernel("linear", "cuda", "f32", MATRIX)
def linear(gpu: Gpu, x: Array, weight: Matrix, out: Array) -> list[Launch]:
    return _launch_linear(gpu, x, None, 0.0, weight, None, out)


@kernel("linear_add", "cuda", "f32", MATRIX, "f32")
def linear_add(gpu: Gpu, x: Array, weight: Matrix, residual: Array, out: Array) -> list[Launch]:
    return _launch_linear(gpu, x, None, 0.0, weight, residual, out)


@kernel("norm_linear", "cuda", "f32", "f32", MATRIX)
def norm_linear(gpu: Gpu, x: Array, norm: Array, weight: Matrix, out: Array, eps: float) -> list[Launch]:
    return _launch_linear(gpu, x, norm, eps, weight, None, out)


def _launch_gate_up(
    gpu: Gpu, x: Array, norm: Array | None, eps: float, w1: Matrix, w3: Matrix, out: Array
) -> list[Launch]:
    rows, columns = w1.shape
    grid, places, shared = _shape(gpu, w1, rows, x.shape[0])
    arguments: tuple[Argument, ...] = (
        gpu.tokens, x, norm or x, int(norm is not None), eps, w1.payload, w3.payload, w1.stride, w1.scales, w3.scales,
        w1.scale_stride, w1.shift, out, rows, columns, *places,
    )  # fmt: skip
    return [Launch(kernels.gate_up_kernel, grid, THREADS, arguments, shared)]


def gate_up(gpu: Gpu, x: Array, w1: Matrix, w3: Matrix, out: Array) -> list[Launch]:
    return _launch_gate_up(gpu, x, None, 0.0, w1, w3, out)


def norm_gate_up(gpu: Gpu, x: Array, norm: Array, w1: Matrix, w3: Matrix, out: Array, eps: float) -> list[Launch]:
    return _launch_gate_up(gpu, x, norm, eps, w1, w3, out)


def _qkv_operands(
    gpu: Gpu, x: Array, norm: Array | None, eps: float, weights: tuple[Matrix, Matrix, Matrix]
) -> tuple[tuple[int, ...], tuple[Argument, ...], tuple[int, ...], int]:
    wq, wk, _ = weights
    pairs = (wq.shape[0] + 2 * wk.shape[0]) // 2
    grid, places, shared = _shape(gpu, wq, pairs, x.shape[0])
    arguments: tuple[Argument, ...] = (
        gpu.tokens, x, norm or x, int(norm is not None), eps, *(w.payload for w in weights), wq.stride,
        *(w.scales for w in weights), wq.scale_stride, wq.shift,
    )  # fmt: skip
    return grid, arguments, (wq.shape[1], *places), shared


def _launch_qkv(
    gpu: Gpu, x: Array, norm: Array | None, eps: float, weights: tuple[Matrix, Matrix, Matrix], *out: Array
) -> list[Launch]:
    grid, first, rest, shared = _qkv_operands(gpu, x, norm, eps, weights)
    rows = weights[0].shape[0], weights[1].shape[0]
    return [Launch(kernels.qkv_kernel, grid, THREADS, (*first, *out, *rows, *rest), shared)]


def qkv(gpu: Gpu, x: Array, wq: Matrix, wk: Matrix, wv: Matrix, q: Array, k: Array, v: Array) -> list[Launch]:
    return _launch_qkv(gpu, x, None, 0.0, (wq, wk, wv), q, k, v)


def norm_qkv(
    gpu: Gpu, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, q: Array, k: Array, v: Array, eps: float
) -> list[Launch]:
    return _launch_qkv(gpu, x, norm, eps, (wq, wk, wv), q, k, v)


def norm_qkv_rope(
    gpu: Gpu, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, angles: Array, k_cache: Array,
    positions: Array, sequences: Array, v_cache: Array, out: Array, eps: float, head_dim: int, interleaved: int,
) -> list[Launch]:  # fmt: skip
    grid, first, rest, shared = _qkv_operands(gpu, x, norm, eps, (wq, wk, wv))
    middle = (angles, positions, sequences, out, k_cache, v_cache, wq.shape[0], wk.shape[0], head_dim, interleaved)
    cache = k_cache.shape[2], k_cache.shape[1], 1.0 / head_dim
    return [Launch(kernels.qkv_rope_kernel, grid, THREADS, (*first, *middle, *cache, *rest), shared)]


for _type in MATRIX:  # one kernel streams weights of one type: where a model mixes them, the fusion is left out
    kernel("gate_up", "cuda", "f32", _type, _type)(gate_up)
    kernel("norm_gate_up", "cuda", "f32", "f32", _type, _type)(norm_gate_up)
    kernel("qkv", "cuda", "f32", _type, _type, _type)(qkv)
    kernel("norm_qkv", "cuda", "f32", "f32", _type, _type, _type)(norm_qkv)
    for _cache in CACHE:
        kernel("norm_qkv_rope", "cuda", "f32", "f32", _type, _type, _type, "f32", _cache, "i32", "i32", _cache)(
            norm_qkv_rope
        )
