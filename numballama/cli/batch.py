"""`numballama generate --input FILE --output FILE`: answers to the prompts of a JSON Lines file."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import DeviceError, Error, FormatError
from ..files import read_line
from ..progress import Report, progress_bar
from ..sampling import SamplingParams
from .args import in_fields

if TYPE_CHECKING:
    from ..generate import GenerationResponse
    from ..model import Model

LINE = 'a JSON text, or an object with "prompt" or "messages"'
NAMES = ("id", "custom_id")
"""Keys of a line that name it."""
TEXTS = ("prompt", "messages")
"""Keys of a line of which it has one."""
AHEAD = 4
"""Requests that are submitted ahead, for each sequence of a step."""


@dataclass(frozen=True)
class Task:
    """One line of the input."""

    id: str | int
    prompt: str | list[int] | None
    messages: list[Any] | None
    params: SamplingParams


def read_tasks(path: Path, params: SamplingParams) -> Iterator[Task]:
    """The lines of a JSON Lines file that are not empty.

    A line is a text, or an object: "prompt" (a text or token ids) or "messages", "id" or "custom_id" (without one, the
    number of the line), and fields of `SamplingParams` in place of those of `params`. Raises `FormatError` naming the
    line for anything else.
    """
    with path.open("rb") as file:
        for number in count(1):
            line = read_line(file, f"{path}: line {number}")
            if not line:
                return
            if line.strip():
                try:
                    yield _task(json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")), number, params)
                except (ValueError, RecursionError) as error:
                    raise _wrong(path, number, LINE, f"no JSON: {error}") from None
                except _NoPromptError as error:
                    raise _wrong(path, number, LINE, str(error)) from None
                except Error as error:
                    raise FormatError(in_fields(str(error)), path=path, where=f"line {number}") from None


class _NoPromptError(Error):
    """What a line is that has no prompt."""


def _wrong(path: Path, number: int, expected: str, found: str) -> FormatError:
    return FormatError("a line that is no prompt", path=path, where=f"line {number}", expected=expected, found=found)


def _task(found: object, number: int, params: SamplingParams) -> Task:
    if isinstance(found, str):
        found = {"prompt": found}
    if not isinstance(found, Mapping):
        raise _NoPromptError(_shown(found))
    given = dict(found)
    names = [given.pop(name) for name in NAMES if name in given]
    if len(names) > 1 or not all(isinstance(name, str | int) for name in names):
        raise Error(f"{' and '.join(NAMES)} must be one text or number, found {_shown(names)}")
    texts = {key: given.pop(key) for key in TEXTS if given.get(key) is not None}
    prompt, messages = texts.get("prompt"), texts.get("messages")
    if len(texts) != 1:
        raise _NoPromptError(f"{' and '.join(texts) or 'no prompt and no messages'} in {', '.join(found)!r:.100}")
    if not isinstance(messages, list | None) or not isinstance(prompt, str | list | None):
        ((name, value),) = texts.items()
        raise _NoPromptError(f"{name} {_shown(value)}")
    if isinstance(bias := given.get("logit_bias"), Mapping):  # the names in a JSON object are texts
        given["logit_bias"] = {int(token) if token.isdecimal() else token: value for token, value in bias.items()}
    settings = params.override(given)
    if settings.n != 1:
        raise Error("n must be 1: a line has one answer")
    given_messages = None if messages is None else _conversation(messages)
    return Task(names[0] if names else number, prompt, given_messages, settings)


def _conversation(messages: list[Any]) -> list[dict[str, Any]]:
    """Messages whose parts of text are joined, as the server does. Raises `Error` that names the place of another."""
    if not messages:
        raise Error("messages must have a message, found []")
    found = []
    for number, message in enumerate(messages):
        place = f"messages.{number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Error(f'{place} must be {{"role": …, "content": …}}, found {_shown(message)}')
        content = message.get("content")
        if isinstance(content, list):
            content = _joined(content, f"{place}.content")
        elif not isinstance(content, str | Mapping) and not (content is None and message.get("tool_calls")):
            raise Error(f"{place}.content must be a text, found {_shown(content)}")
        found.append({**message, "content": content} if "content" in message else dict(message))
    return found


def _joined(parts: list[Any], place: str) -> str:
    for number, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Error(f'{place}.{number} must be {{"type": "text", "text": …}}, found {_shown(part)}')
    return "\n".join(part["text"] for part in parts)


def _shown(value: object) -> str:
    """The beginning of a value as JSON."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}…"


def finished_ids(path: Path) -> set[str | int]:
    """Names of the answers in a file that an earlier run wrote. A last line that was cut is removed.

    Raises `FormatError` for a file that has anything but answers: it is not ours to continue.
    """
    found: set[str | int] = set()
    try:
        file = path.open("rb+")
    except FileNotFoundError:
        return found
    with file:
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                answer = json.loads(line)
                found.add(answer["id"])
            except (ValueError, TypeError, KeyError, RecursionError):
                expected, what = "answers of an earlier run", repr(line[:60])
                raise FormatError(
                    "an output file that has other lines", path=path, where=f"line {number}", expected=expected,
                    found=f"{what}: name another --output",
                ) from None  # fmt: skip
            whole += len(line)
        file.truncate(whole)
    return found


def run_batch(model: Model, source: Path, target: Path, params: SamplingParams) -> int:
    """Write an answer for each line of `source` to `target`, in that order; returns how many failed.

    An answer is an object: "id", "text", "finish_reason", "stop_reason", "prompt_tokens", "completion_tokens", or "id"
    and "error" where a prompt is refused. Each is written as a whole. Lines that `target` has answers for are skipped,
    so a run that was interrupted goes on when it is repeated.
    """
    if target.exists() and target.samefile(source):
        raise Error(f"{source} is both --input and --output")
    kept = None if source.is_file() else list(read_tasks(source, params))  # a pipe can be read once

    def tasks() -> Iterable[Task]:
        return read_tasks(source, params) if kept is None else kept

    names = [task.id for task in tasks()]  # a wrong line is found before any work
    if len(set(names)) < len(names):
        again, _ = Counter(names).most_common(1)[0]
        raise FormatError("an id that two lines have", path=source, expected="ids that differ", found=repr(again))
    done = finished_ids(target) if target.is_file() else set()  # a pipe has no earlier answers
    try:
        with target.open("a", encoding="utf-8") as out:
            written = sum(name in done for name in names)
            return _answer_all(model, (t for t in tasks() if t.id not in done), out, len(names), written)
    except OSError as error:
        if error.filename is not None or isinstance(error, BrokenPipeError):
            raise
        raise Error(f"{target}: cannot be written: {error.strerror or error}") from None


def _answer_all(model: Model, tasks: Iterable[Task], out: TextIO, total: int, written: int) -> int:
    """Write the answers to tasks; returns how many failed. `written` of the `total` were there before."""
    waiting: deque[tuple[Task, Iterator[GenerationResponse] | Error]] = deque()
    failed = 0
    with progress_bar("generating") as report:
        for task in tasks:
            waiting.append((task, _submit(model, task)))
            if len(waiting) >= AHEAD * model.max_sequences:
                failed += _answer(out, *waiting.popleft())
                written += 1
                _report(report, written, total)
        while waiting:
            failed += _answer(out, *waiting.popleft())
            written += 1
            _report(report, written, total)
    return failed


def _report(report: Report, done: int, total: int) -> None:
    report(f"{done:,} of {total:,}", done, total)


def _submit(model: Model, task: Task) -> Iterator[GenerationResponse] | Error:
    """The responses to a task, or why it is refused."""
    try:
        if task.messages is not None:
            ids = model.apply_chat_template(task.messages)
            return model.stream_ids(ids, params=task.params, strip_leading_space=True)  # type: ignore[arg-type]
        if isinstance(task.prompt, list):
            return model.stream_ids(task.prompt, params=task.params)
        return model.stream(task.prompt, params=task.params)
    except Error as error:
        return error


def _answer(out: TextIO, task: Task, responses: Iterator[GenerationResponse] | Error) -> bool:
    """Write the answer to a task; returns whether it failed."""
    answer: dict[str, Any] = {"id": task.id}
    try:
        if isinstance(responses, Error):
            raise responses
        parts = list(responses)
    except DeviceError:
        raise  # of all requests: the lines that are left can be answered by another run
    except Error as error:
        answer["error"] = in_fields(str(error))
    else:
        last = parts[-1] if parts else None
        answer["text"] = "".join(part.text for part in parts)
        answer["finish_reason"] = last.finish_reason if last else "length"
        answer["stop_reason"] = last.stop_reason if last else None
        answer["prompt_tokens"] = last.prompt_tokens if last else None
        answer["completion_tokens"] = len(parts)
    out.write(json.dumps(answer, ensure_ascii=False) + "\n")
    out.flush()
    return "error" in answer
