"""Linear layers of 33 to 256 tokens on sm_90, Y[T, N] = X[T, K] · W[N, K]ᵀ, with W in 16 bits, by wgmma.

A kernel here takes the place of those in `skinny.py`: it reads X as `skinny_round_kernel` leaves it, and leaves sums as
`skinny_sum_kernel` reads them. W is A of wgmma and X is B, so that all tokens of a run are one product and W is read
once. A block has 128 rows of W, 64 a warpgroup, and a slice of K. Tiles of 64 columns of W and X are copied to a ring
of `stages` in shared memory, `stages` - 2 steps ahead; the first of W before the kernel waits for its predecessor.

Why. mma.sync, as `skinny` and `gemm` use it, multiplies half as fast. At 64 tokens the floor is memory: weights of
11264 × 2048 in bfloat16 are 46 MB, 11 µs at 4.05 TB/s; at 256 tokens arithmetic, 20 µs at 600 · 10^12 a second.

How K is divided depends on the weight alone, so a row's bits are the same in runs of any number of tokens.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..intrinsics import (
    address,
    cp_async_16,
    cp_async_commit,
    cp_async_wait_all,
    cp_async_wait_group,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    no_unroll,
    shared_address,
)
from ..wgmma import DESCRIPTOR, fence_proxy_async, st_global_parts, wgmma_end, wgmma_tile, zeros_of
from .common import device, launch_bounds
from .params import SKINNY_ROWS as GROUP
from .params import SKINNY_UNIT as UNIT
from .params import WIDE_ROWS as ROWS
from .params import WIDE_THREADS as THREADS

ROW_BYTES = 128
"""A row of a tile: 64 columns of 16 bits."""


@device
def weight_row(r, group, paired, rows, kv_rows, bases, stride):
    """Address of row `r` of a group of 32; a row after the end is the last instead. A pair's group has 16 rows of the
    gate and the same of up.
    """
    w0, w1, w2 = bases
    if paired:
        row = min(group * 16 + (r & 15), rows - 1)
        return (w1 if r >= 16 else w0) + row * stride
    row, last, base = group * GROUP + r, rows - 1, w0
    if kv_rows > 0 and row >= rows:
        row -= rows
        last, base = kv_rows - 1, w1
        if row >= kv_rows:
            row -= kv_rows
            base = w2
    return base + min(row, last) * stride


@device
def fetch_weights(slot, rows_at, column, stride):
    """Start copying 64 columns of a block's rows of W, from byte `column` on: a thread copies 16 bytes of four rows."""
    count = 16 if column < stride else 0
    cp_async_16(slot, rows_at[0] + column, count)
    cp_async_16(slot + 32 * ROW_BYTES, rows_at[1] + column, count)
    cp_async_16(slot + 64 * ROW_BYTES, rows_at[2] + column, count)
    cp_async_16(slot + 96 * ROW_BYTES, rows_at[3] + column, count)


@device
def fetch_tokens(slot, source, row_bytes, column, left, rows):
    """Start copying 64 columns of `rows` tokens, from byte `column` on; zeros from token number `left` on."""
    for i in range(rows >> 5):
        count = 16 if 32 * i < left and column < row_bytes else 0
        cp_async_16(slot + 32 * ROW_BYTES * i, source + 32 * i * row_bytes + column, count)


@device
def wide(zeros, tokens, rounded, padded, w0, w1, w2, stride, paired, rows, kv_rows, partials, tiles, slices, steps_here,
         stages):  # fmt: skip
    """The body of the kernels here: blockIdx.x is the tile of rows, blockIdx.y that of tokens, blockIdx.z the slice."""
    width = 2 * len(zeros)
    first_token = cuda.blockIdx.y * width
    if first_token >= tokens[0]:
        return
    stage = (ROWS + width) * ROW_BYTES
    thread = cuda.threadIdx.x
    r, piece = thread >> 3, thread & 7
    base = (shared_address(cuda.shared.array(0, np.float32), 0) + 1023) & ~1023
    mine = base + r * ROW_BYTES + ((piece ^ (r & 7)) << 4)
    bases = address(w0, 0), address(w1, 0), address(w2, 0)
    first_group = cuda.blockIdx.x * (ROWS // GROUP)
    rows_at = (
        weight_row(r, first_group, paired, rows, kv_rows, bases, stride),
        weight_row(r, first_group + 1, paired, rows, kv_rows, bases, stride),
        weight_row(r, first_group + 2, paired, rows, kv_rows, bases, stride),
        weight_row(r, first_group + 3, paired, rows, kv_rows, bases, stride),
    )
    first = cuda.blockIdx.z * steps_here
    steps = min(steps_here, ((stride + ROW_BYTES - 1) >> 7) - first)
    column, ahead = (first << 7) + (piece << 4), stages - 2
    for k in range(min(ahead, steps)):
        no_unroll()
        fetch_weights(mine + k * stage, rows_at, column + (k << 7), stride)
    griddepcontrol_wait()
    source, row_bytes, left = address(rounded, (first_token + r) * padded), 2 * padded, tokens[0] - first_token - r
    for k in range(ahead):
        no_unroll()
        if k < steps:
            fetch_tokens(mine + ROWS * ROW_BYTES + k * stage, source, row_bytes, column + (k << 7), left, width)
        cp_async_commit()
    griddepcontrol_launch_dependents()

    a = DESCRIPTOR + ((base + (thread >> 7) * 64 * ROW_BYTES) >> 4)
    b = DESCRIPTOR + ((base + ROWS * ROW_BYTES) >> 4)
    sums, k, reading, writing = zeros, np.int64(0), np.int64(0), np.int64(ahead)
    while k < steps:
        no_unroll()
        if stages == 4:
            cp_async_wait_group(1)
        else:
            cp_async_wait_group(3)
        fence_proxy_async()
        cuda.syncthreads()  # this step's tiles are there, and all products but the last have ended
        if k + ahead < steps:
            fetch_weights(mine + writing * stage, rows_at, column + ((k + ahead) << 7), stride)
            fetch_tokens(
                mine + ROWS * ROW_BYTES + writing * stage, source, row_bytes, column + ((k + ahead) << 7), left, width
            )
        cp_async_commit()
        sums = wgmma_tile(w0, sums, a + reading * (stage >> 4), b + reading * (stage >> 4))
        reading = reading + 1 if reading + 1 < stages else 0
        writing = writing + 1 if writing + 1 < stages else 0
        k += 1
    sums = wgmma_end(sums)
    cp_async_wait_all()
    lane, warp, units = thread & 31, thread >> 5, width >> 3
    slot = ((cuda.blockIdx.y * tiles + cuda.blockIdx.x) * slices + cuda.blockIdx.z) * (ROWS // GROUP) + (warp >> 1)
    at = slot * units * UNIT + (warp & 1) * (UNIT // 2) + 4 * lane
    st_global_parts(sums, address(partials, at), 4 * UNIT, (tokens[0] - first_token + 7) >> 3)


@launch_bounds(min_blocks=2)
@cuda.jit
def wide_64_kernel(tokens, rounded, padded, w0, w1, w2, stride, paired, rows, kv_rows, partials, tiles, slices, steps,
                   stages):  # fmt: skip
    """Sums of x · Wᵀ of up to 64 tokens."""
    wide(zeros_of(32), tokens, rounded, padded, w0, w1, w2, stride, paired, rows, kv_rows, partials, tiles, slices,
         steps, stages)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def wide_128_kernel(tokens, rounded, padded, w0, w1, w2, stride, paired, rows, kv_rows, partials, tiles, slices, steps,
                    stages):  # fmt: skip
    """Sums of x · Wᵀ of up to 128 tokens."""
    wide(zeros_of(64), tokens, rounded, padded, w0, w1, w2, stride, paired, rows, kv_rows, partials, tiles, slices,
         steps, stages)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def wide_256_kernel(tokens, rounded, padded, w0, w1, w2, stride, paired, rows, kv_rows, partials, tiles, slices, steps,
                    stages):  # fmt: skip
    """Sums of x · Wᵀ of up to 256 tokens."""
    wide(zeros_of(128), tokens, rounded, padded, w0, w1, w2, stride, paired, rows, kv_rows, partials, tiles, slices,
         steps, stages)  # fmt: skip


assert THREADS == 2 * ROWS, "a warpgroup for each 64 rows; a thread copies 16 bytes of every 32nd row"
