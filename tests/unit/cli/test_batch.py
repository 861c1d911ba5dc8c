"""`numballama generate --input FILE --output FILE`."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import numballama
from numballama.cli.batch import finished_ids, read_tasks, run_batch
from numballama.errors import Error, FormatError
from numballama.sampling import SamplingParams
from tests.helpers.command_line import call

STORY = Path(numballama.__file__).with_name("story.gguf")
GREEDY = SamplingParams(temperature=0, max_tokens=8)
LINES: list[Any] = [
    "Once upon a time",
    {"id": "dog", "prompt": "A dog", "max_tokens": 3},
    {"custom_id": 7, "prompt": [1, 5, 9]},
    {"id": "long", "prompt": "word " * 3000},
    {"id": "chat", "messages": [{"role": "user", "content": "Hi"}]},
    "The end",
]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines), encoding="utf-8")
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model() -> Any:
    with numballama.compile(None, device="cpu", max_sequences=3) as made:
        yield made


@pytest.mark.slow
def test_each_line_gets_its_answer(tmp_path: Path, model: numballama.Model) -> None:
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    assert run_batch(model, source, target, GREEDY) == 1
    found = answers(target)
    assert [each["id"] for each in found] == [1, "dog", 7, "long", "chat", 11], "without an id, the line's number"
    assert [found[i]["text"] for i in (0, 5)] == model.generate(["Once upon a time", "The end"], params=GREEDY)
    assert found[1]["text"] == model.generate("A dog", params=GREEDY, max_tokens=3)
    assert found[2]["completion_tokens"] == 8 and found[2]["prompt_tokens"] == 3
    assert set(found[3]) == {"id", "error"} and "context" in found[3]["error"]
    assert found[4]["finish_reason"] in ("stop", "length")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 0.4, 1.5, 5.99, 6])
def test_a_run_that_was_interrupted_goes_on(tmp_path: Path, model: numballama.Model, kept: float) -> None:
    """The file may end anywhere in a line, as when the process was killed."""
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    run_batch(model, source, target, GREEDY)
    whole = target.read_bytes()
    lines = whole.splitlines(keepends=True)
    cut = b"".join(lines[: int(kept)])
    if kept % 1:
        cut += lines[int(kept)][: int(kept % 1 * len(lines[int(kept)]))]
    target.write_bytes(cut)
    run_batch(model, source, target, GREEDY)
    assert target.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        "{", "3", "[]", "{}", '{"prompt": 3}', '{"messages": "x"}', '{"prompt": "a", "messages": []}', '{"id": "a"}',
        '{"prompt": "a", "n": 2}', '{"prompt": "a", "temperature": -1}', '{"prompt": "a", "tmperature": 1}',
        '{"prompt": "a", "id": [1]}', '{"prompt": "a", "id": 1, "custom_id": 2}', '"\\ud800', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f'"a"\n{line}\n"b"\n', encoding="utf-8")
    with pytest.raises(FormatError, match=r"in\.jsonl.*line 2"):
        list(read_tasks(path, GREEDY))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"prompt": "a", "stream": True}, "unknown field stream: leave it out"),
        ({"prompt": "a", "echo": True}, "unknown field echo: leave it out"),
        ({"prompt": "a", "cls": 1}, "unknown field cls;"),
        ({"prompt": "a", "ignore_eos": "x"}, "ignore_eos must be true or false, found 'x'"),
        ({"prompt": "a", "top_p": None}, "top_p must be above 0 and at most 1 (off), found null"),
        ({"prompt": "a", "json_schema": [1]}, "json_schema must be an object or JSON text"),
        ({"prompt": {"a": None}}, 'found prompt {"a": null}'),
        ({"messages": []}, "messages must have a message"),
        ({"messages": [{"content": "x"}]}, 'messages.0 must be {"role": …, "content": …}, found {"content": "x"}'),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content must be a text, found null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0 must be"),
    ],
)
def test_an_error_speaks_of_the_fields_of_a_line(tmp_path: Path, fields: dict[str, Any], found: str) -> None:
    with pytest.raises(FormatError) as raised:
        list(read_tasks(write(tmp_path / "in.jsonl", [fields]), GREEDY))
    assert found in str(raised.value) and str(raised.value).startswith(f"{tmp_path / 'in.jsonl'}: ")
    assert "line 1" in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": ["a"]}, "prompt must be a text or a list of token ids, found ['a']"),
        ({"prompt": [1] * 600}, "the prompt has 600 tokens and the context 512; shorten it, or use --context"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "conversation: user and assistant must take turns"),
    ],
)  # fmt: skip
def test_an_answer_that_failed_speaks_of_fields_and_options(
    tmp_path: Path, model: numballama.Model, fields: dict[str, Any], error: str
) -> None:
    assert run_batch(model, write(tmp_path / "in.jsonl", [fields]), tmp_path / "out.jsonl", GREEDY) == 1
    assert answers(tmp_path / "out.jsonl")[0]["error"].endswith(error)


def test_values_as_json_has_them(tmp_path: Path) -> None:
    """The names in an object are texts, and a content may be in parts."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    lines = [{"prompt": "a", "logit_bias": {"5": 1.5}}, {"messages": [{"role": "user", "content": parts}, call]}]
    biased, chat = read_tasks(write(tmp_path / "in.jsonl", lines), GREEDY)
    assert biased.params.logit_bias == {5: 1.5}
    assert chat.messages == [{"role": "user", "content": "a\nb"}, call]


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"a"\n"\xff"\n')
    with pytest.raises(FormatError, match="line 2"):
        list(read_tasks(path, GREEDY))


def test_a_file_of_something_else_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for text in ('{"id": 1}\nnotes\n', "[1]\n", '{"id": [1]}\n'):
        path.write_text(text)
        with pytest.raises(FormatError, match="name another --output"):
            finished_ids(path)
        assert path.read_text() == text
    assert finished_ids(tmp_path / "none") == set()


def test_ids_must_differ_and_files_too(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}])
    with pytest.raises(FormatError, match="found 'a'"):
        run_batch(None, source, tmp_path / "out.jsonl", GREEDY)  # type: ignore[arg-type]
    with pytest.raises(Error, match="both --input and --output"):
        run_batch(None, source, source, GREEDY)  # type: ignore[arg-type]
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_a_pipe_is_read_once_and_a_full_disk_is_named(tmp_path: Path, model: numballama.Model) -> None:
    pipe, target = tmp_path / "pipe", tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    for lines in (["Once", "A dog"], []):
        writer = threading.Thread(target=write, args=(pipe, lines))
        writer.start()
        assert run_batch(model, pipe, target, GREEDY) == 0
        writer.join()
    assert [each["id"] for each in answers(target)] == [1, 3]
    source = write(tmp_path / "in.jsonl", ["Once"])
    with pytest.raises(Error, match=f"^/dev/full: cannot be written: {os.strerror(errno.ENOSPC)}$"):
        run_batch(model, source, Path("/dev/full"), GREEDY)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write(tmp_path / "in.jsonl", ["Once"]), tmp_path / "out.jsonl"
    words = ("generate", STORY, "--device", "cpu", "--max-tokens", 2)
    assert call(capsys, *words).code == call(capsys, *words, "--output", target).code == 2, "no prompt"
    for wrong in (("--input", source), ("Once", "--output", target), ("Once", "--input", source, "--output", target)):
        done = call(capsys, *words, *wrong)
        assert done.code == 1 and "--input" in done.err and done.err.count("\n") == 1
    done = call(capsys, *words, "--input", source, "--output", target)
    assert done == (0, "", "") and [each["id"] for each in answers(target)] == [1]
    done = call(capsys, *words, "--input", tmp_path / "none", "--output", target)
    assert done.code == 1 and "none" in done.err
