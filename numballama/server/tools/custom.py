"""OpenAI's custom tools: a model calls them with a text, which it writes as the one argument of a function."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from .events import CallArguments, CallStart, Event

INPUT = "input"
"""Name of the argument."""
_OPENS = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
_PIECE = re.compile(r'[^"\\]+|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[^u]')
_GROUPS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()]", re.DOTALL)
"""An escape, a class, or a parenthesis."""
_BEGUN = re.compile(r"\\(u[0-9a-fA-F]{0,3})?|\\u[dD][89abAB][0-9a-fA-F]{2}(\\(u[0-9a-fA-F]{0,3})?)?")
"""The beginning of an escape, or of a pair of them, which the next piece may complete."""


def custom_parameters(pattern: str | None) -> dict[str, Any]:
    """JSON schema of the arguments, with an input that matches the regular expression `pattern` as a whole."""
    text = {"type": "string"} if pattern is None else {"type": "string", "pattern": f"^(?:{pattern})$"}
    return {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}


def closes_too_much(pattern: str) -> bool:
    """Whether a regular expression closes a group that it has not opened, such as `a)|(b`.

    It would be a valid one with a group around it, as `custom_parameters` writes it, and match other texts.
    """
    depth = 0
    for found in _GROUPS.finditer(pattern):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth < 0:
            return True
    return False


class InputText:
    """Reads the input from the arguments of one call, which come in pieces.

    A model that no grammar restricts may write something else: then the input is what it wrote.
    """

    def __init__(self) -> None:
        self._rest = ""
        self._is_open = self._is_done = False

    def feed(self, piece: str) -> str:
        """What a piece of the arguments adds to the input."""
        self._rest += piece
        if not self._is_open:
            opened = _OPENS.match(self._rest)
            if opened is None:
                return ""
            self._rest, self._is_open = self._rest[opened.end() :], True
        return self._read()

    def finish(self) -> str:
        """The rest of the input: there are no more pieces."""
        if self._is_open or f'{{"{INPUT}":"'.startswith("".join(self._rest.split())):
            return ""  # all was returned by `feed`, or the answer was cut off before the input
        try:
            found = json.loads(self._rest)[INPUT]
        except (ValueError, RecursionError, LookupError, TypeError):
            return self._rest
        return found if isinstance(found, str) else self._rest

    def _read(self) -> str:
        at, found = 0, ""
        while not self._is_done and at < len(self._rest) and not _BEGUN.fullmatch(self._rest, at):
            if (piece := _PIECE.match(self._rest, at)) is None:
                self._is_done = True  # the closing quote, or no JSON
                break
            found, at = found + _plain(piece.group()), piece.end()
        self._rest = "" if self._is_done else self._rest[at:]
        return found


def _plain(piece: str) -> str:
    """Characters of a JSON string without escapes. Half of a surrogate pair is U+FFFD."""
    if piece[0] != "\\":
        return piece
    try:
        return str(json.loads(f'"{piece}"')).encode(errors="strict").decode()
    except ValueError:
        return "\ufffd" if piece[1] == "u" else piece[1:]


class CustomCalls:
    """Turns the events of calls to custom tools, in one answer, into those of their inputs. Others stay as they are."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._open: tuple[int, InputText] | None = None

    def convert(self, events: Iterable[Event], ended: bool) -> Iterator[Event]:
        """The events. `ended`: they are the answer's last."""
        for event in events:
            if isinstance(event, CallStart):
                yield from self._close()
                if event.name in self._names:
                    self._open = event.index, InputText()
                    event = replace(event, custom=True)
            elif isinstance(event, CallArguments) and self._open is not None and event.index == self._open[0]:
                if text := self._open[1].feed(event.text):
                    yield CallArguments(event.index, text, custom=True)
                continue
            yield event
        if ended:
            yield from self._close()

    def _close(self) -> Iterator[Event]:
        if self._open is not None and (text := self._open[1].finish()):
            yield CallArguments(self._open[0], text, custom=True)
        self._open = None
