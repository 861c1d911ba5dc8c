"""Where work is done. What else the service does, `test_app` and `test_generation` test with the application."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from numballama.model import Model
from numballama.server.service import Service
from numballama.server.settings import Settings
from tests.helpers.http_server import LONG, serving


def test_short_work_waits_for_no_thread_and_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done on the event loop, but not while a thread may hold a lock, nor when it has been long."""
    monkeypatch.setattr("numballama.server.service.SHORT_S", LONG)
    go_on = threading.Event()

    async def look() -> list[bool]:
        service, here = Service(Settings()), threading.get_ident()
        places: list[bool] = []

        async def short() -> None:
            places.append(await service.run_short(threading.get_ident) == here)

        await short()  # loads and compiles what later ones need
        await short()
        holds = asyncio.ensure_future(service.run_slowly(go_on.wait, LONG))
        while not any(job.running() for job in service._jobs):
            await asyncio.sleep(0.001)
        await short()
        holds.cancel()  # the thread goes on
        await short()
        go_on.set()
        while service._jobs:
            await asyncio.sleep(0.001)
        await short()
        monkeypatch.setattr("numballama.server.service.SHORT_S", -1)
        for _ in range(3):
            await short()
        service.close()
        return places

    assert asyncio.run(look()) == [False, True, False, False, True, True, True, False]


def test_a_pause_between_events_ends_with_the_request(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client that waits for the last tokens may send its next request."""
    monkeypatch.setattr("numballama.server.service.EVENTS_PER_S", 1 / LONG)
    with serving(model) as server:
        started = time.monotonic()
        answer = server.post("/v1/completions", {"prompt": [9], "max_tokens": 20, "ignore_eos": True, "stream": True})
        assert len(answer.events) == 2
        assert time.monotonic() - started < LONG
