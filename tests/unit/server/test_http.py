"""JSON, and what a stream sends. Whole answers are tested in `test_app`."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.types import Message

from numballama.server.http import SLICE, EventStream, LastEvent, dumps, event, json_parts, number, stream_of


def test_json() -> None:
    assert dumps({"é": "\ud800", "a": [1, None]}) == '{"é":"?","a":[1,null]}'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        dumps(math.nan)
    assert event({"a": 1}, "x") == b'event: x\ndata: {"a":1}\n\n'
    assert [number(value) for value in (1.5, -math.inf, math.nan)] == [1.5, -9999.0, None]


@given(st.text())
@example("a\x85b\u2028c\u2029d\x1e")
def test_an_event_is_a_line_for_every_client(text: str) -> None:
    """httpx and Python end lines at more characters than the format does, and clients read events by lines."""
    lines = event({"a": text}).decode().splitlines()
    assert len(lines) == 2 and json.loads(lines[0].removeprefix("data: ")) == {"a": text}


@pytest.mark.parametrize("count", [0, 1, SLICE, SLICE + 1, 3 * SLICE])
def test_json_in_parts(count: int) -> None:
    value: dict[str, object] = {"tokens": list(range(count)), "pieces": [{"é": [n]} for n in range(count)], "n": "ü"}
    assert b"".join(json_parts(value)) == dumps(value)
    assert max(map(len, json_parts(value))) < 40 * SLICE
    assert b"".join(json_parts({})) == b"{}"


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


@pytest.mark.parametrize("fails", [False, True])
def test_what_goes_out_together(fails: bool) -> None:
    """What comes first goes with the first text and what comes last with the last text. Nothing is lost by an error."""
    ended = False

    async def parts() -> AsyncGenerator[bytes, None]:
        nonlocal ended
        for part in (b"", b"a", b"", b"b"):
            yield part
        ended = True
        yield b"c"
        if fails:
            raise ValueError("failed")

    async def read() -> list[bytes]:
        found: list[bytes] = []
        try:
            async for data in stream_of(b"1", parts(), bytes, lambda: ended, lambda: b"2"):
                found.append(data)
        except ValueError:
            found.append(b"failed")
        return found

    found = asyncio.run(read())
    assert found == [b"1a", b"b", b"c", b"failed"] if fails else [b"1a", b"b", b"c2"]
    assert isinstance(found[-1], LastEvent) is not fails


def test_the_end_of_a_stream_is_sent_with_its_last_event() -> None:
    """No comment comes after it, although one waits for a slow reader."""
    sent: list[Message] = []
    reads = asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.1)
        asyncio.get_running_loop().call_later(0.1, reads.set)
        yield LastEvent(b"data: 1\n\n")

    async def receive() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await reads.wait()
        sent.append(message)

    stream = EventStream(events(), lambda: None, lambda error: dumps(error.body), 60, 0.02)
    asyncio.run(stream({"type": "http"}, receive, send))
    assert [message.get("body") for message in sent] == [None, b"data: 1\n\n"] and sent[1]["more_body"] is False
