"""Tools, calls of them and choices among them, in requests to /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from .fields import MAX_TOOLS, Description, FunctionName, Name, Object, Pattern, RequestPart, Text


def _function_tool(value: str) -> str:
    if value != "function":
        raise PydanticCustomError("tool_type", "Only tools of type 'function' and 'custom' are supported")
    return value


ToolType = Annotated[str, Field(max_length=64), AfterValidator(_function_tool)]


class FunctionCall(RequestPart):
    name: FunctionName
    arguments: Text = "{}"


class ToolCall(RequestPart):
    id: Name = ""
    type: ToolType = "function"
    function: FunctionCall


class CustomInput(RequestPart):
    name: FunctionName
    input: Text = ""


class CustomCall(RequestPart):
    id: Name = ""
    type: Literal["custom"]
    custom: CustomInput


def tool_kind(value: object) -> str:
    """Which kind a tool, a call or a choice of a tool has, so that an error is about that one."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "Custom" if kind == "custom" else "Function"


_KIND = Discriminator(tool_kind)
AnyCall = Annotated[Annotated[ToolCall, Tag("Function")] | Annotated[CustomCall, Tag("Custom")], _KIND]


class Function(RequestPart):
    name: FunctionName
    description: Description | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(RequestPart):
    type: ToolType = "function"
    function: Function


class CustomGrammar(RequestPart):
    syntax: Literal["lark", "regex"]
    definition: Pattern


class CustomFormat(RequestPart):
    type: Literal["text", "grammar"]
    grammar: CustomGrammar | None = None

    @model_validator(mode="after")
    def _has_a_grammar(self) -> CustomFormat:
        if self.type == "grammar" and self.grammar is None:
            raise PydanticCustomError("grammar", "A format of type 'grammar' needs its grammar")
        return self


class Custom(RequestPart):
    name: FunctionName
    description: Description | None = None
    format: CustomFormat | None = None

    @property
    def grammar(self) -> CustomGrammar | None:
        return None if self.format is None or self.format.type == "text" else self.format.grammar


class CustomTool(RequestPart):
    """A tool whose input is a text."""

    type: Literal["custom"]
    custom: Custom


class FunctionChoice(RequestPart):
    name: FunctionName


class NamedTool(RequestPart):
    type: ToolType = "function"
    function: FunctionChoice

    @property
    def name(self) -> str:
        return self.function.name


class NamedCustom(RequestPart):
    type: Literal["custom"]
    custom: FunctionChoice

    @property
    def name(self) -> str:
        return self.custom.name


AnyNamed = Annotated[Annotated[NamedTool, Tag("Function")] | Annotated[NamedCustom, Tag("Custom")], _KIND]


class AllowedNames(RequestPart):
    mode: Literal["auto", "required"]
    tools: Annotated[list[AnyNamed], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(RequestPart):
    """The prompt shows all tools, and only these may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedNames

    @property
    def names(self) -> set[str]:
        return {tool.name for tool in self.allowed_tools.tools}


def choice_kind(value: object) -> str:
    """Which form a `tool_choice` has, so that an error is about that one."""
    if not isinstance(value, dict | RequestPart):
        return "Mode"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"allowed_tools": "Allowed", "custom": "Custom"}.get(str(kind), "Named")


Mode = Literal["none", "auto", "required"]
ToolChoice = Annotated[
    Annotated[Mode, Tag("Mode")]
    | Annotated[NamedTool, Tag("Named")]
    | Annotated[NamedCustom, Tag("Custom")]
    | Annotated[AllowedTools, Tag("Allowed")],
    Discriminator(choice_kind),
]
AnyTool = Annotated[Annotated[Tool, Tag("Function")] | Annotated[CustomTool, Tag("Custom")], _KIND]
Tools = Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)]
