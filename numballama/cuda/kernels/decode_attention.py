"""Attention over the KV cache: one query token with all keys it may see, a block for a few heads and part of the keys.

softmax(q · Kᵀ / sqrt(head_dim)) · V, in one pass over keys and values (online softmax: Milakov and Gimelshein, 2018;
Dao et al., FlashAttention, 2022). Keys of one head lie together, so a warp reads them in one stream: a key's numbers
lie 16 bytes a lane on `lanes` neighbouring lanes, and the warp holds 32 / lanes keys at once. Each group of lanes keeps
its own maximum, sum and weighted values; they meet at the end, first in the warp, then in shared memory.

A short context is one block's for each head. A long one is split over blocks, and heads that share keys (grouped
queries) are computed by one, `HEADS` at a time, so that a key is read once for them. The last of the blocks to finish
joins the parts, so no other kernel is needed.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..intrinsics import (
    address,
    await_all,
    await_all_but_1,
    close_copies,
    copy16,
    count_up,
    exp2,
    floats4,
    keep_loop,
    let_successor_start,
    number,
    per_16_bytes,
    shared_address,
    shared_words4,
    store4,
    unpack8,
    wait_for_predecessor,
    words4,
)
from .common import ALL, LOG2_E, at_once, beyond, block_max, block_sum, device, split, warp_max, warp_sum
from .params import ATTENTION_STAGE_BYTES as STAGE_BYTES
from .params import ATTENTION_STAGES as STAGES
from .params import ATTENTION_THREADS as THREADS
from .params import ATTENTION_WARPS as WARPS
from .params import HEADS_PER_BLOCK as HEADS
from .params import MAX_SPLITS as MOST_SPLITS
from .params import MIN_SPLIT_KEYS as LEAST_KEYS
from .params import PLAIN_ATTENTION_THREADS as PLAIN_THREADS
from .params import SPLIT_FROM as ALONE
from .params import SPLIT_WEIGHTS as WEIGHTS

FAR_BELOW = np.float32(-1e30)
"""A maximum of no numbers; finite, so that differences of two are numbers."""


@device
def first_seen(length, window):
    """The first position that the last of `length` sees: `window` positions in all, itself included; all if it is 0."""
    return length - window if 0 < window < length else 0


@device
def fetch_keys(slot, key_at, value_at, apart, wanted, next_wanted):
    """Start copying a lane's 16 bytes of two keys, `apart` bytes from each other, and of their values.

    Zeros stand for those that are not wanted: nobody looks at their addresses.
    """
    count, next_count = 16 if wanted else 0, 16 if next_wanted else 0
    copy16(slot, key_at, count)
    copy16(slot + 16 * THREADS, value_at, count)
    copy16(slot + 32 * THREADS, key_at + apart, next_count)
    copy16(slot + 48 * THREADS, value_at + apart, next_count)
    close_copies()


@device
def place_of_lane(begin, k_cache, head_dim, lanes):
    """(the first of this lane's keys, how far the next is, its first number of each key, whether it has any)"""
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    keys_at_once = 32 // lanes
    d = (lane & (lanes - 1)) * per_16_bytes(k_cache)
    mine = d < head_dim
    return begin + warp * keys_at_once + lane // lanes, WARPS * keys_at_once, d if mine else 0, mine


@device
def fetch_first_keys(cache_at, k_cache, v_cache, begin, known, head_dim, lanes, ring):
    """Fill the ring with the first of the keys [begin, known).

    Returns where the lane's next key and its value lie, and how many bytes apart two of its keys are.
    """
    p, step, d, mine = place_of_lane(begin, k_cache, head_dim, lanes)
    at = cache_at + p * head_dim + d
    key_at, value_at = address(k_cache, at), address(v_cache, at)
    apart = address(k_cache, at + step * head_dim) - key_at
    for turn in range(STAGES):
        keep_loop()
        fetch_keys(ring + turn * STAGE_BYTES, key_at, value_at, apart, mine and p < known, mine and p + step < known)
        p += 2 * step
        key_at += 2 * apart
        value_at += 2 * apart
    return key_at, value_at, apart


@device
def weigh(query, key, next_key, value, next_value, here, next_here, lanes, most, total, values):
    """Two keys more for `most.size` heads, of which a lane has part of the numbers; `here` tells if there are such."""
    for h in range(most.size):
        score, next_score = np.float32(0), np.float32(0)
        for i in range(8):
            score += query[h, i] * key[i]
            next_score += query[h, i] * next_key[i]
        apart = lanes >> 1
        while apart > 0:
            score += cuda.shfl_xor_sync(ALL, score, apart)
            next_score += cuda.shfl_xor_sync(ALL, next_score, apart)
            apart >>= 1
        if not here:
            score = FAR_BELOW
        if not next_here:
            next_score = FAR_BELOW
        higher = max(most[h], max(score, next_score))
        shrink = exp2(most[h] - higher)
        weight = exp2(score - higher) if here else np.float32(0)
        next_weight = exp2(next_score - higher) if next_here else np.float32(0)
        most[h] = higher
        total[h] = total[h] * shrink + (weight + next_weight)
        for i in range(8):
            values[h, i] = values[h, i] * shrink + (weight * value[i] + next_weight * next_value[i])


@device
def attend(q, q_at, heads_here, cache_at, k_cache, v_cache, begin, end, newest, head_dim, lanes, factor, most, total,
           values, ring, following):  # fmt: skip
    """One warp's share of keys [begin, end) for `most.size` heads: their maxima, sums and weighted values, by lane.

    `factor` is log2(e) / sqrt(head_dim): powers are of 2. Keys come through a ring in shared memory, of which a lane
    reads what it copied itself; they were on their way before q was known, but for `newest`, which is the last of
    them, if it is one, and which the first lanes take in the end. Ends behind a barrier.
    """
    numbers, known = per_16_bytes(k_cache), min(end, newest)
    p, step, d, mine = place_of_lane(begin, k_cache, head_dim, lanes)
    key_at, value_at, apart = following
    at = cache_at + newest * head_dim + d
    new_key, new_value = words4(address(k_cache, at)), words4(address(v_cache, at))
    query = cuda.local.array((HEADS, 8), np.float32)
    for h in range(most.size):
        most[h], total[h] = FAR_BELOW, np.float32(0)
        for i in range(8):
            query[h, i], values[h, i] = np.float32(0), np.float32(0)
        if mine and h < heads_here:
            low = floats4(q, q_at + h * head_dim + d)
            for i in range(4):
                query[h, i] = low[i] * factor
            if numbers == 8:
                high = floats4(q, q_at + h * head_dim + d + 4)
                for i in range(4):
                    query[h, 4 + i] = high[i] * factor
    slot, ahead = ring, p + 2 * STAGES * step
    for _ in range(begin, known, 2 * step):
        await_all_but_1()
        key, value = unpack8(k_cache, shared_words4(slot)), unpack8(v_cache, shared_words4(slot + 16 * THREADS))
        next_key = unpack8(k_cache, shared_words4(slot + 32 * THREADS))
        next_value = unpack8(v_cache, shared_words4(slot + 48 * THREADS))
        weigh(query, key, next_key, value, next_value, p < known, p + step < known, lanes, most, total, values)
        fetch_keys(slot, key_at, value_at, apart, mine and ahead < known, mine and ahead + step < known)
        slot = ring + STAGE_BYTES if slot == ring else ring
        p += 2 * step
        ahead += 2 * step
        key_at += 2 * apart
        value_at += 2 * apart
    if known < end and cuda.threadIdx.x < 32:
        key, value = unpack8(k_cache, new_key), unpack8(v_cache, new_value)
        weigh(query, key, key, value, value, cuda.threadIdx.x < lanes, False, lanes, most, total, values)
    await_all()
    cuda.syncthreads()  # `join` writes where the ring is


@device
def join(most, total, values, lanes, shared, head_dim, inverse_head_dim, numbers):
    """Join what the groups of lanes of a block have: head h's maximum, sum and values come into shared memory at
    h · (head_dim + 4).

    Every group writes its values; a warp a head weighs the groups by their maxima; a thread a number adds them up.
    """
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    log2_groups = 0
    while lanes << log2_groups < 32:
        log2_groups += 1
    groups = WARPS << log2_groups
    group = (warp << log2_groups) + (lane >> (5 - log2_groups))
    width = head_dim + 4  # keeps rows 16-byte aligned, and their first numbers in different banks
    rows, weights = most.size * width, most.size * width * (groups + 1)
    d = (lane & (lanes - 1)) * numbers
    for h in range(most.size):
        at = rows + (h * groups + group) * width
        if d < head_dim:
            store4(shared, at + d, values[h, 0], values[h, 1], values[h, 2], values[h, 3])
            if numbers == 8:
                store4(shared, at + d + 4, values[h, 4], values[h, 5], values[h, 6], values[h, 7])
        if d == 0:
            shared[at + head_dim], shared[at + head_dim + 1] = most[h], total[h]
    cuda.syncthreads()
    if warp < most.size:
        higher = FAR_BELOW
        for g in range(lane, groups, 32):
            keep_loop()
            higher = max(higher, shared[rows + (warp * groups + g) * width + head_dim])
        higher = warp_max(higher)
        whole = np.float32(0)
        for g in range(lane, groups, 32):
            keep_loop()
            at = rows + (warp * groups + g) * width + head_dim
            weight = exp2(shared[at] - higher)
            shared[weights + warp * groups + g] = weight
            whole += shared[at + 1] * weight
        whole = warp_sum(whole)
        if lane == 0:
            shared[warp * width + head_dim], shared[warp * width + head_dim + 1] = higher, whole
    cuda.syncthreads()
    for n in range(cuda.threadIdx.x, most.size * head_dim, THREADS):
        keep_loop()
        h, d = split(n, head_dim, inverse_head_dim)
        at, weight_at = rows + h * groups * width + d, weights + h * groups
        value, other = np.float32(0), np.float32(0)
        for g in range(0, groups, 4):
            keep_loop()
            value += shared[at + g * width] * shared[weight_at + g]
            other += shared[at + (g + 1) * width] * shared[weight_at + g + 1]
            value += shared[at + (g + 2) * width] * shared[weight_at + g + 2]
            other += shared[at + (g + 3) * width] * shared[weight_at + g + 3]
        shared[h * width + d] = value + other
    cuda.syncthreads()


@device
def weigh_parts(parts, first, splits, heads_here, used, head_dim, shared):
    """Weights of a head's parts by their maxima, and the sum of their sums, into shared memory; a warp a head, a lane a
    part.
    """
    lane, warp, of_part = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, head_dim + 2
    if warp < heads_here:
        at = (first + warp * splits + lane) * of_part + head_dim
        most, total = FAR_BELOW, np.float32(0)
        if lane < used:
            most, total = parts[at], parts[at + 1]
        weight = exp2(most - warp_max(most))
        total = warp_sum(total * weight)
        shared[WEIGHTS * warp + lane] = weight
        if lane == 0:
            shared[WEIGHTS * warp + MOST_SPLITS] = total
    cuda.syncthreads()


@device
def weighed(parts, first, of_part, shared, weights_at, part, used):
    """A part's number times its weight; 0 for a part that there is not."""
    value = np.float32(0)
    if part < used:
        value = parts[first + part * of_part] * shared[weights_at + part]
    return value


@device
def keys_of_part(length, window, part, splits):
    """(begin, end, parts used): which keys of those that the last of `length` sees are a part's, if part < used."""
    first = first_seen(length, window)
    seen = length - first
    keys, used = seen, 1
    if splits > 1 and seen > ALONE:
        keys = max(LEAST_KEYS, (seen + splits - 1) // splits)
        used = (seen + keys - 1) // keys
    begin = first + part * keys
    return begin, min(length, begin + keys), used


@device
def write_heads(out, parts, counter, first_head, heads_here, part, used, splits, head_dim, inverse_head_dim, shared,
                is_last):  # fmt: skip
    """What `join` left: the result, or one of several parts, which the last block to come here joins."""
    width, of_part = head_dim + 4, head_dim + 2
    if used > 1:
        for n in range(cuda.threadIdx.x, heads_here * of_part, THREADS):
            keep_loop()
            h = n // of_part
            i = n - h * of_part
            parts[((first_head + h) * splits + part) * of_part + i] = shared[h * width + i]
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            is_last[0] = count_up(counter) == used - 1
        cuda.syncthreads()
        if is_last[0]:
            weigh_parts(parts, first_head * splits, splits, heads_here, used, head_dim, shared)
    if used == 1 or is_last[0]:
        for n in range(cuda.threadIdx.x, heads_here * head_dim, THREADS):
            keep_loop()
            h, d = split(n, head_dim, inverse_head_dim)
            value, whole = shared[h * width + d], shared[h * width + head_dim + 1]
            if used > 1:
                first, weights_at = (first_head + h) * splits * of_part + d, WEIGHTS * h
                value, whole = np.float32(0), shared[weights_at + MOST_SPLITS]
                for i in range(0, used, 8):
                    keep_loop()
                    for j in range(8):  # written out by the compiler: eight loads under way at once
                        value += weighed(parts, first, of_part, shared, weights_at, i + j, used)
            out[(first_head + h) * head_dim + d] = value / whole


@device
def attention(q, k_cache, v_cache, newest, sequence, out, parts, counters, kv_heads, shared_by, context, head_dim,
              window, lanes, subgroups, inverse_subgroups, inverse_head_dim, most, total, values, is_last):  # fmt: skip
    """The whole of it, `most.size` heads a block; blockIdx.x counts groups of heads, blockIdx.z parts of the keys."""
    shared = cuda.shared.array(0, np.float32)
    t, group, heads_a_block, splits = cuda.blockIdx.y, cuda.blockIdx.x, most.size, cuda.gridDim.z
    kv_head, sub = split(group, subgroups, inverse_subgroups)
    first_head = t * kv_heads * shared_by + kv_head * shared_by + sub * heads_a_block
    heads_here = min(heads_a_block, shared_by - sub * heads_a_block)
    begin, end, used = keys_of_part(newest + 1, window, cuda.blockIdx.z, splits)
    if cuda.blockIdx.z < used:
        cache_at = (sequence * kv_heads + kv_head) * context * head_dim
        factor = LOG2_E / np.float32(math.sqrt(np.float32(head_dim)))
        ring = shared_address(shared, 4 * cuda.threadIdx.x)
        if cuda.gridDim.y > 1:
            wait_for_predecessor()  # it writes several keys, and some may be this token's
        known = min(end, newest)
        following = fetch_first_keys(cache_at, k_cache, v_cache, begin, known, head_dim, lanes, ring)
        wait_for_predecessor()
        attend(q, first_head * head_dim, heads_here, cache_at, k_cache, v_cache, begin, end, newest, head_dim, lanes,
               factor, most, total, values, ring, following)  # fmt: skip
        let_successor_start()  # not before: its copies would stand in the way of this kernel's loads
        join(most, total, values, lanes, shared, head_dim, inverse_head_dim, per_16_bytes(k_cache))
        counter = t * cuda.gridDim.x + group
        write_heads(out, parts, address(counters, counter), first_head, heads_here, cuda.blockIdx.z, used, splits,
                    head_dim, inverse_head_dim, shared, is_last)  # fmt: skip
        if used > 1 and is_last[0] and cuda.threadIdx.x == 0:
            counters[counter] = 0


@at_once(2)
@cuda.jit
def attention_grouped_kernel(tokens, q, k_cache, v_cache, positions, sequences, out, partials, counters, kv_heads,
                             shared_by, context, head_dim, window, lanes, subgroups, inverse_subgroups,
                             inverse_head_dim):  # fmt: skip
    """Heads that share keys, `HEADS` a block: for many keys, which are read once for them."""
    if beyond(tokens):
        return
    is_last = cuda.shared.array(1, np.int32)
    newest, sequence = positions[cuda.blockIdx.y], sequences[cuda.blockIdx.y]
    most = cuda.local.array(HEADS, np.float32)
    total = cuda.local.array(HEADS, np.float32)
    values = cuda.local.array((HEADS, 8), np.float32)
    attention(q, k_cache, v_cache, newest, sequence, out, partials, counters, kv_heads, shared_by, context, head_dim,
              window, lanes, subgroups, inverse_subgroups, inverse_head_dim, most, total, values, is_last)  # fmt: skip


@at_once(2)
@cuda.jit
def attention_single_kernel(tokens, q, k_cache, v_cache, positions, sequences, out, partials, counters, kv_heads,
                            shared_by, context, head_dim, window, lanes, subgroups, inverse_subgroups,
                            inverse_head_dim):  # fmt: skip
    """A head a block: for few keys, and for heads that share none."""
    if beyond(tokens):
        return
    is_last = cuda.shared.array(1, np.int32)
    most = cuda.local.array(1, np.float32)
    total = cuda.local.array(1, np.float32)
    values = cuda.local.array((1, 8), np.float32)
    attention(q, k_cache, v_cache, positions[cuda.blockIdx.y], sequences[cuda.blockIdx.y], out, partials, counters,
              kv_heads, shared_by, context, head_dim, window, lanes, subgroups, inverse_subgroups, inverse_head_dim,
              most, total, values, is_last)  # fmt: skip


@cuda.jit
def attention_plain_kernel(tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, shared_by, context,
                           head_dim, window):  # fmt: skip
    """Attention for heads whose numbers do not come in 16 bytes: a block a head; a thread a key, then a number."""
    if beyond(tokens):
        return
    wait_for_predecessor()
    let_successor_start()
    shared = cuda.shared.array(0, np.float32)  # weights of a tile of keys, then the values so far
    scratch = cuda.shared.array(32, np.float32)
    t, head, thread = cuda.blockIdx.y, cuda.blockIdx.x, cuda.threadIdx.x
    q_at = (t * kv_heads * shared_by + head) * head_dim
    cache_at = (sequences[t] * kv_heads + head // shared_by) * context * head_dim
    keys, values = address(k_cache, cache_at), address(v_cache, cache_at)
    length = positions[t] + 1
    factor = LOG2_E / np.float32(math.sqrt(np.float32(head_dim)))
    most, total = FAR_BELOW, np.float32(0)
    for d in range(thread, head_dim, PLAIN_THREADS):
        shared[PLAIN_THREADS + d] = 0
    for first in range(first_seen(length, window), length, PLAIN_THREADS):
        score = FAR_BELOW
        if first + thread < length:
            score = np.float32(0)
            for d in range(head_dim):
                score += q[q_at + d] * number(k_cache, keys, (first + thread) * head_dim + d)
            score *= factor
        higher = max(most, block_max(score, scratch))
        weight = exp2(score - higher) if first + thread < length else np.float32(0)
        shrink = exp2(most - higher)
        total = total * shrink + block_sum(weight, scratch)
        shared[thread] = weight
        most = higher
        cuda.syncthreads()
        for d in range(thread, head_dim, PLAIN_THREADS):
            value = shared[PLAIN_THREADS + d] * shrink
            for p in range(min(PLAIN_THREADS, length - first)):
                value += shared[p] * number(v_cache, values, (first + p) * head_dim + d)
            shared[PLAIN_THREADS + d] = value
        cuda.syncthreads()
    for d in range(thread, head_dim, PLAIN_THREADS):
        out[q_at + d] = shared[PLAIN_THREADS + d] / total


# The operators as the graph declares them


@cuda.jit
def attention_scores_kernel(tokens, q, k_cache, positions, sequences, out, kv_heads, shared_by, context, head_dim,
                            window):  # fmt: skip
    if beyond(tokens):
        return
    wait_for_predecessor()
    let_successor_start()
    t, head = cuda.blockIdx.y, cuda.blockIdx.x
    heads = kv_heads * shared_by
    keys = address(k_cache, (sequences[t] * kv_heads + head // shared_by) * context * head_dim)
    factor = np.float32(1) / np.float32(math.sqrt(np.float32(head_dim)))
    for p in range(cuda.threadIdx.x, context, THREADS):
        score = np.float32(-np.inf)
        if first_seen(positions[t] + 1, window) <= p <= positions[t]:
            score = np.float32(0)
            for d in range(head_dim):
                score += q[(t * heads + head) * head_dim + d] * number(k_cache, keys, p * head_dim + d)
            score *= factor
        out[(t * heads + head) * context + p] = score


@cuda.jit
def softmax_kernel(tokens, x, out, columns):
    """exp(x) / sum(exp(x)), shifted by the maximum so that no exponential overflows. A block a row."""
    if beyond(tokens):
        return
    wait_for_predecessor()
    let_successor_start()
    scratch = cuda.shared.array(32, np.float32)
    row = (cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x) * columns
    most = np.float32(-np.inf)
    for i in range(cuda.threadIdx.x, columns, THREADS):
        most = max(most, x[row + i])
    most = block_max(most, scratch)
    total = np.float32(0)
    for i in range(cuda.threadIdx.x, columns, THREADS):
        power = exp2((x[row + i] - most) * LOG2_E)
        total += power
        out[row + i] = power
    total = block_sum(total, scratch)
    for i in range(cuda.threadIdx.x, columns, THREADS):
        out[row + i] /= total


@cuda.jit
def attention_values_kernel(tokens, weights, v_cache, positions, sequences, out, kv_heads, shared_by, context,
                            head_dim, window):  # fmt: skip
    if beyond(tokens):
        return
    wait_for_predecessor()
    let_successor_start()
    t, head = cuda.blockIdx.y, cuda.blockIdx.x
    row = t * kv_heads * shared_by + head
    values = address(v_cache, (sequences[t] * kv_heads + head // shared_by) * context * head_dim)
    for d in range(cuda.threadIdx.x, head_dim, THREADS):
        total = np.float32(0)
        for p in range(first_seen(positions[t] + 1, window), positions[t] + 1):
            total += weights[row * context + p] * number(v_cache, values, p * head_dim + d)
        out[row * head_dim + d] = total
