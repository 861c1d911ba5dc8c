"""Let Python look for garbage less often while a kernel is compiled.

What Numba makes of a kernel lives on, so that the collector passes over it again and again and finds little: 5 to 7 %
of what compiling takes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

AT_ONCE = 50_000
"""New objects after which the collector looks at them."""

_lock = threading.Lock()
_inside = 0
_before, _ours = gc.get_threshold(), gc.get_threshold()


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """Collect garbage after `AT_ONCE` new objects until all such blocks, of any thread, have ended.

    A collector that is off stays off, and one that works more seldom stays as it is, as does what others set meanwhile.
    """
    global _inside, _before, _ours
    with _lock:
        if not _inside:
            _ours = _before = gc.get_threshold()
            if 0 < _before[0] < AT_ONCE:
                _ours = (AT_ONCE, *_before[1:])
                gc.set_threshold(*_ours)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside = max(_inside - 1, 0)  # a forked child has begun to count again
            if not _inside:
                _give_back()


def _give_back() -> None:
    if gc.get_threshold() == _ours:
        gc.set_threshold(*_before)


def _forked() -> None:
    """In a forked child the threads do not exist that held the lock, or were in such a block."""
    global _lock, _inside
    _lock = threading.Lock()
    if _inside:
        _inside = 0
        _give_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
