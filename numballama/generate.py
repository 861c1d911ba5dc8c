"""The generation loop: from token ids to one `GenerationResponse` per token."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .sampling import SamplerState
from .session import SharedSession
from .tokenizers.base import Decoder

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationResponse:
    """One generated token, and the text that became final with it. `str()` returns the text."""

    text: str
    """Whole characters only, and never a part of a stop string. "" while a character or stop string is incomplete."""
    token: int
    finish_reason: FinishReason | None = None
    """None except in the last response. "stop": an end-of-sequence token or a stop string was generated. "length":
    `max_tokens` or the end of the context was reached."""
    stop_reason: str | int | None = None
    """With "stop": the stop string, or the id of the token that ended the text. With "length": "context" if the context
    is full, otherwise None."""
    logprobs: None = None
    """Log probabilities. This version computes none."""
    prompt_tokens: int = 0
    """Tokens of the prompt."""
    cached_tokens: int = 0
    """Tokens of the prompt that were in the KV cache already."""
    tokens_per_second: float = 0.0
    """Speed of the tokens after the first, without the prompt. 0.0 on the first."""

    def __str__(self) -> str:
        return self.text


def generate_tokens(
    shared: SharedSession,
    ids: Sequence[int],
    sampler: SamplerState,
    decoder: Decoder,
    *,
    max_tokens: int | None = None,
    stop: Iterable[str] = (),
    stop_token_ids: Container[int] = (),
    reuse_prefix: bool = False,
) -> Iterator[GenerationResponse]:
    """Continue `ids`, until `max_tokens` (None: no limit), a stop string, a stop token or the end of the context.

    `reuse_prefix`: reuse the tokens at the beginning of `ids` that are in the KV cache, whichever stream computed them.
    Otherwise all are computed, and the result does not depend on earlier calls.
    """
    stream, history, started = object(), list(ids), 0.0
    stops = StopStringFilter(stop)
    if max_tokens == 0:
        return
    context = shared.session.context
    cached = acquire_session(shared, stream, history) if reuse_prefix else 0
    index = 0
    while True:
        token = next_token(shared, stream, history, sampler)
        now = time.perf_counter()
        started = started or now
        finish_reason: FinishReason | None = None
        stop_reason: str | int | None = None
        text = ""
        if token in stop_token_ids:
            finish_reason, stop_reason = "stop", token
        else:
            text = stops.push(decoder.push(token), decoder.hidden(token))
            if stops.found is not None:
                finish_reason, stop_reason = "stop", stops.found
            elif index + 1 == max_tokens:
                finish_reason = "length"
            elif len(history) == context:
                finish_reason, stop_reason = "length", "context"
        if finish_reason is not None and stops.found is None:
            text += stops.push(decoder.flush())
            text += stops.flush()
        yield GenerationResponse(
            text,
            token,
            finish_reason,
            stop_reason,
            prompt_tokens=len(ids),
            cached_tokens=cached,
            tokens_per_second=index / (now - started) if index else 0.0,
        )
        if finish_reason is not None:
            return
        history.append(token)
        index += 1


def acquire_session(shared: SharedSession, stream: object, history: Sequence[int]) -> int:
    """Give the session to `stream` and keep the cached prefix of `history`. Returns the number of reused tokens."""
    with shared.exclusive():
        session, shared.owner = shared.session, stream
        session.truncate(session.common_prefix_length(history))
        return len(session.tokens)


def next_token(shared: SharedSession, stream: object, history: Sequence[int], sampler: SamplerState) -> int:
    """The token after `history`. Computes what the cache lacks: the last token, or all after another stream."""
    with shared.exclusive():
        session = shared.session
        if shared.owner is not stream:
            shared.owner = stream
            session.truncate()
        known = len(session.tokens)
        token = (
            session.step(history[-1], sampler)
            if known == len(history) - 1 and known
            else session.prefill(history[known:], sampler)
        )
        assert token is not None
        return token


class StopStringFilter:
    """Holds back text that may be the beginning of a stop string.

    `push(text, hidden)` returns the text that is safe to show. `hidden` follows `text` and is never shown: what a
    control token is called, which a stop string may spell. `found` is None until a stop string is complete; the text
    before it is the end. `flush()` returns the text that is still held back when generation ends for another reason.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held: list[tuple[str, bool]] = []
        """Characters that are held back, and whether they are shown."""
        self.found: str | None = None

    def push(self, text: str, hidden: str = "") -> str:
        if not self._stops or self.found is not None:
            return "" if self.found is not None else text
        held = [*self._held, *((character, True) for character in text), *((character, False) for character in hidden)]
        text = "".join(character for character, _ in held)
        places = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if places:
            place, self.found = min(places, key=lambda found: found[0])
            self._held = []
            return self._shown(held[:place])
        safe = len(text) - max(self._partial(text, stop) for stop in self._stops)
        self._held = held[safe:]
        return self._shown(held[:safe])

    def flush(self) -> str:
        held, self._held = self._held, []
        return self._shown(held)

    @staticmethod
    def _shown(characters: Iterable[tuple[str, bool]]) -> str:
        return "".join(character for character, shown in characters if shown)

    @staticmethod
    def _partial(text: str, stop: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
