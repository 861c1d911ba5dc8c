"""/v1/completions: texts that continue prompts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.responses import Response

from ..engine.request import TokenLogprobs
from ..errors import Error
from ..generate import TextPart
from .call import Call, Chunks
from .errors import ApiError, refused
from .generation import Generation, whole_texts
from .http import JsonResponse, dumps, stream_of
from .logprobs import TextOffsets, completion_logprobs
from .params import sampling_params, token_limit
from .protocol import CompletionRequest

KIND = "text_completion"
DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class Echo:
    """The beginning of each choice when a request asks for its prompt: text, and log probabilities of its tokens."""

    def __init__(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
        self.texts, self.ids = texts, ids
        self.logprobs: list[list[TokenLogprobs | None]] = [[None] * len(prompt) for prompt in ids]


async def answer(call: Call, request: CompletionRequest) -> Response:
    """The answer to a request, whole or as a stream. Raises `ApiError`."""
    service, n = call.service, request.n or 1
    if request.best_of not in (None, n):
        raise ApiError(f"best_of must be n, {n}, found {request.best_of}", param="best_of", code="unsupported_value")
    limit_field, limit = token_limit(request)
    params = sampling_params(request, DEFAULT_MAX_TOKENS if limit is None else limit, request.logprobs, limit_field)
    prompts = await call.run_short(_encode, call, request)
    echo = await _echo(call, request, prompts) if request.echo else None
    generation = await call.generate(request, prompts, params, "prompt")
    try:
        name = f"cmpl-{call.key}"
        if request.stream:
            return call.stream(generation, _events(call, request, generation, echo, name, n))
        texts = await whole_texts(generation)
        choices = []
        for index, text in enumerate(texts):
            before = "" if echo is None else echo.texts[index // n]
            logprobs = None
            if request.logprobs is not None:
                offsets = TextOffsets(service.tokenizer, len(before))
                logprobs = _logprobs(call, text.tokens, text.logprobs, offsets, echo, index // n)
            choices.append(_choice(index, before + text.text, logprobs, text.finish_reason, text.stop_reason))
    finally:
        if not request.stream:
            generation.cancel()
    head = {"id": name, "object": KIND, "created": call.created, "model": service.name}
    return JsonResponse({**head, "choices": choices, "usage": generation.usage()})


def _encode(call: Call, request: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt."""
    tokenizer, prompt = call.service.tokenizer, request.prompt
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    try:
        found = []
        for one in [prompt] if isinstance(prompt, str) else prompt:
            if isinstance(one, str):
                ids = tokenizer.encode(one, bos=True, special=bool(request.special))
                if not one and tokenizer.bos_id is not None:
                    ids = [tokenizer.bos_id]
                found.append(ids)
            else:
                found.append(one)  # type: ignore[arg-type]
    except Error as error:
        raise refused(error, "prompt") from None
    return found


async def _echo(call: Call, request: CompletionRequest, prompts: list[list[int]]) -> Echo:
    """The prompts as text, with log probabilities if the request asks for them."""
    service, prompt = call.service, request.prompt
    model, tokenizer = service.model, service.tokenizer
    given = [prompt] if isinstance(prompt, str) else prompt
    try:
        texts = [
            one if isinstance(one, str) else await call.run(tokenizer.decode, ids)
            for one, ids in zip(given if isinstance(given[0], str | list) else [given], prompts, strict=True)
        ]
        echo = Echo(texts, prompts)
        if request.logprobs is None:
            return echo
        for index, ids in enumerate(prompts):
            size = 4 * len(ids) * model.config.vocab_size
            if size > service.settings.max_logits:
                most = service.settings.max_logits // (4 * model.config.vocab_size)
                raise ApiError(f"log probabilities of a prompt of {len(ids):,} tokens: at most {most:,}", param="echo")
            echo.logprobs[index] = await service.run_alone(model.prompt_logprobs, ids, request.logprobs)
    except Error as error:
        raise refused(error, "prompt") from None
    return echo


def _events(
    call: Call, request: CompletionRequest, generation: Generation, echo: Echo | None, name: str, n: int
) -> AsyncGenerator[bytes, None]:
    """The events of a stream."""
    options = request.stream_options
    with_usage = options is not None and bool(options.include_usage)
    chunks = Chunks(call, KIND, name, with_usage)
    offsets: list[TextOffsets] = []
    first = b""
    for index in range(generation.choices):
        text = "" if echo is None else echo.texts[index // n]
        offsets.append(TextOffsets(call.service.tokenizer, len(text)))
        if echo is not None:
            logprobs = None
            if request.logprobs is not None:
                logprobs = _logprobs(call, [], [], offsets[index], echo, index // n)
            first += chunks.write(dumps(_choice(index, text, logprobs)))

    def write(pieces: list[TextPart]) -> bytes:
        choices = [_streamed(call, request, piece, offsets[piece.index]) for piece in pieces]
        return b"".join(chunks.write(dumps(choice)) for choice in choices if choice is not None)

    def last() -> bytes:
        return chunks.end(generation.usage())

    return stream_of(first, generation.pieces(), write, lambda: generation.all_ended, last)


def _streamed(call: Call, request: CompletionRequest, piece: TextPart, offsets: TextOffsets) -> dict[str, Any] | None:
    """The choice of a chunk; None if there is nothing to say."""
    logprobs = None
    if request.logprobs is not None:
        logprobs = _logprobs(call, piece.tokens, piece.logprobs, offsets)
    elif not piece.text and piece.finish_reason is None:
        return None
    return _choice(piece.index, piece.text, logprobs, piece.finish_reason, piece.stop_reason)


def _choice(
    index: int,
    text: str,
    logprobs: dict[str, Any] | None,
    finish_reason: str | None = None,
    stop_reason: str | int | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


def _logprobs(
    call: Call,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    offsets: TextOffsets,
    echo: Echo | None = None,
    prompt: int = 0,
) -> dict[str, Any]:
    """Log probabilities of tokens of a choice's text, after those of the echoed prompt."""
    tokenizer = call.service.tokenizer
    found = completion_logprobs(tokenizer, tokens, logprobs, offsets)
    if echo is None:
        return found
    begin = TextOffsets(tokenizer, begins=True)
    before = completion_logprobs(tokenizer, echo.ids[prompt], echo.logprobs[prompt], begin)
    return {name: before[name] + found[name] for name in found}
