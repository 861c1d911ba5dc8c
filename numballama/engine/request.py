"""`Request`: the caller's handle on one submitted prompt. `TokenEvent`: one token of it."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, Protocol, TypeVar

from ..errors import ContextError, Error
from ..sampling import Sampled
from .sequence import Sequence

if TYPE_CHECKING:
    import asyncio
    from _thread import LockType

    Waiter = LockType | tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]

FinishReason = Literal["stop", "length"]


class TokenLogprobs(NamedTuple):
    """The log probability of a token, and the likeliest tokens in its place."""

    logprob: float
    top: list[tuple[int, float]]
    """(token, log probability), the likeliest first."""

    @classmethod
    def of(cls, sampled: Sampled, row: int) -> TokenLogprobs:
        """Those of a row of logits."""
        ids, logprobs = sampled.top_ids[row].tolist(), sampled.top_logprobs[row].tolist()
        top = [(token, logprob) for token, logprob in zip(ids, logprobs, strict=True) if token >= 0]
        return cls(float(sampled.logprobs[row]), top)


def check_prompt(prompt: Iterable[int], vocab_size: int, context: int, capacity: int) -> list[int]:
    """The prompt as a list of int. Raises `Error`, or `ContextError` if it has more tokens than `capacity`."""
    try:
        if isinstance(prompt, str | bytes | bytearray | Mapping | Set):  # bytes are numbers, sets have no order
            raise TypeError
        ids = list(map(operator.index, prompt))
    except TypeError:
        raise Error(f"token ids must be a sequence of whole numbers, found {prompt!r:.200}") from None
    if not ids:
        raise Error("the prompt is empty: at least one token is needed to start from")
    if min(ids) < 0 or max(ids) >= vocab_size:
        index, token = next((n, t) for n, t in enumerate(ids) if not 0 <= t < vocab_size)
        raise Error(f"token {index} of the prompt is {token}; the vocabulary has 0 to {vocab_size - 1}")
    if len(ids) > capacity:
        raise too_long(len(ids), context, capacity)
    return ids


def too_long(tokens: int, context: int, capacity: int) -> ContextError:
    """The error for a prompt of `tokens` tokens where at most `capacity` fit."""
    limit = (
        f"the context {context:,}; shorten it, or compile with context="
        if capacity == context
        else f"all pages of the KV cache {capacity:,}; shorten it, or compile with kv_tokens="
    )
    return ContextError(f"the prompt has {tokens:,} tokens and {limit}")


@dataclass(slots=True)
class TokenEvent:
    """One generated token."""

    token: int
    index: int
    """Which of the request's `n` sequences it continues."""
    finish_reason: FinishReason | None
    """None except for a sequence's last token. "stop": it is one of the stop tokens, or the grammar ends with it.
    "length": `max_tokens` or the end of the context was reached."""
    stop_reason: int | str | None
    """With "stop": the stop token; None at the end of the grammar. With "length": "context" if the context is full,
    otherwise None."""
    logprobs: TokenLogprobs | None
    """None unless the request's params ask for log probabilities."""
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were in the KV cache already."""
    time: float = 0.0
    """When it was handed out, on the clock of `time.perf_counter`."""


PlainToken = tuple[int, int, float]
"""(token, index, time) of a `TokenEvent` that says nothing else: most are made when they are read, if at all."""


class Response(Protocol):
    """What a request yields: a `TokenEvent`, or what its `process` makes of it."""

    @property
    def finish_reason(self) -> str | None:
        """None, or why this was the last response of its sequence."""


R = TypeVar("R", bound=Response)


class RequestState:
    """What the engine knows about a request. The engine refers to it, and not to the caller's `Request`."""

    __slots__ = ("cancelled", "context_bound", "done", "error", "events", "id", "live", "logprobs", "pausing",
                 "process", "read", "sequences", "waiter")  # fmt: skip

    def __init__(
        self,
        request_id: str,
        process: Callable[[TokenEvent], Response | None] | None,
        when_read: bool = False,
    ) -> None:
        self.id = request_id
        self.process = None if when_read else process
        """What makes a response of a token in the thread that steps."""
        self.read = process if when_read else None
        """What does so in the reader's."""
        self.sequences: list[Sequence] = []
        self.live = 0
        """Sequences that have not ended."""
        self.logprobs = False
        """Whether its events have log probabilities."""
        self.context_bound = False
        """Whether the context ends a sequence before `max_tokens` does."""
        self.events: deque[Response | PlainToken] = deque()
        """Responses that have not been read: what `process` returned, or what `read` will be called with."""
        self.cancelled = False
        self.done = False
        """Whether no further response comes. Set after the last one has been appended."""
        self.error: BaseException | None = None
        """Why the request failed."""
        self.waiter: Waiter | None = None
        """Whom to wake when there is something to read: a lock to release, or a future of an event loop."""
        self.pausing = False
        """Whether to wake it only when the request has ended."""

    @property
    def ready(self) -> bool:
        """Whether its reader need not wait."""
        return bool(self.events) or self.done or self.cancelled

    def event(self, plain: PlainToken) -> TokenEvent:
        """The event of a plain token."""
        token, index, time = plain
        sequence = self.sequences[index]
        return TokenEvent(token, index, None, None, None, sequence.prompt_tokens, sequence.cached_tokens, time)


class Waiting(Protocol):
    """What a `Request` needs of its engine."""

    def wait(self, state: RequestState) -> None: ...

    async def wait_async(self, state: RequestState) -> None: ...

    async def pause(self, state: RequestState, future: asyncio.Future[None]) -> None: ...

    def cancel_state(self, state: RequestState) -> None: ...


class Request(Generic[R]):
    """A submitted prompt. Iterate over it, with `for` or `async for`, to read its responses as they come.

    Iteration ends with the request, and raises the error that ended it. It is cancelled when `cancel` is called, when
    an iteration ends early (`break`, an exception, a dropped iterator), and when the last reference to it is dropped.
    Responses are for one reader: two iterations share them.
    """

    def __init__(self, engine: Waiting, state: RequestState) -> None:
        self._engine, self._state = engine, state

    @property
    def id(self) -> str:
        return self._state.id

    @property
    def finished(self) -> bool:
        """Whether the engine has generated everything. Responses may be left to read."""
        return self._state.done

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in the KV cache when the request was admitted; 0 before that."""
        return self._state.sequences[0].cached_tokens if self._state.sequences else 0

    @property
    def admitted_at(self) -> float:
        """When its first sequence got a slot, on the clock of `time.monotonic`; 0 before that."""
        return self._state.sequences[0].admitted_at if self._state.sequences else 0.0

    @property
    def preemptions(self) -> int:
        """How often one of its sequences gave its pages to others and computed them again."""
        return sum(sequence.preemptions for sequence in self._state.sequences)

    def cancel(self) -> None:
        """End the request at the engine's next step. Nothing more can be read. From any thread, any number of times."""
        self._engine.cancel_state(self._state)

    def _is_read(self) -> bool:
        """Whether nothing is left to read. Raises the error that ended the request, after its last response."""
        state = self._state
        done = state.done  # read before the responses: the last of them is there when it is set
        if state.cancelled:
            return True
        if state.events or not done:
            return False
        if state.error is not None:
            raise state.error
        return True

    @property
    def read(self) -> Callable[[TokenEvent], Response | None] | None:
        """What makes the responses of what `unread` yields; None if these are responses."""
        return self._state.read

    def _made(self, found: Response | PlainToken) -> R:
        """The response of what the engine has appended."""
        state = self._state
        if type(found) is tuple:
            found = state.event(found)
        return found if state.read is None else state.read(found)  # type: ignore[return-value,arg-type]

    def __iter__(self) -> Generator[R, None, None]:
        state = self._state
        try:
            while not self._is_read():
                if state.events:
                    yield self._made(state.events.popleft())
                else:
                    self._engine.wait(state)
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[R]:
        state = self._state
        try:
            while not self._is_read():
                if state.events:
                    yield self._made(state.events.popleft())
                else:
                    await self._engine.wait_async(state)
        finally:
            self.cancel()

    async def batches(self) -> AsyncGenerator[list[R], None]:
        """Like `async for`, but yields all responses that are there at a time, at least one.

        A reader that is slower than the engine then catches up.
        """
        try:
            while found := await self.unread():
                yield [self._made(each) for each in found]
        finally:
            self.cancel()

    async def unread(self) -> list[Response | PlainToken]:
        """What is there of what `read` would be called with, at least one; [] at the end. Raises as an iteration does.

        For a reader that makes something else of it. It has to `cancel` the request itself.
        """
        state = self._state
        while not self._is_read():
            if events := state.events:
                return list(map(deque.popleft, repeat(events, len(events))))  # the engine may append meanwhile
            await self._engine.wait_async(state)
        return []

    async def pause(self, future: asyncio.Future[None]) -> None:
        """Wait until a future of the running loop is set, which the engine does when the request has ended."""
        await self._engine.pause(self._state, future)

    def __del__(self) -> None:
        self.cancel()  # takes no lock, so it is safe wherever the garbage collector runs
        if self._state.done:
            self._state.sequences = []  # they refer to it: without the cycle both are freed now
