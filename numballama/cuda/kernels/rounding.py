"""Rows of float32 in 16 bits, as tensor cores take them: X, after an RMSNorm if there is one, and float32 weights.

A row is multiplied by a power of two that brings its largest element to [2^14, 2^15), so that float16 holds it; who
multiplies it undoes that exactly. float32 takes two float16: the row rounded, and rounded what that took away. Three
products of such pieces have the precision of float32 (`wgmma_gemm`).
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..arithmetic import cvt_f32_f16, uint_as_float
from ..intrinsics import address, griddepcontrol_launch_dependents, griddepcontrol_wait
from ..mma import cvt_rn_x2, st_global_v2_u32
from .common import FULL_MASK, device, magnitude_bits
from .gemv_x import ld_v4_f32_or_0, squared, times4
from .reduce import warp_sum


@cuda.jit
def round_kernel(tokens, every_row, x, stride, norm, normed, eps, out, scales, columns, padded, exchanged, split):
    """out[t] = x[t], or norm(x[t]), in 16 bits, times a power of two whose inverse is scales[t]; padded with zeros.

    x has rows of `stride` elements: those of the run's tokens, or all of a weight with `every_row`. With `exchanged`
    the second and third of each four columns change places, as `fragments` decodes 4-bit weights. With `split` a row of
    `out` has `padded` more columns, for what rounding took away.

    A thread keeps sixteen elements of a row in registers and reads those of very long rows twice.
    """
    t = cuda.blockIdx.x
    griddepcontrol_launch_dependents()  # at once: the next kernel's copies of weights can start
    if t >= tokens[0] and not every_row:
        return
    warp_squares = cuda.shared.array(32, np.float32)
    warp_largest = cuda.shared.array(32, np.int32)
    row, step, even = t * stride, 4 * cuda.blockDim.x, stride & 3 == 0
    k, one = 4 * cuda.threadIdx.x, np.float32(1)
    w0, w1, w2, w3 = (one, one, one, one), (one, one, one, one), (one, one, one, one), (one, one, one, one)
    if normed:  # no kernel writes the norm's weight
        w0, w1 = load4(norm, 0, k, columns, even), load4(norm, 0, k + step, columns, even)
        w2, w3 = load4(norm, 0, k + 2 * step, columns, even), load4(norm, 0, k + 3 * step, columns, even)
    griddepcontrol_wait()
    v0, v1 = load4(x, row, k, columns, even), load4(x, row, k + step, columns, even)
    v2, v3 = load4(x, row, k + 2 * step, columns, even), load4(x, row, k + 3 * step, columns, even)
    squares = (squared(v0) + squared(v1)) + (squared(v2) + squared(v3))
    v0, v1, v2, v3 = times4(v0, w0), times4(v1, w1), times4(v2, w2), times4(v3, w3)
    largest = max(max(magnitude_bits4(v0), magnitude_bits4(v1)), max(magnitude_bits4(v2), magnitude_bits4(v3)))
    for far in range(k + 4 * step, padded, step):
        v = load4(x, row, far, columns, even)
        squares += squared(v)
        if normed:
            v = times4(v, load4(norm, 0, far, columns, even))
        largest = max(largest, magnitude_bits4(v))
    lane, warp, warps = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockDim.x >> 5
    squares, largest = warp_sum(squares), warp_largest_of(largest)
    if lane == 0:
        warp_squares[warp], warp_largest[warp] = squares, largest
    cuda.syncthreads()
    squares = warp_sum(warp_squares[lane] if lane < warps else np.float32(0))
    largest = warp_largest_of(warp_largest[lane] if lane < warps else np.int32(0))
    factor = one
    if normed:
        factor = one / np.float32(math.sqrt(squares / np.float32(columns) + eps))
        # rounding keeps the order, so the largest product is that of the largest element
        largest = magnitude_bits(uint_as_float(np.uint32(largest)) * factor)
    up, down = scales_for(largest)
    if cuda.threadIdx.x == 0:
        scales[t] = down
    start = (t * padded) << split
    put_rounded(out, start, k, padded, v0, factor, up, exchanged, split)
    put_rounded(out, start, k + step, padded, v1, factor, up, exchanged, split)
    put_rounded(out, start, k + 2 * step, padded, v2, factor, up, exchanged, split)
    put_rounded(out, start, k + 3 * step, padded, v3, factor, up, exchanged, split)
    for far in range(k + 4 * step, padded, step):
        v = load4(x, row, far, columns, even)
        if normed:
            v = times4(v, load4(norm, 0, far, columns, even))
        put_rounded(out, start, far, padded, v, factor, up, exchanged, split)


@device
def scales_for(largest):
    """(the power of two that brings the magnitude with these bits to [2^14, 2^15), its inverse)."""
    shift = 0
    if largest < 0x7F800000:  # else it is infinity or NaN, which must show in the results
        shift = min(14 - ((largest >> 23) - 127), 126)
    return uint_as_float(np.uint32((127 + shift) << 23)), uint_as_float(np.uint32((127 - shift) << 23))


@device
def warp_largest_of(x):
    """Maximum of an int32 over the 32 lanes, in every lane."""
    for i in range(5):
        x = max(x, np.int32(cuda.shfl_xor_sync(FULL_MASK, x, 16 >> i)))
    return x


@device
def magnitude_bits4(v):
    """The largest of four magnitudes, as bits, whose order is the same."""
    return max(max(magnitude_bits(v[0]), magnitude_bits(v[1])), max(magnitude_bits(v[2]), magnitude_bits(v[3])))


@device
def put_rounded(out, start, k, padded, v, factor, up, exchanged, split):
    """Write four elements, times `factor` and a power of two, in the 16-bit type of `out`; nothing after the row."""
    if k >= padded:
        return
    a, b, c, d = v[0] * factor * up, v[1] * factor * up, v[2] * factor * up, v[3] * factor * up
    if exchanged:
        b, c = c, b
    first, second = cvt_rn_x2(out, a, b), cvt_rn_x2(out, c, d)
    st_global_v2_u32(address(out, start + k), first, second)
    if split:
        a, b = a - cvt_f32_f16(first), b - cvt_f32_f16(first >> np.uint32(16))
        c, d = c - cvt_f32_f16(second), d - cvt_f32_f16(second >> np.uint32(16))
        st_global_v2_u32(address(out, start + padded + k), cvt_rn_x2(out, a, b), cvt_rn_x2(out, c, d))


@device
def load4(x, start, k, columns, even):
    """x[start + k : start + k + 4], zeros from `columns` on; `even` if rows are whole groups of four."""
    zero = np.float32(0)
    if even:
        return ld_v4_f32_or_0(x, start, k, columns)
    return (
        x[start + k] if k < columns else zero, x[start + k + 1] if k + 1 < columns else zero,
        x[start + k + 2] if k + 2 < columns else zero, x[start + k + 3] if k + 3 < columns else zero,
    )  # fmt: skip
