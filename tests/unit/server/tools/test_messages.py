"""Conversations with tools as plain text."""

from __future__ import annotations

from typing import Any

from numballama.server.tools.formats import choose_format
from numballama.server.tools.grammar import CallText
from numballama.server.tools.messages import plain_conversation

CALLS = [{"id": f"call_{n}", "function": {"name": f"f{n}", "arguments": '{"a": "é"}'}} for n in (1, 2)]
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Both.", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "call_1", "content": "one"},
    {"role": "tool", "tool_call_id": "call_2", "content": "two"},
    {"role": "assistant", "content": [{"type": "text", "text": "Again."}], "tool_calls": CALLS[:1]},
]


def test_calls_and_results_are_text() -> None:
    system, user, calls, results, again = plain_conversation(TALK, CallText(), "Use functions.")
    assert system == {"role": "system", "content": "Use functions."} and user == TALK[0]
    first, second = ('{"name": "f%d", "arguments": {"a": "é"}}' % n for n in (1, 2))  # noqa: UP031
    assert calls == {"role": "assistant", "content": f"Both.\n{first}\n{second}"}
    assert results["role"] == "user"
    assert results["content"] == (
        'Results of the functions:\n{"name": "f1", "content": "one"}\n{"name": "f2", "content": "two"}'
    )
    assert again["content"] == [{"type": "text", "text": "Again."}, {"type": "text", "text": first}]


def test_what_the_user_says_after_results_is_in_one_message_with_them() -> None:
    """As Anthropic's clients send it. Templates such as Llama 2's refuse two messages of the user in a row."""
    for content in ("Go on.", [{"type": "text", "text": "Go on."}]):
        *_, last = plain_conversation([*TALK[:4], {"role": "user", "content": content}], CallText(), None)
        text = last["content"] if isinstance(content, str) else "".join(part["text"] for part in last["content"])
        assert last["role"] == "user"
        assert text.startswith("Results of the functions:\n") and text.endswith('"content": "two"}\n\nGo on.')
    talk = plain_conversation([*TALK[:4], TALK[0], TALK[0]], CallText(), None)
    assert [message["role"] for message in talk] == ["user", "assistant", "user", "user"], "only the first is theirs"


def test_instructions_are_added_to_the_system_message() -> None:
    text = plain_conversation([{"role": "system", "content": "Be brief."}], CallText(), "Use functions.")
    assert text == [{"role": "system", "content": "Be brief.\n\nUse functions."}]
    parts = plain_conversation([{"role": "system", "content": [{"type": "text", "text": "A"}]}], CallText(), "B")
    assert parts[0]["content"] == [{"type": "text", "text": "A"}, {"type": "text", "text": "\n\nB"}]
    assert plain_conversation(TALK[:1], CallText(), None) == TALK[:1]


def test_a_template_may_refuse_a_system_message() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    for template in (refusing, "{{ raise_exception('roles must alternate') }}"):
        found = choose_format(template, [])
        assert not found.system_role
        messages, _ = found.conversation(TALK[:2], [{"type": "function", "function": {"name": "f1"}}])
        assert [each["role"] for each in messages] == ["user", "assistant"]
        assert messages[0]["content"].startswith("You can call functions") and messages[0]["content"].endswith("\n\nHi")
    parts = plain_conversation([{"role": "user", "content": [{"type": "text", "text": "A"}]}], CallText(), "B", False)
    assert parts[0]["content"] == [{"type": "text", "text": "B\n\n"}, {"type": "text", "text": "A"}]
    assert choose_format(None, []).system_role


def test_what_the_model_is_told_is_what_the_parser_reads() -> None:
    """The text of an earlier call is a call again."""
    found = choose_format(None, ["<tool_call>"])
    tools = [{"type": "function", "function": {"name": "f1"}}]
    messages, none = found.conversation(TALK[1:4], tools)
    assert none is None and '<tool_call>\n{"name": "NAME", "arguments": {…}}' in messages[0]["content"]
    events = found.parser(tools).feed(messages[1]["content"])
    assert [type(event).__name__ for event in events[:3]] == ["Content", "CallStart", "CallArguments"]
