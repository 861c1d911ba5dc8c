"""A server on a loopback port in a thread of this process, and raw HTTP to talk to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from numballama.engine.stats import EngineStats
from numballama.model import Model
from numballama.server.app import ALIASES, GETS, POSTS, create_app
from numballama.server.engine_host import EngineHost
from numballama.server.http_process import HttpServer
from numballama.server.link import Head, Link, pack
from numballama.server.run import Address, Server, listen, server_config
from numballama.server.service import Service
from numballama.server.settings import Settings

LONG = 60
"""Seconds that a test waits for what must happen. A busy machine is slow."""
PATHS = [("GET", path.replace("{name:path}", "x")) for path in GETS] + [("POST", path) for path in POSTS]
PATHS += [("GET" if path == "/models" else "POST", path) for path in ALIASES]
LONG_TEXT: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True}
"""A request for a completion that runs for a while."""


def eventually(condition: Callable[[], Any], what: str = "it", within_s: float = LONG) -> None:
    """Wait until a condition holds. Fails after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {within_s} s"
        time.sleep(0.005)


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """What arrives, until `end` is in it. Fails when the connection ends before."""
    data = b""
    while end not in data:
        part = connection.recv(1 << 16)
        assert part, data
        data += part
    return data


@dataclass
class Answered:
    """An answer: status, headers in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer in OpenAI's shape, which is checked."""
        found: dict[str, Any] = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"} and self.json["type"] == "error"
        assert isinstance(found["message"], str) and found["message"]
        return found

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, without [DONE], which must be the last if there are no names."""
        assert self.headers["content-type"].startswith("text/event-stream")
        found: list[Any] = []
        for part in self.body.decode().split("\n\n"):
            lines = [line for line in part.split("\n") if line and not line.startswith(":")]
            if not lines:
                continue
            data = lines[-1].removeprefix("data: ")
            if data == "[DONE]":
                found.append(None)
                continue
            found.append(json.loads(data))
            if len(lines) == 2:
                assert lines[0] == f"event: {found[-1]['type']}"
        if None in found:
            assert found.index(None) == len(found) - 1
            found.pop()
        return found


class Running:
    """A running server."""

    def __init__(self, server: Server, service: Service, port: int) -> None:
        self.server, self.service, self.port = server, service, port
        self.url = f"http://127.0.0.1:{port}"

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answered:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return Answered(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def get(self, path: str, **headers: str) -> Answered:
        return self.request("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Answered:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, **{"Content_Type": "application/json", **headers})

    def begin(self, path: str, body: Any) -> socket.socket:
        """Send a request and return the connection, before there is an answer."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=LONG)
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    @property
    def stats(self) -> EngineStats:
        found = self.service.stats
        assert found is not None
        return found

    @property
    def idle(self) -> bool:
        """Whether nothing is running or waiting, in the engine or in the server."""
        stats = self.stats
        return not (stats.running or stats.waiting or self.service.active or self.service.admission.sequences)


@contextlib.contextmanager
def serving(model: Model | None, settings: Settings | None = None) -> Iterator[Running]:
    """Serve a model for the block."""
    settings = settings or Settings()
    address = Address(port=0)
    listener = listen(address)
    app = create_app(model, settings)
    server = Server(server_config(app, address, settings.body_timeout_s), app.state.service)
    with _running(server, listener):
        yield Running(server, app.state.service, listener.getsockname()[1])


@contextlib.contextmanager
def _running(server: Server, listener: socket.socket) -> Iterator[None]:
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        eventually(lambda: server.started, "the server's start")
        yield
    finally:
        server.should_exit = True
        thread.join(LONG)
        server._service.close()
    assert not thread.is_alive()


class Linked(Running):
    """A server whose engine is behind a link, as one of another process."""

    def __init__(self, server: Server, service: Service, port: int, model: Model, host: EngineHost) -> None:
        super().__init__(server, service, port)
        self.host, self._model = host, model

    @property
    def stats(self) -> EngineStats:
        return self._model.token_engine.stats()

    @property
    def idle(self) -> bool:
        return super().idle and not self.host._remotes


class Serving(Protocol):
    """`serving` or `serving_linked`."""

    def __call__(self, model: Model, settings: Settings | None = None) -> AbstractContextManager[Running]: ...


@contextlib.contextmanager
def serving_linked(model: Model, settings: Settings | None = None) -> Iterator[Linked]:
    """As `serving`, with what a process for HTTP and the engine's process say to each other, in this process."""
    settings = settings or Settings()
    listener, (ours, theirs), (handoff, far) = listen(Address(port=0)), socket.socketpair(), socket.socketpair()
    ready = threading.Event()

    def other(link: Link, head: Head) -> None:
        if head["do"] == "ready":
            ready.set()
        elif head["do"] == "figures":
            link.send(pack({"figures": head["ask"]}))
        elif head["do"] == "counted":
            link.send(pack({"answer": head["of"], "texts": [head["text"]]}))

    host, link = EngineHost(settings, other), Link(ours, "linked")
    before = model.token_engine.hand_over  # another host's, whose server does nothing meanwhile
    app = create_app(None, settings)
    server = HttpServer(app, settings, Address(port=0), Link(theirs, "linked"), far)
    serves = threading.Thread(target=host.serve, args=(link,))
    with ours, theirs, handoff, far:
        serves.start()
        try:
            with _running(server, listener):
                host.ready(model)
                assert ready.wait(LONG)
                yield Linked(server, app.state.service, listener.getsockname()[1], model, host)
        finally:
            host.close()
            model.token_engine.hand_over = before
            link.close()
            serves.join(LONG)
    assert not serves.is_alive()
