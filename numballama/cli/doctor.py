"""`numballama doctor`: packages, CPU, GPUs and the cache of compiled kernels of this machine, and what is missing."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .. import __version__, kernel_cache
from ..errors import DeviceError, Error
from ..host import environment
from ..host.cgroup import cpu_quota, usable_cores
from ..memory import available_bytes, format_bytes

PACKAGES = ("numba", "llvmlite", "numpy", "sentencepiece", "rich")
CUDA_PACKAGES = ("numba-cuda", "cuda-bindings")
MAX_DEVICES = 64


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="show what this machine offers",
        description="Packages, CPU, GPUs and the cache of compiled kernels: what was found, and what is missing.",
    )
    doctor.add_argument(
        "--clear-cache", action="store_true", help="remove all compiled kernels, so that they are compiled again"
    )
    doctor.set_defaults(run=lambda arguments: print(clear_cache() if arguments.clear_cache else report()))


def report() -> str:
    """The report: one fact per line. A line about something missing says what to do."""
    free, quota = available_bytes(), cpu_quota()
    lines = [
        f"numballama {__version__}, Python {platform.python_version()} ({sys.executable})",
        f"system       {platform.system()} {platform.machine()}, {os.cpu_count()} cores, {usable_cores()} usable"
        + (f" (a quota of {quota:.3g})" if quota is not None else "")
        + (f", {format_bytes(free)} of memory free" if free is not None else ""),
        f"packages     {_versions(PACKAGES)}",
        f"CPU kernels  {_cpu_kernels()}",
        f"CUDA         {_versions(CUDA_PACKAGES)}",
        *(f"             {line}" for line in _cuda()),
    ]
    return "\n".join(lines)


def clear_cache() -> str:
    """Remove the compiled kernels of all versions, for CPU and GPU; returns what was done, a line for each folder."""
    roots = {kernel_cache.cache_root(numbas) for numbas in ("", os.environ.get("NUMBA_CACHE_DIR", ""))}
    lines = []
    for root in sorted(root for root in roots if root is not None):
        removed = kernel_cache.clear(root)
        if removed.problem:
            raise Error(f"{root}: not all compiled kernels could be removed: {removed.problem}")
        lines.append(f"removed {removed.entries:,} compiled kernels, {format_bytes(removed.nbytes)}, from {root}")
    return "\n".join(lines) or "there is no cache: no home directory, and NUMBALLAMA_CACHE is not set"


def _cpu_kernels() -> str:
    try:
        environment.import_numba()
    except DeviceError as error:
        return str(error)
    return _folder(kernel_cache.cache_directory())


def _versions(names: tuple[str, ...]) -> str:
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} missing")
    return ", ".join(versions)


def _folder(path: Path | None) -> str:
    if path is None:
        return f"are not kept: there is no home directory; {kernel_cache.ADVICE}"
    usage = kernel_cache.Usage.of(path)
    problem = f"; new ones are not kept: {usage.problem}; {kernel_cache.ADVICE}" if usage.problem else ""
    return f"{path} ({usage.entries:,} kernels, {format_bytes(usage.nbytes)}{problem})"


def _cuda() -> Iterator[str]:
    """Lines about the CUDA driver and each GPU, or the reason why device="cuda" does not work."""
    try:
        from ..cuda.compiler import require_compiler
        from ..cuda.driver import Device, versions

        require_compiler()
        yield f"kernels in {_folder(kernel_cache.cuda_cache_directory())}"
        for index in itertools.islice(itertools.count(), MAX_DEVICES):
            try:
                device = Device(f"cuda:{index}")
            except DeviceError:
                if index == 0:
                    raise
                break
            capability = "{}.{}".format(*device.capability)
            yield (
                f"cuda:{index}: {device.name}, compute capability {capability}, {device.n_sms} multiprocessors, "
                f"{format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} free"
            )
        installed = versions()
        yield f"driver {installed['driver'] or 'of unknown version'}, which brings CUDA {installed['cuda']}"
        yield "device='auto' takes cuda"
    except DeviceError as error:
        yield str(error)
        yield "device='auto' takes cpu"
