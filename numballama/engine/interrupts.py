"""`DeferredInterrupt`: a step of the engine is not torn by Ctrl-C. `is_interrupt`: whether a signal has torn it."""

from __future__ import annotations

import inspect
import signal
import sys
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

    __slots__ = ("_block", "arrived")

    def __init__(self) -> None:
        self.arrived = False
        self._block: FrameType | None = None
        """The frame that has the block, while SIGINT is deferred."""

    def __enter__(self) -> DeferredInterrupt:
        if threading.current_thread() is threading.main_thread() and getsignal(_SIGINT) is signal.default_int_handler:
            self._block = sys._getframe(1)
            set_signal(_SIGINT, self._note)
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if self._block is not None:
            self._block = None
            set_signal(_SIGINT, signal.default_int_handler)
            if self.arrived and kind is None:
                raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        while frame is not None and frame is not self._block:
            frame = frame.f_back
        if frame is None:  # another signal's handler has raised where the block begins or ends, so this has stayed
            set_signal(_SIGINT, signal.default_int_handler)
        if frame is None or self.arrived:
            raise KeyboardInterrupt
        self.arrived = True


def is_interrupt(error: BaseException) -> bool:
    """Whether what a step has raised comes from outside: Ctrl-C, an exit, or a signal's handler that raises a timeout.

    Python calls a handler with the frame that it interrupts, which is also the frame before the handler's in the
    traceback.
    """
    trace = error.__traceback__
    while isinstance(error, Exception) and trace is not None and trace.tb_next is not None:
        torn, trace = trace.tb_frame, trace.tb_next
        code, found = trace.tb_frame.f_code, trace.tb_frame.f_locals
        count = code.co_argcount + bool(code.co_flags & inspect.CO_VARARGS)
        for name in code.co_varnames[:count]:
            value = found.get(name)
            if value is torn or (isinstance(value, tuple) and any(each is torn for each in value)):
                return True
    return not isinstance(error, Exception)
