"""Sampling on the CPU: from rows of logits to the next tokens, in compiled functions on the arrays of a `SamplerTable`.

The order is in `sampling`. Each filter reads the candidates `ids[:n]`, moves those that it keeps to the front and
returns their number. Nothing here allocates. logits is float32[V], ids int32[at most V]. Rows of logits are not
changed: what changes logits before a token is chosen works on a copy of the row in the worker's scratch memory.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..errors import Error
from ..sampling import (
    BIAS_CAPACITY,
    BIAS_IDS_AT,
    BIAS_VALUES_AT,
    COUNTS_AT,
    FREQUENCY_PENALTY,
    GENERATED_AT,
    GOLDEN,
    HAS_COUNTS,
    HAS_MASK,
    HEADER,
    INFO,
    INFO_AT,
    LAST_TOKEN_AT,
    MASK_AT,
    MIN_P,
    MIN_TOKENS,
    N_BIAS,
    N_CANDIDATES,
    N_LOGPROBS,
    N_STOP,
    OUTPUT_COUNTS_AT,
    PRESENCE_PENALTY,
    RECENT_AT,
    REPEAT_WINDOW,
    REPETITION_PENALTY,
    SCRATCH_IDS_AT,
    SCRATCH_LOGITS_AT,
    SCRATCH_ROWS,
    SETTINGS,
    SETTINGS_AT,
    SLOTS,
    STATE_AT,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    VOCAB,
    Sampled,
    SamplerTable,
)
from .compiler import device, jit
from .intrinsics import f32_at, f64_at, i32_at, i64_at, u64_at

# Changes of the logits, in this order


@device
def keep_allowed(logits, n, mask):
    """Set the logits of tokens whose bit in `mask` int32[ceil(n / 32)] is 0 to -inf."""
    for i in range(n):
        if (mask[i >> 5] >> (i & 31)) & 1 == 0:
            logits[i] = -np.inf


@device
def hold_back(logits, n, stops):
    """Set the logits of stop tokens to -inf."""
    for i in range(stops.shape[0]):
        if stops[i] < n:
            logits[stops[i]] = -np.inf


@device
def add_bias(logits, n, ids, values):
    """Add values[i] to the logit of token ids[i]."""
    for i in range(ids.shape[0]):
        if ids[i] < n:
            logits[ids[i]] += values[i]


@device
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


@device
def penalize_output(logits, n, counts, frequency, presence):
    """Subtract OpenAI's penalties of tokens that were generated counts[token] times."""
    for i in range(n):
        if counts[i] > 0:
            logits[i] -= frequency * np.float32(counts[i])
            logits[i] -= presence


# Filters


@device
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


@device
def make_heap(ids, n, logits):
    """Order `ids[:n]` as a heap, smallest logit first."""
    for root in range(n // 2 - 1, -1, -1):
        sift_down(ids, root, n, logits)


@device
def sort_heap(ids, n, logits):
    """Sort a heap `ids[:n]` by descending logits."""
    for end in range(n - 1, 0, -1):
        ids[0], ids[end] = ids[end], ids[0]
        sift_down(ids, np.int64(0), end, logits)


@device
def keep_top_k(logits, ids, n, k):
    """Keep the k candidates with the largest logits, largest first: one pass with a heap of k."""
    if k >= n:
        return n
    make_heap(ids, k, logits)
    for i in range(k, n):
        if logits[ids[i]] > logits[ids[0]]:
            ids[0] = ids[i]
            sift_down(ids, np.int64(0), k, logits)
    sort_heap(ids, k, logits)
    return k


@device
def largest_logit(logits, ids, n):
    """The largest logit of the candidates."""
    largest = -np.inf
    for i in range(n):
        largest = max(largest, logits[ids[i]])
    return largest


@device
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


@device
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


@device
def uniform(state):
    """The next number in [0, 1) of a SplitMix64 generator (Steele, Lea and Flood, 2014); `state` is uint64[1]."""
    state[0] += np.uint64(GOLDEN)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * 2.0**-53


@device
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


@device
def greedy(logits):
    """The first index of the largest logit; -1 if there is a NaN."""
    best = 0
    for i in range(logits.shape[0]):
        if math.isnan(logits[i]):
            return -1
        if logits[i] > logits[best]:
            best = i
    return best


@device
def choose(logits, ids, n, settings, state):
    """One of the first n tokens, by settings[SETTINGS] and the generator's state[1]; -1 if there is a NaN."""
    temperature = settings[TEMPERATURE]
    if temperature == 0:
        return greedy(logits[:n])
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
    return draw(logits, ids, n, temperature, state)


# Log probabilities


@device
def log_normalizer(logits, n):
    """log Σ exp(logit) of the first n logits; NaN if they hold a NaN or their largest is not finite."""
    largest, has_nan = -np.inf, False
    for i in range(n):
        has_nan |= math.isnan(logits[i])
        largest = max(largest, logits[i])
    if has_nan or not -np.inf < largest < np.inf:
        return np.nan
    total = 0.0
    for i in range(n):
        total += math.exp(logits[i] - largest)
    return largest + math.log(total)


@device
def list_likeliest(logits, n, k, normalizer, top_ids, top_logprobs):
    """Write the k likeliest of the first n tokens and their log probabilities, of equals the smaller id first."""
    kept = 0
    for i in range(n):
        if kept < k or logits[i] > logits[top_ids[k - 1]]:
            place = min(kept, k - 1)
            while place > 0 and logits[i] > logits[top_ids[place - 1]]:
                top_ids[place] = top_ids[place - 1]
                place -= 1
            top_ids[place] = i
            kept = min(kept + 1, k)
    for i in range(kept):
        top_logprobs[i] = logits[top_ids[i]] - normalizer


# Rows


@device
def change_logits(logits, changed, n, slot, vocab, settings, info, header):
    """Write a copy of `logits` to `changed` and apply the slot's mask, stop tokens, bias and penalties; False if there
    are none.
    """
    n_bias, n_stop = info[N_BIAS], info[N_STOP]
    generated = i64_at(header[GENERATED_AT] + 8 * slot, 1)[0]
    if generated >= info[MIN_TOKENS]:
        n_stop = 0
    penalty = settings[REPETITION_PENALTY]
    if penalty == 1 and n_bias == 0 and n_stop == 0 and info[HAS_COUNTS] == 0 and info[HAS_MASK] == 0:
        return False
    for i in range(n):
        changed[i] = logits[i]
    if info[HAS_MASK] != 0:
        words = (vocab + 31) // 32
        keep_allowed(changed, n, i32_at(header[MASK_AT] + 4 * slot * words, words))
    first = 4 * slot * header[BIAS_CAPACITY]
    hold_back(changed, n, i32_at(header[BIAS_IDS_AT] + first + 4 * n_bias, n_stop))
    add_bias(changed, n, i32_at(header[BIAS_IDS_AT] + first, n_bias), f32_at(header[BIAS_VALUES_AT] + first, n_bias))
    if penalty != 1:
        recent = i32_at(header[RECENT_AT] + 4 * slot * REPEAT_WINDOW, REPEAT_WINDOW)
        counts = i64_at(header[COUNTS_AT] + 8 * slot, 1)
        penalize(changed, recent, min(counts[0], REPEAT_WINDOW), np.float32(penalty))
    if info[HAS_COUNTS] != 0:
        counts = i32_at(header[OUTPUT_COUNTS_AT] + 4 * slot * vocab, vocab)
        frequency, presence = np.float32(settings[FREQUENCY_PENALTY]), np.float32(settings[PRESENCE_PENALTY])
        penalize_output(changed, n, counts, frequency, presence)
    return True


@device
def accept(slot, token, vocab, settings, info, header):
    """Add a token to the slot's state. (`choose` has advanced the random generator.)"""
    counts, generated = i64_at(header[COUNTS_AT] + 8 * slot, 1), i64_at(header[GENERATED_AT] + 8 * slot, 1)
    i32_at(header[RECENT_AT] + 4 * slot * REPEAT_WINDOW, REPEAT_WINDOW)[counts[0] % REPEAT_WINDOW] = token
    counts[0] += 1
    generated[0] += 1
    if info[HAS_COUNTS] != 0:
        i32_at(header[OUTPUT_COUNTS_AT] + 4 * slot * vocab, vocab)[token] += 1
    i32_at(header[LAST_TOKEN_AT] + 4 * slot, 1)[0] = token


@device
def sample_rows(worker, n_workers, n_rows, logits, slots, table, out):
    """Sample a token for each of `n_rows` rows of logits, as one of `n_workers` workers that share them by rows.

    All arguments are integers: `logits` the address of float32 [n_rows, the table's vocab_size], `slots` that of int32
    [n_rows], `table` `SamplerTable.address`, `out` the tuple `Sampled.addresses`. A row whose slot is not in the table
    is padding: nothing is written for it. Two rows of a call must not have one slot.
    """
    header = i64_at(table, HEADER)
    vocab = header[VOCAB]
    workers = min(n_workers, header[SCRATCH_ROWS])
    if worker >= workers:
        return
    ids = i32_at(header[SCRATCH_IDS_AT] + 4 * worker * vocab, vocab)
    changed = f32_at(header[SCRATCH_LOGITS_AT] + 4 * worker * vocab, vocab)
    row_slots, tokens, logprobs = i32_at(slots, n_rows), i32_at(out[0], n_rows), f32_at(out[1], n_rows)
    n_top = out[4]
    for row in range(worker, n_rows, workers):
        slot = np.int64(row_slots[row])
        if slot < 0 or slot >= header[SLOTS]:
            continue
        settings = f64_at(header[SETTINGS_AT] + 8 * slot * SETTINGS, SETTINGS)
        info = i32_at(header[INFO_AT] + 4 * slot * INFO, INFO)
        n, raw = np.int64(info[N_CANDIDATES]), f32_at(logits + 4 * row * vocab, vocab)
        is_changed = change_logits(raw, changed, n, slot, vocab, settings, info, header)
        used = changed if is_changed else raw
        token = np.int64(choose(used, ids, n, settings, u64_at(header[STATE_AT] + 8 * slot, 1)))
        if is_changed and token >= 0 and used[token] == -np.inf:
            token = np.int64(-1)  # greedy, and no token is allowed
        tokens[row], logprobs[row] = token, np.nan
        top_ids, top_logprobs = i32_at(out[2] + 4 * row * n_top, n_top), f32_at(out[3] + 4 * row * n_top, n_top)
        for i in range(n_top):
            top_ids[i], top_logprobs[i] = -1, np.nan
        if info[N_LOGPROBS] >= 0:
            normalizer = log_normalizer(raw, n)
            if not math.isnan(normalizer):
                if info[N_LOGPROBS] > 0 and n_top > 0:
                    list_likeliest(raw, n, min(info[N_LOGPROBS], n_top), normalizer, top_ids, top_logprobs)
                if token >= 0:
                    logprobs[row] = raw[token] - normalizer
        if token >= 0:
            accept(slot, token, vocab, settings, info, header)


@jit
def _sample_alone(n_rows, logits, slots, table, out):
    """`sample_rows` by one worker, for Python."""
    sample_rows(0, 1, n_rows, logits, slots, table, out)


def choose_tokens(table: SamplerTable, logits: NDArray[np.float32], slots: NDArray[np.int32]) -> Sampled:
    """Sample a token for each row r of `logits` float32 [R, vocab] by the state of slots[r], and update that state.

    The slot after the last is padding: its rows keep -1. Raises `Error` for logits of another vocabulary than the
    table's, and for slots that it does not have or that stand twice.
    """
    if logits.ndim != 2 or logits.shape[1] != table.vocab_size or logits.dtype != np.float32:
        raise Error(
            f"this sampler chooses from float32 [rows, {table.vocab_size:,}] logits, "
            f"found {logits.dtype} {list(logits.shape)}"
        )
    slots, logits = np.ascontiguousarray(slots, np.int32), np.ascontiguousarray(logits)
    used = slots[slots != table.slots]
    if slots.shape != logits.shape[:1] or len(np.unique(used)) < len(used) or ((used < 0) | (used > table.slots)).any():
        raise Error(f"slots must be one for each row, each once, from 0 to {table.slots - 1}; found {slots.tolist()}")
    sampled = Sampled.empty(len(slots), max(0, table.top_logprobs(used)))
    addresses = logits.ctypes.data, slots.ctypes.data, table.address, sampled.addresses
    _sample_alone(len(slots), *addresses)
    return sampled
