"""What comes over a connection: heads and bodies that are too large or do not come, and what is no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import json
import logging
import socket
import time

import pytest

from numballama.model import Model
from numballama.server.answers import ErrorAnswer
from numballama.server.settings import Settings
from tests.helpers.http_server import LONG, Running, serving


def test_a_body_has_a_limit(model: Model) -> None:
    with serving(model, Settings(max_body=1000)) as server:
        assert server.post("/tokenize", {"content": "a" * 900}).status == 200
        answer = server.post("/tokenize", {"content": "a" * 1000})
        assert answer.status == 413 and answer.error["type"] == "request_too_large"
        chunks = iter([b'{"content": "', *[b"a" * 100] * 20, b'"}'])  # no Content-Length
        answer = server.request("POST", "/tokenize", chunks, Content_Type="application/json")  # type: ignore[arg-type]
        assert answer.status == 413


def test_a_body_that_does_not_come(model: Model) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    with (
        serving(model, Settings(body_timeout_s=0.05)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=LONG) as connection,
    ):
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /h"])
def test_a_head_that_does_not_come(model: Model, sent: bytes) -> None:
    with (
        serving(model, Settings(body_timeout_s=0.2)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=LONG) as connection,
    ):
        connection.sendall(sent)
        data = b"".join(iter(lambda: connection.recv(1000), b""))
        assert data.count(b"HTTP/1.1 200 OK") == sent.count(b"\r\n\r\n")


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"HELLO\r\n\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n"],
)
def test_what_is_no_http(server: Running, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=LONG) as connection:
        connection.sendall(sent)
        data = b"".join(iter(lambda: connection.recv(1000), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    ErrorAnswer.model_validate(json.loads(body), strict=True)


@pytest.mark.parametrize(
    ("sent", "more"),
    [
        (b"GET /health HTTP/1.1\r\nHost: a\r\nX: ", b"x"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"X: y\r\n"),
    ],
)
def test_a_head_has_a_limit(server: Running, sent: bytes, more: bytes) -> None:
    """And so have the fields behind a body."""

    def send_much(connection: socket.socket) -> None:
        for _ in range(1000):
            connection.sendall(more * (10_000 // len(more)))
            time.sleep(0.001)

    with socket.create_connection(("127.0.0.1", server.port), timeout=LONG) as connection:
        connection.sendall(sent)
        with pytest.raises(OSError, match=r"[Bb]roken|reset"):
            send_much(connection)


def test_a_client_that_asks_for_another_protocol(server: Running) -> None:
    """Java's client asks for HTTP/2 with its requests. It gets an answer in HTTP/1.1, on a kept connection as well."""
    body = json.dumps({"content": "a"}).encode()
    fields = {"Content-Type": "application/json", "Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG)) as connection:
        for more in ({}, fields, {}, fields):
            connection.request("POST", "/tokenize", body, {"Content-Type": "application/json", **more})
            answer = connection.getresponse()
            assert answer.status == 200 and json.loads(answer.read())["tokens"]


def test_a_stream_for_a_client_of_http_1_0_has_no_chunks(server: Running) -> None:
    """It does not know them: ApacheBench, and nginx as it is delivered. The end of the connection is the end."""
    body = json.dumps({"prompt": "Once", "max_tokens": 3, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.0\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=LONG) as connection:
        connection.sendall(head % len(body) + body)
        answer, _, text = b"".join(iter(lambda: connection.recv(1 << 16), b"")).partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ") and b"transfer-encoding" not in answer.lower()
    assert text.startswith(b"data: {") and text.endswith(b"data: [DONE]\n\n") and b"\r" not in text


def test_a_lack_of_files_is_a_line_in_the_log(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio tries to accept 2,048 connections in a row, and logs a traceback for each."""
    accept, tries = socket.socket.accept, 0

    def full(listener: socket.socket) -> tuple[socket.socket, object]:
        nonlocal tries
        if listener.getsockname()[1] == server.port:  # other servers of this process have lines of their own
            tries += 1
            if tries <= 5:
                raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(logging.getLogger("numballama.server"), "propagate", True)
    monkeypatch.setattr(server.server, "_quiet_until", 0.0)
    monkeypatch.setattr(socket.socket, "accept", full)
    assert server.get("/health").status == 200
    lines = [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]
    assert tries > 5 and lines == ["no connection can be accepted, which is tried again: Too many open files"]


def test_other_failures_of_the_event_loop_are_logged(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    server.server._failed_in_loop(loop, {"message": "something else", "exception": OSError(errno.EBADF, "Bad file")})
    loop.close()
    assert [each.getMessage() for each in caplog.records] == ["something else"]


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_body_is_no_request(server: Running, pipelined: bool) -> None:
    """Also where its head asks for another protocol, and comes in parts or behind another request."""
    body = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
    head = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: Upgrade\r\nUpg"
    rest = b"rade: h2c\r\nContent-Length: %d\r\n\r\n" % len(body)
    before = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" if pipelined else b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=LONG) as connection:
        connection.sendall(before + head)
        time.sleep(0.1)
        connection.sendall(rest)
        time.sleep(0.1)
        answer = b""
        with contextlib.suppress(OSError):  # it may be closed already
            connection.sendall(body)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while some := connection.recv(1 << 16):
                answer += some
    assert b'"object":"list"' not in answer and answer.count(b"HTTP/1.1 200") <= pipelined


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_be_larger_than_a_head(server: Running, chunked: bool) -> None:
    body = json.dumps({"content": "a" * 300_000}).encode()
    parts = iter([body[at : at + 100_000] for at in range(0, len(body), 100_000)]) if chunked else body
    answer = server.request("POST", "/tokenize", parts, Content_Type="application/json")  # type: ignore[arg-type]
    assert answer.status == 200
