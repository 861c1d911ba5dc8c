"""OpenAI's messages with calls and results, as templates read them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from numballama.chat.tool_messages import tool_messages
from numballama.errors import Error


def call(number: int, arguments: Any = '{"city": "Oslo"}') -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": f"f{number}", "arguments": arguments}}


def test_calls_and_results() -> None:
    given = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call(1), call(2, ""), call(3, {"a": 1})]},
        {"role": "tool", "tool_call_id": "call_2", "content": "2"},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "o"}, {"text": "ne"}]},
        {"role": "tool", "tool_call_id": "other", "content": "?", "name": "mine"},
        {"role": "assistant", "content": "Done", "tool_calls": []},
    ]
    before = json.dumps(given)
    user, calls, two, one, other, last = tool_messages(given)
    assert json.dumps(given) == before, "unchanged"
    assert user == given[0] and last == {"role": "assistant", "content": "Done"}
    assert calls["content"] == ""
    assert [each["function"]["arguments"] for each in calls["tool_calls"]] == [{"city": "Oslo"}, {}, {"a": 1}]
    assert two == {"role": "tool", "tool_call_id": "call_2", "content": "2", "name": "f2"}
    assert one["content"] == "one" and one["name"] == "f1" and other["name"] == "mine"


def test_short_ids() -> None:
    given = [
        {"role": "assistant", "tool_calls": [call(1), call(2), {**call(3), "id": "abc123XYZ"}]},
        {"role": "tool", "tool_call_id": "call_2", "content": ""},
    ]
    calls, result = tool_messages(given, short_ids=True)
    ids = [each["id"] for each in calls["tool_calls"]]
    assert len(set(ids)) == 3 and all(len(each) == 9 and each.isalnum() for each in ids)
    assert result["tool_call_id"] == ids[1] and ids[2] == "abc123XYZ" and result["name"] == "f2"


def test_one_call_each() -> None:
    given = [
        {"role": "assistant", "content": "Both", "tool_calls": [call(1), call(2)]},
        {"role": "tool", "tool_call_id": "call_2", "content": "two"},
        {"role": "tool", "tool_call_id": "call_1", "content": "one"},
        {"role": "tool", "tool_call_id": "other", "content": "?"},
        {"role": "user", "content": "Hi"},
    ]
    found = tool_messages(given, one_call_each=True)
    assert [(each["role"], each["content"]) for each in found] == [
        ("assistant", "Both"), ("tool", "one"), ("assistant", ""), ("tool", "two"), ("tool", "?"), ("user", "Hi"),
    ]  # fmt: skip
    assert [each["tool_calls"][0]["id"] for each in found if "tool_calls" in each] == ["call_1", "call_2"]


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"role": "assistant", "tool_calls": {"a": 1}}, r"messages\[1\]\.tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": ["f"]}, r"messages\[1\]\.tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": [call(1), call(2, '{"a')]}, r"\[1\]\.function\.arguments .*max_tok"),
        ({"role": "assistant", "tool_calls": [call(1, "[1]")]}, "must be a JSON object"),
        ({"role": "assistant", "tool_calls": [call(1, "[" * 100_000)]}, "must be a JSON object"),
        ({"role": "tool", "content": [{"type": "image_url"}]}, r"messages\[1\]\.content must be a text"),
    ],
)  # fmt: skip
def test_what_is_no_call_is_refused(message: dict[str, Any], place: str) -> None:
    with pytest.raises(Error, match=place):
        tool_messages([{"role": "user", "content": ""}, message])
