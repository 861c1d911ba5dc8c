"""Structured output: text that follows a JSON Schema, a regular expression or a grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler import compile_constraint as compile_constraint


def __getattr__(name: str) -> Any:  # the process that tries grammars out needs none of its imports
    if name != "compile_constraint":
        raise AttributeError(name)
    from .compiler import compile_constraint

    return compile_constraint
