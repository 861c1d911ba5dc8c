"""`ForcedEngine`: an engine whose answers are tokens that a test chooses, and `post`: a request to an application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.types import Message

from numballama.engine.request import Request, RequestState, TokenEvent
from numballama.engine.stats import EngineStats
from numballama.generate import GenerationResponse, TextStreams
from numballama.model import Model
from numballama.sampling import SamplingParams
from tests.helpers.http_server import Answered


class ForcedEngine:
    """Takes the place of a model's `TextEngine`. The tokens become text as they do in a model.

    `answers` are the tokens of each text of the next request. A text ends at the first end-of-sequence token, or after
    the last token, as by `max_tokens`. `sizes` are the numbers of tokens that its reader finds at a time; the last one
    is repeated.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._stats = model, model.token_engine.stats()
        self.answers: Sequence[Sequence[int]] = []
        self.sizes: Sequence[int] = [1]
        self._left: dict[RequestState, tuple[Iterator[GenerationResponse], Iterator[int]]] = {}

    def submit(
        self,
        prompt: Iterable[int],
        params: SamplingParams,
        *,
        priority: int,
        request_id: str,
        salt: str | None,
        strip_leading_space: bool,
        shown_tokens: Collection[int],
    ) -> Request[GenerationResponse]:
        assert len(self.answers) == params.n
        tokenizer, count = self._model.require_tokenizer(), len(list(prompt))
        streams = TextStreams(lambda: tokenizer.decoder(strip_leading_space, shown_tokens), params.stop, params.n)
        state = RequestState(request_id, None)
        self._left[state] = self._responses(streams, self.answers, count), self._sizes()
        return Request(self, state)

    def _sizes(self) -> Iterator[int]:
        yield from self.sizes
        while True:
            yield self.sizes[-1]

    def _responses(
        self, streams: TextStreams, answers: Sequence[Sequence[int]], count: int
    ) -> Iterator[GenerationResponse]:
        """A token of each text that has not ended, and again."""
        ends = self._model.require_tokenizer().eog_ids
        left = set(range(len(answers)))
        for place in range(max(map(len, answers))):
            for index in sorted(left):
                token = answers[index][place]
                is_end = token in ends
                reason: Any = "stop" if is_end else "length" if place == len(answers[index]) - 1 else None
                response = streams(TokenEvent(token, index, reason, token if is_end else None, None, count, 0))
                if response.finish_reason is not None:
                    left.discard(index)
                yield response

    async def wait_async(self, state: RequestState) -> None:
        """Give the reader the next responses."""
        responses, sizes = self._left[state]
        for _, response in zip(range(next(sizes)), responses, strict=False):
            state.events.append(response)
        state.done = not state.events

    def wait(self, state: RequestState) -> None:
        raise AssertionError("the server awaits")

    def cancel_state(self, state: RequestState) -> None:
        state.cancelled = not state.done
        self._left.pop(state, None)

    def stats(self) -> EngineStats:
        return self._stats

    def __enter__(self) -> ForcedEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def post(app: Starlette, path: str, body: Any) -> Answered:
    """What an application answers to a request of a client that stays. Without a server, and in this thread."""

    async def exchange() -> Answered:
        received = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        sent: list[Message] = []

        async def receive() -> Message:
            if not received:
                await asyncio.Event().wait()  # for ever
            return received.pop()

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await app(scope, receive, send)
        names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answered(sent[0]["status"], names, b"".join(message["body"] for message in sent[1:]))

    return asyncio.run(exchange())
