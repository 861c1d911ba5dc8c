"""GEMM: linear layers for many tokens, Y[T, N] = X[T, K] · W[N, K]ᵀ on tensor cores, with sums in float32.

Tensor cores take 16-bit operands:

- X is rounded to bfloat16 if W is bfloat16, otherwise to float16. A separate kernel does this and RMSNorm
  (`rounding.round_kernel`). Each row is multiplied by a power of two, and its results are divided by it, exactly.
- Quantised weights are first dequantised to float16 in scratch memory (`expand_kernel`): a few hundred MB of traffic
  against some 10^11 operations. float32 weights stay float32 and are multiplied without tensor cores.
- A block of four warps computes 128 tokens × 128 columns, 64 × 64 per warp, so a lane holds 128 sums. Asynchronous
  copies bring 64 columns of X and W at a time to a ring of `stages` in shared memory. A lane loads its fragments of the
  next 16 columns while it multiplies the last 16.
- At the end the sums go to shared memory in two halves, and each operator has its own epilogue: a residual; SwiGLU,
  whose block computes 64 columns of each of its two weights; RoPE and the writes to the KV cache.

Why these sizes: the 64 × 64 × 16 products of a warp take 51 cycles at the rate of `mma.sync`, and its fragments take 32
cycles of shared memory. Smaller tiles of a warp would wait for shared memory. The floor is arithmetic: 2 · T · N · K
operations.

Rows of X that a run does not have are zeros, so padding tokens cost nothing beyond their tile.
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
    griddepcontrol_wait,
    ld_global_u32,
    ld_global_v4_u32,
    ld_v4_f32,
    shared_address,
    st_v4_f32,
)
from ..mma import (
    dequant_16_bytes,
    dequant_packed_block,
    fma_outer,
    ldmatrix_x4,
    mma_m16n8k16,
    st_shared_block,
    st_shared_sums,
    zeros32,
    zeros128,
)
from ..quant_traits import is_packed, per_16_bytes, scale_in, scale_word, store_element
from .common import device, kv_index, launch_bounds, pdl_sync, silu_and_mul
from .dequant import block_at
from .params import GEMM_F32_K_STEP as F32_STEP
from .params import GEMM_F32_W_STRIDE as W_ROW
from .params import GEMM_F32_X_STRIDE as X_ROW
from .params import GEMM_K_STEP as STEP
from .params import GEMM_STAGED_BYTES as STAGED_BYTES
from .params import GEMM_THREADS as THREADS
from .params import GEMM_TILE as TILE
from .params import GEMM_TILE_BYTES as TILE_BYTES
from .rounding import load4

STAGED = STAGED_BYTES // 4


# Weights in float16


@cuda.jit
def expand_kernel(weight, stride, scales, scale_stride, shift, out, first, columns):
    """Rows of a quantised weight, from `first` on, as float16: integer times scale, rounded once. One block per row."""
    pdl_sync()
    elements = per_16_bytes(weight)
    row = first + cuda.blockIdx.x
    base, to = address(weight, 0) + row * stride, address(out, cuda.blockIdx.x * columns)
    if is_packed(weight):
        for block in range(cuda.threadIdx.x, columns >> 5, cuda.blockDim.x):
            high, high2, scale, scale2, block_min = block_at(weight, address(scales, row * scale_stride), block)
            dequant_packed_block(
                weight, ld_global_v4_u32(base + 16 * block), high, high2, scale, scale2, block_min, to + 64 * block
            )
        return
    for chunk in range(cuda.threadIdx.x, columns // elements, cuda.blockDim.x):
        at = row * scale_stride + ((chunk * elements) >> shift)
        scale = scale_in(scales, ld_global_u32(scale_word(scales, at)), at)
        dequant_16_bytes(weight, ld_global_v4_u32(base + 16 * chunk), scale, to + 2 * elements * chunk)


# Tiles on tensor cores


@device
def row_mask(rows_left, n_rows):
    """Bit mask of a thread's `n_rows` rows, which are 16 apart: bit i is set if row i exists. `rows_left` is the number
    of rows from its first one to the end.
    """
    return (1 << max(0, min((rows_left + 15) >> 4, n_rows))) - 1


@device
def fetch_rows(to, source, step, rows, which, inside):
    """Start copying 16 bytes of two rows that are 16 apart. Zeros if bit `which`, or the next, of `rows` is not set."""
    cp_async_16(to, source, 16 if inside and rows & which else 0)
    cp_async_16(to + 16 * 128, source + step, 16 if inside and rows & (2 * which) else 0)


@device
def wait_for_stage(stages):
    """Wait until at most the newest `stages` - 2 of the stages that this thread copies are pending."""
    if stages == 3:
        cp_async_wait_group(1)
    elif stages == 4:
        cp_async_wait_group(2)
    elif stages == 5:
        cp_async_wait_group(3)
    else:
        cp_async_wait_all()


@device
def multiply_tile(
    weight, x_at, x_bytes, x_rows, a_at, a_rows, b_at, b_rows, stride, columns, stages, early, base, sums
):
    """Sums of a tile: 128 tokens of X from address `x_at` on, times 64 rows of W from `a_at` on and 64 from `b_at` on.

    `x_rows`, `a_rows` and `b_rows` rows of these exist, the others count as zeros. `early`: the preceding kernel does
    not write W. The ring begins at shared address `base`; a stage is X's tile, then W's.
    """
    thread = cuda.threadIdx.x
    lane, warp = thread & 31, thread >> 5
    row, chunk = thread >> 3, thread & 7
    to = base + row * 128 + ((chunk ^ (row & 7)) << 4)
    x_from, x_step = x_at + row * x_bytes + chunk * 16, 16 * x_bytes
    a_from, b_from, w_step = a_at + row * stride + chunk * 16, b_at + row * stride + chunk * 16, 16 * stride
    rows = row_mask(x_rows - row, 8) | row_mask(a_rows - row, 4) << 8 | row_mask(b_rows - row, 4) << 12
    k_here = columns - 8 * chunk
    steps = (columns + STEP - 1) // STEP
    if not early:
        griddepcontrol_wait()
    for s in range(stages - 1):
        slot, on, inside = to + s * 2 * TILE_BYTES + TILE_BYTES, s * 2 * STEP, s * STEP < k_here
        fetch_rows(slot, a_from + on, w_step, rows, 256, inside)
        fetch_rows(slot + 4096, a_from + on + 2 * w_step, w_step, rows, 1024, inside)
        fetch_rows(slot + 8192, b_from + on, w_step, rows, 4096, inside)
        fetch_rows(slot + 12288, b_from + on + 2 * w_step, w_step, rows, 16384, inside)
    pdl_sync()
    for s in range(stages - 1):
        slot, on, inside = to + s * 2 * TILE_BYTES, s * 2 * STEP, s < steps
        fetch_rows(slot, x_from + on, x_step, rows, 1, inside)
        fetch_rows(slot + 4096, x_from + on + 2 * x_step, x_step, rows, 4, inside)
        fetch_rows(slot + 8192, x_from + on + 4 * x_step, x_step, rows, 16, inside)
        fetch_rows(slot + 12288, x_from + on + 6 * x_step, x_step, rows, 64, inside)
        cp_async_commit()
    wait_for_stage(stages)
    cuda.syncthreads()

    x_row, w_row = (warp & 1) * 64 + (lane & 15), (warp >> 1) * 64 + (lane & 7) + ((lane >> 4) << 3)
    x_lane = base + x_row * 128 + (((lane >> 4) ^ (lane & 7)) << 4)
    w_lane = base + TILE_BYTES + w_row * 128 + ((((lane >> 3) & 1) ^ (lane & 7)) << 4)
    x, w = x_lane, w_lane
    words = ldmatrix_x4(sums, x, w)
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
        others = ldmatrix_x4(sums, x ^ 32, w ^ 32)
        sums = mma_m16n8k16(weight, sums, words)
        fetch_rows(slot + 4096, x_from + on + 2 * x_step, x_step, rows, 4, x_inside)
        fetch_rows(slot + TILE_BYTES + 4096, a_from + on + 2 * w_step, w_step, rows, 1024, inside)
        words = ldmatrix_x4(sums, x ^ 64, w ^ 64)
        sums = mma_m16n8k16(weight, sums, others)
        fetch_rows(slot + 8192, x_from + on + 4 * x_step, x_step, rows, 16, x_inside)
        fetch_rows(slot + TILE_BYTES + 8192, b_from + on, w_step, rows, 4096, inside)
        others = ldmatrix_x4(sums, x ^ 96, w ^ 96)
        sums = mma_m16n8k16(weight, sums, words)
        fetch_rows(slot + 12288, x_from + on + 6 * x_step, x_step, rows, 64, x_inside)
        fetch_rows(slot + TILE_BYTES + 12288, b_from + on + 2 * w_step, w_step, rows, 16384, inside)
        cp_async_commit()
        wait_for_stage(stages)
        cuda.syncthreads()  # the next stage has arrived, and all threads have read this one
        reading = reading + 1 if reading + 1 < stages else 0
        writing = writing + 1 if writing + 1 < stages else 0
        x, w = x_lane + reading * 2 * TILE_BYTES, w_lane + reading * 2 * TILE_BYTES
        words = ldmatrix_x4(sums, x, w)
        sums = mma_m16n8k16(weight, sums, others)
    cp_async_wait_all()
    return sums


@device
def stage_half(half, sums, base):
    """Write the sums of 64 of the tile's tokens to shared memory: column c of token r at r · STAGED + c."""
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    cuda.syncthreads()
    if warp & 1 == half:
        st_shared_sums(sums, base + (lane >> 2) * STAGED_BYTES + ((warp >> 1) * 64 + 2 * (lane & 3)) * 4)
    cuda.syncthreads()


@device
def finish_linear(shared, scales, scaled, residual, added, out, first_token, tokens, first_row, end, rows):
    """Write 64 tokens × 128 columns from shared memory to `out`, times the tokens' scales if `scaled`, plus `residual`
    if `added`."""
    column = (cuda.threadIdx.x & 31) * 4
    n = first_row + column
    for r in range(cuda.threadIdx.x >> 5, min(64, tokens - first_token), cuda.blockDim.x >> 5):
        t = first_token + r
        v = ld_v4_f32(shared, r * STAGED + column)
        if scaled:
            scale = scales[t]
            v = v[0] * scale, v[1] * scale, v[2] * scale, v[3] * scale
        at = t * rows + n
        if rows & 3 == 0:
            if n < end:
                if added:
                    old = ld_v4_f32(residual, at)
                    v = v[0] + old[0], v[1] + old[1], v[2] + old[2], v[3] + old[3]
                st_v4_f32(out, at, v[0], v[1], v[2], v[3])
        else:
            finish_element(out, at, v[0], residual, added, n < end)
            finish_element(out, at + 1, v[1], residual, added, n + 1 < end)
            finish_element(out, at + 2, v[2], residual, added, n + 2 < end)
            finish_element(out, at + 3, v[3], residual, added, n + 3 < end)


@device
def finish_element(out, at, value, residual, added, inside):
    """out[at] = value, plus the residual if `added`; nothing if not `inside`."""
    if inside:
        out[at] = value + residual[at] if added else value


@launch_bounds(min_blocks=2)
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
    base, rows_left = shared_address(shared, 0), end - first_row
    w_at = address(weight, 0) + (first_row - begin) * stride
    sums = multiply_tile(weight, address(x, first_token * padded), 2 * padded, tokens[0] - first_token, w_at,
                         rows_left, w_at + 64 * stride, rows_left - 64, stride, columns, stages, early, base,
                         zeros128())  # fmt: skip
    for half in range(2):
        stage_half(half, sums, base)
        finish_linear(shared, scales, True, residual, added, out, first_token + 64 * half, tokens[0], first_row, end,
                      rows)  # fmt: skip


@launch_bounds(min_blocks=2)
@cuda.jit
def gemm_gate_up_kernel(tokens, x, padded, scales, w1, w3, stride, early, out, begin, end, rows, columns, stages):
    """Columns from `begin` to `end` of out = silu(x · W1ᵀ) · (x · W3ᵀ). A block computes 64 of both."""
    first_token, first_row = cuda.blockIdx.x * TILE, begin + cuda.blockIdx.y * 64
    if first_token >= tokens[0]:
        return
    shared = cuda.shared.array(0, np.float32)
    base, rows_left, skipped = shared_address(shared, 0), end - first_row, (first_row - begin) * stride
    sums = multiply_tile(w1, address(x, first_token * padded), 2 * padded, tokens[0] - first_token,
                         address(w1, 0) + skipped, rows_left, address(w3, 0) + skipped, rows_left, stride, columns,
                         stages, early, base, zeros128())  # fmt: skip
    column = (cuda.threadIdx.x & 15) * 4
    n = first_row + column
    for half in range(2):
        stage_half(half, sums, base)
        first = first_token + 64 * half
        for r in range(cuda.threadIdx.x >> 4, min(64, tokens[0] - first), THREADS >> 4):
            scale = scales[first + r]
            gate, up = ld_v4_f32(shared, r * STAGED + column), ld_v4_f32(shared, r * STAGED + 64 + column)
            v0, v1 = silu_and_mul(gate[0] * scale, up[0] * scale), silu_and_mul(gate[1] * scale, up[1] * scale)
            v2, v3 = silu_and_mul(gate[2] * scale, up[2] * scale), silu_and_mul(gate[3] * scale, up[3] * scale)
            at = (first + r) * rows + n
            if rows & 3 == 0:
                if n < end:
                    st_v4_f32(out, at, v0, v1, v2, v3)
            else:
                finish_element(out, at, v0, out, False, n < end)
                finish_element(out, at + 1, v1, out, False, n + 1 < end)
                finish_element(out, at + 2, v2, out, False, n + 2 < end)
                finish_element(out, at + 3, v3, out, False, n + 3 < end)


@launch_bounds(min_blocks=2)
@cuda.jit
def gemm_qkv_rope_kernel(tokens, x, padded, scales, wq, wk, wv, stride, early, angles, positions, sequences, page_table,
                         table_stride, log2_page, q, k_cache, v_cache, q_rows, kv_rows, q_tiles, kv_tiles, heads_a_tile,
                         kv_heads, head_dim, interleaved, columns, stages):  # fmt: skip
    """Write RoPE(x · Wqᵀ) to q, RoPE(x · Wkᵀ) and x · Wvᵀ to the caches. A block computes whole heads of one weight. A
    thread finishes one pair of elements of every other token.
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
    rows_left = min(width, rows - first_row)
    w_at += first_row * stride
    sums = multiply_tile(wq, address(x, first_token * padded), 2 * padded, tokens[0] - first_token, w_at,
                         rows_left, w_at + 64 * stride, rows_left - 64, stride, columns, stages, early, base,
                         zeros128())  # fmt: skip

    half_dim, i, head = head_dim >> 1, cuda.threadIdx.x & 63, 0
    while i >= half_dim:  # faster than a division of int64
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
            if b < rows_left:
                t = first + r
                scale = scales[t]
                u, v = shared[r * STAGED + a] * scale, shared[r * STAGED + b] * scale
                if section < 2:
                    cos, sin = angles[t * head_dim + i], angles[t * head_dim + half_dim + i]
                    u, v = u * cos - v * sin, u * sin + v * cos
                if section == 0:
                    q[t * q_rows + first_row + a], q[t * q_rows + first_row + b] = u, v
                else:
                    pages = page_table, table_stride, log2_page
                    at = kv_index(pages, sequences[t], head, positions[t], kv_heads, head_dim) + d
                    if section == 1:
                        store_element(k_cache, at, u)
                        store_element(k_cache, at + b - a, v)
                    else:
                        store_element(v_cache, at, u)
                        store_element(v_cache, at + b - a, v)


# float32


@device
def load_or_0(x, start, k, columns, even, inside):
    """`load4` of a row that exists, else zeros."""
    zero = np.float32(0)
    v = (zero, zero, zero, zero)
    if inside:
        v = load4(x, start, k, columns, even)
    return v


@device
def store_transposed(shared, at, distance, v):
    """Four elements of a row to shared memory, as one element of four rows that are `distance` apart."""
    shared[at], shared[at + distance] = v[0], v[1]
    shared[at + 2 * distance], shared[at + 3 * distance] = v[2], v[3]


@launch_bounds(min_blocks=2)
@cuda.jit
def gemm_f32_kernel(tokens, x, weight, stride, residual, added, out, rows, columns):
    """out = x · Wᵀ, plus `residual` if `added`, in float32 throughout; `stride` counts elements."""
    first_token, first_row = cuda.blockIdx.x * 64, cuda.blockIdx.y * TILE
    if first_token >= tokens[0]:
        return
    shared = cuda.shared.array(0, np.float32)
    thread, w_begin, even = cuda.threadIdx.x, F32_STEP * X_ROW, columns & 3 == 0
    # a thread loads four elements of a row of X and of two rows of W; a warp's rows are neighbours
    x_row, x_k, w_row, w_k = thread & 63, (thread >> 6) * 4, thread & 127, (thread >> 7) * 4
    x_start, w_start = (first_token + x_row) * columns, (first_row + w_row) * stride
    x_here, w_here = first_token + x_row < tokens[0], first_row + w_row < rows
    a_at, b_at = (thread >> 5) * 8, w_begin + (thread & 31) * 4
    pdl_sync()
    v = load_or_0(x, x_start, x_k, columns, even, x_here)
    w = load_or_0(weight, w_start, w_k, columns, True, w_here)
    other = load_or_0(weight, w_start, w_k + 8, columns, True, w_here)
    sums = zeros32()
    for k in range(0, columns, F32_STEP):
        cuda.syncthreads()
        store_transposed(shared, x_k * X_ROW + x_row, X_ROW, v)
        store_transposed(shared, w_begin + w_k * W_ROW + w_row, W_ROW, w)
        store_transposed(shared, w_begin + (w_k + 8) * W_ROW + w_row, W_ROW, other)
        cuda.syncthreads()
        following = k + F32_STEP
        v = load_or_0(x, x_start, following + x_k, columns, even, x_here)
        w = load_or_0(weight, w_start, following + w_k, columns, True, w_here)
        other = load_or_0(weight, w_start, following + w_k + 8, columns, True, w_here)
        for i in range(F32_STEP):
            low, high = ld_v4_f32(shared, i * X_ROW + a_at), ld_v4_f32(shared, i * X_ROW + a_at + 4)
            sums = fma_outer(sums, low + high, ld_v4_f32(shared, i * W_ROW + b_at))
    cuda.syncthreads()
    st_shared_block(sums, shared_address(shared, 0) + (thread >> 5) * 8 * STAGED_BYTES + (thread & 31) * 16)
    cuda.syncthreads()
    finish_linear(shared, x, False, residual, added, out, first_token, tokens[0], first_row, rows, rows)
