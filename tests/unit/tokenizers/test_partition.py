"""Added tokens cut out of a text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from numballama.tokenizers.partition import AddedToken, Partition

TOKENS = [
    AddedToken("<a>", 0, control=True),
    AddedToken("<a><b>", 1, control=False),
    AddedToken("    ", 2, control=False),
    AddedToken("  ", 3, control=False),
    AddedToken("[m]", 4, control=True, lstrip=True),
    AddedToken("[r]", 5, control=False, rstrip=True),
    AddedToken("", 6, control=False),
]


def split(text: str, trusted: bool = True) -> list[str | int]:
    return Partition(TOKENS).split(text, bytes([trusted]) * len(text))


def test_the_longest_first() -> None:
    assert split("x<a><b>y<a>") == ["x", 1, "y", 0]
    assert split("x       y") == ["x", 2, 3, " y"]


def test_control_tokens_only_where_they_are_trusted() -> None:
    assert split("x<a>  y", trusted=False) == ["x<a>", 3, "y"]
    partition = Partition(TOKENS)
    assert partition.split("<a><a><a>", b"\0\0\0\1\1\1\0\1\1") == ["<a>", 0, "<a>"]
    assert partition.split("<a>", b"\1\0\1") == ["<a>"]


def test_white_space_around() -> None:
    assert split("x \n[m] y") == ["x", 4, " y"]
    assert split("x [r] \ny") == ["x ", 5, "y"]
    assert split(" [m]") == [4]


@given(parts=st.lists(st.sampled_from(["<a>", "<b>", " ", "x", "[r]", "é"]), max_size=12), trusted=st.booleans())
def test_nothing_is_lost(parts: list[str], trusted: bool) -> None:
    texts = {token.token: token.text for token in TOKENS}
    text = "".join(parts).replace("[r] ", "[r]x")
    found = split(text, trusted)
    assert "".join(texts[part] if isinstance(part, int) else part for part in found) == text
    assert "" not in found or not text
