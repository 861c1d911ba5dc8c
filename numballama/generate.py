"""Text from tokens: what the engine's requests yield to a reader, and stop strings."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Protocol, TypedDict

from .engine.request import FinishReason, PlainToken, Request, Response, TokenEvent, TokenLogprobs
from .engine.stats import EngineStats
from .errors import Error
from .sampling import SamplingParams
from .tokenizers.base import Decoder
from .visualize.stream import display_stream


@dataclass(frozen=True)
class GenerationResponse:
    """One generated token, and the text that became final with it. `str()` returns the text."""

    text: str
    """Whole characters only, and never a part of a stop string. "" while a character or stop string is incomplete."""
    token: int
    finish_reason: FinishReason | None = None
    """None except in the last response. "stop": an end-of-sequence token or a stop string was generated, or the grammar
    ends here. "length": `max_tokens` or the end of the context was reached."""
    stop_reason: str | int | None = None
    """With "stop": the stop string, the id of the token that ended the text, or None if the grammar did. With "length":
    "context" if the context is full, otherwise None."""
    logprobs: TokenLogprobs | None = None
    """Log probability of the token, and the likeliest in its place. None unless `SamplingParams.logprobs` asks."""
    prompt_tokens: int = 0
    """Tokens of the prompt."""
    cached_tokens: int = 0
    """Tokens of the prompt that were in the KV cache already: whole pages of it."""
    tokens_per_second: float = 0.0
    """Speed of the tokens after the first, without the prompt. 0.0 on the first."""
    index: int = 0
    """Which of the `n` texts of the request this token continues."""

    def __str__(self) -> str:
        return self.text


class ResponseStream(Generator[GenerationResponse, None, None]):
    """What `stream` returns: iterate over it to read a `GenerationResponse` for each token.

    As the last expression of a notebook's cell it shows its text there while it is generated. That reads it.
    """

    def __init__(self, responses: Generator[GenerationResponse, None, None], prompt: str = "") -> None:
        self._responses, self._prompt = responses, prompt

    def send(self, value: None) -> GenerationResponse:
        """The next response."""
        return next(self._responses)

    def throw(self, *error: Any) -> GenerationResponse:
        """Raise an error where the stream waits, as in any generator."""
        return self._responses.throw(*error)

    def close(self) -> None:
        """Cancel the request."""
        self._responses.close()

    def __repr__(self) -> str:
        return "<stream of responses: iterate over it, or let a notebook's cell show it>"

    def _ipython_display_(self) -> None:
        display_stream(self, self._prompt)


@dataclass(slots=True)
class TextPart:
    """Several tokens of one text in a row, in place of a `GenerationResponse` for each."""

    index: int
    texts: list[str] = field(default_factory=list)
    """What each token adds to the text."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """As in `GenerationResponse`, of the last token."""

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, response: GenerationResponse) -> None:
        self.texts.append(response.text)
        self.tokens.append(response.token)
        self.logprobs.append(response.logprobs)
        self.finish_reason, self.stop_reason = response.finish_reason, response.stop_reason


class TextStream:
    """Makes a `GenerationResponse` of each token of one sequence. A stop string ends it, after `min_tokens` tokens."""

    def __init__(self, decoder: Decoder, stop: Iterable[str], min_tokens: int = 0) -> None:
        self._decoder, self._stops, self._min_tokens = decoder, StopStringFilter(stop), min_tokens
        self._started, self._count = 0.0, 0

    def __call__(self, event: TokenEvent) -> GenerationResponse:
        now = event.time or time.perf_counter()
        self._started = self._started or now
        stops, text, finish_reason, stop_reason = self._stops, "", event.finish_reason, event.stop_reason
        if finish_reason != "stop" or stop_reason is None:  # a stop token adds nothing, the last one of a grammar does
            may_end = self._count >= self._min_tokens
            text = stops.push(self._decoder.push(event.token), self._decoder.hidden(event.token), may_end)
            if stops.found is not None:
                finish_reason, stop_reason = "stop", stops.found
        if finish_reason is not None and stops.found is None:
            text += stops.push(self._decoder.flush())
            text += stops.flush()
            if stops.found is not None:  # it has a U+FFFD, which an incomplete character has become
                finish_reason, stop_reason = "stop", stops.found
        elapsed = now - self._started
        speed = self._count / elapsed if elapsed > 0 else 0.0  # tokens that a grammar forces come together
        self._count += 1
        return GenerationResponse(
            text, event.token, finish_reason, stop_reason, event.logprobs, event.prompt_tokens, event.cached_tokens,
            speed, event.index,
        )  # fmt: skip

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """What each of several tokens adds to a text that goes on, and for which there are no stop strings."""
        return self._decoder.push_all(tokens)


class TextStreams:
    """A `TextStream` for each sequence of a request."""

    def __init__(self, decoder: Callable[[], Decoder], stop: Sequence[str], n: int, min_tokens: int = 0) -> None:
        self.n = n
        self._streams = [TextStream(decoder(), stop, min_tokens) for _ in range(n)]

    def __call__(self, event: TokenEvent) -> GenerationResponse:
        return self._streams[event.index](event)

    def texts(self, index: int, tokens: Sequence[int]) -> list[str]:
        """As `TextStream.texts`."""
        return self._streams[index].texts(tokens)


def text_parts(request: Request[GenerationResponse], found: Sequence[Response | PlainToken]) -> list[TextPart]:
    """What `request.unread` has yielded, as a part for each text. It costs less than a response for each token."""
    streams = request.read
    if isinstance(streams, TextStreams) and streams.n == 1:
        first: Sequence[Any] = found if type(found[-1]) is tuple else found[:-1]
        if set(map(type, first)) == {tuple}:  # nearly always: plain tokens, and at most one that ends the text
            tokens: list[int] = list(map(itemgetter(0), first))
            part = TextPart(0, streams.texts(0, tokens), tokens, [None] * len(tokens))
            if first is not found:
                part.add(_response_of(streams, found[-1]))
            return [part]
    return _mixed_parts(streams, found)


def _mixed_parts(streams: object, found: Sequence[Response | PlainToken]) -> list[TextPart]:
    """Parts of several texts, or of tokens of both kinds in any order."""
    parts: dict[int, TextPart] = {}
    plain: dict[int, list[int]] = {}

    def add_plain(index: int, tokens: list[int]) -> None:
        assert isinstance(streams, TextStreams)
        part = parts.setdefault(index, TextPart(index))
        part.texts += streams.texts(index, tokens)
        part.tokens += tokens
        part.logprobs += [None] * len(tokens)

    for each in found:
        if type(each) is tuple:
            plain.setdefault(each[1], []).append(each[0])
            continue
        assert isinstance(each, TokenEvent | GenerationResponse)
        if each.index in plain:
            add_plain(each.index, plain.pop(each.index))
        parts.setdefault(each.index, TextPart(each.index)).add(_response_of(streams, each))
    for index, tokens in plain.items():
        add_plain(index, tokens)
    return list(parts.values())


def _response_of(streams: object, each: object) -> GenerationResponse:
    """The response that the engine's thread has made, or the reader makes."""
    response = streams(each) if isinstance(each, TokenEvent) and isinstance(streams, TextStreams) else each
    assert isinstance(response, GenerationResponse)
    return response


def prompts_with_params(
    prompt: str | Sequence[str | None] | None, params: SamplingParams | Sequence[SamplingParams] | None
) -> tuple[Sequence[str | None], Sequence[SamplingParams | None]]:
    """The prompts of a call, and the settings of each. Raises `Error` where they do not belong together."""
    if isinstance(prompt, str | None):
        if not isinstance(params, SamplingParams | None):
            raise Error(f"params must be SamplingParams for a single prompt, found {params!r:.200}")
        return [prompt], [params]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise Error(f"the prompt must be a string, None or a list of these, found {prompt!r:.200}")
    if not isinstance(params, Sequence):
        return prompt, [params] * len(prompt)
    if len(params) != len(prompt):
        raise Error(
            f"there are {len(prompt)} prompts and {len(params)} params: pass one params for each, or one for all"
        )
    return prompt, params


class HowToSubmit(TypedDict, total=False):
    """Keyword arguments of `submit` that go to the engine as they are."""

    priority: int
    request_id: str | None
    reuse_prefix: bool
    salt: str | None


class Submit(Protocol):
    """`Model.submit`."""

    def __call__(
        self,
        prompt: str | Iterable[int] | None,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        reuse_prefix: bool = True,
        salt: str | None = None,
        strip_leading_space: bool = False,
        shown_tokens: Collection[int] = (),
    ) -> Request[GenerationResponse]: ...


class TokenEngine(Protocol):
    """What `TextEngine` needs of an engine, `Engine` or what stands for one of another process."""

    def cancel(self, request_id: str) -> bool: ...

    def stats(self) -> EngineStats: ...

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class TextEngine:
    """A model's engine, for many requests at once. A thread of its own runs it inside `with model.engine() as engine:`.

    `submit(prompt, params, priority=0)` takes text or token ids, from any thread or event loop, and returns a
    `Request`: iterate over it, with `for` or `async for`, to read a `GenerationResponse` for each token; `cancel()`
    ends it. A lower `priority` comes first. `reuse_prefix`: take tokens at the beginning of the prompt from the KV
    cache, if a request with the same `salt` has computed them. `strip_leading_space`: after a prompt of ids
    comes a new text, an answer, so drop the space that the tokenizer's encoder prepends. `shown_tokens`: ids of control
    tokens that are text here, such as `<tool_call>`; usually they are not part of the text.
    """

    def __init__(self, engine: TokenEngine, submit: Submit) -> None:
        self._engine, self.submit = engine, submit

    def cancel(self, request_id: str) -> bool:
        """End a request at the next step, from any thread. False if there is none of this id."""
        return self._engine.cancel(request_id)

    def stats(self) -> EngineStats:
        """What the engine is doing now, and what it has done."""
        return self._engine.stats()

    def __enter__(self) -> TextEngine:
        self._engine.enter()
        return self

    def __exit__(self, *exc: object) -> None:
        self._engine.leave()


class StopStringFilter:
    """Holds back text that may be the beginning of a stop string.

    `push(text, hidden)` returns the text that is safe to show. `hidden` follows `text` and is never shown: what a
    control token is called, which a stop string may spell. `found` is None until a stop string is complete; the text
    before it is the end. One that is complete where it may not end the text is text. `flush()` returns the text that is
    still held back when generation ends for another reason.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._searches = [_Search(stop) for stop in stops if stop]
        self._held: list[tuple[str, bool]] = []
        """Characters that are held back, and whether they are shown."""
        self.found: str | None = None

    def push(self, text: str, hidden: str = "", may_end: bool = True) -> str:
        if not self._searches or self.found is not None:
            return "" if self.found is not None else text
        held, before = self._held, len(self._held)
        held += [(character, True) for character in text]
        held += [(character, False) for character in hidden]
        ends = [(search.read(text + hidden, may_end), search.stop) for search in self._searches]
        places = [(before + end - len(stop), stop) for end, stop in ends if end is not None]
        if places:
            place, self.found = min(places, key=lambda found: found[0])
            self._held = []
            return self._shown(held[:place])
        safe = len(held) - max(search.matched for search in self._searches)
        self._held = held[safe:]
        return self._shown(held[:safe])

    def flush(self) -> str:
        held, self._held = self._held, []
        return self._shown(held)

    @staticmethod
    def _shown(characters: Iterable[tuple[str, bool]]) -> str:
        return "".join(character for character, shown in characters if shown)


class _Search:
    """Knuth, Morris and Pratt's search for one string in a stream: constant time a character, however long it is."""

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        """`matched`: length of the longest end of the text that is a beginning of `stop`."""
        self._shorter = [0]  # of `stop`'s first n + 1 characters: the longest proper end that is also a beginning
        for character in stop[1:]:
            self._shorter.append(self._next(self._shorter[-1], character))

    def _next(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.stop[matched] == character)

    def read(self, text: str, may_end: bool = True) -> int | None:
        """Continue with `text`. Returns how much of it ends the first occurrence; None if there is none yet, or if it
        may not end here.
        """
        for index, character in enumerate(text):
            self.matched = self._next(self.matched, character)
            if self.matched == len(self.stop):
                if may_end:
                    return index + 1
                self.matched = self._shorter[-1]  # what may begin another occurrence
        return None
