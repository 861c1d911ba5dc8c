"""Ctrl-C in a block that must not be torn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from numballama.engine.interrupts import DeferredInterrupt


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
