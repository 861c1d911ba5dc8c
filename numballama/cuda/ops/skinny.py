"""Linear layers for 2 to 128 tokens: how the kernels of `kernels/skinny.py` are launched. `linear` registers them.

An operator is a kernel that streams the weights and one that adds up the slices of K and finishes the results; those
of `wide` do both. Before them, for more tokens than a unit or two, a kernel rounds X to 16 bits.

How K is divided (`Division`) depends on the weight and on the number of multiprocessors, never on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...memory import ceil_div, round_up
from ...registry import KernelRef
from ..kernels.params import (
    SKINNY_FUSED_UNITS,
    SKINNY_PLANE_BYTES,
    SKINNY_ROWS,
    SKINNY_SLICE_COLUMNS,
    SKINNY_STEP_BYTES,
    SKINNY_THREADS,
    SKINNY_UNIT,
    SKINNY_UNITS,
    SKINNY_WARPS,
    units_together,
)
from ..launch import PAYLOAD_TYPE, Array, Launch, LaunchContext, Matrix, named
from . import elementwise, wide
from .collectives import Sums
from .gemm import _operand_type, _padded, _Workspace

KERNELS = "numballama.cuda.kernels.skinny"
SKINNY = {units: KernelRef(KERNELS, f"skinny_{8 * units}_kernel") for units in (1, 2, 4, 8)}
"""Units of 8 tokens of a block → the kernel for them."""

ROUND = KernelRef(f"{KERNELS}_x", "skinny_round_kernel")
SUM = KernelRef(f"{KERNELS}_sum", "skinny_sum_kernel")
SUM_ALL_REDUCE = KernelRef(f"{KERNELS}_sum", "skinny_sum_all_reduce_kernel")

MOST = 128
"""Up to this number of tokens these kernels are faster than `gemm`, or as fast with float16 weights."""
SCALE_PLANES = {"q4_0": 2, "q4_1": 4, "q4_k": 3, "q5_k": 3 + 4, "q6_k": 3 + 8}
"""Type of a payload → words of scales, and of upper bits, of a row in a step."""
SHARED_BYTES = 227 << 10
"""Shared memory of a block on cards that have the most, for which K is divided."""
RESERVED_BYTES = 1 << 10
"""Shared memory that the system keeps of each block."""
STAGES = 4


@dataclass(frozen=True)
class Division:
    """How W is divided among blocks and warps."""

    k_warps: int
    """Warps of a block that share their rows and divide K; a power of two."""
    slice_steps: int
    """Steps of K of a block: 64 bytes of a row."""
    slices: int
    """Blocks that divide K."""
    tiles: int
    """Tiles of rows; a tile is what the warps of a block have."""

    @property
    def row_warps(self) -> int:
        """Groups of 32 rows of a tile."""
        return SKINNY_WARPS // self.k_warps


def slot_bytes(payload: str, scales: str) -> int:
    """Bytes of a stage of a warp's ring: payload, then scales."""
    planes = (4 if scales == "f32" else 1) if payload == "int8" else SCALE_PLANES.get(payload, 0)
    return SKINNY_STEP_BYTES + planes * SKINNY_PLANE_BYTES


def step_columns(payload: str) -> int:
    """Columns of 64 bytes of payload."""
    return {"f16": 32, "bf16": 32, "int8": 64}.get(payload, 128)


@lru_cache
def divide(payload: str, scales: str, groups: int, columns: int, n_sms: int) -> Division:
    """The division of `groups` · 32 rows of `columns` columns that takes the least time, by a simple model."""
    per_step, slot = step_columns(payload), slot_bytes(payload, scales)
    steps = ceil_div(columns, per_step)
    fixed = SKINNY_WARPS * (STAGES * slot + 1024 * units_together(SKINNY_UNITS)) + 16
    most = min((SHARED_BYTES - fixed) // (2 * 8 * SKINNY_UNITS), SKINNY_SLICE_COLUMNS) // per_step // 2 * 2
    candidates = []
    for slice_steps in range(2, min(most, round_up(steps, 2)) + 1, 2):
        slices = ceil_div(steps, slice_steps)
        for k_warps in (1, 2, 4, 8):
            tiles = ceil_div(groups, SKINNY_WARPS // k_warps)
            # tiles of a multiprocessor's blocks: one for many tokens, two for few
            one, two = (per_sm * ceil_div(tiles, max(1, per_sm * n_sms // slices)) for per_sm in (1, 2))
            mine = (one + two) / 2 * max(1, slices / n_sms)
            streamed = mine * ceil_div(slice_steps, k_warps) * SKINNY_WARPS * slot / 30  # ns at 30 bytes per ns
            staged = 24 * 2 * slice_steps * per_step / 50
            summed = 2 * 40 * groups * SKINNY_ROWS * slices * 4 / 3500 + 500 * ceil_div(slices, 4)
            added = mine * (100 if k_warps == 1 else 2000) + summed
            candidates.append((streamed + staged + added, Division(k_warps, slice_steps, slices, tiles)))
    return min(candidates, key=lambda pair: pair[0])[1]


def _shared_bytes(units: int, stages: int, slot: int, slice_columns: int) -> int:
    return 2 * 8 * units * slice_columns + SKINNY_WARPS * (stages * slot + 1024 * units_together(units)) + 16


def _units(tokens: int) -> int:
    return next((units for units in SKINNY if 8 * units >= tokens), SKINNY_UNITS)


def _partial_floats(division: Division, units: int) -> int:
    """Sums of all slices for `units` units of 8 tokens."""
    return units * SKINNY_UNIT * division.tiles * division.row_warps * division.slices


def _launch(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, weights: Sequence[Matrix], outs: Sequence[Array],
    paired: bool, residual: Array | None, workspace: _Workspace, sums: Sums | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches for weights of one type: one, a gate and up (`paired`), or queries, keys and values. Results of one
    weight are added up over ranks if there are `sums`.
    """
    first, tokens, columns = weights[0], x.shape[0], x.shape[1]
    # not where another rank may have no such kernels: it would look for results elsewhere
    alike = not sums or (ctx.peers is not None and ctx.peers.alike)
    by_wide = alike and wide.wanted(ctx, tokens, first.payload.dtype, columns)
    if sums and not sums.hold(round_up(first.shape[0], SKINNY_ROWS) * round_up(tokens, 8), by_wide):
        return _launch(ctx, x, norm, eps, weights, outs, paired, residual, workspace) + sums.of(ctx, outs[0])
    rows, kv_rows = first.shape[0], 0 if paired or len(weights) == 1 else weights[1].shape[0]
    w, out = [*weights, first, first][:3], [*outs, outs[0], outs[0]][:3]
    of_norm = named(normed=int(norm is not None), eps=eps, columns=columns)
    of_results = named(residual=residual or x, added=int(residual is not None), q=out[0], k=out[1], v=out[2])
    if by_wide:
        row_tiles, kv_tiles = wide.tiles_of(rows, kv_rows, paired)
        by_wgmma = wide.divide(row_tiles + 2 * kv_tiles, columns, ctx.n_sms)
        scales, squares = _of_slices(workspace, by_wgmma.slices, tokens)
        rounded = workspace.allocate((tokens, _padded(columns)), _operand_type(first))
        of_x = named(x_scales=scales, squares=squares, capacity=tokens, **of_norm)
        return [
            _round(ctx, x, norm, first, rounded, scales, squares, by_wgmma.slice_columns, True),
            *wide.launch(ctx, rounded, of_x, w, paired, rows, kv_rows, of_results, by_wgmma, sums),
        ]
    payload, slot = first.payload.dtype, slot_bytes(first.payload.dtype, first.scales.dtype)
    groups = ceil_div(rows, 16) if paired else ceil_div(rows + 2 * kv_rows, SKINNY_ROWS)
    division, units = divide(payload, first.scales.dtype, groups, columns, ctx.n_sms), _units(tokens)
    width, stages = division.slice_steps * step_columns(payload), STAGES
    while units > 1 and _shared_bytes(units, stages, slot, width) > ctx.shared_limit:
        units //= 2
    while stages > 1 and _shared_bytes(units, stages, slot, width) > ctx.shared_limit:
        stages //= 2
    token_tiles = ceil_div(tokens, 8 * units)
    rounded, padded = Array(x.address, (0,), _operand_type(first)), _padded(columns)
    scales, squares = _of_slices(workspace, division.slices, tokens)
    launches = []
    if units > SKINNY_FUSED_UNITS:
        rounded = workspace.allocate((tokens, padded), rounded.dtype)
        launches.append(_round(ctx, x, norm, first, rounded, scales, squares, width))
    partials = workspace.allocate((_partial_floats(division, token_tiles * units),), "f32")
    of_x = named(scales=scales, squares=squares, capacity=tokens)
    arguments = named(
        tokens=ctx.tokens, x=x, norm=norm or x, normed=int(norm is not None), rounded=rounded, padded=padded, **of_x,
        columns=columns, w0=w[0].payload, w1=w[1].payload, w2=w[2].payload, stride=first.stride, s0=w[0].scales,
        s1=w[1].scales, s2=w[2].scales, scale_stride=first.scale_stride, shift=first.shift, paired=int(paired),
        rows=rows, kv_rows=kv_rows, partials=partials, tiles=division.tiles, slices=division.slices,
        slice_steps=division.slice_steps, log2_k_warps=division.k_warps.bit_length() - 1, stages=stages,
        slot_bytes=slot, bias=0x64006400,
    )  # fmt: skip
    shared = _shared_bytes(units, stages, slot, width)
    two_fit = 2 * (shared + RESERVED_BYTES) <= ctx.shared_limit + RESERVED_BYTES
    per_sm = 2 if units <= SKINNY_FUSED_UNITS and two_fit else 1
    per_slice = min(division.tiles, max(1, per_sm * ctx.n_sms // division.slices))
    grid = per_slice, token_tiles, division.slices
    launches.append(Launch(SKINNY[units], grid, SKINNY_THREADS, arguments, shared))
    sum_grid = ceil_div(groups, SKINNY_WARPS), ceil_div(tokens, 8)
    of_sums = named(tokens=ctx.tokens, partials=partials, **of_x, **of_norm)
    of_groups = named(
        slices=division.slices, groups=groups, log2_units=units.bit_length() - 1,
        log2_row_warps=division.row_warps.bit_length() - 1,
    )  # fmt: skip
    if sums:
        arguments = named(
            **of_sums, residual=residual or x, added=int(residual is not None), out=outs[0], rows=rows, **of_groups,
            **sums.arguments(ctx),
        )  # fmt: skip
        return [*launches, Launch(SUM_ALL_REDUCE, sum_grid, SKINNY_THREADS, arguments)]
    arguments = named(**of_sums, paired=int(paired), **of_results, rows=rows, kv_rows=kv_rows, **of_groups)
    return [*launches, Launch(SUM, sum_grid, SKINNY_THREADS, arguments)]


def _of_slices(workspace: _Workspace, slices: int, tokens: int) -> tuple[Array, Array]:
    """Memory for a scale and a sum of squares of each token and slice."""
    return workspace.allocate((slices, tokens), "f32"), workspace.allocate((slices, tokens), "f32")


def _round(
    ctx: LaunchContext, x: Array, norm: Array | None, weight: Matrix, rounded: Array, scales: Array, squares: Array,
    slice_columns: int, by_blocks: bool = False,
) -> Launch:  # fmt: skip
    """The launch that rounds X to 16 bits, slice by slice, in the order of columns that the weight's type wants.

    `by_blocks`: a block has a slice, which may be longer than a warp can hold.
    """
    slices, tokens = scales.shape
    arguments = named(
        tokens=ctx.tokens, x=x, norm=norm or x, normed=int(norm is not None), rounded=rounded, padded=rounded.shape[1],
        scales=scales, squares=squares, capacity=tokens, columns=x.shape[1], slice_columns=slice_columns,
        pieces=step_columns(weight.payload.dtype) // 32,
    )  # fmt: skip
    if by_blocks:
        return Launch(wide.ROUND, (tokens, slices), round_up(ceil_div(slice_columns, 16), 32), arguments)
    return Launch(ROUND, (ceil_div(tokens, SKINNY_WARPS), slices), SKINNY_THREADS, arguments)


def linear(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, weight: Matrix, residual: Array | None, out: Array,
    memory: Array,
) -> list[Launch]:  # fmt: skip
    """out[T, N] = x[T, K] · W[N, K]ᵀ, after RMSNorm of x where `norm` is given, plus `residual`."""
    return _launch(ctx, x, norm, eps, [weight], [out], False, residual, _Workspace(memory))


def linear_all_reduce(
    ctx: LaunchContext, x: Array, weight: Matrix, residual: Array | None, out: Array, memory: Array, sums: Sums
) -> list[Launch]:
    """out[T, N] = the sum of x[T, K] · W[N, K]ᵀ over ranks, plus `residual` of ranks that have one."""
    return _launch(ctx, x, None, 0.0, [weight], [out], False, residual, _Workspace(memory), sums)


def gate_up(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, w1: Matrix, w3: Matrix, out: Array, memory: Array
) -> list[Launch]:
    """out[T, N] = silu(x · W1ᵀ) · (x · W3ᵀ). The two weights have one type and one shape."""
    return _launch(ctx, x, norm, eps, [w1, w3], [out], True, None, _Workspace(memory))


def qkv(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, weights: Sequence[Matrix], outs: Sequence[Array],
    memory: Array,
) -> list[Launch]:  # fmt: skip
    """q, k and v = x · Wqᵀ, x · Wkᵀ, x · Wvᵀ, after RMSNorm of x where `norm` is given."""
    return _qkv(ctx, x, norm, eps, weights, outs, _Workspace(memory))


def _qkv(
    ctx: LaunchContext, x: Array, norm: Array | None, eps: float, weights: Sequence[Matrix], outs: Sequence[Array],
    workspace: _Workspace,
) -> list[Launch]:  # fmt: skip
    one_type = len({weight.payload.dtype for weight in weights}) == 1
    if one_type and all(weight.shape[0] % SKINNY_ROWS == 0 for weight in weights):
        return _launch(ctx, x, norm, eps, weights, outs, False, None, workspace)
    launches = []
    for weight, out in zip(weights, outs, strict=True):  # else a group of rows would have two weights
        part = _Workspace(workspace.rest)
        launches += _launch(ctx, x, norm, eps, [weight], [out], False, None, part)
    return launches


def norm_qkv_rope(
    ctx: LaunchContext, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, angles: Array, k_cache: Array,
    positions: Array, sequences: Array, page_table: Array, v_cache: Array, out: Array, memory: Array, eps: float,
    head_dim: int, interleaved: int,
) -> list[Launch]:  # fmt: skip
    """q, k and v of norm(x); q rotated into `out`, k rotated and v into the KV cache."""
    workspace, weights = _Workspace(memory), (wq, wk, wv)
    q, k, v = (workspace.allocate((x.shape[0], w.shape[0]), "f32") for w in weights)
    return _qkv(ctx, x, norm, eps, weights, (q, k, v), workspace) + elementwise.rope_kv_write(
        ctx, q, angles, k, k_cache, positions, sequences, page_table, v, v_cache, out, head_dim, interleaved
    )


def workspace_shape(
    dtype: str,
    first: int,
    count: int,
    paired: bool,
    results: int,
    larger: Callable[..., tuple[int, ...]],
    mixed: bool = False,
) -> Callable[..., tuple[int, ...]]:
    """The shape (float32) of an operator's workspace as a function of its operands' shapes.

    Operands from number `first` on are its `count` weights, of type `dtype`; `paired` if they are a gate and up. The
    last `results` results are kept in the workspace. `larger` is the same for `gemm`, for more tokens. `mixed`: some of
    the weights have another type.
    """

    def shape(*operands: tuple[int, ...], workers: int) -> tuple[int, ...]:
        (tokens, columns), weights = operands[0], operands[first : first + count]
        if dtype == "f32" or tokens == 1 or tokens > MOST:
            return larger(*operands, workers=workers)
        rows = [weight[0] for weight in weights]
        apart = mixed or (count == 3 and any(n % SKINNY_ROWS for n in rows))
        sizes = [4 * tokens * n for n in rows] if results else []
        sizes.append(2 * tokens * _padded(columns))
        sums = []
        for some in [[n] for n in rows] if apart else [rows[:1] if paired else rows]:
            n = sum(some)
            groups = ceil_div(n, 16 if paired else SKINNY_ROWS)
            division = divide(PAYLOAD_TYPE[dtype], "f32" if dtype == "int8" else "f16", groups, columns, workers)
            units = round_up(tokens, 8 * _units(tokens)) // 8
            slices = max(division.slices, max(wide.FIT))  # whatever the device has
            sums.append(2 * round_up(4 * slices * tokens, 64) + 4 * _partial_floats(division, units))
        sizes.append(max(sums))
        # int8 with groups that no kernel reads is stored as float32
        other = larger(*operands, workers=workers) if dtype == "int8" else (0,)
        return (max(sum(ceil_div(nbytes, 64) * 16 for nbytes in sizes), *other),)

    return shape
