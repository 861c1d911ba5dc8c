"""HTTP in two processes beside the engine's: `numballama serve --api-server-count 2`. Who ends, and what is left."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from numballama.errors import Error
from numballama.server import processes
from numballama.server.processes import serve_by_processes
from numballama.server.run import Address
from numballama.server.settings import Settings
from tests.helpers.http_server import LONG, eventually, read_until
from tests.helpers.processes import children_of, is_alive
from tests.helpers.serve_process import post, process

TWO = ("--api-server-count", "2", "--max-sequences", "2", "--threads", "1")
STREAM: dict[str, Any] = {"prompt": "Once", "max_tokens": 490, "ignore_eos": True, "stream": True, "temperature": 0}
KEY = {"Authorization": "Bearer secret"}


def get(port: int, path: str) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)) as connection:
        connection.request("GET", path, headers=KEY)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def figure(port: int, name: str) -> float:
    """A figure of /metrics; the sum over labels that are not named."""
    found = re.findall(rf"^numballama:{name}[^ ]* (.*)$", get(port, "/metrics")[1], re.MULTILINE)
    return sum(map(float, found))


@contextlib.contextmanager
def streams(port: int, count: int, **more: Any) -> Iterator[list[socket.socket]]:
    """Streams that have begun. The first is answered by another process than the second."""
    body = json.dumps(STREAM | more).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: secret\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=LONG))
            connection.sendall(head.encode() + body)
            found.append(connection)
        for connection in found:
            read_until(connection, b"data: ")
        yield found


def rest_of(connection: socket.socket) -> bytes:
    """What arrives until the connection ends, or its answer does."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while not data.endswith(b"\r\n0\r\n\r\n") and (part := connection.recv(1 << 16)):
            data += part
    return data


@pytest.mark.slow
def test_two_processes_are_one_server_and_drain() -> None:
    """Limits, keys and figures are those of both together."""
    with process(*TWO, "--queue", "0", "--api-key", "secret") as (started, port, _):
        workers = children_of(started.pid)
        assert len(workers) == 2
        body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
        texts = [post(port, body, **KEY)[1]["choices"][0]["text"] for _ in range(4)]
        assert len(set(texts)) == 1 and texts[0]
        assert [post(port, body)[0] for _ in range(2)] == [401, 401]
        with streams(port, 2, max_tokens=10_000):
            assert [post(port, body, **KEY)[0] for _ in range(2)] == [429, 429]
            assert figure(port, "num_requests_running") == 2
        eventually(lambda: figure(port, "num_requests_running") == 0, "the end of those whose clients have left")
        for _ in range(2):  # whichever answers
            assert figure(port, 'http_requests_total.path="/v1/completions",status="200".') == 4 + 2
            assert figure(port, "request_success_total") == 4
            assert figure(port, "time_to_first_token_seconds_count") == 4 + 2
        bad = post(port, body | {"regex": "[a"}, **KEY)
        assert bad[0] == 400 and bad[1]["error"]["param"] == "regex"
        with streams(port, 1) as (connection,):
            started.send_signal(signal.SIGTERM)
            eventually(lambda: post(port, body, **KEY)[0] == 503, "draining")
            data = rest_of(connection)
        assert b"data: [DONE]" in data
        assert started.wait(LONG) == 0
        assert started.stderr is not None and "Traceback" not in started.stderr.read()
        assert not any(map(is_alive, workers))


@pytest.mark.slow
def test_processes_that_are_killed() -> None:
    """One for HTTP: only its clients see it, and another one is started. The engine's: all end, with an error."""
    with process(*TWO, "--queue", "0") as (started, port, _):
        before = children_of(started.pid)
        assert post(port, {"prompt": "Once", "max_tokens": 2})[0] == 200
        answered = figure(port, 'http_requests_total.path="/v1/completions"')
        assert answered == 1
        with streams(port, 2) as (one, two):
            os.kill(before[0], signal.SIGKILL)
            eventually(lambda: not is_alive(before[0]), "its end")
            healths: list[int] = []  # the other one answers all, until the new one can

            def is_replaced() -> bool:
                with contextlib.suppress(ConnectionError):  # of a connection that it took while it ended
                    healths.append(get(port, "/health")[0])
                    return figure(port, "http_processes") == 2 and figure(port, "http_process_restarts_total") == 1
                return False

            eventually(is_replaced, "a new process")
            assert set(healths) == {200}
            found = [b"data: [DONE]" in rest_of(each) for each in (one, two)]
        assert sorted(found) == [False, True]
        after = children_of(started.pid)
        assert len(after) == 2 and before[1] in after and before[0] not in after
        assert [post(port, {"prompt": "Once", "max_tokens": 2})[0] for _ in range(4)] == [200] * 4
        assert figure(port, "num_requests_running") == 0
        assert figure(port, 'http_requests_total.path="/v1/completions"') >= answered + 1 + 4
        with streams(port, 2, max_tokens=10_000) as both:  # the killed one holds no place in the queue
            started.kill()
            ends = [rest_of(each) for each in both]
        assert all(b"the process with the engine has ended" in end and b'"code":"engine_failed"' in end for end in ends)
        eventually(lambda: not any(map(is_alive, after)), "the end of all processes")


@pytest.mark.slow
def test_a_process_that_is_stopped_ends_with_the_engine() -> None:
    with process(*TWO) as (started, _, _):
        workers = children_of(started.pid)
        os.kill(workers[0], signal.SIGSTOP)
        started.kill()
        eventually(lambda: not any(map(is_alive, workers)), "the end of all processes")


@pytest.mark.slow
def test_a_process_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stopped answers nobody, and would keep each second connection. The other one goes on."""
    found: list[processes.HttpProcesses] = []

    class Seen(processes.HttpProcesses):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            found.append(self)

    def load() -> None:
        (server,) = found
        eventually(lambda: all(each.is_up for each in server._processes), "the processes")
        one, two = (each.process.pid for each in server._processes)
        os.kill(one, signal.SIGSTOP)
        eventually(lambda: not is_alive(one), "its end")
        eventually(lambda: server._processes[0].is_up and server._processes[0].process.pid != one, "another one")
        assert server._processes[1].process.pid == two
        raise Error("that was all")

    monkeypatch.setattr(processes, "MOST_SILENT_LOOKS", 60)
    monkeypatch.setattr(processes, "HttpProcesses", Seen)
    with pytest.raises(Error, match="that was all"):
        serve(load)


@pytest.mark.slow
def test_a_second_signal_ends_all() -> None:
    with process(*TWO, "--drain-timeout", "600", "--queue", "16") as (started, port, _):
        workers = children_of(started.pid)
        with streams(port, 1, max_tokens=10_000, n=16) as (connection,):
            started.send_signal(signal.SIGTERM)
            started.send_signal(signal.SIGINT)
            assert started.wait(LONG) == 0
            assert b"[DONE]" not in rest_of(connection)
        assert started.stderr is not None and "Traceback" not in started.stderr.read()
        assert not any(map(is_alive, workers))


def serve(load: Callable[[], Any]) -> None:
    """Serve in this process, and check that no process is left of it."""
    before = children_of(os.getpid())  # other tests have some that go on
    try:
        serve_by_processes(load, Settings(), Address(port=0), 2, show=lambda line: None)
    finally:
        assert children_of(os.getpid()) == before


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> None:
        raise Error("there is no such model")

    with pytest.raises(Error, match="there is no such model"):
        serve(load)


def test_processes_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def load() -> None:
        assert ended.wait(LONG)
        raise Error("this is late")

    class Ending(processes.HttpProcesses):
        def drain(self) -> None:
            ended.set()
            super().drain()

    monkeypatch.setattr(processes, "HTTP_PROCESS", "numballama.absent")
    monkeypatch.setattr(processes, "HttpProcesses", Ending)
    with pytest.raises(Error, match="ends before it answers requests, with exit code 1"):
        serve(load)
