"""Replicas on Ray: a server in a process of its own, with two replicas on this machine. Skipped without Ray."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from numballama.errors import Error
from numballama.server.run import Address, listen
from tests.helpers.http_server import Answered, eventually, read_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`"),
]

START = 300
"""Seconds that Ray may take to start its processes. A dozen of them import all of it at a time."""


class Cluster:
    """`numballama serve --ray` and what it prints."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def says(self, text: str) -> bool:
        return any(text in line for line in tuple(self.lines))

    def post(self, path: str, body: Any) -> Answered:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=START)) as connection:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return Answered(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def complete(self, prompt: str, **fields: Any) -> Answered:
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, **fields})

    def stream(self, prompt: str) -> socket.socket:
        """Begin a long answer; returns when its first event is there."""
        body = json.dumps({"prompt": prompt, "max_tokens": 900, "stream": True, "ignore_eos": True})
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=START)
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        return connection


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """(pid, command line) of the processes that a process started, and of theirs."""
    parents: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        parents.setdefault(parent, []).append(int(file.parent.name))
    found = [pid]
    while found:
        for child in parents.get(found.pop(), []):
            found.append(child)
            try:
                yield child, Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue


@contextmanager
def serving() -> Iterator[Cluster]:
    with closing(listen(Address(port=0))) as listener:
        port = listener.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # the paths of Ray's sockets must be short
    command = [sys.executable, "-m", "numballama", "serve", "--ray", "--device", "cpu", "--threads", "1"]
    command += ["--replicas", "2", "--max-sequences", "4", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    assert process.stderr is not None
    cluster = Cluster(process, port)
    try:
        eventually(lambda: cluster.says("curl ") or process.poll() is not None, "the start", START)
        assert process.poll() is None, cluster.lines
        yield cluster
        process.send_signal(signal.SIGTERM)
        assert process.wait(START) == 0, cluster.lines
    finally:
        process.kill()
        process.wait()
        cluster.reader.join()
        process.stderr.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with serving() as cluster:
        yield cluster


def test_requests_that_begin_alike_share_a_replica_and_its_cache(cluster: Cluster) -> None:
    used = set()
    for name in range(16):  # all of them at one replica: once in 32,768 runs
        prompt = f"{name} boys had a dog. " + "It was big and it liked to play with the ball in the park. " * 6
        first, second, third = cluster.complete(prompt), cluster.complete(prompt), cluster.complete(prompt)
        assert [each.status for each in (first, second, third)] == [200] * 3
        assert len({each.headers["x-replica"] for each in (first, second, third)}) == 1
        assert first.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert second.json["usage"]["prompt_tokens_details"]["cached_tokens"] > 64
        used.add(first.headers["x-replica"])
    assert len(used) == 2


def test_a_full_replica_hands_over(cluster: Cluster) -> None:
    """Four long answers are a whole batch: the fifth request with that beginning goes to the other replica."""
    streams = [cluster.stream("Once") for _ in range(4)]
    heads = [read_until(each, b"data: ").decode() for each in streams]
    homes = {found[1] for head in heads if (found := re.search(r"x-replica: (\w+)", head))}
    assert len(homes) == 1
    assert cluster.complete("Once").headers["x-replica"] not in homes
    for each in streams:
        each.close()


def test_a_client_that_leaves_ends_its_request(cluster: Cluster) -> None:
    """/metrics has the figures of both replicas."""

    def running() -> list[tuple[str, float]]:
        with closing(http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=START)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        found = re.findall(r'^numballama:num_requests_running\{.*replica="(\w+)"\} (.*)$', text, re.MULTILINE)
        assert len({name for name, _ in found}) == 2, text
        return [(name, float(number)) for name, number in found if float(number)]

    eventually(lambda: not running(), "the end of the requests before")
    with cluster.stream("Twice") as connection:
        head = read_until(connection, b"data: ").decode()
        assert running() == [(head.partition("x-replica: ")[2].split()[0], 1)]
    eventually(lambda: not running(), "the end of the request")


def test_errors_keep_their_shape(cluster: Cluster) -> None:
    assert cluster.complete("Once", temperature=-1).error["param"] == "temperature"
    assert cluster.complete("Once", temperature=-1).status == 400
    assert cluster.post("/v1/nothing", {}).error["code"] == "not_found"
    assert cluster.complete("x" * (9 << 20)).error["code"] == "request_too_large"


def test_a_rolling_restart_loses_no_request(cluster: Cluster) -> None:
    """All answers, streamed and not, are whole; then other replicas answer."""
    before = {cluster.complete(f"{n}").headers["x-replica"] for n in range(16)}
    assert len(before) == 2
    done = threading.Event()
    answers: list[Answered] = []

    def ask(name: int) -> None:
        while not done.is_set():
            fields = {"max_tokens": 120, "ignore_eos": True, "stream": name % 2 == 0}
            answers.append(cluster.complete(f"{name} mice", **fields))

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    cluster.process.send_signal(signal.SIGHUP)
    eventually(lambda: cluster.says("have been replaced"), "the restart", START)
    done.set()
    for thread in threads:
        thread.join()
    assert {each.status for each in answers} == {200}
    for each in answers:
        if each.headers["content-type"].startswith("text/event-stream"):
            assert each.body.endswith(b"data: [DONE]\n\n") and each.events[-1]["choices"][0]["finish_reason"]
        else:
            assert each.json["usage"]["completion_tokens"] == 120
    during = {each.headers["x-replica"] for each in answers}
    assert during & before and during - before, "requests were answered before and after"
    after = {cluster.complete(f"{n}").headers["x-replica"] for n in range(16)}
    assert not after & before and len(after) == 2


def test_a_killed_replica_ends_its_requests_in_an_error_and_the_service_goes_on(cluster: Cluster) -> None:
    name = "ray::ServeReplica:default:Replica"
    replicas = [pid for pid, line in descendants(cluster.process.pid) if line.startswith(name)]
    assert len(replicas) == 2
    streams = [cluster.stream(f"{n} cats") for n in range(16)]
    heads = [read_until(each, b"data: ") for each in streams]
    names = [head.partition(b"x-replica: ")[2].split()[0] for head in heads]
    os.kill(replicas[0], signal.SIGKILL)
    bodies = [read_until(each, b"\r\n0\r\n\r\n") for each in streams]
    for each in streams:
        each.close()
    failed = {name for name, body in zip(names, bodies, strict=True) if b'"code":"replica_failed"' in body}
    assert len(failed) == 1 and len(set(names)) == 2, "the other replica's requests go on"
    for body in bodies:  # an answer may have been whole before
        assert (b'"code":"replica_failed"' in body) != (b'"finish_reason":"length"' in body)
        assert b"data: [DONE]" in body
    assert cluster.complete("Once").status == 200
    eventually(
        lambda: len({cluster.complete(f"{n}").headers["x-replica"] for n in range(16)}) == 2, "a new replica", START
    )


def test_the_service_drains(cluster: Cluster) -> None:
    """After SIGTERM a stream goes on to its end while new requests are refused. The last test of the cluster."""
    with cluster.stream("Once") as connection:
        data = read_until(connection, b"data: ")
        cluster.process.send_signal(signal.SIGTERM)
        refused = cluster.complete("Once", max_tokens=1)
        while refused.status == 200:  # the signal has not arrived
            refused = cluster.complete("Once", max_tokens=1)
        assert (refused.status, refused.error["code"]) == (503, "draining") and refused.headers["retry-after"]
        data += read_until(connection, b"\r\n0\r\n\r\n")
    assert b'"finish_reason":"length"' in data and b"data: [DONE]" in data
    assert cluster.process.wait(START) == 0, cluster.lines


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's, when it is imported
def test_wrong_options_are_errors() -> None:
    from numballama.server import ray_app

    with pytest.raises(Error, match=r"devise: Extra inputs"):
        ray_app.app({"devise": "cpu"})
    with pytest.raises(Error, match=r"max_sequences: .*greater than or equal to 1"):
        ray_app.app({"max_sequences": "0"})
    with pytest.raises(Error, match="device=cuda or device=cpu"):
        ray_app.app({})
    with pytest.raises(Error, match="--port 0"):
        ray_app.run({}, ray_app.Settings(), Address(port=0), print)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's, when it is imported
def test_events_that_come_together_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from numballama.server import ray_app

    monkeypatch.setattr(ray_app, "EVERY_S", 1000)
    events = [b"%d " % n for n in range(200)]

    async def application(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"{}"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"a"), (b"b", b"c")]})
        for event in events:
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"end", "more_body": False})

    async def passed_on() -> list[Any]:
        replica = ray_app.Replica.__new__(ray_app.Replica)
        replica._name = b"r"
        replica._app = application
        found = [message async for messages in replica.answer("", {}, b"{}") for message in messages]
        del replica._app
        return found

    start, *bodies = asyncio.run(passed_on())
    assert start["headers"] == [(b"b", b"c"), (b"x-replica", b"r")]
    assert b"".join(each["body"] for each in bodies) == b"".join(events) + b"end"
    assert len(bodies) == 2 and [each["more_body"] for each in bodies] == [True, False]
