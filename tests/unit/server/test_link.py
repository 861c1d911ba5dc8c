"""Messages between processes, and counts that they share. `test_processes.py` has real ones."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from numballama.errors import ContextError, DeviceError, Error, FormatError, UnsupportedError
from numballama.server import link
from numballama.server.errors import ApiError
from numballama.server.link import Link, SharedCounts, error_as_json, error_of, pack
from numballama.server.service import Admission
from numballama.structured.constraint import GrammarError
from tests.helpers.http_server import LONG


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Link(ours, "a"), Link(theirs, "b")


def test_messages_in_parts_and_together(ends: tuple[Link, Link]) -> None:
    near, far = ends
    messages = [({"a": [1, "ü\ud800"]}, [5, -(2**40)]), ({}, [7]), ({"b": None}, ())]
    data = b"".join(pack(head, tail) for head, tail in messages)
    found = []
    for place in range(len(data)):
        near.send(data[place : place + 1])
        found += [(head, list(tail)) for head, tail in far.receive()]
    assert found == [(head, list(tail)) for head, tail in messages]
    near.send(data)
    assert far.receive_one() == messages[0][0]
    rest = list(far.receive(socket.MSG_DONTWAIT))  # those that came with it
    assert [head for head, _ in rest] == [{}, {"b": None}]
    assert not far.closed
    near.close()
    assert not list(far.receive()) and far.closed and far.receive_one() is None


def test_nobody_waits_for_a_slow_reader(ends: tuple[Link, Link]) -> None:
    """What it has not read is kept, in order."""
    near, far = ends
    for number in range(100):
        near.send(pack({"n": number}, range(20_000)))  # 16 MB together
    found: list[int] = []
    while len(found) < 100:
        found += [head["n"] for head, tail in far.receive() if len(tail) == 20_000]
    assert found == list(range(100))


def test_a_reader_that_is_gone(ends: tuple[Link, Link]) -> None:
    near, far = ends
    for number in range(50):
        near.send(pack({"n": number}, range(20_000)))
    far.socket.close()
    threads = [thread for thread in threading.enumerate() if thread.name == "numballama link"]
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    near.send(pack({}))
    assert near.closed


def test_no_thread_can_be_started(ends: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the link ends, and not the engine, whose thread sends."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    near, _ = ends
    for _ in range(400):  # 64 MB: more than sockets hold
        near.send(pack({}, range(20_000)))
    assert near.closed
    near.release()


def test_the_socket_is_closed_when_nobody_sends(ends: tuple[Link, Link]) -> None:
    """Its number may then be another one's."""
    near, _ = ends
    real, done = near.socket, list[str]()

    class Slow:
        def sendall(self, data: bytes) -> None:
            time.sleep(0.2)
            done.append("sent")

        def close(self) -> None:
            done.append("closed")
            real.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    near.socket = Slow()  # type: ignore[assignment]
    for _ in range(400):  # 64 MB: more than sockets hold
        near.send(pack({}, range(20_000)))
    threads = [thread for thread in threading.enumerate() if thread.name == "numballama link"]
    near.release()
    for thread in threads:
        thread.join(30)
    assert done[-1] == "closed" and "sent" in done


@pytest.mark.parametrize("kind", [Error, UnsupportedError, DeviceError, ContextError, GrammarError])
def test_errors_stay_what_they_are(kind: type[Exception]) -> None:
    found = error_of(error_as_json(kind("why")))
    assert type(found) is kind and str(found) == "why"


def test_other_errors() -> None:
    assert type(error_of(error_as_json(FormatError("why", path="f")))) is Error
    found = error_of(error_as_json(KeyError("x")))
    assert type(found) is RuntimeError and str(found) == "KeyError: 'x'"


def test_counts_of_processes() -> None:
    file = os.memfd_create("counts")
    os.ftruncate(file, SharedCounts.size(2))
    one, two = (SharedCounts(file, process, 2) for process in (0, 1))
    one.add(2, 30)
    two.add(1, 4)
    two.add(0, -1)
    assert (one.sequences, one.tokens, one.here) == (3, 33, 2) and (two.sequences, two.here) == (3, 1)
    one.clear(1)
    assert (two.sequences, two.tokens, two.here) == (2, 30, 0)
    for each in (one, two):
        each.close()
    os.close(file)


LOOKS = """
import sys
from numballama.server.errors import ApiError
from numballama.server.link import SharedCounts
from numballama.server.service import Admission

class Slow(SharedCounts):
    @property
    def sequences(self):
        found = super().sequences
        print("looks", flush=True)
        sys.stdin.readline()
        return found

try:
    Admission(1, 1, 100, Slow(int(sys.argv[1]), 1, 2)).enter(1, 10)
    print("entered", flush=True)
except ApiError:
    print("refused", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def one_that_looks() -> Iterator[tuple[Admission, subprocess.Popen[str]]]:
    """A queue with one place, and another process that has looked for it and not yet been counted."""
    file = os.memfd_create("counts")
    os.ftruncate(file, SharedCounts.size(2))
    command = [sys.executable, "-c", LOOKS, str(file)]
    counts = SharedCounts(file, 0, 2)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[file]) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "looks\n"
            yield Admission(1, 1, 100, counts), other
        finally:
            other.kill()
            counts.close()
            os.close(file)


def tell(other: subprocess.Popen[str]) -> str:
    """Let it go on, and return what it says."""
    assert other.stdin is not None and other.stdout is not None
    other.stdin.write("\n")
    other.stdin.flush()
    return other.stdout.readline()


class Entering(threading.Thread):
    """A thread that asks for a place."""

    def __init__(self, admission: Admission) -> None:
        super().__init__(daemon=True)
        self.admission, self.found = admission, ""
        self.start()

    def run(self) -> None:
        try:
            self.admission.enter(1, 10)
            self.found = "entered"
        except ApiError as error:
            self.found = str(error.code)


@pytest.mark.slow
def test_one_process_takes_the_last_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for a place and to take it is one step for others."""
    monkeypatch.setattr(link, "_LOCKED_WITHIN_S", LONG)
    with one_that_looks() as (admission, other):
        second = Entering(admission)
        second.join(0.3)
        assert not second.found
        assert tell(other) == "entered\n"
        second.join(LONG)
        assert second.found == "queue_full"
        assert admission.sequences == 1 and admission.tokens == 10


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_ends_while_it_looks_holds_up_nobody(
    how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that is stopped, for long."""
    with one_that_looks() as (admission, other):
        other.send_signal(how)
        if how == signal.SIGKILL:
            monkeypatch.setattr(link, "_LOCKED_WITHIN_S", float("inf"))
            other.wait(LONG)
        second = Entering(admission)
        second.join(LONG)
        assert second.found == "entered"
