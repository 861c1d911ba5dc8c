"""Formats of strings, written so that masks take their tokens from tables (`vocabulary.SLICES`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .schema import VALUES
from .vocabulary import ATOM, WORD

DEFINITIONS = ("$defs", "definitions")
NAMED = ("properties", "patternProperties", *DEFINITIONS)
"""Keywords with an object of schemas."""
_OCTET = "(25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])"
PATTERNS = {
    # its format has labels as x([x-]*x)?: the same texts, but no repeated class, which alone is looked up in a table
    "email": rf"^{ATOM}+(\.{ATOM}+)*@({WORD}+((-+|\.){WORD}+)*|\[({_OCTET}\.){{3}}{_OCTET}\])$",
}
"""Format → an expression of the same texts."""


def with_patterns(schema: Any) -> Any:
    """A schema that `check_schema` has returned, with the expressions of `PATTERNS` in place of their formats."""
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in VALUES:
            found[keyword] = value
        elif keyword in NAMED:
            found[keyword] = {name: with_patterns(inner) for name, inner in value.items()}
        elif keyword == "format" and value in PATTERNS and "pattern" not in schema:
            found["pattern"] = PATTERNS[value]
        elif isinstance(value, list):
            found[keyword] = [with_patterns(inner) for inner in value]
        else:
            found[keyword] = with_patterns(value)
    return found
