"""Tokens per second over the last seconds."""

from __future__ import annotations

import pytest

from numballama.engine import stats
from numballama.engine.stats import WINDOW, Rates


def test_rates_count_the_last_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stats.time, "monotonic", lambda: now)
    rates = Rates()
    for second in range(1, 31):  # 10 tokens a second for 20 seconds, then 50
        now = 100.0 + second
        generated = 10 * min(second, 20) + 50 * max(second - 20, 0)
        assert rates.next_sample <= now
        rates.sample(now, 3 * second, generated)
    prompt, generated_rate = rates.per_second(90, 700)
    assert prompt == pytest.approx(3) and generated_rate == pytest.approx(50)


def test_an_idle_engine_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(stats.time, "monotonic", lambda: now)
    rates = Rates()
    rates.sample(1.0, 100, 100)
    now = 3 * WINDOW
    assert rates.per_second(100, 100) == (0, 0)
