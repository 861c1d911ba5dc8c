"""Tool calls and reasoning in generated text: formats, an incremental parser, and grammars that enforce calls."""

from .definitions import CheckedTool, check_tools
from .events import CallArguments, CallStart, Content, Event, Reasoning
from .formats import ToolFormat, choose_format
from .parser import Parser

__all__ = [
    "CallArguments",
    "CallStart",
    "CheckedTool",
    "Content",
    "Event",
    "Parser",
    "Reasoning",
    "ToolFormat",
    "check_tools",
    "choose_format",
]
