"""Options that commands share: they are fields of `SamplingParams`, and old spellings are accepted but not shown."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import numballama
from numballama import SamplingParams
from numballama.cli.args import (
    _FIELD_PHRASES,
    _PHRASES,
    SAMPLING_HELP,
    in_options,
    read_template,
    sampling_params,
    template_arguments,
)
from numballama.cli.main import parser
from numballama.errors import Error
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


def test_numbers_that_other_programs_use() -> None:
    """-1 tokens are no limit, as in llama.cpp; seed -1 is a random one."""
    parsed = parser().parse_args(["generate", "m", "x", "--max-tokens", "-1", "--seed", "-1"])
    assert sampling_params(parsed) == SamplingParams(max_tokens=None, seed=-1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("enable_thinking=false", False), ("a=1.5", 1.5), ('a={"b": [1, null]}', {"b": [1, None]}), ("a=x y", "x y"),
        ("a=", ""), ("a=b=c", "b=c"), ("a=False", False), ("a=None", None), ("a=26 Jul 2024", "26 Jul 2024"),
        ('a="quoted"', "quoted"), ("größe=1", 1),
    ],
)  # fmt: skip
def test_template_arguments(given: str, expected: object) -> None:
    parsed = parser().parse_args(["chat", "m", "--template-arg", "z=0", "--template-arg", given])
    assert template_arguments(parsed) == {"z": 0, given.partition("=")[0]: expected}


@pytest.mark.parametrize(
    "wrong", ["a", "=1", "a b=1", "messages=[]", "template=x", "add_generation_prompt=false", "a={", 'a="', "a=[1,]"]
)
def test_template_arguments_that_are_refused(wrong: str) -> None:
    with pytest.raises(Error, match="--template-arg"):
        template_arguments(parser().parse_args(["chat", "m", "--template-arg", wrong]))
    reserved = parser().parse_args(["chat", "m", "--template-arg", "messages=[]"])
    with pytest.raises(Error, match="cannot set messages: it is no variable of templates"):
        template_arguments(reserved)
    deep = parser().parse_args(["chat", "m", "--template-arg", "a=" + "[" * 100_000])
    with pytest.raises(Error, match="is not JSON"):
        template_arguments(deep)


def test_a_template_is_a_file_or_a_name(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("{{ ä }}", encoding="utf-8")
    assert read_template(str(tmp_path / "t")) == "{{ ä }}"
    (tmp_path / "t").write_text("{{ ä }}\r\n", encoding="utf-8-sig")
    assert read_template(str(tmp_path / "t")) == "{{ ä }}\n", "as Windows' editors write it"
    assert (read_template("tool_use"), read_template(None)) == ("tool_use", None)
    (tmp_path / "t").write_bytes(b"\xff")
    for wrong in (tmp_path / "t", tmp_path, tmp_path / "missing.jinja"):
        with pytest.raises(Error, match="cannot be read"):
            read_template(str(wrong))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("top_p must be above 0", "--top-p must be above 0"),
        ("kv_dtype 'x' is not supported; choose from f32", "--kv-dtype 'x' is not supported; choose from f32"),
        ("for the CPU: device='cpu'", "for the CPU: --device cpu"),
        ("shorten it, or compile with context=", "shorten it, or use --context"),
        ("x carries no tokenizer: pass its file to compile(…, tokenizer=…), --tokenizer on the command line",
         "x carries no tokenizer: pass its file to --tokenizer"),
        ("pass one, as template= or --chat-template", "pass one, as --chat-template"),
        ("batch_invariant is not supported by the reference", "--batch-invariant is not supported by the reference"),
        ("are free; a smaller kv_tokens= takes less", "are free; a smaller --kv-tokens takes less"),
        ("kv_tokens must be at least 1, found 0", "--kv-tokens must be at least 1, found 0"),
        ("/a/device=1/context: no such file", "/a/device=1/context: no such file"),
        ("the prompt is empty; None starts from the beginning-of-text token alone",
         "the prompt is empty; `numballama story --model …` begins without one"),
    ],
)  # fmt: skip
def test_errors_speak_of_options(error: str, expected: str) -> None:
    assert in_options(error) == expected


def test_phrases_are_those_of_the_errors() -> None:
    """Each phrase that is replaced occurs in the sources: an error that changes must not lose its translation."""
    package = Path(numballama.__file__).parent
    sources = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py") if path.name != "args.py")
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    joined = joined.replace("{name} must be", "must be")
    found = [phrase for phrase in (*_PHRASES, *_FIELD_PHRASES) if phrase.removeprefix("use ") not in joined]
    assert [phrase for phrase in found if phrase != "unknown sampling option"] == []
    with pytest.raises(Error, match="unknown sampling option"):
        SamplingParams(other=1)  # type: ignore[call-arg]
