"""Options that commands share: they are fields of `SamplingParams`, and old spellings are accepted but not shown."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from numballama import SamplingParams
from numballama.cli.args import SAMPLING_HELP, sampling_params
from numballama.cli.main import parser
from tests.helpers.command_line import call


def test_sampling_options_are_fields() -> None:
    assert set(SAMPLING_HELP) <= {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("words", "max_tokens"), [(("story",), 400), (("generate", "m", "x"), 256), (("chat", "m"), 1024)]
)
def test_defaults_are_those_of_the_interface(words: tuple[str, ...], max_tokens: int) -> None:
    assert sampling_params(parser().parse_args(words)) == SamplingParams(max_tokens=max_tokens)


def test_every_sampling_option() -> None:
    words = "--max-tokens 3 --temperature 0.5 --top-k 4 --top-p 0.6 --min-p 0.1 --repetition-penalty 1.2 --seed 7"
    words += " --stop a --stop b --ignore-eos --special"
    given: dict[str, Any] = {"max_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.6, "min_p": 0.1, "seed": 7}
    given |= {"repetition_penalty": 1.2, "stop": ("a", "b"), "ignore_eos": True, "special": True}
    assert set(given) == set(SAMPLING_HELP)
    assert sampling_params(parser().parse_args(["generate", "m", "x", *words.split()])) == SamplingParams(**given)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (("story", "--length", "5"), "max_tokens", 5),
        (("generate", "m", "x", "--repeat-penalty", "1.5"), "repetition_penalty", 1.5),
        (("bench", "--tokens", "5"), "max_tokens", 5),
        (("export", "a", "b", "--to", "gguf", "--quant", "q8_0"), "dtype", "q8_0"),
        (("story", "--rope-pairing", "neox"), "rope_pairing", "neox"),  # ModelConfig knows llama.cpp's names
    ],
)
def test_other_spellings(words: tuple[str, ...], name: str, value: object) -> None:
    assert getattr(parser().parse_args(words), name) == value


@pytest.mark.parametrize(
    ("command", "old"),
    [("story", "--length"), ("bench", "--tokens"), ("export", "--quant"), ("chat", "--repeat-penalty")],
)
def test_old_spellings_are_not_shown(capsys: pytest.CaptureFixture[str], command: str, old: str) -> None:
    assert f" {old} " not in call(capsys, command, "--help").out
