"""A timeout of the program: a signal's handler that raises, at any place where Python calls handlers."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Collection, Iterator
from types import FrameType


class LateError(Exception):
    """What the handler raises."""


def late(number: int, frame: FrameType | None) -> None:
    """The handler."""
    raise LateError


@contextlib.contextmanager
def late_at(nth: int, files: Collection[str]) -> Iterator[None]:
    """Call the handler at the nth place, from 0 on, in functions of these files: where one begins, and after a call of
    one in C. `files` are modules' `__file__`."""
    left = nth

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename in files:
            left -= 1
            if left == -1:
                late(signal.SIGALRM, sys._getframe())

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)
