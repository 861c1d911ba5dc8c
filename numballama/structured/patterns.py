"""Regular expressions of a schema: what Rust reads in another way, and what llguidance does."""

from __future__ import annotations

import re

UNWRITTEN = r"\x00-\x07\x0b\x0e-\x1f\x7f"
"""The control characters without a short escape, as a class has them. No text has them, so none is lost with them."""
_WIDE = re.compile(r"[\x00-\x1f\x7f]|\\[xuUpPDWSHVcC0abefnrtv]")
"""What a character class may have that holds control characters."""
_LITERAL = re.compile(
    r"[\x00-\x1f\x7f]|\\[av]"
    r"|\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|[xuU]\{([0-9a-fA-F]{1,8})\})"
)
"""A character of its own that may be a control character."""
_UNWRITTEN = re.compile(f"[{UNWRITTEN}]")
_PROPERTY = re.compile(r"\\[pP](?:\{[^}]*\}|.)", re.DOTALL)


def without_control(pattern: str) -> str:
    """The expression without the control characters that no text has.

    llguidance lets a string have \\" and \\\\ wherever a class has all control characters: `[^"]` would allow a quote.
    And it leaves one out that stands alone: `a\\x02b` would allow "ab".
    """
    parts: list[str] = []
    at = 0
    while at < len(pattern):
        if (found := _PROPERTY.match(pattern, at)) is not None:
            parts.append(f"[{found[0]}&&[^{UNWRITTEN}]]")
            at = found.end()
        elif (found := _LITERAL.match(pattern, at)) is not None:
            parts.append(r"[^\s\S]" if _is_unwritten(found) else found[0])  # a class that matches nothing
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


def _is_unwritten(literal: re.Match[str]) -> bool:
    if literal[0] in (r"\a", r"\v"):
        return True
    digits = next(filter(None, literal.groups()), None)
    code = ord(literal[0]) if digits is None else int(digits, 16)
    return code < 0x80 and _UNWRITTEN.match(chr(code)) is not None


def _end_of_class(pattern: str, at: int) -> int:
    """Where the `]` of a class is that begins at `at`. `unclear_class` has refused classes inside classes."""
    at += 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return min(at, len(pattern))


def _narrow(inside: str) -> str:
    """A class, given what is between its brackets, without `UNWRITTEN`."""
    if inside.startswith("^"):
        escape = "\\" if inside.startswith("^-") else ""  # a hyphen at the beginning is no range
        return f"[^{UNWRITTEN}{escape}{inside[1:]}]"
    if not _WIDE.search(inside):
        return f"[{inside}]"
    if inside.endswith("-") and not inside.endswith("\\-"):
        inside = f"{inside[:-1]}\\-"
    return f"[{inside}&&[^{UNWRITTEN}]]"


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
