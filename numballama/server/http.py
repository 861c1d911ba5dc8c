"""Bodies, answers, and streams of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .client import Client, ClientGoneError
from .errors import ApiError, failed

log = logging.getLogger("numballama.server")

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
LAST_S = 5.0
"""Time for a client to take the last event of a stream, when it reads slowly."""
STREAM_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise hold events back
    (b"content-type", b"text/event-stream; charset=utf-8"),
)
"""Headers of every stream."""


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""Where clients may end a line that do not end one of an event: how JSON writes them. It also has names for others."""


def dumps(value: object) -> bytes:
    """The value as JSON in UTF-8, in a line. A lone surrogate, which a request may contain, becomes a question mark."""
    text = _encode(value)
    if not text.isascii():
        for end, name in _LINE_ENDS.items():
            text = text.replace(end, name)
    return text.encode("utf-8", "replace")


SLICE = 4096
"""Items of a list that are written at a time."""


def json_parts(value: Mapping[str, object]) -> Iterator[bytes]:
    """What `dumps` gives, in parts: long lists a few items at a time. In between other threads can run."""
    before = b"{"
    for name, each in value.items():
        yield before + dumps(name) + b":"
        before = b","
        if isinstance(each, list):
            slices = (dumps(each[start : start + SLICE])[1:-1] for start in range(0, len(each), SLICE))
            yield b"["
            for index, data in enumerate(slices):
                yield b"," + data if index else data
            yield b"]"
        else:
            yield dumps(each)
    yield b"}" if value else b"{}"


def number(value: float) -> float | None:
    """A number that JSON has: -infinity becomes -9999, as in vLLM, NaN None."""
    return None if math.isnan(value) else max(min(value, 9999.0), -9999.0)


def event(value: object, name: str | None = None) -> bytes:
    """A server-sent event with JSON as its data."""
    data = b"data: " + dumps(value) + b"\n\n"
    return data if name is None else f"event: {name}\n".encode() + data


class JsonResponse(Response):
    """An answer of JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def error_response(error: ApiError) -> Response:
    return JsonResponse(error.body, error.status, error.headers)


async def read_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """The body of a request, which must be JSON.

    Raises `ApiError`: 415 for another content type, 413 for more than `limit` bytes. Raises `ClientGoneError`.
    """
    # also a protection: another site's page can send other types here, or none, without asking the browser
    unnamed = "none" if "origin" in headers else "application/json"
    kind = headers.get("content-type", unnamed).partition(";")[0].strip().lower()
    if not (kind == "application/json" or kind.endswith("+json")):
        raise ApiError(f"Content-Type must be application/json, found {kind}", 415, code="unsupported_media_type")
    too_large = f"a body may have {limit:,} bytes"
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise ApiError(too_large, 413, code="request_too_large")
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body.extend(message.get("body", b""))
        if len(body) > limit:
            raise ApiError(too_large, 413, code="request_too_large")
        if not message.get("more_body", False):
            return bytes(body)


class LastEvent(bytes):
    """The last events of a stream: the end of the answer is sent with them."""


async def stream_of(
    first: bytes,
    batches: AsyncGenerator[T, None],
    write: Callable[[T], bytes],
    ended: Callable[[], bool],
    last: Callable[[], bytes],
) -> AsyncGenerator[bytes, None]:
    """A stream's events: what `write` makes of each batch. Each costs a call of the system, so `first` goes out with
    the first of them.

    The batch that comes when `ended` says that no answer goes on goes out with `last`.
    """
    held = first
    try:
        async for batch in batches:
            data = write(batch)
            held += data
            if data and not ended():
                yield held
                held = b""
    except Exception:
        if held:
            yield held
        raise
    yield LastEvent(held + last())


class EventStream(Response):
    """An answer of server-sent events.

    It ends when `events` do, when the client is gone, and after `timeout_s`; then `events` is closed and `close` is
    called. `on_error` makes the last event of an `ApiError`. After `keep_alive_s` without an event a comment is sent.
    """

    client: Client | None = None
    """Who waits for it, if that is known already."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        on_error: Callable[[ApiError], bytes],
        timeout_s: float,
        keep_alive_s: float,
    ) -> None:
        self.status_code, self.raw_headers = 200, [*STREAM_HEADERS]  # what `Response` would write anew for each
        self._events, self._close, self._on_error = events, close, on_error
        self._timeout_s, self._keep_alive_s = timeout_s, keep_alive_s
        self._complete = False
        """Whether the end of the answer has been sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (client := self.client) is None:
            client = Client(receive)
            client.watch()
        comments = _Comments(send, self._keep_alive_s)
        last = b""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await client.run(self._send_all(send, comments), self._timeout_s)
        except ClientGoneError:
            pass
        except ApiError as error:
            last = self._on_error(error)
        except Exception as error:
            log.exception("a stream failed")
            last = self._on_error(failed(error))
        finally:
            client.close()
            await comments.end()
            await self._events.aclose()
            self._close()  # generators that have not begun do nothing when they are closed
        if not (client.gone or self._complete):
            await _send_within(send, _body(last, False), LAST_S)

    async def _send_all(self, send: Send, comments: _Comments) -> None:
        async for data in self._events:
            if isinstance(data, LastEvent):
                await comments.end()
                await send(_body(data, False))
                self._complete = True
                break
            comments.restart()
            await send(_body(data, True))


class _Comments:
    """Sends a comment whenever `restart` was not called for some time."""

    def __init__(self, send: Send, after_s: float) -> None:
        self._send, self._after_s = send, after_s
        self._loop = asyncio.get_running_loop()
        self._sent = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(after_s, self._look)

    def restart(self) -> None:
        """Something else is sent now."""
        self._sent = time.monotonic()

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._sent >= self._after_s and (self._task is None or self._task.done()):
            self._sent = now
            self._task = asyncio.ensure_future(_send_comment(self._send))
        wait_s = max(self._sent + self._after_s - now, 0.01)
        self._timer = self._loop.call_later(wait_s, self._look)

    async def end(self) -> None:
        """Send none any more."""
        self._timer.cancel()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _send_comment(send: Send) -> None:
    await send(_body(KEEP_ALIVE, True))


async def _send_within(send: Send, message: Message, timeout_s: float) -> None:
    """Send, unless the client reads so slowly that it cannot be done in time."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(send(message), timeout_s)


def _body(data: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
