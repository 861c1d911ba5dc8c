"""Custom tools of a request as functions, which is how the model sees them."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ApiError
from .tool_fields import Custom, CustomTool, Function, Tool
from .tools.custom import closes_too_much, custom_parameters


def as_functions(tools: Sequence[Tool | CustomTool] | None) -> list[Tool] | None:
    """All tools of a request as functions. Raises `ApiError` 400 for a grammar that cannot be enforced."""
    if tools is None:
        return None
    return [
        tool if isinstance(tool, Tool) else Tool(function=_function(tool.custom, f"tools.{number}.custom"))
        for number, tool in enumerate(tools)
    ]


def custom_names(tools: Sequence[Tool | CustomTool] | None, with_grammar: bool = False) -> frozenset[str]:
    """Names of the custom tools, or of those whose input has a grammar."""
    custom = [tool.custom for tool in tools or () if isinstance(tool, CustomTool)]
    return frozenset(each.name for each in custom if each.grammar is not None or not with_grammar)


def _function(tool: Custom, place: str) -> Function:
    grammar = tool.grammar
    if grammar is not None and grammar.syntax == "lark":
        message = "inputs are texts inside JSON, in which a Lark grammar is not enforced; use syntax 'regex'"
        param = f"{place}.format.grammar.syntax"
        raise ApiError(f"{param}: {message}", param=param, code="unsupported_value")
    pattern = None if grammar is None else grammar.definition
    if pattern is not None and closes_too_much(pattern):
        param = f"{place}.format.grammar.definition"
        raise ApiError(f"{param}: a parenthesis closes no group", param=param, code="invalid_value")
    return Function(name=tool.name, description=tool.description, parameters=custom_parameters(pattern))
