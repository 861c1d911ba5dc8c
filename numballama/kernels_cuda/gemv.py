"""Linear layers for a few tokens: every weight is read once, in a stream that never waits.

y[N] = W[N, K] · x[K]. Such a step does two operations for each weight, so the memory's bandwidth is its floor: an SM of
an H200 gets 31 bytes a nanosecond, and 26 KB must be under way at any time to cover the memory's latency.

- Each warp copies 16 bytes a lane of two rows at once into a ring in shared memory, `DEPTH` - 1 stages ahead of the
  stage it multiplies; a lane reads only what it copied itself, so the ring needs no barrier. The copies begin before
  the kernel waits for its predecessor: when x arrives, the first weights are there.
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
    await_all_but_7,
    close_copies,
    copy4,
    copy16,
    dot16,
    has_scales,
    let_successor_start,
    per_16_bytes,
    scale_in,
    scale_word,
    shared_word,
    shared_words4,
    store_number,
    wait_for_predecessor,
)
from ..lowlevel_cuda.launch import Argument, Array, Gpu, Launch, Matrix
from ..registry import kernel
from .pieces import beyond, device, sigmoid_times, warp_sum

WARPS, DEPTH = 8, 8
THREADS = 32 * WARPS
ROW_BYTES, SCALE_BYTES = 512, 128
"""Of a stage, for each row: 16 bytes a lane, and a word with its scale."""
LANE_STEP = 132
MATRIX = ("f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1", "q4_k", "q6_k")
"""Types of weights. The last three become float16 on their way to the device."""


LINEAR, GATE_UP, QKV = 0, 1, 2
"""What the two rows of a pair are: neighbours of one weight; the same row of two; or, in three, see `place`."""


@device
def row_bytes(payload):
    """Bytes of one row of a stage of a warp's ring."""
    return ROW_BYTES + SCALE_BYTES if has_scales(payload) else ROW_BYTES


@device
def place(mode, pair, which, q_pairs, k_pairs, half):
    """(weight, row) of row `which` of a pair. Of queries and keys, with `half` not 0, row i goes with row i + half of
    its head.
    """
    section = 0
    row = 2 * pair + which
    if mode == GATE_UP:
        section = which
        row = pair
    if mode == QKV:
        inside = pair
        if pair >= q_pairs + k_pairs:
            section = 2
            inside = pair - q_pairs - k_pairs
        elif pair >= q_pairs:
            section = 1
            inside = pair - q_pairs
        row = 2 * inside + which
        if half > 0 and section < 2:
            head = inside // half
            row = inside + head * half + which * half
    return section, row


@device
def fetch(slot, payload, row, scales, scale_row, shift, chunk, columns, lane):
    """Start copying a lane's 16 bytes of chunk `chunk` of the row at address `row`, and the word with their scale."""
    k = (chunk * 32 + lane) * per_16_bytes(payload)
    inside = k < columns
    copy16(slot + lane * 16, row + (chunk * 32 + lane) * 16, 16 if inside else 0)
    if has_scales(payload):
        word = scale_word(scales, scale_row + (k >> shift) if inside else 0)
        copy4(slot + ROW_BYTES + lane * 4, word, 4 if inside else 0)


@device
def fetch_pair(mode, pair, q_pairs, k_pairs, half, last, slot, payload, w0, w1, w2, stride, s0, s1, s2, scale_stride,
               shift, chunk, columns, lane):  # fmt: skip
    """`fetch` for both rows of a pair. `last` is the last row of a `LINEAR` weight, which stands in for one too many."""
    section, row = place(mode, pair, 0, q_pairs, k_pairs, half)
    base = w0 if section == 0 else (w1 if section == 1 else w2)
    scales = s0 if section == 0 else (s1 if section == 1 else s2)
    fetch(slot, payload, base + row * stride, scales, row * scale_stride, shift, chunk, columns, lane)
    section, row = place(mode, pair, 1, q_pairs, k_pairs, half)
    if mode == LINEAR:
        row = min(row, last)
    base = w0 if section == 0 else (w1 if section == 1 else w2)
    scales = s0 if section == 0 else (s1 if section == 1 else s2)
    fetch(slot + row_bytes(payload), payload, base + row * stride, scales, row * scale_stride, shift, chunk, columns,
          lane)  # fmt: skip


@device
def multiply(slot, payload, scales, scale_row, shift, chunk, shared, x_at, lane):
    """The lane's part of a row's sum over one chunk that has arrived."""
    step = per_16_bytes(payload) // 4 * LANE_STEP
    total = dot16(payload, shared_words4(slot + lane * 16), shared, x_at + chunk * step + lane * 4, LANE_STEP)
    if has_scales(payload):
        k = (chunk * 32 + lane) * per_16_bytes(payload)
        total *= scale_in(scales, shared_word(slot + ROW_BYTES + lane * 4), scale_row + (k >> shift))
    return total


@device
def stage_x(x, start, norm, normed, columns, payload, shared, x_at, sums_at):
    """x into shared memory in lane order, times the norm's weight; each warp leaves its sum of squares at `sums_at`."""
    numbers = per_16_bytes(payload)
    chunk = 32 * numbers
    padded = (columns + chunk - 1) // chunk * chunk
    squares = np.float32(0)
    for k in range(cuda.threadIdx.x, padded, THREADS):
        value = np.float32(0)
        if k < columns:
            value = x[start + k]
            squares += value * value
            if normed:
                value *= norm[k]
        inside = k & (chunk - 1)
        i = inside & (numbers - 1)
        lane = inside // numbers
        shared[x_at + (k // chunk) * (numbers // 4 * LANE_STEP) + (i >> 2) * LANE_STEP + lane * 4 + (i & 3)] = value
    if normed:
        squares = warp_sum(squares)
        if cuda.threadIdx.x & 31 == 0:
            shared[sums_at + (cuda.threadIdx.x >> 5)] = squares


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
def stream(mode, pairs, q_pairs, k_pairs, half, last, x, start, norm, normed, payload, w0, w1, w2, stride, s0, s1, s2,
           scale_stride, shift, columns, slices, shared, x_at, sums_at, partial_at):  # fmt: skip
    """All sums of this block's pairs, in slices, into shared memory at `partial_at`; ends behind a barrier."""
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    mine = pairs_of_block(pairs)
    width = 32 * per_16_bytes(payload)
    chunks = (columns + width - 1) // width
    groups, piece = WARPS // slices, warp & (slices - 1)
    row_slot = row_bytes(payload)
    ring = address(shared, 0) + warp * DEPTH * 2 * row_slot

    to_fetch, next_chunk, turn = warp // slices, piece, 0
    local, chunk, sum_a, sum_b = warp // slices, piece, np.float32(0), np.float32(0)
    while local < mine or turn < DEPTH - 1:
        if to_fetch < mine:
            slot = ring + (turn & (DEPTH - 1)) * 2 * row_slot
            fetch_pair(mode, cuda.blockIdx.x + to_fetch * cuda.gridDim.x, q_pairs, k_pairs, half, last, slot, payload,
                       w0, w1, w2, stride, s0, s1, s2, scale_stride, shift, next_chunk, columns, lane)  # fmt: skip
            next_chunk += slices
            if next_chunk >= chunks:
                next_chunk = piece
                to_fetch += groups
        close_copies()
        turn += 1
        if turn == DEPTH - 1:  # the ring is full but for one slot: now x is wanted
            wait_for_predecessor()
            let_successor_start()
            stage_x(x, start, norm, normed, columns, payload, shared, x_at, sums_at)
            cuda.syncthreads()
        elif turn >= DEPTH:
            await_all_but_7()
            slot = ring + ((turn - DEPTH) & (DEPTH - 1)) * 2 * row_slot
            if chunk < chunks:
                pair = cuda.blockIdx.x + local * cuda.gridDim.x
                section, row = place(mode, pair, 0, q_pairs, k_pairs, half)
                sum_a += multiply(slot, payload, s0, row * scale_stride, shift, chunk, shared, x_at, lane)
                section, row = place(mode, pair, 1, q_pairs, k_pairs, half)
                if mode == LINEAR:
                    row = min(row, last)
                sum_b += multiply(slot + row_slot, payload, s0, row * scale_stride, shift, chunk, shared, x_at, lane)
            chunk += slices
            if chunk >= chunks:
                sum_a, sum_b = warp_sum(sum_a), warp_sum(sum_b)
                if lane == 0:
                    shared[partial_at + (local * slices + piece) * 2] = sum_a
                    shared[partial_at + (local * slices + piece) * 2 + 1] = sum_b
                sum_a, sum_b = np.float32(0), np.float32(0)
                chunk = piece
                local += groups
    await_all()
    cuda.syncthreads()


@device
def combined(shared, partial_at, local, slices, which):
    """The sum of a row's slices: row `which` of the block's pair `local`."""
    total = np.float32(0)
    for i in range(slices):
        total += shared[partial_at + (local * slices + i) * 2 + which]
    return total


@cuda.jit
def linear_kernel(tokens, x, norm, normed, eps, weight, stride, scales, scale_stride, shift, residual, added, out,
                  rows, columns, slices, x_at, sums_at, partial_at):  # fmt: skip
    """out = W · x, or W · norm(x), plus `residual` if `added`."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, pairs, base = cuda.blockIdx.y, (rows + 1) // 2, address(weight, 0)
    stream(LINEAR, pairs, 0, 0, 0, rows - 1, x, t * columns, norm, normed, weight, base, base, base, stride, scales,
           scales, scales, scale_stride, shift, columns, slices, shared, x_at, sums_at, partial_at)  # fmt: skip
    factor = norm_factor(shared, sums_at, normed, columns, eps)
    for i in range(cuda.threadIdx.x, 2 * pairs_of_block(pairs), THREADS):
        row = 2 * (cuda.blockIdx.x + (i >> 1) * cuda.gridDim.x) + (i & 1)
        if row < rows:
            value = combined(shared, partial_at, i >> 1, slices, i & 1) * factor
            if added:
                value += residual[t * rows + row]
            out[t * rows + row] = value


@cuda.jit
def gate_up_kernel(tokens, x, norm, normed, eps, w1, w3, stride, s1, s3, scale_stride, shift, out, rows, columns,
                   slices, x_at, sums_at, partial_at):  # fmt: skip
    """out = silu(W1 · x) · (W3 · x), of x or of norm(x)."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, a, b = cuda.blockIdx.y, address(w1, 0), address(w3, 0)
    stream(GATE_UP, rows, 0, 0, 0, 0, x, t * columns, norm, normed, w1, a, b, b, stride, s1, s3, s3, scale_stride,
           shift, columns, slices, shared, x_at, sums_at, partial_at)  # fmt: skip
    factor = norm_factor(shared, sums_at, normed, columns, eps)
    for local in range(cuda.threadIdx.x, pairs_of_block(rows), THREADS):
        gate = combined(shared, partial_at, local, slices, 0) * factor
        up = combined(shared, partial_at, local, slices, 1) * factor
        out[t * rows + cuda.blockIdx.x + local * cuda.gridDim.x] = sigmoid_times(gate, up)


@cuda.jit
def qkv_kernel(tokens, x, norm, normed, eps, wq, wk, wv, stride, sq, sk, sv, scale_stride, shift, q, k, v, q_rows,
               kv_rows, columns, slices, x_at, sums_at, partial_at):  # fmt: skip
    """q, k and v = Wq · x, Wk · x, Wv · x, of x or of norm(x). Numbers of rows are even, as heads are."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, pairs, q_pairs, k_pairs = cuda.blockIdx.y, q_rows // 2 + kv_rows, q_rows // 2, kv_rows // 2
    stream(QKV, pairs, q_pairs, k_pairs, 0, 0, x, t * columns, norm, normed, wq, address(wq, 0), address(wk, 0),
           address(wv, 0), stride, sq, sk, sv, scale_stride, shift, columns, slices, shared, x_at, sums_at,
           partial_at)  # fmt: skip
    factor = norm_factor(shared, sums_at, normed, columns, eps)
    for i in range(cuda.threadIdx.x, 2 * pairs_of_block(pairs), THREADS):
        pair = cuda.blockIdx.x + (i >> 1) * cuda.gridDim.x
        section, row = place(QKV, pair, i & 1, q_pairs, k_pairs, 0)
        value = combined(shared, partial_at, i >> 1, slices, i & 1) * factor
        if section == 0:
            q[t * q_rows + row] = value
        elif section == 1:
            k[t * kv_rows + row] = value
        else:
            v[t * kv_rows + row] = value


@cuda.jit
def qkv_rope_kernel(tokens, x, norm, normed, eps, wq, wk, wv, stride, sq, sk, sv, scale_stride, shift, angles,
                    positions, sequences, q, k_cache, v_cache, q_rows, kv_rows, head_dim, interleaved, context,
                    columns, slices, x_at, sums_at, partial_at):  # fmt: skip
    """Queries, turned by RoPE, into q; keys, turned, and values into the cache, at the token's position."""
    if beyond(tokens):
        return
    shared = cuda.shared.array(0, np.float32)
    t, pairs, q_pairs, k_pairs = cuda.blockIdx.y, q_rows // 2 + kv_rows, q_rows // 2, kv_rows // 2
    half = 0 if interleaved else head_dim // 2
    stream(QKV, pairs, q_pairs, k_pairs, half, 0, x, t * columns, norm, normed, wq, address(wq, 0), address(wk, 0),
           address(wv, 0), stride, sq, sk, sv, scale_stride, shift, columns, slices, shared, x_at, sums_at,
           partial_at)  # fmt: skip
    factor = norm_factor(shared, sums_at, normed, columns, eps)
    position, kv_heads = positions[t], kv_rows // head_dim
    for i in range(cuda.threadIdx.x, pairs_of_block(pairs), THREADS):
        pair = cuda.blockIdx.x + i * cuda.gridDim.x
        section, row = place(QKV, pair, 0, q_pairs, k_pairs, half)
        a = combined(shared, partial_at, i, slices, 0) * factor
        b = combined(shared, partial_at, i, slices, 1) * factor
        head = row // head_dim
        d = row - head * head_dim
        apart = half if half > 0 and section < 2 else 1
        if section < 2:
            angle = t * head_dim + (d if half > 0 else d >> 1)
            cos, sin = angles[angle], angles[angle + head_dim // 2]
            a, b = a * cos - b * sin, a * sin + b * cos
        if section == 0:
            q[t * q_rows + row] = a
            q[t * q_rows + row + apart] = b
        else:
            at = ((sequences[t] * kv_heads + head) * context + position) * head_dim + d
            if section == 1:
                store_number(k_cache, at, a)
                store_number(k_cache, at + apart, b)
            else:
                store_number(v_cache, at, a)
                store_number(v_cache, at + apart, b)


# How they are launched


def _shape(gpu: Gpu, weight: Matrix, pairs: int, tokens: int) -> tuple[tuple[int, int], tuple[int, ...], int]:
    """Grid, the last arguments (slices, x_at, sums_at, partial_at) and the bytes of shared memory of a `stream`."""
    numbers = {"f32": 4, "f16": 8, "bf16": 8, "int8": 16, "q4_0": 32}[weight.payload.dtype]
    chunks = -(-weight.shape[1] // (32 * numbers))
    blocks = min(gpu.processors, pairs)
    mine = -(-pairs // blocks)
    slices = min((1, 2, 4, 8), key=lambda s: (-(-mine // (WARPS // s)) * -(-chunks // s), s))
    ring = WARPS * DEPTH * 2 * (ROW_BYTES + (SCALE_BYTES if weight.quantized else 0)) // 4
    sums = ring + chunks * (numbers // 4) * LANE_STEP
    partial = sums + WARPS
    return (blocks, tokens), (slices, ring, sums, partial), 4 * (partial + 2 * mine * slices)


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
    wq, wk, wv = weights
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
    return [Launch(qkv_rope_kernel, grid, THREADS, (*first, *middle, k_cache.shape[2], *rest), shared)]


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
