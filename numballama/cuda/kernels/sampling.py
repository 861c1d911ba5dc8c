"""Sampling: from rows of logits to tokens, and from a token to the next step's input, on the device without the host.

Input: float32 logits [R, vocab], the slot of each row, and the records of a `sampler_table.DeviceSamplerTable`. Output:
a token id per row, -1 if the row's logits hold a NaN or cannot be drawn from, and log probabilities.

One block of 1,024 threads makes three passes over a row of logits (512 KB for 128,256 tokens, which fit the L2 cache):
the largest logit; a histogram of the distances from it, which tells what top-k and top-p can keep; the candidates. A
greedy row needs the first pass only.

Nothing is sorted. The rank of a candidate among a few is counted, and probability masses are sums of integers. The
token with the largest logit / temperature plus Gumbel noise is a draw from the softmax (Gumbel, 1954) and needs no
order. So the result does not depend on the order in which threads run, nor on other rows.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ...sampling import (
    FREQUENCY_PENALTY,
    GOLDEN,
    HAS_COUNTS,
    HAS_MASK,
    MAX_LOGPROBS,
    MIN_P,
    MIN_TOKENS,
    N_BIAS,
    N_CANDIDATES,
    N_LOGPROBS,
    N_STOP,
    PRESENCE_PENALTY,
    REPEAT_WINDOW,
    REPETITION_PENALTY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)
from ..arithmetic import float_as_uint, uint_as_float
from ..intrinsics import ld_global_u32, st_global_u32, store_release_system
from .common import device, is_nan, pdl_sync
from .logits import apply_biases, apply_mask, apply_output_penalties, apply_repetition_penalty, load4, row_argmax
from .params import RECORD_BYTES, ROW_BIAS, ROW_COUNTS, ROW_LOGITS, ROW_MASK
from .params import SAMPLING_THREADS as THREADS
from .reduce import block_argmax, block_sum, is_replaced_by, warp_sum

BIN_BITS, PER_NAT = 11, np.float32(64)
BINS = 1 << BIN_BITS
"""Bins of the histogram: distances from the largest logit in steps of 1 / PER_NAT, up to 32. The last has the rest."""
RANK_KEY_BITS = 54
"""Bits of a `rank_key`: 32 of a logit and 22 of a token id."""
CANDIDATES = 2048
"""At most this many candidates are ranked exactly. With more, or without top-k, top-p keeps or drops whole bins."""
MASS = np.float64(1 << 40)
"""Probability masses are int64 multiples of 2^-40 of the likeliest token's mass: their sum has no rounding order."""


@device
def splitmix64(z):
    """Output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@device
def gumbel(state, token):
    """Gumbel noise -log(-log u) of a token; u in (0, 1) is a hash of the generator's uint64 state and the token."""
    # hashed twice: the state advances by the same constant, and a token must not get the last noise of its neighbour
    bits = splitmix64(splitmix64(state) + np.uint64(token + 1) * np.uint64(GOLDEN))
    u = (np.float32(bits >> np.uint64(41)) + np.float32(0.5)) * np.float32(2.0**-23)  # exact, and below 1
    return -math.log(-math.log(u))


@device
def clear(sums):
    """Set shared sums[BINS] to 0."""
    for i in range(cuda.threadIdx.x, BINS, THREADS):
        sums[i] = 0
    cuda.syncthreads()


@device
def running_sums(sums):
    """Replace shared sums[BINS] by its inclusive prefix sums (Hillis and Steele, 1986). Two elements per thread."""
    offset = 1
    while offset < BINS:
        first, second = np.int64(0), np.int64(0)
        i = cuda.threadIdx.x
        j = i + THREADS
        if i >= offset:
            first = sums[i - offset]
        if j >= offset:
            second = sums[j - offset]
        cuda.syncthreads()
        sums[i] += first
        sums[j] += second
        cuda.syncthreads()
        offset <<= 1


@device
def bin_of(logit, largest):
    """Bin of the histogram for a logit."""
    last = np.int32(BINS - 1)
    return min(np.int32((largest - logit) * PER_NAT), last) if largest - logit < 40 else last


@device
def rank_key(logit, token):
    """An integer of RANK_KEY_BITS that sorts tokens by falling logit, equal logits by token id."""
    bits = np.int64(0)  # -0 equals 0
    if logit != 0:
        bits = np.int64(float_as_uint(logit))
    falling = bits if bits >= 0x80000000 else 0x7FFFFFFF - bits
    return (falling << 22) | token


@device
def rank_key_in_bin(logits, first, n, largest, border_bin, count, counts, result):
    """The rank key of the `count`-th token of bin `border_bin`, found by radix selection.

    BIN_BITS of the key are determined at a time, by a histogram of the keys that agree so far. `counts` is shared
    int32[BINS], `result` shared int32[2]. The row's logits are logits[first : first + n], here and below.
    """
    prefix, digits = np.int64(0), (RANK_KEY_BITS + BIN_BITS - 1) // BIN_BITS
    for digit in range(digits):
        shift = BIN_BITS * (digits - 1 - digit)
        clear(counts)
        for i in range(cuda.threadIdx.x, n, THREADS):
            if bin_of(logits[first + i], largest) == border_bin:
                key = rank_key(logits[first + i], i)
                if key >> (shift + BIN_BITS) == prefix:
                    cuda.atomic.add(counts, (key >> shift) & (BINS - 1), 1)
        cuda.syncthreads()
        running_sums(counts)
        for i in range(cuda.threadIdx.x, BINS, THREADS):
            before = np.int64(0)
            if i > 0:
                before = counts[i - 1]
            if before < count and counts[i] >= count:
                result[0], result[1] = np.int32(i), np.int32(before)
        cuda.syncthreads()
        prefix = (prefix << BIN_BITS) | result[0]
        count -= result[1]
        cuda.syncthreads()
    return prefix


@device
def mass_of(logit, largest):
    """Probability mass of a logit in units of `MASS`."""
    return np.int64(math.exp(np.float64(logit - largest)) * MASS)


# The phases of `sample_kernel`


@device
def count_bin(counts, logit, largest):
    """Count a logit in its bin. Returns 1 instead for the last bin, in which many can be, all those of a mask."""
    b = bin_of(logit, largest)
    if b == BINS - 1:
        return np.int32(1)
    cuda.atomic.add(counts, b, 1)
    return np.int32(0)


@device
def top_k_cut(logits, first, n, is_aligned, largest, top_k, counts, result):
    """The bins that top-k can keep: (last bin, bin that is kept in part, last rank key kept in it, few candidates).

    If the bins up to the last hold few candidates, these are ranked later. Otherwise the last bin is cut at a rank key.
    `counts` is shared int32[BINS]: 32 bits, because a shared atomic addition of 64 is a loop.
    """
    thread, rest = cuda.threadIdx.x, np.int32(0)
    clear(counts)
    for i in range(4 * thread, n, 4 * THREADS):
        a, b, c, d = load4(logits, first, i, n, is_aligned)
        rest += count_bin(counts, a, largest)
        if i + 1 < n:
            rest += count_bin(counts, b, largest)
        if i + 2 < n:
            rest += count_bin(counts, c, largest)
        if i + 3 < n:
            rest += count_bin(counts, d, largest)
    rest = warp_sum(rest)
    if thread & 31 == 0 and rest > 0:
        cuda.atomic.add(counts, BINS - 1, rest)
    cuda.syncthreads()
    running_sums(counts)
    for i in range(thread, BINS, THREADS):
        if counts[i] >= top_k and (i == 0 or counts[i - 1] < top_k):
            result[0], result[1] = np.int32(i), np.int32(counts[i])
    cuda.syncthreads()
    last_bin, border_bin, last_key = result[0], np.int32(BINS), np.int64(0)
    few = result[1] <= CANDIDATES
    if not few:
        border_bin, count = last_bin, np.int64(top_k)
        if border_bin > 0:
            count -= counts[border_bin - 1]
        cuda.syncthreads()
        last_key = rank_key_in_bin(logits, first, n, largest, border_bin, count, counts, result)
    cuda.syncthreads()
    return last_bin, border_bin, last_key, few


@device
def collect_one(logit, i, largest, cut, tokens, scores, result):
    """Add a token to the candidates if the cut of top-k keeps it."""
    last_bin, border_bin, last_key = cut
    b = bin_of(logit, largest)
    if b <= last_bin and (b < border_bin or rank_key(logit, i) <= last_key):
        at = cuda.atomic.add(result, 2, 1)
        tokens[at], scores[at] = np.int32(i), logit


@device
def collect(logits, first, n, is_aligned, largest, cut, tokens, scores, result):
    """Collect the candidates that the cut of top-k keeps, in any order; returns their number. result[2] is 0 before."""
    for i in range(4 * cuda.threadIdx.x, n, 4 * THREADS):
        a, b, c, d = load4(logits, first, i, n, is_aligned)
        if bin_of(max(max(a, b), max(c, d)), largest) <= cut[0]:
            collect_one(a, i, largest, cut, tokens, scores, result)
            if i + 1 < n:
                collect_one(b, i + 1, largest, cut, tokens, scores, result)
            if i + 2 < n:
                collect_one(c, i + 2, largest, cut, tokens, scores, result)
            if i + 3 < n:
                collect_one(d, i + 3, largest, cut, tokens, scores, result)
    cuda.syncthreads()
    return result[2]


@device
def draw_from_few(largest, count, settings, state, tokens, scores, whole, best_token):
    """Rank `count` collected candidates, and draw among those that the filters keep.

    `settings` is (temperature, top-k, top-p, min-p). Returns this thread's best (score with noise, token). whole[0] is
    0 before.
    """
    temperature, top_k, top_p, min_p = settings
    thread, best = cuda.threadIdx.x, np.float32(-np.inf)
    for pass_number in range(2):  # first the mass of all that top-k keeps, then the filters
        for j in range(thread, count, THREADS):
            rank, above = 0, np.int64(0)
            for i in range(count):
                if is_replaced_by(scores[j], tokens[j], scores[i], tokens[i]):
                    rank += 1
                    if pass_number == 1:
                        above += mass_of(scores[i], largest)
            mass = mass_of(scores[j], largest)
            if rank < top_k:
                if pass_number == 0:
                    cuda.atomic.add(whole, 0, mass)
                elif rank == 0 or ((top_p >= 1 or above < top_p * whole[0]) and mass >= min_p * MASS):
                    score = scores[j] / np.float32(temperature) + gumbel(state, tokens[j])
                    if is_replaced_by(best, best_token, score, tokens[j]):
                        best, best_token = score, tokens[j]
        cuda.syncthreads()
    return best, best_token


@device
def draw_from_bins(logits, first, n, largest, cut, settings, state, sums, result):
    """Draw among all tokens that the cut of top-k, the bins of top-p and min-p keep, without ranking them.

    Returns this thread's best (score with noise, token).
    """
    temperature, _, top_p, min_p = settings
    last_bin, border_bin, last_key = cut
    thread, best, best_token = cuda.threadIdx.x, np.float32(-np.inf), np.int32(n)
    if top_p < 1:
        clear(sums)
        for i in range(thread, n, THREADS):
            b = bin_of(logits[first + i], largest)
            if b < border_bin or (b == border_bin and rank_key(logits[first + i], i) <= last_key):
                mass = mass_of(logits[first + i], largest)
                if mass > 0:  # most of the last bin have none
                    cuda.atomic.add(sums, b, mass)
        cuda.syncthreads()
        running_sums(sums)
        enough = top_p * sums[BINS - 1]
        for i in range(thread, BINS, THREADS):
            if sums[i] >= enough and (i == 0 or sums[i - 1] < enough):
                result[0] = np.int32(i)
        cuda.syncthreads()
        last_bin = min(last_bin, result[0])
    lowest = np.float32(-np.inf)
    if min_p > 0:
        lowest = largest + np.float32(math.log(min_p))
    for i in range(thread, n, THREADS):
        b = bin_of(logits[first + i], largest)
        kept = b <= last_bin and (b < border_bin or rank_key(logits[first + i], i) <= last_key)
        if kept and logits[first + i] >= lowest:
            score = logits[first + i] / np.float32(temperature) + gumbel(state, i)
            if is_replaced_by(best, best_token, score, np.int32(i)):
                best, best_token = score, np.int32(i)
    return best, best_token


@cuda.jit
def sample_kernel(
    n_rows, logits, vocab, slots, n_slots, settings, info, rows, counts, state, recent, last_token, next_token,
    normalizers, logprobs,
):  # fmt: skip
    """Draw the token of a row by its slot's settings, and remember it in the slot's record.

    next_token[row] = -1 if the logits do not allow a draw. logprobs[row] is the token's where the slot wants log
    probabilities, from the normalizer of `logprobs_kernel`, and otherwise NaN. Masks, biases and penalties change the
    logits in place.
    """
    values = cuda.shared.array(32, np.float32)
    indices = cuda.shared.array(32, np.int32)
    sums = cuda.shared.array(BINS, np.int64)
    bin_counts = cuda.shared.array(BINS, np.int32)
    tokens = cuda.shared.array(CANDIDATES, np.int32)
    scores = cuda.shared.array(CANDIDATES, np.float32)
    result = cuda.shared.array(4, np.int32)
    whole = cuda.shared.array(1, np.int64)
    thread, row = cuda.threadIdx.x, np.int64(cuda.blockIdx.x)
    pdl_sync()
    slot = np.int64(slots[row])
    if row >= n_rows[0] or slot < 0 or slot >= n_slots:
        return
    eight, four = slot * (RECORD_BYTES // 8), slot * (RECORD_BYTES // 4)  # where the record's fields begin
    first, n, is_aligned = row * vocab, np.int64(info[four + N_CANDIDATES]), vocab & 3 == 0
    temperature, top_k = settings[eight + TEMPERATURE], int(settings[eight + TOP_K])
    top_p, min_p = settings[eight + TOP_P], settings[eight + MIN_P]
    n_bias, n_stop, penalty = info[four + N_BIAS], info[four + N_STOP], np.float32(settings[eight + REPETITION_PENALTY])
    if counts[eight + 1] >= info[four + MIN_TOKENS]:
        n_stop = np.int32(0)
    has_counts, has_mask = info[four + HAS_COUNTS] != 0, info[four + HAS_MASK] != 0
    is_changed = has_mask or has_counts or n_bias + n_stop > 0 or penalty != 1
    if is_changed:
        if has_mask:
            apply_mask(logits, first, n, rows[eight + ROW_MASK])
            cuda.syncthreads()
        if n_bias + n_stop > 0:
            apply_biases(logits, first, n, rows[eight + ROW_BIAS], n_bias, n_stop)
        n_recent = min(counts[eight], np.int64(REPEAT_WINDOW))
        apply_repetition_penalty(logits, first, penalty, (recent, four), n_recent)
        cuda.syncthreads()
        if has_counts:
            frequency = np.float32(settings[eight + FREQUENCY_PENALTY])
            presence = np.float32(settings[eight + PRESENCE_PENALTY])
            apply_output_penalties(logits, first, n, rows[eight + ROW_COUNTS], frequency, presence)
            cuda.syncthreads()

    largest, token = row_argmax(logits, first, n, is_aligned, values, indices)
    is_infinite = abs(largest) == np.float32(np.inf)
    is_invalid = is_nan(largest) or (is_infinite and (temperature > 0 or (is_changed and largest < 0)))
    token = min(token, np.int32(n - 1))

    if temperature > 0 and top_k != 1 and not is_invalid:
        last_bin, border_bin, last_key, few = np.int32(BINS - 1), np.int32(BINS), np.int64(0), False
        if 0 < top_k < n:
            last_bin, border_bin, last_key, few = top_k_cut(
                logits, first, n, is_aligned, largest, top_k, bin_counts, result
            )
        if thread == 0:
            result[2] = 0
            whole[0] = 0
        cuda.syncthreads()
        filters, cut = (temperature, top_k, top_p, min_p), (last_bin, border_bin, last_key)
        if few:
            count = collect(logits, first, n, is_aligned, largest, cut, tokens, scores, result)
            best, best_token = draw_from_few(largest, count, filters, state[eight], tokens, scores, whole, np.int32(n))
        else:
            best, best_token = draw_from_bins(logits, first, n, largest, cut, filters, state[eight], sums, result)
        best, token = block_argmax(best, best_token, values, indices)

    cuda.syncthreads()
    if thread == 0:
        if is_invalid:
            token = np.int32(-1)
        else:
            recent[four + counts[eight] % REPEAT_WINDOW] = token
            counts[eight] += 1
            counts[eight + 1] += 1
            if has_counts:
                place = rows[eight + ROW_COUNTS] + 4 * np.int64(token)
                st_global_u32(place, ld_global_u32(place) + np.uint32(1))
            if temperature > 0:
                state[eight] += np.uint64(GOLDEN)
            last_token[slot] = token
        logprob = np.float32(np.nan)
        if info[four + N_LOGPROBS] >= 0 and token >= 0:
            raw = logits[first + token]
            if rows[eight + ROW_LOGITS] != 0:
                raw = uint_as_float(ld_global_u32(rows[eight + ROW_LOGITS] + 4 * np.int64(token)))
            logprob = raw - normalizers[row]
        next_token[row], logprobs[row] = token, logprob


@cuda.jit
def logprobs_kernel(n_rows, logits, vocab, slots, n_slots, info, rows, normalizers, top_ids, top_logprobs):
    """log Σ exp(logit) of a row whose slot wants log probabilities, and its likeliest tokens, before `sample_kernel`.

    normalizers[row] is NaN if the logits hold a NaN or their largest is not finite. top_ids and top_logprobs [R,
    MAX_LOGPROBS] list the likeliest first, of equals the smaller id first; -1 and NaN fill what the slot does not want.
    Where ROW_LOGITS of the slot is an address, the row is copied there, because `sample_kernel` will change it.
    """
    values = cuda.shared.array(32, np.float32)
    indices = cuda.shared.array(32, np.int32)
    bin_counts = cuda.shared.array(BINS, np.int32)
    tokens = cuda.shared.array(CANDIDATES, np.int32)
    scores = cuda.shared.array(CANDIDATES, np.float32)
    result = cuda.shared.array(4, np.int32)
    thread, row = cuda.threadIdx.x, np.int64(cuda.blockIdx.x)
    pdl_sync()
    slot = np.int64(slots[row])
    if row >= n_rows[0] or slot < 0 or slot >= n_slots:
        return
    eight, four = slot * (RECORD_BYTES // 8), slot * (RECORD_BYTES // 4)
    wanted = info[four + N_LOGPROBS]
    if thread < MAX_LOGPROBS:
        top_ids[row * MAX_LOGPROBS + thread] = -1
        top_logprobs[row * MAX_LOGPROBS + thread] = np.float32(np.nan)
    if wanted < 0:
        return
    first, n, is_aligned = row * vocab, np.int64(info[four + N_CANDIDATES]), vocab & 3 == 0
    copy = rows[eight + ROW_LOGITS]
    if copy != 0:
        for i in range(thread, n, THREADS):
            st_global_u32(copy + 4 * i, float_as_uint(logits[first + i]))
    largest, _ = row_argmax(logits, first, n, is_aligned, values, indices)
    if is_nan(largest) or abs(largest) == np.float32(np.inf):
        if thread == 0:
            normalizers[row] = np.float32(np.nan)
        return
    total = np.float32(0)
    for i in range(4 * thread, n, 4 * THREADS):
        a, b, c, d = load4(logits, first, i, n, is_aligned)
        total += (math.exp(a - largest) + math.exp(b - largest)) + (math.exp(c - largest) + math.exp(d - largest))
    cuda.syncthreads()  # `values` is read until here
    normalizer = largest + math.log(block_sum(total, values))
    if thread == 0:
        normalizers[row] = normalizer
        result[2] = 0
    count = min(np.int64(wanted), n)
    if count == 0:
        return
    last_bin, border_bin, last_key = np.int32(BINS - 1), np.int32(BINS), np.int64(0)
    if count < n:
        last_bin, border_bin, last_key, _ = top_k_cut(logits, first, n, is_aligned, largest, count, bin_counts, result)
    cuda.syncthreads()
    found = collect(logits, first, n, is_aligned, largest, (last_bin, border_bin, last_key), tokens, scores, result)
    for j in range(thread, found, THREADS):
        rank = 0
        for i in range(found):
            if is_replaced_by(scores[j], tokens[j], scores[i], tokens[i]):
                rank += 1
        if rank < count:
            top_ids[row * MAX_LOGPROBS + rank] = tokens[j]
            top_logprobs[row * MAX_LOGPROBS + rank] = scores[j] - normalizer


@cuda.jit
def advance_kernel(
    n_rows, next_token, slots, n_slots, last_token, ids, positions, continues, count, words, n_runs, max_rows
):
    """Note each row's token as its slot's latest and publish it to the host, run << 32 | token, in the row's word.

    `words` is the address of int64[n_runs, max_rows] in memory that the host reads; run n has the row n % n_runs.
    `count[0]` is the number of runs so far. With `continues` the token is the row's next input, at the next position.
    After a failed draw, -1, the slot continues with token 0.
    """
    pdl_sync()
    rows, number = n_rows[0], count[0] + 1
    cuda.syncthreads()
    for r in range(cuda.threadIdx.x, rows, cuda.blockDim.x):
        token, slot = next_token[r], slots[r]
        known = max(token, 0)
        if 0 <= slot < n_slots:
            last_token[slot] = known
        if continues != 0:
            ids[r] = known
            positions[r] += 1
        word = words + 8 * ((number % n_runs) * max_rows + r)
        store_release_system(word, (number << 32) | (np.int64(token) & 0xFFFFFFFF))
    if cuda.threadIdx.x == 0:
        count[0] = number


@cuda.jit
def feed_kernel(tokens, ids, sequences, n_slots, last_token):
    """Replace each id below 0 by the token that the row's slot sampled last."""
    pdl_sync()
    for t in range(cuda.threadIdx.x, tokens[0], cuda.blockDim.x):
        slot = sequences[t]
        if ids[t] < 0 and 0 <= slot < n_slots:
            ids[t] = last_token[slot]
