"""Runs a check of a device in a process of its own, because what it tries may crash or hang."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import Any

from ..errors import DeviceError
from ..host.child import can_start_python, python_environment
from ..progress import Report

LIMIT_S = 300.0
"""Seconds that a check may take: on a slow machine the first one compiles kernels for a minute."""
POLL_S = 0.1


def run_check(module: str, report: Report, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """What `python -m numballama.doctor.MODULE` prints as its last line, a JSON object.

    `report(what, done, total)` is called while it runs. Raises `DeviceError` if it does not end or does not answer.
    """
    if not can_start_python():
        raise DeviceError(f"no check was made: {sys.executable or 'this program'} is no Python that can be started")
    command = [sys.executable, "-m", f"numballama.doctor.{module}"]
    started = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", errors="replace", env=python_environment(PYTHONIOENCODING="utf-8"),
    ) as process:  # fmt: skip
        try:
            while True:
                passed = time.monotonic() - started
                report("", min(int(passed * 10), 99), 100)
                try:
                    out, err = process.communicate(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if passed > limit_s:
                        raise DeviceError(f"the check did not end within {limit_s:g} s") from None
        finally:
            if process.poll() is None:
                process.kill()
    return _answer(process.returncode, out, err)


def _answer(code: int, out: str, err: str) -> dict[str, Any]:
    try:
        answer = json.loads(out.strip().splitlines()[-1])
        if code == 0 and isinstance(answer, dict):
            return answer
    except (ValueError, IndexError, RecursionError):
        pass
    last = (err.strip().splitlines() or ["it printed nothing"])[-1]
    raise DeviceError(f"the check ended with {_ending(code)}: {last[:300]}")


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
