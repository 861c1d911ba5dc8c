"""Linear layers for many tokens: Y[T, N] = X[T, K] · W[N, K]ᵀ; how the kernels of `gemm_kernels` are launched.

At 512 tokens a weight is used 512 times, so arithmetic is the floor: 2 · T · N · K operations; memory has to bring each
number of W once. An operator is one pass that brings X into 16 bits, one for each quantised weight (or for a part of
its rows) that expands it to float16 in scratch, and one that multiplies and finishes the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...quantization.types import KV_TYPES as CACHE
from ...quantization.types import LINEAR_TYPES as MATRIX
from ...registry import kernel
from ..launch import QUANTIZED, STAGED_BYTES, Argument, Array, Gpu, KernelFile, Launch, Matrix
from . import elementwise as basic
from . import gemv

kernels = KernelFile("numballama.cuda.kernels.gemm")

TILE, STEP = 128, 64
"""Tokens and columns of Y that a block computes, and columns of X and W that it takes at a time."""
THREADS = 128
TILE_BYTES = TILE * STEP * 2
F32_THREADS, F32_STEP, X_ROW, W_ROW = 256, 16, 64 + 4, 128 + 4
"""Of float32: a block computes 64 tokens × 128 columns, a thread 8 × 4; 16 columns of X and W at a time lie in shared
memory, turned so that numbers of one column are neighbours.
"""
FEW = 8
"""Up to so many tokens the kernels of `gemv_kernels` read the weights once for each of them."""


class _Space:
    """Scratch, given out in pieces."""

    def __init__(self, memory: Array) -> None:
        self._memory, self.used = memory, 0

    def take(self, shape: tuple[int, ...], dtype: str) -> Array:
        piece = Array(self._memory.address + self.used, shape, dtype)
        self.used += -(-piece.nbytes // 64) * 64
        assert self.used <= self._memory.nbytes
        return piece


def _padded(columns: int) -> int:
    return -(-columns // STEP) * STEP


KINDS = ("f32", "f16", "bf16", *QUANTIZED)
"""Types of payloads that `gemm_kernels` take."""
MOST_EXPANDED = 1 << 26
"""Numbers of a weight that are expanded to float16 at a time, where they need not be there all at once."""


def _expanded_rows(rows: int, columns: int) -> int:
    """How many rows of a weight are expanded at a time."""
    return min(rows, max(TILE, MOST_EXPANDED // columns // TILE * TILE))


def _stages(gpu: Gpu, blocks: int) -> int:
    """Stages of the ring: many where a multiprocessor has one block; else so few that it has room for two."""
    affordable = gpu.shared_limit // (2 * TILE_BYTES)
    return min(5 if blocks <= gpu.processors else 3, affordable)


def _rounded(
    gpu: Gpu, x: Array, norm: Array | None, eps: float, kind: str, space: _Space
) -> tuple[list[Launch], Array, Array]:
    """X in 16 bits, and its rows' scales."""
    tokens, columns = x.shape
    out, scales = space.take((tokens, _padded(columns)), kind), space.take((tokens,), "f32")
    arguments = (gpu.tokens, x, norm or x, int(norm is not None), eps, out, scales, columns, _padded(columns))
    return [Launch(kernels.round_kernel, (tokens,), 256, arguments)], out, scales


@dataclass(frozen=True)
class _Rows:
    """Rows of a weight in 16 bits, and what makes them so."""

    launches: list[Launch]
    payload: Array
    stride: int

    @property
    def early(self) -> int:
        return int(not self.launches)


def _rows(weight: Matrix, begin: int, end: int, expanded: Array | None) -> _Rows:
    columns = weight.shape[1]
    if expanded is None:
        at = weight.payload.address + begin * weight.stride
        return _Rows([], Array(at, (end - begin, columns), weight.payload.dtype), weight.stride)
    arguments = (
        weight.payload, weight.stride, weight.scales, weight.scale_stride, weight.shift, expanded, begin, columns,
    )  # fmt: skip
    return _Rows([Launch(kernels.expand_kernel, (end - begin,), 128, arguments)], expanded, 2 * columns)


def _kind(weight: Matrix) -> str:
    """The type in which tensor cores take a weight."""
    return "bf16" if weight.payload.dtype == "bf16" else "f16"


def _expanded(weights: Sequence[Matrix], rows: int, space: _Space) -> list[Array | None]:
    """Room for so many rows of each weight in float16, if they are quantised."""
    return [space.take((rows, w.shape[1]), "f16") if w.quantized else None for w in weights]


def _tiles(numbers: int, tile: int) -> int:
    return -(-numbers // tile)


def _in_pieces(
    gpu: Gpu, x: Array, weights: Sequence[Matrix], tile: int, space: _Space,
    launch: Callable[[list[_Rows], tuple[int, int], int, int, int], Launch],
) -> list[Launch]:  # fmt: skip
    """Launches for all rows of some weights of one shape; quantised ones, a part of the rows at a time."""
    rows, columns = weights[0].shape
    at_once = _expanded_rows(rows, columns) if weights[0].quantized else rows
    room, launches = _expanded(weights, at_once, space), []
    for begin in range(0, rows, at_once):
        end = min(rows, begin + at_once)
        parts = [_rows(weight, begin, end, array) for weight, array in zip(weights, room, strict=True)]
        grid = _tiles(x.shape[0], TILE), _tiles(end - begin, tile)
        launches += [made for part in parts for made in part.launches]
        launches.append(launch(parts, grid, begin, end, _stages(gpu, grid[0] * grid[1])))
    return launches


def _linear_f32(gpu: Gpu, x: Array, weight: Matrix, residual: Array | None, out: Array) -> list[Launch]:
    rows, columns = weight.shape
    arguments = (
        gpu.tokens, x, weight.payload, weight.stride // 4, residual or x, int(residual is not None), out, rows, columns,
    )  # fmt: skip
    shared = max(4 * F32_STEP * (X_ROW + W_ROW), 64 * STAGED_BYTES)
    grid = _tiles(x.shape[0], 64), _tiles(rows, TILE)
    return [Launch(kernels.gemm_f32_kernel, grid, F32_THREADS, arguments, shared)]


def _linears(
    gpu: Gpu, x: Array, norm: Array | None, eps: float, pairs: Sequence[tuple[Matrix, Array]],
    residual: Array | None, memory: Array,
) -> list[Launch]:  # fmt: skip
    """Weights that multiply the same x, each with its result."""
    space = _Space(memory)
    if pairs[0][0].payload.dtype == "f32":
        launches, normed = _normed(gpu, x, norm, eps, space)
        return launches + [made for w, out in pairs for made in _linear_f32(gpu, normed, w, residual, out)]
    launches, rounded, scales = _rounded(gpu, x, norm, eps, _kind(pairs[0][0]), space)
    for weight, out in pairs:

        def launch(parts: list[_Rows], grid: tuple[int, int], begin: int, end: int, stages: int,
                   weight: Matrix = weight, out: Array = out) -> Launch:  # fmt: skip
            (part,) = parts
            arguments: tuple[Argument, ...] = (
                gpu.tokens, rounded, rounded.shape[1], scales, part.payload, part.stride, part.early, residual or x,
                int(residual is not None), out, begin, end, *weight.shape, stages,
            )  # fmt: skip
            return Launch(kernels.gemm_kernel, grid, THREADS, arguments, stages * 2 * TILE_BYTES)

        launches += _in_pieces(gpu, x, [weight], TILE, space, launch)
    return launches


def _normed(gpu: Gpu, x: Array, norm: Array | None, eps: float, space: _Space) -> tuple[list[Launch], Array]:
    if norm is None:
        return [], x
    out = space.take(x.shape, "f32")
    return basic.rmsnorm(gpu, x, norm, out, eps), out


def _takes(x: Array, *weights: Matrix) -> bool:
    """Whether these weights, for so many tokens, are for `gemm_kernels`."""
    return x.shape[0] > FEW and all(w.payload.dtype in KINDS for w in weights)


def linear(gpu: Gpu, x: Array, weight: Matrix, out: Array, space: Array) -> list[Launch]:
    if not _takes(x, weight):
        return gemv.linear(gpu, x, weight, out)
    return _linears(gpu, x, None, 0.0, [(weight, out)], None, space)


def linear_add(gpu: Gpu, x: Array, weight: Matrix, residual: Array, out: Array, space: Array) -> list[Launch]:
    if not _takes(x, weight):
        return gemv.linear_add(gpu, x, weight, residual, out)
    return _linears(gpu, x, None, 0.0, [(weight, out)], residual, space)


def norm_linear(gpu: Gpu, x: Array, norm: Array, weight: Matrix, out: Array, space: Array, eps: float) -> list[Launch]:
    if not _takes(x, weight):
        return gemv.norm_linear(gpu, x, norm, weight, out, eps)
    return _linears(gpu, x, norm, eps, [(weight, out)], None, space)


def _gate_up(
    gpu: Gpu, x: Array, norm: Array | None, eps: float, w1: Matrix, w3: Matrix, out: Array, memory: Array
) -> list[Launch]:
    space = _Space(memory)
    if w1.payload.dtype == "f32":
        launches, normed = _normed(gpu, x, norm, eps, space)
        up = space.take(out.shape, "f32")
        launches += _linear_f32(gpu, normed, w1, None, out) + _linear_f32(gpu, normed, w3, None, up)
        return launches + basic.swiglu(gpu, out, up, out)
    launches, rounded, scales = _rounded(gpu, x, norm, eps, _kind(w1), space)

    def launch(parts: list[_Rows], grid: tuple[int, int], begin: int, end: int, stages: int) -> Launch:
        gate, up = parts
        arguments: tuple[Argument, ...] = (
            gpu.tokens, rounded, rounded.shape[1], scales, gate.payload, up.payload, gate.stride, gate.early, out,
            begin, end, *w1.shape, stages,
        )  # fmt: skip
        return Launch(kernels.gemm_gate_up_kernel, grid, THREADS, arguments, stages * 2 * TILE_BYTES)

    return launches + _in_pieces(gpu, x, [w1, w3], 64, space, launch)


def gate_up(gpu: Gpu, x: Array, w1: Matrix, w3: Matrix, out: Array, space: Array) -> list[Launch]:
    if not _takes(x, w1, w3):
        return gemv.gate_up(gpu, x, w1, w3, out)
    return _gate_up(gpu, x, None, 0.0, w1, w3, out, space)


def norm_gate_up(
    gpu: Gpu, x: Array, norm: Array, w1: Matrix, w3: Matrix, out: Array, space: Array, eps: float
) -> list[Launch]:
    if not _takes(x, w1, w3):
        return gemv.norm_gate_up(gpu, x, norm, w1, w3, out, eps)
    return _gate_up(gpu, x, norm, eps, w1, w3, out, space)


def qkv(
    gpu: Gpu, x: Array, wq: Matrix, wk: Matrix, wv: Matrix, q: Array, k: Array, v: Array, space: Array
) -> list[Launch]:
    if not _takes(x, wq, wk, wv):
        return gemv.qkv(gpu, x, wq, wk, wv, q, k, v)
    return _linears(gpu, x, None, 0.0, [(wq, q), (wk, k), (wv, v)], None, space)


def norm_qkv(
    gpu: Gpu, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, q: Array, k: Array, v: Array, space: Array,
    eps: float,
) -> list[Launch]:  # fmt: skip
    if not _takes(x, wq, wk, wv):
        return gemv.norm_qkv(gpu, x, norm, wq, wk, wv, q, k, v, eps)
    return _linears(gpu, x, norm, eps, [(wq, q), (wk, k), (wv, v)], None, space)


def norm_qkv_rope(
    gpu: Gpu, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, angles: Array, k_cache: Array,
    positions: Array, sequences: Array, v_cache: Array, out: Array, space: Array, eps: float, head_dim: int,
    interleaved: int,
) -> list[Launch]:  # fmt: skip
    if not _takes(x, wq, wk, wv):
        return gemv.norm_qkv_rope(
            gpu, x, norm, wq, wk, wv, angles, k_cache, positions, sequences, v_cache, out, eps, head_dim, interleaved
        )
    weights, pieces, tokens = (wq, wk, wv), _Space(space), x.shape[0]
    if wq.payload.dtype == "f32" or head_dim > TILE:  # a block must have whole heads
        q, k, v = (pieces.take((tokens, w.shape[0]), "f32") for w in weights)
        left = Array(space.address + pieces.used, (space.shape[0] - pieces.used // 4,), "f32")
        launches = _linears(gpu, x, norm, eps, [(wq, q), (wk, k), (wv, v)], None, left)
        return launches + basic.rope_kv_write(
            gpu, q, angles, k, k_cache, positions, sequences, v, v_cache, out, head_dim, interleaved
        )
    launches, rounded, scales = _rounded(gpu, x, norm, eps, _kind(wq), pieces)
    rows = [_rows(w, 0, w.shape[0], *_expanded([w], w.shape[0], pieces)) for w in weights]
    width = TILE // head_dim * head_dim
    tiles = _tiles(wq.shape[0], width), _tiles(wk.shape[0], width)
    grid = _tiles(tokens, TILE), tiles[0] + 2 * tiles[1]
    stages = _stages(gpu, grid[0] * grid[1])
    arguments: tuple[Argument, ...] = (
        gpu.tokens, rounded, rounded.shape[1], scales, *(part.payload for part in rows), rows[0].stride, rows[0].early,
        angles, positions, sequences, out, k_cache, v_cache, wq.shape[0], wk.shape[0], *tiles, width // head_dim,
        k_cache.shape[1], head_dim, interleaved, k_cache.shape[2], wq.shape[1], stages,
    )  # fmt: skip
    launches += [made for part in rows for made in part.launches]
    return [*launches, Launch(kernels.gemm_qkv_rope_kernel, grid, THREADS, arguments, stages * 2 * TILE_BYTES)]


def _space(kind: str, first: int, count: int, whole: bool = False, results: int = 0) -> Callable[..., tuple[int, ...]]:
    """The shape of an operator's scratch: operands from number `first` on are its `count` weights.

    `whole` if quantised weights are expanded as a whole; of float32 weights the last `results` results lie in scratch.
    """

    def shape(*operands: tuple[int, ...], workers: int) -> tuple[int, ...]:
        (tokens, columns), weights = operands[0], operands[first : first + count]
        if tokens <= FEW:
            return (0,)
        held = [4 * tokens * rows for rows, _ in weights[count - results :]] if results else []
        here = [*held, 2 * tokens * _padded(columns), 4 * tokens]
        if kind not in ("f32", "f16", "bf16"):
            here += [(rows if whole else _expanded_rows(rows, columns)) * columns * 2 for rows, _ in weights]
        float32 = [*held, 4 * tokens * columns] if kind in ("f32", "int8") else []
        return (max(sum(-(-nbytes // 64) * 16 for nbytes in needs) for needs in (here, float32)),)

    return shape


for _type in MATRIX:
    kernel("linear", "cuda", "f32", _type, space=_space(_type, 1, 1))(linear)
    kernel("linear_add", "cuda", "f32", _type, "f32", space=_space(_type, 1, 1))(linear_add)
    kernel("norm_linear", "cuda", "f32", "f32", _type, space=_space(_type, 2, 1))(norm_linear)
    kernel("gate_up", "cuda", "f32", _type, _type, space=_space(_type, 1, 2, results=1))(gate_up)
    kernel("norm_gate_up", "cuda", "f32", "f32", _type, _type, space=_space(_type, 2, 2, results=1))(norm_gate_up)
    kernel("qkv", "cuda", "f32", _type, _type, _type, space=_space(_type, 1, 3))(qkv)
    kernel("norm_qkv", "cuda", "f32", "f32", _type, _type, _type, space=_space(_type, 2, 3))(norm_qkv)
    for _cache in CACHE:
        kernel(
            "norm_qkv_rope", "cuda", "f32", "f32", _type, _type, _type, "f32", _cache, "i32", "i32", _cache,
            space=_space(_type, 2, 3, whole=True, results=3),
        )(norm_qkv_rope)  # fmt: skip
