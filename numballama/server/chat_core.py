"""A chat, whatever the client's protocol: messages → prompt → engine → events of each answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from ..engine.request import FinishReason, TokenLogprobs
from ..errors import Error
from ..generate import TextPart
from ..sampling import SamplingParams
from .call import Call
from .content_tokens import ContentTokens, Written
from .custom_tools import as_functions, custom_names
from .errors import ApiError, failed, refused
from .generation import Generation
from .logprobs import token_text
from .params import restriction_fields, sampling_params, token_limit
from .protocol import ChatRequest, Message, template_message
from .tool_fields import AllowedTools, CustomTool, NamedCustom, NamedTool, Tool
from .tools.custom import CustomCalls
from .tools.definitions import check_tools
from .tools.events import CallStart, Content, Event, merge
from .tools.formats import ToolFormat
from .tools.parser import Parser

if TYPE_CHECKING:
    from .service import Service

TAIL = 16
"""Tokens at the end of a prompt that are read to see whether it ends inside reasoning."""
MOST_NAMES = 20
"""Names of tools that an error lists."""
RESERVED = (
    "messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "self", "context", "documents",
    "bos_token", "eos_token", "continue_final_message",
)  # fmt: skip
"""Names that `chat_template_kwargs` may not set."""
ChatFinishReason = FinishReason | Literal["tool_calls"]


@dataclass
class ChatPiece:
    """What became known of one answer at a time: a `TextPart` whose text has been parsed."""

    choice: int
    events: list[Event]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    content_tokens: list[Written] = field(default_factory=list)
    """The tokens behind the content, where `start` was asked for them."""
    finish_reason: ChatFinishReason | None = None
    """None except in an answer's last piece."""
    stop_reason: str | int | None = None


class ChatAnswers:
    """The answers to one request. `pieces` yields them as they come.

    `one_call`: an answer ends where its second call begins. `content_tokens`: say which tokens the content is from.
    `only_calls`: answers have no content; what looks like it is a call that was cut off before its name.
    `custom_tools`: names of the tools that are called with a text.
    """

    def __init__(
        self,
        generation: Generation,
        parsers: Sequence[Parser],
        *,
        one_call: bool = False,
        content_tokens: bool = False,
        only_calls: bool = False,
        custom_tools: Collection[str] = (),
    ) -> None:
        self.generation = generation
        self._content = [ContentTokens() for _ in parsers] if content_tokens else None
        self._parsers, self._one_call, self._only_calls = parsers, one_call, only_calls
        self._custom = [CustomCalls(custom_tools) for _ in parsers] if custom_tools else []
        self.reasoning_tokens = 0
        """Generated tokens so far that are reasoning, its markers included."""
        self._undecided = [0] * len(parsers)  # tokens that may turn out to begin reasoning
        self._calls = [0] * len(parsers)  # calls that have begun
        self._open = set(range(len(parsers)))  # answers that have not ended

    async def pieces(self) -> AsyncGenerator[list[ChatPiece], None]:
        """Yield what is known of the answers as soon as it is: at most one `ChatPiece` of each at a time.

        Raises `ApiError`: 503 when the device fails for good, 500 when a step of the engine or a parser fails.
        """
        try:
            async for pieces in self.generation.pieces():
                if found := [self._read(piece) for piece in pieces if piece.index in self._open]:
                    yield found
                if self.ended and not self.generation.all_ended:  # else it ends by itself
                    self.generation.complete()
                    break
        except ApiError:
            raise
        except Exception as error:
            self.generation.report_failure(error)
            raise failed(error) from error
        finally:
            self.generation.cancel()

    def _read(self, piece: TextPart) -> ChatPiece:
        """Parse a piece of one answer. A second call ends it where only one is wanted."""
        choice, stop_reason = piece.index, piece.stop_reason
        reason: ChatFinishReason | None = piece.finish_reason
        parser = self._parsers[choice]
        content: list[Written] = []
        each_token = parser.may_reason or self._content is not None
        events = self._feed(parser, piece, content) if each_token else parser.feed(piece.text)
        if reason is None and len(events) == 1 and isinstance(events[0], Content) and not self._only_calls:
            return ChatPiece(choice, events, piece.tokens, piece.logprobs, content)  # nearly always
        is_cut = parser.in_arguments  # then the call is none to make
        if reason is not None:
            rest = parser.finish()
            events += rest
            if self._content is not None:
                content += self._content[choice].settle(rest)
        if self._only_calls:
            events, content = [event for event in events if not isinstance(event, Content)], []
        starts = [index for index, event in enumerate(events) if isinstance(event, CallStart)]
        keep = 1 - self._calls[choice]
        self._calls[choice] += len(starts)
        if self._one_call and len(starts) > keep:
            events, reason, stop_reason, is_cut = events[: starts[keep]], "stop", None, False
        if reason is not None:
            self._open.discard(choice)
        if reason == "stop" and self._calls[choice] and not is_cut:
            reason = "tool_calls"
        if self._custom:
            events = list(self._custom[choice].convert(events, reason is not None))
        if len(events) > 1:
            events = list(merge(events))
        return ChatPiece(choice, events, piece.tokens, piece.logprobs, content, reason, stop_reason)

    def _feed(self, parser: Parser, piece: TextPart, content: list[Written]) -> list[Event]:
        """Events of a piece, token by token: tokens of reasoning are counted, those of content added to `content`."""
        events: list[Event] = []
        for text, token, logprobs in zip(piece.texts, piece.tokens, piece.logprobs, strict=True):
            inside = parser.in_reasoning
            found = parser.feed(text)
            events += found
            if self._content is not None:
                content += self._content[piece.index].add(text, (token, logprobs), found, parser.held)
            if inside or parser.in_reasoning:
                self.reasoning_tokens += 1 + self._undecided[piece.index]
                self._undecided[piece.index] = 0
            elif parser.may_reason:
                self._undecided[piece.index] += 1
        return events

    @property
    def ended(self) -> bool:
        """Whether the last piece of every answer has been yielded: `usage` does not change any more."""
        return not self._open

    def usage(self) -> dict[str, Any]:
        """Tokens, in OpenAI's shape."""
        return {
            **self.generation.usage(),
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


@dataclass
class _Prepared:
    """What is submitted for a request."""

    ids: list[int]
    params: SamplingParams
    parsers: list[Parser]
    forced: dict[str, str]
    """As `forced_call` returns it."""


async def start(
    call: Call, request: ChatRequest, messages_field: str = "messages", content_tokens: bool = False
) -> ChatAnswers:
    """Submit a chat. Raises `ApiError`.

    `messages_field`: the client's name for the conversation. `content_tokens`: as in `ChatAnswers`.
    """
    service = call.service
    if request.top_logprobs and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
    offered = offered_tools(request)
    callable_ = callable_tools(request, offered)
    is_plain = not (request.tools or request.chat_template_kwargs or restriction_fields(request))
    run = call.run_short if is_plain else call.run
    ready = await run(_prepare, service, request, messages_field, offered, callable_)
    forced = ready.forced
    fields = dict.fromkeys(forced, "tools")
    shown = service.tool_format.shown_tokens(offered is not None)
    new_text = not request.continue_final_message
    try:
        generation = await call.generate(request, [ready.ids], ready.params, messages_field, new_text, shown, fields)
    except ApiError as error:
        if not forced or error.param != "tools":
            raise
        work = service.run_slowly(_with_place, error, service, request, offered or [], callable_ or [])
        raise await work from None
    return ChatAnswers(
        generation,
        ready.parsers,
        one_call=request.parallel_tool_calls is False,
        content_tokens=content_tokens,
        only_calls=must_call(request),
        custom_tools=custom_names(request.tools),
    )


def _prepare(
    service: Service,
    request: ChatRequest,
    messages_field: str,
    offered: list[Tool] | None,
    callable_: list[Tool] | None,
) -> _Prepared:
    """The prompt of a chat, and what its answers are generated and read with. Raises `ApiError`."""
    limit_field, limit = token_limit(request)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    ids = prompt_ids(service, request, messages_field)
    form = service.tool_format
    thinking = form.reasoning is not None and form.opens_reasoning(
        "".join(token_text(service.tokenizer, token) for token in ids[-TAIL:])
    )
    forced = forced_call(form, request, offered, thinking)
    params = sampling_params(request, limit, logprobs, limit_field, **forced)
    if params.is_constrained and not forced:
        thinking = False  # the grammar holds from the first token on, so the answer has no reasoning
    try:
        parsers = form.parsers(plain_tools(callable_), request.n or 1, thinking)
    except Error as error:
        raise refused(error, "tools") from None
    return _Prepared(ids, params, parsers, forced)


# Tools


def offered_tools(request: ChatRequest) -> list[Tool] | None:
    """The tools that the prompt shows. Raises `ApiError` 400 for a `tool_choice` that has none, or names another."""
    choice, tools = request.tool_choice, as_functions(request.tools) or None
    if choice in (None, "auto"):
        return tools
    if choice == "none":
        return None
    wanted = choice.names if isinstance(choice, AllowedTools) else set()
    if isinstance(choice, NamedTool | NamedCustom):
        wanted = {choice.name}
    if tools is None:
        what = "names tools" if wanted else "asks for a call"
        raise ApiError(f"tool_choice {what}, and there are no tools", param="tool_choice")
    known = [tool.function.name for tool in tools]
    if missing := sorted(wanted - set(known)):
        names = ", ".join(known[:MOST_NAMES]) + (", …" if len(known) > MOST_NAMES else "")
        what = f"tool_choice names {missing[0]!r}, which is not among the tools: {names}"
        raise ApiError(what, param="tool_choice", code="invalid_value")
    return tools


def callable_tools(request: ChatRequest, offered: list[Tool] | None) -> list[Tool] | None:
    """Those of the tools that an answer may call."""
    choice = request.tool_choice
    if offered is None or not isinstance(choice, AllowedTools):
        return offered
    return [tool for tool in offered if tool.function.name in choice.names]


def must_call(request: ChatRequest) -> bool:
    """Whether `tool_choice` leaves no other answer than calls."""
    choice = request.tool_choice
    if isinstance(choice, AllowedTools):
        return choice.allowed_tools.mode == "required"
    return choice == "required" or isinstance(choice, NamedTool | NamedCustom)


def forced_call(form: ToolFormat, request: ChatRequest, offered: list[Tool] | None, thinking: bool) -> dict[str, str]:
    """The fields of `SamplingParams` that restrict calls as `tool_choice` asks, or none where it does not.

    `thinking`: the prompt ends inside reasoning. Raises `ApiError` 400.
    """
    choice, allowed = request.tool_choice, callable_tools(request, offered)
    mode, parallel = "required", request.parallel_tool_calls is not False
    enforced = custom_names(request.tools, with_grammar=True) & {tool.function.name for tool in allowed or ()}
    if isinstance(choice, NamedTool | NamedCustom):
        allowed, parallel = [tool for tool in offered or [] if tool.function.name == choice.name], False
    elif not must_call(request):
        if (allowed == offered and not enforced) or restriction_fields(request):
            return {}  # any tool may be called, or the text is restricted anyway and the parser knows the allowed ones
        mode = "auto"
    try:
        return {"grammar": form.grammar(plain_tools(allowed), mode, parallel, thinking, enforced)}
    except Error as error:
        raise refused(error, "tools") from None


def _with_place(
    error: ApiError, service: Service, request: ChatRequest, offered: Sequence[Tool], allowed: Sequence[Tool]
) -> ApiError:
    """The error that the grammar of a call gave, with the tool whose parameters are not enforced."""
    named = request.tool_choice.name if isinstance(request.tool_choice, NamedTool | NamedCustom) else None
    for index, tool in enumerate(offered):
        if tool in allowed and named in (None, tool.function.name):
            try:
                service.model.check_constraint(SamplingParams(json_schema=tool.function.parameters or {}))
            except Error as found:
                message = f"tools.{index}: parameters of {tool.function.name}: {found}"
                return ApiError(message, param=f"tools.{index}", code=error.code)
    return error


def plain_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as plain values, as templates expect them."""
    return None if tools is None else [{"type": tool.type, "function": tool.function.as_dict()} for tool in tools]


# Prompts


class Templated(Protocol):
    """What requests with a conversation have in common."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: dict[str, Any] | None


def prompt_ids(service: Service, request: ChatRequest, messages_field: str = "messages") -> list[int]:
    """Token ids of a conversation. Raises `ApiError` 400 when the template refuses it."""
    return apply_template(service, request, request.messages, offered_tools(request), messages_field)


@overload
def apply_template(
    service: Service, request: Templated, messages: Sequence[Message], tools: Sequence[Tool | CustomTool] | None,
    messages_field: str = ..., tokenize: Literal[True] = ...,
) -> list[int]: ...  # fmt: skip


@overload
def apply_template(
    service: Service, request: Templated, messages: Sequence[Message], tools: Sequence[Tool | CustomTool] | None,
    messages_field: str = ..., *, tokenize: Literal[False],
) -> str: ...  # fmt: skip


def apply_template(
    service: Service,
    request: Templated,
    messages: Sequence[Message],
    tools: Sequence[Tool | CustomTool] | None,
    messages_field: str = "messages",
    tokenize: bool = True,
) -> list[int] | str:
    """A conversation as the chat template writes it: token ids, or text. Raises `ApiError` 400."""
    own, variables = service.settings, request.chat_template_kwargs or {}
    for name in variables:
        if name in RESERVED or not name.isidentifier():
            param = "chat_template_kwargs"
            raise ApiError(f"{param} cannot set {name!r:.100}", param=param, code="invalid_value")
    add, continues = request.add_generation_prompt, bool(request.continue_final_message)
    if continues and add:
        message = "continue_final_message and add_generation_prompt cannot both be true"
        raise ApiError(message, param="continue_final_message", code="invalid_value")
    try:
        check_tools(given := plain_tools(as_functions(tools)))
    except Error as error:
        raise refused(error, "tools") from None
    fixed: dict[str, Any] = {"chat_template": own.chat_template, "continue_final_message": continues}
    try:
        plain, described = service.tool_format.conversation(map(template_message, messages), given)
        add = add is not False and not continues
        settings = {**own.template_kwargs, **variables, **fixed}
        return service.model.apply_chat_template(plain, add, described, tokenize, **settings)
    except Error as error:
        raise refused(error, messages_field, {"continue_final_message": "continue_final_message"}) from None
