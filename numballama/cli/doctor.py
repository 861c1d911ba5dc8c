"""What this machine offers, and what is missing: packages, CPU, GPUs, the cache of compiled kernels."""

from __future__ import annotations

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
MOST_DEVICES = 64


def examine() -> str:
    """A report for a person: a line a fact, what is missing with what to do about it."""
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
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    return ", ".join(found)


def _folder(path: Path) -> str:
    files = [file for file in path.iterdir() if file.is_file()]
    writable = "" if os.access(path, os.W_OK) else ", not writable"
    return f"{path} ({len(files)} files, {format_bytes(sum(file.stat().st_size for file in files))}{writable})"


def _cuda() -> Iterator[str]:
    """What stands between this machine and device="cuda", as far as one gets."""
    try:
        from ..cuda.compiler import require_compiler
        from ..cuda.driver import Device, versions

        require_compiler()
        yield f"kernels in {_folder(cuda_cache_directory())}"
        for index in itertools.islice(itertools.count(), MOST_DEVICES):
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
        found = versions()
        yield f"driver {found['driver'] or 'of unknown version'}, which brings CUDA {found['cuda']}"
        yield "device='auto' takes cuda"
    except DeviceError as error:
        yield str(error)
        yield "device='auto' takes cpu"
