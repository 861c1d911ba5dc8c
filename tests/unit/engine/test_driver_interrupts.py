"""Ctrl-C and exits while an engine steps, waits or ends its thread: what was asked for ends, the rest goes on."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from numballama.engine.request import TokenEvent
from numballama.errors import Error
from tests.helpers.driven_engine import PATIENCE, alone, make_engine, settle, wait_until
from tests.helpers.fake_runner import make_params, tokens_of


@contextlib.contextmanager
def default_sigint() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_ctrl_c_while_this_thread_steps(lookahead: int) -> None:
    """The step ends, its tokens are handed out; the caller's request is cancelled, the others go on."""
    engine, runner = make_engine(lookahead=lookahead)

    def press(event: TokenEvent) -> TokenEvent:
        if event.token == alone([6] * 5)[3]:
            signal.raise_signal(signal.SIGINT)
        return event

    pressing = engine.submit([6] * 5, make_params(), process=press)
    own, other = engine.submit([1], make_params(max_tokens=30)), engine.submit([2] * 9, make_params())
    with default_sigint(), pytest.raises(KeyboardInterrupt):
        list(own)
    assert signal.getsignal(signal.SIGINT) is not None and list(own) == []
    rows = runner.rows
    assert tokens_of(pressing) == alone([6] * 5) and tokens_of(other) == alone([2] * 9)
    assert runner.rows - rows <= 2 * 8, "nothing was computed again"
    settle(engine, runner)


def test_ctrl_c_does_not_wait_for_the_response() -> None:
    """A long prompt: the step ends, and not the whole prompt."""
    engine, runner = make_engine(max_tokens=8, max_sequences=2, pages=600, pages_per_sequence=500)
    runner.before_collect = lambda number: signal.raise_signal(signal.SIGINT) if number == 2 else None
    with default_sigint(), pytest.raises(KeyboardInterrupt):
        list(engine.submit([1] * 1000))
    assert runner.runs == 3
    settle(engine, runner)


def test_ctrl_c_while_another_thread_steps() -> None:
    engine, runner = make_engine()
    runner.before_collect = lambda number: time.sleep(0.001)
    with engine, default_sigint():
        own, other = engine.submit([1], make_params(max_tokens=64)), engine.submit([2] * 9, make_params())
        timer = threading.Timer(0.01, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            list(own)
        assert tokens_of(other) == alone([2] * 9)


def test_ctrl_c_while_the_thread_ends() -> None:
    """Who waited for its end waits no more; it ends all the same, and the next reader steps or starts another."""
    engine, runner = make_engine()
    stepping, interrupted = threading.Event(), threading.Event()

    def press(number: int) -> None:
        if not stepping.is_set():
            stepping.set()
            wait_until(lambda: engine._driver._stopping)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert interrupted.wait(PATIENCE)

    runner.before_collect = press
    with default_sigint():
        engine.start()
        request = engine.submit([1], make_params())
        assert stepping.wait(PATIENCE)
        with pytest.raises(KeyboardInterrupt):
            engine.stop()
    interrupted.set()
    wait_until(lambda: not engine._driver.running)
    assert tokens_of(request) == alone([1])
    with engine:
        assert engine._driver.running
        assert tokens_of(engine.submit([2, 3], make_params())) == alone([2, 3])
    settle(engine, runner)


def test_ctrl_c_while_a_pause_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that sleeps because of the pause steps again."""
    engine, runner = make_engine()
    driver, reading = engine._driver, threading.Event()
    read: list[list[int]] = []

    def work(number: int) -> None:
        if not reading.is_set():
            reading.set()
            wait_until(lambda: driver._pausing)

    def listen() -> None:
        driver.lock.release()
        wait_until(lambda: driver._sleeping)
        driver.lock.acquire()
        raise KeyboardInterrupt

    runner.before_collect = work
    reader = threading.Thread(target=lambda: read.append(tokens_of(engine.submit([1], make_params()))), daemon=True)
    reader.start()
    assert reading.wait(PATIENCE)
    monkeypatch.setattr(driver, "_listen", listen)
    with pytest.raises(KeyboardInterrupt), engine.exclusive():
        raise AssertionError("another thread stepped")
    reader.join(30)
    assert read == [alone([1])]
    settle(engine, runner)


def test_ctrl_c_while_the_thread_is_told_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that sleeps is woken all the same, and ends."""
    engine, runner = make_engine()
    driver = engine._driver
    engine.start()
    wait_until(lambda: driver._idle)
    notify = driver.notify

    def press() -> None:
        monkeypatch.setattr(driver, "notify", notify)
        signal.raise_signal(signal.SIGINT)
        notify()

    monkeypatch.setattr(driver, "notify", press)
    with default_sigint(), pytest.raises(KeyboardInterrupt):
        engine.stop()
    wait_until(lambda: not driver.running)
    with engine:
        assert tokens_of(engine.submit([1], make_params())) == alone([1])
    settle(engine, runner)


def test_an_exit_in_a_callback_ends_an_engine_with_a_thread() -> None:
    def leave(event: TokenEvent) -> TokenEvent:
        raise SystemExit

    engine, _ = make_engine()
    with engine, pytest.raises((SystemExit, Error)):
        list(engine.submit([1], make_params(), process=leave))
    inline, _ = make_engine()
    other = inline.submit([2], make_params())
    with pytest.raises(SystemExit):
        list(inline.submit([1], make_params(), process=leave))
    assert tokens_of(other) == alone([2])
