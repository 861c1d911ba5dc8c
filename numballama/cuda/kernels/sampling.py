"""Sampling: from logits to the next token, and from a token to the next step's input, on the device without the host.

Input: float32 logits of a vocabulary of n tokens; settings in the order of `sampling.py`: temperature, top-k, top-p,
min-p, repetition penalty. Output: one token id, -1 if the logits hold a NaN or cannot be drawn from.

One block of 1,024 threads makes three passes over the logits (512 KB for 128,256 tokens, which fit the L2 cache): the
largest logit; a histogram of the distances from it, which tells what top-k and top-p can keep; the candidates.

Nothing is sorted. The rank of a candidate among a few is counted, and probability masses are sums of integers. The
token with the largest logit / temperature plus Gumbel noise is a draw from the softmax (Gumbel, 1954) and needs no
order. So the result does not depend on the order in which threads run.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ..intrinsics import float_as_uint, store_release_system
from .common import device, is_nan, pdl_sync
from .params import SAMPLING_THREADS as THREADS
from .reduce import block_argmax, is_replaced_by

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
    """Gumbel noise -log(-log u) of a token; u in (0, 1) is a hash of the generator's state and the token."""
    # hashed twice: the state advances by the same constant, and a token must not get the last noise of its neighbour
    bits = splitmix64(splitmix64(state) + np.uint64(token + 1) * np.uint64(0x9E3779B97F4A7C15))
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
def rank_key_in_bin(logits, n, largest, border_bin, count, sums, result):
    """The rank key of the `count`-th token of bin `border_bin`, found by radix selection.

    BIN_BITS of the key are determined at a time, by a histogram of the keys that agree so far. `sums` is shared
    int64[BINS], `result` shared int32[2].
    """
    prefix, digits = np.int64(0), (RANK_KEY_BITS + BIN_BITS - 1) // BIN_BITS
    for digit in range(digits):
        shift = BIN_BITS * (digits - 1 - digit)
        clear(sums)
        for i in range(cuda.threadIdx.x, n, THREADS):
            if bin_of(logits[i], largest) == border_bin:
                key = rank_key(logits[i], i)
                if key >> (shift + BIN_BITS) == prefix:
                    cuda.atomic.add(sums, (key >> shift) & (BINS - 1), 1)
        cuda.syncthreads()
        running_sums(sums)
        for i in range(cuda.threadIdx.x, BINS, THREADS):
            before = np.int64(0)
            if i > 0:
                before = sums[i - 1]
            if before < count and sums[i] >= count:
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


@device
def recent_window():
    """Size of `recent`: `sampling.REPEAT_WINDOW`."""
    return 64


# The phases of `sample_kernel`; every thread of the block calls them


@device
def apply_repetition_penalty(logits, penalty, recent, n_recent):
    """Divide positive and multiply negative logits of the last `n_recent` tokens by `penalty`, each token once (Keskar
    et al., CTRL, 2019).
    """
    thread = cuda.threadIdx.x
    if penalty != 1 and thread < n_recent:
        token, first = recent[thread], True
        for i in range(thread):
            first = first and recent[i] != token
        if first:
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    cuda.syncthreads()


@device
def top_k_cut(logits, n, largest, top_k, sums, result):
    """The bins that top-k can keep: (last bin, bin that is kept in part, last rank key kept in it, few candidates).

    If the bins up to the last hold few candidates, these are ranked later. Otherwise the last bin is cut at a rank key.
    """
    thread = cuda.threadIdx.x
    clear(sums)
    for i in range(thread, n, THREADS):
        cuda.atomic.add(sums, bin_of(logits[i], largest), 1)
    cuda.syncthreads()
    running_sums(sums)
    for i in range(thread, BINS, THREADS):
        if sums[i] >= top_k and (i == 0 or sums[i - 1] < top_k):
            result[0], result[1] = np.int32(i), np.int32(sums[i])
    cuda.syncthreads()
    last_bin, border_bin, last_key = result[0], np.int32(BINS), np.int64(0)
    few = result[1] <= CANDIDATES
    if not few:
        border_bin, count = last_bin, np.int64(top_k)
        if border_bin > 0:
            count -= sums[border_bin - 1]
        cuda.syncthreads()
        last_key = rank_key_in_bin(logits, n, largest, border_bin, count, sums, result)
    cuda.syncthreads()
    return last_bin, border_bin, last_key, few


@device
def draw_from_few(logits, n, largest, last_bin, settings, state, tokens, scores, result, whole):
    """Collect the candidates in bins up to `last_bin`, rank them, and draw among those that the filters keep.

    `settings` is (temperature, top-k, top-p, min-p).

    Returns this thread's best (score with noise, token). result[2] and whole[0] are 0 at first.
    """
    temperature, top_k, top_p, min_p = settings
    thread, best, best_token = cuda.threadIdx.x, np.float32(-np.inf), np.int32(n)
    for i in range(thread, n, THREADS):
        if bin_of(logits[i], largest) <= last_bin:
            at = cuda.atomic.add(result, 2, 1)
            tokens[at], scores[at] = np.int32(i), logits[i]
    cuda.syncthreads()
    count = result[2]
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
                    score = scores[j] / np.float32(temperature) + gumbel(state[0], tokens[j])
                    if is_replaced_by(best, best_token, score, tokens[j]):
                        best, best_token = score, tokens[j]
        cuda.syncthreads()
    return best, best_token


@device
def draw_from_bins(logits, n, largest, cut, settings, state, sums, result):
    """Draw among all tokens that the cut of top-k, the bins of top-p and min-p keep, without ranking them.

    Returns this thread's best (score with noise, token).
    """
    temperature, _, top_p, min_p = settings
    last_bin, border_bin, last_key = cut
    thread, best, best_token = cuda.threadIdx.x, np.float32(-np.inf), np.int32(n)
    if top_p < 1:
        clear(sums)
        for i in range(thread, n, THREADS):
            b = bin_of(logits[i], largest)
            if b < border_bin or (b == border_bin and rank_key(logits[i], i) <= last_key):
                cuda.atomic.add(sums, b, mass_of(logits[i], largest))
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
        b = bin_of(logits[i], largest)
        kept = b <= last_bin and (b < border_bin or rank_key(logits[i], i) <= last_key)
        if kept and logits[i] >= lowest:
            score = logits[i] / np.float32(temperature) + gumbel(state[0], i)
            if is_replaced_by(best, best_token, score, np.int32(i)):
                best, best_token = score, np.int32(i)
    return best, best_token


@cuda.jit
def sample_kernel(logits, n, settings, recent, counts, state, next_token):
    """Draw the next token and remember it in `recent`; next_token[0] = -1 if the logits do not allow a draw."""
    values = cuda.shared.array(32, np.float32)
    indices = cuda.shared.array(32, np.int32)
    sums = cuda.shared.array(BINS, np.int64)
    tokens = cuda.shared.array(CANDIDATES, np.int32)
    scores = cuda.shared.array(CANDIDATES, np.float32)
    result = cuda.shared.array(4, np.int32)
    whole = cuda.shared.array(1, np.int64)
    thread = cuda.threadIdx.x
    pdl_sync()
    temperature, top_k, top_p, min_p = settings[0], int(settings[1]), settings[2], settings[3]
    apply_repetition_penalty(logits, np.float32(settings[4]), recent, min(counts[0], np.int64(recent_window())))

    largest, token = np.float32(-np.inf), np.int32(n)
    for i in range(thread, n, THREADS):
        if is_replaced_by(largest, token, logits[i], np.int32(i)):
            largest, token = logits[i], np.int32(i)
    largest, token = block_argmax(largest, token, values, indices)
    is_invalid = is_nan(largest) or (abs(largest) == np.float32(np.inf) and temperature > 0)
    token = min(token, np.int32(n - 1))

    if temperature > 0 and top_k != 1 and not is_invalid:
        last_bin, border_bin, last_key, few = np.int32(BINS - 1), np.int32(BINS), np.int64(0), False
        if 0 < top_k < n:
            last_bin, border_bin, last_key, few = top_k_cut(logits, n, largest, top_k, sums, result)
        if thread == 0:
            result[2] = 0
            whole[0] = 0
        cuda.syncthreads()
        filters = temperature, top_k, top_p, min_p
        if few:
            best, best_token = draw_from_few(
                logits, n, largest, last_bin, filters, state, tokens, scores, result, whole
            )
        else:
            cut = last_bin, border_bin, last_key
            best, best_token = draw_from_bins(logits, n, largest, cut, filters, state, sums, result)
        best, token = block_argmax(best, best_token, values, indices)

    cuda.syncthreads()
    if thread == 0:
        if is_invalid:
            token = np.int32(-1)
        else:
            recent[counts[0] % recent_window()] = token
            counts[0] += 1
            if temperature > 0:
                state[0] += np.uint64(0x9E3779B97F4A7C15)
        next_token[0] = token


@cuda.jit
def advance_kernel(next_token, ids, positions, step, slots_address, n_slots):
    """Make the new token the next step's input and publish it to the host: step << 32 | token in slot step % n_slots.

    `slots_address` is the address of int64[n_slots] in memory that the host reads. After a failed draw, -1, the next
    step continues with token 0.
    """
    pdl_sync()
    if cuda.threadIdx.x == 0:
        token = next_token[0]
        ids[0] = max(token, 0)
        positions[0] += 1
        number = step[0] + 1
        step[0] = number
        store_release_system(slots_address + 8 * (number % n_slots), (number << 32) | (np.int64(token) & 0xFFFFFFFF))
