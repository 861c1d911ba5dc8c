"""An expression that stands for a format allows the same texts, byte by byte."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.structured.checker import make_matcher
from numballama.structured.formats import PATTERNS, with_patterns
from numballama.structured.lark import OPTIONS, schema_grammar
from tests.helpers.structured import byte_vocabulary

pytest.importorskip("llguidance")

LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?"
ATOM = r"[a-zA-Z0-9!#$%&'*+\-/=?^_`{|}~]+"
RFC = rf"{ATOM}(\.{ATOM})*@{LABEL}(\.{LABEL})*"
"""Mailboxes of RFC 5321 4.1.2, without quoted names and address literals."""


def grammar(schema: dict[str, Any]) -> str:
    """As llguidance writes the format itself."""
    return f"start: %json {json.dumps(schema)}\n{OPTIONS}"


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("more", [{}, {"maxLength": 9}, {"minLength": 12, "maxLength": 14}])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_same_bytes_may_follow(name: str, more: dict[str, Any], data: st.DataObject) -> None:
    schema = {"type": "string", "format": name, **more}
    pair = [make_matcher(byte_vocabulary(), text) for text in (grammar(schema), schema_grammar(json.dumps(schema)))]
    rng, preferred = random.Random(data.draw(st.integers(0, 10**9))), data.draw(st.sampled_from([b"", b'a.-@"[]0125']))
    for _ in range(40):
        masks = [each.compute_bitmask() for each in pair]
        assert masks[0] == masks[1] and not pair[0].is_error()
        bits = int.from_bytes(masks[0], "little")
        allowed = [byte for byte in range(256) if bits >> byte & 1]
        if not allowed:
            break
        byte = rng.choice([byte for byte in allowed if byte in preferred] or allowed)
        assert pair[0].consume_token(byte) and pair[1].consume_token(byte)
        if pair[0].is_stopped():
            break


def test_an_address_is_what_the_rfc_says() -> None:
    ours, theirs = re.compile(PATTERNS["email"][1:-1]), re.compile(RFC)
    found = 0
    for length in range(3, 9):
        for characters in itertools.product("a-.@!", repeat=length):
            text = "".join(characters)
            assert (ours.fullmatch(text) is None) == (theirs.fullmatch(text) is None), text
            found += ours.fullmatch(text) is not None
    assert found > 1000, "the test is about something"


@pytest.mark.parametrize(
    ("literal", "good"),
    [("1.20.255.0", True), ("1.20.256.0", False), ("01.2.3.4", False), ("1.2.3", False), ("1.2.3.4.5", False)],
)
def test_an_address_may_end_in_an_ipv4_address(literal: str, good: bool) -> None:
    assert (re.fullmatch(PATTERNS["email"], f"a@[{literal}]") is not None) is good


def test_formats_are_found_where_schemas_are() -> None:
    email, written = {"format": "email"}, {"pattern": PATTERNS["email"]}

    def around(inner: dict[str, Any]) -> dict[str, Any]:
        return {
            "$defs": {"a": inner}, "properties": {"format": inner, "const": {"items": inner}},
            "prefixItems": [inner, True], "anyOf": [{"additionalProperties": inner}],
            "patternProperties": {"^a": inner},
        }  # fmt: skip

    assert with_patterns(around(email)) == around(written)


@pytest.mark.parametrize(
    "schema",
    [
        {"const": {"format": "email"}},
        {"enum": [{"format": "email"}, "email"]},
        {"format": "email", "pattern": "a"},  # both hold
        {"format": "uri"},
        {"properties": {"format": True}},
    ],
)
def test_what_is_no_format_of_its_own_stays(schema: dict[str, Any]) -> None:
    assert with_patterns(schema) == schema
