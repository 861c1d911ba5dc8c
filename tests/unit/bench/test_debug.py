"""NUMBALLAMA_DEBUG: what each level prints, on stderr, and that results stay the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import numballama
from numballama.bench import debug
from numballama.errors import Error
from tests.helpers.random_models import save
from tests.helpers.sampling import make_sampler

IDS = [1, 5, 7, 2]


def run(path: Path, device: str) -> tuple[np.ndarray, list[int]]:
    """Logits of a prompt, and tokens drawn after it, greedily and at random."""
    with numballama.compile(path, device=device, threads=1) as model:
        logits = model.logits(IDS)
        drawn: list[int] = []
        for temperature in (0.0, 1.0):
            sampler = make_sampler(model.config.vocab_size, temperature, seed=3)
            with model.exclusive() as session:
                token = session.prefill(IDS, sampler)
                for _ in range(3):
                    assert token is not None
                    drawn.append(token)
                    token = session.step(token, sampler)
        return logits, drawn


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_levels(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, _ = save(tmp_path, "llama2c-v0")
    monkeypatch.delenv(debug.VARIABLE, raising=False)
    logits, drawn = run(path, device)
    shown = capfd.readouterr()
    assert "graph " not in shown.err
    for level in (1, 2, 3):
        monkeypatch.setenv(debug.VARIABLE, str(level))
        same_logits, same = run(path, device)
        np.testing.assert_array_equal(same_logits, logits)
        assert same == drawn
        shown = capfd.readouterr()
        assert not shown.out
        assert "\n  outputs  logits" in shown.err, "the graph"
        assert ("plan of" in shown.err) == (level >= 2 and device == "cpu")
        assert ("run of" in shown.err) == (level == 3)
    kernel = "norm_qkv" if device == "cpu" else "linear"
    lines = re.findall(rf"^ +\d+ +[\d,.]+ µs +[\d,]+ bytes  {kernel} \(\w+\) → \S+: f32\[.*\]", shown.err, re.MULTILINE)
    assert lines, shown.err[-2000:]
    assert "positions 0 to 3, steps 0 to" in shown.err and "µs in all" in shown.err
    assert "steps 0 to -1" not in shown.err, "a run of no steps is not printed"


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_values_of_a_run_that_stops_and_goes_on(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Steps that work in place run once: printing them changed the values after them."""
    path, _ = save(tmp_path, "llama2c-v0")
    found: dict[str, np.ndarray] = {}
    for level in ("0", "3"):
        monkeypatch.setenv(debug.VARIABLE, level)
        with numballama.compile(path, device=device, threads=1) as model:
            names = [f"layers.{layer}.{name}" for layer in range(2) for name in ("probabilities", "x_out", "k_cache")]
            with model.exclusive() as session:
                reader = model.value_reader
                stops = [
                    stop.rows.copy() for stop in reader.stops(session, IDS, [n for n in names if "cache" not in n])
                ]
            each = [*stops, *(model.values(IDS, name) for name in (*names, "logits"))]
        for index, values in enumerate(each):
            np.testing.assert_array_equal(found.setdefault(str(index), values), values)
    shown = capfd.readouterr().err
    assert re.search(r"steps [1-9]\d* to", shown), "a run goes on"


def test_other_values_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("4", "yes", "-1"):
        monkeypatch.setenv(debug.VARIABLE, word)
        with pytest.raises(Error, match=r"NUMBALLAMA_DEBUG is .*choose 1 \(graph\)"):
            debug.level()
    for word in ("", "0"):
        monkeypatch.setenv(debug.VARIABLE, word)
        assert debug.level() == 0


@pytest.mark.slow
def test_text_stays_on_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debug.VARIABLE, "1")
    words = [
        sys.executable,
        "-m",
        "numballama",
        "story",
        "--device",
        "reference",
        "--length",
        "3",
        "--temperature",
        "0",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "graph " in done.stderr and "graph " not in done.stdout and done.stdout.strip()
