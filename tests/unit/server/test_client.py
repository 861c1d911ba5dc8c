"""Work that ends when the client is gone, or when its time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from starlette.types import Message, Receive

from numballama.server.client import Client, ClientGoneError, Section, body_is_late
from numballama.server.errors import ApiError

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
