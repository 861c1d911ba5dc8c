"""What clients send to /v1/responses."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from ..sampling import MAX_LOGPROBS
from .fields import (
    MAX_IGNORED,
    MAX_INT,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    Description,
    FunctionName,
    Name,
    Object,
    Pattern,
    Request,
    RequestPart,
    Text,
    TextPart,
    at_most,
)
from .protocol import NO_CODE
from .tool_fields import Mode, ToolType, choice_kind, tool_kind


class Item(RequestPart):
    """A part of the input: a message, a call, or what a call gave."""

    type: Literal[
        "message", "function_call", "function_call_output", "reasoning", "custom_tool_call", "custom_tool_call_output"
    ] = "message"  # fmt: skip
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None
    call_id: Name | None = None
    name: FunctionName | None = None
    arguments: Text | None = None
    input: Text | None = None
    output: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None


class FunctionTool(RequestPart):
    type: ToolType
    name: FunctionName
    description: Description | None = None
    parameters: Object | None = None
    strict: bool | None = None


class InputFormat(RequestPart):
    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: Pattern | None = None


class FlatCustomTool(RequestPart):
    """A tool whose input is a text. Its fields stand beside `type`; `tool_fields.CustomTool` has them in an object."""

    type: Literal["custom"]
    name: FunctionName
    description: Description | None = None
    format: InputFormat | None = None


class NamedFunction(RequestPart):
    type: ToolType = "function"
    name: FunctionName


class NamedCustomTool(RequestPart):
    type: Literal["custom"]
    name: FunctionName


AnyNamedTool = Annotated[
    Annotated[NamedFunction, Tag("Function")] | Annotated[NamedCustomTool, Tag("Custom")], Discriminator(tool_kind)
]


class AllowedFunctions(RequestPart):
    """The prompt shows all tools, and only these may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[AnyNamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


ResponsesToolChoice = Annotated[
    Annotated[Mode, Tag("Mode")]
    | Annotated[NamedFunction, Tag("Named")]
    | Annotated[NamedCustomTool, Tag("Custom")]
    | Annotated[AllowedFunctions, Tag("Allowed")],
    Discriminator(choice_kind),
]


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("Function")] | Annotated[FlatCustomTool, Tag("Custom")], Discriminator(tool_kind)
]


class TextFormat(RequestPart):
    type: Literal["text", "json_object", "json_schema"]
    name: Name = ""
    schema_: Annotated[Object | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(RequestPart):
    format: TextFormat | None = None


MAX_METADATA = 64
LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs", "reasoning.encrypted_content", "message.input_image.image_url",
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "code_interpreter_call.outputs", "computer_call_output.output.image_url",
]  # fmt: skip
"""What clients may ask to be included. All but the first are of inputs and tools that this server does not have."""


class ResponsesRequest(Request):
    """/v1/responses."""

    refused: ClassVar[dict[str, str]] = {
        **NO_CODE,
        "previous_response_id": "nothing is stored; send the conversation as input",
        "conversation": "nothing is stored; send the conversation as input",
        "background": "use stream",
        "prompt": "send instructions and input",
        "max_tool_calls": "the server calls no tools",
    }
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
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
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA), at_most(MAX_METADATA)] | None = None
    include: Annotated[list[Include], Field(max_length=64)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    user: Name | None = None
    store: bool | None = None
    chat_template_kwargs: Object | None = None

    @property
    def ignored(self) -> list[str]:
        """As `Request.ignored`, and the places in `include` of what no answer has."""
        nothing = [f"include.{index}" for index, each in enumerate(self.include or ()) if each != LOGPROBS]
        return [*super().ignored, *nothing][:MAX_IGNORED]

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())
