"""What a container allows: the CPU quota and the memory limit of this process's control groups (Linux, v1 and v2).

Every group above this process counts too. Functions take the root of the file system, so that a test can make one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
UNLIMITED = 1 << 60
"""Limits from here on mean none: v1 writes the largest number of pages."""


def cpu_quota(root: Path = ROOT) -> float | None:
    """How many cores the process may use on average, such as 1.5. None without a quota."""
    quotas = []
    for group in _groups(root, ""):
        with contextlib.suppress(OSError, ValueError, IndexError):  # "max 100000": no quota
            quota, period = (int(word) for word in (group / "cpu.max").read_text().split()[:2])
            quotas.append((quota, period))
    for group in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            quotas.append((quota, period))
    return min((quota / period for quota, period in quotas if quota > 0 and period > 0), default=None)


def memory_left(root: Path = ROOT) -> int | None:
    """Bytes that the process may still allocate. None without a limit. Cached files count as free: they are dropped."""
    left = []
    for group in _groups(root, ""):
        for name in ("memory.max", "memory.high"):
            left.append(_left(group, name, "memory.current", ""))
    for group in _groups(root, "memory"):
        left.append(_left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
    return min((bytes_ for bytes_ in left if bytes_ is not None), default=None)


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may use at once: those that it may run on, or fewer if a container's quota is below.

    A quota is rounded to the nearest number of cores. Workers wait for each other at every step, so one that is stopped
    for the rest of a period stops all.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota + 0.5)))


def _left(group: Path, limit_name: str, use_name: str, prefix: str) -> int | None:
    try:
        limit, use = int((group / limit_name).read_text()), int((group / use_name).read_text())
    except (OSError, ValueError):  # "max": no limit
        return None
    if not 0 <= limit < UNLIMITED:
        return None
    cached = 0
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, number = line.partition(" ")
            if name in (f"{prefix}active_file", f"{prefix}inactive_file"):
                cached += int(number)
    return max(0, limit - max(0, use - cached))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and those above it, in the hierarchy of a v1 controller, or of v2 for ""."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (controller in controllers.split(",")) if controller else (number == "0" and not controllers):
            break
    else:
        return
    for base, group in _mounted(root, mounts, controller, path):
        while group.is_relative_to(base):
            yield group
            group = group.parent


def _mounted(root: Path, mounts: list[str], controller: str, path: str) -> list[tuple[Path, Path]]:
    """(folder of a mount, folder of the group `path` in it), for the mounts of a hierarchy that show this process's
    group. `mounts` are the lines of mountinfo.

    A hierarchy may be mounted several times, and a mount show another part of it. Those count whose group lists this
    process, else those that have a folder of its path, else one at the usual place.
    """
    named, others = [], []
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        fields, (kind, *_, options) = before.split(), [*after.split(), "", ""][:3]
        if len(fields) < 5 or kind != ("cgroup" if controller else "cgroup2"):
            continue
        if controller and controller not in options.split(","):
            continue
        top, folder = (_unescaped(field) for field in fields[3:5])
        base = root / folder.lstrip("/")
        # in a container, `path` may be the host's, of which only the part below `top` is mounted
        if (path + "/").startswith(top.rstrip("/") + "/"):
            whole = group = Path(os.path.normpath(base / os.path.relpath(path, top)))
            while group != base and group.is_relative_to(base) and not os.path.isdir(group):
                group = group.parent
            if group.is_relative_to(base) and os.path.isdir(group) and (group != base or whole == base):
                named.append((base, group))
                continue
        others.append((base, base))  # a namespace shows a group outside it as "/../…"
    if ours := [found for found in [*named, *others] if _lists_this_process(found[1])]:
        return ours
    usual = root / "sys/fs/cgroup"
    others.sort(key=lambda found: (not os.path.isdir(found[0]), not found[0].is_relative_to(usual)))
    return named or others[:1]


def _lists_this_process(group: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return str(os.getpid()) in (group / "cgroup.procs").read_text().split()
    return False


def _unescaped(path: str) -> str:
    """A path of /proc/self/mountinfo, where a space is written as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
