"""The command line as a whole: exit codes, errors, help; in a process of its own: pipes, terminals and Ctrl-C."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from numballama.cli import main
from tests.helpers.command_line import call

LONG = 300


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """One run of the program, its output captured."""
    command = [sys.executable, "-m", "numballama", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG, **options)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("generate", "missing.bin", "x"), "missing.bin"),
        (("generate", "{model}", "x"), "--tokenizer"),
        (("generate", "{model}", "", "--tokenizer", "{tokenizer}"), "empty"),
        (("generate", "{model}", "x", "--tokenizer", "{tokenizer}", "--temperature", "-1"), "temperature"),
        (("generate", "{model}", "x", "--tokenizer", "{tokenizer}", "--device", "cuda:99"), "cuda"),
        (("generate", "{model}", "x", "--tokenizer", "{tokenizer}", "--dtype", "q3_k"), "q3_k"),
        (("generate", "{model}", "x", "--tokenizer", "{tokenizer}", "--context", "0"), "context"),
        (("bench", "{model}", "--prompt-tokens", "1000"), "--context"),
        (("inspect", "{tokenizer}"), "{tokenizer}"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(
    models: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    names = {"model": str(models / "stories260K.bin"), "tokenizer": str(models / "tok512.model")}
    done = call(capsys, *(word.format(**names) for word in words))
    assert done.code == 1, done.err
    assert expected.format(**names) in done.err and "Traceback" not in done.err
    assert done.err.startswith("numballama: ") and done.out == ""


@pytest.mark.parametrize("words", [("sing",), ("generate",), ("story", "--temperature", "warm")])
def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    done = call(capsys, *words)
    assert done.code == 2 and "usage" in done.err


@pytest.mark.parametrize("command", ["story", "generate", "chat", "inspect", "bench", "perplexity"])
def test_help_names_every_option(capsys: pytest.CaptureFixture[str], command: str) -> None:
    done = call(capsys, command, "--help")
    assert done.code == 0 and "usage: numballama" in done.out
    assert "--tokenizer" in done.out


# In a process


@pytest.fixture
def story15m(models: Path) -> tuple[str, ...]:
    return ("--model", str(models / "stories15M.bin"), "--tokenizer", str(models / "llama2_tokenizer.model"))


@pytest.mark.slow
def test_the_package_tells_a_story_by_itself(tmp_path: Path) -> None:
    done = run("story", "--seed", 1, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("Once upon a time") and len(done.stdout) > 200
    assert done.stderr == "", "quiet when piped"


def on_terminal(words: tuple[object, ...], until: str, then: int | None = None) -> tuple[str, str, int]:
    """Run with a terminal as stderr; once stdout holds `until`, send a signal. Returns stdout, what the terminal showed
    and the exit code."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "numballama", *map(str, words)], stdout=subprocess.PIPE, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    assert process.stdout is not None
    text = b""
    deadline = time.monotonic() + LONG
    while until.encode() not in text and time.monotonic() < deadline:
        more = os.read(process.stdout.fileno(), 4096)
        if not more:
            break
        text += more
    if then is not None:
        process.send_signal(then)
    rest, _ = process.communicate(timeout=LONG)
    shown = b""
    try:
        while more := os.read(ours, 4096):
            shown += more
    except OSError:  # the terminal is gone with its last writer
        pass
    os.close(ours)
    return (text + rest).decode(), shown.decode(errors="replace"), process.returncode


@pytest.mark.slow
def test_a_terminal_gets_notes_and_speed(story15m: tuple[str, ...]) -> None:
    text, shown, code = on_terminal(("story", *story15m, "--temperature", 0, "--max-tokens", 20), "Once")
    assert code == 0 and text.startswith("Once upon a time")
    assert "KV cache" in shown and "tokens/s" in shown and "assumed" in shown
    quiet = on_terminal(("story", *story15m, "--max-tokens", 5, "--quiet"), "")
    assert quiet[1] == ""


def test_memory_that_runs_out_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(parsed: object) -> None:
        raise MemoryError

    monkeypatch.setattr(main, "_run", fail)
    code, text, shown = call(capsys, "doctor")
    assert (code, text) == (1, "") and shown.startswith("numballama: memory is short: ") and shown.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_keeps_the_text(story15m: tuple[str, ...]) -> None:
    """The story takes half a second with one worker; the signal comes with its first words."""
    words = ("story", *story15m, "--temperature", 0, "--threads", 1)
    text, shown, code = on_terminal(words, "Once", signal.SIGINT)
    whole = run(*words).stdout
    assert code == 130, shown
    assert len(text) < len(whole) and text.endswith("\n") and whole.startswith(text.rstrip("\n"))
    assert "interrupted" in shown and "Traceback" not in shown


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(story15m: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "numballama", "story", *story15m],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(timeout=LONG) in (0, 141) and errors == ""
    process.stderr.close()
