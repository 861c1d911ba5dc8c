"""Checks in a process of their own, which may answer, fail, crash or hang."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from numballama import DeviceError
from numballama.doctor import check


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, limit_s: float = 60.0) -> dict[str, Any]:
    """Run `code` in the place of a check."""
    package = folder / "numballama" / "doctor"
    package.mkdir(parents=True)
    for name in ("numballama", "numballama/doctor"):
        (folder / name / "__init__.py").touch()
    (package / "pretended.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return check.run_check("pretended", lambda what, done, total: None, limit_s)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('no JSON')", "exit code 0: it printed nothing"),
        ("print('[1]')", "exit code 0"),
        ("raise OSError('the disk is gone')", "exit code 1: OSError: the disk is gone"),
        ("import os\nos.kill(os.getpid(), 4)", "signal SIGILL: it printed nothing"),
        ("import sys\nprint('{}')\nsys.exit(3)", "exit code 3"),
    ],
)
def test_why_there_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, expected: str) -> None:
    with pytest.raises(DeviceError, match=expected):
        run(monkeypatch, tmp_path, code)


def test_the_last_line_is_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, tmp_path, "print('a library says hello')\nprint('{\"works\": true}')") == {"works": True}


def test_a_check_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"did not end within 0\.2 s"):
        run(monkeypatch, tmp_path, "import time\ntime.sleep(100)", 0.2)


def test_without_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(DeviceError, match="no check was made"):
        check.run_check("cpu", lambda what, done, total: None)
