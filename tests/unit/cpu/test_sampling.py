"""Sampling on the CPU: each filter against its definition, draws against their distribution, rows of many slots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numba.core.runtime import _nrt_python as nrt
from numba.core.runtime import rtsys

from numballama.cpu import sampling
from numballama.cpu.compiler import jit
from numballama.cpu.sampling import choose_tokens
from numballama.sampling import REPEAT_WINDOW, Sampled, SamplerTable, SamplingParams
from tests.helpers.sampling import (
    changed_logits,
    choose_token,
    likeliest,
    log_softmax,
    make_sampler,
    mask_of,
    possible_tokens,
)

LOGITS = hnp.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.one_of(
        st.floats(-30, 30, width=32), st.integers(-3, 3).map(float), st.sampled_from([-math.inf, -100.0, 80.0])
    ),
).filter(lambda logits: np.isfinite(logits).any())
CANDIDATES = st.integers(0, 2**32 - 1)
"""Seed of an order of the candidates: a filter may get any subset in any order."""


def candidates(logits: np.ndarray, seed: int, fraction: float = 1.0) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(len(logits)).astype(np.int32)
    ids = ids[: max(1, int(len(ids) * fraction))]
    if not np.isfinite(logits[ids]).any():
        ids[0] = logits.argmax()
    return ids, len(ids)


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return powers / powers.sum()


# The filters


@given(LOGITS, CANDIDATES, st.integers(1, 70))
def test_top_k_keeps_the_k_largest_in_order(logits: np.ndarray, seed: int, k: int) -> None:
    ids, n = candidates(logits, seed, 0.8)
    given = ids.copy()
    kept = sampling.keep_top_k(logits, ids, n, k)
    assert kept == min(k, n)
    assert sorted(ids[:kept]) == sorted(set(ids[:kept])) and set(ids[:kept]) <= set(given)
    wanted = np.sort(logits[given])[::-1][:kept]
    if k < n:
        np.testing.assert_array_equal(logits[ids[:kept]], wanted)  # ties may fall either way, their logits not
    else:
        np.testing.assert_array_equal(ids, given)


@given(LOGITS, CANDIDATES, st.floats(0.01, 1.0))
@example(np.array([0, 1], np.float32), 0, 0.25)  # the likeliest has less than 1 - p
def test_top_p_keeps_the_fewest_that_reach_p(logits: np.ndarray, seed: int, p: float) -> None:
    ids, n = candidates(logits, seed)
    given = ids.copy()
    kept = sampling.keep_top_p(logits, ids, n, p)
    if p == 1:
        assert kept == n
        return
    assert 1 <= kept <= n and set(ids[:kept]) <= set(given) and len(set(ids[:kept])) == kept
    ordered = np.sort(probabilities(logits[given]))[::-1]
    np.testing.assert_allclose(
        probabilities(logits[given])[[list(given).index(i) for i in ids[:kept]]], ordered[:kept], rtol=1e-12
    )
    # float64 sums in another order: 1e-12 either way
    assert ordered[:kept].sum() >= p - 1e-12
    assert ordered[: kept - 1].sum() < p + 1e-12


@given(LOGITS, CANDIDATES, st.floats(0, 1))
def test_min_p_keeps_what_is_likely_enough(logits: np.ndarray, seed: int, p: float) -> None:
    ids, n = candidates(logits, seed)
    given = ids.copy()
    kept = sampling.keep_min_p(logits, ids, n, p)
    ratio = np.exp(logits[given].astype(np.float64) - logits[given].max())
    surely, perhaps = set(given[ratio >= p * (1 + 1e-9)]), set(given[ratio >= p * (1 - 1e-9)])
    assert surely <= set(ids[:kept]) <= (perhaps if p > 0 else set(given))
    assert len(set(ids[:kept])) == kept >= 1
    assert list(ids[:kept]) == [i for i in given if i in set(ids[:kept])], "the order stays"


@given(LOGITS, st.data(), st.floats(0.1, 10))
def test_repeat_penalty_once_a_token(logits: np.ndarray, data: st.DataObject, penalty: float) -> None:
    recent = data.draw(hnp.arrays(np.int32, REPEAT_WINDOW, elements=st.integers(0, len(logits) - 1)))
    count = data.draw(st.integers(0, REPEAT_WINDOW))
    penalty32 = np.float32(penalty)
    want = logits.copy()
    for token in set(recent[:count]):
        want[token] = want[token] / penalty32 if want[token] > 0 else want[token] * penalty32
    sampling.penalize(logits, recent, count, penalty32)
    np.testing.assert_allclose(logits, want, rtol=3e-7)  # a division may be a product with the reciprocal


def test_greedy_takes_the_first_of_equals_and_finds_nan() -> None:
    for row, want in (
        ([1, 3, 3, 2], 1), ([-np.inf] * 3, 0), ([5], 0), ([-np.inf, -1e30], 1), ([0, np.inf, 1], 1), ([-0.0, 0.0], 0),
        ([np.nan, 1], -1), ([1, np.nan], -1), ([1, -np.nan, 2], -1),
    ):  # fmt: skip
        assert sampling.greedy(np.array(row, np.float32)) == want, row


# What is drawn


def splitmix64(state: int) -> tuple[int, float]:
    """Steele, Lea and Flood's generator in Python's integers."""
    mask = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return state, ((z ^ (z >> 31)) >> 11) * 2.0**-53


def test_uniform_is_splitmix64() -> None:
    state, expected = np.array([42], np.uint64), 42
    for _ in range(100):
        expected, number = splitmix64(expected)
        assert sampling.uniform(state) == number and 0 <= number < 1
        assert int(state[0]) == expected


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def limit(freedom: int) -> float:
    """The 99.99th percentile of the chi-square distribution (Wilson and Hilferty, 1931). Seeds are fixed: no test here
    flakes."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draw_follows_the_distribution(temperature: float) -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(12).astype(np.float32)
    ids = rng.permutation(12).astype(np.int32)
    state = np.array([7], np.uint64)
    drawn = [sampling.draw(logits, ids, 9, temperature, state) for _ in range(20000)]
    expected = np.zeros(12)
    expected[ids[:9]] = probabilities(logits[ids[:9]], temperature)
    counts = np.bincount(drawn, minlength=12)
    assert not counts[ids[9:]].any(), "what was filtered out is never drawn"
    likely = expected * 20000 >= 5
    assert chi_square(counts[likely], expected[likely] * 20000) < limit(likely.sum() - 1)
    # the test can fail: the same counts do not fit another temperature
    other = np.zeros(12)
    other[ids[:9]] = probabilities(logits[ids[:9]], temperature * 1.3)
    assert chi_square(counts[likely], other[likely] * 20000) > limit(likely.sum() - 1)


def test_draw_of_extreme_logits() -> None:
    state, ids = np.array([1], np.uint64), np.arange(3, dtype=np.int32)

    def draw(*logits: float, temperature: float = 1.0) -> int:
        return sampling.draw(np.array(logits, np.float32), ids, 3, temperature, state)

    for _ in range(50):
        assert draw(3e38, -3e38, 0) == 0
        assert draw(-np.inf, -5, -np.inf) == 1
        assert draw(0, 1, 0, temperature=1e-6) == 1
    assert draw(-np.inf, -np.inf, -np.inf) == -1
    assert draw(0, np.nan, 0) == -1
    assert {draw(5, 1, 2, temperature=1e9) for _ in range(100)} == {0, 1, 2}


def draws(
    logits: np.ndarray, params: SamplingParams, count: int, prompt: Sequence[int] = (), output: Sequence[int] = (),
    allowed: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """How often each token is drawn in `count` first draws after `output`, by slots of different seeds."""
    slots = np.arange(500, dtype=np.int32)
    table = SamplerTable(len(slots), len(logits))
    for slot in range(len(slots)):
        table.assign(slot, params.override({"seed": slot}), prompt, output)
        if allowed is not None:
            table.set_mask(slot, mask_of(allowed))
    saved = {name: getattr(table, name).copy() for name in ("recent", "counts", "generated", "output_counts")}
    times, rows = np.zeros(len(logits)), np.tile(logits, (len(slots), 1))
    for _ in range(count // len(slots)):
        np.add.at(times, choose_tokens(table, rows, slots).tokens, 1)
        for name, array in saved.items():
            getattr(table, name)[...] = array  # all but the generators' state
    return times


def expected_distribution(
    logits: np.ndarray, recent: list[int], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> np.ndarray:
    """The definition of `sample`, in the order of llama.cpp: penalty, top-k, top-p, min-p, temperature."""
    logits = logits.astype(np.float64)
    for token in set(recent):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    order = np.argsort(-logits, kind="stable")
    kept = order[:top_k] if top_k else order
    share = probabilities(logits[kept])
    kept = kept[: int(np.searchsorted(np.cumsum(share), top_p)) + 1] if top_p < 1 else kept
    share = probabilities(logits[kept])
    kept = kept[share >= min_p * share.max()]
    result = np.zeros(len(logits))
    result[kept] = probabilities(logits[kept], temperature)
    return result


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.5, "top_k": 5, "top_p": 1.0},
    {"temperature": 0.7, "top_k": 0, "top_p": 0.6},
    {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repeat_penalty": 1.8},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "repeat_penalty": 1.4},
    {},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sample_follows_its_definition(settings: dict[str, Any]) -> None:
    full = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.0, "repeat_penalty": 1.0, **settings}
    logits = np.random.default_rng(5).standard_normal(30).astype(np.float32) * 2
    prompt = [int(np.argmax(logits)), 3, 3, 11]
    counts = draws(logits, SamplingParams(**settings), 20000, prompt)
    want = expected_distribution(
        logits, prompt, full["temperature"], full["top_k"], full["top_p"], full["min_p"], full["repeat_penalty"]
    )
    assert not counts[want == 0].any()
    likely = want * 20000 >= 5
    assert chi_square(counts[likely], want[likely] * 20000) < limit(int(likely.sum()) - 1)


def support_of(logits: np.ndarray, **settings: Any) -> set[int]:
    return {int(token) for token in np.flatnonzero(draws(logits, SamplingParams(**settings), 3000))}


def test_order_of_the_filters() -> None:
    """Each pair is told apart by logits for which the other order would keep something else."""
    p = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # top-k first: of two kept, the first has 4/7 >= 0.5 and top-p keeps it alone; top-p first would keep two
    assert support_of(p, temperature=1, top_k=2, top_p=0.5) == {0}
    # top-p before temperature: 0.4 + 0.3 reach 0.65; at temperature 5 it would take three
    assert support_of(p, temperature=5, top_k=0, top_p=0.65) == {0, 1}
    # min-p before temperature: 0.2 / 0.4 reaches 0.45, 0.1 / 0.4 does not; at temperature 5 all would
    assert support_of(p, temperature=5, top_k=0, top_p=1, min_p=0.45) == {0, 1, 2}
    # the penalty before top-k: the likeliest, made unlikely, is not among the two; after it, it would take a place
    drawn = set()
    for seed in range(60):
        drawing = make_sampler(4, temperature=1, top_k=2, top_p=1, repeat_penalty=100, seed=seed, prompt=[0])
        drawn.add(choose_token(drawing, np.array([3, 2, 1, 0.5], np.float32)))
    assert drawn == {1, 2}


@pytest.mark.parametrize(
    "settings", [*SETTINGS, {"temperature": 0}, {"temperature": 0, "repeat_penalty": 2.0}], ids=str
)
@pytest.mark.parametrize("bad", [math.nan, -math.nan])
def test_nan_logits_give_minus_one(settings: dict[str, Any], bad: float) -> None:
    """Wherever the NaN is: a filter must not silently drop it."""
    for place in range(50):
        logits = np.random.default_rng(place).standard_normal(50).astype(np.float32)
        logits[place] = bad
        assert choose_token(make_sampler(50, seed=1, **settings), logits) == -1, place


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_infinite_logits(settings: dict[str, Any]) -> None:
    """Masked tokens are never drawn; with only masked tokens, or a logit that overflowed, nothing is drawn."""
    logits = np.full(20, -np.inf, np.float32)
    assert choose_token(make_sampler(20, seed=1, **settings), logits) == -1
    logits[[4, 9]] = 1
    assert {choose_token(make_sampler(20, seed=seed, **settings), logits.copy()) for seed in range(40)} == {4, 9}
    logits[5] = np.inf
    assert choose_token(make_sampler(20, seed=1, **settings), logits) == -1


# Rows of many slots


@st.composite
def generations(draw: st.DrawFn, vocab: int) -> dict[str, Any]:
    """Settings, prompt, output, stop tokens and mask of one generation."""
    tokens = st.integers(0, vocab - 1)
    params = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "temperature": st.sampled_from([0.0, 0.5, 1.0, 3.0]), "top_k": st.integers(0, vocab + 2),
                "top_p": st.sampled_from([0.3, 0.9, 1.0]), "min_p": st.sampled_from([0.0, 0.1, 0.9]),
                "repetition_penalty": st.sampled_from([0.5, 1.0, 1.5]), "presence_penalty": st.floats(-2, 2),
                "frequency_penalty": st.floats(-2, 2), "min_tokens": st.integers(0, 5),
                "logit_bias": st.dictionaries(tokens, st.floats(-100, 100), max_size=4),
                "logprobs": st.integers(0, 20), "seed": st.integers(0, 2**64 - 1),
            },
        )
    )  # fmt: skip
    return {
        "params": SamplingParams(**{"seed": 1, **params}),
        "prompt": draw(st.lists(tokens, max_size=5)), "output": draw(st.lists(tokens, max_size=5)),
        "stop_ids": draw(st.lists(tokens, max_size=3)),
        "allowed": draw(st.none() | st.lists(st.booleans(), min_size=vocab, max_size=vocab).map(np.array)),
    }  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> tuple[SamplerTable, np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """A table, rows of logits, each row's slot, and the generation of each slot."""
    vocab, slots = draw(st.integers(1, 70)), draw(st.integers(1, 4))
    table = SamplerTable(slots, vocab, draw(st.integers(1, vocab)))
    states = [draw(generations(vocab)) for _ in range(slots)]
    for slot, state in enumerate(states):
        assign(table, slot, state)
    order = draw(st.permutations(range(slots + 1)))
    rows = np.array(order[: draw(st.integers(1, slots + 1))], np.int32)
    elements = st.one_of(
        st.floats(-30, 30, width=32), st.sampled_from([0.0, 1.0, 1.0, 2.0, -math.inf, math.nan, math.inf])
    )
    logits = draw(hnp.arrays(np.float32, (len(rows), vocab), elements=elements, fill=st.floats(-3, 3, width=32)))
    return table, logits, rows, states


def assign(table: SamplerTable, slot: int, state: dict[str, Any]) -> None:
    table.assign(slot, state["params"], state["prompt"], state["output"], state["stop_ids"])
    if state["allowed"] is not None:
        table.set_mask(slot, mask_of(state["allowed"]))


def check_row(logits: np.ndarray, state: dict[str, Any], n: int, sampled: Sampled, row: int) -> None:
    """One row of a result is possible by the definition of its slot's settings."""
    params, token, raw = state["params"], int(sampled.tokens[row]), logits[:n].astype(np.float64)
    inside = {name: [each for each in state[name] if each < n] for name in ("prompt", "output", "stop_ids")}
    # the penalties of the whole output, but what may be chosen is below n
    output, allowed = state["output"], None if state["allowed"] is None else state["allowed"][:n]
    with np.errstate(invalid="ignore"):
        changed = changed_logits(logits[:n], params, inside["prompt"], output, inside["stop_ids"], allowed)
    failed = np.isnan(changed).any() or (np.isneginf(changed).all() and not np.isneginf(raw).all())
    if params.temperature > 0:
        failed |= not np.isfinite(changed.max())
    if np.isnan(changed).any() or failed:
        assert token == -1
    elif np.isneginf(changed).all():  # greedy, and the model's own logits are -inf: see below
        assert token in (-1, 0)
    else:
        assert token in possible_tokens(changed, params, 1e-4)
    wanted = params.logprobs is not None and np.isfinite(raw.max()) and not np.isnan(raw).any()
    count = min(params.logprobs or 0, n) if wanted else 0
    top_ids, top_logprobs = sampled.top_ids[row], sampled.top_logprobs[row]
    assert (top_ids[count:] == -1).all() and np.isnan(top_logprobs[count:]).all()
    if not wanted:
        assert np.isnan(sampled.logprobs[row])
        return
    assert top_ids[:count].tolist() == likeliest(logits[:n], count)
    want = log_softmax(raw)
    np.testing.assert_allclose(top_logprobs[:count], want[top_ids[:count]], rtol=1e-5, atol=1e-5)
    if token >= 0:
        np.testing.assert_allclose(sampled.logprobs[row], want[token], rtol=1e-5, atol=1e-5)
    else:
        assert np.isnan(sampled.logprobs[row])


@settings(deadline=None, max_examples=60)
@given(tables())
def test_rows_of_many_slots(case: tuple[SamplerTable, np.ndarray, np.ndarray, list[dict[str, Any]]]) -> None:
    """Every row by the definition of its settings; alone it gives the same; padding and other slots stay."""
    table, logits, rows, states = case
    n, given_logits = table.n_candidates, logits.copy()
    before = {name: getattr(table, name).copy() for name in ("recent", "counts", "generated", "state", "last_token")}
    sampled = choose_tokens(table, logits, rows)
    np.testing.assert_array_equal(logits, given_logits, "the model's logits stay")
    for row, slot in enumerate(rows.tolist()):
        if slot == table.slots:
            assert sampled.tokens[row] == -1
            continue
        check_row(logits[row], states[slot], n, sampled, row)
        alone = SamplerTable(1, table.vocab_size, n)
        assign(alone, 0, states[slot])
        again = choose_tokens(alone, logits[row : row + 1], np.zeros(1, np.int32))
        assert again.tokens[0] == sampled.tokens[row]
        np.testing.assert_array_equal(again.logprobs[0], sampled.logprobs[row])
        count = again.top_ids.shape[1]
        np.testing.assert_array_equal(again.top_ids[0], sampled.top_ids[row, :count])
        np.testing.assert_array_equal(again.top_logprobs[0], sampled.top_logprobs[row, :count])
        for name in before:
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(table, name)[slot], name)
        if sampled.tokens[row] >= 0:
            assert table.last_token[slot] == sampled.tokens[row]
            assert table.generated[slot] == len(states[slot]["output"]) + 1
    for slot in set(range(table.slots)) - {int(s) for r, s in enumerate(rows) if sampled.tokens[r] >= 0}:
        for name in ("recent", "counts", "generated", "last_token"):
            np.testing.assert_array_equal(getattr(table, name)[slot], before[name][slot], name)


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(2, 40), st.integers(0, 12))
def test_a_resumed_generation_goes_on_as_if_nothing_had_been(data: st.DataObject, vocab: int, stop_at: int) -> None:
    state = data.draw(generations(vocab)) | {"output": [], "allowed": None}
    rng = np.random.default_rng(vocab)
    steps = rng.standard_normal((16, vocab)).astype(np.float32) * 2
    whole, table = SamplerTable(1, vocab), SamplerTable(3, vocab)
    assign(whole, 0, state)
    want = [choose_token(whole, logits) for logits in steps]
    if -1 in want:  # every token is held back: such a generation ends
        steps = steps[: want.index(-1)]
        want = want[: len(steps)]
    assign(table, 2, state)
    tokens = [choose_token(table, logits, 2) for logits in steps[:stop_at]]
    table.release(2)
    assign(table, 1, state | {"output": tokens})
    tokens += [choose_token(table, logits, 1) for logits in steps[stop_at:]]
    assert tokens == want


def test_stop_tokens_are_held_back_until_min_tokens() -> None:
    table = SamplerTable(1, 10)
    logits = np.arange(10, dtype=np.float32)
    table.assign(0, SamplingParams(temperature=0, min_tokens=2, logit_bias={9: 100}), stop_token_ids=[9, 8, 70])
    assert [choose_token(table, logits) for _ in range(4)] == [7, 7, 9, 9]
    table.assign(0, SamplingParams(temperature=0, min_tokens=2), output=[1], stop_token_ids=[9])
    assert [choose_token(table, logits) for _ in range(3)] == [8, 9, 9]


def test_presence_and_frequency_are_of_the_output_alone() -> None:
    logits = np.array([2, 1.9, 1.1, 0], np.float32)
    presence = make_sampler(4, temperature=0, presence_penalty=1.0, prompt=[0, 0, 0])
    assert [choose_token(presence, logits) for _ in range(5)] == [0, 1, 2, 0, 0], "each once; then again the largest"
    frequency = make_sampler(4, temperature=0, frequency_penalty=0.5, prompt=[0, 0, 0])
    assert [choose_token(frequency, logits) for _ in range(6)] == [0, 1, 0, 1, 2, 0]
    negative = make_sampler(4, temperature=0, presence_penalty=-2.0)
    assert choose_token(negative, np.array([1, 1.5, 0, 0], np.float32)) == 1
    assert choose_token(negative, np.array([1, 0, 0, 0], np.float32)) == 1, "a negative penalty is a preference"


def test_a_mask_that_allows_nothing_fails_its_row_only() -> None:
    table = SamplerTable(2, 40)
    for slot in range(2):
        for temperature in (0.0, 1.0):
            table.assign(0, SamplingParams(temperature=temperature))
            table.assign(1, SamplingParams(temperature=temperature))
            table.set_mask(slot, np.zeros(2, np.uint32))
            tokens = choose_tokens(table, np.full((2, 40), -np.inf, np.float32), np.array([0, 1], np.int32)).tokens
            assert tokens[slot] == -1
            tokens = choose_tokens(table, np.zeros((2, 40), np.float32), np.array([0, 1], np.int32)).tokens
            assert tokens[slot] == -1 and tokens[1 - slot] >= 0


def test_changed_logits_follow_their_distributions() -> None:
    vocab, rng = 12, np.random.default_rng(3)
    logits = rng.standard_normal(vocab).astype(np.float32) * 2
    prompt, output = [1, 2, 3], [3, 3, 5]
    for params, allowed in (
        (SamplingParams(temperature=1.3, top_k=0, top_p=1, presence_penalty=0.7, frequency_penalty=0.4), None),
        (SamplingParams(temperature=0.9, top_k=8, top_p=0.9, logit_bias={2: 3, 5: -4}), np.arange(vocab) != 4),
        (SamplingParams(temperature=2.0, top_k=0, top_p=1, min_p=0.05, repetition_penalty=1.4), None),
    ):
        counts = draws(logits, params, 20000, prompt, output, allowed)
        changed = changed_logits(logits, params, prompt, output, allowed=allowed)
        kept = sorted(possible_tokens(changed, params))
        want = np.zeros(vocab)
        want[kept] = probabilities(changed[kept], params.temperature)
        assert not counts[want == 0].any()
        likely = want * 20000 >= 5
        assert chi_square(counts[likely], want[likely] * 20000) < limit(int(likely.sum()) - 1)


def test_workers_share_rows() -> None:
    """Whatever the number of workers, and in any order."""
    vocab, rows = 300, 7
    logits = np.random.default_rng(1).standard_normal((rows, vocab)).astype(np.float32)
    slots = np.array([4, 0, 9, 2, 6, 1, 3], np.int32)

    def tokens(workers: int) -> tuple[list[int], np.ndarray]:
        table = SamplerTable(8, vocab)
        for slot in range(8):
            table.assign(slot, SamplingParams(seed=slot, logprobs=slot, presence_penalty=slot % 2), [5])
        sampled = Sampled.empty(rows, 3)
        for worker in reversed(range(workers)):
            arguments = logits.ctypes.data, slots.ctypes.data, table.address, sampled.addresses
            sampling.sample_rows(worker, workers, rows, *arguments)
        return sampled.tokens.tolist(), sampled.top_ids

    want, top_ids = tokens(1)
    assert want[2] == -1 and min(want[:2] + want[3:]) >= 0
    for workers in (2, 3, 5, 20):
        got, got_ids = tokens(workers)
        assert got == want
        np.testing.assert_array_equal(got_ids, top_ids)


def test_the_draws_of_earlier_versions_stay() -> None:
    logits = np.random.default_rng(7).standard_normal(500).astype(np.float32) * 3
    plain = make_sampler(500, seed=42)
    assert [choose_token(plain, logits) for _ in range(8)] == EARLIER[0]
    penalised = make_sampler(
        500, temperature=1.5, top_k=0, top_p=0.9, min_p=0.01, repeat_penalty=1.3, seed=7, prompt=[1, 2]
    )
    assert [choose_token(penalised, logits) for _ in range(8)] == EARLIER[1]


EARLIER = [[484, 416, 416, 375, 416, 158, 416, 361], [342, 416, 140, 199, 158, 49, 291, 204]]


@jit
def allocating(times, n_rows, logits, slots, table, out):
    total = 0.0
    for _ in range(times):
        total += np.zeros(n_rows).sum()
    return total


@jit
def sample_often(times, n_rows, logits, slots, table, out):
    for _ in range(times):
        sampling.sample_rows(0, 1, n_rows, logits, slots, table, out)


def allocations(function: Callable[..., object], *arguments: Any) -> int:
    """How many blocks a call takes from the runtime of compiled code."""
    function(*arguments)  # compile first
    nrt.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats().alloc
        function(*arguments)
        return int(rtsys.get_allocation_stats().alloc - before)
    finally:
        nrt.memsys_disable_stats()


@pytest.mark.slow
def test_sampling_allocates_nothing() -> None:
    table, rows = SamplerTable(len(SETTINGS) + 2, 3000), len(SETTINGS) + 2
    for slot, chosen in enumerate([*SETTINGS, {"temperature": 0}]):
        table.assign(slot, SamplingParams(**{"seed": 1, **chosen}))
    everything = SamplingParams(presence_penalty=1, logit_bias={3: 1}, min_tokens=5, logprobs=20, repetition_penalty=2)
    table.assign(rows - 1, everything, [1, 2], [3], [4])
    table.set_mask(rows - 1, np.full(94, 0xF0F0F0F0, np.uint32))
    logits = np.random.default_rng(0).standard_normal((rows, 3000)).astype(np.float32)
    slots, sampled = np.arange(rows, dtype=np.int32), Sampled.empty(rows, 20)
    arguments = 50, rows, logits.ctypes.data, slots.ctypes.data, table.address, sampled.addresses
    assert allocations(allocating, *arguments) == 50, "the counter counts"
    assert allocations(sample_often, *arguments) == 0
