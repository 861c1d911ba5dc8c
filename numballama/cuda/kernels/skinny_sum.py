"""The end of a skinny GEMM: sums of the slices of K are added up in their order, and each operator finishes them.

That is the factor of an RMSNorm, a residual or SwiGLU, and where a row of q, k and v belongs. Lanes have what
`mma.m16n8k16` leaves to them: rows l / 4 and 8 further of two tiles, two neighbouring tokens of each. Sums lie in
memory as lanes had them, so all loads are 16 bytes. T · N · slices · 4 bytes are read, mostly from the L2 cache.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..fragments import st_global_f32
from ..intrinsics import (
    address,
    div_full,
    ex2_approx,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_v4_f32,
    no_unroll,
    rsqrt_approx,
)
from .common import LOG2_E, add4, device
from .linear_sums import add_up_unit, link_of, send_unit
from .params import SKINNY_UNIT as UNIT
from .params import SKINNY_WARPS as WARPS


@device
def old_row(row, token, here, rows, residual, added):
    """A row's residual for two tokens from `token` on, `here` of which exist; zeros if there is none."""
    a, b = np.float32(0), np.float32(0)
    if added and row < rows:
        at = token * rows + row
        a = residual[at] if here > 0 else a
        b = residual[at + rows] if here > 1 else b
    return a, b


@device
def put_row(row, token, here, a, b, rows, kv_rows, outs):
    """Write a row's results for two tokens from `token` on, `here` of which exist. Rows of keys and values come after
    those of the first weight.
    """
    width = rows if row < rows else kv_rows
    inside = row if row < rows else (row - rows if row < rows + kv_rows else row - rows - kv_rows)
    if row < rows + 2 * kv_rows:
        out = address(outs[0], 0) if row < rows else address(outs[1] if row < rows + kv_rows else outs[2], 0)
        at = token * width + inside
        if here > 0:
            st_global_f32(out + 4 * at, a)
        if here > 1:
            st_global_f32(out + 4 * (at + width), b)


@device
def silu_and_mul_full(gate, up):
    """silu(gate) · up without a function call: in a kernel with calls the products of wgmma run one at a time."""
    return div_full(gate, np.float32(1) + ex2_approx(-gate * LOG2_E)) * up


@device
def results_of(paired, factors, upper, lower, olds):
    """A unit's sums times the tokens' factors, plus their residuals: of four rows for two tokens each. The last two
    rows mean nothing if `paired`.
    """
    scale, scale2 = factors
    a, b, c, d = upper[0] * scale, upper[1] * scale2, upper[2] * scale, upper[3] * scale2
    e, f, g, h = lower[0] * scale, lower[1] * scale2, lower[2] * scale, lower[3] * scale2
    if paired:
        a, b, c, d = silu_and_mul_full(a, e), silu_and_mul_full(b, f), silu_and_mul_full(c, g), silu_and_mul_full(d, h)
    first, second, third, fourth = olds
    return (
        (a + first[0], b + first[1]), (c + second[0], d + second[1]), (e + third[0], f + third[1]),
        (g + fourth[0], h + fourth[1]),
    )  # fmt: skip


@device
def put_unit(paired, row, token, here, results, rows, kv_rows, outs):
    """Write a unit's results: of `row` and 8 more, and unless `paired` of rows 16 further, for two tokens from `token`
    on, of which `here` exist.
    """
    first, second, third, fourth = results
    put_row(row, token, here, first[0], first[1], rows, kv_rows, outs)
    put_row(row + 8, token, here, second[0], second[1], rows, kv_rows, outs)
    if not paired:
        put_row(row + 16, token, here, third[0], third[1], rows, kv_rows, outs)
        put_row(row + 24, token, here, fourth[0], fourth[1], rows, kv_rows, outs)


@device
def times(sums, scale, scale2):
    """A tile's sums times the factors of the lane's two tokens."""
    return sums[0] * scale, sums[1] * scale2, sums[2] * scale, sums[3] * scale2


@device
def load_slice(partials, s, slices, at, distance, scales, squares, token, last, capacity):
    """A slice's part of a unit: (upper tile, lower tile, scales of two tokens, their sums of squares). After the end it
    is the last slice again: loads that depend on nothing are in flight together.
    """
    s = min(s, slices - 1)
    at += s * distance
    a, b = s * capacity + token, s * capacity + last
    return ld_v4_f32(partials, at), ld_v4_f32(partials, at + 128), scales[a], scales[b], squares[a], squares[b]


@device
def add_slice(sums, here, part):
    """`sums`, plus a slice's part of them if it is `here`: (upper tile, lower tile, squares of two tokens)."""
    upper, lower, square, square2 = sums
    a, b, scale, scale2, more, more2 = part
    if here:
        upper, lower = add4(upper, times(a, scale, scale2)), add4(lower, times(b, scale, scale2))
        square += more
        square2 += more2
    return upper, lower, square, square2


@device
def norm_factor(square, normed, columns, eps):
    """1 / sqrt(mean(x²) + eps), or 1 without a norm."""
    return rsqrt_approx(div_full(square, np.float32(columns)) + eps) if normed else np.float32(1)


@device
def add_slices(tokens, partials, scales, squares, capacity, normed, eps, columns, paired, residual, added, rows, slices,
               groups, group, log2_units, log2_row_warps):  # fmt: skip
    """Wait for the preceding kernel and add up the slices' sums of this warp's unit, of a group of 32 rows.

    Returns (first row, first of two tokens, how many of these exist, results).
    """
    lane = cuda.threadIdx.x & 31
    token = 8 * cuda.blockIdx.y + 2 * (lane & 3)
    units, row_warps = 1 << log2_units, 1 << log2_row_warps
    token_tile, unit = cuda.blockIdx.y >> log2_units, cuda.blockIdx.y & (units - 1)
    tile, row_warp = group >> log2_row_warps, group & (row_warps - 1)
    tiles = (groups + row_warps - 1) >> log2_row_warps
    at = ((token_tile * tiles + tile) * slices * row_warps + row_warp) * units + unit
    distance = row_warps * units * UNIT
    at = at * UNIT + 4 * lane
    zero = np.float32(0)
    sums = (zero, zero, zero, zero), (zero, zero, zero, zero), zero, zero
    here, row = tokens[0] - token, (group << (4 if paired else 5)) + (lane >> 2)
    # the kernel before this one does not write residuals, and it has waited for those that do
    olds = (
        old_row(row, token, here, rows, residual, added), old_row(row + 8, token, here, rows, residual, added),
        old_row(row + 16, token, here, rows, residual, added), old_row(row + 24, token, here, rows, residual, added),
    )  # fmt: skip
    a, b = min(token, capacity - 1), min(token + 1, capacity - 1)
    griddepcontrol_wait()
    for s in range(0, slices, 4):
        no_unroll()
        first = load_slice(partials, s, slices, at, distance, scales, squares, a, b, capacity)
        second = load_slice(partials, s + 1, slices, at, distance, scales, squares, a, b, capacity)
        third = load_slice(partials, s + 2, slices, at, distance, scales, squares, a, b, capacity)
        fourth = load_slice(partials, s + 3, slices, at, distance, scales, squares, a, b, capacity)
        sums = add_slice(sums, True, first)
        sums = add_slice(sums, s + 1 < slices, second)
        sums = add_slice(sums, s + 2 < slices, third)
        sums = add_slice(sums, s + 3 < slices, fourth)
    upper, lower, square, square2 = sums
    factors = norm_factor(square, normed, columns, eps), norm_factor(square2, normed, columns, eps)
    return row, token, here, results_of(paired, factors, upper, lower, olds)


@cuda.jit
def skinny_sum_kernel(tokens, partials, scales, squares, capacity, normed, eps, columns, paired, residual, added, q, k,
                      v, rows, kv_rows, slices, groups, log2_units, log2_row_warps):  # fmt: skip
    """Add up the slices' sums and finish the results. A warp has a unit: blockIdx.x counts eight groups of 32 rows,
    blockIdx.y units of 8 tokens.
    """
    griddepcontrol_launch_dependents()  # at once: what comes next copies weights, which nothing here writes
    group = cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5)
    if 8 * cuda.blockIdx.y >= tokens[0] or group >= groups:
        griddepcontrol_wait()  # a kernel must not end before the preceding one
        return
    row, token, here, results = add_slices(
        tokens, partials, scales, squares, capacity, normed, eps, columns, paired, residual, added, rows, slices,
        groups, group, log2_units, log2_row_warps,
    )  # fmt: skip
    put_unit(paired, row, token, here, results, rows, kv_rows, (q, k, v))


@cuda.jit
def skinny_sum_all_reduce_kernel(tokens, partials, scales, squares, capacity, normed, eps, columns, residual, added,
                                 out, rows, slices, groups, log2_units, log2_row_warps, exchange, inbox_at, slot,
                                 peers, stop, rank, ranks):  # fmt: skip
    """The same for one weight, and add up the results over ranks."""
    griddepcontrol_launch_dependents()
    group = cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5)
    if 8 * cuda.blockIdx.y >= tokens[0] or group >= groups:
        griddepcontrol_wait()
        return
    row, token, here, results = add_slices(
        tokens, partials, scales, squares, capacity, normed, eps, columns, False, residual, added, rows, slices,
        groups, group, log2_units, log2_row_warps,
    )  # fmt: skip
    link, unit = link_of(exchange, inbox_at, slot, peers, stop, rank, ranks), cuda.blockIdx.y * groups + group
    send_unit(link, unit, results)
    put_unit(False, row, token, here, add_up_unit(link, unit), rows, 0, (out, out, out))
