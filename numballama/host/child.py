"""Another Python process with this one's module search path, for work that may crash or that runs beside this one's.

A child notices the end of its parent by its standard input, a pipe that ends then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time


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


def continue_when_parent_ends() -> None:
    """In a child: have the system continue this process when its parent ends. One that is stopped notices nothing.

    Linux only. A process that runs is not affected.
    """
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        with contextlib.suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGCONT)


def end_after_parent(within_s: float) -> None:
    """In a child: end this process `within_s` seconds after its parent has ended, whatever other threads do."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        time.sleep(within_s)
        os._exit(1)

    continue_when_parent_ends()
    threading.Thread(target=watch, name="numballama parent", daemon=True).start()
