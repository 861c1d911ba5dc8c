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
- x lies in shared memory in the order in which lanes want it, four numbers at a time: number 4q + i of lane l's sixteen
  bytes at 132 q + 4 l + i. 132, not 128, so that writing it meets no bank twice either.
- RMSNorm costs no pass of its own: x is multiplied by the norm's weight on the way in, and since the rest is one factor
  for the whole vector, every sum is multiplied by it at the end.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..lowlevel_cuda.instructions import (
    address,
    await_all,
    await_all_but_3,
    close_copies,
    copy4,
    copy16,
    dot16,
    f32_of_bits,
    floats4,
    has_scales,
    let_successor_start,
    per_16_bytes,
    scale_in,
    scale_word,
    shared_word,
    shared_words4,
    store4,
    store_number,
    wait_for_predecessor,
)
from ..lowlevel_cuda.launch import Argument, Array, Gpu, Launch, Matrix
from ..registry import kernel
from .pieces import beyond, device, sigmoid_times, warp_sum, warp_sum2

WARPS, DEPTH = 8, 4
THREADS = 32 * WARPS
CHUNK_BYTES, SCALE_BYTES = 512, 128
"""Of a chunk of a row: 16 bytes a lane, and a word a lane with their scale. A stage has two chunks of each row."""
SCALES_AT = 2 * CHUNK_BYTES
"""Where a row's scales lie in a stage; a lane's are 12 bytes a lane nearer than its payload."""
LANE_STEP = 132
MATRIX = ("f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1", "q4_k", "q6_k")
"""Types of weights. The last three become float16 on their way to the device."""


LINEAR, GATE_UP, QKV = 0, 1, 2
"""What the two rows of a pair are: neighbours of one weight; the same row of two; or, in three, see `place`."""


@device
def row_bytes(payload):
    """Bytes of one row of a stage of a warp's ring: two chunks, and for each a word a lane with its scale."""
    return 2 * (CHUNK_BYTES + SCALE_BYTES) if has_scales(payload) else 2 * CHUNK_BYTES


@device
def split(number, divisor, log2):
    """(quotient, remainder); `log2` of the divisor is -1 where it has none: a division costs a hundred instructions."""
    quotient = number >> log2 if log2 >= 0 else number // divisor
    return quotient, number - quotient * divisor


@device
def place(mode, pair, rows):
    """(weight, row of a, row of b) of a pair; `rows` says how rows make pairs (`stream`)."""
    _, q_pairs, k_pairs, half, log2_half = rows
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
            head, _ = split(inside, half, log2_half)
            a = inside + head * half
            b = a + half
    return weight, a, b


@device
def source_of(mode, pair, rows, weights, scales):
    """Addresses of the two rows of a pair, and of the words with their first scales."""
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
        base + a * stride, base_b + b * stride, scale_word(of_scales, a * scale_stride),
        scale_word(of_scales_b, b * scale_stride),
    )  # fmt: skip


@device
def fetch(slot, source, scales, inside, next_inside, payload, scale_step, lane):
    """Start copying a lane's 16 bytes of two neighbouring chunks of a row, and the words with their scales."""
    copy16(slot, source, 16 if inside else 0)
    copy16(slot + CHUNK_BYTES, source + CHUNK_BYTES if next_inside else source, 16 if next_inside else 0)
    if has_scales(payload):
        at = slot + SCALES_AT - 12 * lane
        copy4(at, scales, 4 if inside else 0)
        copy4(at + SCALE_BYTES, scales + scale_step if next_inside else scales, 4 if next_inside else 0)


@device
def multiply(slot, payload, scales, odd, shared, x_at, lane):
    """The lane's part of a row's sum over two chunks that have arrived."""
    step = per_16_bytes(payload) // 4 * LANE_STEP
    first = dot16(payload, shared_words4(slot), shared, x_at, LANE_STEP)
    second = dot16(payload, shared_words4(slot + CHUNK_BYTES), shared, x_at + step, LANE_STEP)
    if has_scales(payload):
        at = slot + SCALES_AT - 12 * lane
        first *= scale_in(scales, shared_word(at), odd)
        second *= scale_in(scales, shared_word(at + SCALE_BYTES), odd)
    return first + second


@device
def stage_x(x, start, norm, normed, columns, payload, shared, x_at, sums_at):
    """x into shared memory in lane order, times the norm's weight; each warp leaves its sum of squares at `sums_at`.

    Zeros fill the last pair of chunks.
    """
    numbers = per_16_bytes(payload)
    width = 64 * numbers
    padded = (columns + width - 1) & -width
    squares = np.float32(0)
    if columns & 3 == 0:
        for first in range(4 * cuda.threadIdx.x, padded, 16 * THREADS):
            # all loads are under way at once: the memory answers after half a microsecond
            limit = columns if normed else 0
            n0, n1 = floats4_or_0(norm, 0, first, limit), floats4_or_0(norm, 0, first + 4 * THREADS, limit)
            n2 = floats4_or_0(norm, 0, first + 8 * THREADS, limit)
            n3 = floats4_or_0(norm, 0, first + 12 * THREADS, limit)
            x0, x1 = floats4_or_0(x, start, first, columns), floats4_or_0(x, start, first + 4 * THREADS, columns)
            x2 = floats4_or_0(x, start, first + 8 * THREADS, columns)
            x3 = floats4_or_0(x, start, first + 12 * THREADS, columns)
            if normed:
                squares += squared(x0) + squared(x1) + squared(x2) + squared(x3)
                x0, x1, x2, x3 = times4(x0, n0), times4(x1, n1), times4(x2, n2), times4(x3, n3)
            put4(shared, x_at, first, padded, numbers, x0)
            put4(shared, x_at, first + 4 * THREADS, padded, numbers, x1)
            put4(shared, x_at, first + 8 * THREADS, padded, numbers, x2)
            put4(shared, x_at, first + 12 * THREADS, padded, numbers, x3)
    else:
        for k in range(cuda.threadIdx.x, padded, THREADS):
            value = np.float32(0)
            if k < columns:
                value = x[start + k]
                squares += value * value
                if normed:
                    value *= norm[k]
            shared[x_at + lane_order(k, numbers)] = value * nibble_factor(k, numbers)
    if normed:
        squares = warp_sum(squares)
        if cuda.threadIdx.x & 31 == 0:
            shared[sums_at + (cuda.threadIdx.x >> 5)] = squares


@device
def lane_order(k, numbers):
    """Where number k of x lies in shared memory; `numbers` is a power of two."""
    log2 = 2 if numbers == 4 else (3 if numbers == 8 else (4 if numbers == 16 else 5))
    chunk, inside = k >> (5 + log2), k & (32 * numbers - 1)
    i = inside & (numbers - 1)
    return (chunk << (log2 - 2)) * LANE_STEP + (i >> 2) * LANE_STEP + (inside >> log2) * 4 + (i & 3)


@device
def floats4_or_0(x, start, k, columns):
    """x[start + k : … + 4], zeros beyond `columns`."""
    zero = np.float32(0)
    numbers = (zero, zero, zero, zero)
    if k < columns:
        numbers = floats4(x, start + k)
    return numbers


@device
def squared(v):
    """The sum of the squares of four numbers."""
    return (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3])


@device
def times4(v, w):
    """Four products."""
    return v[0] * w[0], v[1] * w[1], v[2] * w[2], v[3] * w[3]


@device
def put4(shared, x_at, k, padded, numbers, v):
    """Four numbers from k on into their place."""
    if k < padded:
        store4(
            shared, x_at + lane_order(k, numbers), v[0] * nibble_factor(k, numbers),
            v[1] * nibble_factor(k + 1, numbers), v[2] * nibble_factor(k + 2, numbers),
            v[3] * nibble_factor(k + 3, numbers),
        )  # fmt: skip


@device
def nibble_factor(k, numbers):
    """What `dot16` wants numbers of x multiplied by: 1, but for 4-bit weights, which it takes where they lie in a word,
    as multiples of 1, 16, … 65536.
    """
    nibble = 2 * (k & 3) + ((k >> 4) & 1)
    inside = nibble - 5 if nibble >= 5 else nibble
    return f32_of_bits(np.uint32((127 - 4 * inside) << 23)) if numbers == 32 else np.float32(1)


@device
def norm_factor(shared, sums_at, normed, columns, eps):
    """1 / sqrt(mean(x²) + eps), from what `stage_x` left (Zhang and Sennrich, RMSNorm, 2019); 1 without a norm."""
    factor = np.float32(1)
    if normed:
        squares = np.float32(0)
        for i in range(WARPS):
            squares += shared[sums_at + i]
        factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(columns) + eps))
    return factor


@device
def pairs_of_block(pairs):
    """How many pairs are this block's: those with numbers blockIdx.x + local · gridDim.x."""
    return (pairs - cuda.blockIdx.x + cuda.gridDim.x - 1) // cuda.gridDim.x


@device
def produce(mode, cursor, turn, own, shape, payload, rows, weights, scales, scale_bytes, scale_step):
    """Start copying the stage that the cursor stands at, if there is one; returns the cursor moved on to the next."""
    to_fetch, next_chunk, a, b, a_scales, b_scales = cursor
    ring, lane, piece, slices, groups = own
    mine, columns, chunks = shape
    numbers, row_slot = per_16_bytes(payload), row_bytes(payload)
    if to_fetch < mine:
        slot = ring + (turn & (DEPTH - 1)) * 2 * row_slot
        k = (next_chunk * 32 + lane) * numbers
        inside, next_inside = k < columns, k + 32 * numbers < columns
        bytes_on = next_chunk * CHUNK_BYTES + lane * 16 if inside else 0
        scales_on = next_chunk * scale_step + scale_bytes if inside else 0
        fetch(slot, a + bytes_on, a_scales + scales_on, inside, next_inside, payload, scale_step, lane)
        fetch(slot + row_slot, b + bytes_on, b_scales + scales_on, inside, next_inside, payload, scale_step, lane)
        next_chunk += 2 * slices
        if next_chunk >= chunks:
            next_chunk = 2 * piece
            to_fetch += groups
            pair = cuda.blockIdx.x + min(to_fetch, mine - 1) * cuda.gridDim.x
            a, b, a_scales, b_scales = source_of(mode, pair, rows, weights, scales)
    close_copies()
    return to_fetch, next_chunk, a, b, a_scales, b_scales


@device
def stream(mode, pairs, rows, x, start, norm, normed, payload, weights, scales, shift, columns, layout, shared, early,
           first, second, wanted):  # fmt: skip
    """All sums of this block's pairs, in slices, into shared memory; ends behind a barrier.

    Returns early[first] and early[second], if `wanted`, loaded as soon as may be: what the thread needs at the end.

    `rows` is (last row of a LINEAR weight, which stands in for one too many; pairs of queries; pairs of keys; half; its
    logarithm): with `half` not 0, row i of queries and keys goes with row i + half of its head. `weights` and `scales`
    are three addresses, or pointers, and the distance of two rows. `layout` is what `_shape` says.
    """
    slices, log2_slices, x_at, sums_at, partial_at = layout
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    mine, numbers, row_slot = pairs_of_block(pairs), per_16_bytes(payload), row_bytes(payload)
    chunks = (columns + 32 * numbers - 1) // (32 * numbers)
    shape = mine, columns, chunks
    groups, piece = WARPS >> log2_slices, warp & (slices - 1)
    ring = address(shared, 0) + warp * DEPTH * 2 * row_slot + lane * 16
    own = ring, lane, piece, slices, groups
    # the scale of the lane's numbers, counted from its chunk's first; rows of float16 scales begin at a whole word
    scale = (lane * numbers) >> shift
    odd = scale & 1
    scale_bytes = scale_word(scales[0], scale) - scale_word(scales[0], 0)
    scale_step = scale_word(scales[0], (32 * numbers) >> shift) - scale_word(scales[0], 0)

    local, chunk = warp >> log2_slices, 2 * piece
    pair = cuda.blockIdx.x + min(local, mine - 1) * cuda.gridDim.x
    a, b, a_scales, b_scales = source_of(mode, pair, rows, weights, scales)
    cursor = local, chunk, a, b, a_scales, b_scales
    for turn in range(DEPTH - 1):
        cursor = produce(mode, cursor, turn, own, shape, payload, rows, weights, scales, scale_bytes, scale_step)
    wait_for_predecessor()
    let_successor_start()
    held, held_too = np.float32(0), np.float32(0)
    if wanted:
        held, held_too = early[first], early[second]
    stage_x(x, start, norm, normed, columns, payload, shared, x_at, sums_at)
    cuda.syncthreads()

    sum_a, sum_b = np.float32(0), np.float32(0)
    x_chunk, x_lane, turn = numbers // 4 * LANE_STEP, x_at + lane * 4, DEPTH - 1
    while local < mine:
        cursor = produce(mode, cursor, turn, own, shape, payload, rows, weights, scales, scale_bytes, scale_step)
        turn += 1
        await_all_but_3()
        slot = ring + (turn & (DEPTH - 1)) * 2 * row_slot
        if chunk < chunks:
            sum_a += multiply(slot, payload, scales[0], odd, shared, x_lane + chunk * x_chunk, lane)
            sum_b += multiply(slot + row_slot, payload, scales[0], odd, shared, x_lane + chunk * x_chunk, lane)
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
def combined(shared, partial_at, local, slices, which):
    """The sum of a row's slices: row `which` of the block's pair `local`."""
    total = np.float32(0)
    for i in range(slices):
        total += shared[partial_at + (local * slices + i) * 2 + which]
    return total


@cuda.jit
def linear_kernel(tokens, x, norm, normed, eps, weight, stride, scales, scale_stride, shift, residual, added, out,
                  rows, columns, slices, log2_slices, x_at, sums_at, partial_at):  # fmt: skip
    """out = W · x, or W · norm(x), plus `residual` if `added`."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, pairs, base = cuda.blockIdx.y, (rows + 1) // 2, address(weight, 0)
    layout = slices, log2_slices, x_at, sums_at, partial_at
    mine = t * rows + 2 * (cuda.blockIdx.x + (cuda.threadIdx.x >> 1) * cuda.gridDim.x) + (cuda.threadIdx.x & 1)
    wanted = added and mine < (t + 1) * rows
    held, _ = stream(LINEAR, pairs, (rows - 1, 0, 0, 0, 0), x, t * columns, norm, normed, weight,
                     (base, base, base, stride), (scales, scales, scales, scale_stride), shift, columns, layout, shared,
                     residual, mine, mine, wanted)  # fmt: skip
    factor = norm_factor(shared, sums_at, normed, columns, eps)
    for i in range(cuda.threadIdx.x, 2 * pairs_of_block(pairs), THREADS):
        row = 2 * (cuda.blockIdx.x + (i >> 1) * cuda.gridDim.x) + (i & 1)
        if row < rows:
            value = combined(shared, partial_at, i >> 1, slices, i & 1) * factor
            if added:
                value += held if i < THREADS else residual[t * rows + row]
            out[t * rows + row] = value


@cuda.jit
def gate_up_kernel(tokens, x, norm, normed, eps, w1, w3, stride, s1, s3, scale_stride, shift, out, rows, columns,
                   slices, log2_slices, x_at, sums_at, partial_at):  # fmt: skip
    """out = silu(W1 · x) · (W3 · x), of x or of norm(x)."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, a, b = cuda.blockIdx.y, address(w1, 0), address(w3, 0)
    layout = slices, log2_slices, x_at, sums_at, partial_at
    stream(GATE_UP, rows, (0, 0, 0, 0, 0), x, t * columns, norm, normed, w1, (a, b, b, stride),
           (s1, s3, s3, scale_stride), shift, columns, layout, shared, x, 0, 0, False)  # fmt: skip
    factor = norm_factor(shared, sums_at, normed, columns, eps)
    for local in range(cuda.threadIdx.x, pairs_of_block(rows), THREADS):
        gate = combined(shared, partial_at, local, slices, 0) * factor
        up = combined(shared, partial_at, local, slices, 1) * factor
        out[t * rows + cuda.blockIdx.x + local * cuda.gridDim.x] = sigmoid_times(gate, up)


@cuda.jit
def qkv_kernel(tokens, x, norm, normed, eps, wq, wk, wv, stride, sq, sk, sv, scale_stride, shift, q, k, v, q_rows,
               kv_rows, columns, slices, log2_slices, x_at, sums_at, partial_at):  # fmt: skip
    """q, k and v = Wq · x, Wk · x, Wv · x, of x or of norm(x). Numbers of rows are even, as heads are."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, pairs, q_pairs, k_pairs = cuda.blockIdx.y, q_rows // 2 + kv_rows, q_rows // 2, kv_rows // 2
    layout, of_rows = (slices, log2_slices, x_at, sums_at, partial_at), (0, q_pairs, k_pairs, 0, 0)
    weights = (address(wq, 0), address(wk, 0), address(wv, 0), stride)
    stream(QKV, pairs, of_rows, x, t * columns, norm, normed, wq, weights,
           (sq, sk, sv, scale_stride), shift, columns, layout, shared, x, 0, 0, False)  # fmt: skip
    factor = norm_factor(shared, sums_at, normed, columns, eps)
    for i in range(cuda.threadIdx.x, 2 * pairs_of_block(pairs), THREADS):
        pair = cuda.blockIdx.x + (i >> 1) * cuda.gridDim.x
        section, a, b = place(QKV, pair, of_rows)
        row = b if i & 1 else a
        value = combined(shared, partial_at, i >> 1, slices, i & 1) * factor
        if section == 0:
            q[t * q_rows + row] = value
        elif section == 1:
            k[t * kv_rows + row] = value
        else:
            v[t * kv_rows + row] = value


@device
def turning(local, pairs, of_rows, head_dim, interleaved):
    """Which of a token's angles turns the block's pair `local`; 0 for a pair that it does not have."""
    pair = cuda.blockIdx.x + local * cuda.gridDim.x
    _, row, _ = place(QKV, min(pair, pairs - 1), of_rows)
    d = row - row // head_dim * head_dim
    return d >> 1 if interleaved else min(d, head_dim // 2 - 1)


@cuda.jit
def qkv_rope_kernel(tokens, x, norm, normed, eps, wq, wk, wv, stride, sq, sk, sv, scale_stride, shift, angles,
                    positions, sequences, q, k_cache, v_cache, q_rows, kv_rows, head_dim, interleaved, context,
                    log2_half, columns, slices, log2_slices, x_at, sums_at, partial_at):  # fmt: skip
    """Queries, turned by RoPE, into q; keys, turned, and values into the cache, at the token's position."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, pairs, q_pairs, k_pairs = cuda.blockIdx.y, q_rows // 2 + kv_rows, q_rows // 2, kv_rows // 2
    half = 0 if interleaved else head_dim // 2
    layout, of_rows = (slices, log2_slices, x_at, sums_at, partial_at), (0, q_pairs, k_pairs, half, log2_half)
    position, sequence, kv_heads = positions[t], sequences[t], kv_rows // head_dim
    angle = turning(cuda.threadIdx.x, pairs, of_rows, head_dim, interleaved) + t * head_dim
    cos, sin = stream(
        QKV, pairs, of_rows, x, t * columns, norm, normed, wq, (address(wq, 0), address(wk, 0), address(wv, 0), stride),
        (sq, sk, sv, scale_stride), shift, columns, layout, shared, angles, angle, angle + head_dim // 2, True,
    )  # fmt: skip
    factor = norm_factor(shared, sums_at, normed, columns, eps)
    for i in range(cuda.threadIdx.x, pairs_of_block(pairs), THREADS):
        section, row, _ = place(QKV, cuda.blockIdx.x + i * cuda.gridDim.x, of_rows)
        a = combined(shared, partial_at, i, slices, 0) * factor
        b = combined(shared, partial_at, i, slices, 1) * factor
        head = row // head_dim
        d = row - head * head_dim
        apart = half if half > 0 and section < 2 else 1
        if section < 2:
            if i >= THREADS:
                angle = turning(i, pairs, of_rows, head_dim, interleaved) + t * head_dim
                cos, sin = angles[angle], angles[angle + head_dim // 2]
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


# How they are launched


def _shape(gpu: Gpu, weight: Matrix, pairs: int, tokens: int) -> tuple[tuple[int, int], tuple[int, ...], int]:
    """Grid, the last arguments (slices to partial_at) and the bytes of shared memory of a `stream`."""
    numbers = {"f32": 4, "f16": 8, "bf16": 8, "int8": 16, "q4_0": 32}[weight.payload.dtype]
    chunks = -(-weight.shape[1] // (32 * numbers))
    blocks = min(gpu.processors, pairs)
    mine = -(-pairs // blocks)
    # a stage's time for each stage of the busiest warp, and half of one for each pair's sums to meet
    slices = min((1, 2, 4, 8), key=lambda n: -(-mine // (WARPS // n)) * (-(-chunks // (2 * n)) + 0.5))
    ring = WARPS * DEPTH * 4 * (CHUNK_BYTES + (SCALE_BYTES if weight.quantized else 0)) // 4
    sums = ring + (chunks + 1) * (numbers // 4) * LANE_STEP
    partial = sums + WARPS
    places = slices, slices.bit_length() - 1, ring, sums, partial
    return (blocks, tokens), places, 4 * (partial + 2 * mine * slices)


def _launch_linear(
    gpu: Gpu, x: Array, norm: Array | None, eps: float, weight: Matrix, residual: Array | None, out: Array
) -> list[Launch]:
    rows, columns = weight.shape
    grid, places, shared = _shape(gpu, weight, -(-rows // 2), x.shape[0])
    arguments: tuple[Argument, ...] = (
        gpu.tokens, x, norm or x, int(norm is not None), eps, weight.payload, weight.stride, weight.scales,
        weight.scale_stride, weight.shift, residual or x, int(residual is not None), out, rows, columns, *places,
    )  # fmt: skip
    return [Launch(linear_kernel, grid, THREADS, arguments, shared)]


@kernel("linear", "cuda", "f32", MATRIX)
def linear(gpu: Gpu, x: Array, weight: Matrix, out: Array) -> list[Launch]:
    return _launch_linear(gpu, x, None, 0.0, weight, None, out)


@kernel("linear_add", "cuda", "f32", MATRIX, "f32")
def linear_add(gpu: Gpu, x: Array, weight: Matrix, residual: Array, out: Array) -> list[Launch]:
    return _launch_linear(gpu, x, None, 0.0, weight, residual, out)


@kernel("norm_linear", "cuda", "f32", "f32", MATRIX)
def norm_linear(gpu: Gpu, x: Array, norm: Array, weight: Matrix, out: Array, eps: float) -> list[Launch]:
    return _launch_linear(gpu, x, norm, eps, weight, None, out)


def _launch_gate_up(
    gpu: Gpu, x: Array, norm: Array | None, eps: float, w1: Matrix, w3: Matrix, out: Array
) -> list[Launch]:
    rows, columns = w1.shape
    grid, places, shared = _shape(gpu, w1, rows, x.shape[0])
    arguments: tuple[Argument, ...] = (
        gpu.tokens, x, norm or x, int(norm is not None), eps, w1.payload, w3.payload, w1.stride, w1.scales, w3.scales,
        w1.scale_stride, w1.shift, out, rows, columns, *places,
    )  # fmt: skip
    return [Launch(gate_up_kernel, grid, THREADS, arguments, shared)]


def gate_up(gpu: Gpu, x: Array, w1: Matrix, w3: Matrix, out: Array) -> list[Launch]:
    return _launch_gate_up(gpu, x, None, 0.0, w1, w3, out)


def norm_gate_up(gpu: Gpu, x: Array, norm: Array, w1: Matrix, w3: Matrix, out: Array, eps: float) -> list[Launch]:
    return _launch_gate_up(gpu, x, norm, eps, w1, w3, out)


def _qkv_operands(gpu: Gpu, x: Array, norm: Array | None, eps: float, weights: tuple[Matrix, Matrix, Matrix]):  # type: ignore[no-untyped-def]
    wq, wk, _ = weights
    pairs = (wq.shape[0] + 2 * wk.shape[0]) // 2
    grid, places, shared = _shape(gpu, wq, pairs, x.shape[0])
    arguments: tuple[Argument, ...] = (
        gpu.tokens, x, norm or x, int(norm is not None), eps, *(w.payload for w in weights), wq.stride,
        *(w.scales for w in weights), wq.scale_stride, wq.shift,
    )  # fmt: skip
    return grid, arguments, (wq.shape[1], *places), shared


def _launch_qkv(
    gpu: Gpu, x: Array, norm: Array | None, eps: float, weights: tuple[Matrix, Matrix, Matrix], *out: Array
) -> list[Launch]:
    grid, first, rest, shared = _qkv_operands(gpu, x, norm, eps, weights)
    rows = weights[0].shape[0], weights[1].shape[0]
    return [Launch(qkv_kernel, grid, THREADS, (*first, *out, *rows, *rest), shared)]


def qkv(gpu: Gpu, x: Array, wq: Matrix, wk: Matrix, wv: Matrix, q: Array, k: Array, v: Array) -> list[Launch]:
    return _launch_qkv(gpu, x, None, 0.0, (wq, wk, wv), q, k, v)


def norm_qkv(
    gpu: Gpu, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, q: Array, k: Array, v: Array, eps: float
) -> list[Launch]:
    return _launch_qkv(gpu, x, norm, eps, (wq, wk, wv), q, k, v)


def norm_qkv_rope(
    gpu: Gpu, x: Array, norm: Array, wq: Matrix, wk: Matrix, wv: Matrix, angles: Array, k_cache: Array,
    positions: Array, sequences: Array, v_cache: Array, out: Array, eps: float, head_dim: int, interleaved: int,
) -> list[Launch]:  # fmt: skip
    grid, first, rest, shared = _qkv_operands(gpu, x, norm, eps, (wq, wk, wv))
    middle = (angles, positions, sequences, out, k_cache, v_cache, wq.shape[0], wk.shape[0], head_dim, interleaved)
    half = head_dim // 2
    log2_half = -1 if half & (half - 1) else half.bit_length() - 1
    return [Launch(qkv_rope_kernel, grid, THREADS, (*first, *middle, k_cache.shape[2], log2_half, *rest), shared)]


CACHE = ("f32", "f16", "bf16")
for _type in MATRIX:  # one kernel streams weights of one type: where a model mixes them, the fusion is left out
    kernel("gate_up", "cuda", "f32", _type, _type)(gate_up)
    kernel("norm_gate_up", "cuda", "f32", "f32", _type, _type)(norm_gate_up)
    kernel("qkv", "cuda", "f32", _type, _type, _type)(qkv)
    kernel("norm_qkv", "cuda", "f32", "f32", _type, _type, _type)(norm_qkv)
    for _cache in CACHE:
        kernel("norm_qkv_rope", "cuda", "f32", "f32", _type, _type, _type, "f32", _cache, "i32", "i32", _cache)(
            norm_qkv_rope
        )
