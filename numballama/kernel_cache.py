"""Where compiled kernels are kept: a folder for each state of the sources and versions that they depend on.

So an entry is never stale. A GPU's folder is found, and its kernels are loaded from it, without Numba.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import DeviceError

KERNEL_SOURCES = (
    "quantization/types.py",
    "cpu/compiler.py",
    "cpu/intrinsics.py",
    "cpu/vecdot.py",
    "cpu/vecdot_int8.py",
    "cpu/tiling.py",
    "cpu/matmul.py",
    "kernels_cpu.py",
    "cpu/kernels_int8.py",
    "cpu/bandwidth.py",
    "cpu/executor.py",
    "sampling.py",
    "cpu/sampling.py",
)
"""Every file of the package that compiled code is made from; a test keeps the list complete."""

KEPT_CACHES = 6
"""Cache directories of older sources that are left for other checkouts and environments to use."""


@lru_cache(maxsize=1)
def cache_directory() -> Path:
    """Where the CPU's compiled kernels are kept.

    Numba itself looks only at the file of the function that it caches, so an edited helper elsewhere would go unseen.
    """
    import numba

    return _folder(_name(KERNEL_SOURCES, numba.__version__), numba.config.CACHE_DIR)


@lru_cache(maxsize=1)
def cuda_cache_directory() -> Path:
    """Where the GPU's compiled kernels are kept. Raises `DeviceError` without the compiler that makes them."""
    return _folder(_cuda_name(), os.environ.get("NUMBA_CACHE_DIR", ""))


def is_current(folder: Path) -> bool:
    """Whether the GPU's sources still have the state that `folder` is named after; True for a folder of another name.

    Kernels are imported when one must be compiled, which may be long after the folder was found: a kernel that was
    edited in between must not be kept there.
    """
    return not _OUR_FOLDER.fullmatch(folder.name) or folder.name == _cuda_name()


def _cuda_name() -> str:
    """The name of the GPU's folder: a hash of all CUDA sources and of the compiler's version."""
    try:
        compiler = version("numba-cuda")
    except PackageNotFoundError:
        raise DeviceError("numba-cuda is missing; install it with: pip install 'numballama[cuda]'") from None
    here = Path(__file__).parent
    sources = ["quantization/types.py", "kernels_cuda.py"]
    sources += sorted(str(path.relative_to(here)) for path in (here / "cuda").rglob("*.py"))
    return _name(sources, f"cuda {compiler}")


def _name(sources: Iterable[str], versions: str) -> str:
    """Of a folder, by the state of some sources and the versions of what compiles them."""
    from . import __version__

    digest = hashlib.sha256(f"{versions} {__version__} {sys.version_info[:2]}".encode())
    for name in sources:
        digest.update(name.encode() + b"\0" + (Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def _folder(name: str, numbas: str) -> Path:
    """A folder for compiled kernels.

    It lies in $NUMBALLAMA_CACHE, else in a folder numballama of Numba's own setting (for GPUs: its environment
    variable), $XDG_CACHE_HOME or ~/.cache. Where nothing can be written, a folder of this process, below the system's
    temporary one, takes its place.
    """
    base = os.environ.get("NUMBALLAMA_CACHE") or numbas or os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(base).expanduser() if base else Path("~/.cache").expanduser()
    if not os.environ.get("NUMBALLAMA_CACHE"):
        root /= "numballama"
    directory = root / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _MARK).touch()
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError:
        return Path(tempfile.mkdtemp(prefix="numballama-cache-"))
    _prune(root, directory)
    return directory


_OUR_FOLDER = re.compile("[0-9a-f]{16}")
_MARK = "numballama-kernels"
"""A file by which a folder is known to be one of ours: nothing else is ever removed."""


def _prune(root: Path, current: Path) -> None:
    """Remove all but the newest few caches, so that editing kernels does not fill the disk."""
    with contextlib.suppress(OSError):
        os.utime(current)
        ours = [p for p in root.iterdir() if _OUR_FOLDER.fullmatch(p.name) and (p / _MARK).is_file()]
        others = [p for p in ours if p != current]
        for old in sorted(others, key=lambda p: p.stat().st_mtime)[:-KEPT_CACHES]:
            shutil.rmtree(old, ignore_errors=True)
