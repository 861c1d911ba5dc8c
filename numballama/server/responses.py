"""/v1/responses: OpenAI's newer interface, converted to a chat and back. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from starlette.responses import Response

from . import chat_core
from .call import Call
from .chat import WholeMessage, whole_messages
from .chat_core import Chat
from .errors import ApiError
from .http import JsonResponse, event
from .protocol import (
    MAX_INT,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    NO_CODE,
    ChatRequest,
    FunctionCall,
    FunctionChoice,
    FunctionName,
    Message,
    Model,
    Name,
    NamedTool,
    Object,
    Request,
    ResponseFormat,
    Schema,
    Text,
    TextPart,
    Tool,
    ToolCall,
    ToolType,
)
from .protocol import Function as ChatFunction
from .tools.events import CallArguments, CallStart, Content, Event


class Item(Model):
    """A part of the input: a message, a call, or what a call gave."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None
    call_id: Name | None = None
    name: FunctionName | None = None
    arguments: Text | None = None
    output: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None


class FunctionTool(Model):
    type: ToolType
    name: FunctionName
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None


class NamedFunction(Model):
    type: ToolType = "function"
    name: FunctionName


class TextFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    name: Name = ""
    schema_: Annotated[Object | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Model):
    format: TextFormat | None = None


class ResponsesRequest(Request):
    """/v1/responses."""

    refused: ClassVar[dict[str, str]] = {
        **NO_CODE,
        "previous_response_id": "nothing is stored; send the conversation as input",
        "conversation": "nothing is stored; send the conversation as input",
        "background": "use stream",
        "prompt": "send instructions and input",
        "include": "there is nothing to include",
        "max_tool_calls": "the server calls no tools",
    }
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: Name | None = None
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    priority: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=64)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    user: Name | None = None
    store: bool | None = None
    chat_template_kwargs: Object | None = None


NAMES = {"response_format": "text.format", "max_tokens": "max_output_tokens"}
"""Field of /v1/chat/completions → the name here, in errors."""


async def answer(call: Call, request: ResponsesRequest) -> Response:
    """The answer to a request, whole or as a stream. Raises `ApiError`."""
    try:
        chat = await chat_core.start(call, chat_request(request), "input")
    except ApiError as error:
        raise error.renamed(NAMES) from None
    if request.stream:
        writer = _Writer()
        return call.stream(chat.generation, _events(call, request, chat, writer), writer.error)
    (message,) = await whole_messages(chat)
    return JsonResponse(_response(call, request, chat, _output(message), message.finish_reason))


def chat_request(request: ResponsesRequest) -> ChatRequest:
    """The same request to /v1/chat/completions."""
    messages = [] if request.instructions is None else [Message(role="system", content=request.instructions)]
    items = [Item(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    for index, item in enumerate(items):
        _add(messages, item, f"input.{index}")
    if not messages:
        raise ApiError("input: there is no message", param="input", code="invalid_value")
    form = None
    if request.text is not None and (given := request.text.format) is not None:
        schema = Schema(name=given.name, schema_=given.schema_) if given.type == "json_schema" else None
        form = ResponseFormat(type=given.type, json_schema=schema)
    choice = request.tool_choice
    tools = [
        Tool(function=ChatFunction(name=tool.name, description=tool.description, parameters=tool.parameters))
        for tool in request.tools or []
    ]
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
        tool_choice=NamedTool(function=FunctionChoice(name=choice.name))
        if isinstance(choice, NamedFunction)
        else choice,
        parallel_tool_calls=request.parallel_tool_calls,
        chat_template_kwargs=request.chat_template_kwargs,
    )


def _add(messages: list[Message], item: Item, place: str) -> None:
    """Add a part of the input to the conversation."""
    if item.type == "reasoning":
        return
    if item.type == "message":
        if item.role is None or item.content is None:
            missing = f"{place}.{'role' if item.role is None else 'content'}"
            raise ApiError(f"{missing}: Field required", param=missing, code="missing_required_parameter")
        messages.append(Message(role=item.role, content=item.content))
    elif item.type == "function_call":
        if item.name is None:
            raise ApiError(f"{place}.name: Field required", param=f"{place}.name", code="missing_required_parameter")
        function = FunctionCall(name=item.name, arguments=item.arguments or "{}")
        made = ToolCall(id=item.call_id or "", function=function)
        if messages and messages[-1].role == "assistant":  # a message and its calls are one turn
            messages[-1] = messages[-1].model_copy(update={"tool_calls": [*(messages[-1].tool_calls or []), made]})
        else:
            messages.append(Message(role="assistant", tool_calls=[made]))
    else:
        messages.append(Message(role="tool", content=item.output or "", tool_call_id=item.call_id))


def _response(
    call: Call, request: ResponsesRequest, chat: Chat, output: list[dict[str, Any]], reason: str | None
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
        "tool_choice": _dumped(request.tool_choice) or "auto",
        "tools": [_dumped(tool) for tool in request.tools or []],
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None if reason is None else usage,
        "user": request.user,
    }


def _dumped(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Model) else value


def _text_format(request: ResponsesRequest) -> Any:
    form = None if request.text is None else request.text.format
    return {"type": "text"} if form is None else _dumped(form)


def _message_item(item_id: str, text: str, status: str = "completed") -> dict[str, Any]:
    content = [] if status == "in_progress" else [_text_part(text)]
    return {"type": "message", "id": item_id, "status": status, "role": "assistant", "content": content}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


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


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _output(message: WholeMessage) -> list[dict[str, Any]]:
    """The items of a whole answer."""
    output = [_reasoning_item(_new_id("rs"), message.reasoning)] if message.reasoning else []
    if message.content or not (message.calls or message.reasoning):
        output.append(_message_item(_new_id("msg"), message.content))
    for made in message.calls:
        function = made["function"]
        output.append(_call_item(_new_id("fc"), made["id"], function["name"], function["arguments"]))
    if message.finish_reason == "length":
        output[-1]["status"] = "incomplete"
    return output


class _OpenItem:
    """The item of a stream that is being sent."""

    def __init__(self, kind: str, index: int, name: str = "", call_id: str = "") -> None:
        self.kind, self.index, self.name, self.text = kind, index, name, ""
        self.id = _new_id({"content": "msg", "reasoning": "rs", "call": "fc"}[kind])
        self.call_id = call_id

    def as_dict(self, status: str) -> dict[str, Any]:
        if self.kind == "content":
            return _message_item(self.id, self.text, status)
        if self.kind == "reasoning":
            return _reasoning_item(self.id, self.text, status)
        return _call_item(self.id, self.call_id, self.name, self.text, status)


class _Writer:
    """Makes the events of a stream: items open and close one after the other."""

    def __init__(self) -> None:
        self._number = -1
        self.items: list[dict[str, Any]] = []
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

    def write(self, found: Sequence[Event]) -> bytes:
        """The events for parts of an answer."""
        data = b""
        for each in found:
            if isinstance(each, CallStart):
                data += self.close() + self._begin(_OpenItem("call", len(self.items), each.name, each.id))
                continue
            if not isinstance(each, CallArguments):
                kind = "content" if isinstance(each, Content) else "reasoning"
                if self._open is None or self._open.kind != kind:
                    data += self.close() + self._begin(_OpenItem(kind, len(self.items)))
            if each.text:
                data += self._delta(each.text)
        return data

    def _place(self) -> dict[str, Any]:
        item = self._open
        assert item is not None
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        return place if item.kind == "call" else {**place, "content_index": 0}

    def _begin(self, item: _OpenItem) -> bytes:
        self._open = item
        data = self.event("response.output_item.added", output_index=item.index, item=item.as_dict("in_progress"))
        if item.kind == "content":
            data += self.event("response.content_part.added", **self._place(), part=_text_part(""))
        return data

    def _delta(self, text: str) -> bytes:
        item = self._open
        assert item is not None
        item.text += text
        if item.kind == "content":
            return self.event("response.output_text.delta", **self._place(), delta=text, logprobs=[])
        kind = "response.reasoning_text.delta" if item.kind == "reasoning" else "response.function_call_arguments.delta"
        return self.event(kind, **self._place(), delta=text)

    def close(self, status: str = "completed") -> bytes:
        """End the open item, if there is one."""
        item = self._open
        if item is None:
            return b""
        if item.kind == "content":
            data = self.event("response.output_text.done", **self._place(), text=item.text, logprobs=[])
            data += self.event("response.content_part.done", **self._place(), part=_text_part(item.text))
        elif item.kind == "reasoning":
            data = self.event("response.reasoning_text.done", **self._place(), text=item.text)
        else:
            data = self.event(
                "response.function_call_arguments.done", **self._place(), name=item.name, arguments=item.text
            )
        done = item.as_dict(status)
        data += self.event("response.output_item.done", output_index=item.index, item=done)
        self.items.append(done)
        self._open = None
        return data


async def _events(call: Call, request: ResponsesRequest, chat: Chat, writer: _Writer) -> AsyncGenerator[bytes, None]:
    """The events of a stream."""
    started = _response(call, request, chat, [], None)
    yield writer.event("response.created", response=started) + writer.event("response.in_progress", response=started)
    reason: str = "length"
    async for batch in chat.events():
        for found in batch:
            if data := writer.write(found.events):
                yield data
            reason = found.finish_reason or reason
    if writer.is_empty:
        yield writer.write([Content("")])
    status = "incomplete" if reason == "length" else "completed"
    yield writer.close(status)
    yield writer.event(f"response.{status}", response=_response(call, request, chat, writer.items, reason))
