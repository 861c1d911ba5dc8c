"""Lark grammars, as llguidance writes them: checks their embedded schemas, and what the engine cannot do is refused."""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import Error
from .formats import with_patterns
from .schema import check_schema

MAX_GRAMMAR = 64 * 1024
"""Largest grammar or regular expression in bytes of UTF-8."""
SCHEMA_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
}
"""llguidance's options for a schema: one space may follow a comma and a colon, otherwise no white space. Without `u`
each string has one spelling, so a name cannot be spelled in another way to evade its schema."""
OPTIONS = '%llguidance {"no_forcing": true}\n'
"""Leave the choice of tokens for a text that the grammar forces to the model. llguidance would encode it by a call to
Python in each mask, and a grammar that forces an endless text would take for ever."""
ALLOWED_OPTIONS = {"no_forcing", "allow_initial_skip", "ignore_once"}
REFUSED_ATTRIBUTES = {"temperature", "max_tokens", "stop"}
"""Attributes of rules that change sampling or take tokens back."""

NEWLINE = "\n"
_IS_LARK = re.compile(r"^[^\S\n]*(?:%llguidance\b|start\s*:)", re.MULTILINE)
"""What only Lark has. llguidance looks for the same in a time that is the square of the number of empty lines."""
_TOKEN = re.compile(
    r"""(?P<comment>(?:\#|//)[^\n]*)
    | (?P<string>"(?:\\.|[^"\\\n])*"i?)
    | (?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
    | (?P<special><[^<>\s]+>)
    | (?P<keyword>%(?:json|regex|llguidance)|%[a-z]+)
    | (?P<attribute>[a-z_]+(?=\s*=))
    | (?P<name>[A-Za-z_][A-Za-z_0-9-]*)
    | (?P<space>[ \t\r\n]+)
    | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


def schema_grammar(schema: str) -> str:
    """The grammar of a schema that `check_schema` has returned."""
    return f"start: {_embed(schema)}\n{OPTIONS}"


def regex_grammar(expression: str) -> str:
    r"""The grammar of texts that a regular expression matches as a whole. \d, \w and \s are of ASCII."""
    from llguidance import regex_to_lark

    if not expression:
        raise Error("regex is empty: it matches only the empty text")
    literal = f"/{regex_to_lark(expression, 'dws')}/"
    found = _TOKEN.match(literal)
    if found is None or found.lastgroup != "regex" or found.end() != len(literal):
        raise Error(f"regex cannot be written in a grammar: {expression!r:.200}")
    return f"start: {literal}\n{OPTIONS}"


def to_lark(grammar: str) -> str:
    """The grammar in Lark's syntax: itself, or converted from GBNF. Raises `Error` for neither."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if _IS_LARK.search(grammar) is not None:
        return grammar
    try:
        return gbnf_to_lark(grammar)
    except RecursionError:
        raise Error("grammar: nested too deeply") from None
    except Exception as error:
        raise Error(f"grammar has no rule start:, so it is read as GBNF, and that fails: {error!s:.300}") from None


def check_grammar(grammar: str) -> tuple[str, str]:
    """A Lark grammar with checked schemas, and the same without special tokens, which need no vocabulary.

    Raises `Error` for a schema that is not enforced as a whole, and for what changes sampling.
    """
    parts: list[str] = []
    probe: list[str] = []
    at = 0
    while at < len(grammar):
        match = _TOKEN.match(grammar, at)
        assert match is not None  # the last alternative takes any character
        kind, text, at = match.lastgroup, match[0], match.end()
        if kind == "comment":
            continue
        place = f"grammar: line {grammar.count(NEWLINE, 0, at) + 1}:" if kind not in ("space", "other", "name") else ""
        if kind in ("string", "regex", "special") and "%" in text and re.search(r"%(json|regex|llguidance)", text):
            raise Error(f"{place} {text!r:.100} spells a keyword; write its % as \\x25")
        if kind == "other" and text in ('"', "/"):  # what follows each quote would be read to the end
            raise Error(f"grammar: line {grammar.count(NEWLINE, 0, at) + 1}: what begins with {text} has no end")
        if kind == "attribute" and text in REFUSED_ATTRIBUTES:
            raise Error(f"{place} the attribute {text!r} is not supported; suffix and lazy are")
        if kind == "keyword" and text in ("%json", "%regex", "%llguidance"):
            value, at = _json(grammar, at, f"{place} what follows {text}")
            text = f"{text} {json.dumps(value)}"
            if match[0] == "%json":
                text = _embed(_checked(value, place))
            elif match[0] == "%llguidance":
                _check_options(value, place)
        parts.append(text)
        probe.append('"?"' if kind == "special" else text)
    return "".join(parts) + "\n" + OPTIONS, "".join(probe) + "\n" + OPTIONS


def _embed(schema: str) -> str:
    value = with_patterns(json.loads(schema))
    return f"%json {json.dumps({**value, 'x-guidance': SCHEMA_OPTIONS}, separators=(',', ':'))}"


def _json(grammar: str, at: int, what: str) -> tuple[Any, int]:
    start = at + len(grammar[at:]) - len(grammar[at:].lstrip(" \t\r\n"))
    try:
        return json.JSONDecoder(parse_constant=_refuse_constant).raw_decode(grammar, start)
    except RecursionError:
        raise Error(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise Error(f"{what} is not JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _checked(schema: object, place: str) -> str:
    if not isinstance(schema, dict | bool):
        raise Error(f"{place} %json needs a schema, found {schema!r:.100}")
    try:
        return check_schema(schema)
    except Error as error:
        raise Error(f"{place} {error}") from None


def _check_options(value: object, place: str) -> None:
    unknown = sorted(set(value) - ALLOWED_OPTIONS) if isinstance(value, dict) else [repr(value)[:100]]
    if unknown:
        raise Error(f"{place} the option {unknown[0]} of %llguidance is not supported")
