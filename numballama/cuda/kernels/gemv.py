"""Linear layers for a few tokens: every weight is read once, in a stream that never waits.

y[N] = W[N, K] · x[K]. Such a step does two operations for each weight, so the memory's bandwidth is its floor: an SM of
an H200 gets 31 bytes a nanosecond, and 26 KB must be under way at any time to cover the memory's latency.

- Each warp copies two chunks (16 bytes a lane) of two rows at a time into a ring in shared memory, `DEPTH` - 1 stages
  ahead of the stage it multiplies; a lane reads only what it copied itself, so the ring needs no barrier. The copies
  begin before the kernel waits for its predecessor: when x arrives, the first weights are there.
- Rows come in pairs (`a`, `b`), which halves the reads of x: neighbours; or the gate's row and up's; or, of queries and
  keys, two dimensions that RoPE turns together.
- The `slices` warps that share a pair of rows each take every `slices`-th stage of it; sums meet in shared memory after
  the last row, behind one barrier, where one thread a pair finishes them.
- x lies in shared memory as the weight's type wants it (`products`).
- RMSNorm costs no pass of its own: x is multiplied by the norm's weight on the way in, and since the rest is one factor
  for the whole vector, every sum is multiplied by it at the end.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..intrinsics import (
    address,
    await_all,
    await_all_but_3,
    close_copies,
    copy4,
    copy16,
    has_scales,
    is_q4_k,
    is_q6_k,
    keep_loop,
    let_successor_start,
    per_16_bytes,
    scale_bytes,
    shared_address,
    store_number,
    wait_for_predecessor,
)
from .common import at_once, beyond, device, sigmoid_times, split, warp_sum2
from .dequant import FOUR_WORDS, chunk_scales, first_scale
from .dot import fetch_q6_k, multiply, norm_factor, numbers_together, payload_step, row_bytes, stage_x, x_step
from .params import CHUNK_BYTES, SCALE_BYTES, SCALES_AT
from .params import GEMV_STAGES as DEPTH
from .params import GEMV_THREADS as THREADS
from .params import GEMV_WARPS as WARPS

LINEAR, GATE_UP, QKV = 0, 1, 2
"""What the two rows of a pair are: neighbours of one weight; the same row of two; or, in three, see `place`."""


@device
def place(mode, pair, rows):
    """(weight, row of a, row of b) of a pair; `rows` says how rows make pairs (`stream`)."""
    _, q_pairs, k_pairs, half, inverse_half = rows
    weight, a, b = 0, 2 * pair, 2 * pair + 1
    if mode == GATE_UP:
        a, b = pair, pair
    if mode == QKV:
        inside = pair
        if pair >= q_pairs + k_pairs:
            weight = 2
            inside = pair - q_pairs - k_pairs
        elif pair >= q_pairs:
            weight = 1
            inside = pair - q_pairs
        a, b = 2 * inside, 2 * inside + 1
        if half > 0 and weight < 2:
            head, _ = split(inside, half, inverse_half)
            a = inside + head * half
            b = a + half
    return weight, a, b


@device
def source_of(mode, pair, rows, weights, scales):
    """Addresses of the first bytes that a lane copies of the two rows of a pair, and of the words with their scales."""
    weight, a, b = place(mode, pair, rows)
    w0, w1, w2, stride = weights
    s0, s1, s2, scale_stride = scales
    if mode == LINEAR:
        b = min(b, rows[0])
    base = w0 if weight == 0 else (w1 if weight == 1 else w2)
    of_scales = s0 if weight == 0 else (s1 if weight == 1 else s2)
    base_b, of_scales_b = base, of_scales
    if mode == GATE_UP:
        base_b, of_scales_b = w1, s1
    return (
        base + a * stride, base_b + b * stride, of_scales + a * scale_stride, of_scales_b + b * scale_stride,
    )  # fmt: skip


@device
def fetch(slot, source, scales, count, next_count, left, payload, scale_step, lane):
    """Start copying a lane's 16 bytes of two neighbouring chunks of a row, and the words with their scales."""
    if is_q6_k(payload):
        fetch_q6_k(slot, source, scales, count, lane)
        return
    copy16(slot, source, count)
    copy16(slot + CHUNK_BYTES, source + CHUNK_BYTES, next_count)
    if has_scales(payload):
        at, words, next_words = slot + SCALES_AT - 12 * lane, count >> 2, next_count >> 2
        if is_q4_k(payload):  # the first lanes copy for all of them
            all_left = left + 32 * lane
            words = 4 if all_left > 0 and lane < FOUR_WORDS else 0
            next_words = 4 if all_left > 1024 and lane < FOUR_WORDS else 0
        copy4(at, scales, words)
        copy4(at + SCALE_BYTES, scales + scale_step, next_words)


@device
def pairs_of_block(layout):
    """How many pairs are this block's: those with numbers blockIdx.x + local · gridDim.x."""
    return layout[6] + (1 if cuda.blockIdx.x < layout[7] else 0)


@device
def produce(mode, cursor, turn, own, shape, payload, rows, weights, scales, scale_step):
    """Start copying the stage that the cursor stands at, if there is one; returns the cursor moved on to the next."""
    to_fetch, next_chunk, a, b, a_scales, b_scales = cursor
    ring, lane, piece, slices, groups = own
    mine, columns, chunks = shape
    width, row_slot = 32 * per_16_bytes(payload), row_bytes(payload)
    if to_fetch < mine:
        slot = ring + (turn & (DEPTH - 1)) * (2 * row_slot)
        left = columns - next_chunk * width - lane * numbers_together(payload)
        count, next_count = 16 if left > 0 else 0, 16 if left > width else 0
        fetch(slot, a, a_scales, count, next_count, left, payload, scale_step, lane)
        fetch(slot + row_slot, b, b_scales, count, next_count, left, payload, scale_step, lane)
        next_chunk += 2 * slices
        a += slices * payload_step(payload)
        b += slices * payload_step(payload)
        a_scales += slices * (2 * scale_step)
        b_scales += slices * (2 * scale_step)
        if next_chunk >= chunks:
            next_chunk = 2 * piece
            to_fetch += groups
            pair = cuda.blockIdx.x + min(to_fetch, mine - 1) * cuda.gridDim.x
            a, b, a_scales, b_scales = source_of(mode, pair, rows, weights, scales)
    close_copies()
    return to_fetch, next_chunk, a, b, a_scales, b_scales


@device
def stream(mode, rows, x, start, norm, normed, payload, weights, scales, shift, columns, layout, shared, early, first,
           second, wanted):  # fmt: skip
    """All sums of this block's pairs, in slices, into shared memory; ends behind a barrier.

    Returns early[first] and early[second], if `wanted`, loaded as soon as may be: what the thread needs at the end.

    `rows` is (last row of a LINEAR weight, which stands in for one too many; pairs of queries; pairs of keys; half; its
    inverse): with `half` not 0, row i of queries and keys goes with row i + half of its head. `weights` and `scales`
    are three addresses, or pointers, and the distance of two rows. `layout` is what `_shape` says.
    """
    slices, log2_slices, x_at, sums_at, partial_at, chunks, _, _, ahead = layout
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    mine, numbers, row_slot = pairs_of_block(layout), per_16_bytes(payload), row_bytes(payload)
    shape = mine, columns, chunks
    groups, piece = WARPS >> log2_slices, warp & (slices - 1)
    ring = shared_address(shared, 0) + warp * (DEPTH * 2 * row_slot) + lane * 16
    own = ring, lane, piece, slices, groups

    # addresses of what this lane copies first in row 0: its place in a chunk, and the first chunk of its slice
    s0, s1, s2, scale_stride = scales
    scale, size = (lane * numbers) >> shift, scale_bytes(s0)
    odd, scale_step = scale & 1, chunk_scales(payload, s0, numbers, shift)
    on = lane * 16 + piece * payload_step(payload)
    scales_on = first_scale(payload, s0, scale, lane) + piece * (2 * scale_step)
    weights = weights[0] + on, weights[1] + on, weights[2] + on, weights[3]
    addresses = address(s0, 0) + scales_on, address(s1, 0) + scales_on, address(s2, 0) + scales_on, scale_stride * size

    local, chunk = warp >> log2_slices, 2 * piece
    pair = cuda.blockIdx.x + min(local, mine - 1) * cuda.gridDim.x
    a, b, a_scales, b_scales = source_of(mode, pair, rows, weights, addresses)
    cursor = local, chunk, a, b, a_scales, b_scales
    for turn in range(ahead):  # DEPTH - 1, but told by the host, lest the compiler writes it out
        keep_loop()
        cursor = produce(mode, cursor, turn, own, shape, payload, rows, weights, addresses, scale_step)
    wait_for_predecessor()
    held, held_too = np.float32(0), np.float32(0)
    if wanted:
        held, held_too = early[first], early[second]
    stage_x(x, start, norm, normed, columns, payload, shared, x_at, sums_at)
    cuda.syncthreads()
    let_successor_start()  # not before: its copies would stand in the way of x

    sum_a, sum_b = np.float32(0), np.float32(0)
    x_chunk, turn = x_step(payload), ahead
    while local < mine:
        if is_q4_k(payload):
            cuda.syncwarp()  # all lanes have taken what others copied for them
        cursor = produce(mode, cursor, turn, own, shape, payload, rows, weights, addresses, scale_step)
        turn += 1
        await_all_but_3()
        if is_q4_k(payload):
            cuda.syncwarp()
        slot = ring + (turn & (DEPTH - 1)) * (2 * row_slot)
        if chunk < chunks:
            sum_a += multiply(slot, payload, s0, odd, shared, x_at + chunk * x_chunk, lane)
            sum_b += multiply(slot + row_slot, payload, s0, odd, shared, x_at + chunk * x_chunk, lane)
        chunk += 2 * slices
        if chunk >= chunks:
            total = warp_sum2(sum_a, sum_b)
            if lane & 15 == 0:
                shared[partial_at + (local * slices + piece) * 2 + (lane >> 4)] = total
            sum_a, sum_b = np.float32(0), np.float32(0)
            chunk = 2 * piece
            local += groups
    await_all()
    cuda.syncthreads()
    return held, held_too


@device
def combined(shared, layout, local, which):
    """The sum of a row's slices: row `which` of the block's pair `local`."""
    slices, partial_at, total = layout[0], layout[4], np.float32(0)
    for i in range(slices):
        keep_loop()
        total += shared[partial_at + (local * slices + i) * 2 + which]
    return total


@at_once(3)
@cuda.jit
def linear_kernel(tokens, x, norm, normed, eps, weight, stride, scales, scale_stride, shift, residual, added, out,
                  rows, columns, slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs,
                  prefetch):  # fmt: skip
    """out = W · x, or W · norm(x), plus `residual` if `added`."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, base = cuda.blockIdx.y, address(weight, 0)
    layout = slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs, prefetch
    mine = t * rows + 2 * (cuda.blockIdx.x + (cuda.threadIdx.x >> 1) * cuda.gridDim.x) + (cuda.threadIdx.x & 1)
    wanted = added and mine < (t + 1) * rows
    held, _ = stream(LINEAR, (rows - 1, 0, 0, 0, np.float32(0)), x, t * columns, norm, normed, weight,
                     (base, base, base, stride), (scales, scales, scales, scale_stride), shift, columns, layout, shared,
                     residual, mine, mine, wanted)  # fmt: skip
    factor = norm_factor(shared, layout[3], normed, columns, eps)
    for i in range(cuda.threadIdx.x, 2 * pairs_of_block(layout), THREADS):
        row = 2 * (cuda.blockIdx.x + (i >> 1) * cuda.gridDim.x) + (i & 1)
        if row < rows:
            value = combined(shared, layout, i >> 1, i & 1) * factor
            if added:
                value += held if i < THREADS else residual[t * rows + row]
            out[t * rows + row] = value


@at_once(3)
@cuda.jit
def gate_up_kernel(tokens, x, norm, normed, eps, w1, w3, stride, w1_scales, w3_scales, scale_stride, shift, out, rows,
                   columns, slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs,
                   prefetch):  # fmt: skip
    """out = silu(W1 · x) · (W3 · x), of x or of norm(x)."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, a, b = cuda.blockIdx.y, address(w1, 0), address(w3, 0)
    layout = slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs, prefetch
    stream(GATE_UP, (0, 0, 0, 0, np.float32(0)), x, t * columns, norm, normed, w1, (a, b, b, stride),
           (w1_scales, w3_scales, w3_scales, scale_stride), shift, columns, layout, shared, x, 0, 0, False)  # fmt: skip
    factor = norm_factor(shared, layout[3], normed, columns, eps)
    for local in range(cuda.threadIdx.x, pairs_of_block(layout), THREADS):
        gate = combined(shared, layout, local, 0) * factor
        up = combined(shared, layout, local, 1) * factor
        out[t * rows + cuda.blockIdx.x + local * cuda.gridDim.x] = sigmoid_times(gate, up)


@at_once(3)
@cuda.jit
def qkv_kernel(tokens, x, norm, normed, eps, wq, wk, wv, stride, wq_scales, wk_scales, wv_scales, scale_stride, shift,
               q, k, v, q_rows, kv_rows, columns, slices, log2_slices, x_at, sums_at, partial_at, chunks,
               pairs_per_block, extra_pairs, prefetch):  # fmt: skip
    """q, k and v = Wq · x, Wk · x, Wv · x, of x or of norm(x). Numbers of rows are even, as heads are."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, q_pairs, k_pairs = cuda.blockIdx.y, q_rows >> 1, kv_rows >> 1
    layout = slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs, prefetch
    of_rows = 0, q_pairs, k_pairs, 0, np.float32(0)
    stream(QKV, of_rows, x, t * columns, norm, normed, wq, (address(wq, 0), address(wk, 0), address(wv, 0), stride),
           (wq_scales, wk_scales, wv_scales, scale_stride), shift, columns, layout, shared, x, 0, 0, False)  # fmt: skip
    factor = norm_factor(shared, layout[3], normed, columns, eps)
    for i in range(cuda.threadIdx.x, 2 * pairs_of_block(layout), THREADS):
        pair = cuda.blockIdx.x + (i >> 1) * cuda.gridDim.x
        section, a, b = place(QKV, pair, of_rows)
        row = b if i & 1 else a
        value = combined(shared, layout, i >> 1, i & 1) * factor
        if section == 0:
            q[t * q_rows + row] = value
        elif section == 1:
            k[t * kv_rows + row] = value
        else:
            v[t * kv_rows + row] = value


@device
def turning(local, pairs, of_rows, head_dim, inverse_head_dim, interleaved):
    """Which of a token's angles turns the block's pair `local`; 0 for a pair that it does not have."""
    pair = cuda.blockIdx.x + local * cuda.gridDim.x
    _, row, _ = place(QKV, min(pair, pairs - 1), of_rows)
    _, d = split(row, head_dim, inverse_head_dim)
    return d >> 1 if interleaved else min(d, (head_dim >> 1) - 1)


@at_once(3)
@cuda.jit
def qkv_rope_kernel(tokens, x, norm, normed, eps, wq, wk, wv, stride, wq_scales, wk_scales, wv_scales, scale_stride,
                    shift, angles, positions, sequences, q, k_cache, v_cache, q_rows, kv_rows, head_dim, interleaved,
                    context, kv_heads, inverse_head_dim, columns, slices, log2_slices, x_at, sums_at, partial_at,
                    chunks, pairs_per_block, extra_pairs, prefetch):  # fmt: skip
    """Queries, turned by RoPE, into q; keys, turned, and values into the cache, at the token's position."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, pairs, q_pairs, k_pairs = cuda.blockIdx.y, (q_rows >> 1) + kv_rows, q_rows >> 1, kv_rows >> 1
    half = 0 if interleaved else head_dim >> 1
    layout = slices, log2_slices, x_at, sums_at, partial_at, chunks, pairs_per_block, extra_pairs, prefetch
    inverse = np.float32(2) * inverse_head_dim
    of_rows = 0, q_pairs, k_pairs, half, inverse
    position, sequence = positions[t], sequences[t]
    angle = turning(cuda.threadIdx.x, pairs, of_rows, head_dim, inverse_head_dim, interleaved) + t * head_dim
    cos, sin = stream(
        QKV, of_rows, x, t * columns, norm, normed, wq, (address(wq, 0), address(wk, 0), address(wv, 0), stride),
        (wq_scales, wk_scales, wv_scales, scale_stride), shift, columns, layout, shared, angles, angle,
        angle + (head_dim >> 1), True,
    )  # fmt: skip
    factor = norm_factor(shared, layout[3], normed, columns, eps)
    for i in range(cuda.threadIdx.x, pairs_of_block(layout), THREADS):
        section, row, _ = place(QKV, cuda.blockIdx.x + i * cuda.gridDim.x, of_rows)
        a = combined(shared, layout, i, 0) * factor
        b = combined(shared, layout, i, 1) * factor
        head, d = split(row, head_dim, inverse_head_dim)
        apart = half if half > 0 and section < 2 else 1
        if section < 2:
            if i >= THREADS:
                angle = turning(i, pairs, of_rows, head_dim, inverse_head_dim, interleaved) + t * head_dim
                cos, sin = angles[angle], angles[angle + (head_dim >> 1)]
            a, b = a * cos - b * sin, a * sin + b * cos
        if section == 0:
            q[t * q_rows + row] = a
            q[t * q_rows + row + apart] = b
        else:
            at = ((sequence * kv_heads + head) * context + position) * head_dim + d
            if section == 1:
                store_number(k_cache, at, a)
                store_number(k_cache, at + apart, b)
            else:
                store_number(v_cache, at, a)
                store_number(v_cache, at + apart, b)
