"""/v1/responses: OpenAI's newer interface, converted to a chat and back. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.responses import Response

from ..tokenizers.base import Tokenizer
from . import chat_core
from .call import Call
from .chat_core import ChatAnswers, ChatFinishReason, ChatPiece
from .content_tokens import Written
from .errors import ApiError
from .fields import RequestPart
from .http import JsonResponse, event, stream_of
from .logprobs import chat_logprobs
from .protocol import ChatRequest, Message, ResponseFormat, Schema, check_count
from .responses_protocol import (
    LOGPROBS,
    AllowedFunctions,
    FlatCustomTool,
    FunctionTool,
    Item,
    NamedCustomTool,
    NamedFunction,
    ResponsesRequest,
    ResponsesToolChoice,
)
from .tool_fields import (
    AllowedNames,
    AllowedTools,
    Custom,
    CustomCall,
    CustomFormat,
    CustomGrammar,
    CustomInput,
    CustomTool,
    FunctionCall,
    FunctionChoice,
    NamedCustom,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
)
from .tool_fields import Function as ChatFunction
from .tools.events import CallArguments, CallStart, Content, Event

NAMES = {"response_format": "text.format", "max_tokens": "max_output_tokens"}
"""Field of /v1/chat/completions → the name here, in errors."""


async def answer(call: Call, request: ResponsesRequest) -> Response:
    """The answer to a request, whole or as a stream. Raises `ApiError`."""
    try:
        chat = await chat_core.start(call, chat_request(request), "input", request.wants_logprobs)
    except ApiError as error:
        raise error.renamed(NAMES) from None
    writer = _Writer(call.service.tokenizer if request.wants_logprobs else None)
    events = _events(call, request, chat, writer)
    if request.stream:
        return call.stream(chat.generation, events, writer.error)
    async for _ in events:  # a whole answer is the last event's of its stream
        pass
    return JsonResponse(writer.response)


def chat_request(request: ResponsesRequest) -> ChatRequest:
    """The same request to /v1/chat/completions."""
    if request.top_logprobs and not request.wants_logprobs:
        raise ApiError(f"top_logprobs needs {LOGPROBS!r} in include", param="top_logprobs", code="invalid_value")
    messages = [] if request.instructions is None else [Message(role="system", content=request.instructions)]
    items = [Item(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    for index, item in enumerate(items):
        _add(messages, item, f"input.{index}")
    check_count(messages, "input")
    if not messages:
        raise ApiError("input: there is no message", param="input", code="invalid_value")
    form = None
    if request.text is not None and (given := request.text.format) is not None:
        schema = Schema(name=given.name, schema_=given.schema_) if given.type == "json_schema" else None
        form = ResponseFormat(type=given.type, json_schema=schema)
    tools = [_tool(tool, f"tools.{number}.format") for number, tool in enumerate(request.tools or [])]
    return ChatRequest(
        messages=messages,
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        priority=request.priority,
        response_format=form,
        tools=tools or None,
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        chat_template_kwargs=request.chat_template_kwargs,
        logprobs=request.wants_logprobs,
        top_logprobs=request.top_logprobs if request.wants_logprobs else None,
    )


def _tool(tool: FunctionTool | FlatCustomTool, place: str) -> Tool | CustomTool:
    """A tool as one of /v1/chat/completions."""
    if isinstance(tool, FunctionTool):
        return Tool(function=ChatFunction(name=tool.name, description=tool.description, parameters=tool.parameters))
    form = None
    if (given := tool.format) is not None and given.type == "grammar":
        if given.syntax is None or given.definition is None:
            missing = f"{place}.{'syntax' if given.syntax is None else 'definition'}"
            raise ApiError(f"{missing}: Field required", param=missing, code="missing_required_parameter")
        grammar = CustomGrammar(syntax=given.syntax, definition=given.definition)
        form = CustomFormat(type="grammar", grammar=grammar)
    return CustomTool(type="custom", custom=Custom(name=tool.name, description=tool.description, format=form))


def _tool_choice(choice: ResponsesToolChoice | None) -> ToolChoice | None:
    """A `tool_choice` as that of /v1/chat/completions."""
    if isinstance(choice, NamedFunction | NamedCustomTool):
        return _named(choice)
    if isinstance(choice, AllowedFunctions):
        allowed = AllowedNames(mode=choice.mode, tools=[_named(tool) for tool in choice.tools])
        return AllowedTools(type="allowed_tools", allowed_tools=allowed)
    return choice


def _named(tool: NamedFunction | NamedCustomTool) -> NamedTool | NamedCustom:
    if isinstance(tool, NamedCustomTool):
        return NamedCustom(type="custom", custom=FunctionChoice(name=tool.name))
    return NamedTool(function=FunctionChoice(name=tool.name))


def _add(messages: list[Message], item: Item, place: str) -> None:
    """Add a part of the input to the conversation."""
    if item.type == "reasoning":
        return
    if item.type == "message":
        if item.role is None or item.content is None:
            missing = f"{place}.{'role' if item.role is None else 'content'}"
            raise ApiError(f"{missing}: Field required", param=missing, code="missing_required_parameter")
        messages.append(Message(role=item.role, content=item.content))
    elif item.type in ("function_call", "custom_tool_call"):
        if item.name is None:
            raise ApiError(f"{place}.name: Field required", param=f"{place}.name", code="missing_required_parameter")
        made: ToolCall | CustomCall
        if item.type == "function_call":
            function = FunctionCall(name=item.name, arguments=item.arguments or "{}")
            made = ToolCall(id=item.call_id or "", function=function)
        else:
            custom = CustomInput(name=item.name, input=item.input or "")
            made = CustomCall(id=item.call_id or "", type="custom", custom=custom)
        if messages and messages[-1].role == "assistant":  # a message and its calls are one turn
            messages[-1] = messages[-1].model_copy(update={"tool_calls": [*(messages[-1].tool_calls or []), made]})
        else:
            messages.append(Message(role="assistant", tool_calls=[made]))
    else:
        messages.append(Message(role="tool", content=item.output or "", tool_call_id=item.call_id))


def _response(
    call: Call,
    request: ResponsesRequest,
    chat: ChatAnswers,
    output: list[dict[str, Any]],
    reason: ChatFinishReason | None,
) -> dict[str, Any]:
    """A response object. `reason`: why the answer ended; None while it is being generated."""
    status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
    generation = chat.generation
    usage = {
        "input_tokens": generation.prompt_tokens,
        "input_tokens_details": {"cached_tokens": generation.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": generation.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": chat.reasoning_tokens},
        "total_tokens": generation.prompt_tokens + generation.generated_tokens,
    }
    return {
        "id": f"resp_{call.key}",
        "object": "response",
        "created_at": call.created,
        "completed_at": None if reason is None else int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": call.service.name,
        "output": output,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": _text_format(request)},
        "tool_choice": _dumped_choice(request.tool_choice),
        "tools": [_dumped(tool) for tool in request.tools or []],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None if reason is None else usage,
        "user": request.user,
    }


def _dumped_choice(choice: ResponsesToolChoice | None) -> dict[str, Any] | str:
    """A `tool_choice` as the client gave it."""
    if isinstance(choice, AllowedFunctions):
        return {"type": choice.type, "mode": choice.mode, "tools": [_dumped(tool) for tool in choice.tools]}
    return _dumped(choice) if isinstance(choice, RequestPart) else choice or "auto"


def _dumped(part: RequestPart) -> dict[str, Any]:
    """A part of the request as plain values, and those in it."""
    return {name: _dumped(each) if isinstance(each, RequestPart) else each for name, each in part.as_dict().items()}


def _text_format(request: ResponsesRequest) -> dict[str, Any]:
    form = None if request.text is None else request.text.format
    return {"type": "text"} if form is None else _dumped(form)


def _logprobs(tokenizer: Tokenizer, written: Sequence[Written]) -> list[dict[str, Any]]:
    """Entries of the tokens that wrote a text. The token that ended it is not one of them."""
    entries: list[dict[str, Any]] = chat_logprobs(tokenizer, *zip(*written, strict=True))["content"] if written else []
    return entries


def _message_item(item_id: str, text: str, logprobs: list[dict[str, Any]], status: str = "completed") -> dict[str, Any]:
    content = [] if status == "in_progress" else [_text_part(text, logprobs)]
    return {"type": "message", "id": item_id, "status": status, "role": "assistant", "content": content}


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _reasoning_item(item_id: str, text: str, status: str = "completed") -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"type": "reasoning", "id": item_id, "status": status, "summary": [], "content": content}


def _call_item(item_id: str, call_id: str, name: str, arguments: str, status: str = "completed") -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": item_id,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def _custom_item(item_id: str, call_id: str, name: str, text: str, status: str = "completed") -> dict[str, Any]:
    return {
        "type": "custom_tool_call", "id": item_id, "call_id": call_id, "name": name, "input": text, "status": status,
    }  # fmt: skip


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


_DELTAS = {"reasoning": "reasoning_text", "call": "function_call_arguments", "custom": "custom_tool_call_input"}
"""Kind of an item → the middle of its events' names."""


class _OpenItem:
    """The item of a stream that is being sent."""

    def __init__(self, kind: str, index: int, name: str = "", call_id: str = "") -> None:
        self.kind, self.index, self.name, self.text = kind, index, name, ""
        self.id = _new_id({"content": "msg", "reasoning": "rs", "call": "fc", "custom": "ctc"}[kind])
        self.call_id = call_id
        self.logprobs: list[dict[str, Any]] = []

    def as_dict(self, status: str) -> dict[str, Any]:
        if self.kind == "content":
            return _message_item(self.id, self.text, self.logprobs, status)
        if self.kind == "reasoning":
            return _reasoning_item(self.id, self.text, status)
        if self.kind == "custom":
            return _custom_item(self.id, self.call_id, self.name, self.text, status)
        return _call_item(self.id, self.call_id, self.name, self.text, status)


class _Writer:
    """Makes the events of a stream: items open and close one after the other.

    `tokenizer`: of the tokens whose log probabilities are wanted; None for none.
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer, self._number = tokenizer, -1
        self.items: list[dict[str, Any]] = []
        self.response: dict[str, Any] = {}
        """The response object, when all events are written."""
        self._open: _OpenItem | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no item has begun."""
        return not self.items and self._open is None

    def event(self, kind: str, **data: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **data}, kind)

    def error(self, error: ApiError) -> bytes:
        """The last event of a stream that fails."""
        return self.event("error", code=error.code, message=error.message, param=error.param)

    def write(self, found: Sequence[Event], written: Sequence[Written] = ()) -> bytes:
        """The events for parts of an answer. `written`: the tokens of their content."""
        data = b""
        logprobs = [] if self._tokenizer is None else _logprobs(self._tokenizer, written)
        for each in found:
            if isinstance(each, CallStart):
                data += self.close() + self._begin(
                    _OpenItem("custom" if each.custom else "call", len(self.items), each.name, each.id)
                )
                continue
            if not isinstance(each, CallArguments):
                kind = "content" if isinstance(each, Content) else "reasoning"
                if self._open is None or self._open.kind != kind:
                    data += self.close() + self._begin(_OpenItem(kind, len(self.items)))
            if each.text and isinstance(each, Content):
                data, logprobs = data + self._delta(each.text, logprobs), []
            elif each.text:
                data += self._delta(each.text)
        return data

    def _place(self) -> dict[str, Any]:
        item = self._open
        assert item is not None
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        return place if item.kind in ("call", "custom") else {**place, "content_index": 0}

    def _begin(self, item: _OpenItem) -> bytes:
        self._open = item
        data = self.event("response.output_item.added", output_index=item.index, item=item.as_dict("in_progress"))
        if item.kind == "content":
            data += self.event("response.content_part.added", **self._place(), part=_text_part("", []))
        return data

    def _delta(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> bytes:
        item = self._open
        assert item is not None
        item.text += text
        item.logprobs += logprobs
        if item.kind == "content":
            return self.event("response.output_text.delta", **self._place(), delta=text, logprobs=logprobs)
        return self.event(f"response.{_DELTAS[item.kind]}.delta", **self._place(), delta=text)

    def close(self, status: str = "completed") -> bytes:
        """End the open item, if there is one."""
        item = self._open
        if item is None:
            return b""
        if item.kind == "content":
            data = self.event("response.output_text.done", **self._place(), text=item.text, logprobs=item.logprobs)
            data += self.event("response.content_part.done", **self._place(), part=_text_part(item.text, item.logprobs))
        elif item.kind == "reasoning":
            data = self.event("response.reasoning_text.done", **self._place(), text=item.text)
        elif item.kind == "custom":
            data = self.event("response.custom_tool_call_input.done", **self._place(), input=item.text)
        else:
            data = self.event(
                "response.function_call_arguments.done", **self._place(), name=item.name, arguments=item.text
            )
        done = item.as_dict(status)
        data += self.event("response.output_item.done", output_index=item.index, item=done)
        self.items.append(done)
        self._open = None
        return data


def _events(call: Call, request: ResponsesRequest, chat: ChatAnswers, writer: _Writer) -> AsyncGenerator[bytes, None]:
    """The events of a stream."""
    started = _response(call, request, chat, [], None)
    first = writer.event("response.created", response=started) + writer.event("response.in_progress", response=started)
    reason: ChatFinishReason = "length"

    def write(batch: list[ChatPiece]) -> bytes:
        nonlocal reason
        for found in batch:
            reason = found.finish_reason or reason
        return b"".join(writer.write(found.events, found.content_tokens) for found in batch)

    def last() -> bytes:
        data = writer.write([Content("")]) if writer.is_empty else b""
        status = "incomplete" if reason == "length" else "completed"
        data += writer.close(status)
        writer.response = _response(call, request, chat, writer.items, reason)
        return data + writer.event(f"response.{status}", response=writer.response)

    return stream_of(first, chat.pieces(), write, lambda: chat.ended, last)
