"""stdin, stdout and stderr of the command line. Whatever is wrong with them gives one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from ..errors import Error
from ..files import read_all, read_line

STANDARD = (0, 1, 2)
"""File descriptors of stdin, stdout and stderr."""


def prepare() -> None:
    """Make the streams safe to use. Raises `Error` when stdout is closed.

    The descriptors of closed streams are given to the null device: otherwise the next file that is opened gets one of
    them, and what a library prints to stdout ends in a model file.
    """
    stdout_is_closed = sys.stdout is None
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) in STANDARD:
            pass
        os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for the rest of the process)
    if stdout_is_closed:
        raise Error("stdout is closed, and the text of this command goes there: redirect it to a file or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another one


def say(text: str) -> None:
    """Print a line to stderr, if that is possible."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def abandon_stdout() -> None:
    """Send what is still buffered to the null device: it cannot be written, and Python would say so when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_stdin() -> str:
    """The whole of stdin, without a byte order mark. Raises `Error` when it is closed, unreadable or no text."""
    stdin = _stdin()
    if not isinstance(stdin, io.TextIOWrapper):
        return stdin.read()
    with _readable():
        data = read_all(stdin.buffer, "stdin")
    text = _decoded(data, stdin.encoding, "")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_lines() -> Iterator[str]:
    """The lines of stdin, without their ends. Lines before one that is no text are read. Raises `Error` as above."""
    stdin = _stdin()
    if not isinstance(stdin, io.TextIOWrapper):
        yield from (line.rstrip("\r\n") for line in stdin)
        return
    number = 0
    while True:
        number += 1
        with _readable():
            data = read_line(stdin.buffer, f"line {number} of stdin")
        if not data:
            return
        line = _decoded(data, stdin.encoding, f" of line {number}")
        yield line.removeprefix("\ufeff").rstrip("\r\n") if number == 1 else line.rstrip("\r\n")


def is_terminal() -> bool:
    """Whether stdin is a terminal. Raises `Error` when it is closed."""
    return _stdin().isatty()


def _stdin() -> TextIO:
    stdin: TextIO | None = sys.stdin  # None when it is closed
    if stdin is None or stdin.closed:
        raise Error("stdin is closed, and the text that this command reads comes from there")
    return stdin


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Error(f"stdin cannot be read: {error.strerror or error}") from None


def _decoded(data: bytes, encoding: str, where: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"0x{data[error.start]:02x} at byte {error.start}{where}"
        raise Error(f"stdin is not {encoding.upper()} text: {found}") from None
