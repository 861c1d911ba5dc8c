"""A token's layers as one kernel, whose blocks stay on their multiprocessors and walk a table of steps.

Between two kernels the memory has little to do: rows of the last one run out, and the next one's first have a few
kilobytes in advance. Here each warp fetches weights through one ring for the whole token. Weights depend on nothing, so
it goes on to the next step's rows as soon as it has asked for all of this one's, while sums meet, blocks wait for each
other and x comes in.

Blocks meet between steps: each counts itself in when it has written its results, and looks at the count until all have.
So all must be on the device at once, one to a multiprocessor; the launch asks the driver for that.

What a step computes is what `gemv` and `attention` compute with a kernel a step, by the same functions.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numba import cuda

from ..lowlevel_cuda.instructions import (
    address,
    arrive,
    arrived,
    await_all,
    await_all_but_3,
    clock,
    close_copies,
    count_up,
    f32_of_bits,
    has_scales,
    keep_loop,
    per_16_bytes,
    pointer_at,
    put8,
    shared_address,
    wait_for_predecessor,
)
from ..lowlevel_cuda.launch import ITEM_BYTES, Array, Gpu, Launch
from ..registry import kernel
from .attention import HEADS, STAGE_BYTES, STAGES, attend, fetch_first_keys, join, keys_of_part, write_heads
from .gemv import (
    GATE_UP,
    LINEAR,
    QKV,
    finish_gate_up,
    finish_linear,
    finish_qkv_rope,
    pair_at,
    source_of,
    turning,
)
from .pieces import LOG2_E, device, split
from .products import THREADS, WARPS, norm_factor
from .tiles import (
    NUMBERS,
    PAIRS,
    SPAN,
    fetch_tile,
    fits,
    join_tile,
    multiply_tile,
    numbers_of_stage,
    place_of_x,
    scales_of_stage,
    scales_row,
    stage_vector,
    tile_bytes,
    unit_bytes,
    x_floats,
    zeros_at,
)

DEPTH = 4
"""Stages of a warp's ring; `await_all_but_3` knows it."""
LOOK, SLOTS = 5, 8
"""Steps from the present one on whose rows of the table lie in shared memory; a power of two above that."""
ATTENTION = 3
"""A row's mode beside `gemv`'s LINEAR, GATE_UP and QKV."""

NAMES = (
    "mode", "x", "norm", "normed", "eps", "w0", "w1", "w2", "stride", "s0", "s1", "s2", "scale_stride", "pairs",
    "columns", "stages", "log2_slices", "each", "over", "last", "q_pairs", "k_pairs", "half", "out", "residual",
    "added", "angles", "k_cache", "v_cache", "head_dim", "interleaved", "context", "kv_heads", "shared_by", "window",
    "lanes", "subgroups", "parts", "counters", "splits",
)  # fmt: skip
"""The words of a row, int64 each: addresses, numbers, and bits of a float32."""
WORDS = len(NAMES)
ROWS = SLOTS * WORDS
(MODE, X, NORM, NORMED, EPS, W0, W1, W2, STRIDE, S0, S1, S2, SCALE_STRIDE, ALL_PAIRS,
 COLUMNS, STAGES_OF_ROW, LOG2_SLICES, EACH, OVER, LAST, Q_PAIRS, K_PAIRS, HALF, OUT, RESIDUAL,
 ADDED, ANGLES, K_CACHE, V_CACHE, HEAD_DIM, INTERLEAVED, CONTEXT, KV_HEADS, SHARED_BY, WINDOW,
 LANES, SUBGROUPS, PARTS, COUNTERS, SPLITS) = range(WORDS)  # fmt: skip


@device
def row_of(step):
    """Where a step's row lies in shared memory."""
    return (step & (SLOTS - 1)) * WORDS


@device
def inverse_of(number):
    """1 / number."""
    return np.float32(1) / np.float32(number)


@device
def pairing(rows, at):
    """How rows of a step make pairs, as `gemv.place` takes it."""
    half = rows[at + HALF]
    inverse = inverse_of(half) if half > 0 else np.float32(0)
    return rows[at + LAST], rows[at + Q_PAIRS], rows[at + K_PAIRS], half, inverse


@device
def units_here(rows, at):
    """How many units of rows of a step are this block's."""
    return rows[at + EACH] + (1 if cuda.blockIdx.x < rows[at + OVER] else 0)


@device
def sources(rows, at, local, stage, weight, scale, lane):
    """Where the first bytes lie that a lane fetches in the block's unit `local`, from a stage on: of its rows a and b,
    and of the scales of one of them.
    """
    pair = PAIRS * (cuda.blockIdx.x + local * cuda.gridDim.x) + (lane >> 2)
    on = stage * SPAN + 16 * (lane & 3)
    weights = rows[at + W0] + on, rows[at + W1] + on, rows[at + W2] + on, rows[at + STRIDE]
    which, scales_on = scales_row(weight, lane)
    scales_on += stage * scales_of_stage(weight)
    scales = (
        rows[at + S0] + scales_on, rows[at + S1] + scales_on, rows[at + S2] + scales_on, rows[at + SCALE_STRIDE],
    )  # fmt: skip
    pair = min(pair, rows[at + ALL_PAIRS] - 1)  # the last unit may be of fewer pairs
    a, b, a_scales, b_scales = source_of(rows[at + MODE], pair, pairing(rows, at), weights, scales)
    return a, b, b_scales if which else a_scales


@device
def produce(cursor, limit, turn, own, rows, weight, scale):
    """Start copying the stage that the cursor stands at, and move it on: to the unit's next stage, to the warp's next
    unit, to the next step that has weights, if it is before `limit`. Returns the cursor and the number of stages so
    far.
    """
    step, local, stage, a, b, scales, mine = cursor
    ring, lane, warp = own
    while local >= mine and step + 1 < limit:
        keep_loop()
        step += 1
        at = row_of(step)
        mine = np.int64(0)
        if rows[at + MODE] != ATTENTION:
            log2_slices = rows[at + LOG2_SLICES]
            mine = units_here(rows, at)
            local, stage = warp >> log2_slices, warp & ((np.int64(1) << log2_slices) - 1)
            if local < mine:
                a, b, scales = sources(rows, at, local, stage, weight, scale, lane)
    if local < mine:
        at = row_of(step)
        log2_slices, stages = rows[at + LOG2_SLICES], rows[at + STAGES_OF_ROW]
        slot = ring + (turn & (DEPTH - 1)) * tile_bytes(weight)
        left = rows[at + STRIDE] - stage * SPAN
        _, scales_on = scales_row(weight, lane)
        scales_left = rows[at + SCALE_STRIDE] - stage * scales_of_stage(weight) - scales_on
        fetch_tile(slot, a, b, scales, left, scales_left, weight, lane)
        turn += 1
        slices = np.int64(1) << log2_slices
        stage += slices
        a += slices * SPAN
        b += slices * SPAN
        scales += slices * scales_of_stage(weight)
        if stage >= stages:
            stage = warp & (slices - 1)
            local += WARPS >> log2_slices
            if local < mine:
                a, b, scales = sources(rows, at, local, stage, weight, scale, lane)
    close_copies()
    return (step, local, stage, a, b, scales, mine), turn


@device
def meet(meeting, step):
    """Wait until all blocks have written the results of the steps before `step`."""
    if cuda.threadIdx.x == 0:
        while arrived(meeting) < step * cuda.gridDim.x:
            keep_loop()
    cuda.syncthreads()


@device
def note(stamps, step, what):
    """Leave the time, one of five of a step and block, if stamps are wanted."""
    if stamps > 0 and cuda.threadIdx.x == 0:
        put8(stamps + 8 * (5 * (step * cuda.gridDim.x + cuda.blockIdx.x) + what), clock())


@device
def attention_step(rows, at, step, meeting, k_like, numbers, counters_like, position, sequence, shared, area, most,
                   total, values, is_last):  # fmt: skip
    """A block's share of a step of attention: of each of its units `most.size` heads, and part of the keys they see."""
    kv_heads, shared_by, head_dim = rows[at + KV_HEADS], rows[at + SHARED_BY], rows[at + HEAD_DIM]
    subgroups, splits, lanes = rows[at + SUBGROUPS], rows[at + SPLITS], rows[at + LANES]
    groups, heads_a_block = kv_heads * subgroups, most.size
    k_cache, v_cache = pointer_at(k_like, rows[at + K_CACHE]), pointer_at(k_like, rows[at + V_CACHE])
    ring = shared_address(shared, area + 4 * cuda.threadIdx.x)
    factor, inverse = LOG2_E / np.float32(math.sqrt(np.float32(head_dim))), inverse_of(head_dim)
    met = False
    for unit in range(cuda.blockIdx.x, groups * splits, cuda.gridDim.x):
        keep_loop()
        part, group = split(unit, groups, inverse_of(groups))
        kv_head, sub = split(group, subgroups, inverse_of(subgroups))
        begin, end, used = keys_of_part(position + 1, rows[at + WINDOW], part, splits)
        if part < used:
            first_head = kv_head * shared_by + sub * heads_a_block
            heads_here = min(heads_a_block, shared_by - sub * heads_a_block)
            cache_at = (sequence * kv_heads + kv_head) * rows[at + CONTEXT] * head_dim
            fetch_first_keys(cache_at, k_cache, v_cache, begin, end, position, head_dim, lanes, ring)
            if not met:
                meet(meeting, step)
                met = True
            attend(pointer_at(numbers, rows[at + X]), first_head * head_dim, heads_here, cache_at, k_cache, v_cache,
                   begin, end, position, head_dim, lanes, factor, most, total, values, ring)  # fmt: skip
            join(most, total, values, lanes, shared, area, head_dim, inverse, per_16_bytes(k_like))
            counter = rows[at + COUNTERS] + 4 * group
            write_heads(pointer_at(numbers, rows[at + OUT]), pointer_at(numbers, rows[at + PARTS]), counter, first_head,
                        heads_here, part, used, splits, head_dim, inverse, shared, area, is_last)  # fmt: skip
            if used > 1 and is_last[0] and cuda.threadIdx.x == 0:
                pointer_at(counters_like, counter)[0] = 0
            cuda.syncthreads()
    if not met:
        meet(meeting, step)


@device
def chain(table, first, steps, meeting, stamps, weight, scale, k_like, numbers, positions, sequences, x_at, sums_at,
          partial_at, most, total, values, is_last):  # fmt: skip
    """All of it; `most.size` heads are computed by one block."""
    wait_for_predecessor()
    shared = cuda.shared.array(0, np.float32)
    rows = cuda.shared.array(ROWS, np.int64)
    thread = np.int64(cuda.threadIdx.x)
    lane, warp = thread & 31, thread >> 5
    for i in range(thread, min(LOOK, steps) * WORDS, THREADS):
        rows[i] = table[first * WORDS + i]
    position, sequence = np.int64(positions[0]), np.int64(sequences[0])
    cuda.syncthreads()
    ring = shared_address(shared, 0) + warp * (DEPTH * tile_bytes(weight))
    own = ring, lane, warp
    zero = np.int64(0)
    cursor, turn, eaten, weak = (np.int64(-1), zero, zero, zero, zero, zero, zero), zero, zero, zero
    for step in range(steps):
        keep_loop()
        at = row_of(step)
        limit = min(steps, step + LOOK)
        word = zero
        if thread < WORDS and step + LOOK < steps:
            word = table[(first + step + LOOK) * WORDS + thread]
        for _ in range(DEPTH - 1):  # what earlier steps could not fetch, for want of rows
            keep_loop()
            if turn - eaten < DEPTH - 1:
                cursor, turn = produce(cursor, limit, turn, own, rows, weight, scale)
        mode = rows[at + MODE]
        note(stamps, step, 0)
        if mode == ATTENTION:
            attention_step(rows, at, step, meeting, k_like, numbers, sequences, position, sequence, shared, x_at, most,
                           total, values, is_last)  # fmt: skip
        else:
            columns, stages, log2_slices = rows[at + COLUMNS], rows[at + STAGES_OF_ROW], rows[at + LOG2_SLICES]
            slices, normed = np.int64(1) << log2_slices, rows[at + NORMED]
            piece, mine, of_rows = warp & (slices - 1), units_here(rows, at), pairing(rows, at)
            layout = (slices, log2_slices, x_at, sums_at, partial_at, stages, rows[at + EACH], rows[at + OVER], zero, 3)
            out = pointer_at(numbers, rows[at + OUT])
            residual, angles = pointer_at(numbers, rows[at + RESIDUAL]), pointer_at(numbers, rows[at + ANGLES])
            head_dim, interleaved = rows[at + HEAD_DIM], rows[at + INTERLEAVED]
            pairs, padded = rows[at + ALL_PAIRS], stages * numbers_of_stage(weight)
            meet(meeting, step)
            note(stamps, step, 1)
            held, held_too = np.float32(0), np.float32(0)
            if mode == LINEAR and rows[at + ADDED] != 0:
                row = 2 * pair_at(layout, thread >> 1) + (thread & 1)
                if row <= rows[at + LAST]:
                    held = residual[row]
            elif mode == QKV:
                angle = turning(layout, thread, pairs, of_rows, head_dim, inverse_of(head_dim), interleaved)
                held, held_too = angles[angle], angles[angle + (head_dim >> 1)]
            stage_vector(pointer_at(numbers, rows[at + X]), pointer_at(numbers, rows[at + NORM]), normed, columns, padded,
                         weight, shared, x_at, sums_at)  # fmt: skip
            cuda.syncthreads()
            note(stamps, step, 2)
            x_from = place_of_x(weight, shared, x_at, padded, lane)
            zeros = shared_address(shared, x_at + zeros_at(weight, padded))
            local, stage = warp >> log2_slices, piece
            none = np.float32(0)
            sums = none, none, none, none
            while local < mine:
                keep_loop()
                cursor, turn = produce(cursor, limit, turn, own, rows, weight, scale)
                if turn - eaten < DEPTH:
                    weak = np.int64(DEPTH)  # stages that follow were not asked for so long ago as the others
                if weak > 0:
                    await_all()
                    weak -= 1
                else:
                    await_all_but_3()
                if has_scales(weight):
                    cuda.syncwarp()  # lanes copy scales for each other
                if stage < stages:
                    slot = ring + (eaten & (DEPTH - 1)) * tile_bytes(weight)
                    sums = multiply_tile(slot, weight, scale, x_from, zeros, zeros + 32, stage, sums, lane)
                if has_scales(weight):
                    cuda.syncwarp()
                eaten += 1
                stage += slices
                if stage >= stages:
                    whole = join_tile(sums, weight, lane)
                    if lane & 2 == 0:
                        shared[partial_at + (local * slices + piece) * (2 * PAIRS) + 2 * (lane >> 2) + (lane & 1)] = whole
                    sums = none, none, none, none
                    stage = piece
                    local += WARPS >> log2_slices
            cuda.syncthreads()
            note(stamps, step, 3)
            factor = norm_factor(shared, sums_at, normed, columns, f32_of_bits(np.uint32(rows[at + EPS])))
            if mode == LINEAR:
                finish_linear(shared, layout, factor, zero, rows[at + LAST] + 1, residual, rows[at + ADDED], held, out)
            elif mode == GATE_UP:
                finish_gate_up(shared, layout, factor, zero, pairs, out)
            else:
                finish_qkv_rope(
                    shared, layout, factor, of_rows, zero, pairs, angles, held, held_too, out,
                    pointer_at(k_like, rows[at + K_CACHE]), pointer_at(k_like, rows[at + V_CACHE]), zero, head_dim,
                    inverse_of(head_dim), interleaved, rows[at + CONTEXT], rows[at + KV_HEADS], position, sequence,
                )  # fmt: skip
        if thread < WORDS and step + LOOK < steps:
            rows[row_of(step + LOOK) + thread] = word
        cuda.syncthreads()
        note(stamps, step, 4)
        if step + 1 < steps and thread == 0:
            arrive(meeting)
    if thread == 0 and count_up(meeting + 4) == cuda.gridDim.x - 1:  # all others are past their last look
        pointer_at(sequences, meeting)[0] = 0
        pointer_at(sequences, meeting)[1] = 0


@cuda.jit
def chain_grouped_kernel(table, first, steps, meeting, stamps, weight, scale, k_like, numbers, positions, sequences,
                         x_at, sums_at, partial_at):  # fmt: skip
    """A block computes `HEADS` heads of those that share keys."""
    is_last = cuda.shared.array(1, np.int32)
    most = cuda.local.array(HEADS, np.float32)
    total = cuda.local.array(HEADS, np.float32)
    values = cuda.local.array((HEADS, 8), np.float32)
    chain(table, first, steps, address(meeting, 0), stamps, weight, scale, k_like, numbers, positions, sequences, x_at,
          sums_at, partial_at, most, total, values, is_last)  # fmt: skip


@cuda.jit
def chain_single_kernel(table, first, steps, meeting, stamps, weight, scale, k_like, numbers, positions, sequences,
                        x_at, sums_at, partial_at):  # fmt: skip
    """Heads each have keys of their own."""
    is_last = cuda.shared.array(1, np.int32)
    most = cuda.local.array(1, np.float32)
    total = cuda.local.array(1, np.float32)
    values = cuda.local.array((1, 8), np.float32)
    chain(table, first, steps, address(meeting, 0), stamps, weight, scale, k_like, numbers, positions, sequences, x_at,
          sums_at, partial_at, most, total, values, is_last)  # fmt: skip


# How it is launched


def _division(gpu: Gpu, row: Mapping[str, Any]) -> tuple[int, int, int]:
    """(units of a step, stages of a row, warps that share a unit's rows)."""
    units, stages = -(-row["pairs"] // PAIRS), -(-row["w0"].shape[1] // NUMBERS[row["w0"].payload.dtype])
    mine = -(-units // gpu.processors)
    # a stage's time for each stage of the busiest warp, and half of one for each unit's sums to meet
    return units, stages, min((1, 2, 4, 8), key=lambda n: -(-mine // (WARPS // n)) * (-(-stages // n) + 0.5))


def _words(gpu: Gpu, row: Mapping[str, Any]) -> list[int]:
    """A launch's row of the table."""
    words: dict[str, Any] = {"mode": ATTENTION, **row}
    if words["mode"] == ATTENTION:
        groups = row["kv_heads"] * row["subgroups"]
        words["splits"] = max(1, min(row["splits"], gpu.processors // groups))
    else:
        weight = row["w0"]
        for index in range(3):
            matrix = row.get(f"w{index}", weight)
            words[f"w{index}"], words[f"s{index}"] = matrix.payload, matrix.scales
        units, stages, slices = _division(gpu, row)
        words |= {
            "stride": weight.stride, "scale_stride": weight.scale_stride * ITEM_BYTES[weight.scales.dtype],
            "columns": weight.shape[1], "stages": stages, "log2_slices": slices.bit_length() - 1,
            "each": units // gpu.processors, "over": units % gpu.processors,
        }  # fmt: skip

    def word(value: Any) -> int:
        if isinstance(value, Array):
            return value.address
        if isinstance(value, float):
            return int(struct.unpack("<I", struct.pack("<f", value))[0])
        assert isinstance(value, int)
        return value

    return [word(words.get(name, 0)) for name in NAMES]


def _kind(row: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What all rows of a chain must have in common, as far as this one says: types of weights and of the KV cache."""
    found = {}
    if "w0" in row:
        matrices = [row[name] for name in ("w0", "w1", "w2") if name in row]
        found["weights"] = tuple(sorted({f"{m.payload.dtype} {m.scales.dtype} {m.shift} {fits(m)}" for m in matrices}))
    if "k_cache" in row:
        found["cache"] = tuple(sorted({row["k_cache"].dtype, row["v_cache"].dtype}))
        if "shared_by" in row:
            found["heads"] = ("single" if row["shared_by"] == 1 else "grouped",)
    return found


def _layout(gpu: Gpu, rows: Sequence[Mapping[str, Any]]) -> tuple[int, int, int, int]:
    """(x_at, sums_at, partial_at, bytes of shared memory)."""
    x = partial = 0
    area, ring = 0, 0
    for row in rows:
        if "w0" in row:
            payload, (units, _, slices) = row["w0"].payload.dtype, _division(gpu, row)
            x = max(x, x_floats(payload, row["w0"].shape[1]))
            partial = max(partial, 2 * PAIRS * slices * -(-units // gpu.processors))
            ring = WARPS * DEPTH * unit_bytes(payload) // 4
        else:
            numbers, head_dim, lanes = 4 if row["k_cache"].dtype == "f32" else 8, row["head_dim"], row["lanes"]
            groups = WARPS * (32 // lanes)
            area = max(area, STAGES * STAGE_BYTES // 4, HEADS * ((head_dim + 4) * (groups + 1) + groups))
    sums = ring + -(-max(x, area) // 4) * 4
    partial_at = sums + WARPS
    return ring, sums, partial_at, 4 * (partial_at + partial)


@kernel("chain", "cuda", "f32")
def chains(
    gpu: Gpu, launches: Sequence[Launch], take: Callable[[np.ndarray], Array]
) -> list[tuple[int, int, Callable[[int, int, int], Launch]]]:
    """Which launches, of those that follow each other, one kernel can do: (begin, end, launch).

    `take` puts an array into device memory. `launch(first, last, stamps)` is the launch that does those in [begin, end)
    with these numbers; at address `stamps`, if it is not 0, blocks leave times: int64 [step, block, 5], nanoseconds, when
    the block came to the step, when all results before it were there, when x was in shared memory, when all sums were,
    and when it was done.
    """
    found, begin = [], 0
    while begin < len(launches):
        end, kind = begin, {}
        while end < len(launches) and launches[end].row is not None:
            own = _kind(launches[end].row)
            if any(len(types) > 1 or kind.get(name, types) != types for name, types in own.items()):
                break
            if not all(fits(own) for name, own in launches[end].row.items() if name in ("w0", "w1", "w2")):
                break
            kind |= own
            end += 1
        rows = [launch.row for launch in launches[begin:end]]
        room = _layout(gpu, rows)[3] + 8 * ROWS + 64 <= gpu.shared_limit
        if {"weights", "cache", "heads"} <= kind.keys() and room:
            found.append((begin, end, _launcher(gpu, rows, begin, take)))
            begin = end
        else:
            begin += 1
    return found


def _launcher(
    gpu: Gpu, rows: Sequence[Mapping[str, Any]], begin: int, take: Callable[[np.ndarray], Array]
) -> Callable[[int, int, int], Launch]:
    table = take(np.array([_words(gpu, row) for row in rows], np.int64))
    meeting = gpu.zeros(2)
    one = next(row for row in rows if "w0" in row)
    attention = next(row for row in rows if "shared_by" in row)
    x_at, sums_at, partial_at, shared = _layout(gpu, rows)
    function = chain_grouped_kernel if attention["shared_by"] > 1 else chain_single_kernel

    def launch(first: int, last: int, stamps: int = 0) -> Launch:
        arguments = (
            table, first - begin, last - first, meeting, stamps, one["w0"].payload, one["w0"].scales,
            attention["k_cache"], one["x"], attention["positions"], attention["sequences"], x_at, sums_at, partial_at,
        )  # fmt: skip
        return Launch(function, (gpu.processors,), THREADS, arguments, shared, together=True)

    return launch
