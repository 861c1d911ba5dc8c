"""`Call`: one HTTP request on its way to the engine."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from ..sampling import SamplingParams
from .errors import ApiError
from .generation import Generation
from .http import DONE, EventStream, dumps, event
from .params import restriction_fields
from .protocol import GenerationRequest
from .service import Service

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Call:
    """What is known of an HTTP request besides its body."""

    service: Service
    salt: str | None = None
    """Requests with another salt share no pages of the KV cache: one for each API key."""
    arrived: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=partial(secrets.token_hex, 16))
    """A part of the ids of its answers."""
    is_large: bool = False
    """Whether the body is so large that work on it takes long."""
    is_small: bool = False
    """Whether the body is so small that work on it is done at once."""

    async def run(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """As `Service.run`, or `run_slowly` for a large body: for work that grows with it."""
        run = self.service.run_slowly if self.is_large else self.service.run
        return await run(work, *arguments, **options)

    async def run_short(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """As `Service.run_short` for a small body, and as `run` for another one."""
        run = self.service.run_short if self.is_small else self.run
        return await run(work, *arguments, **options)

    async def generate(
        self,
        request: GenerationRequest,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        param: str,
        new_text: bool = False,
        shown_tokens: Collection[int] = (),
        fields: Mapping[str, str] | None = None,
    ) -> Generation:
        """Submit prompts. `param`: the field that they are from. `new_text`: an answer begins a text of its own, so it
        has no leading space, which many tokenizers give a first word.

        `shown_tokens` as for `TextEngine.submit`. `fields`: field of `SamplingParams` → the request's field for
        it, where that is not the usual one. Raises `ApiError`.
        """
        vocabulary = self.service.model.config.vocab_size
        if outside := [token for token in params.logit_bias or {} if token >= vocabulary]:
            message = f"logit_bias: token {outside[0]} is outside the vocabulary of {vocabulary:,} tokens"
            raise ApiError(message, param="logit_bias", code="invalid_value")
        salts = [salt for salt in (self.salt, request.cache_salt) if salt is not None]
        return await Generation.start(
            self.service,
            prompts,
            params,
            request_id=self.key,
            arrived=self.arrived,
            priority=request.priority or 0,
            salt="/".join(salts) if salts else None,
            strip_leading_space=new_text,
            shown_tokens=shown_tokens,
            param=param,
            fields={**restriction_fields(request), **(fields or {})},
        )

    def stream(
        self,
        generation: Generation,
        events: AsyncGenerator[bytes, None],
        on_error: Callable[[ApiError], bytes] | None = None,
    ) -> EventStream:
        """The answer that sends `events`. `generation` ends with it."""
        settings = self.service.settings
        return EventStream(
            events,
            generation.cancel,
            on_error or openai_error,
            max(settings.request_timeout_s - (time.monotonic() - self.arrived), 0),
            settings.keep_alive_s,
        )


def openai_error(error: ApiError) -> bytes:
    """The last events of a stream that fails."""
    return event({"error": error.body["error"]}) + DONE


class Chunks:
    """Writes the events of a stream of chunks. What all have in common is written once.

    A chunk has one choice, as OpenAI's: many clients read only the first. `kind` is their `object`, `name` their id.
    `with_usage`: they carry `usage: null`, and one after all others has figures and no choices.
    """

    def __init__(self, call: Call, kind: str, name: str, with_usage: bool) -> None:
        head = dumps({"id": name, "object": kind, "created": call.created, "model": call.service.name})
        self._before = b"data: " + head[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._with_usage = with_usage

    def write(self, choice: bytes) -> bytes:
        """The event of a choice, which is JSON."""
        return self._before + choice + self._after

    def end(self, usage: dict[str, Any]) -> bytes:
        """The last events."""
        return (self._before + b'],"usage":' + dumps(usage) + b"}\n\n" if self._with_usage else b"") + DONE
