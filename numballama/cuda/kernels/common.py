"""Helpers of all kernel files: decorators, the start of a kernel, KV-cache addressing and small arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from ..arithmetic import cvt_f32_f16, ex2_approx, float_as_uint
from ..intrinsics import address, griddepcontrol_launch_dependents, griddepcontrol_wait, ld_global_u32
from ..quant_traits import is_q8_0, load_element

FULL_MASK = 0xFFFFFFFF
"""All 32 lanes of a warp, for the shuffle functions."""
LOG2_E = np.float32(1.4426950408889634)
"""exp(x) is computed as 2^(x · LOG2_E): the hardware has an instruction for powers of 2 only."""


def device(function: Any) -> Any:
    """Declare a device function. It is always inlined into the kernels that call it."""
    return cuda.jit(device=True, forceinline=True)(function)


def launch_bounds(min_blocks: int) -> Any:
    """Limit registers so that at least `min_blocks` blocks fit on one SM (CUDA C++: the second number of
    `__launch_bounds__`). The compiler reads it from the kernel's `py_func.min_blocks_per_sm`.
    """

    def declare(kernel: Any) -> Any:
        kernel.py_func.min_blocks_per_sm = min_blocks
        return kernel

    return declare


def max_registers(count: int) -> Any:
    """Limit the registers of a thread (CUDA C++: `__maxnreg__`). The compiler reads it from the kernel's
    `py_func.max_registers`.
    """

    def declare(kernel: Any) -> Any:
        kernel.py_func.max_registers = count
        return kernel

    return declare


@device
def add4(a, b):
    """Element-wise sum of four elements."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@device
def pdl_sync():
    """Wait for the previous kernel's results, then let the next kernel start (programmatic dependent launch).

    Every kernel calls this, or its two halves, before it reads what another kernel wrote or writes anything itself.
    A kernel may let the next one start before it waits: then kernels further on begin while those before still run.
    Before it waits a kernel reads only what nothing of this run writes: weights, keys of earlier runs. `skinny_sum`
    reads residuals, too, because the kernels of `skinny`, before it, start the next one after their own wait. Kernels
    that call `add_up_rows` read and write before they wait: each number that comes says that the sender's wait is over.
    """
    griddepcontrol_wait()
    griddepcontrol_launch_dependents()


@device
def is_padding_token(tokens):
    """Whether this block's token, blockIdx.y, is beyond the tokens[0] tokens of this run.

    A program is launched with a grid for its maximum number of tokens. Blocks without a token return at once.
    """
    return cuda.gridDim.y > 1 and cuda.blockIdx.y >= tokens[0]


@device
def kv_index(pages, sequence, kv_head, position, n_kv_heads, head_dim):
    """Index of the first element of one key or value in a KV cache [pages, n_kv_heads, page, head_dim].

    `pages` is (page table, length of one of its rows, log2 of the tokens in a page).
    """
    page_table, table_stride, log2_page = pages
    page = page_table[sequence * table_stride + (position >> log2_page)]
    place = position & ((1 << log2_page) - 1)
    return (((page * n_kv_heads + kv_head) << log2_page) + place) * head_dim


@device
def kv_scale(cache, scales_at, index):
    """Scale number `index` of a q8_0 cache."""
    at = address(cache, scales_at + 2 * index)
    return cvt_f32_f16(np.uint32(ld_global_u32(at & -4) >> np.uint32(8 * (at & 2))))


@device
def load_kv(cache, scales_at, row, head_dim, d):
    """Element `d` of the key or value whose first element has index `row` in a cache of any type."""
    x = load_element(cache, address(cache, row), d)
    if is_q8_0(cache):
        x *= kv_scale(cache, scales_at, row // head_dim * ((head_dim + 31) >> 5) + (d >> 5))
    return x


@device
def first_visible(length, window):
    """First position that the last of `length` tokens attends to: it sees `window` positions including its own, or all
    of them if `window` is 0.
    """
    return length - window if 0 < window < length else 0


@device
def silu_and_mul(gate, up):
    """silu(gate) · up = gate · sigmoid(gate) · up, the activation of SwiGLU (Shazeer, GLU Variants, 2020)."""
    return gate / (np.float32(1) + ex2_approx(-gate * LOG2_E)) * up


@device
def fast_divmod(number, divisor, inverse):
    """(quotient, remainder) of integers below two million, given the float32 1 / divisor.

    A float32 multiplication replaces the integer division, which takes a hundred instructions.
    """
    quotient = np.int64((np.float32(number) + np.float32(0.5)) * inverse)
    return quotient, number - quotient * divisor


@device
def is_nan(x):
    """Whether a float32 is NaN, decided from its bits."""
    return (float_as_uint(x) & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)


@device
def magnitude_bits(x):
    """The bits of |x| as an int32. They order as |x| does, with every NaN above infinity."""
    return np.int32(float_as_uint(x) & np.uint32(0x7FFFFFFF))
