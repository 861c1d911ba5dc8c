"""Sampling on the CPU: from logits to the next token, in compiled functions. `SamplerState` owns their buffers.

The order is llama.cpp's: repetition penalty, then top-k, top-p and min-p on the model's own probabilities, then
temperature on the remaining candidates. Each filter reads the candidates `ids[:n]`, moves those that it keeps to the
front and returns their number. Nothing here allocates. logits is float32[V], ids int32[at most V].
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import Error
from ..sampling import MIN_P, REPETITION_PENALTY, TEMPERATURE, TOP_K, TOP_P, SamplerState
from .compiler import jit


@jit
def penalize(logits, recent, n_recent, penalty):
    """Divide positive logits of recent tokens by `penalty` and multiply negative ones (Keskar et al., CTRL, 2019).

    Each of the tokens recent[:n_recent] is penalised once.
    """
    for i in range(n_recent):
        token = recent[i]
        seen = False
        for j in range(i):
            seen = seen or recent[j] == token
        if not seen:
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty


@jit
def sift_down(ids, root, n, logits):
    """Restore the heap order of `ids[:n]`, smallest logit first, below `root`."""
    while True:
        child = 2 * root + 1
        if child >= n:
            return
        if child + 1 < n and logits[ids[child + 1]] < logits[ids[child]]:
            child += 1
        if logits[ids[root]] <= logits[ids[child]]:
            return
        ids[root], ids[child] = ids[child], ids[root]
        root = child


@jit
def make_heap(ids, n, logits):
    """Order `ids[:n]` as a heap, smallest logit first."""
    for root in range(n // 2 - 1, -1, -1):
        sift_down(ids, root, n, logits)


@jit
def sort_heap(ids, n, logits):
    """Sort a heap `ids[:n]` by descending logits."""
    for end in range(n - 1, 0, -1):
        ids[0], ids[end] = ids[end], ids[0]
        sift_down(ids, 0, end, logits)


@jit
def keep_top_k(logits, ids, n, k):
    """Keep the k candidates with the largest logits, largest first: one pass with a heap of k."""
    if k >= n:
        return n
    make_heap(ids, k, logits)
    for i in range(k, n):
        if logits[ids[i]] > logits[ids[0]]:
            ids[0] = ids[i]
            sift_down(ids, 0, k, logits)
    sort_heap(ids, k, logits)
    return k


@jit
def largest_logit(logits, ids, n):
    """The largest logit of the candidates."""
    largest = -np.inf
    for i in range(n):
        largest = max(largest, logits[ids[i]])
    return largest


@jit
def keep_top_p(logits, ids, n, p):
    """Keep the fewest likeliest candidates whose probabilities sum to at least p, likeliest first (Holtzman, 2020)."""
    if p >= 1:
        return n
    largest = largest_logit(logits, ids, n)
    total = 0.0
    for i in range(n):
        total += math.exp(logits[ids[i]] - largest)
    # Candidates below this bound cannot be kept, even if all of them were as large, so they are not sorted. Only the
    # likeliest, whose power is 1, is always kept: of few candidates it may lie below the bound.
    lower_bound = min((1 - p) / max(1, n - 1) * total, 1.0)
    kept = 0
    for i in range(n):
        if math.exp(logits[ids[i]] - largest) >= lower_bound:
            ids[kept] = ids[i]
            kept += 1
    make_heap(ids, kept, logits)
    sort_heap(ids, kept, logits)
    so_far = 0.0
    for i in range(kept):
        so_far += math.exp(logits[ids[i]] - largest)
        if so_far >= p * total:
            return i + 1
    return max(kept, 1)


@jit
def keep_min_p(logits, ids, n, p):
    """Keep candidates at least p times as likely as the likeliest (Nguyen et al., min-p, 2024)."""
    if p <= 0:
        return n
    min_logit = largest_logit(logits, ids, n) + math.log(p)
    kept = 0
    for i in range(n):
        if logits[ids[i]] >= min_logit:
            ids[kept] = ids[i]
            kept += 1
    return kept


@jit
def uniform(state):
    """The next number in [0, 1) of a SplitMix64 generator (Steele, Lea and Flood, 2014); `state` is uint64[1]."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * 2.0**-53


@jit
def draw(logits, ids, n, temperature, state):
    """A candidate, with probability proportional to exp(logit / temperature); -1 if the logits are not finite."""
    largest = largest_logit(logits, ids, n)
    total = 0.0
    for i in range(n):
        total += math.exp((logits[ids[i]] - largest) / temperature)
    if not 0 < total < np.inf:
        return -1
    left = uniform(state) * total
    for i in range(n):
        left -= math.exp((logits[ids[i]] - largest) / temperature)
        if left < 0:
            return ids[i]
    return ids[n - 1]


@jit
def greedy(logits):
    """The first index of the largest logit; -1 if there is a NaN."""
    best = 0
    for i in range(logits.shape[0]):
        if math.isnan(logits[i]):
            return -1
        if logits[i] > logits[best]:
            best = i
    return best


@jit
def sample(logits, settings, recent, counts, state, ids):
    """The next token by the settings of a `SamplerState`, or -1 if the logits are not finite. Changes `logits`.

    Only tokens below len(ids) are candidates, so the padding of a vocabulary is never drawn. The token is added to
    `recent`, a ring buffer of the latest; `counts[0]` is the number of tokens added so far.
    """
    temperature, penalty = settings[TEMPERATURE], settings[REPETITION_PENALTY]
    n = ids.shape[0]
    if penalty != 1:
        penalize(logits, recent, min(counts[0], recent.shape[0]), np.float32(penalty))
    if temperature == 0:
        token = greedy(logits[:n])
    else:
        not_finite = False
        for i in range(n):  # filters only compare, so they would silently drop a NaN
            ids[i] = i
            not_finite |= not logits[i] < np.inf
        if not_finite:
            return -1
        if settings[TOP_K] > 0:
            n = keep_top_k(logits, ids, n, int(settings[TOP_K]))
        n = keep_top_p(logits, ids, n, settings[TOP_P])
        n = keep_min_p(logits, ids, n, settings[MIN_P])
        token = draw(logits, ids, n, temperature, state)
    if token < 0:
        return token
    recent[counts[0] % recent.shape[0]] = token
    counts[0] += 1
    return token


def choose_token(sampler: SamplerState, logits: np.ndarray) -> int:
    """The token that a sampler chooses from `logits` float32 [vocab], or -1 if they hold a NaN. Overwrites the logits.

    Raises `Error` for fewer logits than tokens that the sampler chooses from.
    """
    if len(logits) < len(sampler.ids):
        raise Error(f"this sampler chooses from {len(sampler.ids):,} tokens, but there are {len(logits):,} logits")
    return int(sample(logits, *sampler.operands))
