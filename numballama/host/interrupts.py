"""Ctrl-C while a compiler works. Raised inside Numba, a KeyboardInterrupt is lost or becomes another error."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130
"""The exit code that shells use for Ctrl-C."""


def _is_ours_to_handle() -> bool:
    """Whether Ctrl-C would raise KeyboardInterrupt in this thread. A program's own handler is left alone."""
    return (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends, then raise KeyboardInterrupt. A second Ctrl-C interrupts the block."""
    if not _is_ours_to_handle():
        yield
        return
    received = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        if received:
            raise KeyboardInterrupt
        received = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if received:
            raise KeyboardInterrupt


@contextlib.contextmanager
def ends_the_process() -> Iterator[None]:
    """For a program's own start: Ctrl-C during the block ends the process at once, with a line and exit code 130.

    The imports of a start have C code that turns a KeyboardInterrupt into other errors.
    """
    if not _is_ours_to_handle():
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def let_the_system_end_the_process() -> None:
    """For the end of a program: from now on Ctrl-C ends the process at once, without an error of what Python ends."""
    if _is_ours_to_handle():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
