"""Grammars that make a model call tools, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .definitions import Tool


@dataclass(frozen=True)
class CallText:
    """How a format's calls are spelled. The texts may contain markers and `CALL_ID`."""

    before: str = ""
    """Before the first call."""
    begin: str = '{"name": "'
    middle: str = '", "arguments": '
    """Between a call's name and its arguments."""
    end: str = "}"
    between: str = "\n"
    """Between two calls."""
    after: str = ""
    """After the last call."""


CALL_ID = "\0"
"""Stands in a `CallText` for an id of 9 alphanumeric characters."""


def build(
    call_text: CallText,
    tools: Sequence[Tool],
    parallel: bool,
    markers: Mapping[str, int | None],
    reasoning: tuple[str, str] | None,
    in_reasoning: bool,
) -> str:
    """A grammar of one or, with `parallel`, more calls of the tools.

    `markers`: text of each marker → its token id, None for one that is plain text. With `reasoning`, an answer may
    begin with reasoning; with `in_reasoning` it begins inside it.
    """

    def spell(text: str) -> str:
        return " ".join(_pieces(text, markers))

    rules = []
    start = [spell(call_text.before), "call", spell(call_text.after)]
    if parallel:
        start[1] = f"call ({spell(call_text.between)} call)*"
    if reasoning is not None:
        first, last = reasoning
        inside = _inside(last, markers)
        start.insert(0, "inside" if in_reasoning else "reasoning?")
        if not in_reasoning:
            rules.append(f"reasoning: {spell(first)} inside")
        rules += [f"inside: {inside[0]}", inside[1]]
    rules.insert(0, "start: " + " ".join(filter(None, start)))
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        head, tail = spell(f"{call_text.begin}{tool.name}{call_text.middle}"), spell(call_text.end)
        rules.append(f"call_{number}: {head} arguments_{number} {tail}".rstrip())
        rules.append(f"arguments_{number}: %json {json.dumps(tool.parameters)}")
    if CALL_ID in call_text.middle:
        rules.append("CALL_ID: /[a-zA-Z0-9]{9}/")
    return "\n".join(rules) + "\n"


def _inside(last: str, markers: Mapping[str, int | None]) -> tuple[str, str]:
    """The rest of the reasoning: what the rule says, and the rule of its text."""
    token = markers.get(last)
    if token is None:
        return r"thoughts /\n{0,2}/", f"thoughts[suffix={json.dumps(last)}]: /(?s:.*)/"
    return rf"thoughts <[{token}]> /\n{{0,2}}/", "thoughts: /(?s:.*)/"


def _pieces(text: str, markers: Mapping[str, int | None]) -> list[str]:
    """A text as terms of a rule: strings, and token ids for markers that are control tokens."""
    terms = []
    while text:
        found = [(text.find(marker), marker) for marker in (*markers, CALL_ID) if marker in text]
        at, marker = min(found, default=(len(text), ""))
        if at:
            terms.append(json.dumps(text[:at]))
        if marker == CALL_ID:
            terms.append("CALL_ID")
        elif marker:
            token = markers[marker]
            terms.append(json.dumps(marker) if token is None else f"<[{token}]>")
        text = text[at + len(marker) :]
    return terms
