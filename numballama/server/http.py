"""Bodies, answers, streams of events, and what happens when a client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .errors import ApiError, failed

log = logging.getLogger("numballama.server")

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
LAST_S = 5.0
"""Time for a client to take the last event of a stream, when it reads slowly."""
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""nginx would otherwise hold events back."""


class ClientGoneError(Exception):
    """The client has closed its connection: nobody reads an answer."""


def dumps(value: object) -> bytes:
    """The value as JSON in UTF-8. A lone surrogate, which a request may contain, becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


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


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The body of a request, which must be JSON.

    Raises `ApiError`: 415 for another content type, 413 for more than `limit` bytes, 408 when the client takes longer
    than `timeout_s`. Raises `ClientGoneError`.
    """
    # also a protection: another site's page can send other types here, or none, without asking the browser
    unnamed = "none" if "origin" in request.headers else "application/json"
    kind = request.headers.get("content-type", unnamed).partition(";")[0].strip().lower()
    if not (kind == "application/json" or kind.endswith("+json")):
        raise ApiError(f"Content-Type must be application/json, found {kind}", 415, code="unsupported_media_type")
    too_large = ApiError(f"a body may have {limit:,} bytes", 413, code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    body = bytearray()

    async def read() -> None:
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            body.extend(message.get("body", b""))
            if len(body) > limit:
                raise too_large
            if not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(read(), timeout_s)
    except asyncio.TimeoutError:
        raise ApiError(f"the body did not arrive within {timeout_s:g} s", 408, code="request_timeout") from None
    return bytes(body)


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone. The body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """The result of `work`, which is cancelled when the client is gone or after `timeout_s`.

    Raises `ClientGoneError`, or `ApiError` 504.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError if gone.done() else _timed_out(timeout_s)
    finally:
        await _end(task, gone)


def _timed_out(timeout_s: float) -> ApiError:
    return ApiError(f"the answer was not complete within {timeout_s:g} s", 504, code="timeout")


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """An answer of server-sent events.

    It ends when `events` do, when the client is gone, and after `timeout_s`; then `events` is closed and `close` is
    called. `on_error` makes the last event of an `ApiError`. After `keep_alive_s` without an event a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        on_error: Callable[[ApiError], bytes],
        timeout_s: float,
        keep_alive_s: float,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(None, headers=STREAM_HEADERS | (headers or {}))
        del self.headers["content-length"]
        self._events, self._close, self._on_error = events, close, on_error
        self._timeout_s, self._keep_alive_s = timeout_s, keep_alive_s
        self._sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = time.monotonic() + self._timeout_s

        async def send_all() -> None:
            async for data in self._events:
                self._sent = time.monotonic()
                await send(_body(data, True))

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        work = asyncio.ensure_future(send_all())
        gone = asyncio.ensure_future(disconnected(receive))
        last = b""
        try:
            while not (work.done() or gone.done()):
                now = time.monotonic()
                if now >= deadline:
                    last = self._on_error(_timed_out(self._timeout_s))
                    break
                if now - self._sent >= self._keep_alive_s:
                    self._sent = now
                    await _send_within(send, _body(KEEP_ALIVE, True), deadline - now)
                wait_s = min(deadline, self._sent + self._keep_alive_s) - now
                await asyncio.wait({work, gone}, timeout=max(wait_s, 0.01), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        except ApiError as error:
            last = self._on_error(error)
        except Exception as error:
            log.exception("a stream failed")
            last = self._on_error(failed(error))
        finally:
            is_gone = gone.done()
            await _end(work, gone)
            await self._events.aclose()
            self._close()  # generators that have not begun do nothing when they are closed
        if not is_gone:
            await _send_within(send, _body(last, False), LAST_S)


async def _send_within(send: Send, message: Message, timeout_s: float) -> None:
    """Send, unless the client reads so slowly that it cannot be done in time."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(send(message), timeout_s)


def _body(data: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
