"""`numballama chat` on a terminal and in a pipe."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from numballama.graph import PAGE
from tests.helpers.bpe import chat_model
from tests.helpers.command_line import Called, call

LONG = 60
COMMAND = (sys.executable, "-m", "numballama", "chat")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat"), context=4096)


class Terminal:
    """A program in a pseudo terminal: sends what is typed and reads what is shown."""

    def __init__(self, *words: object, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        self.shown = ""
        # the leader of a new session that opens a terminal gets it as its own: Ctrl-C then is a signal
        script = 'exec "$@" <"$TERMINAL" >"$TERMINAL" 2>&1'
        self.process = subprocess.Popen(
            ["sh", "-c", script, "sh", *map(str, words)],
            start_new_session=True,
            env=os.environ | {"TERMINAL": os.ttyname(theirs), "TERM": "xterm", "LANG": "C.UTF-8"} | environment,
        )
        time.sleep(0.05)
        self._theirs = theirs

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def answer(self, text: str) -> None:
        """Type at a prompt, as soon as the program waits there: a prompt is shown a moment before that, and a Ctrl-C in
        between is heard only with the next key. No person is that quick.
        """
        before, deadline = -1, time.monotonic() + LONG
        while (spent := self._processor_ticks()) != before and time.monotonic() < deadline:
            before = spent
            time.sleep(0.25)
        self.type(text)

    def _processor_ticks(self) -> int:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0
        return int(fields[11]) + int(fields[12])

    def wait_for(self, pattern: str, since: int = 0) -> str:
        """What was shown from `since` on, once it has the pattern."""
        deadline = time.monotonic() + LONG
        while not re.search(pattern, self.shown[since:]):
            assert time.monotonic() < deadline, f"{pattern!r} did not come in {self.shown!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                self.shown += os.read(self._ours, 65536).decode(errors="replace")
            else:
                assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.shown!r}"
        return self.shown[since:]

    def ends(self) -> int:
        """Its exit code; the rest of what it shows is read meanwhile."""
        os.close(self._theirs)
        deadline = time.monotonic() + LONG
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:
                    break
        return self.process.wait(timeout=LONG)


@contextmanager
def terminal(*words: object, **environment: str) -> Iterator[Terminal]:
    opened = Terminal(*words, **environment)
    try:
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()
        os.close(opened._ours)


FIGURES = r"(\d[\d,]*) tokens read, (\d[\d,]*) from the cache; (\d+) written, [\d,.]+ tokens/s"


@pytest.mark.slow
def test_a_conversation(path: Path) -> None:
    with terminal(*COMMAND, path, "--temperature", 0, "--max-tokens", 8) as t:
        t.wait_for(r"has no chat template, so it may not answer\. Used: ChatML chat template\.")
        t.wait_for(r"/help lists the commands[\s\S]*> ")
        figures = []
        for text in ("hello " * 12, "and then?"):
            since = len(t.shown)
            t.answer(f"{text}\n")
            shown = t.wait_for(rf"{FIGURES}.*cut at --max-tokens[\s\S]*> ", since)
            assert "\x1b[2m" in shown and text in shown
            found = re.search(FIGURES, shown)
            assert found is not None
            figures.append([int(number) for number in found.groups()])
        (read, reused, written), (later, held, _) = figures
        assert reused == 0 and written == 8
        assert held == (read + 7) // PAGE * PAGE > 0, "whole pages"
        assert later < PAGE + 40
        for command, answer in (
            ("/system", "there is no system message"),
            ("/system Be a pirate.", ""),
            ("/system", r"Be a pirate\."),
            ("/help", "Ctrl-C stops an answer"),
            ("/nonsense", "there is no command /nonsense; /help lists them. A space in front makes it a message"),
            (" /etc/passwd is what?", FIGURES),
            ("/reset", ""),
            ("a\\\nb", FIGURES),
        ):
            since = len(t.shown)
            t.answer(f"{command}\n")
            t.wait_for(rf"{answer}[\s\S]*> ", since + len(command))
        t.answer("\x04")
        assert t.ends() == 0
        assert "Traceback" not in t.shown


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_chat(path: Path) -> None:
    with terminal(*COMMAND, path, "--temperature", 0, "--max-tokens", 4000, "--threads", 1, NO_COLOR="1") as t:
        t.wait_for("> ")
        t.answer("\x03")
        t.wait_for(r"Ctrl-D or /exit ends[\s\S]*> ")
        since = len(t.shown)
        t.answer("hello\n")
        t.wait_for(r"hello\r\n[^\r\n]{20}", since)
        t.type("\x03")
        shown = t.wait_for(rf"{FIGURES}, stopped[\s\S]*> ", since)
        assert "\x1b[2m" not in shown
        written = int(re.search(FIGURES, shown)[3])  # type: ignore[index]
        assert 1 < written < 3900
        since = len(t.shown)
        t.answer("hello again\n")
        t.wait_for(r"again\r\n[^\r\n]{5}", since)
        t.type("\x03")
        found = re.search(FIGURES, t.wait_for(rf"{FIGURES}, stopped[\s\S]*> ", since))
        assert found is not None and int(found[2]) >= written // 32 * 32, "whole pages of the answer are reused"
        t.answer("/exit\n")
        assert t.ends() == 0
        assert "Traceback" not in t.shown


# In this process


class Typed(io.StringIO):
    """A stdin that says it is a terminal."""

    def isatty(self) -> bool:
        return True


Talk = Callable[..., Called]


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Call `numballama chat` with this text on stdin."""

    def with_text(text: str, *words: object, stdin: type[io.StringIO] = io.StringIO) -> Called:
        monkeypatch.setattr(sys, "stdin", stdin(text))
        return call(capsys, "chat", *words)

    return with_text


@pytest.mark.slow
def test_an_error_ends_a_turn_and_not_the_chat(path: Path, talk: Talk) -> None:
    words = (path, "--temperature", 0, "--max-tokens", 4, "--context", 64)
    done = talk("word " * 60 + "\nhi\n", *words, stdin=Typed)
    assert done.code == 0
    assert re.search(r"numballama: the conversation would have \d+ tokens and the context holds 64", done.err)
    alone = talk("hi\n", *words, stdin=Typed)
    assert alone.out.strip() and done.out == "\n" + alone.out, "the first turn ends with an empty line"


@pytest.mark.slow
def test_through_a_pipe(path: Path, tmp_path: Path, talk: Talk) -> None:
    words = (path, "--temperature", 0, "--max-tokens", 5)
    done = talk("hello\n\nmore\n", *words)
    assert done.code == 0 and done.err == ""
    first = talk("hello\n", *words).out
    assert first.endswith("\n") and done.out.startswith(first) and len(done.out) > len(first)
    assert talk("", *words).out == ""
    assert talk("hello\n", *words, "--system", "Be a pirate.").out != first
    for text in ("/etc/passwd is what?", "/exit", "/system Be a pirate."):
        asked = talk(f"{text}\nhello\n", *words)
        assert asked.code == 0 and asked.err == "" and asked.out.count("\n") >= 2, "through a pipe all is text"
        assert asked.out != first
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[-1].content }}")
    assert talk("hello\n", *words, "--chat-template", template).out != first


@pytest.mark.slow
def test_template_arguments_reach_the_template(path: Path, tmp_path: Path, talk: Talk) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception(say ~ n) if say else 'x' }}")
    words = (path, "--max-tokens", 2, "--chat-template", template)
    assert talk("hello\n", *words).code == 0
    done = talk("hello\n", *words, "--template-arg", "say=ahoy", "--template-arg", "n=7")
    assert done.code == 1 and "refuses this conversation: ahoy7" in done.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--chat-template", "missing.jinja"), "missing.jinja: cannot be read"),
        (("--temperature", "-1"), "temperature"),
        (("--context", "8"), "the context holds 8: begin a new conversation (/reset on a terminal), shorten"),
        (("--chat-template", "tool_use"), "the model has no chat template 'tool_use'; it has none with a name"),
        (("--template-arg", "x"), "--template-arg must be NAME=VALUE"),
        (("--template-arg", "return_tensors=pt"), "return_tensors is not supported"),
    ],
)
def test_errors_of_a_pipe_exit_with_1(path: Path, talk: Talk, words: tuple[str, ...], expected: str) -> None:
    done = talk("hello\n", path, *words)
    assert done.code == 1 and expected in done.err and "Traceback" not in done.err
