"""/v1/messages and /v1/messages/count_tokens: Anthropic's interface, converted to a chat and back."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Iterable
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from starlette.responses import Response

from . import chat_core
from .call import Call
from .chat import WholeMessage, whole_messages
from .chat_core import ChatAnswers, ChatFinishReason, ChatPiece
from .errors import ApiError
from .fields import (
    MAX_INT,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_STOPS,
    MAX_TOOLS,
    Description,
    FunctionName,
    Name,
    Object,
    Request,
    RequestPart,
    StopString,
    Text,
)
from .http import JsonResponse, event, stream_of
from .protocol import NO_CODE, ChatRequest, Message, ResponseFormat, Schema, check_count
from .tool_fields import CustomCall, CustomTool, Function, FunctionCall, FunctionChoice, NamedTool, Tool, ToolCall
from .tools.events import CallArguments, CallStart, Content, Event, Reasoning, merge


class ResultPart(RequestPart):
    type: Literal["text"]
    text: Text


class Block(RequestPart):
    """A part of a message."""

    type: Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: Text | None = None
    thinking: Text | None = None
    id: Name | None = None
    name: FunctionName | None = None
    input: Object | None = None
    tool_use_id: Name | None = None
    content: Text | Annotated[list[ResultPart], Field(max_length=MAX_PARTS)] | None = None


class Turn(RequestPart):
    role: Literal["user", "assistant"]
    content: Text | Annotated[list[Block], Field(max_length=MAX_PARTS)]


class MessagesTool(RequestPart):
    type: Literal["custom"] | None = None
    name: FunctionName
    description: Description | None = None
    input_schema: Object


class ToolChoice(RequestPart):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(RequestPart):
    type: Literal["json_schema"]
    schema_: Annotated[Object, Field(alias="schema")]


class OutputConfig(RequestPart):
    format: OutputFormat | None = None


NAMES = {"response_format": "output_config.format", "stop": "stop_sequences", "continue_final_message": "messages"}
"""Field of /v1/chat/completions → the name here, in errors."""


class CountRequest(Request):
    """/v1/messages/count_tokens."""

    refused: ClassVar[dict[str, str]] = {**NO_CODE, "mcp_servers": "the server calls no tools"}
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    model: Name | None = None
    system: Text | Annotated[list[ResultPart], Field(max_length=MAX_PARTS)] | None = None
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """The name of `output_config.format` in a beta version."""
    chat_template_kwargs: Object | None = None


class MessagesRequest(CountRequest):
    """/v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None


async def answer(call: Call, request: MessagesRequest) -> Response:
    """The answer to a request, whole or as a stream. Raises `ApiError`."""
    try:
        chat = await chat_core.start(call, chat_request(request))
    except ApiError as error:
        raise error.renamed(NAMES) from None
    if request.stream:
        return call.stream(chat.generation, _events(call, chat), _error_event)
    (message,) = await whole_messages(chat)
    stopped = _stopped(message.finish_reason, message.stop_reason)
    return JsonResponse(_message(call, chat, _content(message), stopped))


async def count_tokens(call: Call, request: CountRequest) -> Response:
    """How many tokens a request's prompt has."""
    asked = chat_request(request)
    ids = await call.run(chat_core.prompt_ids, call.service, asked)
    return JsonResponse({"input_tokens": len(ids)})


def chat_request(request: CountRequest) -> ChatRequest:
    """The same request to /v1/chat/completions."""
    messages: list[Message] = []
    if request.system:
        messages.append(Message(role="system", content=_joined(request.system)))
    for _, turns in groupby(enumerate(request.messages), lambda each: each[1].role):
        _add(messages, turns)
        check_count(messages, "messages")
    goes_on = messages[-1].role == "assistant" and not messages[-1].tool_calls  # the answer continues it
    config = request.output_config
    form = request.output_format if config is None or config.format is None else config.format
    choice, wanted = request.tool_choice, None
    if choice is not None and choice.type == "tool":
        if choice.name is None:
            param = "tool_choice.name"
            raise ApiError(f"{param}: Field required", param=param, code="missing_required_parameter")
        wanted = NamedTool(function=FunctionChoice(name=choice.name))
    tools: list[Tool | CustomTool] = [
        Tool(function=Function(name=tool.name, description=tool.description, parameters=tool.input_schema))
        for tool in request.tools or []
    ]
    settings: dict[str, Any] = {}
    if isinstance(request, MessagesRequest):
        settings = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "stop": request.stop_sequences,
        }
    names: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    return ChatRequest(
        messages=messages,
        tools=tools or None,
        tool_choice=wanted or (None if choice is None else names[choice.type]),
        continue_final_message=goes_on or None,
        response_format=None
        if form is None
        else ResponseFormat(type="json_schema", json_schema=Schema(schema_=form.schema_)),
        parallel_tool_calls=None if choice is None else not choice.disable_parallel_tool_use,
        chat_template_kwargs=request.chat_template_kwargs,
        **settings,
    )


def _joined(content: str | list[ResultPart] | None) -> str:
    return "\n".join(part.text for part in content) if isinstance(content, list) else content or ""


def _add(messages: list[Message], turns: Iterable[tuple[int, Turn]]) -> None:
    """Add turns of the same role, with their numbers, to the conversation: together they are one, as in Anthropic's
    interface. Results of calls are messages of their own, before the text.
    """
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall | CustomCall] = []
    results: list[Message] = []
    for number, turn in turns:
        role, place = turn.role, f"messages.{number}.content"
        if isinstance(turn.content, str):
            texts.append(turn.content)
            continue
        for index, block in enumerate(turn.content):
            if block.type == "text":
                texts.append(_required(block.text, f"{place}.{index}.text"))
            elif block.type == "thinking":
                reasoning.append(block.thinking or "")
            elif block.type == "tool_use":
                name = _required(block.name, f"{place}.{index}.name")
                if len(calls) == MAX_TOOLS:
                    message = f"{place}: at most {MAX_TOOLS} tool_use blocks are possible"
                    raise ApiError(message, param=place, code="invalid_value")
                arguments = json.dumps(block.input or {}, ensure_ascii=False)
                calls.append(ToolCall(id=block.id or "", function=FunctionCall(name=name, arguments=arguments)))
            elif block.type == "tool_result":
                results.append(Message(role="tool", content=_joined(block.content), tool_call_id=block.tool_use_id))
        check_count(results, "messages")
    messages += results
    if texts or calls or not results:
        messages.append(
            Message(
                role=role,
                content="\n".join(texts),
                reasoning_content="".join(reasoning) or None,
                tool_calls=calls or None,
            )
        )


def _required(value: str | None, place: str) -> str:
    if value is None:
        raise ApiError(f"{place}: Field required", param=place, code="missing_required_parameter")
    return value


def _stopped(finish_reason: ChatFinishReason, stop_reason: str | int | None) -> dict[str, str | None]:
    """`stop_reason` and `stop_sequence` of an answer."""
    if finish_reason == "stop" and isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    if finish_reason == "length" and stop_reason == "context":
        return {"stop_reason": "model_context_window_exceeded", "stop_sequence": None}
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    return {"stop_reason": reasons[finish_reason], "stop_sequence": None}


def _usage(chat: ChatAnswers) -> dict[str, int]:
    """Tokens in Anthropic's shape: `input_tokens` are those that were not in the cache."""
    generation = chat.generation
    return {
        "input_tokens": generation.prompt_tokens - generation.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": generation.cached_tokens,
        "output_tokens": generation.generated_tokens,
    }


def _message(
    call: Call, chat: ChatAnswers, content: list[dict[str, Any]], stopped: dict[str, str | None]
) -> dict[str, Any]:
    head = {"id": f"msg_{call.key}", "type": "message", "role": "assistant", "model": call.service.name}
    return {**head, "content": content, **stopped, "usage": _usage(chat)}


def _content(message: WholeMessage) -> list[dict[str, Any]]:
    """The blocks of a whole answer, in the order in which they were written."""
    content: list[dict[str, Any]] = []
    for part in merge(message.events):
        match part:
            case Reasoning(text):
                content.append({"type": "thinking", "thinking": text, "signature": ""})
            case Content(text):
                content.append({"type": "text", "text": text})
            case CallStart(index, call_id, name):
                arguments = _object(message.calls[index]["function"]["arguments"])
                content.append({"type": "tool_use", "id": call_id, "name": name, "input": arguments})
    return content


def _object(text: str) -> dict[str, Any]:
    """The arguments of a call. A text that is no object of JSON, cut off by max_tokens, gives none.

    Models write NaN now and then, which JSON does not have: it becomes null, as in JavaScript.
    """
    try:
        found = json.loads(text or "{}", parse_constant=lambda name: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


class _Writer:
    """Makes the events of a stream: blocks open and close one after the other."""

    STARTS: ClassVar[dict[type[Event], dict[str, Any]]] = {
        Content: {"type": "text", "text": ""},
        Reasoning: {"type": "thinking", "thinking": "", "signature": ""},
    }

    def __init__(self) -> None:
        self._index = -1
        self._kind: type[Event] | None = None

    def write(self, found: Event) -> bytes:
        """The events for a part of an answer."""
        match found:
            case Content(text):
                return self._delta(Content, {"type": "text_delta", "text": text})
            case Reasoning(text):
                return self._delta(Reasoning, {"type": "thinking_delta", "thinking": text})
            case CallStart(_, call_id, name):
                return self._begin(CallStart, {"type": "tool_use", "id": call_id, "name": name, "input": {}})
            case CallArguments(_, text):
                return self._delta(CallStart, {"type": "input_json_delta", "partial_json": text})

    def _begin(self, kind: type[Event], block: dict[str, Any]) -> bytes:
        data = self.close()
        self._kind, self._index = kind, self._index + 1
        return data + _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, kind: type[Event], delta: dict[str, str]) -> bytes:
        data = b"" if kind is self._kind else self._begin(kind, self.STARTS[kind])
        return data + _event("content_block_delta", index=self._index, delta=delta)

    def close(self) -> bytes:
        """End the open block, if there is one."""
        kind, self._kind = self._kind, None
        return b"" if kind is None else _event("content_block_stop", index=self._index)


def _event(kind: str, **data: Any) -> bytes:
    return event({"type": kind, **data}, kind)


def _events(call: Call, chat: ChatAnswers) -> AsyncGenerator[bytes, None]:
    """The events of a stream. The first does not know yet what is cached; the last has all figures."""
    writer, stopped = _Writer(), _stopped("length", None)
    nothing: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None}

    def write(batch: list[ChatPiece]) -> bytes:
        nonlocal stopped
        for found in batch:
            if found.finish_reason is not None:
                stopped = _stopped(found.finish_reason, found.stop_reason)
        return b"".join(writer.write(each) for found in batch for each in found.events)

    def last() -> bytes:
        return writer.close() + _event("message_delta", delta=stopped, usage=_usage(chat)) + _event("message_stop")

    first = _event("message_start", message=_message(call, chat, [], nothing))
    return stream_of(first, chat.pieces(), write, lambda: chat.ended, last)


def _error_event(error: ApiError) -> bytes:
    return event(error.body, "error")
