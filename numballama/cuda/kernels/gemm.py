"""Kernels of linear layers for many tokens: Y[T, N] = X[T, K] · W[N, K]ᵀ on tensor cores, sums in float32.

Tensor cores take 16-bit operands:

- X becomes bfloat16 where W is, else float16, in a pass of its own that also does RMSNorm. Each row is multiplied by a
  power of two that brings its largest number to [2^14, 2^15), and its results are divided by it again, exactly.
- Quantised weights are expanded to float16 in scratch first: a few hundred MB of traffic against some 10^11
  operations. float32 weights stay float32 and are multiplied without tensor cores.
- A block of four warps computes 128 tokens × 128 columns, 64 × 64 a warp: each lane holds 128 sums. 64 columns of X and
  W at a time come into a ring of `stages` in shared memory, copied behind the threads' backs; a lane's fragments of the
  next 16 columns are loaded while the last 16 are multiplied. A warp's 64 × 64 × 16 products take 51 cycles at the rate
  of `mma.sync`, and its fragments 32 cycles of shared memory: smaller tiles of a warp would wait for shared memory.
- At the end the sums go through shared memory in two halves, where each operator finishes them in its own way: a
  residual; SwiGLU, whose block computes 64 columns of each of its two weights; RoPE and the writes to the KV cache.

Tokens that are not part of the run cost nothing beyond their tile: rows of X that it lacks are zeros.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..intrinsics import (
    address,
    await_all,
    await_all_but_1,
    await_all_but_2,
    await_all_but_3,
    bits_of_f32,
    close_copies,
    copy16,
    f32_of_bits,
    floats4,
    is_packed,
    let_successor_start,
    per_16_bytes,
    scale_in,
    scale_word,
    shared_address,
    store4,
    store_number,
    wait_for_predecessor,
    word,
    words4,
)
from ..mma import (
    add_products,
    expand16,
    expand_packed,
    load_fragments,
    multiply_fragments,
    pack2,
    put_block,
    put_sums,
    put_words2,
    zeros32,
    zeros128,
)
from .common import ALL, at_once, block_sum, device, sigmoid_times
from .dequant import block_at
from .dot import floats4_or_0, squared, times4
from .params import GEMM_F32_K_STEP as F32_STEP
from .params import GEMM_F32_W_STRIDE as W_ROW
from .params import GEMM_F32_X_STRIDE as X_ROW
from .params import GEMM_K_STEP as STEP
from .params import GEMM_STAGED_BYTES as STAGED_BYTES
from .params import GEMM_THREADS as THREADS
from .params import GEMM_TILE as TILE
from .params import GEMM_TILE_BYTES as TILE_BYTES

STAGED = STAGED_BYTES // 4


# X in 16 bits


@cuda.jit
def round_kernel(tokens, x, norm, normed, eps, out, scales, columns, padded):
    """A row of x, or of norm(x), in 16 bits, times a power of two whose inverse goes to `scales`; zeros fill it up."""
    t = cuda.blockIdx.x
    if t >= tokens[0]:
        return
    wait_for_predecessor()
    let_successor_start()
    scratch = cuda.shared.array(32, np.float32)
    most = cuda.shared.array(32, np.int32)
    row, width = t * columns, cuda.blockDim.x
    even = columns & 3 == 0
    squares, largest = np.float32(0), np.int32(0)  # magnitudes as bits: in order, every NaN above infinity
    for k in range(4 * cuda.threadIdx.x, padded, 4 * width):
        v = four_of(x, row, k, columns, even)
        squares += squared(v)
        if normed:
            v = times4(v, four_of(norm, 0, k, columns, even))
        largest = max(largest, magnitude(v[0]), magnitude(v[1]), magnitude(v[2]), magnitude(v[3]))
    for i in range(5):
        largest = max(largest, np.int32(cuda.shfl_xor_sync(ALL, largest, 16 >> i)))
    if cuda.threadIdx.x & 31 == 0:
        most[cuda.threadIdx.x >> 5] = largest
    squares = block_sum(squares, scratch)
    for i in range(width >> 5):
        largest = max(largest, most[i])
    factor = np.float32(1)
    if normed:
        factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(columns) + eps))
        # rounding keeps the order, so the largest of the products is the product of the largest
        largest = magnitude(f32_of_bits(np.uint32(largest)) * factor)
    shift = 0
    if largest < 0x7F800000:  # else an infinity or a NaN, which must show in the results
        shift = min(14 - ((largest >> 23) - 127), 126)
    up, down = f32_of_bits(np.uint32((127 + shift) << 23)), f32_of_bits(np.uint32((127 - shift) << 23))
    if cuda.threadIdx.x == 0:
        scales[t] = down
    for k in range(4 * cuda.threadIdx.x, padded, 4 * width):
        v = four_of(x, row, k, columns, even)
        if normed:
            w = four_of(norm, 0, k, columns, even)
            v = times4((v[0] * factor, v[1] * factor, v[2] * factor, v[3] * factor), w)
        put_words2(address(out, t * padded + k), pack2(out, v[0] * up, v[1] * up), pack2(out, v[2] * up, v[3] * up))


@device
def magnitude(x):
    """The bits of |x|, as an int32."""
    return np.int32(bits_of_f32(x) & np.uint32(0x7FFFFFFF))


@device
def four_of(x, start, k, columns, even):
    """x[start + k : … + 4], zeros beyond `columns`; `even` if rows are whole fours."""
    zero = np.float32(0)
    if even:
        return floats4_or_0(x, start, k, columns)
    return (
        x[start + k] if k < columns else zero, x[start + k + 1] if k + 1 < columns else zero,
        x[start + k + 2] if k + 2 < columns else zero, x[start + k + 3] if k + 3 < columns else zero,
    )  # fmt: skip


# Weights in float16


@cuda.jit
def expand_kernel(weight, stride, scales, scale_stride, shift, out, first, columns):
    """Rows of a quantised weight, from `first` on, as float16: number times scale, rounded once. A block a row."""
    wait_for_predecessor()
    let_successor_start()
    numbers = per_16_bytes(weight)
    row = first + cuda.blockIdx.x
    base, to = address(weight, 0) + row * stride, address(out, cuda.blockIdx.x * columns)
    if is_packed(weight):
        for block in range(cuda.threadIdx.x, columns >> 5, cuda.blockDim.x):
            high, high_too, scale, scale_too, least = block_at(weight, address(scales, row * scale_stride), block)
            expand_packed(weight, words4(base + 16 * block), high, high_too, scale, scale_too, least, to + 64 * block)
        return
    for chunk in range(cuda.threadIdx.x, columns // numbers, cuda.blockDim.x):
        at = row * scale_stride + ((chunk * numbers) >> shift)
        scale = scale_in(scales, word(scale_word(scales, at)), at)
        expand16(weight, words4(base + 16 * chunk), scale, to + 2 * numbers * chunk)


# Tiles on tensor cores


@device
def rows_there(here, most):
    """Bits of a thread's rows, 16 apart, at most `most`, that are there; its first is `here` before the end."""
    return (1 << max(0, min((here + 15) >> 4, most))) - 1


@device
def fetch_rows(to, source, step, rows, which, inside):
    """Start copying 16 bytes each of two rows that are 16 apart, the first of which has bit `which` in `rows`."""
    copy16(to, source, 16 if inside and rows & which else 0)
    copy16(to + 16 * 128, source + step, 16 if inside and rows & (2 * which) else 0)


@device
def await_stage(stages):
    """Wait until all but the last `stages` - 2 stages that this thread began to copy are there."""
    if stages == 3:
        await_all_but_1()
    elif stages == 4:
        await_all_but_2()
    elif stages == 5:
        await_all_but_3()
    else:
        await_all()


@device
def multiply(weight, x_at, x_bytes, x_rows, a_at, a_rows, b_at, b_rows, stride, columns, stages, early, base, sums):
    """The sums of a tile of 128 tokens from address `x_at` on and of 64 rows of W from `a_at`, then 64 from `b_at`.

    Of each there are as many as the numbers of rows say, at most; the others count as zeros. `early` if the predecessor
    does not write W. Shared memory from `base` on is the ring; a stage is X's tile, then W's.
    """
    thread = cuda.threadIdx.x
    lane, warp = thread & 31, thread >> 5
    row, chunk = thread >> 3, thread & 7
    to = base + row * 128 + ((chunk ^ (row & 7)) << 4)
    x_from, x_step = x_at + row * x_bytes + chunk * 16, 16 * x_bytes
    a_from, b_from, w_step = a_at + row * stride + chunk * 16, b_at + row * stride + chunk * 16, 16 * stride
    rows = rows_there(x_rows - row, 8) | rows_there(a_rows - row, 4) << 8 | rows_there(b_rows - row, 4) << 12
    k_here = columns - 8 * chunk
    steps = (columns + STEP - 1) // STEP
    if not early:
        wait_for_predecessor()
    for s in range(stages - 1):
        slot, on, inside = to + s * 2 * TILE_BYTES + TILE_BYTES, s * 2 * STEP, s * STEP < k_here
        fetch_rows(slot, a_from + on, w_step, rows, 256, inside)
        fetch_rows(slot + 4096, a_from + on + 2 * w_step, w_step, rows, 1024, inside)
        fetch_rows(slot + 8192, b_from + on, w_step, rows, 4096, inside)
        fetch_rows(slot + 12288, b_from + on + 2 * w_step, w_step, rows, 16384, inside)
    wait_for_predecessor()
    let_successor_start()
    for s in range(stages - 1):
        slot, on, inside = to + s * 2 * TILE_BYTES, s * 2 * STEP, s < steps
        fetch_rows(slot, x_from + on, x_step, rows, 1, inside)
        fetch_rows(slot + 4096, x_from + on + 2 * x_step, x_step, rows, 4, inside)
        fetch_rows(slot + 8192, x_from + on + 4 * x_step, x_step, rows, 16, inside)
        fetch_rows(slot + 12288, x_from + on + 6 * x_step, x_step, rows, 64, inside)
        close_copies()
    await_stage(stages)
    cuda.syncthreads()

    x_row, w_row = (warp & 1) * 64 + (lane & 15), (warp >> 1) * 64 + (lane & 7) + ((lane >> 4) << 3)
    x_lane = base + x_row * 128 + (((lane >> 4) ^ (lane & 7)) << 4)
    w_lane = base + TILE_BYTES + w_row * 128 + ((((lane >> 3) & 1) ^ (lane & 7)) << 4)
    x, w = x_lane, w_lane
    words = load_fragments(sums, x, w)
    reading, writing = 0, stages - 1
    for step in range(steps):
        ahead = step + stages - 1
        slot, on, inside, x_inside = (
            to + writing * 2 * TILE_BYTES,
            ahead * 2 * STEP,
            ahead * STEP < k_here,
            ahead < steps,
        )
        fetch_rows(slot, x_from + on, x_step, rows, 1, x_inside)
        fetch_rows(slot + TILE_BYTES, a_from + on, w_step, rows, 256, inside)
        others = load_fragments(sums, x ^ 32, w ^ 32)
        sums = multiply_fragments(weight, sums, words)
        fetch_rows(slot + 4096, x_from + on + 2 * x_step, x_step, rows, 4, x_inside)
        fetch_rows(slot + TILE_BYTES + 4096, a_from + on + 2 * w_step, w_step, rows, 1024, inside)
        words = load_fragments(sums, x ^ 64, w ^ 64)
        sums = multiply_fragments(weight, sums, others)
        fetch_rows(slot + 8192, x_from + on + 4 * x_step, x_step, rows, 16, x_inside)
        fetch_rows(slot + TILE_BYTES + 8192, b_from + on, w_step, rows, 4096, inside)
        others = load_fragments(sums, x ^ 96, w ^ 96)
        sums = multiply_fragments(weight, sums, words)
        fetch_rows(slot + 12288, x_from + on + 6 * x_step, x_step, rows, 64, x_inside)
        fetch_rows(slot + TILE_BYTES + 12288, b_from + on + 2 * w_step, w_step, rows, 16384, inside)
        close_copies()
        await_stage(stages)
        cuda.syncthreads()  # the next stage is there, and all have taken what they need of this one
        reading = reading + 1 if reading + 1 < stages else 0
        writing = writing + 1 if writing + 1 < stages else 0
        x, w = x_lane + reading * 2 * TILE_BYTES, w_lane + reading * 2 * TILE_BYTES
        words = load_fragments(sums, x, w)
        sums = multiply_fragments(weight, sums, others)
    await_all()
    return sums


@device
def stage_half(half, sums, base):
    """Sums of 64 of the tile's tokens into shared memory: number c of token r at r · STAGED + c."""
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    cuda.syncthreads()
    if warp & 1 == half:
        put_sums(sums, base + (lane >> 2) * STAGED_BYTES + ((warp >> 1) * 64 + 2 * (lane & 3)) * 4)
    cuda.syncthreads()


@device
def finish_linear(shared, scales, scaled, residual, added, out, first_token, tokens, first_row, end, rows):
    """64 tokens × 128 columns of shared memory, times the tokens' scales and plus `residual`, to `out`."""
    column = (cuda.threadIdx.x & 31) * 4
    n = first_row + column
    for r in range(cuda.threadIdx.x >> 5, min(64, tokens - first_token), cuda.blockDim.x >> 5):
        t = first_token + r
        v = floats4(shared, r * STAGED + column)
        if scaled:
            scale = scales[t]
            v = v[0] * scale, v[1] * scale, v[2] * scale, v[3] * scale
        at = t * rows + n
        if rows & 3 == 0:
            if n < end:
                if added:
                    old = floats4(residual, at)
                    v = v[0] + old[0], v[1] + old[1], v[2] + old[2], v[3] + old[3]
                store4(out, at, v[0], v[1], v[2], v[3])
        else:
            put_number(out, at, v[0], residual, added, n < end)
            put_number(out, at + 1, v[1], residual, added, n + 1 < end)
            put_number(out, at + 2, v[2], residual, added, n + 2 < end)
            put_number(out, at + 3, v[3], residual, added, n + 3 < end)


@device
def put_number(out, at, value, residual, added, inside):
    """out[at] = value, plus the residual, if it is inside."""
    if inside:
        out[at] = value + residual[at] if added else value


@at_once(2)
@cuda.jit
def gemm_kernel(tokens, x, padded, scales, weight, stride, early, residual, added, out, begin, end, rows, columns,
                stages):  # fmt: skip
    """Columns from `begin` to `end` of out = x · Wᵀ, plus `residual` if `added`; `weight` starts with row `begin`.

    blockIdx.x counts tiles of tokens, blockIdx.y of columns.
    """
    first_token, first_row = cuda.blockIdx.x * TILE, begin + cuda.blockIdx.y * TILE
    if first_token >= tokens[0]:
        return
    shared = cuda.shared.array(0, np.float32)
    base, here = shared_address(shared, 0), end - first_row
    w_at = address(weight, 0) + (first_row - begin) * stride
    sums = multiply(weight, address(x, first_token * padded), 2 * padded, tokens[0] - first_token, w_at, here,
                    w_at + 64 * stride, here - 64, stride, columns, stages, early, base, zeros128())  # fmt: skip
    for half in range(2):
        stage_half(half, sums, base)
        finish_linear(shared, scales, True, residual, added, out, first_token + 64 * half, tokens[0], first_row, end,
                      rows)  # fmt: skip


@at_once(2)
@cuda.jit
def gemm_gate_up_kernel(tokens, x, padded, scales, w1, w3, stride, early, out, begin, end, rows, columns, stages):
    """Columns from `begin` to `end` of out = silu(x · W1ᵀ) · (x · W3ᵀ). A block computes 64 of both."""
    first_token, first_row = cuda.blockIdx.x * TILE, begin + cuda.blockIdx.y * 64
    if first_token >= tokens[0]:
        return
    shared = cuda.shared.array(0, np.float32)
    base, here, skipped = shared_address(shared, 0), end - first_row, (first_row - begin) * stride
    sums = multiply(w1, address(x, first_token * padded), 2 * padded, tokens[0] - first_token,
                    address(w1, 0) + skipped, here, address(w3, 0) + skipped, here, stride, columns, stages, early,
                    base,
                    zeros128())  # fmt: skip
    column = (cuda.threadIdx.x & 15) * 4
    n = first_row + column
    for half in range(2):
        stage_half(half, sums, base)
        first = first_token + 64 * half
        for r in range(cuda.threadIdx.x >> 4, min(64, tokens[0] - first), THREADS >> 4):
            scale = scales[first + r]
            gate, up = floats4(shared, r * STAGED + column), floats4(shared, r * STAGED + 64 + column)
            v0, v1 = sigmoid_times(gate[0] * scale, up[0] * scale), sigmoid_times(gate[1] * scale, up[1] * scale)
            v2, v3 = sigmoid_times(gate[2] * scale, up[2] * scale), sigmoid_times(gate[3] * scale, up[3] * scale)
            at = (first + r) * rows + n
            if rows & 3 == 0:
                if n < end:
                    store4(out, at, v0, v1, v2, v3)
            else:
                put_number(out, at, v0, out, False, n < end)
                put_number(out, at + 1, v1, out, False, n + 1 < end)
                put_number(out, at + 2, v2, out, False, n + 2 < end)
                put_number(out, at + 3, v3, out, False, n + 3 < end)


@at_once(2)
@cuda.jit
def gemm_qkv_rope_kernel(tokens, x, padded, scales, wq, wk, wv, stride, early, angles, positions, sequences, q, k_cache,
                         v_cache, q_rows, kv_rows, q_tiles, kv_tiles, heads_a_tile, kv_heads, head_dim, interleaved,
                         context, columns, stages):  # fmt: skip
    """Queries, turned by RoPE, into q; keys, turned, and values into the cache. A block has whole heads of one weight;
    a thread finishes one pair of numbers of every other token.
    """
    first_token, tile = cuda.blockIdx.x * TILE, cuda.blockIdx.y
    if first_token >= tokens[0]:
        return
    shared = cuda.shared.array(0, np.float32)
    base, width = shared_address(shared, 0), heads_a_tile * head_dim
    section, rows, w_at = 0, q_rows, address(wq, 0)
    if tile >= q_tiles + kv_tiles:
        section, rows, w_at = 2, kv_rows, address(wv, 0)
        tile -= q_tiles + kv_tiles
    elif tile >= q_tiles:
        section, rows, w_at = 1, kv_rows, address(wk, 0)
        tile -= q_tiles
    first_row = tile * width
    here = min(width, rows - first_row)
    w_at += first_row * stride
    sums = multiply(wq, address(x, first_token * padded), 2 * padded, tokens[0] - first_token, w_at, here,
                    w_at + 64 * stride, here - 64, stride, columns, stages, early, base, zeros128())  # fmt: skip

    half_dim, i, head = head_dim >> 1, cuda.threadIdx.x & 63, 0
    while i >= half_dim:  # a division of int64 would take longer
        i -= half_dim
        head += 1
    a = head * head_dim + (2 * i if interleaved else i)
    b = a + (1 if interleaved else half_dim)
    d = a - head * head_dim
    head += tile * heads_a_tile
    for half in range(2):
        stage_half(half, sums, base)
        first = first_token + 64 * half
        for r in range(cuda.threadIdx.x >> 6, min(64, tokens[0] - first), THREADS >> 6):
            if b < here:
                t = first + r
                scale = scales[t]
                u, v = shared[r * STAGED + a] * scale, shared[r * STAGED + b] * scale
                if section < 2:
                    cos, sin = angles[t * head_dim + i], angles[t * head_dim + half_dim + i]
                    u, v = u * cos - v * sin, u * sin + v * cos
                if section == 0:
                    q[t * q_rows + first_row + a], q[t * q_rows + first_row + b] = u, v
                else:
                    at = ((sequences[t] * kv_heads + head) * context + positions[t]) * head_dim + d
                    if section == 1:
                        store_number(k_cache, at, u)
                        store_number(k_cache, at + b - a, v)
                    else:
                        store_number(v_cache, at, u)
                        store_number(v_cache, at + b - a, v)


# float32


@device
def take(x, start, k, columns, even, inside):
    """`four_of` a row that is there, else zeros."""
    zero = np.float32(0)
    v = (zero, zero, zero, zero)
    if inside:
        v = four_of(x, start, k, columns, even)
    return v


@device
def turn(shared, at, distance, v):
    """Four numbers of a row to four rows."""
    shared[at], shared[at + distance] = v[0], v[1]
    shared[at + 2 * distance], shared[at + 3 * distance] = v[2], v[3]


@at_once(2)
@cuda.jit
def gemm_f32_kernel(tokens, x, weight, stride, residual, added, out, rows, columns):
    """out = x · Wᵀ, plus `residual` if `added`, in float32 throughout; `stride` counts numbers."""
    first_token, first_row = cuda.blockIdx.x * 64, cuda.blockIdx.y * TILE
    if first_token >= tokens[0]:
        return
    shared = cuda.shared.array(0, np.float32)
    thread, w_begin, even = cuda.threadIdx.x, F32_STEP * X_ROW, columns & 3 == 0
    # a thread brings four numbers of a row of X and of two rows of W; a warp's rows are neighbours
    x_row, x_k, w_row, w_k = thread & 63, (thread >> 6) * 4, thread & 127, (thread >> 7) * 4
    x_start, w_start = (first_token + x_row) * columns, (first_row + w_row) * stride
    x_here, w_here = first_token + x_row < tokens[0], first_row + w_row < rows
    a_at, b_at = (thread >> 5) * 8, w_begin + (thread & 31) * 4
    wait_for_predecessor()
    let_successor_start()
    v = take(x, x_start, x_k, columns, even, x_here)
    w = take(weight, w_start, w_k, columns, True, w_here)
    other = take(weight, w_start, w_k + 8, columns, True, w_here)
    sums = zeros32()
    for k in range(0, columns, F32_STEP):
        cuda.syncthreads()
        turn(shared, x_k * X_ROW + x_row, X_ROW, v)
        turn(shared, w_begin + w_k * W_ROW + w_row, W_ROW, w)
        turn(shared, w_begin + (w_k + 8) * W_ROW + w_row, W_ROW, other)
        cuda.syncthreads()
        following = k + F32_STEP
        v = take(x, x_start, following + x_k, columns, even, x_here)
        w = take(weight, w_start, following + w_k, columns, True, w_here)
        other = take(weight, w_start, following + w_k + 8, columns, True, w_here)
        for i in range(F32_STEP):
            low, high = floats4(shared, i * X_ROW + a_at), floats4(shared, i * X_ROW + a_at + 4)
            sums = add_products(sums, low + high, floats4(shared, i * W_ROW + b_at))
    cuda.syncthreads()
    put_block(sums, shared_address(shared, 0) + (thread >> 5) * 8 * STAGED_BYTES + (thread & 31) * 16)
    cuda.syncthreads()
    finish_linear(shared, x, False, residual, added, out, first_token, tokens[0], first_row, rows, rows)
