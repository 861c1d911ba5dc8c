"""Another Python with this one's module search path."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from numballama.host.child import can_start_python, how_it_ended, python_environment
from tests.helpers.http_server import eventually
from tests.helpers.processes import is_alive, run_python


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


PARENT = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

CHILD = r"from numballama.host.child import end_after_parent; end_after_parent(0.1); print('up', flush=True)"
CHILD += "\\nwhile True: pass"
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
child = subprocess.Popen([sys.executable, "-c", CHILD], **pipes)
child.stdout.readline()
time.sleep(0.3)
assert child.poll() is None, "it ends while its parent is there"
if sys.argv[1] == "stopped":
    child.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
print(json.dumps(child.pid), flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux continues a process that was stopped")
@pytest.mark.parametrize("hangs", ["in a loop", "stopped"])
def test_a_child_that_hangs_ends_after_its_parent(hangs: str) -> None:
    pid = run_python(PARENT, hangs)
    try:
        eventually(lambda: not is_alive(pid), "the end of the child")
    finally:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
