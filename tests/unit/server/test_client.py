"""Work that ends when the client is gone, or when its time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

from numballama.server import app
from numballama.server.app import Post
from numballama.server.client import LOST, Client, ClientGoneError, Section, body_is_late
from numballama.server.errors import ApiError
from numballama.server.fields import Request
from numballama.server.http import read_body
from numballama.server.run import Address, connection_class, server_config
from numballama.server.settings import Settings

T = TypeVar("T")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    client = Client(receive)
    client.watch()
    return await client.run(work, timeout_s)


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


def test_work_has_a_time_limit() -> None:
    async def receive() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    with pytest.raises(ApiError) as found:
        asyncio.run(until_gone(receive, asyncio.sleep(60), 0.01))
    assert found.value.status == 504


def test_work_is_not_begun_for_a_client_that_is_gone() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def ask() -> None:
        client = Client(receive)
        client.watch()
        await asyncio.sleep(0)
        assert client.gone
        await client.run(asyncio.sleep(60), 60)

    with pytest.raises(ClientGoneError):
        asyncio.run(ask())


def test_a_section_ends_where_it_is_told_and_nothing_after_it_does() -> None:
    async def work() -> list[str]:
        loop, seen = asyncio.get_running_loop(), list[str]()
        try:
            with Section() as section:
                loop.call_soon(section.end, ValueError("first"))
                loop.call_soon(section.end, ValueError("second"))
                await asyncio.sleep(60)
        except ValueError as error:
            seen.append(str(error))
        with Section() as section:
            pass
        section.end(ValueError("late"))
        await asyncio.sleep(0.05)
        seen.append("after")
        with Section() as section:
            loop.call_soon(section.end, ValueError("swallowed"))
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append("cancelled")
        await asyncio.sleep(0)
        return seen

    assert asyncio.run(work()) == ["first", "after", "cancelled"]


def test_a_task_that_is_cancelled_in_a_section_is_cancelled() -> None:
    async def work() -> None:
        with Section():
            await asyncio.sleep(60)

    async def cancelled() -> bool:
        task = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancelled())


@pytest.mark.parametrize("limits", [(0.01, 0.1), (60, 0.05)])
def test_each_part_of_the_work_has_its_own_time(limits: tuple[float, float]) -> None:
    """A later limit replaces an earlier one, and an earlier one a later one. What is late says so in its own words."""

    async def receive() -> Message:
        raise AssertionError("nobody watches")

    async def work() -> float:
        client, loop = Client(receive), asyncio.get_running_loop()
        assert await client.run(asyncio.sleep(0, "first"), limits[0]) == "first"
        await asyncio.sleep(0.02)
        started = loop.time()
        with pytest.raises(ApiError) as found:
            await client.run(asyncio.sleep(60), limits[1], body_is_late)
        assert found.value.status == 408
        client.close()
        return loop.time() - started

    assert limits[1] * 0.9 < asyncio.run(work()) < 30


def test_a_connection_may_tell_when_it_is_lost() -> None:
    """Then nothing is read from it to find out."""
    calls: list[Callable[[], None]] = []

    async def receive() -> Message:
        raise AssertionError("nobody reads")

    async def work() -> None:
        client = Client(receive, calls.append)
        client.watch()
        asyncio.get_running_loop().call_soon(calls[0])
        with pytest.raises(ClientGoneError):
            await client.run(asyncio.sleep(60), 60)
        client.close()
        assert client.gone

    asyncio.run(work())
    assert len(calls) == 1


class Line(asyncio.Transport):
    """A connection that only says whether it is read."""

    reads = True

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass


def test_a_connection_is_read_after_a_large_body() -> None:
    """uvicorn reads no further when much of a body has come, and would not see that the client is gone."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(receive, scope.get(LOST))
        seen.append(f"{len(await read_body(Headers(scope=scope), receive, 1 << 20)):,} bytes")
        client.watch()
        try:
            await client.run(asyncio.sleep(60), 60)
        except ClientGoneError:
            seen.append("gone")
        client.close()

    async def work() -> None:
        config = server_config(app, Address(port=0))
        line, connection = Line(), connection_class(60)(config, ServerState(), {})
        connection.connection_made(line)
        connection.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n")
        await asyncio.sleep(0.01)
        connection.data_received(b" " * 200_000)
        assert not line.reads
        await asyncio.sleep(0.01)
        assert line.reads
        connection.connection_lost(None)
        await asyncio.sleep(0.01)

    asyncio.run(work())
    assert seen == ["200,000 bytes", "gone"]


def test_a_request_that_is_cancelled_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that a server which shuts down waits for no longer."""
    made: list[Client] = []

    class Recorded(Client):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(app, "Client", Recorded)

    async def receive() -> Message:
        await asyncio.sleep(60)
        raise AssertionError("nothing comes")

    async def send(message: Message) -> None:
        raise AssertionError("nobody answers")

    async def handler(call: object, request: object) -> Any:
        raise AssertionError("there is no body")

    async def work() -> None:
        post = Post(SimpleNamespace(settings=Settings()), Request, handler)  # type: ignore[arg-type]
        task = asyncio.ensure_future(post({"type": "http", "headers": []}, receive, send))
        await asyncio.sleep(0.01)
        (client,) = made
        assert is_set(client._timer), "it waits for the body"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not is_set(client._timer)

    def is_set(timer: asyncio.TimerHandle | None) -> bool:
        return timer is not None and not timer.cancelled()

    asyncio.run(work())
