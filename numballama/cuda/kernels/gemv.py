"""GEMV: linear layers for a few tokens. Every weight is read once, in a stream that never stalls.

y[N] = W[N, K] · x[K] for each token. Two operations per weight: memory bandwidth is the floor. An SM of an H200 gets 31
bytes per nanosecond, and 26 KB must be in flight at any time to cover the memory's latency. W of 4096 × 4096 in float16
is 34 MB: 7 µs at 4.8 TB/s.

- Each warp copies two chunks (16 bytes per lane) of two rows at a time to a ring in shared memory, `STAGES` - 1 stages
  ahead of the stage that it multiplies. A lane reads only what it copied itself, so the ring needs no barrier. Copies
  start before the kernel waits for its predecessor: when x arrives, the first weights are already there.
- Rows are processed in pairs (`a`, `b`), which halves the reads of x. A pair is two neighbouring rows, or a row of the
  gate and one of up, or two dimensions of queries or keys that RoPE rotates together.
- `slices` warps share a pair of rows, and each takes every `slices`-th stage of it. They write their sums to shared
  memory after the last row. After one barrier, one thread per row adds them up.
- x is staged in shared memory in a layout that depends on the weight's type (`dot`, `gemv_x`).
- RMSNorm needs no separate pass: x is multiplied by the norm's weight while it is staged. The rest of the norm is one
  factor for the whole vector, and every sum is multiplied by it at the end.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..arithmetic import float_as_uint, mad_wide_s32, s32
from ..intrinsics import (
    address,
    cp_async_4,
    cp_async_16,
    cp_async_commit,
    cp_async_wait_all,
    cp_async_wait_group,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    no_unroll,
    shared_address,
    st_shared_u32,
)
from ..quant_traits import has_mins, has_scales, is_q5_k, is_q6_k, per_16_bytes, scale_bytes, store_element
from .common import device, fast_divmod, is_padding_token, kv_index, launch_bounds, silu_and_mul
from .dequant import FIVE_RECORD, FOUR_WORDS, chunk_scales, first_scale
from .dot import columns_of_stage, elements_together, fetch_q6_k, multiply, payload_step, row_bytes, x_step
from .gemv_x import before_x, norm_factor, put_squares, stage_x
from .linear_sums import add_up, link_of, send
from .params import CHUNK_BYTES, SCALE_BYTES, SCALES_AT
from .params import GEMV_STAGES as STAGES
from .params import GEMV_THREADS as THREADS
from .params import GEMV_WARPS as WARPS
from .reduce import warp_sum2

LINEAR, GATE_UP, QKV = 0, 1, 2
"""Modes. The rows of a pair are neighbours in one weight (LINEAR), the same row of two weights (GATE_UP), or two rows
of one of three weights (QKV, see `place`).
"""


@device
def place(mode, pair, rows):
    """(weight, row of a, row of b) of a pair. `rows` tells which rows are paired (see `stream`)."""
    _, q_pairs, k_pairs, half, inverse_half = rows
    weight, a, b = 0, s32(2 * pair), s32(2 * pair + 1)
    if mode == GATE_UP:
        a, b = pair, pair
    if mode == QKV:
        inside = pair
        if pair >= q_pairs + k_pairs:
            weight = 2
            inside = s32(pair - q_pairs - k_pairs)
        elif pair >= q_pairs:
            weight = 1
            inside = s32(pair - q_pairs)
        a, b = s32(2 * inside), s32(2 * inside + 1)
        if half > 0 and weight < 2:
            head, _ = fast_divmod(inside, half, inverse_half)
            a = s32(inside + head * half)
            b = s32(a + half)
    return weight, a, b


@device
def source_of(mode, pair, rows, weights, scales):
    """Addresses of the first bytes that this lane copies: (row a, row b, scales of a, scales of b) of a pair."""
    weight, a, b = place(mode, pair, rows)
    w0, w1, w2, stride = weights
    s0, s1, s2, scale_stride = scales
    if mode == LINEAR:
        b = min(b, s32(rows[0]))
    base = w0 if weight == 0 else (w1 if weight == 1 else w2)
    scale_base = s0 if weight == 0 else (s1 if weight == 1 else s2)
    base_b, scale_base_b = base, scale_base
    if mode == GATE_UP:
        base_b, scale_base_b = w1, s1
    return (
        mad_wide_s32(a, stride, base), mad_wide_s32(b, stride, base_b), mad_wide_s32(a, scale_stride, scale_base),
        mad_wide_s32(b, scale_stride, scale_base_b),
    )  # fmt: skip


@device
def fetch(slot, source, scales, left, payload, scale_step, lane):
    """Start copying this lane's 16 bytes of two neighbouring chunks of a row, and the words with their scales. `left`
    is how many columns there are from the warp's first one on.
    """
    here = s32(left - lane * elements_together(payload))
    if is_q6_k(payload):
        fetch_q6_k(slot, source, scales, here, lane)
        return
    next_here = s32(here - 32 * per_16_bytes(payload))
    cp_async_16(slot, source, here)
    cp_async_16(slot + CHUNK_BYTES, source + CHUNK_BYTES, next_here)
    if is_q5_k(payload):  # the first lanes copy the record for all lanes
        if 16 * lane < FIVE_RECORD:
            cp_async_16(slot + SCALES_AT, scales, left)
            cp_async_16(slot + SCALES_AT + FIVE_RECORD, scales + scale_step, s32(left - 1024))
    elif has_scales(payload):
        at = slot + SCALES_AT - 12 * lane
        if has_mins(payload):
            here = left if lane < FOUR_WORDS else s32(0)
            next_here = s32(left - 1024) if lane < FOUR_WORDS else s32(0)
        cp_async_4(at, scales, here)
        cp_async_4(at + SCALE_BYTES, scales + scale_step, next_here)


@device
def pairs_of_block(layout):
    """Number of pairs of rows that this block computes. Its pair `local` is blockIdx.x + local · gridDim.x of all."""
    return layout[6] + (1 if cuda.blockIdx.x < layout[7] else 0)


@device
def pair_of(local, n_pairs):
    """The block's pair `local`, or its last one."""
    return s32(cuda.blockIdx.x + min(local, s32(n_pairs - 1)) * cuda.gridDim.x)


@device
def fetch_stage(mode, cursor, stage, of_warp, payload, rows, weights, scales, scale_step):
    """Start copying the stage at the cursor, if there is one. Returns the cursor of the next stage."""
    to_fetch, left, a, b, a_scales, b_scales = cursor
    ring, lane, groups, n_pairs, first_left, fewer, step, scales_step = of_warp
    row_slot = row_bytes(payload)
    if to_fetch < n_pairs:
        slot = s32(ring + (stage & (STAGES - 1)) * (2 * row_slot))
        fetch(slot, a, a_scales, left, payload, scale_step, lane)
        fetch(slot + row_slot, b, b_scales, left, payload, scale_step, lane)
        left = s32(left - fewer)
        a += step
        b += step
        a_scales += scales_step
        b_scales += scales_step
        if left <= 0:
            left = first_left
            to_fetch = s32(to_fetch + groups)
            a, b, a_scales, b_scales = source_of(mode, pair_of(to_fetch, n_pairs), rows, weights, scales)
    cp_async_commit()
    return to_fetch, left, a, b, a_scales, b_scales


@device
def stream(mode, rows, x, start, norm, normed, payload, weights, scales, shift, columns, layout, shared, early, first,
           second, wanted):  # fmt: skip
    """Compute the sums of this block's pairs of rows, in slices, into shared memory. Ends with a barrier.

    Returns early[first] and early[second] if `wanted`: operands of the epilogue, loaded as soon as the preceding kernel
    has finished.

    `rows` is (last row of a LINEAR weight, which replaces a row after the end; pairs of queries; pairs of keys; half;
    1 / half). If `half` is not 0, row i of queries and keys is paired with row i + half of its head. `weights` and
    `scales` are three addresses, or pointers, and the distance of two rows. `layout` is what the host computed: slices,
    log2 of slices, the float32 indices of x, of its sums of squares and of the partial sums in shared memory, chunks of
    a row, pairs per block, blocks with one pair more, and stages to copy ahead.
    """
    slices, log2_slices, prefetch = s32(layout[0]), s32(layout[1]), s32(layout[8])
    thread, columns = s32(cuda.threadIdx.x), s32(columns)
    lane, warp = s32(thread & 31), s32(thread >> 5)
    n_pairs, elements, row_slot = s32(pairs_of_block(layout)), per_16_bytes(payload), row_bytes(payload)
    groups, slice_index = s32(WARPS >> log2_slices), s32(warp & (slices - 1))
    shared_at = s32(shared_address(shared, 0))
    ring = s32(shared_at + warp * (STAGES * 2 * row_slot) + lane * 16)
    first_left = s32(columns - slice_index * columns_of_stage(payload))

    # this lane's first copy in row 0: its 16 bytes of the first chunk of its slice
    s0, s1, s2, scale_stride = scales
    scale, size = (lane * elements) >> shift, scale_bytes(s0)
    odd, scale_step = s32(scale & 1), s32(chunk_scales(payload, s0, elements, shift))
    fewer, step = s32(slices * columns_of_stage(payload)), s32(slices * payload_step(payload))
    of_warp = ring, lane, groups, n_pairs, first_left, fewer, step, s32(slices * (2 * scale_step))
    offset = lane * 16 + slice_index * payload_step(payload)
    scales_offset = first_scale(payload, s0, scale, lane) + slice_index * (2 * scale_step)
    weights = weights[0] + offset, weights[1] + offset, weights[2] + offset, s32(weights[3])
    addresses = (
        address(s0, 0) + scales_offset,
        address(s1, 0) + scales_offset,
        address(s2, 0) + scales_offset,
        s32(scale_stride * size),
    )

    local, left = s32(warp >> log2_slices), first_left
    a, b, a_scales, b_scales = source_of(mode, pair_of(local, n_pairs), rows, weights, addresses)
    cursor = local, left, a, b, a_scales, b_scales
    stage = s32(0)
    while stage < prefetch:  # STAGES - 1, as an argument: the compiler would unroll a constant
        no_unroll()
        cursor = fetch_stage(mode, cursor, stage, of_warp, payload, rows, weights, addresses, scale_step)
        stage = s32(stage + 1)
    staging = before_x(norm, normed, columns, payload, s32(shared_at + 4 * layout[2]))
    griddepcontrol_wait()
    early1, early2 = np.float32(0), np.float32(0)
    if wanted:
        early1, early2 = early[first], early[second]
    squares = stage_x(x, start, norm, normed, columns, payload, staging)
    cuda.syncthreads()
    griddepcontrol_launch_dependents()  # not earlier: the next kernel's copies would compete with the loads of x
    put_squares(squares, normed, s32(shared_at + 4 * layout[3]))

    sum_a, sum_b = np.float32(0), np.float32(0)
    x_bytes = 4 * x_step(payload)
    first_x = s32(shared_at + 4 * layout[2] + 2 * slice_index * x_bytes)
    x_now, sums_at = first_x, s32(shared_at + 4 * layout[4] + 8 * (local * slices + slice_index) + 4 * (lane >> 4))
    # 0xF0F0F0F0, but not for the compiler, which would load a constant again for each of 32 uses
    high_nibbles = np.uint32(columns >> 31) ^ np.uint32(0xF0F0F0F0)
    while local < n_pairs:
        if has_mins(payload):
            cuda.syncwarp()  # all lanes have read what other lanes copied for them
        cursor = fetch_stage(mode, cursor, stage, of_warp, payload, rows, weights, addresses, scale_step)
        stage = s32(stage + 1)
        cp_async_wait_group(3)
        if has_mins(payload):
            cuda.syncwarp()
        slot = s32(ring + (stage & (STAGES - 1)) * (2 * row_slot))
        if left > 0:
            sum_a += multiply(slot, payload, s0, odd, x_now, lane, high_nibbles)
            sum_b += multiply(s32(slot + row_slot), payload, s0, odd, x_now, lane, high_nibbles)
        left = s32(left - fewer)
        x_now = s32(x_now + slices * (2 * x_bytes))
        if left <= 0:
            total = warp_sum2(sum_a, sum_b)
            if lane & 15 == 0:
                st_shared_u32(sums_at, float_as_uint(total))
            sum_a, sum_b = np.float32(0), np.float32(0)
            left, x_now = first_left, first_x
            local, sums_at = s32(local + groups), s32(sums_at + 8 * WARPS)
    cp_async_wait_all()
    cuda.syncthreads()
    return early1, early2


@device
def slice_sum(shared, layout, local, which):
    """Sum of the slices of row `which` (0 or 1) of the block's pair `local`."""
    slices, partial_at, total = layout[0], layout[4], np.float32(0)
    for i in range(slices):
        no_unroll()
        total += shared[partial_at + (local * slices + i) * 2 + which]
    return total


@launch_bounds(min_blocks=3)
@cuda.jit
def linear_kernel(tokens, x, norm, normed, eps, weight, stride, scales, scale_stride, shift, residual, added, out, rows,
                  columns, slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs,
                  prefetch):  # fmt: skip
    """out = W · x, plus `residual` if `added`; x is normed first if `normed`."""
    if is_padding_token(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, base = cuda.blockIdx.y, address(weight, 0)
    layout = slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs, prefetch
    out_index = t * rows + 2 * (cuda.blockIdx.x + (cuda.threadIdx.x >> 1) * cuda.gridDim.x) + (cuda.threadIdx.x & 1)
    wanted = added and out_index < (t + 1) * rows
    early1, _ = stream(LINEAR, (rows - 1, 0, 0, 0, np.float32(0)), x, t * columns, norm, normed, weight,
                       (base, base, base, stride), (scales, scales, scales, scale_stride), shift, columns, layout,
                       shared, residual, out_index, out_index, wanted)  # fmt: skip
    factor = norm_factor(shared, layout[3], normed, columns, eps)
    for i in range(cuda.threadIdx.x, 2 * pairs_of_block(layout), THREADS):
        row = 2 * (cuda.blockIdx.x + (i >> 1) * cuda.gridDim.x) + (i & 1)
        if row < rows:
            value = slice_sum(shared, layout, i >> 1, i & 1) * factor
            if added:
                value += early1 if i < THREADS else residual[t * rows + row]
            out[t * rows + row] = value


@launch_bounds(min_blocks=3)
@cuda.jit
def linear_all_reduce_kernel(tokens, x, weight, stride, scales, scale_stride, shift, residual, added, out, rows,
                             columns, exchange, inbox_at, slot, peers, stop, rank, ranks, slices, log2_slices, x_at,
                             sums_at, partial_at, chunks, pairs_per_block, extra_pairs, prefetch):  # fmt: skip
    """out = the sum of W · x over ranks, of one token, plus `residual` of the ranks for which it is `added`.

    All blocks run at the same time, and wait for the same ones of the other ranks.
    """
    shared = cuda.shared.array(0, np.float32)
    base = address(weight, 0)
    layout = slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs, prefetch
    row = 2 * (cuda.blockIdx.x + (cuda.threadIdx.x >> 1) * cuda.gridDim.x) + (cuda.threadIdx.x & 1)
    link = link_of(exchange, inbox_at, slot, peers, stop, rank, ranks)
    early1, _ = stream(LINEAR, (rows - 1, 0, 0, 0, np.float32(0)), x, 0, x, 0, weight, (base, base, base, stride),
                       (scales, scales, scales, scale_stride), shift, columns, layout, shared, residual, row, row,
                       added and row < rows)  # fmt: skip
    for i in range(cuda.threadIdx.x, 2 * pairs_of_block(layout), THREADS):
        row = 2 * (cuda.blockIdx.x + (i >> 1) * cuda.gridDim.x) + (i & 1)
        if row < rows:
            value = slice_sum(shared, layout, i >> 1, i & 1)
            if added:
                value += early1 if i < THREADS else residual[row]
            send(link, row, value)
            out[row] = add_up(link, row, value)


@launch_bounds(min_blocks=3)
@cuda.jit
def gate_up_kernel(tokens, x, norm, normed, eps, w1, w3, stride, w1_scales, w3_scales, scale_stride, shift, out, rows,
                   columns, slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs,
                   prefetch):  # fmt: skip
    """out = silu(W1 · x) · (W3 · x); x may be norm(x)."""
    if is_padding_token(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, a, b = cuda.blockIdx.y, address(w1, 0), address(w3, 0)
    layout = slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs, prefetch
    stream(GATE_UP, (0, 0, 0, 0, np.float32(0)), x, t * columns, norm, normed, w1, (a, b, b, stride),
           (w1_scales, w3_scales, w3_scales, scale_stride), shift, columns, layout, shared, x, 0, 0, False)  # fmt: skip
    factor = norm_factor(shared, layout[3], normed, columns, eps)
    for local in range(cuda.threadIdx.x, pairs_of_block(layout), THREADS):
        gate = slice_sum(shared, layout, local, 0) * factor
        up = slice_sum(shared, layout, local, 1) * factor
        out[t * rows + cuda.blockIdx.x + local * cuda.gridDim.x] = silu_and_mul(gate, up)


@launch_bounds(min_blocks=3)
@cuda.jit
def qkv_kernel(tokens, x, norm, normed, eps, wq, wk, wv, stride, wq_scales, wk_scales, wv_scales, scale_stride, shift,
               q, k, v, q_rows, k_rows, v_rows, columns, slices, log2_slices, x_at, sums_at, partial_at, chunks,
               pairs_per_block, extra_pairs, prefetch):  # fmt: skip
    """q, k, v = Wq · x, Wk · x, Wv · x; x may be norm(x). Row counts are even, because head sizes are. Those of weights
    that another launch has are 0.
    """
    if is_padding_token(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, q_pairs, k_pairs = cuda.blockIdx.y, q_rows >> 1, k_rows >> 1
    layout = slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs, prefetch
    row_pairs = 0, q_pairs, k_pairs, 0, np.float32(0)
    stream(QKV, row_pairs, x, t * columns, norm, normed, wq, (address(wq, 0), address(wk, 0), address(wv, 0), stride),
           (wq_scales, wk_scales, wv_scales, scale_stride), shift, columns, layout, shared, x, 0, 0, False)  # fmt: skip
    factor = norm_factor(shared, layout[3], normed, columns, eps)
    for i in range(cuda.threadIdx.x, 2 * pairs_of_block(layout), THREADS):
        pair = cuda.blockIdx.x + (i >> 1) * cuda.gridDim.x
        section, a, b = place(QKV, pair, row_pairs)
        row = b if i & 1 else a
        value = slice_sum(shared, layout, i >> 1, i & 1) * factor
        if section == 0:
            q[t * q_rows + row] = value
        elif section == 1:
            k[t * k_rows + row] = value
        else:
            v[t * v_rows + row] = value


@device
def angle_index(local, pairs, row_pairs, head_dim, inverse_head_dim, interleaved):
    """Index of the RoPE angle of the block's pair `local`, among a token's angles; a valid index for any `local`."""
    pair = cuda.blockIdx.x + local * cuda.gridDim.x
    _, row, _ = place(QKV, min(pair, pairs - 1), row_pairs)
    _, d = fast_divmod(row, head_dim, inverse_head_dim)
    return d >> 1 if interleaved else min(d, (head_dim >> 1) - 1)


@launch_bounds(min_blocks=3)
@cuda.jit
def qkv_rope_kernel(tokens, x, norm, normed, eps, wq, wk, wv, stride, wq_scales, wk_scales, wv_scales, scale_stride,
                    shift, angles, positions, sequences, page_table, table_stride, log2_page, q, k_cache, v_cache,
                    q_rows, k_rows, v_rows, head_dim, interleaved, kv_heads, inverse_head_dim, columns, slices,
                    log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs,
                    prefetch):  # fmt: skip
    """Write RoPE(Wq · x) to q, RoPE(Wk · x) and Wv · x to the caches at the token's position. x may be norm(x)."""
    if is_padding_token(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, q_pairs, k_pairs = cuda.blockIdx.y, q_rows >> 1, k_rows >> 1
    pairs = q_pairs + k_pairs + (v_rows >> 1)
    half = 0 if interleaved else head_dim >> 1
    layout = slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs, prefetch
    inverse = np.float32(2) * inverse_head_dim
    row_pairs = 0, q_pairs, k_pairs, half, inverse
    # index of the token's key of head 0, before the wait: no kernel writes the page table
    new_at = kv_index((page_table, table_stride, log2_page), sequences[t], 0, positions[t], kv_heads, head_dim)
    angle = angle_index(cuda.threadIdx.x, pairs, row_pairs, head_dim, inverse_head_dim, interleaved) + t * head_dim
    cos, sin = stream(QKV, row_pairs, x, t * columns, norm, normed, wq,
                      (address(wq, 0), address(wk, 0), address(wv, 0), stride),
                      (wq_scales, wk_scales, wv_scales, scale_stride), shift, columns, layout, shared, angles, angle,
                      angle + (head_dim >> 1), True)  # fmt: skip
    factor = norm_factor(shared, layout[3], normed, columns, eps)
    for i in range(cuda.threadIdx.x, pairs_of_block(layout), THREADS):
        section, row, _ = place(QKV, cuda.blockIdx.x + i * cuda.gridDim.x, row_pairs)
        a = slice_sum(shared, layout, i, 0) * factor
        b = slice_sum(shared, layout, i, 1) * factor
        head, d = fast_divmod(row, head_dim, inverse_head_dim)
        apart = half if half > 0 and section < 2 else 1
        if section < 2:
            if i >= THREADS:
                angle = angle_index(i, pairs, row_pairs, head_dim, inverse_head_dim, interleaved) + t * head_dim
                cos, sin = angles[angle], angles[angle + (head_dim >> 1)]
            a, b = a * cos - b * sin, a * sin + b * cos
        if section == 0:
            q[t * q_rows + row] = a
            q[t * q_rows + row + apart] = b
        else:
            at = new_at + (head << log2_page) * head_dim + d
            if section == 1:
                store_element(k_cache, at, a)
                store_element(k_cache, at + apart, b)
            else:
                store_element(v_cache, at, a)
                store_element(v_cache, at + apart, b)
