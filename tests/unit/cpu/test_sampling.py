"""Sampling on the CPU: each filter against its definition, draws against their distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numba import njit
from numba.core.runtime import _nrt_python as nrt
from numba.core.runtime import rtsys

from numballama.cpu import sampling
from numballama.cpu.sampling import choose_token
from numballama.sampling import REPEAT_WINDOW
from tests.helpers.sampling import make_sampler

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
    drawing = make_sampler(30, **settings, seed=11)
    counts = np.zeros(30)
    for _ in range(20000):
        drawing.counts[0] = 0  # the repeat penalty sees the prompt alone, every time
        drawing.remember(prompt)
        counts[choose_token(drawing, logits.copy())] += 1
    want = expected_distribution(
        logits, prompt, full["temperature"], full["top_k"], full["top_p"], full["min_p"], full["repeat_penalty"]
    )
    assert not counts[want == 0].any()
    likely = want * 20000 >= 5
    assert chi_square(counts[likely], want[likely] * 20000) < limit(int(likely.sum()) - 1)


def support_of(logits: np.ndarray, **settings: Any) -> set[int]:
    drawing = make_sampler(len(logits), seed=3, **settings)
    return {choose_token(drawing, logits.copy()) for _ in range(3000)}


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
        drawing = make_sampler(4, temperature=1, top_k=2, top_p=1, repeat_penalty=100, seed=seed)
        drawing.remember([0])
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
    assert choose_token(make_sampler(20, seed=1, **settings), logits.copy()) == -1
    logits[[4, 9]] = 1
    assert {choose_token(make_sampler(20, seed=seed, **settings), logits.copy()) for seed in range(40)} == {4, 9}
    logits[5] = np.inf
    assert choose_token(make_sampler(20, seed=1, **settings), logits.copy()) == -1


@njit
def allocating(times, logits, settings, recent, counts, state, ids):
    total = 0.0
    for _ in range(times):
        total += np.zeros(counts.shape[0]).sum()
    return total


@njit
def sample_often(times, logits, settings, recent, counts, state, ids):
    total = 0
    for _ in range(times):
        total += sampling.sample(logits, settings, recent, counts, state, ids)
    return total


def allocations(function: Callable[..., object], times: int, operands: tuple[np.ndarray, ...]) -> int:
    """How many blocks a call takes from the runtime of compiled code. Numba itself allocates one per array that is
    passed.
    """
    function(times, *operands)  # compile first
    nrt.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats().alloc
        function(times, *operands)
        return int(rtsys.get_allocation_stats().alloc - before) - len(operands)
    finally:
        nrt.memsys_disable_stats()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 0}], ids=str)
def test_sampling_allocates_nothing(settings: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    operands = (logits, *make_sampler(3000, seed=1, **settings).operands)
    assert allocations(allocating, 50, operands) == 50, "the counter counts"
    assert allocations(sample_often, 50, operands) == 0
