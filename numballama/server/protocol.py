"""What clients send: the request models. Every number, list and string has limits.

A wrong value is an error that names its field. A field that no model declares is ignored, and a header of the answer
says so. But one that `refused` names is an error: it would change the answer, and is not supported. What has no effect
(null, false, an empty list) is accepted everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..sampling import MAX_BIASES, MAX_LOGPROBS, MAX_N
from .errors import ApiError
from .fields import (
    MAX_INT,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_PROMPTS,
    MAX_TOKENS,
    MAX_TOOLS,
    Choices,
    Count,
    Name,
    Object,
    Pattern,
    Request,
    RequestPart,
    Stop,
    Text,
    TextPart,
    TokenId,
    TokenIds,
    at_most,
)
from .tool_fields import AnyCall, CustomCall, ToolCall, ToolChoice, Tools
from .tools.custom import INPUT


class Message(RequestPart):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[AnyCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class Schema(RequestPart):
    name: Name = ""
    description: Text | None = None
    schema_: Annotated[Object | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(RequestPart):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None
    schema_: Annotated[Object | None, Field(alias="schema")] = None
    """llama.cpp's place for it, beside `type`."""


class StructuredOutputs(RequestPart):
    """vLLM's way to restrict the answer. One of these."""

    json_: Annotated[Object | Pattern | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None


class StreamOptions(RequestPart):
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


class GenerationRequest(Request):
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
            at_most(MAX_BIASES),
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


class ChatRequest(GenerationRequest):
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


class CompletionRequest(GenerationRequest):
    """/v1/completions."""

    refused: ClassVar[dict[str, str]] = {**NOT_SUPPORTED, "suffix": "this server does not fill in the middle"}
    prompt: Prompt
    max_completion_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    special: bool | None = None
    """Whether control tokens that a prompt spells out are tokens."""


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
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]


class TemplateRequest(Request):
    """/apply-template."""

    refused: ClassVar[dict[str, str]] = NO_CODE
    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools | None = None
    chat_template_kwargs: Object | None = None


def check_count(messages: Sequence[Message], place: str) -> None:
    """Raise `ApiError` 400 for more messages than a chat may have. `place`: the request's field that they are from."""
    if len(messages) > MAX_MESSAGES:
        what = f"a system message and each result of a tool are one, and at most {MAX_MESSAGES:,} are possible"
        raise ApiError(f"{place}: too many messages; {what}", param=place, code="invalid_value")


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
            {"id": call.id, "type": "function", "function": _called(call)} for call in message.tool_calls
        ]
    return found


def _called(call: ToolCall | CustomCall) -> dict[str, Any]:
    if isinstance(call, CustomCall):
        return {"name": call.custom.name, "arguments": {INPUT: call.custom.input}}
    return {"name": call.function.name, "arguments": _arguments(call.function.arguments)}


def _arguments(text: str) -> dict[str, Any] | str:
    """The arguments of a call as an object; what is none, as a model may write, as it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def choice_pattern(choices: list[str]) -> str:
    """A regular expression that matches one of the texts."""
    return "|".join(f"({re.escape(choice)})" for choice in choices)
