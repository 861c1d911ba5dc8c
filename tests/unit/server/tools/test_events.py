"""Joining of events."""

from numballama.server.tools import CallArguments, CallStart, Content, Reasoning
from numballama.server.tools.events import merge


def test_adjacent_events_are_joined() -> None:
    start = CallStart(0, "call_1", "f")
    other = CallStart(1, "call_2", "f")
    given = [
        Reasoning("a"), Reasoning("b"), Content("c"), Content("d"), start, CallArguments(0, "{"),
        CallArguments(0, "}"), other, start, CallArguments(1, "{"), CallArguments(0, "}"), Content("e"),
    ]  # fmt: skip
    assert list(merge(given)) == [
        Reasoning("ab"), Content("cd"), start, CallArguments(0, "{}"), other, start, CallArguments(1, "{"),
        CallArguments(0, "}"), Content("e"),
    ]  # fmt: skip
    assert list(merge([])) == []
