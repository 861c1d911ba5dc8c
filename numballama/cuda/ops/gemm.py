"""Linear layers for many tokens, Y[T, N] = X[T, K] · W[N, K]ᵀ: how the kernels of `kernels/gemm.py` are launched.

At 512 tokens a weight is used 512 times, so arithmetic is the floor: 2 · T · N · K operations, while memory brings each
element of W once. An operator is one kernel that rounds X to 16 bits, one for each quantised weight (or for a part of
its rows) that expands it to float16 in the workspace, and one that multiplies and finishes the results. `linear`
registers the operators. Where the device has wgmma, `wgmma_gemm` multiplies instead and decodes quantised weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...memory import ceil_div, round_up
from ...registry import KernelRef
from ..kernels.params import (
    GEMM_F32_K_STEP,
    GEMM_F32_THREADS,
    GEMM_F32_W_STRIDE,
    GEMM_F32_X_STRIDE,
    GEMM_K_STEP,
    GEMM_STAGED_BYTES,
    GEMM_THREADS,
    GEMM_TILE,
    GEMM_TILE_BYTES,
)
from ..launch import Array, Launch, LaunchContext, Matrix, named, paged
from . import elementwise, wgmma_gemm
from .collectives import Sums
from .rounding import round_rows

KERNELS = "numballama.cuda.kernels.gemm"
EXPAND = KernelRef(KERNELS, "expand_kernel")
GEMM = KernelRef(KERNELS, "gemm_kernel")
GEMM_F32 = KernelRef(KERNELS, "gemm_f32_kernel")
GEMM_GATE_UP = KernelRef(KERNELS, "gemm_gate_up_kernel")
GEMM_QKV_ROPE = KernelRef(KERNELS, "gemm_qkv_rope_kernel")

FEW = 8
"""Up to this number of tokens, `gemv` is faster, although it reads the weights once for each token."""
MAX_EXPANDED = 1 << 26
"""Elements of a weight that are expanded to float16 at a time, unless all of them are needed at once."""


class _Workspace:
    """Scratch memory of an operator, from which arrays are allocated one after the other."""

    def __init__(self, memory: Array) -> None:
        self._memory, self.used = memory, 0

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Array:
        array = Array(self._memory.address + self.used, shape, dtype)
        self.used += round_up(array.nbytes, 64)
        assert self.used <= self._memory.nbytes
        return array

    @property
    def rest(self) -> Array:
        """The memory that is left, as float32."""
        return Array(self._memory.address + self.used, (self._memory.shape[0] - self.used // 4,), "f32")


def _padded(columns: int) -> int:
    return round_up(columns, GEMM_K_STEP)


def _expanded_rows(rows: int, columns: int) -> int:
    """Number of rows of a weight that are expanded at a time."""
    return min(rows, max(GEMM_TILE, MAX_EXPANDED // columns // GEMM_TILE * GEMM_TILE))


def _stages(ctx: LaunchContext, blocks: int) -> int:
    """Stages of the ring in shared memory: five if an SM has one block, otherwise as many as let two blocks fit."""
    affordable = ctx.shared_limit // (2 * GEMM_TILE_BYTES)
    return min(5 if blocks <= ctx.n_sms else 3, affordable)


@dataclass(frozen=True)
class _Rounded:
    """X in 16 bits [T, padded columns], and each row's scale."""

    x: Array
    scales: Array
    launches: list[Launch]


def _rounded(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, weights: Sequence[Matrix], workspace: _Workspace
) -> _Rounded:
    """X, or RMSNorm of x, in 16 bits, as the kernels want it that multiply it with these weights."""
    (tokens, columns), padded, split = x.shape, _padded(x.shape[1]), int(weights[0].payload.dtype == "f32")
    out = workspace.allocate((tokens, padded << split), _operand_type(weights[0]))
    scales, exchanged = workspace.allocate((tokens,), "f32"), wgmma_gemm.exchanged(ctx, weights)
    launch = round_rows(ctx, x, columns, out, scales, padded, norm, eps, exchanged, split=split)
    return _Rounded(out, scales, [launch])


@dataclass(frozen=True)
class _Rows:
    """Rows of a weight in 16 bits, and the launches that expand them."""

    launches: list[Launch]
    payload: Array
    stride: int

    @property
    def early(self) -> int:
        """1 if no kernel writes them: they may be loaded before the preceding kernel ends."""
        return int(not self.launches)


def _rows(weight: Matrix, begin: int, end: int, expanded: Array | None) -> _Rows:
    columns = weight.shape[1]
    if expanded is None:
        address = weight.payload.address + begin * weight.stride
        return _Rows([], Array(address, (end - begin, columns), weight.payload.dtype), weight.stride)
    arguments = named(**weight.arguments(), out=expanded, first=begin, columns=columns)
    return _Rows([Launch(EXPAND, (end - begin,), 128, arguments)], expanded, 2 * columns)


def _operand_type(weight: Matrix) -> str:
    """The type that a weight, and X with it, has on tensor cores."""
    return "bf16" if weight.payload.dtype == "bf16" else "f16"


def _expansions(weights: Sequence[Matrix], rows: int, workspace: _Workspace) -> list[Array | None]:
    """For each weight, memory for `rows` rows in float16 if it is quantised, else None."""
    return [workspace.allocate((rows, w.shape[1]), "f16") if w.quantized else None for w in weights]


MakeLaunch = Callable[[list[_Rows], tuple[int, int], int, int, int], Launch]
"""(rows of each weight, grid, first row, end, stages) → the launch that multiplies them."""


def _in_parts(
    ctx: LaunchContext, tokens: int, weights: Sequence[Matrix], tile: int, workspace: _Workspace, launch: MakeLaunch
) -> list[Launch]:
    """Launches for all rows of weights of one shape; quantised weights are expanded and used part by part."""
    rows, columns = weights[0].shape
    rows_per_part = _expanded_rows(rows, columns) if weights[0].quantized else rows
    expansions, launches = _expansions(weights, rows_per_part, workspace), []
    for begin in range(0, rows, rows_per_part):
        end = min(rows, begin + rows_per_part)
        parts = [_rows(weight, begin, end, array) for weight, array in zip(weights, expansions, strict=True)]
        grid = ceil_div(tokens, GEMM_TILE), ceil_div(end - begin, tile)
        launches += [expand for part in parts for expand in part.launches]
        launches.append(launch(parts, grid, begin, end, _stages(ctx, grid[0] * grid[1])))
    return launches


def _by_wgmma(
    ctx: LaunchContext, rounded: _Rounded, columns: int, weights: Sequence[Matrix], outs: Sequence[Array],
    residual: Array | None, paired: bool, memory: Array,
) -> list[Launch]:  # fmt: skip
    """Launches of the kernels of `wgmma_gemm`; float32 weights are split into pieces and used part by part."""
    given = ctx, rounded.x, columns, rounded.scales
    if weights[0].payload.dtype != "f32":
        return [wgmma_gemm.launch(*given, weights, outs, residual, paired)]
    launches, rows = list[Launch](), weights[0].shape[0]
    step = wgmma_gemm.part_rows(rows, columns)
    if step < rows and len(outs) > 1:
        for w, out in zip(weights, outs, strict=True):
            launches += _by_wgmma(ctx, rounded, columns, [w], [out], residual, False, memory)
        return launches
    for begin in range(0, rows, step):
        workspace, parts = _Workspace(memory), list[Matrix]()
        for weight in weights:
            size = min(step, weight.shape[0] - begin)
            values = workspace.allocate((size, 2 * _padded(columns)), "f16")
            launch, part = wgmma_gemm.split(ctx, weight, begin, values, workspace.allocate((size,), "f32"))
            launches.append(launch)
            parts.append(part)
        launches.append(wgmma_gemm.launch(*given, parts, outs, residual, paired, begin))
    return launches


def _linear_f32(ctx: LaunchContext, x: Array, weight: Matrix, residual: Array | None, out: Array) -> list[Launch]:
    rows, columns = weight.shape
    arguments = named(
        tokens=ctx.tokens, x=x, weight=weight.payload, stride=weight.stride // 4, residual=residual or x,
        added=int(residual is not None), out=out, rows=rows, columns=columns,
    )  # fmt: skip
    shared = max(4 * GEMM_F32_K_STEP * (GEMM_F32_X_STRIDE + GEMM_F32_W_STRIDE), 64 * GEMM_STAGED_BYTES)
    grid = ceil_div(x.shape[0], 64), ceil_div(rows, GEMM_TILE)
    return [Launch(GEMM_F32, grid, GEMM_F32_THREADS, arguments, shared)]


def linear(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, weights: Sequence[tuple[Matrix, Array]],
    residual: Array | None, memory: Array,
) -> list[Launch]:  # fmt: skip
    """For each (W, out): out[T, N] = x[T, K] · W[N, K]ᵀ, after RMSNorm of x where `norm` is given, plus `residual`."""
    workspace = _Workspace(memory)
    matrices = [w for w, _ in weights]
    if wgmma_gemm.wanted(ctx, matrices):
        rounded, launches = _rounded(ctx, x, norm, eps, matrices, workspace), list[Launch]()
        together = len({w.shape for w in matrices[1:]}) == 1 and len({w.payload.dtype for w in matrices}) == 1
        for pairs in [weights] if together else [[pair] for pair in weights]:
            some, outs = [w for w, _ in pairs], [out for _, out in pairs]
            launches += _by_wgmma(ctx, rounded, x.shape[1], some, outs, residual, False, workspace.rest)
        return rounded.launches + launches
    if weights[0][0].payload.dtype == "f32":
        launches, x = _normed(ctx, x, norm, eps, workspace)
        return launches + [launch for w, out in weights for launch in _linear_f32(ctx, x, w, residual, out)]
    rounded = _rounded(ctx, x, norm, eps, matrices, workspace)
    launches = list(rounded.launches)
    for weight, out in weights:

        def launch(parts: list[_Rows], grid: tuple[int, int], begin: int, end: int, stages: int,
                   weight: Matrix = weight, out: Array = out) -> Launch:  # fmt: skip
            (part,) = parts
            rows, columns = weight.shape
            arguments = named(
                tokens=ctx.tokens, x=rounded.x, padded=rounded.x.shape[1], scales=rounded.scales, weight=part.payload,
                stride=part.stride, early=part.early, residual=residual or x, added=int(residual is not None), out=out,
                begin=begin, end=end, rows=rows, columns=columns, stages=stages,
            )  # fmt: skip
            return Launch(GEMM, grid, GEMM_THREADS, arguments, stages * 2 * GEMM_TILE_BYTES)

        launches += _in_parts(ctx, x.shape[0], [weight], GEMM_TILE, workspace, launch)
    return launches


def linear_all_reduce(
    ctx: LaunchContext, x: Array, weight: Matrix, residual: Array | None, out: Array, memory: Array, sums: Sums
) -> list[Launch]:
    """out[T, N] = the sum of x[T, K] · W[N, K]ᵀ over ranks, plus `residual` of ranks that have one."""
    alike = ctx.peers is not None and ctx.peers.alike  # else a rank would look for what another sends elsewhere
    if not (alike and wgmma_gemm.wanted(ctx, [weight]) and wgmma_gemm.held(sums, x.shape[0], weight)):
        return linear(ctx, x, None, 0.0, [(weight, out)], residual, memory) + sums.of(ctx, out)
    rounded = _rounded(ctx, x, None, 0.0, [weight], _Workspace(memory))
    return rounded.launches + wgmma_gemm.linear_all_reduce(
        ctx, rounded.x, x.shape[1], rounded.scales, weight, residual, out, sums
    )


def _normed(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, workspace: _Workspace
) -> tuple[list[Launch], Array]:
    if norm is None:
        return [], x
    out = workspace.allocate(x.shape, "f32")
    return elementwise.rmsnorm(ctx, x, norm, out, eps), out


def gate_up(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, w1: Matrix, w3: Matrix, out: Array, memory: Array
) -> list[Launch]:
    """out[T, N] = silu(x · W1ᵀ) · (x · W3ᵀ). The two weights have one type and one shape."""
    workspace = _Workspace(memory)
    if wgmma_gemm.wanted(ctx, [w1, w3]):
        rounded = _rounded(ctx, x, norm, eps, [w1, w3], workspace)
        return rounded.launches + _by_wgmma(ctx, rounded, x.shape[1], [w1, w3], [out], None, True, workspace.rest)
    if w1.payload.dtype == "f32":
        launches, x = _normed(ctx, x, norm, eps, workspace)
        up = workspace.allocate(out.shape, "f32")
        launches += _linear_f32(ctx, x, w1, None, out) + _linear_f32(ctx, x, w3, None, up)
        return launches + elementwise.swiglu(ctx, out, up, out)
    rounded = _rounded(ctx, x, norm, eps, [w1, w3], workspace)

    def launch(parts: list[_Rows], grid: tuple[int, int], begin: int, end: int, stages: int) -> Launch:
        gate, up = parts
        rows, columns = w1.shape
        arguments = named(
            tokens=ctx.tokens, x=rounded.x, padded=rounded.x.shape[1], scales=rounded.scales, w1=gate.payload,
            w3=up.payload, stride=gate.stride, early=gate.early, out=out, begin=begin, end=end, rows=rows,
            columns=columns, stages=stages,
        )  # fmt: skip
        return Launch(GEMM_GATE_UP, grid, GEMM_THREADS, arguments, stages * 2 * GEMM_TILE_BYTES)

    return rounded.launches + _in_parts(ctx, x.shape[0], [w1, w3], 64, workspace, launch)


def norm_qkv_rope(
    ctx: LaunchContext, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, angles: Array, k_cache: Array,
    positions: Array, sequences: Array, page_table: Array, v_cache: Array, out: Array, memory: Array, eps: float,
    head_dim: int, interleaved: int,
) -> list[Launch]:  # fmt: skip
    """q, k and v of norm(x); q rotated into `out`, k rotated and v into the KV cache."""
    weights, workspace, tokens = (wq, wk, wv), _Workspace(memory), x.shape[0]
    if wgmma_gemm.finishes_heads(ctx, tokens, weights, k_cache, v_cache):
        rounded = _rounded(ctx, x, norm, eps, weights, workspace)
        where = paged(k_cache, positions, sequences, page_table)
        heads = wgmma_gemm.Heads(angles, where, head_dim, interleaved)
        outs = out, k_cache, v_cache
        return rounded.launches + wgmma_gemm.qkv_rope(ctx, rounded.x, x.shape[1], rounded.scales, weights, outs, heads)
    separate = wq.payload.dtype == "f32" or wq.payload.dtype != wv.payload.dtype or wgmma_gemm.wanted(ctx, weights)
    if separate or head_dim > GEMM_TILE:  # a block of the fused kernel computes whole heads
        q, k, v = (workspace.allocate((tokens, w.shape[0]), "f32") for w in weights)
        launches = linear(ctx, x, norm, eps, [(wq, q), (wk, k), (wv, v)], None, workspace.rest)
        return launches + elementwise.rope_kv_write(
            ctx, q, angles, k, k_cache, positions, sequences, page_table, v, v_cache, out, head_dim, interleaved
        )
    rounded = _rounded(ctx, x, norm, eps, weights, workspace)
    rows = [_rows(w, 0, w.shape[0], *_expansions([w], w.shape[0], workspace)) for w in weights]
    heads_per_tile = GEMM_TILE // head_dim
    (q_rows, columns), kv_rows = wq.shape, wk.shape[0]
    q_tiles, kv_tiles = (ceil_div(n, heads_per_tile * head_dim) for n in (q_rows, kv_rows))
    grid = ceil_div(tokens, GEMM_TILE), q_tiles + 2 * kv_tiles
    stages = _stages(ctx, grid[0] * grid[1])
    kv_heads = k_cache.shape[1]
    arguments = named(
        tokens=ctx.tokens, x=rounded.x, padded=rounded.x.shape[1], scales=rounded.scales, wq=rows[0].payload,
        wk=rows[1].payload, wv=rows[2].payload, stride=rows[0].stride, early=rows[0].early, angles=angles,
        **paged(k_cache, positions, sequences, page_table), q=out, k_cache=k_cache, v_cache=v_cache, q_rows=q_rows,
        kv_rows=kv_rows, q_tiles=q_tiles, kv_tiles=kv_tiles, heads_a_tile=heads_per_tile, kv_heads=kv_heads,
        head_dim=head_dim, interleaved=interleaved, columns=columns, stages=stages,
    )  # fmt: skip
    return [
        *rounded.launches,
        *(expand for part in rows for expand in part.launches),
        Launch(GEMM_QKV_ROPE, grid, GEMM_THREADS, arguments, stages * 2 * GEMM_TILE_BYTES),
    ]


def workspace_shape(
    dtype: str, first: int, count: int, whole: bool = False, results: int = 0
) -> Callable[..., tuple[int, ...]]:
    """The shape (float32) of an operator's workspace as a function of its operands' shapes.

    Operands from number `first` on are its `count` weights, of type `dtype`. `whole`: quantised weights are expanded as
    a whole, not in parts. Where weights are float32, the last `results` results are kept in the workspace.
    """

    def shape(*operands: tuple[int, ...], workers: int) -> tuple[int, ...]:
        (tokens, columns), weights = operands[0], operands[first : first + count]
        if tokens <= FEW:
            return (0,)
        kept = [4 * tokens * rows for rows, _ in weights[count - results :]] if results else []
        in_16_bits = [*kept, 2 * tokens * _padded(columns), 4 * tokens]
        if dtype not in ("f32", "f16", "bf16"):
            in_16_bits += [(rows if whole else _expanded_rows(rows, columns)) * columns * 2 for rows, _ in weights]
        found = [in_16_bits]
        if dtype in ("f32", "int8"):  # int8 with groups that no kernel reads is stored as float32
            parts = [wgmma_gemm.part_rows(rows, columns) for rows, _ in weights]
            pieces = [size for part in parts for size in (4 * part * _padded(columns), 4 * part)]
            found += [[*kept, 4 * tokens * columns], [*kept, 4 * tokens * _padded(columns), 4 * tokens, *pieces]]
        return (max(sum(ceil_div(nbytes, 64) * 16 for nbytes in sizes) for sizes in found),)

    return shape
