"""Linear layers for many tokens on sm_90, Y[T, N] = X[T, K] · W[N, K]ᵀ, by wgmma and TMA.

A kernel here takes the place of those in `gemm.py`: it reads X as `round_kernel` leaves it. A block computes 128 tokens
× `width` rows of W, one such tile after the other; there is one block a multiprocessor. Two warpgroups multiply, 64
tokens each. Other threads fill a ring of `stages` in shared memory, 64 columns of X and W at a time: of W in 16 bits
one thread asks the copy engine for both; of a quantised W two warpgroups load words to registers two to four steps
ahead and decode them (`wgmma_loads`). So loading goes on while a tile's results are finished in registers and stored.

Where a tile of queries, keys or values has whole heads, they are finished in registers, too: queries and keys are
rotated, keys and values go to the KV cache (`write_heads`). Otherwise that is a kernel of its own.

Where tiles are so few that a run of 512 tokens would leave half of the multiprocessors idle, two blocks, a cluster,
have half of K each (`exchange_halves`). Each warpgroup sends its sums to the other block or gets those of the other
block, adds them and finishes 64 tokens.

Where ranks on several GPUs add up results, they are sent from registers to all of them as soon as a tile is done
(`send_piece`), in the order in which lanes have them, so that 512 bytes of a warp are together. The link is busy while
the next tile is multiplied. A kernel of its own adds them up (`collectives.add_up_pieces_kernel`).

Tiles with the same rows of W are neighbours, so W comes from memory once and from the L2 cache after that.

Why. mma.sync, as `gemm.py` uses it, does half as many operations a second. The floor is arithmetic: 2 · T · N · K at
990 · 10^12 a second on an H200. A width is chosen for which the last round of tiles leaves few multiprocessors idle.

float32 comes as two pieces in float16 each of X and of W (`round_kernel`), and three products of these are added up:
what is left out is 2^-22 of a product. So it costs three times as much.

A row's bits do not depend on the number of tokens, nor on the width: whether K is halved depends on the weight and on
the device.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..barriers import mbarrier_arrive, mbarrier_init, mbarrier_wait
from ..clusters import barrier_cluster_arrive, barrier_cluster_wait, mbarrier_arrive_at
from ..fragments import is_float32
from ..intrinsics import (
    address,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    no_unroll,
)
from ..mma import row_scale, st_global_rows
from ..quant_traits import has_scales, scale_bytes
from ..tma import div_u32, fence_mbarrier_init, mbarrier_expect_tx
from ..wgmma import (
    DESCRIPTOR,
    add_global_rows,
    add_parts,
    add_shared_parts,
    rotate_rows,
    scale_columns,
    silu_and_mul_halves,
    st_async_parts,
    st_cache_rows,
    st_system_parts,
    wgmma_end,
    wgmma_tile,
    zeros_of,
)
from .common import device, launch_bounds
from .params import WGMMA_CONSUMERS as CONSUMERS
from .params import WGMMA_NARROW as NARROW
from .params import WGMMA_ROWS as ROWS
from .wgmma_loads import (
    ROW_BYTES,
    X_BYTES,
    is_split,
    load_blocks,
    load_boxes,
    load_tall_blocks,
    make_ring,
    next_slot,
    section_of,
)


@device
def cache_row(heads, cache, kv_heads, head, t, here):
    """Address of a token's row of a head in a KV cache of 16 bits, plus the lane's first column."""
    _, (positions, sequences, page_table, table_stride, log2_page), head_dim, _, _ = heads
    row = np.int64(0)
    if here:
        position = np.int64(positions[t])
        page = np.int64(page_table[sequences[t] * table_stride + (position >> log2_page)])
        row = ((page * kv_heads + head) << log2_page) + (position & ((1 << log2_page) - 1))
    return cache + 2 * (row * head_dim + 2 * (cuda.threadIdx.x & 3))


@device
def rotated(sums, heads, t0, tokens):
    """RoPE of a tile's results, which are whole heads of 64 or 128 elements. Of tokens that do not exist the angles are
    the last one's.
    """
    angles, _, head_dim, interleaved, _ = heads
    place, one = (cuda.threadIdx.x & 3) * (1 if interleaved else 2), np.int64(head_dim >> 6)
    at = address(angles, min(t0, tokens - 1) * head_dim + place)
    at2 = address(angles, min(t0 + 8, tokens - 1) * head_dim + place)
    if head_dim == 64:
        if interleaved:  # noqa: SIM108 (the compiler wants registers for a conditional expression of tuples)
            sums = rotate_rows(sums, 64, 1, at, at2, one)
        else:
            sums = rotate_rows(sums, 64, 0, at, at2, one)
    elif interleaved:
        sums = rotate_rows(sums, 128, 1, at, at2, one)
    else:
        sums = rotate_rows(sums, 128, 0, at, at2, one)
    return sums


@device
def write_heads(sums, section, tile, t0, tokens, sizes, heads, outs):
    """Store heads: rotated queries as float32, rotated keys and values in the KV cache."""
    rows, end, kv_rows = sizes
    out, k_cache, v_cache = outs
    head_dim, log2_page, width = heads[2], heads[1][4], 2 * len(sums)
    section += heads[4]
    if section < 2:
        sums = rotated(sums, heads, t0, tokens)
    column = 2 * (cuda.threadIdx.x & 3) + tile * width
    left = (end if section == 0 else kv_rows) - column
    first, second = t0 < tokens, t0 + 8 < tokens
    n0, n1 = np.int32(left if first else 0), np.int32(left if second else 0)
    if section == 0:
        at = address(out, t0 * rows + column)
        st_global_rows(sums, at, at + 32 * rows, n0, n1)
    else:
        log2_head = 5 + (head_dim >> 6)
        cache = address(k_cache, 0) if section == 1 else address(v_cache, 0)
        head, kv_heads = (tile * width) >> log2_head, kv_rows >> log2_head
        at = cache_row(heads, cache, kv_heads, head, t0, first)
        at2 = cache_row(heads, cache, kv_heads, head, t0 + 8, second)
        distance = 2 * head_dim << log2_page
        if head_dim == 64:
            st_cache_rows(k_cache, sums, 64, at, at2, distance, n0, n1)
        else:
            st_cache_rows(k_cache, sums, 128, at, at2, distance, n0, n1)


@device
def send_piece(sums, tile, t0, tokens, link):
    """Send results of 64 tokens and a tile's columns to all ranks, this one too, for `add_up_pieces_kernel`."""
    peers, inbox_at, slot, rank, ranks = link
    slabs, width = 2 * ((tokens + ROWS - 1) >> 7), 2 * len(sums)
    piece = tile * slabs + (t0 >> 6)
    place = inbox_at + rank * slot + 256 * width * piece + 16 * (cuda.threadIdx.x & 127)
    for other in range(ranks):
        no_unroll()
        st_system_parts(sums, peers[other] + place)


@device
def finish(sums, weight, row_scales, scales, tokens, t0, paired, tile, sections, sizes, residual, added, heads, outs,
           link):  # fmt: skip
    """Store a tile's results: times the tokens' scales and with float32 those of W's rows, plus `residual` if `added`;
    SwiGLU of both halves if `paired`; as `write_heads` where `outs` are not all float32. Where `link` has the
    addresses of ranks, results of a weight alone are sent to these instead.
    """
    rows, end, kv_rows = sizes
    out, out_k, out_v = outs
    width = 2 * len(sums)
    t1, column = t0 + 8, 2 * (cuda.threadIdx.x & 3)
    first, second = t0 < tokens, t1 < tokens
    scale0 = scales[t0] if first else np.float32(0)
    scale1 = scales[t1] if second else np.float32(0)
    sums = row_scale(sums, scale0, scale1)
    if paired:
        column += tile * (width >> 1)
        at, left = address(out, t0 * rows + column), end - column
        if is_split(weight, row_scales[0]):
            gate, up = address(row_scales[0], column), address(row_scales[1], column)
            sums = scale_columns(sums, gate, up, left, left)
        st_global_rows(silu_and_mul_halves(sums), at, at + 32 * rows, left if first else 0, left if second else 0)
        return
    section, tile = section_of(tile, sections[0], sections[1])
    column += tile * width
    if is_split(weight, row_scales[0]):
        half, left, at = width >> 1, (end if section == 0 else kv_rows) - column, address(row_scales[0], column)
        if section == 1:
            at = address(row_scales[1], column)
        elif section == 2:
            at = address(row_scales[2], column)
        sums = scale_columns(sums, at, at + 4 * half, left, left - half)
    if not is_float32(out_k):
        write_heads(sums, section, tile, t0, tokens, sizes, heads, outs)
    elif section == 0:
        left = end - column
        n0, n1 = left if first else 0, left if second else 0
        if added:
            at = address(residual, t0 * rows + column)
            sums = add_global_rows(sums, at, at + 32 * rows, n0, n1)
        if not is_float32(link[0]):
            if first:
                send_piece(sums, tile, t0, tokens, link)
        else:
            at = address(out, t0 * rows + column)
            st_global_rows(sums, at, at + 32 * rows, n0, n1)
    else:
        at, left = address(out_k if section == 1 else out_v, t0 * kv_rows + column), kv_rows - column
        st_global_rows(sums, at, at + 32 * kv_rows, left if first else 0, left if second else 0)


@device
def meet(ring):
    """Where two blocks have half of K each: make the mbarriers `received` and `read` after the ring's, and wait for the
    other block.
    """
    if cuda.gridDim.z > 1:
        received = ring[4] + 8 * ring[2]
        if cuda.threadIdx.x == 0:
            mbarrier_init(received, 1)
            mbarrier_init(received + 8, CONSUMERS // 64)
            fence_mbarrier_init()
        barrier_cluster_arrive()
        barrier_cluster_wait()


@device
def exchange_halves(sums, ring, phase):
    """Send a warpgroup's sums to the other block, or add those that come from there. Returns the sums, and whether this
    warpgroup finishes them: warpgroup 0 does in block 0, warpgroup 1 in block 1.
    """
    received, other = ring[4] + 8 * ring[2], cuda.blockIdx.z ^ 1
    read, thread = received + 8, cuda.threadIdx.x & 127
    at = received + 16 + 16 * thread
    mine = cuda.threadIdx.x >> 7 == cuda.blockIdx.z
    if mine:
        if thread == 0:
            mbarrier_expect_tx(received, 4 * 128 * len(sums))
        mbarrier_wait(received, phase)
        sums = add_shared_parts(sums, at)
        cuda.syncwarp()
        if thread & 31 == 0:
            mbarrier_arrive_at(read, other)
    else:
        st_async_parts(sums, at, received, other)
        mbarrier_wait(read, phase)  # until then the other block's memory is in use, and that block arrives here
    return sums, mine


@device
def multiply(zeros, tiles, ring, x, weight, row_scales, steps, scales, tokens, paired, sections, sizes, residual,
             added, heads, outs, link):  # fmt: skip
    """What the two warpgroups do that multiply. The tensor cores' sums have fewer bits than float32: those of pieces of
    float32 are added up outside after 512 columns.
    """
    row_groups, groups = tiles
    base, stage, stages, full, empty, _ = ring
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    a = DESCRIPTOR + ((base + (warp >> 2) * 64 * ROW_BYTES) >> 4)
    b = DESCRIPTOR + ((base + X_BYTES) >> 4)
    group, slot, parity, before, phase = cuda.blockIdx.x, 0, 0, 0, 0
    all_steps = 3 * steps if is_split(weight, row_scales[0]) else steps
    griddepcontrol_wait()
    while group < groups:
        no_unroll()
        sums, totals, k = zeros, zeros, 0
        while k < all_steps:
            no_unroll()
            mbarrier_wait(full + 8 * slot, parity)
            sums = wgmma_tile(x, sums, a + slot * (stage >> 4), b + slot * (stage >> 4))
            if k > 0 and lane == 0:  # the products before have ended
                mbarrier_arrive(empty + 8 * before)
            if is_split(weight, row_scales[0]) and k & 7 == 7:
                totals, sums = add_parts(totals, wgmma_end(sums)), zeros
            before = slot
            slot, parity = next_slot(slot, parity, stages)
            k += 1
        sums = wgmma_end(sums)
        if is_split(weight, row_scales[0]):
            sums = add_parts(totals, sums)
        if lane == 0:
            mbarrier_arrive(empty + 8 * before)
        mine = True
        if len(zeros) == NARROW // 2 and not is_split(weight, row_scales[0]) and cuda.gridDim.z > 1:
            sums, mine = exchange_halves(sums, ring, phase)
            phase ^= 1
        if mine:
            tile = div_u32(group, row_groups)
            t0 = (group - tile * row_groups) * ROWS + 16 * warp + (lane >> 2)
            finish(sums, weight, row_scales, scales, tokens, t0, paired, tile, sections, sizes, residual, added,
                   heads, outs, link)  # fmt: skip
        group += cuda.gridDim.x


@device
def multiply_tall(zeros, tiles, ring, x, weight, row_scales, steps, scales, tokens, paired, sections, sizes, residual,
                  added, heads, outs, link):  # fmt: skip
    """The same for tiles of twice as many tokens: a warpgroup has 128."""
    row_groups, groups = tiles
    base, stage, stages, full, empty, _ = ring
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    a = DESCRIPTOR + ((base + (warp >> 2) * 128 * ROW_BYTES) >> 4)
    a2, b = a + (64 * ROW_BYTES >> 4), DESCRIPTOR + ((base + 2 * X_BYTES) >> 4)
    group, slot, parity, before = cuda.blockIdx.x, 0, 0, 0
    griddepcontrol_wait()
    while group < groups:
        no_unroll()
        sums, sums2, k = zeros, zeros, 0
        while k < steps:
            no_unroll()
            mbarrier_wait(full + 8 * slot, parity)
            sums = wgmma_tile(x, sums, a + slot * (stage >> 4), b + slot * (stage >> 4))
            if k > 0 and lane == 0:  # the products before have ended
                mbarrier_arrive(empty + 8 * before)
            sums2 = wgmma_tile(x, sums2, a2 + slot * (stage >> 4), b + slot * (stage >> 4))
            before = slot
            slot, parity = next_slot(slot, parity, stages)
            k += 1
        sums, sums2 = wgmma_end(sums), wgmma_end(sums2)
        if lane == 0:
            mbarrier_arrive(empty + 8 * before)
        tile = div_u32(group, row_groups)
        t0 = (group - tile * row_groups) * (2 * ROWS) + 128 * (warp >> 2) + 16 * (warp & 3) + (lane >> 2)
        finish(sums, weight, row_scales, scales, tokens, t0, paired, tile, sections, sizes, residual, added,
               heads, outs, link)  # fmt: skip
        finish(sums2, weight, row_scales, scales, tokens, t0 + 64, paired, tile, sections, sizes, residual, added,
               heads, outs, link)  # fmt: skip
        group += cuda.gridDim.x


@device
def gemm(zeros, tokens, x, x_map, scales, weights, maps, stride, weight_scales, scale_stride, shift, paired, sizes,
         sections, residual, added, heads, outs, steps, row_steps, stages, bias, link):  # fmt: skip
    """The body of the kernels here: blockIdx.z counts halves of K."""
    w0, w1, w2 = weights
    s0, s1, s2 = weight_scales
    width = 2 * len(zeros)
    griddepcontrol_launch_dependents()
    ring = make_ring(ROWS, width, stages, has_scales(w0))
    meet(ring)
    first = (cuda.blockIdx.z * steps) & -4  # a multiple of 4 anyway: the decoders' addresses get simpler
    steps = min(steps, row_steps - first)
    row_groups = (tokens[0] + ROWS - 1) >> 7
    tiles = row_groups, row_groups * (sections[0] + 2 * sections[1])
    if cuda.threadIdx.x < CONSUMERS:
        multiply(zeros, tiles, ring, x, w0, weight_scales, steps, scales, tokens[0], paired, sections, sizes, residual,
                 added, heads, outs, link)  # fmt: skip
    elif has_scales(w0):
        bases = address(w0, 0), address(w1, 0), address(w2, 0), address(s0, 0), address(s1, 0), address(s2, 0)
        strides = stride, scale_stride * scale_bytes(s0)
        load_blocks(tiles, ring, x_map, w0, s0, bases, strides, shift, paired, sections, sizes, first,
                    first + steps, bias)  # fmt: skip
    elif cuda.threadIdx.x == CONSUMERS:
        load_boxes(tiles, ring, x_map, maps, paired, sections, first, steps, is_split(w0, s0), width)


@launch_bounds(min_blocks=1)
@cuda.jit
def wgmma_128_kernel(tokens, x, x_map, scales, w0, w1, w2, m0, m1, m2, stride, s0, s1, s2, scale_stride, shift, paired,
                     rows, end, kv_rows, row_tiles, kv_tiles, residual, added, out, out_k, out_v, steps, row_steps,
                     stages, bias, angles, positions, sequences, page_table, table_stride, log2_page, head_dim,
                     interleaved, first_section, peers, inbox_at, slot, rank, ranks):  # fmt: skip
    """Tiles of 128 rows of W."""
    where = positions, sequences, page_table, table_stride, log2_page
    heads = angles, where, head_dim, interleaved, first_section
    gemm(zeros_of(64), tokens, x, x_map, scales, (w0, w1, w2), (m0, m1, m2), stride, (s0, s1, s2), scale_stride, shift,
         paired, (rows, end, kv_rows), (row_tiles, kv_tiles), residual, added, heads, (out, out_k, out_v), steps,
         row_steps, stages, bias, (peers, inbox_at, slot, rank, ranks))  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def wgmma_tall_kernel(tokens, x, x_map, scales, w0, w1, w2, m0, m1, m2, stride, s0, s1, s2, scale_stride, shift, paired,
                      rows, end, kv_rows, row_tiles, kv_tiles, residual, added, out, out_k, out_v, steps, row_steps,
                      stages, bias, angles, positions, sequences, page_table, table_stride, log2_page, head_dim,
                      interleaved, first_section, peers, inbox_at, slot, rank, ranks):  # fmt: skip
    """Tiles of 128 rows of a quantised W and 256 tokens, for which W is decoded half as often."""
    where = positions, sequences, page_table, table_stride, log2_page
    heads = angles, where, head_dim, interleaved, first_section
    griddepcontrol_launch_dependents()
    ring = make_ring(2 * ROWS, ROWS, stages, True)
    row_groups = (tokens[0] + 2 * ROWS - 1) >> 8
    tiles = row_groups, row_groups * (row_tiles + 2 * kv_tiles)
    sections, sizes = (row_tiles, kv_tiles), (rows, end, kv_rows)
    if cuda.threadIdx.x < CONSUMERS:
        multiply_tall(zeros_of(64), tiles, ring, x, w0, (s0, s1, s2), steps, scales, tokens[0], paired, sections, sizes,
                      residual, added, heads, (out, out_k, out_v), (peers, inbox_at, slot, rank, ranks))  # fmt: skip
    else:
        bases = address(w0, 0), address(w1, 0), address(w2, 0), address(s0, 0), address(s1, 0), address(s2, 0)
        strides = stride, scale_stride * scale_bytes(s0)
        load_tall_blocks(tiles, ring, x_map, w0, s0, bases, strides, shift, paired, sections, sizes, steps, bias)


@launch_bounds(min_blocks=1)
@cuda.jit
def wgmma_192_kernel(tokens, x, x_map, scales, w0, w1, w2, m0, m1, m2, stride, s0, s1, s2, scale_stride, shift, paired,
                     rows, end, kv_rows, row_tiles, kv_tiles, residual, added, out, out_k, out_v, steps, row_steps,
                     stages, bias, angles, positions, sequences, page_table, table_stride, log2_page, head_dim,
                     interleaved, first_section, peers, inbox_at, slot, rank, ranks):  # fmt: skip
    """Tiles of 192 rows of W, which has 16 bits."""
    where = positions, sequences, page_table, table_stride, log2_page
    heads = angles, where, head_dim, interleaved, first_section
    gemm(zeros_of(96), tokens, x, x_map, scales, (w0, w1, w2), (m0, m1, m2), stride, (s0, s1, s2), scale_stride, shift,
         paired, (rows, end, kv_rows), (row_tiles, kv_tiles), residual, added, heads, (out, out_k, out_v), steps,
         row_steps, stages, bias, (peers, inbox_at, slot, rank, ranks))  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def wgmma_224_kernel(tokens, x, x_map, scales, w0, w1, w2, m0, m1, m2, stride, s0, s1, s2, scale_stride, shift, paired,
                     rows, end, kv_rows, row_tiles, kv_tiles, residual, added, out, out_k, out_v, steps, row_steps,
                     stages, bias, angles, positions, sequences, page_table, table_stride, log2_page, head_dim,
                     interleaved, first_section, peers, inbox_at, slot, rank, ranks):  # fmt: skip
    """Tiles of 224 rows of W, which has 16 bits."""
    where = positions, sequences, page_table, table_stride, log2_page
    heads = angles, where, head_dim, interleaved, first_section
    gemm(zeros_of(112), tokens, x, x_map, scales, (w0, w1, w2), (m0, m1, m2), stride, (s0, s1, s2), scale_stride, shift,
         paired, (rows, end, kv_rows), (row_tiles, kv_tiles), residual, added, heads, (out, out_k, out_v), steps,
         row_steps, stages, bias, (peers, inbox_at, slot, rank, ranks))  # fmt: skip


@launch_bounds(min_blocks=1)
@cuda.jit
def wgmma_256_kernel(tokens, x, x_map, scales, w0, w1, w2, m0, m1, m2, stride, s0, s1, s2, scale_stride, shift, paired,
                     rows, end, kv_rows, row_tiles, kv_tiles, residual, added, out, out_k, out_v, steps, row_steps,
                     stages, bias, angles, positions, sequences, page_table, table_stride, log2_page, head_dim,
                     interleaved, first_section, peers, inbox_at, slot, rank, ranks):  # fmt: skip
    """Tiles of 256 rows of W, which has 16 bits."""
    where = positions, sequences, page_table, table_stride, log2_page
    heads = angles, where, head_dim, interleaved, first_section
    gemm(zeros_of(128), tokens, x, x_map, scales, (w0, w1, w2), (m0, m1, m2), stride, (s0, s1, s2), scale_stride, shift,
         paired, (rows, end, kv_rows), (row_tiles, kv_tiles), residual, added, heads, (out, out_k, out_v), steps,
         row_steps, stages, bias, (peers, inbox_at, slot, rank, ranks))  # fmt: skip


assert ROWS == 1 << 7
