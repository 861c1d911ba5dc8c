"""From logits to the next token on the device, and from a token to the next step, without the host.

The settings and their order are `sampler`'s: repeat penalty, top-k, top-p, min-p, temperature. One block does it in
three passes over the logits: the largest; a histogram of how far below it they are, from which follows what top-k and
top-p can keep; the candidates. Nothing is sorted: a candidate's rank among a few is counted, masses are sums of
integers, and the draw takes the largest of logit / temperature plus Gumbel noise, which is a draw from the softmax
(Gumbel, 1954) and needs no order. So the result does not depend on which thread came first.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from ...kernels_cuda import better
from ..intrinsics import bits_of_f32, let_successor_start, publish, wait_for_predecessor
from .common import ALL, device, is_nan
from .params import SAMPLING_THREADS as THREADS

BIN_BITS, PER_NAT = 11, np.float32(64)
BINS = 1 << BIN_BITS
"""Of the histogram: logits up to 32 below the largest are told apart in steps of 1/64."""
PLACE_BITS = 54
"""Of `place_of`: a float32's and a token's, of which there are fewer than 2^22."""
CANDIDATES = 2048
"""As many are ranked among each other. Where they are more, or top-k is off, top-p takes or leaves whole bins."""
MASS = np.float64(1 << 40)
"""Probability masses are counted in units of 2^-40 of the likeliest token's."""


@device
def mixed(z):
    """SplitMix64's output function (Steele, Lea and Flood, 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@device
def gumbel(state, token):
    """-log(-log u) with u from a hash of the generator's state and the token."""
    # mixed twice: the state advances by the same constant, and noise must not move from a token to its neighbour
    bits = mixed(mixed(state) + np.uint64(token + 1) * np.uint64(0x9E3779B97F4A7C15))
    u = (np.float32(bits >> np.uint64(41)) + np.float32(0.5)) * np.float32(2.0**-23)  # exact, and below 1
    return -math.log(-math.log(u))


@device
def best_of_block(value, index, values, places):
    """The largest value of all threads and its first index, in every thread; a NaN is larger than all."""
    for i in range(5):
        other = cuda.shfl_xor_sync(ALL, value, 16 >> i)
        other_index = cuda.shfl_xor_sync(ALL, index, 16 >> i)
        if better(value, index, other, other_index):
            value, index = other, other_index
    cuda.syncthreads()
    if cuda.threadIdx.x & 31 == 0:
        values[cuda.threadIdx.x >> 5], places[cuda.threadIdx.x >> 5] = value, index
    cuda.syncthreads()
    value, index = values[0], places[0]
    for i in range(1, cuda.blockDim.x >> 5):
        if better(value, index, values[i], places[i]):
            value, index = values[i], places[i]
    return value, index


@device
def add_up(sums):
    """Turn shared sums[BINS] into running sums."""
    apart = 1
    while apart < BINS:
        first, second = np.int64(0), np.int64(0)
        i = cuda.threadIdx.x
        j = i + THREADS
        if i >= apart:
            first = sums[i - apart]
        if j >= apart:
            second = sums[j - apart]
        cuda.syncthreads()
        sums[i] += first
        sums[j] += second
        cuda.syncthreads()
        apart <<= 1


@device
def bin_of(logit, largest):
    """The histogram's bin of a logit."""
    return (
        min(np.int32((largest - logit) * PER_NAT), np.int32(BINS - 1)) if largest - logit < 40 else np.int32(BINS - 1)
    )


@device
def place_of(logit, token):
    """A number of `PLACE_BITS`, in the order of the ranks: falling logits, equal ones by their tokens."""
    bits = np.int64(0)  # -0 is no less than 0
    if logit != 0:
        bits = np.int64(bits_of_f32(logit))
    falling = bits if bits >= 0x80000000 else 0x7FFFFFFF - bits
    return (falling << 22) | token


@device
def place_in_bin(logits, n, largest, border, count, sums, found):
    """The `place_of` the bin's `count`-th logit: `BIN_BITS` at a time, by a histogram of those alike so far."""
    place, digits = np.int64(0), (PLACE_BITS + BIN_BITS - 1) // BIN_BITS
    for digit in range(digits):
        shift = BIN_BITS * (digits - 1 - digit)
        for i in range(cuda.threadIdx.x, BINS, THREADS):
            sums[i] = 0
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, n, THREADS):
            if bin_of(logits[i], largest) == border:
                own = place_of(logits[i], i)
                if own >> (shift + BIN_BITS) == place:
                    cuda.atomic.add(sums, (own >> shift) & (BINS - 1), 1)
        cuda.syncthreads()
        add_up(sums)
        for i in range(cuda.threadIdx.x, BINS, THREADS):
            before = np.int64(0)
            if i > 0:
                before = sums[i - 1]
            if before < count and sums[i] >= count:
                found[0], found[1] = np.int32(i), np.int32(before)
        cuda.syncthreads()
        place = (place << BIN_BITS) | found[0]
        count -= found[1]
        cuda.syncthreads()
    return place


@cuda.jit
def sample_kernel(logits, n, settings, recent, counts, state, next_token):
    values = cuda.shared.array(32, np.float32)
    places = cuda.shared.array(32, np.int32)
    sums = cuda.shared.array(BINS, np.int64)
    tokens = cuda.shared.array(CANDIDATES, np.int32)
    scores = cuda.shared.array(CANDIDATES, np.float32)
    found = cuda.shared.array(4, np.int32)
    whole = cuda.shared.array(1, np.int64)
    thread = cuda.threadIdx.x
    wait_for_predecessor()
    let_successor_start()
    temperature, top_k, top_p, min_p = settings[0], int(settings[1]), settings[2], settings[3]
    penalty = np.float32(settings[4])

    seen = min(counts[0], np.int64(recent_window()))
    if penalty != 1 and thread < seen:  # Keskar et al., CTRL, 2019
        token, first = recent[thread], True
        for i in range(thread):
            first = first and recent[i] != token
        if first:
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    cuda.syncthreads()

    largest, token = np.float32(-np.inf), np.int32(n)
    for i in range(thread, n, THREADS):
        if better(largest, token, logits[i], np.int32(i)):
            largest, token = logits[i], np.int32(i)
    largest, token = best_of_block(largest, token, values, places)
    broken = is_nan(largest) or (abs(largest) == np.float32(np.inf) and temperature > 0)
    token = min(token, np.int32(n - 1))

    if temperature > 0 and top_k != 1 and not broken:
        # which bins can top-k keep? `last_bin` is the last of them; of bin `border` it keeps places up to `last_place`
        last_bin, border, last_place = np.int32(BINS - 1), np.int32(BINS), np.int64(0)
        ranked = False
        if 0 < top_k < n:
            for i in range(thread, BINS, THREADS):
                sums[i] = 0
            cuda.syncthreads()
            for i in range(thread, n, THREADS):
                cuda.atomic.add(sums, bin_of(logits[i], largest), 1)
            cuda.syncthreads()
            add_up(sums)
            for i in range(thread, BINS, THREADS):
                if sums[i] >= top_k and (i == 0 or sums[i - 1] < top_k):
                    found[0], found[1] = np.int32(i), np.int32(sums[i])
            cuda.syncthreads()
            last_bin = found[0]
            ranked = found[1] <= CANDIDATES
            if not ranked:
                border, count = last_bin, np.int64(top_k)
                if border > 0:
                    count -= sums[border - 1]
                cuda.syncthreads()
                last_place = place_in_bin(logits, n, largest, border, count, sums, found)
            cuda.syncthreads()
        if thread == 0:
            found[2] = 0
            whole[0] = 0
        cuda.syncthreads()
        best, best_token = np.float32(-np.inf), np.int32(n)
        if ranked:
            for i in range(thread, n, THREADS):
                if bin_of(logits[i], largest) <= last_bin:
                    at = cuda.atomic.add(found, 2, 1)
                    tokens[at], scores[at] = np.int32(i), logits[i]
            cuda.syncthreads()
            count = found[2]
            for turn in range(2):  # first the mass of all that top-k keeps, then who is kept
                for own in range(thread, count, THREADS):
                    rank, above = 0, np.int64(0)
                    for i in range(count):
                        if better(scores[own], tokens[own], scores[i], tokens[i]):
                            rank += 1
                            if turn == 1:
                                above += np.int64(math.exp(np.float64(scores[i] - largest)) * MASS)
                    mass = np.int64(math.exp(np.float64(scores[own] - largest)) * MASS)
                    if rank < top_k:
                        if turn == 0:
                            cuda.atomic.add(whole, 0, mass)
                        elif rank == 0 or ((top_p >= 1 or above < top_p * whole[0]) and mass >= min_p * MASS):
                            score = scores[own] / np.float32(temperature) + gumbel(state[0], tokens[own])
                            if better(best, best_token, score, tokens[own]):
                                best, best_token = score, tokens[own]
                cuda.syncthreads()
        else:
            if top_p < 1:
                for i in range(thread, BINS, THREADS):
                    sums[i] = 0
                cuda.syncthreads()
                for i in range(thread, n, THREADS):
                    b = bin_of(logits[i], largest)
                    if b < border or (b == border and place_of(logits[i], i) <= last_place):
                        cuda.atomic.add(sums, b, np.int64(math.exp(np.float64(logits[i] - largest)) * MASS))
                cuda.syncthreads()
                add_up(sums)
                enough = top_p * sums[BINS - 1]
                for i in range(thread, BINS, THREADS):
                    if sums[i] >= enough and (i == 0 or sums[i - 1] < enough):
                        found[0] = np.int32(i)
                cuda.syncthreads()
                last_bin = min(last_bin, found[0])
            least = np.float32(-np.inf)
            if min_p > 0:
                least = largest + np.float32(math.log(min_p))
            for i in range(thread, n, THREADS):
                b = bin_of(logits[i], largest)
                kept = b <= last_bin and (b < border or place_of(logits[i], i) <= last_place)
                if kept and logits[i] >= least:
                    score = logits[i] / np.float32(temperature) + gumbel(state[0], i)
                    if better(best, best_token, score, np.int32(i)):
                        best, best_token = score, np.int32(i)
        best, token = best_of_block(best, best_token, values, places)

    cuda.syncthreads()
    if thread == 0:
        if broken:
            token = np.int32(-1)
        else:
            recent[counts[0] % recent_window()] = token
            counts[0] += 1
            if temperature > 0:
                state[0] += np.uint64(0x9E3779B97F4A7C15)
        next_token[0] = token


@device
def recent_window():
    """`sampler.REPEAT_WINDOW`."""
    return 64


@cuda.jit
def advance_kernel(next_token, ids, positions, step, slots_address, n_slots):
    """Make the new token the next step's input, and put it, with the step's number, where the host looks."""
    wait_for_predecessor()
    let_successor_start()
    if cuda.threadIdx.x == 0:
        token = next_token[0]
        ids[0] = max(token, 0)
        positions[0] += 1
        number = step[0] + 1
        step[0] = number
        publish(slots_address + 8 * (number % n_slots), (number << 32) | (np.int64(token) & 0xFFFFFFFF))
