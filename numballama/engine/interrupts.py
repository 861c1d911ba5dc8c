"""`DeferredInterrupt`: a step of the engine is not torn by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class DeferredInterrupt:
    """A block that ends before Ctrl-C raises KeyboardInterrupt. A second Ctrl-C raises it at once.

    Without effect outside the main thread, and where the program has a SIGINT handler of its own.
    """

    def __init__(self) -> None:
        self._arrived = self._installed = False

    def __enter__(self) -> None:
        self._arrived = False
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            self._installed = True
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, kind: object, *exc: object) -> None:
        if self._installed:
            self._installed = False
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._arrived and kind is None:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._arrived:
            raise KeyboardInterrupt
        self._arrived = True
