"""Regular expressions of a schema: what Rust reads in another way, and what llguidance does."""

from __future__ import annotations

import re

NEVER = "\\x01"
"""A control character without a short escape, as an expression writes it. No text has it, so none is lost with it."""
_WIDE = re.compile(r"[\x00-\x1f]|\\[xuUpPDWSHVcC0abefnrtv]")
"""What a character class may have that holds control characters."""
_LITERAL = re.compile(r"\x01|\\x01|\\u0001|\\U00000001|\\[xuU]\{0*1\}")
"""Spellings of `NEVER` as a character of its own."""
_PROPERTY = re.compile(r"\\[pP](?:\{[^}]*\}|.)", re.DOTALL)


def without_control(pattern: str) -> str:
    """The expression with character classes that lack one control character.

    llguidance lets a string have \\" and \\\\ wherever a class has all control characters: `[^"]` would allow a quote.
    """
    parts: list[str] = []
    at = 0
    while at < len(pattern):
        if (found := _PROPERTY.match(pattern, at)) is not None:
            parts.append(f"[{found[0]}&&[^{NEVER}]]")
            at = found.end()
        elif (found := _LITERAL.match(pattern, at)) is not None:
            parts.append(r"[^\s\S]")  # matches nothing
            at = found.end()
        elif pattern[at] == "\\":
            parts.append(pattern[at : at + 2])
            at += 2
        elif pattern[at] == "[":
            end = _end_of_class(pattern, at)
            parts.append(_narrow(pattern[at + 1 : end]) if end < len(pattern) else pattern[at:])
            at = end + 1
        else:
            parts.append(pattern[at])
            at += 1
    return "".join(parts)


def _end_of_class(pattern: str, at: int) -> int:
    """Where the `]` of a class is that begins at `at`. `unclear_class` has refused classes inside classes."""
    at += 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return min(at, len(pattern))


def _narrow(inside: str) -> str:
    """A class, given what is between its brackets, without `NEVER`."""
    if inside.startswith("^"):
        escape = "\\" if inside.startswith("^-") else ""  # a hyphen at the beginning is no range
        return f"[^{NEVER}{escape}{inside[1:]}]"
    if not _WIDE.search(inside):
        return f"[{inside}]"
    if inside.endswith("-") and not inside.endswith("\\-"):
        inside = f"{inside[:-1]}\\-"
    return f"[{inside}&&[^{NEVER}]]"


def unclear_class(pattern: str) -> str | None:
    """What a character class of an expression has that Rust reads as an operation on sets, others as characters."""
    inside, at = False, 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 2
            continue
        if not inside:
            if pattern[at] == "[":
                inside = True
                at += 1 + pattern.startswith("^", at + 1)
                if pattern.startswith("]", at):
                    return "]"
                continue
        elif pattern[at] == "]":
            inside = False
        elif pattern[at] == "[" or pattern[at : at + 2] in ("&&", "--", "~~"):
            return pattern[at : at + 2] if pattern[at] != "[" else "["
        at += 1
    return None
