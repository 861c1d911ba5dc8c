"""Linear layers of 17 to 128 tokens on sm_90, Y[T, N] = X[T, K] · W[N, K]ᵀ, by wgmma and TMA: W is streamed once.

A kernel here takes the place of those in `skinny.py` and of `skinny_sum_kernel`: it reads X as `wide_round_kernel`
leaves it. W is A of wgmma and X is B, so that all tokens of a run are one product.

- Up to eight blocks, a cluster, have a slice of K each. A cluster computes tiles of 128 rows of W, one after the other;
  there is one block a multiprocessor. Two warpgroups multiply, 64 rows each. Other threads fill a ring in shared memory
  (`wide_loads`), 64 columns of W and X at a time, from one tile to the next; the first of W before the kernel waits for
  its predecessor.
- At the end of a tile each block sends the sums of a unit, of 32 rows and 8 tokens, to the block that finishes it, into
  its shared memory, and that adds them up in the order of the slices. The ring fills meanwhile.
- What a token's sums are multiplied by is fetched while the first tile is multiplied, by two warps of their own, and
  residuals come meanwhile too. Beside loaders that decode weights there are not enough registers for that: the two
  warpgroups fetch it before.
- Two mbarriers keep the blocks together: `received` counts the bytes that came, `may_send` the blocks that have read
  what was sent for the last tile.

Why. mma.sync, as `skinny` and `gemm` use it, multiplies half as fast, and sums in global memory cost a kernel and as
many bytes as a third of W. At 64 tokens the floor is memory: weights of 11264 × 2048 in bfloat16 are 46 MB, 11 µs at
4.05 TB/s. From 129 tokens on `wgmma_gemm` is faster.

How K is divided depends on the weight and on the device, so a row's bits are the same in runs of any number of tokens
that come here.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..arithmetic import float_as_uint, mad_wide_s32, s32, uint_as_float
from ..barriers import barrier_arrive, barrier_sync, mbarrier_arrive, mbarrier_init, mbarrier_wait
from ..clusters import barrier_cluster_arrive_relaxed, barrier_cluster_wait, mbarrier_arrive_at
from ..intrinsics import (
    address,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_global_f32_or_0,
    ld_shared_v2_u32,
    ld_shared_v4_f32,
    no_unroll,
    st_shared_u32,
)
from ..mma import st_global_as
from ..quant_traits import has_scales, per_16_bytes, scale_bytes
from ..tma import div_u32, fence_mbarrier_init, mbarrier_expect_tx
from ..wgmma import DESCRIPTOR, st_async_units, st_shared_units, wgmma_end, wgmma_tile, zeros_of
from .common import add4, device, launch_bounds, max_registers
from .linear_sums import link_of, rows_of_lane, send_rows
from .params import SKINNY_UNIT as UNIT
from .params import WIDE_CONSUMERS as CONSUMERS
from .params import WIDE_HELPERS as HELPERS
from .params import WIDE_REGISTERS as REGISTERS
from .params import WIDE_ROWS as ROWS
from .skinny_sum import norm_factor, results_of, times
from .wgmma_loads import ROW_BYTES, make_ring, next_slot, section_of
from .wide_loads import load_boxes, load_slices

UNIT_BYTES = 4 * UNIT
GROUPS = ROWS // 32
"""Units of the same tokens in a tile."""


@device
def make_shared(width, stages, quantised, rank, slices):
    """The parts of a block's shared memory: (the ring, what the exchange of sums needs). The mbarriers are ready for
    all threads of the block, and for those of the cluster that have waited at its barrier.
    """
    ring = make_ring(width, ROWS, stages, quantised)
    received = ring[4] + 8 * stages
    may_send, factors_at = received + 8, received + 16
    sums_at = factors_at + 4 * slices * width
    owned = div_u32(GROUPS * (width >> 3) + slices - 1 - rank, slices)
    if cuda.threadIdx.x == 0:
        mbarrier_init(received, 1)
        mbarrier_init(may_send, slices)
        fence_mbarrier_init()
    cuda.syncthreads()
    barrier_cluster_arrive_relaxed()
    return ring, (sums_at, factors_at, received, may_send, owned)


@device
def put_factors(n, step, at, of_x, slices, width, first_token, tokens):
    """Write for each slice and token what its sums are to be multiplied by: the factors of rounding and of the norm.

    This thread does so for token n of the tile and every `step`-th after it.
    """
    scales, squares, capacity, normed, eps, columns = of_x
    while n < width:
        no_unroll()
        t, last, total = min(first_token + n, tokens - 1), slices - 1, np.float32(0)
        for first in range(0, slices, 4):
            no_unroll()
            for s in range(first, first + 4):  # loads that do not wait for each other
                square = squares[min(s, last) * capacity + t]
                total += square if s < slices else np.float32(0)
        factor = norm_factor(total, normed, columns, eps)
        for first in range(0, slices, 4):
            no_unroll()
            a, b = scales[first * capacity + t], scales[min(first + 1, last) * capacity + t]
            c, d = scales[min(first + 2, last) * capacity + t], scales[min(first + 3, last) * capacity + t]
            to = at + 4 * (first * width + n)
            st_shared_u32(to, float_as_uint(a * factor))
            if first + 1 < slices:
                st_shared_u32(to + 4 * width, float_as_uint(b * factor))
            if first + 2 < slices:
                st_shared_u32(to + 8 * width, float_as_uint(c * factor))
            if first + 3 < slices:
                st_shared_u32(to + 12 * width, float_as_uint(d * factor))
        n += step


@device
def place_of_part(part, tile, first_token, paired, sections, heights, residual, outs):
    """Where this lane's results of a part of a tile belong: (address of the first of four rows, 8 apart, of the first
    of two tokens, bytes to the next token's, the same two of the residuals, the token's number, which rows exist).
    """
    section, inside = section_of(tile, sections[0], sections[1])
    lane, height, out = s32(cuda.threadIdx.x & 31), s32(heights[0]), outs[0]
    if section > 0:
        height, out = s32(heights[1]), outs[1]
    if section == 2:
        out = outs[2]
    group = s32(s32(inside) * GROUPS + (part & 3))
    row = s32(s32(group << (4 if paired else 5)) + (lane >> 2))
    token, item = s32(first_token + 8 * (part >> 2) + 2 * (lane & 3)), s32(16 // per_16_bytes(out))
    step, old_step = s32(height * item), s32(4 * height)
    to = mad_wide_s32(token, step, mad_wide_s32(row, item, address(out, 0)))
    old = mad_wide_s32(token, old_step, mad_wide_s32(row, 4, address(residual, 0)))
    two = not paired
    return to, step, old, old_step, token, (row < height, row + 8 < height, two and row + 16 < height,
                                            two and row + 24 < height)  # fmt: skip


@device
def next_part(place, tokens):
    """The place of results of the same rows, `tokens` further."""
    to, step, old, old_step, token, rows = place
    tokens = s32(tokens)
    return (
        mad_wide_s32(tokens, step, to),
        step,
        mad_wide_s32(tokens, old_step, old),
        old_step,
        s32(token + tokens),
        rows,
    )


@device
def tokens_of(place, count):
    """How many of two tokens exist, of `count` in the run, in each of four rows."""
    here, none, (first, second, third, fourth) = s32(count - place[4]), s32(0), place[5]
    return here if first else none, here if second else none, here if third else none, here if fourth else none


@device
def old_rows(place, count, added):
    """The residuals of this lane's part of a unit; zeros if there are none."""
    a, b, c, d = tokens_of(place, count if added else s32(0))
    at, other = place[2], place[2] + place[3]
    return (
        (ld_global_f32_or_0(at, a), ld_global_f32_or_0(other, s32(a - 1))),
        (ld_global_f32_or_0(at + 32, b), ld_global_f32_or_0(other + 32, s32(b - 1))),
        (ld_global_f32_or_0(at + 64, c), ld_global_f32_or_0(other + 64, s32(c - 1))),
        (ld_global_f32_or_0(at + 96, d), ld_global_f32_or_0(other + 96, s32(d - 1))),
    )  # fmt: skip


@device
def add_part(sums, at, factors_at):
    """`sums`, plus a slice's part of them times its factors."""
    first, second = ld_shared_v2_u32(factors_at)
    scale, scale2 = uint_as_float(first), uint_as_float(second)
    a, b = ld_shared_v4_f32(at), ld_shared_v4_f32(s32(at + (UNIT_BYTES >> 1)))
    return add4(sums[0], times(a, scale, scale2)), add4(sums[1], times(b, scale, scale2))


@device
def sum_part(at, factors_at, width, slices, olds, paired):
    """Add up a unit's sums of all slices, and finish the results."""
    zero, one = np.float32(0), np.float32(1)
    sums, s = ((zero, zero, zero, zero), (zero, zero, zero, zero)), s32(0)
    while s < slices:
        no_unroll()
        sums = add_part(sums, at, factors_at)
        s, at, factors_at = s32(s + 1), s32(at + UNIT_BYTES), s32(factors_at + 4 * width)
    return results_of(paired, (one, one), sums[0], sums[1], olds)


@device
def put_pair(out, to, next_token, here, pair):
    """Write a row's results for two tokens, `here` of which exist."""
    if here > 0:
        st_global_as(out, to, pair[0])
    if here > 1:
        st_global_as(out, to + next_token, pair[1])


@device
def put_part(out, place, count, results):
    """Write this lane's results of a unit in the type of `out`, for a run of `count` tokens."""
    a, b, c, d = tokens_of(place, count)
    to, step, apart = place[0], place[1], 8 * (16 // per_16_bytes(out))
    put_pair(out, to, step, a, results[0])
    put_pair(out, to + apart, step, b, results[1])
    put_pair(out, to + 2 * apart, step, c, results[2])
    put_pair(out, to + 3 * apart, step, d, results[3])


@device
def send_part(link, part, tile, first_token, tokens, height, results):
    """Send a unit's results to all ranks, eight rows of a token together."""
    v, pair = (cuda.threadIdx.x & 31) >> 2, cuda.threadIdx.x & 3
    token, row = first_token + 8 * (part >> 2) + 2 * pair + (v & 1), tile * ROWS + 32 * (part & 3) + 8 * (v >> 1)
    send_rows(link, token, row, tokens, height, rows_of_lane(results))


@device
def unit_exists(part, tile, first_token, tokens, height):
    """Whether a part has rows and tokens of the run."""
    return tile * ROWS + 32 * (part & 3) < height and first_token + 8 * (part >> 2) < tokens


@device
def multiply(zeros, ring, exchange, x, steps, rank, slices, tiles, first_token, tokens, of_x, helped, paired,
             sections, heights, residual, added, outs, link):  # fmt: skip
    """What the two warpgroups do that multiply. `link` is None, or what `send_rows` needs: results are then sent to
    all ranks. `helped`: other warps write the factors.
    """
    base, stage, stages, full, empty, x_bytes = ring
    sums_at, factors_at, received, may_send, owned = exchange
    lane, warp, width = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, 2 * len(zeros)
    a, b = DESCRIPTOR + ((base + x_bytes + (warp >> 2) * 64 * ROW_BYTES) >> 4), DESCRIPTOR + (base >> 4)
    # a unit's upper 16 rows are a warp's, its lower ones another's: rows of up, if it has a gate
    group, lower = (warp & 3, warp >> 2) if paired else (warp >> 1, warp & 1)
    to = sums_at + rank * UNIT_BYTES + lower * (UNIT_BYTES >> 1) + 16 * lane
    tile, slot, parity, before, phase = cuda.blockIdx.x, 0, 0, 0, 0
    barrier_cluster_wait()
    griddepcontrol_wait()
    if not helped:
        put_factors(np.int64(cuda.threadIdx.x), CONSUMERS, factors_at, of_x, slices, width, first_token, tokens)
        barrier_sync(1, CONSUMERS)
    slices, width = s32(slices), s32(width)
    count, my_sums, my_factors = s32(tokens), s32(sums_at + 16 * lane), s32(factors_at - 4 * first_token)
    while tile < tiles:
        no_unroll()
        if helped:
            place = place_of_part(
                s32(warp * slices + rank), tile, first_token, paired, sections, heights, residual, outs
            )
            olds = old_rows(place, count, added)  # on their way while the tile is multiplied
        sums, k = zeros, 0
        while k < steps:
            no_unroll()
            mbarrier_wait(full + 8 * slot, parity)
            sums = wgmma_tile(x, sums, a + slot * (stage >> 4), b + slot * (stage >> 4))
            if k > 0 and lane == 0:  # the products before have ended
                mbarrier_arrive(empty + 8 * before)
            before = slot
            slot, parity = next_slot(slot, parity, stages)
            k += 1
        sums = wgmma_end(sums)
        if lane == 0:
            mbarrier_arrive(empty + 8 * before)
        if tile != cuda.blockIdx.x:
            mbarrier_wait(may_send, phase ^ 1)
        if slices == 1:
            st_shared_units(sums, to, group)
            barrier_sync(1, CONSUMERS)
        else:
            if cuda.threadIdx.x == 0:
                mbarrier_expect_tx(received, owned * slices * UNIT_BYTES)
            st_async_units(sums, to, received, group, slices, div_u32(65535, slices) + 1)
        if helped and tile == cuda.blockIdx.x:
            barrier_sync(2, CONSUMERS + HELPERS)  # the factors are there
        mine, part = s32(warp), s32(warp * slices + rank)
        if not helped:  # registers are few beside a decoder
            place = place_of_part(part, tile, first_token, paired, sections, heights, residual, outs)
            olds = old_rows(place, count, added)
        if slices > 1:
            mbarrier_wait(received, phase)
        while mine < owned:
            no_unroll()
            at = s32(my_sums + mine * slices * UNIT_BYTES)
            results = sum_part(at, s32(my_factors + 4 * place[4]), width, slices, olds, paired)
            if link is None:
                put_part(outs[0], place, count, results)
            elif unit_exists(part, tile, first_token, tokens, heights[0]):
                send_part(link, part, tile, first_token, tokens, heights[0], results)
            mine, part = s32(mine + CONSUMERS // 32), s32(part + CONSUMERS // 32 * slices)
            if mine < owned:
                place = next_part(place, CONSUMERS // 16 * slices)
                olds = old_rows(place, count, added)
        if tile + cuda.gridDim.x < tiles:  # after the last tile nobody arrives here: a block may end before others
            barrier_sync(1, CONSUMERS)
            if cuda.threadIdx.x < slices:
                mbarrier_arrive_at(may_send, cuda.threadIdx.x)
        phase ^= 1
        tile += cuda.gridDim.x


@device
def wide(zeros, tokens, x, x_map, x_scales, squares, capacity, normed, eps, columns, weights, maps, stride, scales,
         scale_stride, shift, paired, rows, kv_rows, row_tiles, kv_tiles, residual, added, outs, steps_here, row_steps,
         stages, bias, link):  # fmt: skip
    """The body of the kernels here: blockIdx.x counts clusters, blockIdx.y tiles of tokens, blockIdx.z slices of K."""
    width = 2 * len(zeros)
    first_token = cuda.blockIdx.y * width
    if first_token >= tokens[0]:
        return
    w0, w1, w2 = weights
    s0, s1, s2 = scales
    griddepcontrol_launch_dependents()
    rank, slices = cuda.blockIdx.z, cuda.gridDim.z
    ring, exchange = make_shared(width, stages, has_scales(w0), rank, slices)
    first = rank * steps_here
    steps = min(steps_here, row_steps - first)
    sections, tiles = (row_tiles, kv_tiles), row_tiles + 2 * kv_tiles
    of_x = x_scales, squares, capacity, normed, eps, columns
    if cuda.threadIdx.x < CONSUMERS:
        multiply(zeros, ring, exchange, x, steps, rank, slices, tiles, first_token, tokens[0], of_x,
                 not has_scales(w0), paired, sections, (rows, kv_rows), residual, added, outs, link)  # fmt: skip
    elif has_scales(w0):
        bases = address(w0, 0), address(w1, 0), address(w2, 0), address(s0, 0), address(s1, 0), address(s2, 0)
        strides = stride, scale_stride * scale_bytes(s0)
        load_slices(tiles, ring, x_map, first_token, w0, s0, bases, strides, shift, paired, sections,
                    (rows, rows, kv_rows), first, first + steps, bias)  # fmt: skip
    elif cuda.threadIdx.x == CONSUMERS:
        load_boxes(tiles, ring, x_map, first_token, maps, paired, sections, first, steps)
    else:
        barrier_cluster_wait()
        helper = cuda.threadIdx.x - CONSUMERS - 32
        if helper >= 0:
            griddepcontrol_wait()
            put_factors(helper, HELPERS, exchange[1], of_x, slices, width, first_token, tokens[0])
            barrier_arrive(2, CONSUMERS + HELPERS)


@max_registers(REGISTERS)
@cuda.jit
def wide_64_kernel(tokens, x, x_map, x_scales, squares, capacity, normed, eps, columns, w0, w1, w2, m0, m1, m2, stride,
                   s0, s1, s2, scale_stride, shift, paired, rows, kv_rows, row_tiles, kv_tiles, residual, added, q, k,
                   v, steps, row_steps, stages, bias):  # fmt: skip
    """x · Wᵀ of up to 64 tokens, finished as by `skinny_sum_kernel`."""
    wide(zeros_of(32), tokens, x, x_map, x_scales, squares, capacity, normed, eps, columns, (w0, w1, w2), (m0, m1, m2),
         stride, (s0, s1, s2), scale_stride, shift, paired, rows, kv_rows, row_tiles, kv_tiles, residual, added,
         (q, k, v), steps, row_steps, stages, bias, None)  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def wide_128_kernel(tokens, x, x_map, x_scales, squares, capacity, normed, eps, columns, w0, w1, w2, m0, m1, m2, stride,
                    s0, s1, s2, scale_stride, shift, paired, rows, kv_rows, row_tiles, kv_tiles, residual, added, q, k,
                    v, steps, row_steps, stages, bias):  # fmt: skip
    """x · Wᵀ of up to 128 tokens, finished as by `skinny_sum_kernel`."""
    wide(zeros_of(64), tokens, x, x_map, x_scales, squares, capacity, normed, eps, columns, (w0, w1, w2), (m0, m1, m2),
         stride, (s0, s1, s2), scale_stride, shift, paired, rows, kv_rows, row_tiles, kv_tiles, residual, added,
         (q, k, v), steps, row_steps, stages, bias, None)  # fmt: skip


@max_registers(REGISTERS)
@cuda.jit
def wide_64_send_kernel(tokens, x, x_map, x_scales, squares, capacity, normed, eps, columns, w0, w1, w2, m0, m1, m2,
                        stride, s0, s1, s2, scale_stride, shift, paired, rows, kv_rows, row_tiles, kv_tiles, residual,
                        added, q, k, v, steps, row_steps, stages, bias, exchange, inbox_at, slot, peers, stop, rank,
                        ranks):  # fmt: skip
    """The same of one weight, whose results are sent to all ranks: who adds them up comes next."""
    wide(zeros_of(32), tokens, x, x_map, x_scales, squares, capacity, normed, eps, columns, (w0, w1, w2), (m0, m1, m2),
         stride, (s0, s1, s2), scale_stride, shift, False, rows, 0, row_tiles, 0, residual, added, (q, k, v), steps,
         row_steps, stages, bias, link_of(exchange, inbox_at, slot, peers, stop, rank, ranks))  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def wide_128_send_kernel(tokens, x, x_map, x_scales, squares, capacity, normed, eps, columns, w0, w1, w2, m0, m1, m2,
                         stride, s0, s1, s2, scale_stride, shift, paired, rows, kv_rows, row_tiles, kv_tiles, residual,
                         added, q, k, v, steps, row_steps, stages, bias, exchange, inbox_at, slot, peers, stop, rank,
                         ranks):  # fmt: skip
    """The same of one weight, whose results are sent to all ranks."""
    wide(zeros_of(64), tokens, x, x_map, x_scales, squares, capacity, normed, eps, columns, (w0, w1, w2), (m0, m1, m2),
         stride, (s0, s1, s2), scale_stride, shift, False, rows, 0, row_tiles, 0, residual, added, (q, k, v), steps,
         row_steps, stages, bias, link_of(exchange, inbox_at, slot, peers, stop, rank, ranks))  # fmt: skip


assert GROUPS == 4, "`part` counts the groups of a unit's tokens"
