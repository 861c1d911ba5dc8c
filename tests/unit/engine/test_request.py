"""Reading a request, without an engine."""

from __future__ import annotations

import asyncio

import pytest

from numballama.engine.request import Request, RequestState, TokenEvent


class Script:
    """Stands for an engine: what happens each time somebody waits."""

    def __init__(self, *happenings: TokenEvent | BaseException | None) -> None:
        self.happenings = list(happenings)
        self.cancelled = 0

    def wait(self, state: RequestState) -> None:
        happening = self.happenings.pop(0)
        if isinstance(happening, TokenEvent):
            state.events.append(happening)
        else:
            state.error, state.done = happening, True

    async def wait_async(self, state: RequestState) -> None:
        self.wait(state)

    def cancel_state(self, state: RequestState) -> None:
        if not state.done:
            self.cancelled += 1
            state.cancelled = True


def event(token: int) -> TokenEvent:
    return TokenEvent(token, 0, None, None, None, 1, 0)


def test_responses_come_in_order_until_the_end() -> None:
    script = Script(event(1), event(2), None)
    request: Request[TokenEvent] = Request(script, RequestState("a", None))
    assert [each.token for each in request] == [1, 2] and script.cancelled == 0 and request.finished


def test_the_last_responses_are_read_before_the_error() -> None:
    state = RequestState("a", None)
    state.events.append(event(1))
    state.error, state.done = ValueError("bad"), True
    reader = iter(Request(Script(), state))
    assert next(reader).token == 1
    with pytest.raises(ValueError, match="bad"):
        next(reader)


def test_leaving_early_cancels() -> None:
    script = Script(event(1), event(2), None)
    request: Request[TokenEvent] = Request(script, RequestState("a", None))
    for _ in request:
        break
    assert script.cancelled == 1 and list(request) == []


def test_coroutines_read_the_same() -> None:
    async def read(request: Request[TokenEvent]) -> list[int]:
        return [each.token async for each in request]

    assert asyncio.run(read(Request(Script(event(1), event(2), None), RequestState("a", None)))) == [1, 2]
    with pytest.raises(ValueError, match="bad"):
        asyncio.run(read(Request(Script(event(1), ValueError("bad")), RequestState("a", None))))


def test_a_dropped_request_is_cancelled() -> None:
    script = Script()
    Request(script, RequestState("a", None))
    assert script.cancelled == 1
