"""Limits of containers, from file systems that the tests make."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.host import cgroup
from numballama.memory import available_bytes

V1, V2 = "v1", "v2"


@dataclass(frozen=True)
class Group:
    """What a control group allows; None is no limit."""

    quota: tuple[int, int] | None = None
    """Microseconds of a period's, and the period."""
    limit: int | None = None
    use: int = 0
    cached: int = 0


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def machine(
    root: Path, version: str, groups: list[Group], top: str = "/", shown: str | None = None, free_kib: int | None = None
) -> Path:
    """A root of a file system in which this process is in the last of the nested `groups`.

    `top` is the part of the hierarchy that is mounted; `shown` the path that the kernel shows, if it is another one.
    """
    path = "".join(f"/g{index}" for index in range(1, len(groups)))
    where = path or "/"
    if shown is None:
        shown = where if top == "/" else top + path
    if version == V2:
        lines = [f"0::{shown}"]
        mounts = [f"30 23 0:26 {top} /sys/fs/cgroup ro,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"]
    else:
        lines = ["9:name=systemd:/", f"4:memory:{shown}", f"3:cpu,cpuacct:{shown}", "0::/"]
        mounts = [
            f"32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct",
            f"35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory",
            "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw",
        ]
    write(root / "proc/self/cgroup", "\n".join(lines))
    write(root / "proc/self/mountinfo", "\n".join(["22 1 8:1 / / rw - ext4 /dev/sda rw", *mounts]))
    if free_kib is not None:
        write(root / "proc/meminfo", f"MemTotal: {2 * free_kib} kB\nMemAvailable: {free_kib} kB")
    for index, group in enumerate(groups):
        below = "".join(f"g{number}/" for number in range(1, index + 1))
        files: dict[str, object]
        if version == V2:
            folder = root / "sys/fs/cgroup" / below
            files = {
                "cpu.max": "max 100000" if group.quota is None else "{} {}".format(*group.quota),
                "memory.max": "max" if group.limit is None else group.limit,
                "memory.high": "max",
                "memory.current": group.use,
                "memory.stat": f"anon {group.use}\nactive_file {group.cached // 2}\n"
                f"inactive_file {group.cached - group.cached // 2}",
            }
            if index == 0:  # the kernel's root has no such files
                files = {} if top == "/" else files
        else:
            folder = root / "sys/fs/cgroup"
            files = {
                f"cpu,cpuacct/{below}cpu.cfs_quota_us": -1 if group.quota is None else group.quota[0],
                f"cpu,cpuacct/{below}cpu.cfs_period_us": 100_000 if group.quota is None else group.quota[1],
                f"memory/{below}memory.limit_in_bytes": (1 << 63) - 4096 if group.limit is None else group.limit,
                f"memory/{below}memory.usage_in_bytes": group.use,
                f"memory/{below}memory.stat": f"inactive_file 1\ntotal_inactive_file {group.cached}\n"
                "total_active_file 0",
            }
        for name, text in files.items():
            write(folder / name, text)
    return root


@st.composite
def groups(draw: st.DrawFn) -> Group:
    quota = draw(st.none() | st.tuples(st.integers(1000, 6_400_000), st.sampled_from([10_000, 100_000])))
    limit = draw(st.none() | st.integers(0, 1 << 40))
    use = draw(st.integers(0, 1 << 30))
    return Group(quota, limit, use, draw(st.integers(0, use)))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([V1, V2]), st.lists(groups(), min_size=1, max_size=4), st.integers(1, 1 << 32))
def test_the_strictest_of_all_groups_counts(
    tmp_path_factory: pytest.TempPathFactory, version: str, found: list[Group], free_kib: int
) -> None:
    root = machine(tmp_path_factory.mktemp("root"), version, found, free_kib=free_kib)
    counted = found[1:] if version == V2 else found
    quotas = [group.quota[0] / group.quota[1] for group in counted if group.quota]
    assert cgroup.cpu_quota(root) == min(quotas, default=None)
    left = [max(0, group.limit - (group.use - group.cached)) for group in counted if group.limit is not None]
    assert cgroup.memory_left(root) == min(left, default=None)
    assert available_bytes(root) == min([free_kib * 1024, *left])
    cores = cgroup.usable_cores(root)
    most = len(os.sched_getaffinity(0))
    assert 1 <= cores <= most
    assert cores == most if not quotas else abs(cores - min(quotas)) <= 0.5 or cores in (1, most)


@pytest.mark.parametrize("version", [V1, V2])
@pytest.mark.parametrize("shown", [None, "/", "/docker/0a1b", "/../elsewhere", "/gone/away"])
def test_in_a_container_only_its_own_part_is_mounted(tmp_path: Path, version: str, shown: str | None) -> None:
    """The kernel shows the host's path, the one below the container's own, or one outside it."""
    limited = Group((150_000, 100_000), 1 << 30, 100 << 20, 50 << 20)
    root = machine(tmp_path, version, [limited], top="/docker/0a1b", shown=shown)
    assert cgroup.cpu_quota(root) == 1.5
    assert cgroup.memory_left(root) == (1 << 30) - (50 << 20)


FOREIGN = ("/other", "/docker/ffff", "/../../other", "/docker")
"""Parts of a hierarchy that this process is not in, as a mount shows them."""


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([V1, V2]),
    st.sampled_from(["/", "/docker/0a1b"]),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(FOREIGN), st.booleans(), st.booleans()), min_size=1, max_size=3),
    st.integers(0, 2),
)
def test_other_mounts_of_the_hierarchy_hide_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    version: str,
    top: str,
    namespace: bool,
    others: list[tuple[str, bool, bool]],
    place: int,
) -> None:
    """Of the host, of other containers, with stricter limits or with no folder at all, before or after the own one.
    Without a namespace the process is seen at the host's path, with one at "/"."""
    own = [Group((150_000, 100_000), 1 << 30, 100 << 20, 50 << 20)]
    own = own if top != "/" else [Group(), *own]
    root = machine(tmp_path_factory.mktemp("root"), version, own, top, "/" if namespace and top != "/" else None)
    mountinfo = root / "proc/self/mountinfo"
    lines = mountinfo.read_text().splitlines()
    kind = "cgroup2 c rw" if version == V2 else "cgroup c rw,cpu,memory"
    for number, (foreign, there, escaped) in enumerate(others):
        folder = f"mnt/a b{number}" if escaped else f"mnt/{number}"
        if there:
            write(root / folder / "cpu.max", "10000 100000")
            write(root / folder / "cpu.cfs_quota_us", 10000)
            write(root / folder / "cpu.cfs_period_us", 100000)
            write(root / folder / "cgroup.procs", 1 << 30)
        shown = folder.replace(" ", "\\040")
        lines.insert(min(place, len(lines)), f"{50 + number} 31 0:26 {foreign} /{shown} rw - {kind}")
    mountinfo.write_text("\n".join(lines))
    assert cgroup.cpu_quota(root) == 1.5
    assert cgroup.memory_left(root) == (1 << 30) - (50 << 20)


@pytest.mark.parametrize("first", [False, True])
def test_the_group_that_lists_this_process_counts(tmp_path: Path, first: bool) -> None:
    """Two mounts that the paths do not tell apart."""
    root = machine(tmp_path, V2, [Group((150_000, 100_000))], top="/docker/0a1b", shown="/")
    write(root / "mnt/cpu.max", "200000 100000")
    for folder, pids in (("mnt", f"1\n{os.getpid()}"), ("sys/fs/cgroup", "1")):
        write(root / folder / "cgroup.procs", pids)
    lines = (root / "proc/self/mountinfo").read_text().splitlines()
    lines.insert(0 if first else 9, "50 31 0:26 /x /mnt rw - cgroup2 c rw")
    write(root / "proc/self/mountinfo", "\n".join(lines))
    assert cgroup.cpu_quota(root) == 2.0


@pytest.mark.parametrize(("quota", "cores"), [(1_000, 1), (100_000, 1), (149_000, 1), (150_000, 2), (6_400_000, 4)])
def test_a_quota_is_rounded_to_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: int, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    assert cgroup.usable_cores(machine(tmp_path, V2, [Group(), Group((quota, 100_000))])) == cores


def test_memory_high_is_a_limit_too(tmp_path: Path) -> None:
    """From there on the kernel slows the process down."""
    root = machine(tmp_path, V2, [Group(), Group(limit=1 << 30, use=1 << 20)])
    write(root / "sys/fs/cgroup/g1/memory.high", 1 << 25)
    assert cgroup.memory_left(root) == (1 << 25) - (1 << 20)


@pytest.mark.parametrize(
    ("cgroups", "mounts"),
    [
        (None, None),
        ("", ""),
        ("0::/", ""),
        ("nonsense\n0\n::\n", "nonsense\n - \n1 2 3 - cgroup2\n"),
        ("0::/", "1 2 0:3 / /sys\\040x - cgroup2 c rw"),
        ("\udcff0::/", "x"),
        ("3:cpu:/", "1 2 0:3 / /sys/fs/cgroup/cpu rw - cgroup"),
    ],
)
def test_other_systems_have_no_limits(tmp_path: Path, cgroups: str | None, mounts: str | None) -> None:
    for name, text in (("cgroup", cgroups), ("mountinfo", mounts)):
        if text is not None:
            path = tmp_path / "proc/self" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode(errors="surrogateescape"))
    assert cgroup.cpu_quota(tmp_path) is None and cgroup.memory_left(tmp_path) is None
    assert available_bytes(tmp_path) is None


@pytest.mark.parametrize("text", ["", "max", "max 100000", "x y", "100000", "0 0", "-1 100000", "100000 0"])
def test_files_that_say_nothing(tmp_path: Path, text: str) -> None:
    root = machine(tmp_path, V2, [Group(), Group(limit=5)])
    write(root / "sys/fs/cgroup/g1/cpu.max", text)
    write(root / "sys/fs/cgroup/g1/memory.max", text)
    assert cgroup.cpu_quota(root) is None
    assert cgroup.memory_left(root) is None or text == "100000"
