"""--help, its examples, and what wrong words are answered with."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from numballama.cli.main import parser
from numballama.cli.parser import Parser
from numballama.loader import STORY_MODEL
from tests.helpers.command_line import call


def commands() -> dict[str, Parser]:
    (action,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def words_of(example: str) -> tuple[list[str], str | None, str | None]:
    """The words after `numballama`, and the files that stdin and stdout are."""
    words = shlex.split(example)
    assert words.pop(0) == "numballama", example
    files: dict[str, str | None] = {"<": None, ">": None}
    for sign in files:
        if sign in words:
            at = words.index(sign)
            files[sign] = words[at + 1]
            del words[at : at + 2]
    return words, files["<"], files[">"]


EXAMPLES = [(name, example) for name, command in commands().items() for example in command.examples]


@pytest.mark.parametrize("name", commands())
def test_help_has_two_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, name, "--help")
    assert done.code == 0 and done.out.startswith(f"usage: numballama {name} ")
    examples = commands()[name].examples
    assert len(examples) >= 2 and all(f"  {example}\n" in done.out for example in examples)


@pytest.mark.parametrize("name", commands())
def test_help_is_as_the_documentation_writes_it(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments and values are in capitals, and words stay whole."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = call(capsys, name, "--help").out
    words = shown.partition("[options]")[2].partition("\n\n")[0].split()
    assert all(word.isupper() for word in words)
    options, _, _ = shown.partition("\nexamples:\n")
    assert not re.search(r"\w-\n", options), "no word is broken at a hyphen"
    assert not re.search(r"--[a-z-]+ [A-Z]+_", options), "no name of a variable stands for a value"


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_examples_are_understood(name: str, example: str) -> None:
    words, _, _ = words_of(example)
    assert parser().parse_args(words).command == name


NOT_RUN = ("numballama serve", "numballama doctor", "numballama completion", "numballama chat", "numballama bench")
"""A server and an address, what tests of their own run, a conversation that the story model has no template for, and a
measurement."""
NEEDS_OTHER_FILES = ("llama2_7b.bin", "owner/name")
RUN = [
    example
    for _, example in EXAMPLES
    if not example.startswith(NOT_RUN) and not any(name in example for name in NEEDS_OTHER_FILES)
]


@pytest.mark.slow
@pytest.mark.parametrize("example", RUN)
def test_examples_run(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with the files that they name; the model is the story model."""
    for name in ("model", "model-q4_0", "model-f16"):
        shutil.copy(STORY_MODEL, tmp_path / f"{name}.gguf")
    (tmp_path / "text.txt").write_text("One day, Lily and Tom went to the park. They saw a big red ball.\n" * 50)
    (tmp_path / "prompt.txt").write_text("Once upon a time")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One day", "max_tokens": 4}\n"Tom had"\n')
    monkeypatch.chdir(tmp_path)
    words, stdin, _ = words_of(example)
    if words[0] in ("story", "generate"):
        words += ["--max-tokens", "8"]  # the last one counts
    with open(stdin or os.devnull, encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        done = call(capsys, *words)
    assert done.code == 0, done.err
    assert done.out or (tmp_path / "answers.jsonl").stat().st_size


def test_most_examples_run() -> None:
    assert len(RUN) >= 8 and {"story", "generate", "inspect", "export"} <= {example.split()[1] for example in RUN}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("storry", "unknown command 'storry'; did you mean story?"),
        ("Doctor", "unknown command 'Doctor'; did you mean doctor?"),
        ("quantize a b", "unknown command 'quantize'; did you mean export?"),
        ("--versoin", "unknown option --versoin; did you mean --version?"),
        ("--json doctor", "unknown option --json: it belongs to numballama doctor, so it comes after that"),
        ("--context 64 story", "unknown option --context: it belongs to numballama story, so it comes after that"),
        ("story --temprature 0", "unknown option --temprature; did you mean --temperature?"),
        ("story --max_tokens=5", "unknown option --max_tokens; did you mean --max-tokens?"),
        ("story -n 5", "unknown option -n; did you mean --max-tokens?"),
        ("story --n-predict 5", "unknown option --n-predict; did you mean --max-tokens?"),
        ("story --ctx-size 5", "unknown option --ctx-size; did you mean --context?"),
        ("story -ngl 99", "unknown option -ngl; did you mean --device cuda?"),
        ("story -z", "unknown option -z"),
        ("story Once upon", "one word too many: 'upon'; a text with spaces needs quotes"),
        ("story --temperature warm", "argument --temperature: must be a number, found 'warm'"),
        ("story --max-tokens x", "argument --max-tokens: must be a whole number, found 'x'"),
        ("story --opening dragno", "unknown 'dragno'; did you mean dragon? (choose from once, dragon,"),
        ("generate model.gguf", "the following arguments are required: PROMPT"),
        ("generate model.gguf --prompt=hi", "unknown option --prompt: the prompt is given without an option"),
        ("generate -m model.gguf -p hi", "unknown option -m: the model is given without an option"),
        ("export -m a.gguf --outfile b.gguf --to gguf", "unknown option -m: the source is given without an option"),
        ("export a b --to gguf --imatrix c", "unknown option --imatrix; did you mean --calibrate?"),
        ("serve --served-model-name x", "unknown option --served-model-name; did you mean --model-name?"),
        ("doctor now", "one word too many: 'now'"),
        (
            "generate model.gguf -- hi --seed 1",
            "--seed stands after --, from where on no word is an option: put options",
        ),
        ("generate model.gguf -- hi --seed=1", "--seed=1 stands after --, from where on no word is an option"),
        ("generate model.gguf hi --n 2", "unknown option --n"),
        ("generate model.gguf hi --no=2", "unknown option --no"),
        ("generate model.gguf hi --special=1", "argument --special: takes no value, found '1'"),
        ("doctor --json --clear-cache", "argument --clear-cache: not allowed with argument --json"),
    ],
)
def test_wrong_words(capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    """A usage of one line, what is wrong, an example and where all options are."""
    done = call(capsys, *words.split())
    assert done.code == 2 and done.out == ""
    usage, error, example, more = done.err.splitlines()
    assert usage.startswith("usage: numballama ") and example.startswith("example: numballama ")
    assert re.match(r"numballama( \w+)?: error: ", error) and expected in error
    assert more.startswith("all options: numballama ") and more.endswith(" --help")


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """What to do first; the commands that are shown exist."""
    done = call(capsys)
    assert done.code == 2 and done.out == "" and "To begin:" in done.err
    shown = re.findall(r"^  numballama (\w+)", done.err, re.MULTILINE)
    assert shown[:2] == ["story", "doctor"] and set(shown) <= set(commands())


@pytest.mark.parametrize("words", [("help",), ("help", "story")])
def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    assert call(capsys, *words) == call(capsys, *words[1:], "--help")


def test_abbreviations_and_negative_numbers_stay(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = parser().parse_args(["story", "--temp", "0", "--seed", "-1", "--", "-n"])
    assert (parsed.temperature, parsed.seed, parsed.prompt) == (0, -1, "-n")
