"""Folders for compiled kernels. A folder's name is a hash of the sources and versions that its kernels depend on.

So an entry is never stale. Kernels of a GPU are found and loaded without importing Numba.
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
    "cpu/kv_cache.py",
    "kernels_cpu.py",
    "cpu/kernels_int8.py",
    "cpu/bandwidth.py",
    "cpu/backend.py",
    "cpu/executor.py",
    "sampling.py",
    "cpu/sampling.py",
)
"""Every file of the package that is compiled. A test keeps the list complete."""

KEPT_CACHES = 6
"""Number of cache folders of other sources that are kept, because other checkouts and environments may use them."""


@lru_cache(maxsize=1)
def cache_directory() -> Path:
    """The folder of the CPU's compiled kernels.

    Numba's own cache checks only the file of the cached function, so it would miss an edited helper in another file.
    """
    import numba

    return _folder(_name(KERNEL_SOURCES, numba.__version__), numba.config.CACHE_DIR)


@lru_cache(maxsize=1)
def cuda_cache_directory() -> Path:
    """The folder of the GPU's compiled kernels. Raises `DeviceError` if numba-cuda is missing."""
    return _folder(_cuda_name(), os.environ.get("NUMBA_CACHE_DIR", ""))


def is_current(folder: Path) -> bool:
    """Whether the GPU's sources still have the hash that `folder` is named after; True for a folder of another name.

    Kernels are imported when one must be compiled, which may be long after the folder was chosen. A kernel that was
    edited in between must not be stored there.
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
    """Name of a folder: a hash of source files and of the compilers' versions."""
    from . import __version__

    digest = hashlib.sha256(f"{versions} {__version__} {sys.version_info[:2]}".encode())
    for name in sources:
        digest.update(name.encode() + b"\0" + (Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def _folder(name: str, numbas: str) -> Path:
    """A folder for compiled kernels.

    It is in $NUMBALLAMA_CACHE if that is set. Otherwise it is in a subfolder `numballama` of Numba's cache setting (for
    GPUs: its environment variable), of $XDG_CACHE_HOME or of ~/.cache. If none can be written, the process uses a
    temporary folder.
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
"""File that marks a folder as ours. Only marked folders are removed."""


def _prune(root: Path, current: Path) -> None:
    """Remove all but the newest few caches, so that editing kernels does not fill the disk."""
    with contextlib.suppress(OSError):
        os.utime(current)
        ours = [p for p in root.iterdir() if _OUR_FOLDER.fullmatch(p.name) and (p / _MARK).is_file()]
        others = [p for p in ours if p != current]
        for old in sorted(others, key=lambda p: p.stat().st_mtime)[:-KEPT_CACHES]:
            shutil.rmtree(old, ignore_errors=True)
