"""Notes and progress bars: only on a terminal, and bars only after a delay."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from numballama import progress


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr a terminal. Called by the test itself: pytest sets its own stderr after fixtures are made."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "quiet", False)
    monkeypatch.setenv("TERM", "xterm")
    return terminal


def test_notes_are_printed_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    progress.info("a note")
    assert terminal.getvalue() == "a note\n"
    monkeypatch.setattr(progress, "quiet", True)
    progress.info("another")
    assert terminal.getvalue() == "a note\n"


def test_notes_are_logged_elsewhere(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, logger="numballama"):
        progress.info("a note")
    assert caplog.messages == ["a note"] and capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    progress.info("a note")


def test_a_bar_appears_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with progress.progress_bar("compiling") as report:
        report("x", 0, 2)
    assert terminal.getvalue() == "", "not at once"
    monkeypatch.setattr(progress, "DELAY_S", -1.0)
    with progress.progress_bar("compiling") as report:
        report("x", 1, 2)
    assert "compiling" in terminal.getvalue()


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY_S", -1.0)
    with progress.progress_bar("compiling") as report:
        report("x", 1, 2)
    assert capsys.readouterr() == ("", "")
