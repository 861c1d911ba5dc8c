"""`numballama chat --url`: against a small server that says what a test wants."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from numballama.cli.remote import RemoteChat
from numballama.errors import Error
from numballama.sampling import SamplingParams
from tests.helpers.command_line import call

Capture = pytest.CaptureFixture[str]
PARAMS = SamplingParams(temperature=0, max_tokens=9, stop=["x"])


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}
LAST = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\ndata: [DONE]\n\n"
ANSWER = chunk("") + b": still here\n\n" + chunk("Hé") + chunk("llo") + chunk(finish="stop") + LAST


class Canned(ThreadingHTTPServer):
    """Answers every request with the same bytes, and remembers the bodies."""

    daemon_threads = True
    status, body = 200, ANSWER

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any, str | None]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Canned

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Canned]:
    made = Canned()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def send(chat: RemoteChat, text: str) -> str:
    return "".join(delta.text for delta in chat.stream(text, params=PARAMS))


def test_a_conversation(server: Canned) -> None:
    chat = RemoteChat(f"{server.url}/v1/", "Be brief.", "secret")
    assert send(chat, "Hi") == "Héllo"
    assert chat.turn is not None
    assert (chat.turn.prefilled_tokens, chat.turn.reused_tokens, chat.turn.tokens) == (7, 5, 3)
    assert chat.turn.finish_reason == "stop"
    send(chat, "And?")
    (path, first, key), (_, second, _) = server.asked
    system, hi = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert first["messages"] == [system, hi]
    assert (first["temperature"], first["max_tokens"], first["stop"], first["stream"]) == (0, 9, ["x"], True)
    answer = {"role": "assistant", "content": "Héllo"}
    assert second["messages"] == [system, hi, answer, {"role": "user", "content": "And?"}]
    chat.reset()
    send(chat, "New")
    assert [message["content"] for message in server.asked[-1][1]["messages"]] == ["Be brief.", "New"]


def test_what_was_read_stays(server: Canned) -> None:
    chat = RemoteChat(server.url)
    assert next(chat.stream("Hi", params=PARAMS)).text == "Hé"
    send(chat, "And?")
    assert [message["content"] for message in server.asked[-1][1]["messages"]] == ["Hi", "Hé", "And?"]


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b'{"error": {"message": "the API key is missing"}}', "401: the API key is missing"),
        (404, b"<html>no</html>", "404: <html>no</html>"),
        (503, b'{"error": "loading"}', "503: loading"),
        (500, b"", "an empty answer"),
        (200, b"", "closed the connection"),
        (200, chunk("a"), "closed the connection"),
        (200, chunk("a") + b'data: {"error": {"message": "no memory"}}\n\n', "ends the answer: no memory"),
        (200, b"data: {\n\n", "not JSON"),
        (200, b"data: " + b"[" * 100_000 + b"\n\n", "not JSON"),
        (200, b"data: 3\n\n", "ends the answer"),
    ],
)
def test_what_a_server_does_wrong_is_said(server: Canned, status: int, body: bytes, says: str) -> None:
    server.status, server.body = status, body
    chat = RemoteChat(server.url)
    with pytest.raises(Error) as raised:
        send(chat, "Hi")
    assert says in str(raised.value) and server.url in str(raised.value)
    server.status, server.body = 200, ANSWER
    assert send(chat, "Hi") == "Héllo", "the chat goes on"


@pytest.mark.parametrize("body", [b"data: {}\n\n", b'data: {"choices": [3, {"delta": 3}, {}], "usage": 3}\n\n'])
def test_fields_that_are_missing_are_no_text(server: Canned, body: bytes) -> None:
    server.body = body + LAST
    assert send(RemoteChat(server.url), "Hi") == ""


@pytest.mark.parametrize("url", ["", "ftp://a", "http://", "http://a:b", "http://[::1", "http://a:99999999"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(Error, match="--url must be the address"):
        RemoteChat(url)


def test_nobody_listens(server: Canned) -> None:
    with pytest.raises(Error, match="is the server running"):
        send(RemoteChat("127.0.0.1:1"), "Hi")


def test_the_command(server: Canned, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBALLAMA_API_KEY", "from the environment")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nAnd?\n"))
    assert call(capsys, "chat", "--url", server.url, "--max-tokens", 7) == (0, "Héllo\nHéllo\n", "")
    assert server.asked[1][2] == "Bearer from the environment" and server.asked[1][1]["max_tokens"] == 7
    assert call(capsys, "chat").code == 2
    both = call(capsys, "chat", "model.gguf", "--url", server.url)
    assert both.code == 1 and "leave out the model" in both.err
