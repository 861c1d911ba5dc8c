"""`numballama story` and `numballama generate`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tests.helpers.command_line import call

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def story15m(models: Path) -> tuple[str, ...]:
    return ("--model", str(models / "stories15M.bin"), "--tokenizer", str(models / "llama2_tokenizer.model"))


@pytest.fixture
def model260k(models: Path) -> tuple[str, str]:
    return str(models / "stories260K.bin"), str(models / "tok512.model")


@pytest.mark.slow
def test_story_tells_a_story(story15m: tuple[str, ...], capsys: Capture) -> None:
    done = call(capsys, "story", *story15m, "--temperature", 0, "--max-tokens", 30)
    assert done.code == 0
    assert done.out.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")
    assert done.out.endswith("\n")
    assert done.err == "", "quiet when piped"
    assert call(capsys, "story", *story15m, "--temperature", 0, "--length", 30) == done, "the old spelling"


@pytest.mark.slow
def test_story_prints_its_opening_and_follows_the_seed(story15m: tuple[str, ...], capsys: Capture) -> None:
    first, second, other = (
        call(capsys, "story", "A dog", *story15m, "--seed", seed, "--max-tokens", 20).out for seed in (1, 1, 2)
    )
    assert first.startswith("A dog") and first == second != other


@pytest.mark.slow
def test_the_model_of_the_package_tells_the_stories(capsys: Capture) -> None:
    done = call(capsys, "story", "--seed", 1)
    assert done.code == 0 and done.out == call(capsys, "story", "--seed", 1).out
    assert call(capsys, "story", "--opening", "rain", "--max-tokens", 9).out.startswith("It was a rainy day and Tom")
    assert call(capsys, "story", "--opening", "snow").code == 2


@pytest.mark.slow
def test_generate_prints_the_continuation_only(
    model260k: tuple[str, str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = model260k
    words = ("generate", model, "--tokenizer", tokenizer, "--temperature", 0, "--max-tokens", 20)
    direct = call(capsys, *words, "Once upon")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon"))
    piped = call(capsys, *words, "-")
    assert direct.code == 0 and direct.out == piped.out
    assert direct.out.startswith(" a time, there was")


@pytest.mark.slow
def test_generate_stops_before_a_stop_string(model260k: tuple[str, str], capsys: Capture) -> None:
    model, tokenizer = model260k
    words = ("generate", model, "Once upon", "--tokenizer", tokenizer, "--temperature", 0)
    assert call(capsys, *words, "--stop", "there", "--stop", "never").out == " a time, \n"
