"""Decode attention: one query token against the keys and values that its sequence has in the KV cache.

out = softmax(q · Kᵀ / sqrt(head_dim)) · V for each head, in one pass over keys and values (online softmax: Milakov and
Gimelshein, 2018; Dao et al., FlashAttention, 2022). Shapes: q and out [T, n_heads · head_dim] in float32, caches
[pages, n_kv_heads, page, head_dim] in float32, float16, bfloat16 or q8_0 (int8 quants, and behind
them all a float16 scale for each 32 elements of a head).

Data layout. The keys of one head in a page are contiguous. A key is spread over `lanes` neighbouring lanes, 16 bytes
each, and a warp holds 32 / lanes keys at once. A lane looks up the page of its next key while it computes with one
before it. Each such group of lanes keeps a running maximum, sum of exponentials and weighted sum of values; groups are
merged at the end, those of a warp by shuffles, the warps in shared memory.

Why. The step reads 2 · length · head_dim elements per KV head and does little arithmetic, so bandwidth is the floor:
with 8 KV heads of 128 float16, a length of 8,192 is 34 MB per layer, 7 µs at 4.8 TB/s. Hence:

- Keys come through a ring in shared memory by asynchronous copies that start before q is known, all but the token's
  own one.
- A short context has one block per head. A long context is split over blocks (split-K, as Flash-Decoding), and query
  heads that share a KV head are computed `HEADS_PER_BLOCK` at a time, so that a key is read once for them. The block
  that finishes last merges the splits; no second kernel is launched.

`rows_attention` does the same for many rows.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..arithmetic import div_full, ex2_approx, ex2_approx_ftz, float_as_uint, mad_wide_s32, s32, uint_as_float
from ..intrinsics import (
    address,
    atom_add_1,
    cp_async_commit,
    cp_async_wait_all,
    cp_async_wait_group,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_shared_u32,
    ld_shared_v4_f32,
    ld_shared_v4_u32,
    ld_v4_f32,
    no_unroll,
    shared_address,
    st_shared_u32,
)
from ..mma import st_shared_v4_u32
from ..quant_traits import per_16_bytes
from .common import (
    FULL_MASK,
    device,
    fast_divmod,
    first_visible,
    launch_bounds,
)
from .kv_source import elements_of, fetch_16_bytes, page_of, source_of_keys
from .params import ATTENTION_STAGE_BYTES as STAGE_BYTES
from .params import ATTENTION_STAGES as STAGES
from .params import ATTENTION_THREADS as THREADS
from .params import ATTENTION_WARPS as WARPS
from .params import HEADS_PER_BLOCK, MAX_SPLITS, MIN_SPLIT_KEYS, SPLIT_FROM, SPLIT_WEIGHTS
from .reduce import warp_max, warp_sum

RING_KEYS = 2 * STAGES
"""Keys of a group of lanes that the ring has room for."""
LOWEST_SCORE = np.float32(-1e30)
"""Maximum of no scores. Finite, so that the difference of two is 0, not NaN."""
NO_SCORE = np.float32(-np.inf)
"""Score of a key that does not exist: its exponential is 0 whatever the maximum."""


@device
def fetch_key(slot, source, k_cache, v_cache, p, page, wanted):
    """Start copying this lane's 16 bytes of the key at position `p`, in page `page`, and of its value to `slot`.

    Zeros are written for a key that is not wanted; its address is not read.
    """
    keys, values = source[6:8]
    fetch_16_bytes(slot, k_cache, keys, source, page, p, wanted)
    fetch_16_bytes(s32(slot + 16 * THREADS), v_cache, values, source, page, p, wanted)


@device
def lane_position(begin, k_cache, head_dim, lanes):
    """This lane's share of the keys from `begin` on: (first key, distance to the next key, first element of each key,
    whether it has any). `head_dim` may be smaller than the lanes have room for.
    """
    # `lanes` is a power of two: groups of lanes are numbered through all warps
    log2_lanes = s32(cuda.popc(s32(lanes - 1)))
    d = s32((cuda.threadIdx.x & (lanes - 1)) * per_16_bytes(k_cache))
    has_elements = d < head_dim
    p = s32(begin + (cuda.threadIdx.x >> log2_lanes))
    return p, s32(THREADS >> log2_lanes), d if has_elements else s32(0), has_elements


@device
def prefetch_keys(source, k_cache, v_cache, p, step, has_elements, cached_end, left_out, ring):
    """Start copying the lane's first keys and values before `cached_end` into all stages of the ring, from its key at
    position `p` on, but not the one at `left_out`. The second stage is still open: its group takes more copies.
    """
    pages = cuda.local.array(RING_KEYS, np.int32)
    for key in range(RING_KEYS):  # all look-ups before the first copy: a copy waits for its own
        pages[key] = page_of(source, s32(p + key * step), has_elements and s32(p + key * step) < cached_end)
    for key in range(RING_KEYS):
        if key == 2:
            cp_async_commit()
        if p != left_out:
            fetch_key(s32(ring + key * 32 * THREADS), source, k_cache, v_cache, p, pages[key],
                      has_elements and p < cached_end)  # fmt: skip
        p = s32(p + step)


@device
def online_softmax_update(query, key, next_key, value, next_value, valid, next_valid, lanes, max_score, exp_sum, acc):
    """Add two keys and their values to the running softmax of `max_score.size` heads.

    A lane has part of each key's elements, so scores are summed over the key's lanes. `valid` and `next_valid` tell
    whether the keys exist.
    """
    scores = cuda.local.array((HEADS_PER_BLOCK, 2), np.float32)
    for h in range(max_score.size):
        scores[h, 0], scores[h, 1] = np.float32(0), np.float32(0)
        for i in range(8):
            scores[h, 0] += query[h, i] * key[i]
            scores[h, 1] += query[h, i] * next_key[i]
    for log2 in range(4, -1, -1):  # unrolled by the compiler: shuffles of all heads side by side
        if lanes >> log2 > 1:
            for h in range(max_score.size):
                scores[h, 0] += cuda.shfl_xor_sync(FULL_MASK, scores[h, 0], 1 << log2)
                scores[h, 1] += cuda.shfl_xor_sync(FULL_MASK, scores[h, 1], 1 << log2)
    for h in range(max_score.size):
        score, next_score = scores[h, 0], scores[h, 1]
        if not valid:
            score = NO_SCORE
        if not next_valid:
            next_score = NO_SCORE
        new_max = max(max_score[h], max(score, next_score))
        rescale = ex2_approx_ftz(max_score[h] - new_max)
        weight, next_weight = ex2_approx_ftz(score - new_max), ex2_approx_ftz(next_score - new_max)
        max_score[h] = new_max
        exp_sum[h] = exp_sum[h] * rescale + (weight + next_weight)
        for i in range(8):
            acc[h, i] = acc[h, i] * rescale + (weight * value[i] + next_weight * next_value[i])


@device
def attend_keys(q, q_at, heads_here, source, k_cache, v_cache, begin, end, head_dim, lanes, factor, max_score, exp_sum,
                acc, ring):  # fmt: skip
    """Attend to this warp's share of keys [begin, end) for `max_score.size` heads. There is at least one.

    Leaves each lane's maximum, sum of exponentials and weighted values in `max_score`, `exp_sum` and `acc`. `factor` is
    log2(e) / sqrt(head_dim), since exponentials are powers of 2. A lane reads from the ring only what it copied itself,
    so no barrier is needed.
    """
    p, step, d, has_elements = lane_position(begin, k_cache, head_dim, lanes)
    odd = s32((p * s32((head_dim + 31) >> 5) + s32(d >> 5)) & 1)  # of all of the lane's keys: `step` is even
    query = cuda.local.array((HEADS_PER_BLOCK, 8), np.float32)
    for h in range(max_score.size):
        max_score[h], exp_sum[h] = LOWEST_SCORE, np.float32(0)
        for i in range(8):
            query[h, i], acc[h, i] = np.float32(0), np.float32(0)
        if has_elements and h < heads_here:
            at = s32(q_at + h * head_dim + d)
            low = ld_v4_f32(q, at)
            for i in range(4):
                query[h, i] = low[i] * factor
            if per_16_bytes(k_cache) == 8:
                high = ld_v4_f32(q, at + 4)
                for i in range(4):
                    query[h, 4 + i] = high[i] * factor
    slot, ahead, left = ring, s32(p + RING_KEYS * step), s32(end - begin)
    stage_keys, ring_keys = s32(2 * step), s32(RING_KEYS * step)
    page, next_page = s32(0), s32(0)
    while left > 0:
        more = left > ring_keys  # for all warps: most contexts end before a stage is used again
        if more:
            page = page_of(source, ahead, has_elements and ahead < end)
            next_page = page_of(source, s32(ahead + step), has_elements and s32(ahead + step) < end)
        if left > stage_keys:
            cp_async_wait_group(1)
        else:
            cp_async_wait_all()
        key = elements_of(k_cache, ld_shared_v4_u32(slot), odd)
        value = elements_of(v_cache, ld_shared_v4_u32(s32(slot + 16 * THREADS)), odd)
        next_key = elements_of(k_cache, ld_shared_v4_u32(s32(slot + 32 * THREADS)), odd)
        next_value = elements_of(v_cache, ld_shared_v4_u32(s32(slot + 48 * THREADS)), odd)
        online_softmax_update(query, key, next_key, value, next_value, p < end, s32(p + step) < end, lanes, max_score,
                              exp_sum, acc)  # fmt: skip
        if more:
            fetch_key(slot, source, k_cache, v_cache, ahead, page, has_elements and ahead < end)
            fetch_key(s32(slot + 32 * THREADS), source, k_cache, v_cache, s32(ahead + step), next_page,
                      has_elements and s32(ahead + step) < end)  # fmt: skip
            cp_async_commit()
        slot = s32(ring + STAGE_BYTES) if slot == ring else ring
        p, ahead, left = s32(p + stage_keys), s32(ahead + stage_keys), s32(left - stage_keys)


@device
def element_of(n, head_dim, heads):
    """(head, element of it) of element `n` of a block's `heads` heads, a constant: of one head there is nothing to
    compute.
    """
    h, d = s32(0), s32(n)
    for _ in range(1, heads):
        if d >= head_dim:
            h, d = s32(h + 1), s32(d - head_dim)
    return h, d


@device
def merge_warp(max_score, exp_sum, acc, lanes):
    """Merge the warp's groups of lanes: then each of them has the warp's maximum, sum and values."""
    offset = lanes
    while offset < 32:
        no_unroll()
        for h in range(max_score.size):
            new_max = max(max_score[h], cuda.shfl_xor_sync(FULL_MASK, max_score[h], offset))
            weight = ex2_approx_ftz(max_score[h] - new_max)
            max_score[h], exp_sum[h] = new_max, exp_sum[h] * weight
            exp_sum[h] += cuda.shfl_xor_sync(FULL_MASK, exp_sum[h], offset)
            for i in range(8):
                acc[h, i] *= weight
                acc[h, i] += cuda.shfl_xor_sync(FULL_MASK, acc[h, i], offset)
        offset = s32(2 * offset)


@device
def put_results(max_score, exp_sum, acc, ring, shared_at, n_elements):
    """Write the warp's results to shared memory: a lane's values to the lane's own places in the ring, so that no
    barrier is needed before; the maximum and the sum behind the ring. Ends with a barrier.
    """
    thread = s32(cuda.threadIdx.x)
    stats = s32(shared_at + STAGES * STAGE_BYTES + 8 * (thread >> 5))
    for h in range(max_score.size):
        slot = s32(ring + 32 * THREADS * h)
        st_shared_f32x4(slot, acc[h, 0], acc[h, 1], acc[h, 2], acc[h, 3])
        if n_elements == 8:
            st_shared_f32x4(s32(slot + 16 * THREADS), acc[h, 4], acc[h, 5], acc[h, 6], acc[h, 7])
        if thread & 31 == 0:
            at = s32(stats + 8 * WARPS * h)
            st_shared_u32(at, float_as_uint(max_score[h]))
            st_shared_u32(s32(at + 4), float_as_uint(exp_sum[h]))
    cuda.syncthreads()


@device
def st_shared_f32x4(at, a, b, c, d):
    """Write four float32 to a 16-byte aligned shared address."""
    st_shared_v4_u32(at, float_as_uint(a), float_as_uint(b), float_as_uint(c), float_as_uint(d))


@device
def merged_element(shared_at, h, d, n_elements):
    """(element `d` of head `h`, the head's maximum, its sum of exponentials), of all warps. Each thread computes the
    warps' weights: sharing them would take another barrier.
    """
    at = s32(shared_at + 32 * THREADS * h + 4 * d)
    if n_elements == 8:
        at = s32(shared_at + 32 * THREADS * h + 4 * THREADS * (d & 4) + 16 * (d >> 3) + 4 * (d & 3))
    stats = s32(shared_at + STAGES * STAGE_BYTES + 8 * WARPS * h)
    maxima, sums = cuda.local.array(WARPS, np.float32), cuda.local.array(WARPS, np.float32)
    new_max, new_max2 = LOWEST_SCORE, LOWEST_SCORE
    for warp in range(0, WARPS, 2):
        maxima[warp], sums[warp], maxima[warp + 1], sums[warp + 1] = ld_shared_v4_f32(s32(stats + 8 * warp))
        new_max, new_max2 = max(new_max, maxima[warp]), max(new_max2, maxima[warp + 1])
    new_max = max(new_max, new_max2)
    value, all_sum, value2, all_sum2 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for warp in range(0, WARPS, 2):
        weight, weight2 = ex2_approx_ftz(maxima[warp] - new_max), ex2_approx_ftz(maxima[warp + 1] - new_max)
        value += weight * uint_as_float(ld_shared_u32(s32(at + 512 * warp)))
        value2 += weight2 * uint_as_float(ld_shared_u32(s32(at + 512 * warp + 512)))
        all_sum += weight * sums[warp]
        all_sum2 += weight2 * sums[warp + 1]
    return value + value2, new_max, all_sum + all_sum2


@device
def weights_of_head(partials, first, splits, h, splits_used, head_dim, shared):
    """What `split_weights` writes for head `h`, by one warp."""
    lane = s32(cuda.threadIdx.x & 31)
    at = mad_wide_s32(s32(first + h * splits + lane), s32(head_dim + 2), head_dim)
    max_score, exp_sum = LOWEST_SCORE, np.float32(0)
    if lane < splits_used:
        max_score, exp_sum = partials[at], partials[at + 1]
    weight = ex2_approx(max_score - warp_max(max_score))
    exp_sum = warp_sum(exp_sum * weight)
    shared[SPLIT_WEIGHTS * h + lane] = weight
    if lane == 0:
        shared[SPLIT_WEIGHTS * h + MAX_SPLITS] = exp_sum


@device
def split_weights(partials, first, splits, heads_here, splits_used, head_dim, shared):
    """Write the weights of each head's splits, and the total of their weighted sums of exponentials, to shared memory.

    One warp per head, one lane per split. Element SPLIT_WEIGHTS · h + i is the weight of split i, and element
    SPLIT_WEIGHTS · h + MAX_SPLITS the total.
    """
    warp = cuda.threadIdx.x >> 5
    if warp < heads_here:
        weights_of_head(partials, first, splits, warp, splits_used, head_dim, shared)
    cuda.syncthreads()


@device
def weighted_element(partials, first, part_size, shared, weights_at, part, splits_used):
    """An element of a split times the split's weight; 0 for a split that is not used."""
    value = np.float32(0)
    if part < splits_used:
        value = partials[mad_wide_s32(part, part_size, first)] * shared[s32(weights_at + part)]
    return value


@device
def ceil_quotient(number, divisor):
    """number / divisor of positive int32, rounded up. An unsigned division is much shorter than a signed one."""
    return s32(np.uint32(number + divisor - 1) // np.uint32(divisor))


@device
def split_range(length, window, part, splits):
    """(begin, end, splits used): the keys of split number `part`, for a token that is the last of `length`. A split
    beyond `splits used` has none.
    """
    first = s32(first_visible(length, window))
    seen = s32(length - first)
    keys, splits_used = seen, s32(1)
    if splits > 1 and seen > SPLIT_FROM:
        keys = s32(max(MIN_SPLIT_KEYS, ceil_quotient(seen, splits)))
        splits_used = ceil_quotient(seen, keys)
    begin = s32(first + part * keys)
    return begin, s32(min(length, begin + keys)), splits_used


@device
def write_output(out, partials, counter, first_head, heads_here, part, splits_used, splits, head_dim, heads, shared,
                 shared_at, n_elements, is_last):  # fmt: skip
    """Write the result of all warps, or this block's split of it. The last block to finish merges the splits."""
    n, here = s32(cuda.threadIdx.x), s32(heads_here * head_dim)
    if splits_used == 1:
        while n < here:
            no_unroll()
            h, d = element_of(n, head_dim, heads)
            value, _, all_sum = merged_element(shared_at, h, d, n_elements)
            out[s32((first_head + h) * head_dim + d)] = div_full(value, all_sum)
            n = s32(n + THREADS)
        return
    while n < here:
        no_unroll()
        h, d = element_of(n, head_dim, heads)
        value, max_score, all_sum = merged_element(shared_at, h, d, n_elements)
        at = mad_wide_s32(s32((first_head + h) * splits + part), s32(head_dim + 2), d)
        partials[at] = value
        if d == 0:
            partials[at + head_dim], partials[at + head_dim + 1] = max_score, all_sum
        n = s32(n + THREADS)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        is_last[0] = atom_add_1(counter) == splits_used - 1
    cuda.syncthreads()
    if is_last[0]:
        merge_splits(out, partials, first_head, heads_here, splits_used, splits, head_dim, heads, shared)


@device
def merge_splits(out, partials, first_head, heads_here, splits_used, splits, head_dim, heads, shared):
    """Write the result of all splits."""
    split_weights(partials, s32(first_head * splits), splits, heads_here, splits_used, head_dim, shared)
    part_size, here = s32(head_dim + 2), s32(heads_here * head_dim)
    n = s32(cuda.threadIdx.x)
    while n < here:
        no_unroll()
        h, d = element_of(n, head_dim, heads)
        first, weights_at = mad_wide_s32(s32((first_head + h) * splits), part_size, d), s32(SPLIT_WEIGHTS * h)
        value, i = np.float32(0), s32(0)
        while i < splits_used:
            no_unroll()
            for j in range(8):  # the compiler unrolls this: eight loads are in flight
                value += weighted_element(partials, first, part_size, shared, weights_at, s32(i + j), splits_used)
            i = s32(i + 8)
        out[s32((first_head + h) * head_dim + d)] = div_full(value, shared[weights_at + MAX_SPLITS])
        n = s32(n + THREADS)


@device
def attend_split(q, k_cache, v_cache, pages, t, position, sequence, out, partials, counters, kv_heads, shared_by,
                 head_dim, lanes, subgroups, inverse_subgroups, factor, begin, end, part, splits, splits_used,
                 early, max_score, exp_sum, acc, is_last):  # fmt: skip
    """Attention of the block's heads of row `t` over keys [begin, end), split number `part` of `splits_used`.

    `splits` is the number of splits that `partials` has room for. `early`: no kernel of this run writes keys that the
    token sees, but its own.
    """
    shared = cuda.shared.array(0, np.float32)
    group, heads_a_block = s32(cuda.blockIdx.x), max_score.size
    position, head_dim, lanes = s32(position), s32(head_dim), s32(lanes)
    kv_heads, shared_by, splits = s32(kv_heads), s32(shared_by), s32(splits)
    kv_head, sub = fast_divmod(group, subgroups, inverse_subgroups)
    kv_head, sub = s32(kv_head), s32(sub)
    first_head = s32((t * kv_heads + kv_head) * shared_by + sub * heads_a_block)
    heads_here = s32(1)
    if heads_a_block > 1:
        heads_here = s32(min(heads_a_block, shared_by - sub * heads_a_block))
    shared_at = s32(shared_address(shared, 0))
    ring = s32(shared_at + 16 * cuda.threadIdx.x)
    p, step, d, has_elements = lane_position(begin, k_cache, head_dim, lanes)
    source = source_of_keys(pages, sequence, kv_head, kv_heads, k_cache, v_cache, head_dim, d)
    # the token's own key is written by the kernel before this one: it is copied when that has finished
    cached_end, left_out, own = end, s32(-1), False
    if early:
        cached_end, apart = s32(min(end, position)), s32(position - p)
        left_out = position if has_elements and position < end else s32(-1)
        own = left_out >= 0 and 0 <= apart < RING_KEYS * step and apart & (step - 1) == 0
    else:
        griddepcontrol_wait()
    new_page = page_of(source, position, own)
    prefetch_keys(source, k_cache, v_cache, p, step, has_elements, cached_end, left_out, ring)
    if early:
        griddepcontrol_wait()
        if own:  # every `step` keys are the next place of the ring
            new_slot = s32(ring + 32 * lanes * s32(position - p))
            fetch_key(new_slot, source, k_cache, v_cache, position, new_page, True)
    cp_async_commit()
    attend_keys(q, s32(first_head * head_dim), heads_here, source, k_cache, v_cache, begin, end, head_dim, lanes,
                factor, max_score, exp_sum, acc, ring)  # fmt: skip
    griddepcontrol_launch_dependents()  # not earlier: the next kernel's copies would compete with this one's loads
    merge_warp(max_score, exp_sum, acc, lanes)
    put_results(max_score, exp_sum, acc, ring, shared_at, per_16_bytes(k_cache))
    counter = t * cuda.gridDim.x + group
    write_output(out, partials, address(counters, counter), first_head, heads_here, part, splits_used, splits, head_dim,
                 heads_a_block, shared, shared_at, per_16_bytes(k_cache), is_last)  # fmt: skip
    if splits_used > 1 and is_last[0] and cuda.threadIdx.x == 0:
        counters[counter] = 0


@device
def decode_attention(q, k_cache, v_cache, pages, position, sequence, out, partials, counters, kv_heads, shared_by,
                     head_dim, window, lanes, subgroups, inverse_subgroups, factor, max_score, exp_sum, acc,
                     is_last):  # fmt: skip
    """The body of the kernels for a token, with `max_score.size` heads per block.

    blockIdx.x is a group of heads, blockIdx.z the split of the keys.
    """
    splits, part = s32(cuda.gridDim.z), s32(cuda.blockIdx.z)
    begin, end, splits_used = split_range(s32(position + 1), s32(window), part, splits)
    if part < splits_used:
        attend_split(q, k_cache, v_cache, pages, 0, position, sequence, out, partials, counters, kv_heads, shared_by,
                     head_dim, lanes, subgroups, inverse_subgroups, factor, begin, end, part,
                     splits, splits_used, True, max_score, exp_sum, acc, is_last)  # fmt: skip


@launch_bounds(min_blocks=2)
@cuda.jit
def attention_grouped_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                             scales_at, out, partials, counters, kv_heads, shared_by, head_dim, window, lanes,
                             subgroups, inverse_subgroups, factor):  # fmt: skip
    """One token. Each block computes `HEADS_PER_BLOCK` query heads of one KV head and reads a key once. For long
    contexts.
    """
    is_last = cuda.shared.array(1, np.int32)
    max_score = cuda.local.array(HEADS_PER_BLOCK, np.float32)
    exp_sum = cuda.local.array(HEADS_PER_BLOCK, np.float32)
    acc = cuda.local.array((HEADS_PER_BLOCK, 8), np.float32)
    pages = page_table, table_stride, log2_page, scales_at
    decode_attention(q, k_cache, v_cache, pages, positions[0], sequences[0], out, partials, counters, kv_heads,
                     shared_by, head_dim, window, lanes, subgroups, inverse_subgroups, factor, max_score,
                     exp_sum, acc, is_last)  # fmt: skip


@launch_bounds(min_blocks=2)
@cuda.jit
def attention_single_kernel(tokens, q, k_cache, v_cache, positions, sequences, page_table, table_stride, log2_page,
                            scales_at, out, partials, counters, kv_heads, shared_by, head_dim, window, lanes, subgroups,
                            inverse_subgroups, factor):  # fmt: skip
    """One token. Each block computes one head. For short contexts, and for heads that share no keys."""
    is_last = cuda.shared.array(1, np.int32)
    max_score = cuda.local.array(1, np.float32)
    exp_sum = cuda.local.array(1, np.float32)
    acc = cuda.local.array((1, 8), np.float32)
    pages = page_table, table_stride, log2_page, scales_at
    decode_attention(q, k_cache, v_cache, pages, positions[0], sequences[0], out, partials, counters, kv_heads,
                     shared_by, head_dim, window, lanes, subgroups, inverse_subgroups, factor, max_score,
                     exp_sum, acc, is_last)  # fmt: skip
