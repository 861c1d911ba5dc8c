"""Files as this package opens and writes them: regular files only, mapped read-only; replaced whole or not at all."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import Error, FormatError

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


@dataclass(frozen=True)
class MappedFile:
    """A regular file of `size` > 0 bytes, mapped read-only; `data` lives as long as any view of it."""

    path: Path
    size: int
    data: mmap.mmap


def map_file(path: str | os.PathLike[str]) -> MappedFile:
    """Map the regular file at `path` (`~` expands); nothing of it is read yet.

    Raises `Error` when it is missing, unreadable or not a regular file, and `FormatError` when it is empty.
    """
    path = expand_user(path)
    # Without O_NONBLOCK, opening a FIFO waits for a writer that may never come.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise Error(f"{path}: no such file") from None
    except IsADirectoryError:
        raise Error(f"{path}: is a directory, expected a file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Error(f"{path}: cannot be opened: {error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
            raise Error(f"{path}: is {kind}, expected a regular file")
        if status.st_size == 0:
            raise FormatError("the file is empty", path=path)
        if sys.version_info >= (3, 13):  # earlier ones keep a duplicate of the descriptor open
            data = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ, trackfd=False)
        else:
            data = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise Error(f"{path}: cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)
    return MappedFile(path, status.st_size, data)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when the block ends well; otherwise `path` stays as it was.

    Raises `Error` when the file cannot be written or `path` is something else than a regular file.
    """
    target = Path(os.path.realpath(expand_user(path)))  # through a link, not in its place
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
            raise Error(f"{target}: cannot be written: {error}") from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def atomic_write_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a new directory that takes the place of `path` when the block ends well; otherwise nothing is left of it.

    Raises `Error` when `path` is there and no empty directory, or cannot be written.
    """
    target = Path(os.path.realpath(expand_user(path)))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise Error(f"{target}: is there already, and no empty directory; it is not overwritten")
    temporary = target.with_name(f".numballama-{os.urandom(8).hex()}.tmp")
    try:
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise Error(f"{target}: cannot be written: {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def expand_user(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading `~` or `~user` expanded; raises `Error` when there is no such home."""
    try:
        return Path(path).expanduser()
    except TypeError:
        raise Error(f"a path must be a string or a Path, found {path!r}") from None
    except RuntimeError as error:
        raise Error(f"{path}: {error}") from error
