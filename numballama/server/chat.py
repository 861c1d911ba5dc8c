"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import cache
from typing import Any

from starlette.responses import Response

from ..engine.request import TokenLogprobs
from . import chat_core
from .call import Call, Chunks
from .chat_core import ChatAnswers, ChatFinishReason, ChatPiece
from .content_tokens import Written
from .http import JsonResponse, dumps, stream_of
from .logprobs import chat_logprobs
from .protocol import ChatRequest
from .tools.events import CallArguments, CallStart, Content, Event, Reasoning

KIND, CHUNK_KIND = "chat.completion", "chat.completion.chunk"


async def answer(call: Call, request: ChatRequest) -> Response:
    """The answer to a request, whole or as a stream. Raises `ApiError`."""
    chat = await chat_core.start(call, request)
    name = f"chatcmpl-{call.key}"
    if request.stream:
        return call.stream(chat.generation, _events(call, request, chat, name))
    messages = await whole_messages(chat)
    choices = [
        {
            "index": index,
            "message": message.as_dict(),
            "logprobs": chat_logprobs(call.service.tokenizer, message.tokens, message.logprobs)
            if request.logprobs
            else None,
            "finish_reason": message.finish_reason,
            "stop_reason": message.stop_reason,
        }
        for index, message in enumerate(messages)
    ]
    head = {"id": name, "object": KIND, "created": call.created, "model": call.service.name}
    return JsonResponse({**head, "choices": choices, "usage": chat.usage()})


class WholeMessage:
    """All events of one answer together."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.content = self.reasoning = ""
        self.calls: list[dict[str, Any]] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs | None] = []
        self.content_tokens: list[Written] = []
        """As in `ChatPiece`."""
        self.finish_reason: ChatFinishReason = "length"
        self.stop_reason: str | int | None = None

    def add(self, found: ChatPiece) -> None:
        """Take in what has become known next."""
        self.events += found.events
        for event in found.events:
            match event:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case CallStart(_, call_id, name, custom):
                    self.calls.append(_call(call_id, name, "", custom))
                case CallArguments(index, text):
                    call, (kind, argument) = self.calls[index], _SPELLED[self.calls[index]["type"]]
                    call[kind][argument] += text
        self.tokens += found.tokens
        self.logprobs += found.logprobs
        self.content_tokens += found.content_tokens
        if found.finish_reason is not None:
            self.finish_reason, self.stop_reason = found.finish_reason, found.stop_reason

    def as_dict(self) -> dict[str, Any]:
        """The message in OpenAI's shape."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
            message["content"] = self.content or None
        return message


async def whole_messages(chat: ChatAnswers) -> list[WholeMessage]:
    """All answers, when they have ended."""
    messages = [WholeMessage() for _ in range(chat.generation.choices)]
    async for batch in chat.pieces():
        for found in batch:
            messages[found.choice].add(found)
    return messages


_SPELLED = {"function": ("function", "arguments"), "custom": ("custom", "input")}
"""Type of a call → the field with its name, and the field in that with what it is called with."""


def _call(call_id: str, name: str, text: str, custom: bool) -> dict[str, Any]:
    kind, argument = _SPELLED["custom" if custom else "function"]
    return {"id": call_id, "type": kind, kind: {"name": name, argument: text}}


def _events(call: Call, request: ChatRequest, chat: ChatAnswers, name: str) -> AsyncGenerator[bytes, None]:
    """The events of a stream."""
    options = request.stream_options
    with_usage = options is not None and bool(options.include_usage)
    chunks = Chunks(call, CHUNK_KIND, name, with_usage)

    def written(found: ChatPiece) -> bytes:
        if len(found.events) == 1 and found.finish_reason is None and not request.logprobs:
            event = found.events[0]
            if isinstance(event, Content):  # nearly all chunks
                before, after = _around_text(found.choice)
                return chunks.write(before + dumps(event.text) + after)
        return b"".join(chunks.write(dumps(choice)) for choice in _deltas(call, request, found))

    def write(batch: list[ChatPiece]) -> bytes:
        return b"".join(map(written, batch))

    first = b"".join(chunks.write(_opening(index)) for index in range(chat.generation.choices))
    return stream_of(first, chat.pieces(), write, lambda: chat.ended, lambda: chunks.end(chat.usage()))


@cache
def _opening(index: int) -> bytes:
    """The choice in JSON that begins an answer."""
    return dumps(_choice(index, {"role": "assistant", "content": ""}, None))


@cache
def _around_text(index: int) -> tuple[bytes, bytes]:
    """What stands before and after the text in the JSON of a choice with content."""
    before, _, after = dumps(_choice(index, {"content": ""}, None)).partition(b'""')
    return before, after


def _deltas(call: Call, request: ChatRequest, found: ChatPiece) -> list[dict[str, Any]]:
    """Choices of chunks: one for each kind of event in a row, and one with the finish reason."""
    choices: list[dict[str, Any]] = []
    logprobs = chat_logprobs(call.service.tokenizer, found.tokens, found.logprobs) if request.logprobs else None
    for event in found.events:
        delta: dict[str, Any]
        match event:
            case Content(text):
                delta = {"content": text}
            case Reasoning(text):
                delta = {"reasoning_content": text}
            case CallStart(index, call_id, function, custom):
                delta = {"tool_calls": [{"index": index, **_call(call_id, function, "", custom)}]}
            case CallArguments(index, text, custom):
                kind, argument = _SPELLED["custom" if custom else "function"]
                delta = {"tool_calls": [{"index": index, kind: {argument: text}}]}
        choices.append(_choice(found.choice, delta, logprobs))
        logprobs = None
    if logprobs is not None:
        choices.append(_choice(found.choice, {}, logprobs))
    if found.finish_reason is not None:
        choices.append(_choice(found.choice, {}, None, found.finish_reason, found.stop_reason))
    return choices


def _choice(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None,
    finish_reason: str | None = None,
    stop_reason: str | int | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }
