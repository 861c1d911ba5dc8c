"""`Generation`: what the engine generates for one HTTP request, counted and timed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..engine.request import FinishReason, PlainToken, Request, Response, TokenLogprobs, too_long
from ..generate import GenerationResponse, TextPart, text_parts
from ..sampling import MAX_N, SamplingParams
from ..structured.constraint import GrammarError
from .errors import ApiError, engine_failed, failed, refused
from .service import DRAINING, Service, Ticket

SHORT_PROMPTS = 4096
"""Tokens of a request's prompts, times `n`, that are submitted on the event loop at most: the engine checks and copies
them, and holds its lock for a few instructions only."""


@dataclass(slots=True)
class _Choice:
    """Times and counts of one text."""

    tokens: int = 0
    first: float = 0.0
    """When its first token came, on the clock of `time.monotonic`."""
    latest: float = 0.0
    """When its latest token came."""
    ended: bool = False


class Generation:
    """n texts for each of several prompts. `pieces` yields them as they come; `cancel` ends all.

    `prompt_tokens`, `cached_tokens` and `generated_tokens` are sums over all prompts, so far.
    """

    def __init__(self, service: Service, prompts: Sequence[Sequence[int]], n: int, arrived: float) -> None:
        self._service, self._arrived = service, arrived
        self._lengths, self._n = [len(prompt) for prompt in prompts], n
        self._requests: list[Request[GenerationResponse]] = []
        self._fields: Mapping[str, str] = {}
        self._ticket: Ticket | None = None
        self._choices = [_Choice() for _ in range(n * len(prompts))]
        self._begun: set[int] = set()  # prompts whose first token has come
        self._finished = 0  # texts that have ended
        self._was_ended = False  # by `end`
        self._cached = [0] * len(prompts)  # tokens of each prompt that were in the KV cache
        self.prompt_tokens = sum(self._lengths)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached)

    @property
    def generated_tokens(self) -> int:
        return sum(choice.tokens for choice in self._choices)

    @property
    def choices(self) -> int:
        """Number of texts."""
        return len(self._choices)

    @property
    def all_ended(self) -> bool:
        """Whether the last piece of every text has been yielded: `usage` does not change any more."""
        return self._finished == len(self._choices)

    @classmethod
    async def start(
        cls,
        service: Service,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        request_id: str,
        arrived: float,
        priority: int = 0,
        salt: str | None = None,
        strip_leading_space: bool = False,
        shown_tokens: Collection[int] = (),
        param: str | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> Generation:
        """Submit the prompts.

        `arrived`: when the HTTP request came, on the clock of `time.monotonic`. `param`: the request's field that the
        prompts are from. `fields`: field of `SamplingParams` → the request's. Raises `ApiError`: 400 for what the
        engine refuses, 429 when the queue is full.
        """
        self = cls(service, prompts, params.n, arrived)
        self._fields = fields or {}
        engine = service.engine
        context, longest = service.model.context, max(self._lengths)
        capacity = min(context, service.model.kv_tokens)
        if longest > capacity:  # before the queue, which may be full: waiting does not help
            raise refused(too_long(longest, context, capacity), param)
        most = max(service.admission.token_limit, MAX_N * context)
        if params.n * self.prompt_tokens > most:  # each text has a copy of its prompt
            message = f"n times the tokens of all prompts is {params.n * self.prompt_tokens:,}; at most {most:,}"
            raise ApiError(message, param=param, code="invalid_value")
        self._ticket = service.enter(len(self._choices), self.prompt_tokens)
        service.running.add(self)

        def submit(number: int) -> Request[GenerationResponse]:
            return engine.submit(
                prompts[number],
                params,
                priority=priority,
                request_id=f"{request_id}-{number}",
                salt=salt,
                strip_leading_space=strip_leading_space,
                shown_tokens=shown_tokens,
            )

        run = service.run_slowly if params.is_constrained else service.run
        is_short = not params.is_constrained and params.n * self.prompt_tokens <= SHORT_PROMPTS
        try:
            for number in range(len(prompts)):
                self._requests.append(submit(number) if is_short else await run(submit, number))
        except BaseException as error:
            self.cancel()
            if not isinstance(error, Exception) or isinstance(error, ApiError):
                raise
            if self._engine_failed:
                raise engine_failed(error) from None
            answer = refused(error, param, fields)
            if answer.status >= 500:
                service.report_failure(error)
            raise answer from None
        return self

    def report_failure(self, error: BaseException) -> None:
        """Log that it failed after it was accepted."""
        self._service.report_failure(error)

    @property
    def _engine_failed(self) -> bool:
        return self._service.failure is not None or not self._service.loaded

    def end(self) -> None:
        """Like `cancel`, and whoever reads `pieces` gets an error: the server is shutting down."""
        self._was_ended = True
        self.cancel()

    def cancel(self) -> None:
        """End what is still running, at the engine's next step, and give the place in the queue back."""
        self._service.running.discard(self)
        for request in self._requests:
            request.cancel()
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.leave()

    async def pieces(self) -> AsyncGenerator[list[TextPart], None]:
        """Yield what is known of the texts as soon as it is: at most one piece of each at a time.

        Its index is that of the prompt · n + that of the text.

        Ends when all texts have ended. Raises `ApiError`: 400 when a text cannot follow its grammar further,
        503 when the device fails for good or after `end`, 500 for other errors.
        """
        try:
            if len(self._requests) == 1:
                while responses := await self._requests[0].unread():
                    yield self._join(0, responses)
                    if not self.all_ended:
                        await self._service.pause(self._requests[0])
            else:
                async for number, responses in self._merged():
                    yield self._join(number, responses)
                    if not self.all_ended:
                        await self._service.pause()
            if self._was_ended and not self.all_ended:
                raise ApiError(DRAINING, 503, code="draining", retry_after=5)
            if left := [n for n, choice in enumerate(self._choices) if not choice.tokens]:  # max_tokens is 0
                yield [TextPart(choice, finish_reason="length") for choice in left]
        except ApiError:
            raise
        except GrammarError as error:
            raise refused(error, None, self._fields) from None
        except Exception as error:
            self._service.report_failure(error)
            raise (engine_failed if self._engine_failed else failed)(error) from error
        finally:
            if self._finished < len(self._choices) and any(not request.finished for request in self._requests):
                self._service.metrics.aborted.inc()
            self.cancel()

    async def _merged(self) -> AsyncGenerator[tuple[int, list[Response | PlainToken]], None]:
        """(prompt, responses) of all requests in the order in which they come."""
        found: asyncio.Queue[tuple[int, list[Response | PlainToken] | BaseException | None]] = asyncio.Queue()

        async def read(number: int) -> None:
            try:
                while responses := await self._requests[number].unread():
                    found.put_nowait((number, responses))
                found.put_nowait((number, None))
            except Exception as error:
                found.put_nowait((number, error))

        readers = [asyncio.ensure_future(read(number)) for number in range(len(self._requests))]
        left = len(readers)
        try:
            while left:
                number, responses = await found.get()
                if responses is None:
                    left -= 1
                elif isinstance(responses, BaseException):
                    raise responses
                else:
                    yield number, responses
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    def _join(self, number: int, found: list[Response | PlainToken]) -> list[TextPart]:
        """One piece for each text of a prompt, of what was read."""
        now = time.monotonic()
        if number not in self._begun:
            self._begin(number, now)
        pieces = text_parts(self._requests[number], found)
        for piece in pieces:
            piece.index += number * self._n
            self._count(piece, now)
        return pieces

    def _begin(self, number: int, now: float) -> None:
        """The first token of a prompt has come: its prompt no longer waits in the queue."""
        metrics, request = self._service.metrics, self._requests[number]
        self._begun.add(number)
        self._cached[number] = request.cached_tokens
        if self._ticket is not None:
            self._ticket.begun(self._lengths[number])
        metrics.prompt_tokens.observe(self._lengths[number])
        metrics.first_token.observe(now - self._arrived)
        metrics.queue.observe(max(request.admitted_at - self._arrived, 0))
        metrics.prefill.observe(max(now - request.admitted_at, 0))

    def _count(self, piece: TextPart, now: float) -> None:
        """Count a text's new tokens, and the times between them."""
        metrics, choice = self._service.metrics, self._choices[piece.index]
        count = len(piece.tokens)
        if not choice.tokens:
            choice.first = choice.latest = now
        if times := count if choice.tokens else count - 1:  # tokens that came together share the time
            metrics.inter_token.observe((now - choice.latest) / count, times)
        choice.tokens += count
        choice.latest = now
        if piece.finish_reason is not None:
            self._end_text(choice, piece.finish_reason, now)

    def _end_text(self, choice: _Choice, reason: FinishReason, now: float) -> None:
        """A text has ended."""
        metrics, choice.ended = self._service.metrics, True
        self._finished += 1
        metrics.success[reason].inc()
        metrics.generated_tokens.observe(choice.tokens)
        metrics.end_to_end.observe(now - self._arrived)
        metrics.decode.observe(now - choice.first)

    def complete(self) -> None:
        """The reader wants no more: texts that go on end here, as by a stop string."""
        now = time.monotonic()
        for choice in self._choices:
            if not choice.ended:
                self._end_text(choice, "stop", now)
        self.cancel()

    def usage(self) -> dict[str, int | dict[str, int]]:
        """Tokens, in OpenAI's shape. The token that ends a text is counted, as in vLLM."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class WholeText:
    """All pieces of one text together."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    stop_reason: str | int | None = None

    def add(self, piece: TextPart) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        if piece.finish_reason is not None:
            self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason


async def whole_texts(generation: Generation) -> list[WholeText]:
    """All texts of a generation, when they have ended."""
    texts = [WholeText() for _ in range(generation.choices)]
    async for pieces in generation.pieces():
        for piece in pieces:
            texts[piece.index].add(piece)
    return texts
