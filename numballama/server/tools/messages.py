"""Conversations with tools for a chat template that does not describe tools itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ...chat.tool_messages import tool_messages
from .grammar import CallText


def plain_conversation(
    messages: Iterable[object], call_text: CallText, instructions: str | None, system_role: bool = True
) -> list[dict[str, Any]]:
    """OpenAI's messages without tool calls and results: any template can render them.

    `instructions` are added to the system message, without `system_role` to the first message of the user. Calls become
    text of the assistant, spelled as the model is told to write them. The results that follow a message become one
    message of the user, with the user's own text if it follows: many templates refuse two in a row.

    Raises `Error` as `tool_messages`.
    """
    found: list[dict[str, Any]] = []
    results: dict[str, Any] | None = None
    for message in tool_messages(messages):
        if message.get("role") == "tool":
            result = json.dumps({"name": message.get("name"), "content": message["content"]}, ensure_ascii=False)
            if results is None:
                results = {"role": "user", "content": f"Results of the functions:\n{result}"}
                found.append(results)
            else:
                results["content"] += f"\n{result}"
            continue
        if results is not None and message.get("role") == "user":
            found[-1] = _joined(message, results["content"], at_end=False)
            results = None
            continue
        results = None
        if calls := message.pop("tool_calls", ()):
            text = call_text.between.join(_spelled(call["function"], call_text) for call in calls)
            content = message["content"]
            parts = [*content, {"type": "text", "text": text}] if isinstance(content, list) else None
            message["content"] = parts or "\n".join(filter(None, [content, text]))
        found.append(message)
    return _with_instructions(found, instructions, system_role) if instructions else found


def _spelled(function: Mapping[str, Any], call_text: CallText) -> str:
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return f"{call_text.begin}{function['name']}{call_text.middle}{arguments}{call_text.end}"


def _with_instructions(messages: list[dict[str, Any]], instructions: str, system_role: bool) -> list[dict[str, Any]]:
    """Messages with the instructions at the end of the system message, or at the beginning of the first of the user."""
    roles = [message.get("role") for message in messages]
    if roles and roles[0] in ("system", "developer"):
        return [_joined(messages[0], instructions, at_end=True), *messages[1:]]
    if system_role or "user" not in roles:
        return [{"role": "system", "content": instructions}, *messages]
    at = roles.index("user")
    return [*messages[:at], _joined(messages[at], instructions, at_end=False), *messages[at + 1 :]]


def _joined(message: Mapping[str, Any], text: str, at_end: bool) -> dict[str, Any]:
    """A message with more text."""
    content = message.get("content")
    if isinstance(content, list):
        part = {"type": "text", "text": f"\n\n{text}" if at_end else f"{text}\n\n"}
        return {**message, "content": [*content, part] if at_end else [part, *content]}
    both = [content, text] if at_end else [text, content]
    return {**message, "content": "\n\n".join(filter(None, both))}
