"""Queries of `group_attention`: each as the sum of two pieces of 16 bits, in the layout that products want.

A query is multiplied by a power of two that brings its largest element to [2^14, 2^15), so that float16 holds it.
"""

from __future__ import annotations

import numpy as np

from ..arithmetic import float_as_uint, uint_as_float
from ..group_mma import join_pieces, join_queries
from ..intrinsics import ld_v4_f32
from ..mma import cvt_rn_x2
from ..quant_traits import unpack8
from .common import device
from .reduce import quad_max


@device
def query_piece(q, at, here, factor):
    """Eight elements of a query times `factor`; zeros if it is not `here`."""
    zero = np.float32(0)
    low, high = (zero, zero, zero, zero), (zero, zero, zero, zero)
    if here:
        low, high = ld_v4_f32(q, at), ld_v4_f32(q, at + 4)
    return (
        low[0] * factor, low[1] * factor, low[2] * factor, low[3] * factor,
        high[0] * factor, high[1] * factor, high[2] * factor, high[3] * factor,
    )  # fmt: skip


@device
def largest_of(x):
    """The largest magnitude of eight elements."""
    low = max(max(abs(x[0]), abs(x[1])), max(abs(x[2]), abs(x[3])))
    return max(low, max(max(abs(x[4]), abs(x[5])), max(abs(x[6]), abs(x[7]))))


@device
def rounded8(memory, x):
    """Eight float32 rounded to the 16-bit type of `memory`, in four words."""
    return (
        cvt_rn_x2(memory, x[0], x[1]), cvt_rn_x2(memory, x[2], x[3]),
        cvt_rn_x2(memory, x[4], x[5]), cvt_rn_x2(memory, x[6], x[7]),
    )  # fmt: skip


@device
def pieces_of_query(memory, x, up):
    """Eight elements times `up` as two pieces: four words of rounded ones, four of what rounding has left."""
    x = (x[0] * up, x[1] * up, x[2] * up, x[3] * up, x[4] * up, x[5] * up, x[6] * up, x[7] * up)
    first = rounded8(memory, x)
    r = unpack8(memory, first)
    rest = (x[0] - r[0], x[1] - r[1], x[2] - r[2], x[3] - r[3], x[4] - r[4], x[5] - r[5], x[6] - r[6], x[7] - r[7])
    return first + rounded8(memory, rest)


@device
def scales_for(largest):
    """(power of two that brings a magnitude to [2^14, 2^15), its inverse)."""
    shift = min(14 - (np.int64(float_as_uint(largest) >> np.uint32(23)) - 127), 126)
    return uint_as_float(np.uint32((127 + shift) << 23)), uint_as_float(np.uint32((127 - shift) << 23))


@device
def load_queries(zeros, q, at, here, factor, memory):
    """(the pieces of the lane's query, the factor that undoes their scale). The scale is a power of two that brings the
    query's largest element to [2^14, 2^15).
    """
    wide = here and len(zeros) > 32
    a, b = query_piece(q, at, here, factor), query_piece(q, at + 32, here, factor)
    c, d = query_piece(q, at + 64, wide, factor), query_piece(q, at + 96, wide, factor)
    up, down = scales_for(quad_max(max(max(largest_of(a), largest_of(b)), max(largest_of(c), largest_of(d)))))
    words = join_queries(
        zeros, pieces_of_query(memory, a, up), pieces_of_query(memory, b, up), pieces_of_query(memory, c, up),
        pieces_of_query(memory, d, up),
    )  # fmt: skip
    return words, down


@device
def column_of_query(memory, x, up, second):
    """Eight elements times `up`, four words: rounded ones, or what rounding has left if it is the `second` piece."""
    words = pieces_of_query(memory, x, up)
    a, b, c, d, e, f, g, h = words
    return (e if second else a, f if second else b, g if second else c, h if second else d)


@device
def load_columns(zeros, q, at, here, factor, memory, second):
    """(a piece of the lane's query for `mma_scores_few`, the factor that undoes its scale), as `load_queries`."""
    wide = here and len(zeros) > 16
    a, b = query_piece(q, at, here, factor), query_piece(q, at + 32, here, factor)
    c, d = query_piece(q, at + 64, wide, factor), query_piece(q, at + 96, wide, factor)
    up, down = scales_for(quad_max(max(max(largest_of(a), largest_of(b)), max(largest_of(c), largest_of(d)))))
    words = join_pieces(
        zeros, column_of_query(memory, a, up, second), column_of_query(memory, b, up, second),
        column_of_query(memory, c, up, second), column_of_query(memory, d, up, second),
    )  # fmt: skip
    return words, down
