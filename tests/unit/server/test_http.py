"""JSON, and work that ends when the client is gone. Streams are tested in `test_app`."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from numballama.server.errors import ApiError
from numballama.server.http import ClientGoneError, EventStream, dumps, event, number, until_gone


def test_json() -> None:
    assert dumps({"é": "\ud800", "a": [1, None]}) == '{"é":"?","a":[1,null]}'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        dumps(math.nan)
    assert event({"a": 1}, "x") == b'event: x\ndata: {"a":1}\n\n'
    assert [number(value) for value in (1.5, -math.inf, math.nan)] == [1.5, -9999.0, None]


@pytest.mark.parametrize("gone", [True, False])
def test_work_ends_with_its_client(gone: bool) -> None:
    cancelled: list[bool] = []

    async def work() -> str:
        try:
            await asyncio.sleep(60 if gone else 0)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return "done"

    async def receive() -> Message:
        await asyncio.sleep(0.01 if gone else 60)
        return {"type": "http.disconnect"}

    if gone:
        with pytest.raises(ClientGoneError):
            asyncio.run(until_gone(receive, work(), 60))
    else:
        assert asyncio.run(until_gone(receive, work(), 60)) == "done"
    assert cancelled == [True] * gone


def test_a_stream_that_fails_ends_with_an_event() -> None:
    sent: list[Message] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise ValueError("nobody expected it")

    async def receive() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    stream = EventStream(events(), lambda: None, lambda error: dumps(error.body), 60, 60)
    asyncio.run(stream({"type": "http"}, receive, send))
    assert [message.get("more_body") for message in sent] == [None, True, False]
    assert b'"code":"server_error"' in sent[-1]["body"] and b"nobody" not in sent[-1]["body"]


def test_a_client_that_does_not_read_has_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is free again, although nothing can be sent to it: neither an event nor a comment nor the last one."""
    monkeypatch.setattr("numballama.server.http.LAST_S", 0.01)
    closed: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"

    async def receive() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    stream = EventStream(events(), lambda: closed.append(True), lambda error: dumps(error.body), 0.1, 0.02)
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 30))
    assert closed


def test_work_has_a_time_limit() -> None:
    async def receive() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    with pytest.raises(ApiError) as found:
        asyncio.run(until_gone(receive, asyncio.sleep(60), 0.01))
    assert found.value.status == 504
