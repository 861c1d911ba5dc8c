"""Results of attention: as float32, or in 16 bits where the linear layer that comes next would only round them.

A result is an average of values, so it fits the type of a float16 cache: it is rounded as the values were, without a
scale. Any float32 fits bfloat16. Some linear layers want the columns in another order (`skinny_x.rounded_piece`): then
`swapped` is 1, and of each four columns the two in the middle change places.
"""

from __future__ import annotations

from numba import cuda

from ..fragments import is_float32
from ..intrinsics import address
from ..mma import st_global_eight, st_global_rows, st_global_rows_16
from ..quant_traits import store_element
from .common import device


@device
def put_element(out, at, swapped, x):
    """out[at] = x"""
    middle = ((at & 3) == 1) | ((at & 3) == 2)
    store_element(out, at ^ 3 if swapped and middle else at, x)


@device
def put_eight(out, at, swapped, x, factor):
    """out[at : at + 8] = x · factor; `at` is a multiple of 8."""
    a, b, c, d = x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor
    e, f, g, h = x[4] * factor, x[5] * factor, x[6] * factor, x[7] * factor
    if swapped:
        b, c, f, g = c, b, g, f
    st_global_eight(out, address(out, at), (a, b, c, d, e, f, g, h))


@device
def put_rows(out, swapped, sums, first_at, second_at, first, second):
    """Write a lane's part of two rows that wgmma left to it, from elements `first_at` and `second_at` of out on: the
    first `first` columns of one row, `second` of the other.
    """
    if is_float32(out):
        st_global_rows(sums, address(out, first_at), address(out, second_at), first, second)
    else:
        low, high = 0, 1
        if swapped:  # a lane has two neighbouring columns of each eight, an odd one the third and the fourth of four
            if cuda.threadIdx.x & 1:
                low = -1
            else:
                high = 2
        places = (
            address(out, first_at + low), address(out, second_at + low), address(out, first_at + high),
            address(out, second_at + high),
        )  # fmt: skip
        st_global_rows_16(out, sums, places, first, second)
