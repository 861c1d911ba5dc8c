"""A chat, whatever the client's protocol: messages → prompt → engine → events of each answer."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from ..errors import Error
from .call import Call
from .errors import ApiError, failed, refused
from .generation import Generation, Piece
from .params import sampling_params
from .protocol import ChatRequest, NamedTool, Tool, template_message

if TYPE_CHECKING:
    from ..engine.request import TokenLogprobs
    from .service import Service

RESERVED = (
    "messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "self", "context", "documents",
    "bos_token", "eos_token", "continue_final_message",
)  # fmt: skip
"""Names that `chat_template_kwargs` may not set."""


class Event(NamedTuple):
    """A part of an answer. `call` counts the answer's calls from 0; only those of calls have one."""

    kind: Literal["content", "reasoning", "call_start", "call_arguments"]
    text: str
    """Text; of "call_start" the function's name."""
    call: int = 0
    call_id: str = ""


@dataclass
class Events:
    """What became known of one answer at a time."""

    choice: int
    events: list[Event]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    """None except in an answer's last events."""
    stop_reason: str | int | None = None


class Parser(Protocol):
    """Finds reasoning and calls in an answer's text."""

    def feed(self, text: str) -> Sequence[Any]: ...

    def finish(self) -> Sequence[Any]: ...


class PlainText:
    """The parser of a model without a format of its own: everything is content."""

    def feed(self, text: str) -> list[Event]:
        return [Event("content", text)] if text else []

    def finish(self) -> list[Event]:
        return []


class Chat:
    """The answers to one request. `events` yields them as they come."""

    def __init__(self, generation: Generation, parsers: list[Parser]) -> None:
        self.generation = generation
        self._parsers = parsers
        self._called = [False] * len(parsers)

    async def events(self) -> AsyncGenerator[list[Events], None]:
        """Yield what is known of the answers as soon as it is: at most one `Events` of each at a time.

        Raises `ApiError` 500 when the engine or a parser fails.
        """
        try:
            async for pieces in self.generation.pieces():
                yield [self._read(piece) for piece in pieces]
        except ApiError:
            raise
        except Exception as error:
            self.generation.report_failure(error)
            raise failed(error) from error
        finally:
            self.generation.cancel()

    def _read(self, piece: Piece) -> Events:
        parser = self._parsers[piece.choice]
        found = list(parser.feed(piece.text)) if piece.text else []
        if piece.finish_reason is not None:
            found += parser.finish()
        events = [_event(each) for each in found]
        if any(each.kind == "call_start" for each in events):
            self._called[piece.choice] = True
        reason = piece.finish_reason
        if reason == "stop" and self._called[piece.choice]:
            reason = "tool_calls"
        return Events(piece.choice, events, piece.tokens, piece.logprobs, reason, piece.stop_reason)  # type: ignore[arg-type]


def _event(found: Any) -> Event:
    """An event of `tools`, by the name of its class, as one of ours."""
    if isinstance(found, Event):
        return found
    match type(found).__name__:
        case "Content":
            return Event("content", found.text)
        case "Reasoning":
            return Event("reasoning", found.text)
        case "CallStart":
            return Event("call_start", found.name, found.index, found.id)
        case "CallArguments":
            return Event("call_arguments", found.text, found.index)
    raise TypeError(f"a parser gave {found!r:.100}")


async def start(call: Call, request: ChatRequest, messages_field: str = "messages") -> Chat:
    """Submit a chat. `messages_field`: the client's name for the conversation. Raises `ApiError`."""
    service, n = call.service, request.n or 1
    named = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    if request.top_logprobs and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    used = await service.run(used_tools, service, request)
    params = sampling_params(request, getattr(request, named), logprobs, named, **used.restriction)
    ids = await service.run(prompt_ids, service, request, messages_field, used.offered)
    parsers = [used.parser() for _ in range(n)]
    return Chat(await call.generate(request, [ids], params, messages_field, answers=True), parsers)


# Tools: the one place that knows the module `tools`


class UsedTools(NamedTuple):
    """What a request makes of its tools."""

    offered: list[Tool] | None
    """Those that the template tells the model about."""
    format: Any
    """`tools.ToolFormat` of the model; None without the module."""
    restriction: dict[str, str]
    """Fields of `SamplingParams` that force a call."""

    def parser(self) -> Parser:
        if self.format is None:
            return PlainText()
        return self.format.parser(None if self.offered is None else plain_tools(self.offered))


@functools.cache
def tool_formats() -> Any:
    """The module `tools`; None where it is missing."""
    try:
        from . import tools  # type: ignore[attr-defined]
    except ImportError:
        return None
    return tools


def used_tools(service: Service, request: ChatRequest) -> UsedTools:
    """How the answers to a request are read, and what they may be. Raises `ApiError` 400 for a choice without tools."""
    choice, tools = request.tool_choice, request.tools or None
    if choice not in (None, "none", "auto") and tools is None:
        raise ApiError("tool_choice asks for a call, and there are no tools", param="tool_choice")
    offered = None if choice == "none" else tools
    formats = tool_formats()
    if formats is None:
        if offered is not None:
            raise ApiError("tools are not supported yet", param="tools", code="unsupported_parameter")
        return UsedTools(None, None, {})
    try:
        source = chat_template(service)
        form = formats.choose_format(source, service.tokenizer.special_tokens)
        restriction: dict[str, str] = {}
        if offered is not None and (choice == "required" or isinstance(choice, NamedTool)):
            wanted = choice.function.name if isinstance(choice, NamedTool) else "required"
            if isinstance(choice, NamedTool) and wanted not in [tool.function.name for tool in offered]:
                raise ApiError(f"tool_choice names {wanted!r}, which is not among the tools", param="tool_choice")
            parallel = request.parallel_tool_calls is not False
            restriction["grammar"] = form.grammar(plain_tools(offered), wanted, parallel)
        return UsedTools(offered, form, restriction)
    except Error as error:
        raise refused(error, "tools") from None


def plain_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as plain values, as templates expect them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]


# Prompts


def chat_template(service: Service) -> str | None:
    """The source of the chat template that the server uses; None when the model has none that fits."""
    try:
        return service.model.chat(template=service.settings.chat_template).template.source
    except Error:
        return None


def prompt_ids(
    service: Service, request: ChatRequest, messages_field: str = "messages", tools: list[Tool] | None = None
) -> list[int]:
    """Token ids of a conversation. Raises `ApiError` 400 when the template refuses it."""
    found = apply_template(
        service, request.messages, request.add_generation_prompt, tools, request.chat_template_kwargs, messages_field
    )
    assert isinstance(found, list)
    return found


def apply_template(
    service: Service,
    messages: Sequence[Any],
    add_generation_prompt: bool | None,
    tools: Sequence[Tool] | None,
    variables: Mapping[str, Any] | None,
    messages_field: str = "messages",
    tokenize: bool = True,
) -> list[int] | str:
    """A conversation as the chat template writes it: token ids, or text. Raises `ApiError` 400."""
    for name in variables or {}:
        if name in RESERVED or not name.isidentifier():
            param = "chat_template_kwargs"
            raise ApiError(f"{param} cannot set {name!r:.100}", param=param, code="invalid_value")
    try:
        return service.model.apply_chat_template(
            [template_message(message) for message in messages],
            add_generation_prompt is not False,
            None if tools is None else plain_tools(tools),
            tokenize,
            **{
                **service.settings.template_kwargs,
                **(variables or {}),
                "chat_template": service.settings.chat_template,
            },
        )
    except Error as error:
        raise refused(error, messages_field) from None
