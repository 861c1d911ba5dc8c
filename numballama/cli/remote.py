"""`RemoteChat`: a conversation with a server that has OpenAI's interface, such as `numballama serve`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..chat.conversation import Turn
from ..errors import Error
from ..sampling import SamplingParams

KEY_VARIABLE = "NUMBALLAMA_API_KEY"
CONNECT_S, SILENCE_S = 10, 300
"""Seconds to wait for a connection, and for the next bytes of an answer."""
LINE_BYTES = 1 << 20
"""Most bytes of a line that a server sends."""
FIELDS = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "ignore_eos",
)  # fmt: skip
"""Fields of `SamplingParams` that a request has under the same name."""

Chunks = Generator[Mapping[str, Any], None, None]


@dataclass(frozen=True)
class Delta:
    """A part of an answer."""

    text: str


class RemoteChat:
    """A conversation with the model of a server, with the methods of `Chat` that the command line uses.

    Raises `Error` for an address that is none, and in `stream` for whatever a server or a network does wrong.
    """

    def __init__(self, url: str, system: str | None = None, api_key: str | None = None) -> None:
        wrong = Error(f"--url must be the address of a server, such as http://127.0.0.1:8000, found {url!r}")
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
        except ValueError:
            raise wrong from None
        if parts.scheme not in ("http", "https") or not host:
            raise wrong
        self._make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._url = host, port, url
        path = parts.path.rstrip("/")
        self._path = (path if path.endswith("/v1") else f"{path}/v1") + "/chat/completions"
        self._key = api_key or os.environ.get(KEY_VARIABLE)
        self._messages: list[dict[str, str]] = []
        self.system = system or None
        self.turn: Turn | None = None

    def reset(self) -> None:
        """Forget the messages, except the system message."""
        self._messages, self.turn = [], None

    def stream(self, text: str, *, params: SamplingParams) -> Iterator[Delta]:
        """Send a message and yield the answer. What was read of it stays in the conversation."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        history = [*self._messages, {"role": "user", "content": text}]
        body: dict[str, Any] = {name: getattr(params, name) for name in FIELDS}
        body |= {"stop": list(params.stop)} if params.stop else {}
        body |= {"messages": [*system, *history], "stream": True, "stream_options": {"include_usage": True}}
        answer = {"role": "assistant", "content": ""}
        turn = Turn(0)
        connection = self._make(self._host, self._port, timeout=CONNECT_S)
        first = 0.0
        try:
            with contextlib.closing(self._chunks(connection, body)) as chunks:
                for chunk in chunks:
                    for choice in _maps(chunk.get("choices")):
                        part, ended = _text(choice), choice.get("finish_reason") in ("stop", "length")
                        if ended:
                            turn.finish_reason, turn.stop_reason = choice["finish_reason"], choice.get("stop_reason")
                        if part or ended:
                            self._messages, self.turn = [*history, answer], turn
                        if part:
                            first = first or time.perf_counter()
                            answer["content"] += part
                            yield Delta(part)
                    _count(turn, chunk.get("usage"), first)
        except OSError as error:
            raise Error(f"{self._url}: {error.strerror or error}: is the server running there?") from None
        except http.client.HTTPException as error:
            raise Error(f"{self._url} does not answer as a web server: {error!r:.200}") from None
        finally:
            connection.close()  # which cancels what is left of the answer

    def _chunks(self, connection: http.client.HTTPConnection, body: Mapping[str, Any]) -> Chunks:
        """The JSON objects that a server sends as events."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection.connect()
        connection.sock.settimeout(SILENCE_S)
        connection.request("POST", self._path, json.dumps(body).encode(), headers)
        with contextlib.closing(connection.getresponse()) as response:
            if response.status != 200:
                raise Error(f"{self._url} refuses with {response.status}: {_reason(response.read(LINE_BYTES))}")
            yield from self._events(response)

    def _events(self, response: http.client.HTTPResponse) -> Iterator[Mapping[str, Any]]:
        while line := response.readline(LINE_BYTES):
            name, _, data = line.partition(b":")
            if name != b"data" or not data.strip():
                continue  # a comment that keeps the connection open, or the end of an event
            if data.strip() == b"[DONE]":
                return
            try:
                chunk = json.loads(data)
            except (ValueError, RecursionError):
                raise Error(f"{self._url} sends what is not JSON: {data[:100]!r}") from None
            if not isinstance(chunk, Mapping) or "error" in chunk:
                raise Error(f"{self._url} ends the answer: {_reason(data)}")
            yield chunk
        raise Error(f"{self._url} closed the connection before the end of the answer")


def _maps(found: object) -> list[Mapping[str, Any]]:
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def _text(choice: Mapping[str, Any]) -> str:
    """The text in a choice of a chunk; "" if it has none."""
    delta = choice.get("delta")
    part = delta.get("content") if isinstance(delta, Mapping) else None
    return part if isinstance(part, str) else ""


def _count(turn: Turn, usage: object, first: float) -> None:
    """Take the figures of the last chunk."""
    if isinstance(usage, Mapping):
        details = usage.get("prompt_tokens_details")
        turn.prompt_tokens, turn.tokens = _number(usage.get("prompt_tokens")), _number(usage.get("completion_tokens"))
        turn.reused_tokens = _number(details.get("cached_tokens")) if isinstance(details, Mapping) else 0
        if turn.tokens > 1 and first:
            turn.tokens_per_second = (turn.tokens - 1) / max(time.perf_counter() - first, 1e-9)


def _number(found: object) -> int:
    return found if isinstance(found, int) else 0


def _reason(body: bytes) -> str:
    """The message in an error of OpenAI's shape, or the beginning of the body."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, Mapping) else error)[:500]
    except (ValueError, TypeError, KeyError, RecursionError):
        return body[:200].decode("utf-8", "replace") or "an empty answer"
