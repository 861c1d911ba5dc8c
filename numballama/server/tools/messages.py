"""Conversations with tools for a chat template that does not describe tools itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ...chat.tool_messages import tool_messages
from .grammar import CallText


def plain_conversation(
    messages: Iterable[object], call_text: CallText, instructions: str | None
) -> list[dict[str, Any]]:
    """OpenAI's messages without tool calls and results: any template can render them.

    `instructions` are added to the system message. Calls become text of the assistant, spelled as the model is told to
    write them. The results that follow a message become one message of the user. Raises `Error` as `tool_messages`.
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
        results = None
        if calls := message.pop("tool_calls", ()):
            text = call_text.between.join(_spelled(call["function"], call_text) for call in calls)
            content = message["content"]
            parts = [*content, {"type": "text", "text": text}] if isinstance(content, list) else None
            message["content"] = parts or "\n".join(filter(None, [content, text]))
        found.append(message)
    return _with_instructions(found, instructions) if instructions else found


def _spelled(function: Mapping[str, Any], call_text: CallText) -> str:
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return f"{call_text.begin}{function['name']}{call_text.middle}{arguments}{call_text.end}"


def _with_instructions(messages: list[dict[str, Any]], instructions: str) -> list[dict[str, Any]]:
    """Messages with the instructions at the end of the system message; a new one if there is none."""
    if not messages or messages[0].get("role") not in ("system", "developer"):
        return [{"role": "system", "content": instructions}, *messages]
    system, content = messages[0], messages[0].get("content")
    if isinstance(content, list):
        content = [*content, {"type": "text", "text": f"\n\n{instructions}"}]
    else:
        content = "\n\n".join(filter(None, [content, instructions]))
    return [{**system, "content": content}, *messages[1:]]
