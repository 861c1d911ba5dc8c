"""The host's memory: how much is available, how much was used, sizes rounded up, and sizes as text."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import Error
from .host.cgroup import ROOT, memory_left


def available_bytes(root: Path = ROOT) -> int | None:
    """Bytes that a new allocation could use without swapping, within the container's memory limit.

    A limit of the process (`ulimit -v`) counts, as clusters set it. None if the system does not tell: only Linux does.
    `root` is the root of the file system.
    """
    found = memory_left(root), _available_to_all(root), _address_space_left()
    return min((nbytes for nbytes in found if nbytes is not None), default=None)


def _address_space_left() -> int | None:
    """Bytes that this process may still map. None without a limit."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError, ValueError, IndexError):
        return None
    return None if limit == resource.RLIM_INFINITY else max(0, limit - pages * os.sysconf("SC_PAGE_SIZE"))


def _available_to_all(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    try:
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (KeyError, ValueError, IndexError):
        return None


def peak_bytes() -> int | None:
    """Maximum resident bytes of this process so far. None if the system does not tell: Windows does not."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int | None:
    """Resident bytes of this process now. None if the system does not tell: only Linux does."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def ceil_div(count: int, size: int) -> int:
    """count / size, rounded up."""
    return -(-count // size)


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `count`."""
    return ceil_div(count, multiple) * multiple


SHORTER = "a smaller context= takes less"
"""Advice for `require_available` if the size grows with the context."""


def require_available(nbytes: int, what: str, advice: str, error: type[Error] = Error) -> None:
    """Raise `error` if fewer than `nbytes` bytes are available. The message says what needs them, and the advice.

    Does nothing where the system does not tell how much is available.
    """
    free = available_bytes()
    if free is not None and nbytes > free:
        raise error(f"{what} takes {format_bytes(nbytes)}, {format_bytes(free)} are free; {advice}")


def format_bytes(nbytes: float) -> str:
    """A number of bytes with its unit, such as "58.0 MiB"."""
    size, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
