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

from .. import __version__
from ..errors import DeviceError
from ..kernel_cache import cache_directory, cuda_cache_directory
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
    doctor.set_defaults(run=lambda arguments: print(report()))


def report() -> str:
    """The report: one fact per line. A line about something missing says what to do."""
    free = available_bytes()
    lines = [
        f"numballama {__version__}, Python {platform.python_version()} ({sys.executable})",
        f"system       {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        + (f", {format_bytes(free)} of memory free" if free else ""),
        f"packages     {_versions(PACKAGES)}",
        f"CPU kernels  {_folder(cache_directory())}",
        f"CUDA         {_versions(CUDA_PACKAGES)}",
        *(f"             {line}" for line in _cuda()),
    ]
    return "\n".join(lines)


def _versions(names: tuple[str, ...]) -> str:
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} missing")
    return ", ".join(versions)


def _folder(path: Path) -> str:
    files = [file for file in path.iterdir() if file.is_file()]
    writable = "" if os.access(path, os.W_OK) else ", not writable"
    return f"{path} ({len(files)} files, {format_bytes(sum(file.stat().st_size for file in files))}{writable})"


def _cuda() -> Iterator[str]:
    """Lines about the CUDA driver and each GPU, or the reason why device="cuda" does not work."""
    try:
        from ..cuda.compiler import require_compiler
        from ..cuda.driver import Device, versions

        require_compiler()
        yield f"kernels in {_folder(cuda_cache_directory())}"
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
