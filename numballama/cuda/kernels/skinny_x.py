"""X of a skinny GEMM: a slice of K of each row, after an RMSNorm's weight, rounded to 16 bits.

A slice of a row is multiplied by a power of two that brings its largest element to [2^14, 2^15), so that float16 holds
it, and rounded by one warp. For few tokens each block rounds its slice itself, on the way to shared memory. For more
that would take longer than a kernel of its own, after which blocks copy what they need. Both compute the same bits.
`wide` has longer slices, each rounded by a block. The rest of the norm is a factor for each row, from the slices' sums
of squares (`skinny_sum`, `wide`).
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..arithmetic import float_as_uint, mad_wide_s32, max_magnitude, redux_max_s32, s32
from ..fragments import pieces_of
from ..intrinsics import (
    address,
    cp_async_16,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_global_f32_or_0,
    ld_global_v4_f32_or_0,
    no_unroll,
)
from ..mma import cvt_rn_x2, st_global_v2_u32, st_shared_v4_u32
from .common import device, magnitude_bits, max_registers
from .gemv_x import squared
from .linear_sums import add_up_rows, link_of
from .params import SKINNY_WARPS as WARPS
from .reduce import warp_sum
from .rounding import load4, scales_for, warp_largest_of


@device
def piece_at(where, left):
    """Eight float32 from a global address on; `left`, a multiple of four, of them are in the row: zeros after them."""
    return ld_global_v4_f32_or_0(where, left) + ld_global_v4_f32_or_0(where + 16, s32(left - 4))


@device
def odd_piece_at(where, left):
    """The same of a row of any length."""
    return (
        ld_global_f32_or_0(where, left), ld_global_f32_or_0(where + 4, s32(left - 1)),
        ld_global_f32_or_0(where + 8, s32(left - 2)), ld_global_f32_or_0(where + 12, s32(left - 3)),
        ld_global_f32_or_0(where + 16, s32(left - 4)), ld_global_f32_or_0(where + 20, s32(left - 5)),
        ld_global_f32_or_0(where + 24, s32(left - 6)), ld_global_f32_or_0(where + 28, s32(left - 7)),
    )  # fmt: skip


@device
def slice_at(where, left, even):
    """A lane's four pieces of a slice, each 32 further: from a global address on, zeros after `left` columns. `even` if
    rows are whole groups of four. All loads are in flight at once.
    """
    if even:
        return (
            piece_at(where, left), piece_at(where + 1024, s32(left - 256)), piece_at(where + 2048, s32(left - 512)),
            piece_at(where + 3072, s32(left - 768)),
        )  # fmt: skip
    return (
        odd_piece_at(where, left), odd_piece_at(where + 1024, s32(left - 256)),
        odd_piece_at(where + 2048, s32(left - 512)), odd_piece_at(where + 3072, s32(left - 768)),
    )  # fmt: skip


@device
def norm_of_slice(norm, normed, first_column, row_pieces, columns):
    """The norm's weight of this lane's pieces of a slice. No kernel writes it: it may be loaded before the wait."""
    k = s32(first_column + 8 * (cuda.threadIdx.x & 31))
    left = s32(s32(min(columns, first_column + 8 * row_pieces)) - k) if normed else s32(0)
    return slice_at(address(norm, k), left, columns & 3 == 0)


@device
def times8(v, w):
    """Products of eight elements and their weights."""
    return v[0] * w[0], v[1] * w[1], v[2] * w[2], v[3] * w[3], v[4] * w[4], v[5] * w[5], v[6] * w[6], v[7] * w[7]


@device
def squared8(v):
    """Sum of the squares of eight elements."""
    return squared((v[0], v[1], v[2], v[3])) + squared((v[4], v[5], v[6], v[7]))


@device
def largest8(v):
    """The largest magnitude of eight elements; NaNs count only where all are NaN."""
    a, b = max_magnitude(v[0], v[1]), max_magnitude(v[2], v[3])
    c, d = max_magnitude(v[4], v[5]), max_magnitude(v[6], v[7])
    return max_magnitude(max_magnitude(a, b), max_magnitude(c, d))


@device
def normed_piece(piece, normed):
    """(sum of squares of a piece, the piece times the norm's weight if `normed`, bits of the largest magnitude)."""
    (a, b, c, d, e, f, g, h), w = piece
    squares = squared((a, b, c, d)) + squared((e, f, g, h))
    if normed:
        a, b, c, d, e, f, g, h = (
            a * w[0], b * w[1], c * w[2], d * w[3], e * w[4], f * w[5], g * w[6], h * w[7],
        )  # fmt: skip
    low = max(magnitude_bits(a), magnitude_bits(b), magnitude_bits(c), magnitude_bits(d))
    high = max(magnitude_bits(e), magnitude_bits(f), magnitude_bits(g), magnitude_bits(h))
    return squares, (a, b, c, d, e, f, g, h), max(low, high)


@device
def rounded_piece(rounded, v, up, pieces):
    """A piece times a power of two, rounded to the 16-bit type of `rounded`: four words, in the order of `mma_step`."""
    a, b, c, d, e, f, g, h = v
    if pieces == 4:
        b, c, f, g = c, b, g, f
    return (
        cvt_rn_x2(rounded, a * up, b * up), cvt_rn_x2(rounded, c * up, d * up),
        cvt_rn_x2(rounded, e * up, f * up), cvt_rn_x2(rounded, g * up, h * up),
    )  # fmt: skip


@device
def round_slice(where, left, norms, normed, even, squares_wanted, rounded, pieces):
    """Round a warp's slice of a row: four pieces per lane, number `lane` and every 32nd after it, from the lane's first
    one at a global address on, `left` columns before the slice's end.

    Returns (their words, the factor that undoes the scale, this lane's sum of squares if `squares_wanted`). The scale
    is a power of two that brings the slice's largest element to [2^14, 2^15).
    """
    v0, v1, v2, v3 = slice_at(where, left, even)
    squares = np.float32(0)
    if squares_wanted:
        squares = (squared8(v0) + squared8(v1)) + (squared8(v2) + squared8(v3))
    if normed:
        v0, v1, v2, v3 = times8(v0, norms[0]), times8(v1, norms[1]), times8(v2, norms[2]), times8(v3, norms[3])
    largest = max_magnitude(max_magnitude(largest8(v0), largest8(v1)), max_magnitude(largest8(v2), largest8(v3)))
    up, down = scales_for(redux_max_s32(np.int32(float_as_uint(largest))))
    words = (
        rounded_piece(rounded, v0, up, pieces), rounded_piece(rounded, v1, up, pieces),
        rounded_piece(rounded, v2, up, pieces), rounded_piece(rounded, v3, up, pieces),
    )  # fmt: skip
    return words, down, squares


@device
def round_short_slice(where, left, norms, normed, squares_wanted, rounded, pieces):
    """`round_slice` of up to two pieces per lane, in rows of whole groups of four: the same bits."""
    v0, v1 = piece_at(where, left), piece_at(where + 1024, s32(left - 256))
    squares = np.float32(0)
    if squares_wanted:
        squares = squared8(v0) + squared8(v1)
    if normed:
        v0, v1 = times8(v0, norms[0]), times8(v1, norms[1])
    largest = max_magnitude(largest8(v0), largest8(v1))
    up, down = scales_for(redux_max_s32(np.int32(float_as_uint(largest))))
    return (rounded_piece(rounded, v0, up, pieces), rounded_piece(rounded, v1, up, pieces)), down, squares


@device
def put_words(rounded, at, padded_left, words, here):
    """Write a piece to global memory, if it is `here`."""
    if here and padded_left > 0:
        to = address(rounded, at)
        st_global_v2_u32(to, words[0], words[1])
        st_global_v2_u32(to + 8, words[2], words[3])


@cuda.jit
def skinny_round_kernel(
    tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns, slice_columns, pieces
):
    """Round X, a slice of a row per warp: rounded [T, padded], and per slice and token its scale and sum of squares.

    blockIdx.x counts eight tokens, blockIdx.y slices.
    """
    griddepcontrol_launch_dependents()  # at once: the next kernel's copies of weights can start
    t, lane = s32(cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5)), s32(cuda.threadIdx.x & 31)
    first, row_pieces, count = s32(cuda.blockIdx.y * slice_columns), s32(slice_columns >> 3), tokens[0]
    norms = norm_of_slice(norm, normed, first, row_pieces, columns)
    griddepcontrol_wait()
    if t >= count:
        return
    k = s32(first + 8 * lane)
    left = s32(s32(min(columns, first + slice_columns)) - k)
    words, down, total = round_slice(
        address(x, t * columns + k), left, norms, normed, columns & 3 == 0, True, rounded, pieces
    )  # fmt: skip
    total = warp_sum(total)
    if lane == 0:
        scales[cuda.blockIdx.y * capacity + t], squares[cuda.blockIdx.y * capacity + t] = down, total
    at, left = t * padded + k, padded - k
    put_words(rounded, at, left, words[0], lane < row_pieces)
    put_words(rounded, at + 256, left - 256, words[1], lane + 32 < row_pieces)
    put_words(rounded, at + 512, left - 512, words[2], lane + 64 < row_pieces)
    put_words(rounded, at + 768, left - 768, words[3], lane + 96 < row_pieces)


@max_registers(48)  # a block finds room beside those of `wide`
@cuda.jit
def wide_round_kernel(
    tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns, slice_columns, pieces
):
    """The same for longer slices: a slice of a row per block, whose threads have two pieces each.

    blockIdx.x counts tokens, blockIdx.y slices.
    """
    griddepcontrol_launch_dependents()  # at once: the next kernel's copies of weights can start
    t, i, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    first, row_pieces, count = cuda.blockIdx.y * slice_columns, slice_columns >> 3, tokens[0]
    k0, k1 = first + 8 * i, first + 8 * (i + threads)
    norm0, norm1 = norm_of(norm, normed, k0, columns), norm_of(norm, normed, k1, columns)
    griddepcontrol_wait()
    if t >= count:
        return
    x0 = eight_of(x, t * columns, k0, i < row_pieces, columns)
    x1 = eight_of(x, t * columns, k1, i + threads < row_pieces, columns)
    round_pieces((x0, norm0), (x1, norm1), t, normed, rounded, padded, scales, squares, capacity, first, row_pieces,
                 pieces)  # fmt: skip


@cuda.jit
def wide_round_sums_kernel(
    tokens, x, norm, normed, rounded, padded, scales, squares, capacity, columns, slice_columns, pieces, exchange,
    inbox_at, slot, peers, stop, rank, ranks,
):  # fmt: skip
    """The same of sums over ranks of what the kernels of `wide` sent; they are written to x."""
    griddepcontrol_launch_dependents()
    t, i, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    first, row_pieces, count = cuda.blockIdx.y * slice_columns, slice_columns >> 3, tokens[0]
    k0, k1 = first + 8 * i, first + 8 * (i + threads)
    norm0, norm1 = norm_of(norm, normed, k0, columns), norm_of(norm, normed, k1, columns)
    link = link_of(exchange, inbox_at, slot, peers, stop, rank, ranks)
    end = min(columns, first + slice_columns) if t < count else 0
    x0, x1 = add_up_rows(link, t, k0, k1, end, columns, x)
    griddepcontrol_wait()  # before it writes what the preceding kernel reads
    if t >= count:
        return
    round_pieces((x0, norm0), (x1, norm1), t, normed, rounded, padded, scales, squares, capacity, first, row_pieces,
                 pieces)  # fmt: skip


@device
def eight_of(x, start, k, inside, columns):
    """x[start + k : start + k + 8], zeros from `columns` on and if not `inside`."""
    zero, even = np.float32(0), columns & 3 == 0
    a, b = (zero, zero, zero, zero), (zero, zero, zero, zero)
    if inside:
        a, b = load4(x, start, k, columns, even), load4(x, start, k + 4, columns, even)
    return a + b


@device
def norm_of(norm, normed, k, columns):
    """Eight elements of the norm's weight, which no kernel writes: they may be loaded before the wait."""
    return eight_of(norm, 0, k, normed, columns)


@device
def round_pieces(piece0, piece1, t, normed, rounded, padded, scales, squares, capacity, first, row_pieces, pieces):
    """Round the two pieces that each thread has of the block's slice, from column `first` on, and write them."""
    warp_squares, warp_largest = cuda.shared.array(32, np.float32), cuda.shared.array(32, np.int32)
    i, threads = cuda.threadIdx.x, cuda.blockDim.x
    lane, warps = i & 31, threads >> 5
    squares0, v0, largest0 = normed_piece(piece0, normed)
    squares1, v1, largest1 = normed_piece(piece1, normed)
    total, largest = warp_sum(squares0 + squares1), warp_largest_of(max(largest0, largest1))
    if warps > 1:
        if lane == 0:
            warp_squares[i >> 5], warp_largest[i >> 5] = total, largest
        cuda.syncthreads()
        total = warp_sum(warp_squares[lane] if lane < warps else np.float32(0))
        largest = warp_largest_of(warp_largest[lane] if lane < warps else np.int32(0))
    up, down = scales_for(largest)
    if i == 0:
        scales[cuda.blockIdx.y * capacity + t], squares[cuda.blockIdx.y * capacity + t] = down, total
    at, left = t * padded + first + 8 * i, padded - first - 8 * i
    put_words(rounded, at, left, rounded_piece(rounded, v0, up, pieces), i < row_pieces)
    put_words(
        rounded, at + 8 * threads, left - 8 * threads, rounded_piece(rounded, v1, up, pieces), i + threads < row_pieces
    )  # fmt: skip


@device
def place_of(i, n, pieces):
    """Byte offset of piece `i` of token `n` in its row: those that one lane multiplies are 64 bytes apart; of two
    neighbouring 64 bytes, tokens with odd numbers have the second first.
    """
    log2 = 0 if pieces == 1 else (1 if pieces == 2 else 2)
    inside = i & (4 * pieces - 1)
    return ((i - inside + ((inside & (pieces - 1)) << 2) + (inside >> log2)) ^ ((n & 1) << 2)) << 4


@device
def put_shared(at, here, words):
    """Write a piece to shared memory, if it is `here`."""
    if here:
        st_shared_v4_u32(at, words[0], words[1], words[2], words[3])


@device
def round_x(x, norms, normed, rounded, scales, squares, capacity, first_token, tokens, rows, first_column, columns,
            row_bytes, payload, shared_at):  # fmt: skip
    """Round the block's columns of `rows` tokens to shared memory, zeros for tokens that are missing. The first block
    of a slice writes their scales and sums of squares. `norms` are what `norm_of_slice` returned.
    """
    lane, pieces, row_pieces = s32(cuda.threadIdx.x & 31), pieces_of(payload), s32(row_bytes >> 4)
    k, leads, even = s32(first_column + 8 * lane), cuda.blockIdx.x == 0, columns & 3 == 0
    in_slice = s32(s32(min(columns, first_column + 8 * row_pieces)) - k)
    n = s32(cuda.threadIdx.x >> 5)
    while n < rows:
        no_unroll()
        t = s32(first_token + n)
        where, left = address(x, mad_wide_s32(t, columns, k)), in_slice if t < tokens else s32(0)
        at = s32(shared_at + n * row_bytes + place_of(lane, n, pieces))  # 32 further in the row are 512 bytes further
        if row_pieces <= 64 and even:
            two, down, total = round_short_slice(where, left, norms, normed, leads, rounded, pieces)
            put_shared(at, lane < row_pieces, two[0])
            put_shared(s32(at + 512), s32(lane + 32) < row_pieces, two[1])
        else:
            four, down, total = round_slice(where, left, norms, normed, even, leads, rounded, pieces)
            put_shared(at, lane < row_pieces, four[0])
            put_shared(s32(at + 512), s32(lane + 32) < row_pieces, four[1])
            put_shared(s32(at + 1024), s32(lane + 64) < row_pieces, four[2])
            put_shared(s32(at + 1536), s32(lane + 96) < row_pieces, four[3])
        if leads:
            total = warp_sum(total)
            if lane == 0 and t < tokens:
                scales[cuda.blockIdx.z * capacity + t], squares[cuda.blockIdx.z * capacity + t] = down, total
        n = s32(n + WARPS)


@device
def stage_x(x, padded, first_token, tokens, rows, first_column, row_bytes, payload, shared_at):
    """Start copying the block's columns of `rows` rounded tokens to shared memory, zeros for what is missing."""
    lane, pieces, row_pieces = s32(cuda.threadIdx.x & 31), pieces_of(payload), s32(row_bytes >> 4)
    k, n = s32(first_column + 8 * lane), s32(cuda.threadIdx.x >> 5)
    while n < rows:
        no_unroll()
        t = s32(first_token + n)
        source, left = address(x, mad_wide_s32(t, padded, k)), s32(padded - k) if t < tokens else s32(0)
        to, i = s32(shared_at + n * row_bytes + place_of(lane, n, pieces)), lane
        while i < row_pieces:
            no_unroll()
            cp_async_16(to, source, left)
            i, to, left = s32(i + 32), s32(to + 512), s32(left - 256)
            source += 512
        n = s32(n + WARPS)
