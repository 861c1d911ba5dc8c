"""Who steps and who is woken: threads and coroutines. Nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from numballama.engine.engine import Engine
from numballama.engine.request import Request, TokenEvent
from numballama.errors import DeviceError, Error
from tests.helpers.driven_engine import PATIENCE, alone, make_engine, settle
from tests.helpers.fake_runner import make_params, tokens_of


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Call `work` in threads; raise what one of them raises, and fail if one does not end."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a reader waits for ever"
    for error in errors:
        raise error


class CallbackError(Exception):
    """What a callback raises."""


def behave(engine: Engine, rng: random.Random, name: int) -> None:
    """Read a request to its end, or leave it in one of many ways."""
    prompt = [*([1] * rng.randrange(9)), name % 1000, *([2] * rng.randrange(9))]
    most = rng.randrange(1, 12)
    way = rng.choice(["read", "read", "read", "break", "cancel", "raise", "drop", "by another"])

    def process(event: TokenEvent) -> TokenEvent:
        if way == "raise":
            raise CallbackError(name)
        return event

    request: Request[TokenEvent] = engine.submit(prompt, make_params(max_tokens=most), process=process)
    if way == "drop":
        return
    if way == "by another":
        threading.Timer(rng.random() / 50, request.cancel).start()
    read = []
    with contextlib.suppress(CallbackError):
        for event in request:
            read.append(event.token)
            if way == "break":
                break
            if way == "cancel":
                request.cancel()
    assert read == alone(prompt, most)[: len(read)]
    assert way != "read" or len(read) == most


@pytest.mark.parametrize("threaded", [False, True], ids=["inline", "thread"])
@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize(("readers", "each"), [(8, 2), pytest.param(40, 5, marks=pytest.mark.slow)])
def test_requests_from_many_threads(threaded: bool, lookahead: int, readers: int, each: int) -> None:
    engine, runner = make_engine(lookahead=lookahead)
    if threaded:
        engine.start()

    def work(number: int) -> None:
        rng = random.Random(number)
        for turn in range(each):
            behave(engine, rng, number * 10 + turn)

    in_threads(readers, work)
    settle(engine, runner)
    assert engine.stats().requests == readers * each


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_requests_from_asyncio(count: int) -> None:
    async def one(engine: Engine, number: int) -> None:
        rng = random.Random(number)
        prompt, most = [number % 7] * (1 + number % 11), 1 + number % 9
        way = rng.choice(["read", "read", "break", "raise", "cancel", "task"])

        def process(event: TokenEvent) -> TokenEvent:
            if way == "raise":
                raise CallbackError(number)
            return event

        read = []

        async def consume() -> None:
            async for event in engine.submit(prompt, make_params(max_tokens=most), process=process):
                read.append(event.token)
                if way == "break":
                    break

        if way == "cancel":
            request = engine.submit(prompt, make_params(max_tokens=60))
            asyncio.get_running_loop().call_later(rng.random() / 50, request.cancel)
            async for event in request:
                read.append(event.token)
            most = 60
        elif way == "task":
            task = asyncio.ensure_future(consume())
            await asyncio.sleep(rng.random() / 100)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        else:
            with contextlib.suppress(CallbackError):
                await consume()
        assert read == alone(prompt, most)[: len(read)]
        assert way != "read" or len(read) == most

    async def everybody(engine: Engine) -> None:
        await asyncio.wait_for(asyncio.gather(*(one(engine, number) for number in range(count))), PATIENCE)

    engine, runner = make_engine(lookahead=1)
    asyncio.run(everybody(engine))
    settle(engine, runner)


def test_a_loop_is_called_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of its requests that have something to read."""
    engine, _ = make_engine(lookahead=1)
    calls = 0

    async def read(request: AsyncIterator[TokenEvent]) -> int:
        return len([event async for event in request])

    async def everybody() -> list[int]:
        nonlocal calls
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def count(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += threading.current_thread() is engine._driver._thread
            return call(*args, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        requests = [engine.submit([number], make_params(max_tokens=20)) for number in range(8)]
        return await asyncio.gather(*(read(aiter(request)) for request in requests))

    assert asyncio.run(everybody()) == [20] * 8
    assert calls <= engine.stats().steps
    engine.close()


@pytest.mark.parametrize("cancels", [False, True])
def test_a_pause_ends_with_the_request(cancels: bool) -> None:
    """Not with one of its tokens."""
    engine, _ = make_engine(lookahead=1)

    async def pause() -> int:
        request = engine.submit([3], make_params(max_tokens=30))
        first = await request.unread()
        if cancels:
            request.cancel()
        await asyncio.wait_for(request.pause(asyncio.get_running_loop().create_future()), PATIENCE)
        assert request.finished
        await asyncio.wait_for(request.pause(asyncio.get_running_loop().create_future()), PATIENCE)
        return len(first) + len(await request.unread())

    found = asyncio.run(pause())
    assert cancels or found == 30
    engine.close()


def test_a_pause_ends_while_the_request_goes_on() -> None:
    engine, _ = make_engine()

    async def pause() -> int:
        request, future = engine.submit([3], make_params(max_tokens=30)), asyncio.get_running_loop().create_future()
        with engine.exclusive():
            asyncio.get_running_loop().call_later(0.01, future.set_result, None)
            await asyncio.wait_for(request.pause(future), PATIENCE)
            assert not request.finished
            assert request._state.waiter is None
        return len([event async for event in request])

    assert asyncio.run(pause()) == 30
    engine.close()


def test_a_closed_loop_stops_nobody() -> None:
    """Its coroutine is never woken; everybody else is."""
    engine, _ = make_engine()
    loop = asyncio.new_event_loop()
    request = engine.submit([1], make_params(max_tokens=50))
    request._state.waiter = loop, loop.create_future()
    loop.close()
    assert tokens_of(engine.submit([2], make_params())) == alone([2])
    engine.close()


def test_whoever_waits_steps_for_all() -> None:
    """Two readers, no thread: the one that leaves first hands over to the other."""
    engine, runner = make_engine(max_sequences=1)
    results: dict[int, list[int]] = {}

    def work(number: int) -> None:
        results[number] = tokens_of(engine.submit([number] * 5, make_params(max_tokens=5)))

    in_threads(12, work)
    assert results == {number: alone([number] * 5, 5) for number in range(12)}
    settle(engine, runner)


def test_a_reader_that_leaves_while_others_sleep_wakes_one_of_them() -> None:
    """The one that steps is slow and then goes away for good; its request ends, the other's does not."""
    engine, runner = make_engine(max_sequences=1)
    started, gate = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        started.set()
        assert gate.wait(PATIENCE)

    runner.before_collect = hold
    short, long = engine.submit([1], make_params(max_tokens=1)), engine.submit([2], make_params(max_tokens=6))
    results: dict[str, list[int]] = {}
    stepping = threading.Thread(target=lambda: results.update(short=tokens_of(short)), daemon=True)
    sleeping = threading.Thread(target=lambda: results.update(long=tokens_of(long)), daemon=True)
    stepping.start()
    assert started.wait(PATIENCE)
    sleeping.start()
    while not engine._driver._sleeping:
        time.sleep(0.001)
    gate.set()
    for thread in (stepping, sleeping):
        thread.join(PATIENCE)
    assert results == {"short": alone([1], 1), "long": alone([2], 6)}


def test_the_thread_takes_over_and_gives_back() -> None:
    engine, runner = make_engine(lookahead=1)
    reader = iter(engine.submit([3], make_params(max_tokens=40)))
    read = [next(reader).token]
    engine.start()
    engine.start()
    read += [next(reader).token for _ in range(5)]
    engine.stop()
    engine.stop()
    read += [next(reader).token for _ in range(5)]
    engine.start()
    assert read + [event.token for event in reader] == alone([3], 40)
    settle(engine, runner)


def test_the_thread_sleeps_when_there_is_nothing_to_do() -> None:
    engine, runner = make_engine(lookahead=1)
    with engine:
        assert tokens_of(engine.submit([3], make_params())) == alone([3])
        while engine._has_work():
            time.sleep(0.001)
        time.sleep(0.01)
        steps = engine.stats().steps
        assert engine._driver._idle
        time.sleep(0.02)
        assert engine.stats().steps == steps and not runner.in_flight
        assert tokens_of(engine.submit([4], make_params())) == alone([4])
    assert not engine._driver.running


def test_an_engine_that_nobody_refers_to_ends_its_thread() -> None:
    """Whether it has worked before or not. An engine that is left open must not keep its model."""
    for prompts in ([], [[1, 2, 3], [4, 5]]):
        engine, _ = make_engine()
        engine.start()
        thread = engine._driver._thread
        assert thread is not None
        for prompt in prompts:
            assert tokens_of(engine.submit(prompt, make_params())) == alone(prompt)
        reference = weakref.ref(engine)
        del engine
        end = time.monotonic() + 30
        while reference() is not None and time.monotonic() < end:
            gc.collect()
            time.sleep(0.01)
        thread.join(30)
        assert reference() is None and not thread.is_alive()


def test_exclusive_waits_for_its_turn() -> None:
    engine, runner = make_engine(lookahead=1)
    engine.start()
    stop = threading.Event()

    def work(number: int) -> None:
        if number:
            while not stop.is_set():
                assert tokens_of(engine.submit([number] * 3, make_params())) == alone([number] * 3)
        else:
            for _ in range(10):
                with engine.exclusive():
                    assert not runner.in_flight
                    runner.queue.append(("poison", (list(range(60)),)))
            stop.set()

    in_threads(5, work)
    settle(engine, runner)


def test_close_wakes_those_who_sleep() -> None:
    engine, runner = make_engine(max_sequences=1)
    runner.before_collect = lambda number: time.sleep(0.002)
    ready = threading.Barrier(6)

    def work(number: int) -> None:
        if number == 0:
            ready.wait(PATIENCE)
            time.sleep(0.01)
            engine.close()
        else:
            request = engine.submit([number], make_params(max_tokens=64))
            ready.wait(PATIENCE)
            with pytest.raises(Error, match="this engine is closed"):
                list(request)

    in_threads(6, work)
    assert not runner.in_flight


def test_close_wakes_coroutines() -> None:
    engine, runner = make_engine()
    runner.before_collect = lambda number: time.sleep(0.002)

    async def read() -> None:
        closer = threading.Timer(0.02, engine.close)
        closer.start()
        with pytest.raises(Error, match="this engine is closed"):
            async for _ in engine.submit([1], make_params(max_tokens=64)):
                pass

    asyncio.run(asyncio.wait_for(read(), PATIENCE))


def test_one_reader_a_request() -> None:
    engine, runner = make_engine(max_sequences=1)
    started, gate = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        started.set()
        assert gate.wait(PATIENCE)

    runner.before_collect = hold
    stepping = threading.Thread(target=lambda: list(engine.submit([1], make_params(max_tokens=1))), daemon=True)
    stepping.start()
    assert started.wait(PATIENCE)
    shared = engine.submit([2], make_params(max_tokens=4))
    first = threading.Thread(target=lambda: engine.wait(shared._state), daemon=True)
    first.start()
    while not engine._driver._sleeping:
        time.sleep(0.001)
    with pytest.raises(Error, match="read by two readers"):
        engine.wait(shared._state)
    gate.set()
    stepping.join(PATIENCE)
    first.join(PATIENCE)
    assert not first.is_alive()


def test_a_reader_whose_loop_was_closed_has_gone() -> None:
    """Nobody cancelled the task that waits there: another loop reads on."""
    engine, runner = make_engine()
    gate = threading.Event()

    def hold(number: int) -> None:
        assert gate.wait(PATIENCE)

    runner.before_collect = hold
    request, loop = engine.submit([1], make_params()), asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # the task is destroyed while it waits
    waits = request.__aiter__().__anext__()
    loop.create_task(waits)  # type: ignore[arg-type]
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    gate.set()

    async def read() -> list[int]:
        return [event.token async for event in request]

    assert asyncio.run(read()) == alone([1])
    settle(engine, runner)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["limit", "memory"])
def test_a_thread_that_does_not_start(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A limit of the system is an error, and readers step themselves. Whoever wanted the thread is not counted."""
    engine, runner = make_engine()

    def start(thread: threading.Thread) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for wanted in (engine.start, engine._driver.enter):
            with pytest.raises(DeviceError, match="the engine's thread does not start"):
                wanted()
    assert not engine._driver.running
    assert tokens_of(engine.submit([1], make_params())) == alone([1])
    with engine:
        assert tokens_of(engine.submit([2], make_params())) == alone([2])
    assert not engine._driver.running
    settle(engine, runner)


def test_whoever_enters_while_another_leaves_keeps_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = make_engine()
    driver = engine._driver
    driver.enter()
    stop = driver._stop

    def enter_first(unless_used: bool) -> None:
        monkeypatch.setattr(driver, "_stop", stop)
        driver.enter()
        stop(unless_used)

    monkeypatch.setattr(driver, "_stop", enter_first)
    driver.leave()
    assert driver.running
    driver.leave()
    assert not driver.running
    settle(engine, runner)
