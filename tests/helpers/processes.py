"""Runs code in a separate Python process, and says whether a process runs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numballama

PACKAGE = Path(numballama.__file__).parent


def run_python(code: str, *arguments: object, timeout: float = 120, **environment: str) -> Any:
    """Run code in a new process and return the last line that it prints, as JSON. A hang fails by the timeout."""
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=os.path.abspath(os.sep),  # where no package lies that would come before PYTHONPATH's
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
    )
    assert found.returncode == 0, f"exit code {found.returncode}\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}"
    return json.loads(found.stdout.splitlines()[-1])


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that has ended and was not waited for does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and is_alive(int(entry.name)):
                found.append(int(entry.name))
    return sorted(found)
