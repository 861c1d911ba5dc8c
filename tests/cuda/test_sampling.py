"""Sampling on a GPU: its distribution, its noise, its filters, and logits with NaN."""

# ruff: noqa: E402
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.cuda_host import require_gpu

require_gpu()

pytestmark = pytest.mark.gpu

from numballama import Error
from numballama.cuda.ops import sampling
from numballama.model import Model
from numballama.sampling import TEMPERATURE
from tests.cuda.checks import Bench, Slots, candidates, check_draws, check_rows, draw
from tests.cuda.gpu import LOGITS, told
from tests.helpers.sampling import make_sampler

SETTINGS: list[dict[str, Any]] = [
    {"top_k": 0, "top_p": 1.0, "temperature": 1.0},
    {"top_k": 0, "top_p": 1.0, "temperature": 3.0},
    {"top_k": 10, "top_p": 1.0, "temperature": 0.7},
    {"top_k": 0, "top_p": 0.7, "temperature": 1.5},
    {"top_k": 40, "top_p": 0.95, "temperature": 0.8},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.2},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1, "temperature": 2.0},
]


@pytest.mark.parametrize("settings_", SETTINGS, ids=str)
def test_the_distribution_of_20000_draws(bench: Bench, settings_: dict[str, Any]) -> None:
    """Chi-square against the exact probabilities after the filters, at a level of one in a million."""
    sampler = make_sampler(len(LOGITS), seed=11, **settings_)
    slots = Slots(bench, sampler, 1)
    slots.device.update(sampler, [0])
    arrays, following = (slots.device.arrays, slots.sampled.arrays), slots.sampled.arrays["next_token"]
    on_device, which = bench.put(LOGITS.reshape(1, -1)), bench.put(np.zeros(1, np.int32))
    launches = sampling.sample(bench.ctx.tokens, on_device, which, *arrays, logprobs=False)
    ((launch,),) = bench.backend.prepare_launches([launches])
    observed = np.zeros(len(LOGITS), int)
    for _ in range(20000):
        launch()
        observed[bench.get(following)[0]] += 1
    kept = sorted(candidates(LOGITS, sampler))
    weights = np.exp(LOGITS[kept].astype(np.float64) / sampler.settings[0, TEMPERATURE])
    expected = 20000 * weights / weights.sum()
    assert observed.sum() == observed[kept].sum() == 20000
    order = np.argsort(expected)
    rare = order[: int(np.searchsorted(np.cumsum(expected[order]), 10)) + 1]  # together: for each of them too few
    groups = [rare, *([i] for i in order[len(rare) :])]
    counts = np.array([(observed[kept][group].sum(), expected[group].sum()) for group in groups])
    if len(counts) > 1:
        statistic, k = ((counts[:, 0] - counts[:, 1]) ** 2 / counts[:, 1]).sum(), len(counts) - 1
        assert statistic < k * (1 - 2 / (9 * k) + 4.75 * (2 / (9 * k)) ** 0.5) ** 3  # Wilson and Hilferty, 1931


@pytest.mark.parametrize("vocab", [50, 5000, 128256])
@pytest.mark.parametrize("settings_", SETTINGS, ids=str)
def test_draws_follow_the_noise(bench: Bench, settings_: dict[str, Any], vocab: int) -> None:
    """The token with the largest logit / temperature + noise, of those that the CPU's filters keep."""
    if vocab > len(LOGITS):
        logits = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32) * 3
        logits = np.sort(logits)[::-1].copy() if vocab > 100000 else logits
        if settings_["top_p"] < 1 and not settings_["top_k"]:
            pytest.skip("without top-k, top-p takes or leaves whole bins of the histogram")
    else:
        logits = LOGITS
    check_draws(bench, logits, times=20, seed=5, **settings_)


def test_greedy_penalties_and_padding(bench: Bench) -> None:
    best = int(LOGITS.argmax())
    assert draw(bench, LOGITS, make_sampler(50, temperature=0))[0] == [best]
    assert draw(bench, LOGITS, make_sampler(50, top_k=1, seed=3), times=5)[0] == [best] * 5
    check_draws(bench, LOGITS, times=100, temperature=0, repeat_penalty=1.5)
    check_draws(bench, LOGITS, times=100, temperature=1.0, repeat_penalty=1.3, seed=8)
    padded = np.concatenate([LOGITS, np.full(14, 99, np.float32)])
    hot = make_sampler(64, temperature=50.0, top_k=0, top_p=1.0, seed=1, n_candidates=50)
    tokens, _ = draw(bench, padded, hot, times=300)
    assert min(tokens) >= 0 and max(tokens) < 50 and len(set(tokens)) > 40
    assert draw(bench, padded, make_sampler(64, temperature=0, n_candidates=50))[0] == [best]


def test_logits_that_are_no_numbers(bench: Bench) -> None:
    for bad in (np.nan, np.inf):
        broken = LOGITS.copy()
        broken[17] = bad
        assert draw(bench, broken, make_sampler(50, seed=4))[0] == [-1]
    assert draw(bench, broken, make_sampler(50, temperature=0))[0] == [17]


@pytest.mark.parametrize(("vocab", "rows"), [(70, 7), (5000, 7), (128256, 7), (32000, 64), (2000, 256)])
def test_rows_of_many_slots(bench: Bench, vocab: int, rows: int) -> None:
    check_rows(bench, vocab, 5 if rows < 50 else 2, rows=rows)


def test_seeds(model: Model) -> None:
    first = told(model, make_sampler(300, seed=1), 40)
    assert told(model, make_sampler(300, seed=1), 40) == first
    assert len({tuple(told(model, make_sampler(300, seed=seed), 20)) for seed in range(5)}) == 5
    cold = told(model, make_sampler(300, temperature=0), 40)
    assert told(model, make_sampler(300, top_k=1, seed=9), 40) == cold
    assert told(model, make_sampler(300, temperature=0, repeat_penalty=1.0), 40) == cold
    assert len(set(told(model, make_sampler(300, temperature=0, repeat_penalty=50.0), 40))) > len(set(cold))


def test_a_nan_in_the_weights_is_an_error(model: Model) -> None:
    told(model, make_sampler(300, seed=1), 3)
    backend = model.backend
    backend.device.make_current()
    backend.device.fill(backend.weights.operands["norm"].address, 0xFF, 4)
    for sampler in (
        make_sampler(300, temperature=0),
        make_sampler(300, seed=1),
        make_sampler(300, temperature=0, repeat_penalty=2.0),
    ):
        with model.exclusive() as session:
            with pytest.raises(Error, match="not numbers"):
                session.prefill([1, 2], sampler)
            with pytest.raises(Error, match="not numbers"):
                session.step(3, sampler)
