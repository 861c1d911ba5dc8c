"""Another Python with this one's module search path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from numballama.host.child import can_start_python, how_it_ended, python_environment


def test_a_child_finds_the_same_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    command = [sys.executable, "-c", "import os, only_here; print(os.environ['EXTRA'])"]
    done = subprocess.run(command, capture_output=True, text=True, env=python_environment(EXTRA="yes"))
    assert done.stdout == "yes\n", done.stderr


def test_a_program_that_is_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_start_python()
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert not can_start_python()
    monkeypatch.delattr(sys, "frozen")
    monkeypatch.setattr(sys, "executable", "/opt/blender/blender")
    assert not can_start_python()


def test_how_a_process_ended() -> None:
    assert [how_it_ended(code) for code in (0, 3, -9)] == ["exit code 0", "exit code 3", "signal SIGKILL"]
    assert how_it_ended(-60) == "signal 60", "a real-time signal without a name"
