"""How `gemv` stages x in shared memory, in the layout that `dot` describes: after an RMSNorm if there is one, as it is,
or in fixed point for weights with scales.

Each block stages all of x, so a kernel of a layer begins with this, and its instructions count: a warp issues one every
six or seven cycles, and nothing else can be done. Whatever does not need x comes before the wait for the preceding
kernel (`before_x`).
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..arithmetic import cvt_rni_s32, float_as_uint, prmt_byte_planes, s32, uint_as_float
from ..intrinsics import ld_v4_f32, no_unroll, st_shared_u32
from ..mma import st_shared_v4_u32
from ..quant_traits import has_scales, is_packed, is_q4_0, is_q6_k, per_16_bytes, zero_point
from .common import FULL_MASK, device, magnitude_bits
from .dot import columns_of_stage, x_step
from .params import GEMV_THREADS as THREADS
from .params import GEMV_WARPS as WARPS
from .params import X_LANE_STRIDE
from .reduce import warp_sum

STRIDE = 4 * THREADS
"""Columns of x that a block stages at a time, four a thread."""


@device
def x_place(x_at, column, payload):
    """(where column 4n of x is staged, where its factor is), as shared addresses. x begins at `x_at`."""
    elements = per_16_bytes(payload)
    log2 = 2 if elements == 4 else (3 if elements == 8 else (4 if elements == 16 else 5))
    chunk, inside = s32(column >> (5 + log2)), s32(column & (32 * elements - 1))
    lane, word = s32(inside >> log2), s32((inside & (elements - 1)) >> 2)
    if is_q6_k(payload):
        chunk, lane = s32(2 * (column >> 10) + ((column >> 4) & 1)), s32((column & 1023) >> 5)
    base = s32(x_at + chunk * (4 * x_step(payload)))
    if has_scales(payload):
        at = s32(base + (word >> 2) * 512 + lane * 16 + (word & 3) * 4)
    else:
        at = s32(base + word * (4 * X_LANE_STRIDE) + lane * 16)
    return at, s32(base + 96 * elements + 4 * lane)


@device
def x_place_after(x_at, place, column, strides, payload):
    """`x_place` of the column `strides` · STRIDE after `column`, which has `place`."""
    if STRIDE & 1023 == 0:  # whole chunks of any type
        step = s32(strides * (STRIDE // (32 * per_16_bytes(payload)) * (4 * x_step(payload))))
        return s32(place[0] + step), s32(place[1] + step)
    return x_place(x_at, s32(column + strides * STRIDE), payload)


@device
def norm_of_sixteen(norm, column, limit):
    """The norm's weight of the sixteen columns that a thread stages from `column` on; zeros from `limit` on."""
    return (
        ld_v4_f32_or_0(norm, 0, column, limit), ld_v4_f32_or_0(norm, 0, s32(column + STRIDE), limit),
        ld_v4_f32_or_0(norm, 0, s32(column + 2 * STRIDE), limit),
        ld_v4_f32_or_0(norm, 0, s32(column + 3 * STRIDE), limit),
    )  # fmt: skip


@device
def before_x(norm, normed, columns, payload, x_at):
    """What `stage_x` can know before x is there: (shared address of x, the thread's first place in it, the norm's
    weight of its first sixteen columns). No kernel writes the norm's weight.
    """
    column, zero = s32(4 * cuda.threadIdx.x), np.float32(0)
    weights = (zero, zero, zero, zero), (zero, zero, zero, zero), (zero, zero, zero, zero), (zero, zero, zero, zero)
    if columns & 3 == 0:
        weights = norm_of_sixteen(norm, column, columns if normed else s32(0))
    return x_at, x_place(x_at, column, payload), weights


@device
def stage_x(x, start, norm, normed, columns, payload, staging):
    """Stage x in shared memory; the last pair of chunks is padded with zeros. `staging` is what `before_x` returned.

    If `normed`, x is multiplied by the norm's weight. Returns the thread's sum of squares then (`put_squares`).
    """
    x_at, place, weights = staging
    width, column = columns_of_stage(payload), s32(4 * cuda.threadIdx.x)
    padded, squares = s32((columns + width - 1) & -width), np.float32(0)
    leads = column & (per_16_bytes(payload) - 1) == 0
    if columns & 3 == 0:
        while column < padded:
            no_unroll()
            # all loads are in flight at once, as each takes half a microsecond
            x0 = ld_v4_f32_or_0(x, start, column, columns)
            x1 = ld_v4_f32_or_0(x, start, s32(column + STRIDE), columns)
            x2 = ld_v4_f32_or_0(x, start, s32(column + 2 * STRIDE), columns)
            x3 = ld_v4_f32_or_0(x, start, s32(column + 3 * STRIDE), columns)
            if normed:
                squares += (squared(x0) + squared(x1)) + (squared(x2) + squared(x3))
                n0, n1, n2, n3 = weights
                x0, x1, x2, x3 = times4(x0, n0), times4(x1, n1), times4(x2, n2), times4(x3, n3)
            left = s32(padded - column)
            second = x_place_after(x_at, place, column, 1, payload)
            put_two(place, second, leads, left > STRIDE, payload, x0, x1)
            if left > 2 * STRIDE:
                third = x_place_after(x_at, place, column, 2, payload)
                fourth = x_place_after(x_at, place, column, 3, payload)
                put_two(third, fourth, leads, left > 3 * STRIDE, payload, x2, x3)
            place, column = x_place_after(x_at, place, column, 4, payload), s32(column + 4 * STRIDE)
            weights = norm_of_sixteen(norm, column, columns if normed else s32(0))
    else:
        while column < padded:
            no_unroll()
            v = (
                one_or_0(x, start, column, columns), one_or_0(x, start, s32(column + 1), columns),
                one_or_0(x, start, s32(column + 2), columns), one_or_0(x, start, s32(column + 3), columns),
            )  # fmt: skip
            if normed:
                squares += squared(v)
                n = (
                    one_or_0(norm, 0, column, columns), one_or_0(norm, 0, s32(column + 1), columns),
                    one_or_0(norm, 0, s32(column + 2), columns), one_or_0(norm, 0, s32(column + 3), columns),
                )  # fmt: skip
                v = times4(v, n)
            put_two(place, place, leads, False, payload, v, v)
            place, column = x_place_after(x_at, place, column, 1, payload), s32(column + STRIDE)
    return squares


@device
def put_squares(squares, normed, sums_at):
    """Write the warp's sum of squares, for `norm_factor`."""
    if normed:
        squares = warp_sum(squares)
        if cuda.threadIdx.x & 31 == 0:
            st_shared_u32(sums_at + 4 * (cuda.threadIdx.x >> 5), float_as_uint(squares))


@device
def ld_v4_f32_or_0(x, start, k, columns):
    """x[start + k : start + k + 4], zeros from `columns` on."""
    zero = np.float32(0)
    elements = (zero, zero, zero, zero)
    if k < columns:
        elements = ld_v4_f32(x, start + k)
    return elements


@device
def one_or_0(x, start, k, columns):
    """x[start + k], 0 from `columns` on."""
    return x[start + k] if k < columns else np.float32(0)


@device
def squared(v):
    """Sum of the squares of four elements."""
    return (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3])


@device
def times4(v, w):
    """Element-wise product of four elements."""
    return v[0] * w[0], v[1] * w[1], v[2] * w[2], v[3] * w[3]


@device
def put_two(place, second, leads, there, payload, v, w):
    """Stage four elements of x at `place`, and four more at `second` if they are `there`. All lanes of a warp must call
    it.
    """
    if has_scales(payload):
        elements = per_16_bytes(payload)
        # side by side: a shuffle takes as long as ten other instructions
        a, b = largest_of(v), largest_of(w)
        a, b = max(a, cuda.shfl_xor_sync(FULL_MASK, a, 1)), max(b, cuda.shfl_xor_sync(FULL_MASK, b, 1))
        a, b = max(a, cuda.shfl_xor_sync(FULL_MASK, a, 2)), max(b, cuda.shfl_xor_sync(FULL_MASK, b, 2))
        if elements == 32:
            a, b = max(a, cuda.shfl_xor_sync(FULL_MASK, a, 4)), max(b, cuda.shfl_xor_sync(FULL_MASK, b, 4))
        put_fixed(place, leads, True, payload, v, a)
        put_fixed(second, leads, there, payload, w, b)
    else:
        a, b, c, d = float_as_uint(v[0]), float_as_uint(v[1]), float_as_uint(v[2]), float_as_uint(v[3])
        st_shared_v4_u32(place[0], a, b, c, d)
        if there:
            a, b, c, d = float_as_uint(w[0]), float_as_uint(w[1]), float_as_uint(w[2]), float_as_uint(w[3])
            st_shared_v4_u32(second[0], a, b, c, d)


@device
def largest_of(v):
    """Bits of the largest of four magnitudes."""
    return max(max(magnitude_bits(v[0]), magnitude_bits(v[1])), max(magnitude_bits(v[2]), magnitude_bits(v[3])))


SMALLEST_SCALED = np.int32(24 << 23)
"""Bits of the float32 2^-103. Elements whose largest is smaller share the scale of this one."""


@device
def put_fixed(place, leads, there, payload, v, largest):
    """Stage four elements as 24-bit integers in three planes of bytes, and if they are the first that a lane
    multiplies (`leads`), their factor. All lanes of a warp must call it.

    The elements that one lane multiplies share a scale, a power of two: it brings the `largest`, as bits, to 2^22 to
    2^23. So the error of an element is at most 2^-23 of the largest, twice that of a float32. But sums of products are
    exact, and four weights take three instructions (`dp4a`) instead of twelve. After the planes come the lanes' scales,
    then their sums of x times the weight's zero point, but for q4_0 (`multiply_signed_nibbles`).
    """
    elements, at, factor_at = per_16_bytes(payload), place[0], place[1]
    # + 1: what rounds to 2^23 does not fit 24 bits
    power = max(s32((s32(largest) + 1) & 0x7F800000), SMALLEST_SCALED)
    inverse = uint_as_float(np.uint32(np.uint32(276 << 23) - np.uint32(power)))
    a, b, c, d = (
        cvt_rni_s32(v[0] * inverse),
        cvt_rni_s32(v[1] * inverse),
        cvt_rni_s32(v[2] * inverse),
        cvt_rni_s32(v[3] * inverse),
    )
    low, middle, high = prmt_byte_planes(a, b, c, d)
    if there:
        plane = 32 * elements
        st_shared_u32(at, low)
        st_shared_u32(at + plane, middle)
        st_shared_u32(at + 2 * plane, high)
    # infinite if an element is not finite; 16 times as small for q4_0, whose weights are 16 times as large
    scale = uint_as_float(np.uint32(power)) * np.float32(2.0**-26 if is_q4_0(payload) else 2.0**-22)
    if is_packed(payload):
        total = s32(a + b + c + d)
        total = s32(total + cuda.shfl_xor_sync(FULL_MASK, total, 1))
        total = s32(total + cuda.shfl_xor_sync(FULL_MASK, total, 2))
        if elements == 32:
            total = s32(total + cuda.shfl_xor_sync(FULL_MASK, total, 4))
        if there and leads:
            st_shared_u32(factor_at + 128, float_as_uint(zero_point(payload) * (np.float32(total) * scale)))
    if there and leads:
        st_shared_u32(factor_at, float_as_uint(scale))


@device
def norm_factor(shared, sums_at, normed, columns, eps):
    """1 / sqrt(mean(x²) + eps), from the sums that `stage_x` left (Zhang and Sennrich, 2019); 1 without a norm."""
    factor = np.float32(1)
    if normed:
        squares = np.float32(0)
        for i in range(WARPS):
            squares += shared[sums_at + i]
        factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(columns) + eps))
    return factor
