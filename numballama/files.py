"""Opens files as read-only mappings, and writes files and directories atomically."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from .errors import Error, FormatError

_LFS = b"version https://git-lfs.github.com/spec/"
"""First bytes of the text that Git keeps in place of a large file."""
_UNFINISHED = (".incomplete", ".aria2", ".crdownload", ".part", ".partial", ".download")
"""Suffixes of downloads that have not ended: of the hub's library, aria2c, browsers and curl-like programs."""
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


MOST_TEXT_BYTES = 1 << 28
"""Size of the largest text that is read whole. A device or a pipe may never end."""


def read_all(file: BinaryIO, name: str) -> bytes:
    """The rest of a text. Raises `Error` for more than `MOST_TEXT_BYTES`."""
    return _not_too_large(file.read(MOST_TEXT_BYTES + 1), name)


def read_line(file: BinaryIO, name: str) -> bytes:
    """The next line of a text with its end; empty after the last. Raises `Error` for more than `MOST_TEXT_BYTES`."""
    return _not_too_large(file.readline(MOST_TEXT_BYTES + 1), name)


def _not_too_large(data: bytes, name: str) -> bytes:
    if len(data) > MOST_TEXT_BYTES:
        raise Error(f"{name} has more than {MOST_TEXT_BYTES >> 20} MiB: pass a smaller text")
    return data


@dataclass(frozen=True)
class MappedFile:
    """A regular file of `size` > 0 bytes, mapped read-only. `data` stays mapped while any view of it is alive."""

    path: Path
    size: int
    data: mmap.mmap


def map_file(path: str | os.PathLike[str]) -> MappedFile:
    """Map the regular file at `path` (`~` is expanded). Only its beginning is read.

    Raises `Error` when it is missing, unreadable or not a regular file, and `FormatError` when it is empty, a pointer
    of Git LFS, or a download by aria2c that has not ended.
    """
    path = expand_user(path)
    # Without O_NONBLOCK, opening a FIFO waits for a writer that may never come.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        require_target(path)
        raise Error(f"{path}: no such file") from None
    except IsADirectoryError:
        raise Error(f"{path}: is a directory, expected a file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Error(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
            raise Error(f"{path}: is {kind}, expected a regular file")
        if status.st_size == 0:
            raise FormatError("the file is empty", path=path)
        if sys.version_info >= (3, 13):  # earlier versions keep a duplicate of the descriptor open
            data = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ, trackfd=False)
        else:
            data = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise Error(f"{path}: cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)
    if data[: len(_LFS)] == _LFS:
        raise FormatError(
            "a pointer of Git LFS, not the file itself", path=path,
            expected="its content (git lfs pull, or download the file)", found=f"{status.st_size:,} bytes of text",
        )  # fmt: skip
    if os.path.exists(note := f"{path}.aria2"):  # the file has its whole size from the beginning, mostly zeros
        raise FormatError("a download that has not ended", path=path, expected=f"no {note} (start aria2c again)")
    return MappedFile(path, status.st_size, data)


def require_target(path: Path) -> None:
    """Raise `Error` for a link to what is not there."""
    if os.path.islink(path) and not os.path.exists(path):  # unlike Path's, these are false for what is no path
        raise Error(
            f"{path}: is a link to {os.readlink(path)}, which is not there: a folder of the hub's cache is copied with "
            "its files by cp -rL"
        )


def require_targets(directory: Path, patterns: Sequence[str]) -> None:
    """`require_target` for the directory's entries whose names match one of the patterns."""
    for name in sorted(os.listdir(directory)) if os.access(directory, os.R_OK) else ():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            require_target(directory / name)


def unfinished(directory: Path) -> str:
    """What to say of downloads in a directory that have not ended; "" if there are none."""
    places = (directory, directory / ".cache" / "huggingface" / "download")  # the second is `hf download`'s
    names = [path.name for place in places for path in sorted(place.glob("*")) if path.suffix in _UNFINISHED]
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return f"a download that has not ended: {', '.join(names[:3])}{more}" if names else ""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block succeeds. If it raises, `path` is not changed.

    Raises `Error` when the file cannot be written or `path` is not a regular file.
    """
    target = Path(os.path.realpath(expand_user(path)))  # writes through a link, does not replace it
    if os.path.exists(target) and not os.path.isfile(target):
        raise Error(f"{target}: is not a regular file, so it is not overwritten")
    temporary = target.with_name(f".numballama-{os.urandom(8).hex()}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise Error(f"{target}: cannot be written: {_reason(error, target)}") from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def atomic_write_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a temporary directory that becomes `path` when the block succeeds. If it raises, the directory is deleted.

    Raises `Error` when `path` exists and is not an empty directory, or when it cannot be written.
    """
    target = Path(os.path.realpath(expand_user(path)))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise Error(f"{target}: exists and is not an empty directory, so it is not overwritten")
    temporary = target.with_name(f".numballama-{os.urandom(8).hex()}.tmp")
    try:
        try:
            temporary.mkdir()
            yield temporary
            for file in filter(Path.is_file, temporary.rglob("*")):
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise Error(f"{target}: cannot be written: {_reason(error, target)}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def require_folder(path: str | os.PathLike[str]) -> None:
    """Raise `Error` if `path`, which is to be written after much work, is in no folder."""
    target = expand_user(path)
    if not target.parent.is_dir():
        raise Error(f"{path}: cannot be written: there is no folder {target.parent}")


def _reason(error: OSError, target: Path) -> str:
    """Why `target` cannot be written, without the name of the temporary file."""
    if isinstance(error, FileNotFoundError) and not target.parent.exists():
        return f"there is no folder {target.parent}"
    return error.strerror or str(error)


def expand_user(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading `~` or `~user` expanded. Raises `Error` when it is empty or there is no such home."""
    try:
        if not os.fspath(path):  # a variable that is not set; Path("") would be the current directory
            raise Error("the path is empty: pass the name of a file or directory")
        return Path(path).expanduser()
    except TypeError:
        raise Error(f"a path must be a string or a Path, found {path!r:.200}") from None
    except RuntimeError as error:
        raise Error(f"{path}: {error}") from error
