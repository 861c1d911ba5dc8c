"""What clients send: the request models. Every number, list and string has limits.

A wrong value is an error that names its field. A field that no model declares is ignored (the answer's header says so),
unless `refused` names it:
those are known, would change the answer, and are not supported. What has no effect (null, false, an empty list) is
accepted everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, ValidationError
from pydantic_core import PydanticCustomError

from ..sampling import MAX_BIASES, MAX_LOGPROBS, MAX_N
from .errors import ApiError, invalid_request

MAX_TEXT = 8 << 20
MAX_INT = 2**31 - 1
MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, MAX_PROMPTS, MAX_TOKENS = 2048, 1024, 128, 256, 1 << 20
MAX_STOPS, MAX_STOP, MAX_SCHEMA, MAX_DEPTH, MAX_CHOICES = 16, 256, 256 << 10, 64, 1024

MAX_IGNORED = 20
NO_EFFECT: tuple[Any, ...] = (None, False, 0, "", [], {})
"""Values of unknown fields that ask for nothing."""

T = TypeVar("T", bound="Request")


class Model(BaseModel):
    """Part of a request. Types are strict: "1" is no number and 1 no text."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=(), populate_by_name=True
    )

    def as_dict(self) -> dict[str, Any]:
        """What has a value of the declared fields, which must have no models inside, by the client's names."""
        named = ((field.alias or name, getattr(self, name)) for name, field in type(self).model_fields.items())
        return {name: value for name, value in named if value is not None}


class Request(Model):
    """A whole request."""

    refused: ClassVar[dict[str, str]] = {}
    """Field that is not supported → what to do instead."""

    _ignored: list[str] = PrivateAttr(default_factory=list)

    @property
    def ignored(self) -> list[str]:
        """Places of the first fields of the request that no model declares."""
        return self._ignored


def parse(kind: type[T], body: bytes) -> T:
    """The request in a body of JSON. Raises `ApiError` 400 that names the field that is wrong or not supported."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error) from None
    for name, value in (request.model_extra or {}).items():
        if name in kind.refused and value not in NO_EFFECT:
            raise ApiError(f"{name} is not supported: {kind.refused[name]}", param=name, code="unsupported_parameter")
    request._ignored = [*(request.model_extra or {}), *_unknown(request)][:MAX_IGNORED]
    return request


def _unknown(value: Any, place: str = "") -> Iterator[str]:
    """Places of fields inside the fields of a request that no model declares, and that have a value."""
    if isinstance(value, list):
        for number, each in enumerate(value if value and isinstance(value[0], Model) else ()):
            yield from _unknown(each, f"{place}{number}.")
    elif isinstance(value, Model):
        if place:
            yield from (place + name for name, own in (value.model_extra or {}).items() if own not in NO_EFFECT)
        for name, field in type(value).model_fields.items():
            if isinstance(own := getattr(value, name), list | Model):
                yield from _unknown(own, f"{place}{field.alias or name}.")


def _depth(value: Any, limit: int) -> int:
    if limit < 0 or not isinstance(value, dict | list):
        return 0
    items = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(item, limit - 1) for item in items), default=0)


def _bounded(value: dict[str, Any]) -> dict[str, Any]:
    if _depth(value, MAX_DEPTH) > MAX_DEPTH:
        raise PydanticCustomError("too_deep", f"Value may be nested {MAX_DEPTH} deep")
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except ValueError:
        raise PydanticCustomError("not_finite", "Numbers must be finite") from None
    if size > MAX_SCHEMA:
        raise PydanticCustomError("too_long", f"Value may have {MAX_SCHEMA:,} characters as JSON")
    return value


def _choices(value: list[str]) -> list[str]:
    if sum(map(len, value)) > MAX_SCHEMA:
        raise PydanticCustomError("too_long", f"Choices may have {MAX_SCHEMA:,} characters together")
    return value


def _text_part(value: str) -> str:
    if value not in ("text", "input_text", "output_text"):
        raise PydanticCustomError("part_type", "Only parts of text are supported")
    return value


def _function_tool(value: str) -> str:
    if value != "function":
        raise PydanticCustomError("tool_type", "Only tools of type 'function' are supported")
    return value


Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=512)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
Object = Annotated[dict[str, Any], AfterValidator(_bounded)]
Pattern = Annotated[str, Field(min_length=1, max_length=MAX_SCHEMA)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Stop = StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES), AfterValidator(_choices)
]
FunctionName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\w.:-]+$")]
PartType = Annotated[str, Field(max_length=64), AfterValidator(_text_part)]
ToolType = Annotated[str, Field(max_length=64), AfterValidator(_function_tool)]


# Messages and tools


class TextPart(Model):
    type: PartType = "text"
    text: Text


class FunctionCall(Model):
    name: FunctionName
    arguments: Text = "{}"


class ToolCall(Model):
    id: Name = ""
    type: ToolType = "function"
    function: FunctionCall


class Message(Model):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None


class Function(Model):
    name: FunctionName
    description: Annotated[str, Field(max_length=MAX_SCHEMA)] | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Model):
    type: ToolType = "function"
    function: Function


class FunctionChoice(Model):
    name: FunctionName


class NamedTool(Model):
    type: ToolType = "function"
    function: FunctionChoice


class AllowedNames(Model):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Model):
    """The prompt shows all tools, and only these may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedNames

    @property
    def names(self) -> set[str]:
        return {tool.function.name for tool in self.allowed_tools.tools}


def choice_kind(value: object) -> str:
    """Which form a `tool_choice` has, so that an error is about that one."""
    if not isinstance(value, dict | Model):
        return "Mode"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "Allowed" if kind == "allowed_tools" else "Named"


Mode = Literal["none", "auto", "required"]
ToolChoice = Annotated[
    Annotated[Mode, Tag("Mode")] | Annotated[NamedTool, Tag("Named")] | Annotated[AllowedTools, Tag("Allowed")],
    Discriminator(choice_kind),
]

Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


# Structured output


class Schema(Model):
    name: Name = ""
    description: Text | None = None
    schema_: Annotated[Object | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None
    schema_: Annotated[Object | None, Field(alias="schema")] = None
    """llama.cpp's place for it, beside `type`."""


class StructuredOutputs(Model):
    """vLLM's way to restrict the answer. One of these."""

    json_: Annotated[Object | Pattern | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None


# Generation


class StreamOptions(Model):
    include_usage: bool | None = None


NO_CODE = {
    "chat_template": "a request cannot bring a template; start the server with --chat-template",
    "model_path": "a request cannot choose files; start the server with the model",
    "lora": "this version has no LoRA",
    "lora_request": "this version has no LoRA",
    "logits_processors": "a request cannot bring code",
    "prompt_embeds": "send text or token ids",
    "multi_modal_data": "this server reads text only",
}
NOT_SUPPORTED = {
    **NO_CODE,
    "use_beam_search": "use n with a temperature above 0",
    "length_penalty": "it is for beam search",
    "prompt_logprobs": "use echo with logprobs in /v1/completions",
    "include_stop_str_in_output": "stop strings are never part of the text",
    "allowed_token_ids": "use logit_bias or a grammar",
    "bad_words": "use logit_bias",
    "truncate_prompt_tokens": "a prompt that does not fit is an error",
    "guided_json": "use response_format or structured_outputs",
    "guided_regex": "use structured_outputs",
    "guided_choice": "use structured_outputs",
    "guided_grammar": "use structured_outputs",
    "mirostat": "use temperature, top_k, top_p and min_p",
}


class Generation(Request):
    """What all requests that generate have in common. OpenAI's defaults, not those of `SamplingParams`."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_BIASES // 2)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    priority: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)] | None = None
    user: Name | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    regex: Pattern | None = None
    grammar: Pattern | None = None
    json_schema: Object | None = None


class ChatRequest(Generation):
    """/v1/chat/completions."""

    refused: ClassVar[dict[str, str]] = {
        **NOT_SUPPORTED,
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "this server writes text only",
        "web_search_options": "this server does not search",
        "documents": "put their text into a message",
        "echo": "a chat does not repeat its prompt",
    }
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=4)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Object | None = None


Prompt = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)


class CompletionRequest(Generation):
    """/v1/completions."""

    refused: ClassVar[dict[str, str]] = {**NOT_SUPPORTED, "suffix": "this server does not fill in the middle"}
    prompt: Prompt
    max_completion_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    special: bool | None = None
    """Whether control tokens that a prompt spells out are tokens."""


# Tokens


class TokenizeRequest(Request):
    """/tokenize. `content` is llama.cpp's, `prompt` and `messages` are vLLM's. One of them."""

    refused: ClassVar[dict[str, str]] = NO_CODE
    model: Name | None = None
    content: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools | None = None
    chat_template_kwargs: Object | None = None


class DetokenizeRequest(Request):
    """/detokenize."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


class TemplateRequest(Request):
    """/apply-template."""

    refused: ClassVar[dict[str, str]] = NO_CODE
    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools | None = None
    chat_template_kwargs: Object | None = None


def plain_text(content: str | list[TextPart] | None) -> str | None:
    """The text of a content. Parts are joined by line breaks, as llama.cpp and vLLM do."""
    return "\n".join(part.text for part in content) if isinstance(content, list) else content


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: text, and arguments of calls as objects."""
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": plain_text(message.content)}
    if found["content"] is None:
        found["content"] = ""
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _arguments(text: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def choice_pattern(choices: list[str]) -> str:
    """A regular expression that matches one of the texts."""
    return "|".join(f"({re.escape(choice)})" for choice in choices)
