"""Ctrl-C in a block that must not be torn."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from numballama.engine.interrupts import DeferredInterrupt, is_interrupt
from tests.helpers.timeouts import LateError, late


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_block_ends_first() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with DeferredInterrupt():
            press()
            done.append(1)
        done.append(2)
    assert done == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_tears_it() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt():  # noqa: PT012
        press()
        done.append(1)
        press()
        done.append(2)
    assert done == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_comes_before_the_interrupt() -> None:
    with pytest.raises(ZeroDivisionError), DeferredInterrupt() as interrupt:  # noqa: PT012
        press()
        assert interrupt.arrived
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_happens_without_ctrl_c() -> None:
    with DeferredInterrupt():
        pass
    press_after = pytest.raises(KeyboardInterrupt)
    with press_after:
        press()


def test_a_handler_of_the_program_stays() -> None:
    pressed = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    with DeferredInterrupt():
        press()
        assert pressed == [1]


def test_other_threads_do_not_touch_handlers() -> None:
    seen = []

    def work() -> None:
        with DeferredInterrupt():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_a_handler_that_has_stayed_defers_nothing() -> None:
    """Another signal's handler has raised while the block began: it has no end."""
    stayed = DeferredInterrupt()

    def begin() -> None:
        stayed.__enter__()

    begin()
    with pytest.raises(KeyboardInterrupt):
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("where", ["handler", "method", "any arguments", "helper"])
def test_what_a_signal_handler_raises_is_an_interrupt(where: str) -> None:
    def raise_it() -> None:
        raise TimeoutError

    class Timer:
        def handle(self, number: int, frame: object) -> None:
            raise TimeoutError

    handlers: dict[str, Callable[..., None]] = {
        "handler": late,
        "method": Timer().handle,
        "any arguments": lambda *_: raise_it(),
        "helper": lambda number, frame: raise_it(),
    }
    before = signal.signal(signal.SIGALRM, handlers[where])
    try:
        with pytest.raises((LateError, TimeoutError)) as caught:
            signal.raise_signal(signal.SIGALRM)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert is_interrupt(caught.value)


def test_what_is_no_interrupt() -> None:
    assert is_interrupt(KeyboardInterrupt()) and is_interrupt(SystemExit())
    for call in (lambda: 1 // 0, lambda: int("x"), lambda: late(14, sys._getframe(1))):
        with pytest.raises((ArithmeticError, ValueError, LateError)) as caught:
            call()
        assert not is_interrupt(caught.value)
