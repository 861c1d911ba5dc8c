"""Grammars that make a model call tools, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .definitions import CheckedTool


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
    tools: Sequence[CheckedTool],
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

    start, rules = _reasoning(reasoning, in_reasoning, markers)
    calls = f"call ({spell(call_text.between)} call)*" if parallel else "call"
    start += [spell(call_text.before), calls, spell(call_text.after)]
    rules.insert(0, "start: " + " ".join(filter(None, start)))
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        head, tail = spell(f"{call_text.begin}{tool.name}{call_text.middle}"), spell(call_text.end)
        rules.append(f"call_{number}: {head} arguments_{number} {tail}".rstrip())
        rules.append(f"arguments_{number}: %json {json.dumps(tool.parameters)}")
    return _joined(rules, call_text)


def build_free(
    call_text: CallText,
    tools: Sequence[CheckedTool],
    opens: Sequence[str],
    separators: str,
    markers: Mapping[str, int | None],
    reasoning: tuple[str, str] | None,
    in_reasoning: bool,
    enforced: Collection[str] = (),
) -> str:
    """A grammar of text with any number of calls in it. What opens a call leads to the name of one of the tools.

    Arguments are any object, except those of the tools whose names are in `enforced`, which fit their schema. `opens`
    and `separators` as in `Dialect`, the others as in `build`. Plain text opens a call by a lazy lexeme, which wins
    against `TEXT` as soon as it matches; a control token is never part of `TEXT`.
    """

    def spell(text: str) -> str:
        return " ".join(_pieces(text, markers))

    start: list[str] = []
    rules: list[str] = []
    ends: list[str] = []
    if reasoning is not None:
        if in_reasoning or markers.get(reasoning[0]) is not None:
            start, rules = _reasoning(reasoning, in_reasoning, markers)
        if markers.get(reasoning[1]) is None:
            ends = [reasoning[1]]  # `TEXT` may hold reasoning
    head = call_text.before + call_text.begin
    opened = next((marker for marker in opens if head.startswith(marker)), None)
    if opened is not None:  # a marker, and the rest of the head follows it
        rest, tokens = spell(head[len(opened) :]), [markers.get(opened)]
        lazy = f"(?s:.*){_escaped(opened)}"
    else:  # an object, at the beginning, behind a call or behind a marker
        rest, tokens = "object", [markers.get(marker) for marker in opens]
        plain = [_escaped(marker) for marker in (*opens, *ends) if markers.get(marker) is None]
        behind = f"|(?s:.*)({'|'.join(plain)})" if plain else ""
        lazy = f"([{re.escape(separators)}{_SPACE}]*{behind}){_OBJECT}"
        if any(token is not None for token in tokens):
            rules.append(f"object[lazy]: /{_OBJECT}/")
    ways = [f"TEXT? <[{token}]> {rest}" for token in tokens if token is not None]
    if opened is None or markers.get(opened) is None:
        ways.append("open" if opened is None else f"open {rest}")
        rules.append(f"open[lazy]: /{lazy}/")
    call = " | ".join(f"call_{number}" for number in range(len(tools)))
    more = f"({spell(call_text.between)} {spell(call_text.begin)} call)* {spell(call_text.after)}"
    calls = f"({' | '.join(ways)}) call" + (f" {more}" if call_text.after else "")
    rules.insert(0, "start: " + " ".join([*start, "calls* TEXT?"]))
    rules += [f"calls: {calls}", f"call: {call}", "TEXT: /(?s:.+)/", 'arguments: %json {"type": "object"}']
    middle, tail = spell(call_text.middle), spell(call_text.end)
    for number, tool in enumerate(tools):
        arguments = "arguments"
        if tool.name in enforced:
            arguments = f"arguments_{number}"
            rules.append(f"{arguments}: %json {json.dumps(tool.parameters)}")
        rules.append(f'call_{number}: "{tool.name}" {middle} {arguments} {tail}'.rstrip())
    return _joined(rules, call_text)


_SPACE = r" \t\r\n"
_OBJECT = r'[S]*\{[S]*("type"[S]*:[S]*"function"[S]*,[S]*)?"name"[S]*:[S]*"'.replace("[S]", f"[{_SPACE}]")
"""Up to a call's name; Llama writes its type first now and then."""


def _joined(rules: Sequence[str], call_text: CallText) -> str:
    """A grammar of these rules, and of ids if calls have them."""
    ids = ["CALL_ID: /[a-zA-Z0-9]{9}/"] if CALL_ID in call_text.middle else []
    return "\n".join([*rules, *ids]) + "\n"


def _escaped(text: str) -> str:
    """A text as part of a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/")


def _reasoning(
    reasoning: tuple[str, str] | None, in_reasoning: bool, markers: Mapping[str, int | None]
) -> tuple[list[str], list[str]]:
    """(what `start` begins with, rules) of reasoning that comes first."""
    if reasoning is None:
        return [], []
    first, last = reasoning
    inside = _inside(last, markers)
    rules = [f"inside: {inside[0]}", inside[1]]
    if in_reasoning:
        return ["inside"], rules
    return ["reasoning?"], [f"reasoning: {' '.join(_pieces(first, markers))} inside", *rules]


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
