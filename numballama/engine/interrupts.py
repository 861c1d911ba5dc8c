"""`DeferredInterrupt`: a step of the engine is not torn by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType

try:
    from _signal import getsignal  # type: ignore[import-not-found]  # 1 µs, the public ones 10
    from _signal import signal as set_signal
except ImportError:
    from signal import getsignal
    from signal import signal as set_signal

_SIGINT = int(signal.SIGINT)


class DeferredInterrupt:
    """A block that ends before Ctrl-C raises KeyboardInterrupt. A second Ctrl-C raises it at once.

    `arrived` tells the block that it should end. Without effect outside the main thread, and where the program has a
    SIGINT handler of its own.
    """

    __slots__ = ("_installed", "arrived")

    def __init__(self) -> None:
        self.arrived = self._installed = False

    def __enter__(self) -> DeferredInterrupt:
        if threading.current_thread() is threading.main_thread() and getsignal(_SIGINT) is signal.default_int_handler:
            self._installed = True
            set_signal(_SIGINT, self._note)
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if self._installed:
            self._installed = False
            set_signal(_SIGINT, signal.default_int_handler)
            if self.arrived and kind is None:
                raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.arrived:
            raise KeyboardInterrupt
        self.arrived = True
