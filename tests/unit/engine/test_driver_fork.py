"""An engine in a forked child: it refuses work there, and the child leaves what its parent has entered."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from numballama.errors import DeviceError
from tests.helpers.driven_engine import PATIENCE, alone, make_engine
from tests.helpers.fake_runner import make_params, tokens_of


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_refused() -> None:
    engine, _ = make_engine()
    request = engine.submit([1], make_params())
    engine.start()
    child = os.fork()
    if not child:
        code = 1
        try:
            refused = (lambda: engine.submit([1]), lambda: engine.wait(request._state), engine.start, engine.enter)
            for action in (*refused, lambda: engine.exclusive().__enter__()):
                with pytest.raises(DeviceError, match="forked"):
                    action()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tokens_of(request) == alone([1])
    engine.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("leaving", ["close", "stop", "user", "pause", "failed pause"])
def test_a_forked_child_leaves_what_its_parent_has_entered(leaving: str) -> None:
    """It does so although threads that do not exist in it hold the lock or step; the engine does not notice."""
    engine, runner = make_engine()
    request = engine.submit([1], make_params())
    blocks = contextlib.ExitStack()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with engine._driver.lock:
            held.set()
            done.wait(PATIENCE)

    if leaving in ("close", "stop"):
        engine.start()
        blocks.callback(engine.close if leaving == "close" else engine.stop)
    elif leaving == "user":
        engine.enter()
        blocks.callback(engine.leave)
    else:
        blocks.enter_context(engine.exclusive())
    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(PATIENCE)
    child = os.fork()
    if not child:
        signal.alarm(20)  # if it hangs
        code = 1
        try:
            runner.reset = lambda: os._exit(2)  # type: ignore[method-assign]  # the device is the parent's
            with contextlib.suppress(SystemExit), blocks:
                if leaving == "failed pause":
                    raise SystemExit
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done.set()
    holder.join(PATIENCE)
    assert status == 0
    if leaving != "close":
        blocks.close()
        assert tokens_of(request) == alone([1])
    engine.close()
