"""Another Python process with this one's module search path, for work that may crash or that shall run beside."""

from __future__ import annotations

import os
import signal
import sys


def can_start_python() -> bool:
    """Whether `sys.executable` is a Python: a frozen program, or one that embeds Python, would start itself."""
    return not getattr(sys, "frozen", False) and "python" in os.path.basename(sys.executable or "").lower()


def python_environment(**variables: str) -> dict[str, str]:
    """A child's environment: this process's module search path, and `variables`."""
    path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    ours = {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONSAFEPATH": "1",  # -m would put the current directory first
        "PYTHONNOUSERSITE": "1",  # the user's packages are in the path above if this process has them
    }
    return os.environ | ours | variables


def how_it_ended(code: int) -> str:
    """The exit code of a process in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal between the first and the last has no name
        return f"signal {-code}"
