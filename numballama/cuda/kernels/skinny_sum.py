"""The end of a skinny GEMM: sums of the slices of K are added up in their order, and each operator finishes them.

That is the factor of an RMSNorm, a residual or SwiGLU, and where a row of q, k and v belongs. Lanes have what
`mma.m16n8k16` leaves to them: rows l / 4 and 8 further of two tiles, two neighbouring tokens of each. Sums lie in
memory as lanes had them, so all loads are 16 bytes. T · N · slices · 4 bytes are read, mostly from the L2 cache.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..arithmetic import div_full, ex2_approx, mad_wide_s32, rsqrt_approx, s32
from ..fragments import st_global_f32
from ..intrinsics import (
    address,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_global_f32_or_0,
    ld_global_v4_f32_or_0,
    no_unroll,
)
from ..quant_traits import store_element
from .common import LOG2_E, add4, device, launch_bounds
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
def put_row(row, token, here, a, b, rows, out):
    """Write a row's results for two tokens from `token` on, `here` of which exist, in the type of `out`."""
    at = token * rows + row
    if row < rows and here > 0:
        store_element(out, at, a)
    if row < rows and here > 1:
        store_element(out, at + rows, b)


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
def put_unit(paired, row, token, here, results, rows, out):
    """Write a unit's results: of `row` and 8 more, and unless `paired` of rows 16 further, for two tokens from `token`
    on, of which `here` exist.
    """
    first, second, third, fourth = results
    put_row(row, token, here, first[0], first[1], rows, out)
    put_row(row + 8, token, here, second[0], second[1], rows, out)
    if not paired:
        put_row(row + 16, token, here, third[0], third[1], rows, out)
        put_row(row + 24, token, here, fourth[0], fourth[1], rows, out)


@device
def times(sums, scale, scale2):
    """A tile's sums times the factors of the lane's two tokens."""
    return sums[0] * scale, sums[1] * scale2, sums[2] * scale, sums[3] * scale2


@device
def load_slice(s, of_slices):
    """A slice's part of a unit: (upper tile, lower tile, scales of two tokens, their sums of squares); zeros if there
    is no such slice. Loads of several slices are in flight together.
    """
    at, scale_a, scale_b, square_a, square_b, distance, step, slices = of_slices
    sums, left = mad_wide_s32(s, distance, at), s32(slices - s)
    return (
        ld_global_v4_f32_or_0(sums, left), ld_global_v4_f32_or_0(sums + 512, left),
        ld_global_f32_or_0(mad_wide_s32(s, step, scale_a), left),
        ld_global_f32_or_0(mad_wide_s32(s, step, scale_b), left),
        ld_global_f32_or_0(mad_wide_s32(s, step, square_a), left),
        ld_global_f32_or_0(mad_wide_s32(s, step, square_b), left),
    )  # fmt: skip


@device
def add_slice(sums, part):
    """`sums`, plus a slice's part of them: (upper tile, lower tile, squares of two tokens)."""
    upper, lower, square, square2 = sums
    a, b, scale, scale2, more, more2 = part
    return (
        add4(upper, times(a, scale, scale2)), add4(lower, times(b, scale, scale2)), square + more, square2 + more2,
    )  # fmt: skip


@device
def add_four(sums, s, of_slices):
    """`sums`, plus those of four slices from number `s` on."""
    first, second = load_slice(s, of_slices), load_slice(s32(s + 1), of_slices)
    third, fourth = load_slice(s32(s + 2), of_slices), load_slice(s32(s + 3), of_slices)
    return add_slice(add_slice(add_slice(add_slice(sums, first), second), third), fourth)


@device
def add_eight(sums, s, of_slices):
    """The same of eight."""
    first, second = load_slice(s, of_slices), load_slice(s32(s + 1), of_slices)
    third, fourth = load_slice(s32(s + 2), of_slices), load_slice(s32(s + 3), of_slices)
    fifth, sixth = load_slice(s32(s + 4), of_slices), load_slice(s32(s + 5), of_slices)
    seventh, eighth = load_slice(s32(s + 6), of_slices), load_slice(s32(s + 7), of_slices)
    sums = add_slice(add_slice(add_slice(add_slice(sums, first), second), third), fourth)
    return add_slice(add_slice(add_slice(add_slice(sums, fifth), sixth), seventh), eighth)


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
    lane, slices = s32(cuda.threadIdx.x & 31), s32(slices)
    token = s32(8 * cuda.blockIdx.y + 2 * (lane & 3))
    units, row_warps = s32(1 << log2_units), s32(1 << log2_row_warps)
    token_tile, unit = s32(cuda.blockIdx.y >> log2_units), s32(cuda.blockIdx.y & (units - 1))
    tile, row_warp = s32(group >> log2_row_warps), s32(group & (row_warps - 1))
    tiles = s32((groups + row_warps - 1) >> log2_row_warps)
    at = s32(((token_tile * tiles + tile) * slices * row_warps + row_warp) * units + unit)
    zero = np.float32(0)
    sums = (zero, zero, zero, zero), (zero, zero, zero, zero), zero, zero
    here, row = s32(tokens[0] - token), s32((group << (4 if paired else 5)) + (lane >> 2))
    # the kernel before this one does not write residuals, and it has waited for those that do
    olds = (
        old_row(row, token, here, rows, residual, added), old_row(row + 8, token, here, rows, residual, added),
        old_row(row + 16, token, here, rows, residual, added), old_row(row + 24, token, here, rows, residual, added),
    )  # fmt: skip
    a, b = min(token, capacity - 1), min(token + 1, capacity - 1)
    of_slices = (
        mad_wide_s32(at, 4 * UNIT, address(partials, 4 * lane)), address(scales, a), address(scales, b),
        address(squares, a), address(squares, b), s32((4 * UNIT) << (log2_units + log2_row_warps)), s32(4 * capacity),
        slices,
    )  # fmt: skip
    inverse = div_full(np.float32(1), np.float32(columns))
    griddepcontrol_wait()
    s = s32(0)
    while s < slices:
        no_unroll()
        if slices - s > 4:
            sums = add_eight(sums, s, of_slices)
            s = s32(s + 8)
        else:
            sums = add_four(sums, s, of_slices)
            s = s32(s + 4)
    upper, lower, square, square2 = sums
    factor, factor2 = np.float32(1), np.float32(1)
    if normed:
        factor, factor2 = rsqrt_approx(square * inverse + eps), rsqrt_approx(square2 * inverse + eps)
    return row, token, here, results_of(paired, (factor, factor2), upper, lower, olds)


@device
def places_of(paired, group, token, here, rows, kv_rows, outs):
    """Where a lane's results belong: (address of the first row's of the first token, bytes to the next token's, how
    many of two tokens exist in each of four rows, 8 apart). A group has rows of one of the weights.
    """
    first, height, out = s32(group << (4 if paired else 5)), s32(rows), address(outs[0], 0)
    if kv_rows > 0 and first >= rows:
        first, height, out = s32(first - rows), s32(kv_rows), address(outs[1], 0)
        if first >= kv_rows:
            first, out = s32(first - kv_rows), address(outs[2], 0)
    row, none = s32(first + ((cuda.threadIdx.x & 31) >> 2)), s32(0)
    to = mad_wide_s32(row, 4, mad_wide_s32(token, s32(4 * height), out))
    return to, s32(4 * height), (
        here if row < height else none, here if row + 8 < height else none,
        here if row + 16 < height and not paired else none, here if row + 24 < height and not paired else none,
    )  # fmt: skip


@device
def put_two(to, next_token, here, pair):
    """Write a row's results for two tokens, `here` of which exist."""
    if here > 0:
        st_global_f32(to, pair[0])
    if here > 1:
        st_global_f32(to + next_token, pair[1])


@launch_bounds(min_blocks=2)  # a block finds room beside one of `skinny`
@cuda.jit
def skinny_sum_kernel(tokens, partials, scales, squares, capacity, normed, eps, columns, paired, residual, added, q, k,
                      v, rows, kv_rows, slices, groups, log2_units, log2_row_warps):  # fmt: skip
    """Add up the slices' sums and finish the results. A warp has a unit: blockIdx.x counts eight groups of 32 rows,
    blockIdx.y units of 8 tokens.
    """
    griddepcontrol_launch_dependents()  # at once: what comes next copies weights, which nothing here writes
    group = s32(cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5))
    if 8 * cuda.blockIdx.y >= tokens[0] or group >= groups:
        griddepcontrol_wait()  # a kernel must not end before the preceding one
        return
    token = s32(8 * cuda.blockIdx.y + 2 * (cuda.threadIdx.x & 3))
    to, next_token, here = places_of(
        paired, group, token, s32(tokens[0] - token), rows, kv_rows, (q, k, v)
    )  # fmt: skip
    _, _, _, results = add_slices(
        tokens, partials, scales, squares, capacity, normed, eps, columns, paired, residual, added, rows, slices,
        groups, group, log2_units, log2_row_warps,
    )  # fmt: skip
    put_two(to, next_token, here[0], results[0])
    put_two(to + 32, next_token, here[1], results[1])
    put_two(to + 64, next_token, here[2], results[2])
    put_two(to + 96, next_token, here[3], results[3])


@launch_bounds(min_blocks=2)
@cuda.jit
def skinny_sum_all_reduce_kernel(tokens, partials, scales, squares, capacity, normed, eps, columns, residual, added,
                                 out, rows, slices, groups, log2_units, log2_row_warps, exchange, inbox_at, slot,
                                 peers, stop, rank, ranks):  # fmt: skip
    """The same for one weight, and add up the results over ranks."""
    griddepcontrol_launch_dependents()
    group = s32(cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5))
    if 8 * cuda.blockIdx.y >= tokens[0] or group >= groups:
        griddepcontrol_wait()
        return
    row, token, here, results = add_slices(
        tokens, partials, scales, squares, capacity, normed, eps, columns, False, residual, added, rows, slices,
        groups, group, log2_units, log2_row_warps,
    )  # fmt: skip
    link, unit = link_of(exchange, inbox_at, slot, peers, stop, rank, ranks), cuda.blockIdx.y * groups + group
    send_unit(link, unit, results)
    put_unit(False, row, token, here, add_up_unit(link, unit), rows, out)
