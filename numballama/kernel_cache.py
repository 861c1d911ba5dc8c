"""The cache of compiled kernels: a folder named after a hash of sources and versions, and a file for each kernel.

So an entry is never stale. A file has a digest and the key that it was written for (source, signature, CPU), and both
are checked when it is loaded. It is written under another name and renamed, so other processes see all of it or
nothing. Whatever is the matter with the cache costs time and a line in the log, never a result.

Kernels of a GPU are found and loaded without importing Numba.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import progress
from .errors import NEXT_STEP, DeviceError

KERNEL_SOURCES = (
    "quantization/types.py",
    "host/call_types.py",
    "cpu/compiler.py",
    "cpu/intrinsics.py",
    "cpu/workers.py",
    "cpu/vecdot.py",
    "cpu/tiling.py",
    "cpu/panel_bytes.py",
    "cpu/products_int8.py",
    "cpu/activations_int8.py",
    "cpu/vecdot_int8.py",
    "cpu/panel_f32.py",
    "cpu/matmul.py",
    "cpu/attend.py",
    "cpu/kv_cache.py",
    "kernels_cpu.py",
    "cpu/kernels_int8.py",
    "cpu/collectives.py",
    "cpu/bandwidth.py",
    "cpu/backend.py",
    "cpu/executor.py",
    "sampling.py",
    "cpu/sampling.py",
)
"""Every file of the package that is compiled. A test keeps the list complete."""

KEPT_CACHES = 6
"""Number of cache folders of other sources that are kept, because other checkouts and environments may use them."""
MAX_ENTRY_BYTES = 16 << 20
"""A file that is larger is no entry. Kernels take up to a few hundred KiB."""
TRIED_BYTES = 1 << 20
"""Size of the file with which is tried whether entries can be stored."""
TEMPORARY_S = 3600.0
"""Age in seconds after which a temporary file was left by a process that was killed."""
NO_SOURCES = "the sources of this package, which name the cache, are not files here: unpack it"
ADVICE = "set NUMBALLAMA_CACHE to a folder that can be written"


# Where entries are


@lru_cache(maxsize=1)
def cache_directory() -> Path | None:
    """The folder of the CPU's compiled kernels, which may not exist yet. None if there is no place for it.

    Numba's own cache checks only the file of the cached function, so it would miss an edited helper in another file.
    """
    import numba

    try:
        name = _cpu_name()
    except OSError:  # in a zip archive, or compiled to .pyc alone
        _note("sources", f"compiled kernels are not kept: {NO_SOURCES}")
        return None
    return _folder(name, numba.config.CACHE_DIR)


@lru_cache(maxsize=1)
def cuda_cache_directory() -> Path | None:
    """The folder of the GPU's compiled kernels, as `cache_directory`. Raises `DeviceError` if numba-cuda is missing."""
    return _folder(_cuda_name(), os.environ.get("NUMBA_CACHE_DIR", ""))


def is_current(folder: Path) -> bool:
    """Whether the sources still have the hash that `folder` is named after; True for a folder of another name.

    Kernels are compiled long after the folder was chosen. A kernel that was edited in between must not be stored there.
    """
    if not _OUR_FOLDER.fullmatch(folder.name):
        return True
    for name in (_cpu_name, _cuda_name) if "numba" in sys.modules else (_cuda_name,):
        with contextlib.suppress(OSError, DeviceError):
            if folder.name == name():
                return True
    return False


def _cpu_name() -> str:
    import llvmlite
    import numba

    return _name(KERNEL_SOURCES, f"{numba.__version__} {llvmlite.__version__}")


def _cuda_name() -> str:
    """The name of the GPU's folder: a hash of all CUDA sources and of the compiler's version."""
    try:
        compiler = version("numba-cuda")
    except PackageNotFoundError:
        raise DeviceError(f"numba-cuda is missing: pip install 'numballama[cuda]'; {NEXT_STEP}") from None
    here = Path(__file__).parent
    sources = ["quantization/types.py", "host/call_types.py", "sampling.py", "kernels_cuda.py"]
    sources += sorted(str(path.relative_to(here)) for path in (here / "cuda").rglob("*.py"))
    return _name(sources, f"cuda {compiler}")


def _name(sources: Iterable[str], versions: str) -> str:
    """Name of a folder: a hash of source files and of the compilers' versions."""
    from . import __version__

    digest = hashlib.sha256(f"{versions} {__version__} {sys.version_info[:2]} format 2".encode())
    for name in sources:
        digest.update(name.encode() + b"\0" + (Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def cache_root(numbas: str = "") -> Path | None:
    """The folder of all caches: $NUMBALLAMA_CACHE, or a subfolder `numballama` of Numba's cache setting `numbas`, of
    $XDG_CACHE_HOME or of ~/.cache. None if there is no home directory.
    """
    own, xdg = os.environ.get("NUMBALLAMA_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    base = own or numbas or (xdg if os.path.isabs(xdg) else "~/.cache")  # XDG's rule: a relative one does not count
    try:
        root = Path(os.path.abspath(Path(base).expanduser()))
    except (RuntimeError, OSError):  # no home directory; no current one
        return None
    return root if own else root / "numballama"


def no_place() -> str:
    """Why `cache_root` is None."""
    own = os.environ.get("NUMBALLAMA_CACHE")
    return f"there is no home directory for NUMBALLAMA_CACHE={own}" if own else "there is no home directory"


def _folder(name: str, numbas: str) -> Path | None:
    root = cache_root(numbas)
    if root is None:
        _note("home", f"compiled kernels are not kept: {no_place()}; {ADVICE}")
        return None
    with contextlib.suppress(OSError):
        os.utime(root / name)  # folders that are used are not pruned
    return root / name


# Entries


def load(path: Path, key: str) -> bytes | None:
    """The content that was stored under this key, or None: no such entry, one of another key, or a damaged one."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _note("read", f"compiled kernels cannot be loaded ({_reason(error)}), so they are compiled; {ADVICE}")
        return None
    try:
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_ENTRY_BYTES:
                raise ValueError("no entry")
            head, body = file.readline(len(_HEAD) + 65), file.read(found.st_size)
        if head != _head(body):
            raise ValueError("damaged")
    except (OSError, ValueError):
        discard(path)
        return None
    stored_key, _, content = body.partition(b"\n")
    return content if stored_key == key.encode() else None


def discard(path: Path) -> None:
    """Note that an entry cannot be used. It is compiled again, and the new entry replaces it."""
    _note("damage", f"{path} is damaged; such kernels are compiled again")


def store(path: Path, key: str, content: bytes) -> bool:
    """Write an entry; returns whether it was written. `key` is one line."""
    body = key.encode() + b"\n" + content
    temporary = path.with_name(f"{path.name}.{os.urandom(8).hex()}{_TEMPORARY}")
    try:
        _prepare(path.parent)
        try:
            with open(temporary, "xb") as file:
                file.write(_head(body) + body)
            try:
                os.replace(temporary, path)
            except OSError:
                if not path.is_dir():
                    raise
                _remove_folder(path)
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        _note("write", f"compiled kernels cannot be stored ({_reason(error)}), so each start compiles them; {ADVICE}")
        return False
    return True


def _remove_folder(path: Path) -> None:
    """Remove a folder in an entry's place. It gets another name first, so that a process sees it or nothing."""
    aside = path.with_name(f"{path.name}.{os.urandom(8).hex()}{_TEMPORARY}")
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _reason(error: OSError) -> str:
    """A problem of the system and its file, without Python's words for it."""
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


_HEAD = b"numballama kernel "
_TEMPORARY = ".tmp"


def _head(body: bytes) -> bytes:
    """The first line of an entry: a digest of the rest."""
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + b"\n"


_noted: set[str] = set()
"""Kinds of problems that this process has noted."""


def _note(kind: str, text: str) -> None:
    """Log a problem as a warning, the first of its kind in this process. Without a log's handler it goes to stderr."""
    if kind not in _noted:
        _noted.add(kind)
        (progress.log.info if progress.quiet else progress.log.warning)(text)


_prepared: set[Path] = set()
"""Folders that this process has made ready for entries."""


def _prepare(folder: Path) -> None:
    """Make a folder for entries, and clear what is old in it and beside it. Raises `OSError` if it cannot be made."""
    if folder in _prepared and os.path.isdir(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    if _OUR_FOLDER.fullmatch(folder.name):
        (folder / _MARK).touch()
        _prune(folder.parent, folder)
    with contextlib.suppress(OSError):
        for left in folder.glob(f"*{_TEMPORARY}"):
            if left.lstat().st_mtime < time.time() - TEMPORARY_S:
                (shutil.rmtree if left.is_dir() and not left.is_symlink() else os.unlink)(left)
    _prepared.add(folder)


# Folders


_OUR_FOLDER = re.compile("[0-9a-f]{16}")
_MARK = "numballama-kernels"
"""File that marks a folder as ours. Only marked folders are removed."""


def _ours(root: Path) -> list[Path]:
    """The cache folders in `root`."""
    return [p for p in root.iterdir() if _OUR_FOLDER.fullmatch(p.name) and (p / _MARK).is_file() and not p.is_symlink()]


def _prune(root: Path, current: Path) -> None:
    """Remove all but the newest few caches, so that editing kernels does not fill the disk."""
    with contextlib.suppress(OSError):
        os.utime(current)
        others = [p for p in _ours(root) if p != current]
        for old in sorted(others, key=lambda p: p.stat().st_mtime)[:-KEPT_CACHES]:
            shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class Usage:
    """What a folder of the cache holds."""

    entries: int
    nbytes: int
    problem: str = ""
    """Why nothing can be written there; empty if something can."""

    @classmethod
    def of(cls, folder: Path) -> Usage:
        """Count the entries of a folder, and try to write one. A folder that does not exist is empty."""
        sizes = [found.st_size for found in _files(folder)]
        return cls(len(sizes), sum(sizes), _why_not_kept(folder))


def _why_not_kept(folder: Path) -> str:
    """Why an entry cannot be stored in a folder, or in one that would be made there. Empty if it can."""
    existing = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), folder)  # also a link to nothing
    if not os.path.isdir(existing):
        return f"{existing} is not a folder"
    try:  # limits of a quota and of a disk's files show only when something is written
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(TRIED_BYTES))
    except OSError as error:
        return f"{existing} cannot be written: {error.strerror or error}"
    return ""


def _files(folder: Path) -> Iterator[os.stat_result]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(Path(entry.path))
                elif entry.is_file(follow_symlinks=False) and entry.name != _MARK:
                    yield entry.stat(follow_symlinks=False)


def clear(root: Path) -> Usage:
    """Remove all caches in `root`, also those of other versions; returns what was removed, and the first problem."""
    entries = nbytes = 0
    problem = ""
    try:
        folders = _ours(root)
    except FileNotFoundError:
        folders = []
    except OSError as error:
        return Usage(0, 0, _reason(error))
    for folder in folders:
        before = [found.st_size for found in _files(folder)]
        try:
            shutil.rmtree(folder)
        except OSError as error:
            problem = problem or _reason(error)
        after = [found.st_size for found in _files(folder)]
        entries, nbytes = entries + len(before) - len(after), nbytes + sum(before) - sum(after)
    return Usage(entries, nbytes, problem)
