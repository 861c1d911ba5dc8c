"""`RemoteModel`: in a process for HTTP, what stands for the model whose engine runs in another one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from ..chat.text_model import TextModel
from ..checkpoint import Checkpoint
from ..engine.request import Request, RequestState, Response, TokenEvent, TokenLogprobs, check_prompt
from ..engine.sequence import Sequence as OneText
from ..engine.sequence import Status
from ..engine.stats import EngineStats
from ..errors import DeviceError, Error
from ..generate import GenerationResponse, HowToSubmit, TextEngine, TextStreams
from ..sampling import DEFAULTS, MAX_N, SamplingParams
from .errors import ApiError
from .link import Head, Link, error_of, pack

ENGINE_GONE = "the process with the engine has ended"
ANSWERED_WITHIN_S = 5.0
"""Seconds in which the engine's process says what it does: it does so while the device works."""
NO_FIGURES: dict[str, Any] = {each.name: 0 for each in dataclasses.fields(EngineStats) if each.name != "failure"}
"""Fields of `EngineStats` that are numbers."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a process for HTTP has to know of the model besides its file."""

    path: str
    tokenizer: str | None
    context: int
    capacity: int
    """Tokens that a sequence can have: the context, or what all pages hold."""
    max_sequences: int
    kv_tokens: int
    device: str
    vocab_size: int


def params_as_json(params: SamplingParams) -> str:
    """Those values of the settings that the engine reads and that are not the default's."""
    found = {name: value for name in _NAMES if (value := getattr(params, name)) != getattr(DEFAULTS, name)}
    if params.stop_token_ids:
        found["stop_token_ids"] = list(params.stop_token_ids)
    return json.dumps(found)


def params_of(text: str) -> SamplingParams:
    """What `params_as_json` was given, without stop strings."""
    found: dict[str, Any] = json.loads(text)
    if (bias := found.get("logit_bias")) is not None:
        found["logit_bias"] = {int(token): value for token, value in bias.items()}
    return SamplingParams(**found)


_NAMES = [each.name for each in dataclasses.fields(SamplingParams) if each.name not in ("stop", "stop_token_ids")]


class RemoteState(RequestState):
    """A request to the engine of another process."""

    __slots__ = ("number",)
    number: int
    """Its texts are numbers from `number` · MAX_N on."""


class RemoteEngine:
    """What `TextEngine` and `Request` need of an engine. Requests are read on one event loop, which calls `receive`."""

    def __init__(self, link: Link, loop: asyncio.AbstractEventLoop) -> None:
        self._link, self._loop = link, loop
        self._thread = threading.get_ident()
        self._numbers, self._asks = itertools.count(), itertools.count()
        self._requests: dict[int, RemoteState] = {}  # those that have not ended
        self._cancelled: deque[RemoteState] = deque()
        self._asked: dict[int, Future[Head]] = {}
        self._stats = EngineStats(**NO_FIGURES)
        self.facts: Facts | None = None
        """Of the model that the engine has now."""
        self.failure: BaseException | None = None
        """Why the engine refuses all requests."""

    # For a service

    def stats(self) -> EngineStats:
        """What the engine did when `refresh` asked."""
        return dataclasses.replace(self._stats, failure=self.failure)

    async def refresh(self) -> None:
        """Ask for `stats`. Raises `ApiError` 503 when the engine's process does not answer."""
        if (stats := (await self._answer({"do": "stats"}))["stats"]) is not None:
            self._stats = EngineStats(**stats)

    async def figures(self) -> list[str]:
        """What each process has counted, in Prometheus' text format. Raises as `refresh`."""
        texts: list[str] = (await self._answer({"do": "figures"}))["texts"]
        return texts

    async def _answer(self, head: Head) -> Head:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._ask(head)), ANSWERED_WITHIN_S)
        except (asyncio.TimeoutError, DeviceError):
            why = ENGINE_GONE if self._link.closed else "the process with the engine does not answer"
            raise ApiError(why, 503, code="unhealthy", retry_after=5) from None

    def enter(self) -> None:
        """Its process runs the engine."""

    def leave(self) -> None:
        """It goes on for others."""

    def cancel(self, request_id: str) -> bool:
        """End a request. False if there is none of this id."""
        state = next((each for each in tuple(self._requests.values()) if each.id == request_id), None)
        if state is not None:
            self.cancel_state(state)
        return state is not None

    def ask(self, head: Head, tail: Sequence[int] = ()) -> Head:
        """The answer of the engine's process. Raises what it raises. Not for the event loop, which reads the answer."""
        assert threading.get_ident() != self._thread, "the event loop would wait for itself"
        return self._ask(head, tail).result()

    def check_constraint(self, params: SamplingParams) -> None:
        """Raise `Error` for a schema, an expression or a grammar that cannot be followed. As `ask`."""
        self.ask({"do": "check", "params": params_as_json(params)})

    def _ask(self, head: Head, tail: Sequence[int] = ()) -> Future[Head]:
        number, future = next(self._asks), Future[Head]()
        self._asked[number] = future
        future.add_done_callback(lambda _: self._asked.pop(number, None))
        self._link.send(pack({**head, "ask": number}, tail))
        if self._link.closed:
            _fail(future, DeviceError(ENGINE_GONE))
        return future

    # For requests

    def submit(
        self, ids: Iterable[int], params: SamplingParams, ends: frozenset[int], streams: TextStreams, how: HowToSubmit
    ) -> Request[GenerationResponse]:
        """Like `Engine.submit`. Waits for the other process where it has to compile a grammar."""
        if (facts := self.facts) is None or self._link.closed:
            raise DeviceError(ENGINE_GONE)
        if self.failure is not None:
            raise self.failure
        prompt = check_prompt(ids, facts.vocab_size, facts.context, facts.capacity)
        number = next(self._numbers)
        state = RemoteState(how.get("request_id") or f"request-{number}", streams, when_read=not params.stop)
        state.number, state.done = number, params.max_tokens == 0
        for index in range(params.n):
            state.sequences.append(OneText((), params, 1, order=(0, number, index), index=index))
            state.sequences[-1].prompt_tokens = len(prompt)
        if state.done:
            if params.is_constrained:
                self.check_constraint(params)
            return Request(self, state)
        state.live = params.n
        self._requests[number] = state
        head: Head = {"do": "submit", "id": number, "params": params_as_json(params), "ends": list(ends)}
        head |= {name: value for name in ("priority", "salt", "reuse_prefix") if (value := how.get(name)) is not None}
        head["stops"] = bool(params.stop)
        try:
            if params.is_constrained:
                self.ask(head, prompt)
            else:
                self._link.send(pack(head, prompt))
        except BaseException:
            self._requests.pop(number, None)
            raise
        return Request(self, state)

    def wait(self, state: RequestState) -> None:
        raise Error("requests are read on the event loop")

    async def wait_async(self, state: RequestState) -> None:
        """Return when the request has something to read."""
        if not state.ready:
            future = self._loop.create_future()
            state.waiter = self._loop, future
            await future

    async def pause(self, state: RequestState, future: asyncio.Future[None]) -> None:
        """Return when a future of the loop is set, or the request has ended."""
        if state.done:
            return
        state.waiter, state.pausing = (self._loop, future), True
        try:
            await future
        finally:
            state.waiter, state.pausing = None, False

    def cancel_state(self, state: RequestState) -> None:
        """End a request. Takes no lock, from any thread."""
        assert isinstance(state, RemoteState)
        if not (state.done or state.cancelled):
            state.cancelled = True
            self._cancelled.append(state)
            with contextlib.suppress(RuntimeError):  # the loop is closed: so is the link
                self._loop.call_soon_threadsafe(self._send_cancelled)

    def _send_cancelled(self) -> None:
        while self._cancelled:
            state = self._cancelled.popleft()
            if not state.done:
                self._link.send(pack({"do": "cancel", "id": state.number}))
                self._end(state, None)

    # What the other process sends

    def receive(self, head: Head, tail: Sequence[int]) -> None:
        """Hand out what one step of the engine has given, or an answer."""
        if (failure := head.get("failure")) is not None:
            self.failure = error_of(failure)
        if "answer" in head:
            self._take_answer(head)
            return
        for number, cached, admitted_at in head.get("begun", ()):
            if (state := self._requests.get(number)) is not None:
                state.sequences[0].cached_tokens, state.sequences[0].admitted_at = cached, admitted_at
        requests, now, touched = self._requests, time.perf_counter(), dict[RemoteState, None]()
        numbers = iter(tail)
        for text, token in zip(numbers, numbers, strict=True):
            state = requests.get(text // MAX_N)
            if state is None:
                continue
            if state.process is None:
                state.events.append((token, text % MAX_N, now))
                touched[state] = None
            else:
                self._deliver(state, text % MAX_N, token)
        for text, token, reason, stop, logprobs in head.get("events", ()):
            if (state := requests.get(text // MAX_N)) is not None:
                self._deliver(state, text % MAX_N, token, reason, stop, logprobs)
                touched[state] = None
        for state in touched:
            _wake(state)
        for number, error in head.get("errors", ()):
            if (state := requests.get(number)) is not None:
                self._end(state, error_of(error))

    def _take_answer(self, head: Head) -> None:
        future = self._asked.pop(head["answer"], None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if "error" in head:
            future.set_exception(error_of(head["error"]))
        else:
            future.set_result(head)

    def _deliver(
        self, state: RemoteState, index: int, token: int, reason: Any = None, stop: Any = None, logprobs: Any = None
    ) -> None:
        """Append a token that is more than a number, or of which a stop string may be made. It may be the last one."""
        text, found = state.sequences[index], None if logprobs is None else logprobs_of(logprobs)
        if text.status is Status.FINISHED:
            return
        first = state.sequences[0]
        counts = first.prompt_tokens, first.cached_tokens
        event = TokenEvent(token, index, reason, stop, found, *counts, time.perf_counter())
        try:
            response: Response | None = event if state.process is None else state.process(event)
        except Exception as error:
            self._link.send(pack({"do": "cancel", "id": state.number}))
            self._end(state, error)
            return
        assert response is not None
        state.events.append(response)
        if response.finish_reason is not None:
            text.status = Status.FINISHED
            state.live -= 1
            if reason is None:  # the engine does not know
                self._link.send(pack({"do": "cancel", "id": state.number, "index": index} if state.live else
                                     {"do": "cancel", "id": state.number}))  # fmt: skip
            if not state.live:
                self._end(state, None)
        _wake(state)

    def _end(self, state: RemoteState, error: BaseException | None) -> None:
        self._requests.pop(state.number, None)
        state.error, state.done = error, True
        _wake(state)

    def fail(self, error: BaseException) -> None:
        """The engine's process has ended: so do all requests."""
        self.failure = error
        for state in tuple(self._requests.values()):
            self._end(state, error)
        for future in tuple(self._asked.values()):
            _fail(future, error)


def _fail(future: Future[Head], error: BaseException) -> None:
    """End a question whose answer does not come. From any thread: another one may do so at the same time."""
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)


def _wake(state: RequestState) -> None:
    """Wake the reader of a request, unless it wants to be woken at the end only."""
    waiter = state.waiter
    if isinstance(waiter, tuple) and (state.done or not state.pausing):
        state.waiter = None
        if not waiter[1].done():
            waiter[1].set_result(None)


def logprobs_as_json(found: TokenLogprobs | None) -> list[Any] | None:
    return None if found is None else [found.logprob, found.top]


def logprobs_of(found: list[Any]) -> TokenLogprobs:
    return TokenLogprobs(found[0], [(token, logprob) for token, logprob in found[1]])


class RemoteModel(TextModel):
    """A model whose file is open here for its tokenizer and templates, and whose engine is in another process."""

    def __init__(self, checkpoint: Checkpoint, facts: Facts, engine: RemoteEngine) -> None:
        super().__init__(checkpoint)
        self._facts, self._engine = facts, engine
        self.context, self.max_sequences, self.device = facts.context, facts.max_sequences, facts.device

    @property
    def backend(self) -> RemoteEngine:
        return self._engine

    @property
    def kv_tokens(self) -> int:
        return self._facts.kv_tokens

    def engine(self) -> TextEngine:
        return TextEngine(self._engine, self.submit)

    def _submit_tokens(
        self, ids: Iterable[int], settings: SamplingParams, ends: frozenset[int], streams: TextStreams, how: HowToSubmit
    ) -> Request[GenerationResponse]:
        return self._engine.submit(ids, settings, ends, streams, how)

    def prompt_logprobs(self, ids: Sequence[int], top: int) -> list[TokenLogprobs | None]:
        found = self._engine.ask({"do": "logprobs", "top": top}, ids)["logprobs"]
        return [None if each is None else logprobs_of(each) for each in found]

    def check_constraint(self, settings: SamplingParams) -> None:
        self._engine.check_constraint(settings)
