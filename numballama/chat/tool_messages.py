"""Tool calls and results in OpenAI's messages, as chat templates read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import Error
from .template import plain_messages


def tool_messages(
    messages: Iterable[object], short_ids: bool = False, one_call_each: bool = False
) -> list[dict[str, Any]]:
    """OpenAI's messages as templates of Hugging Face read them.

    Arguments of calls are mappings, not JSON text. A message with calls has a content, "" where it had none. A result's
    content is text, and its "name" is the called function. With `short_ids`, ids of calls are 9 alphanumeric
    characters: Mistral's templates refuse others; equal ids stay equal. With `one_call_each`, a message with several
    calls becomes several messages, each with its result behind it: Llama 3's templates refuse several calls.

    The messages given are not changed. Raises `Error` that names the place, for calls that are none, or whose arguments
    are no JSON object.
    """
    found, names = [], dict[str, str]()
    for index, message in enumerate(plain_messages(messages)):
        role = message.get("role")
        if role == "assistant" and message.get("tool_calls"):
            message["tool_calls"] = list(
                _calls(f"messages[{index}].tool_calls", message["tool_calls"], names, short_ids)
            )
            message.setdefault("content", "")
        elif role == "assistant":
            message.pop("tool_calls", None)  # []
        elif role == "tool":
            message = _result(f"messages[{index}]", message, names, short_ids)
        found.append(message)
    return list(_split(found)) if one_call_each else found


def _calls(place: str, calls: object, names: dict[str, str], short_ids: bool) -> Iterator[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise Error(f"{place} must be a list, found {calls!r:.100}")
    for index, call in enumerate(calls):
        here = f"{place}[{index}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str):
            raise Error(f'{here} must be {{"id": …, "function": {{"name": …, "arguments": …}}}}, found {call!r:.100}')
        new = {**call, "function": {**function, "arguments": _arguments(here, function.get("arguments"))}}
        if isinstance(given := call.get("id"), str):
            names[given] = name
            new["id"] = _short(given) if short_ids else given
        yield new


def _arguments(place: str, arguments: object) -> Mapping[str, Any]:
    """Arguments as a mapping. None and "" are those of a function without parameters."""
    read = arguments or {}
    if isinstance(read, str):
        try:
            read = json.loads(read)
        except (ValueError, RecursionError):
            read = None
    if not isinstance(read, Mapping):
        raise Error(
            f"{place}.function.arguments must be a JSON object, found {arguments!r:.100}: "
            "if max_tokens cut the call, leave the message out or complete it"
        )
    return read


def _result(place: str, message: dict[str, Any], names: Mapping[str, str], short_ids: bool) -> dict[str, Any]:
    content = message.get("content", "")
    if isinstance(content, list | tuple):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise Error(f"{place}.content must be a text or a list of texts, found {content!r:.100}")
        content = "".join(texts)
    result = {**message, "content": content}
    if isinstance(call := message.get("tool_call_id"), str):
        if call in names:
            result.setdefault("name", names[call])
        result["tool_call_id"] = _short(call) if short_ids else call
    return result


def _short(given: str) -> str:
    """An id of 9 alphanumeric characters: the same for the same id."""
    if len(given) == 9 and given.isalnum() and given.isascii():
        return given
    return hashlib.sha256(given.encode(errors="replace")).hexdigest()[:9]


def _split(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Messages with one call each, and the results of each call behind it."""
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            yield message
            continue
        end = index
        while end < len(messages) and messages[end].get("role") == "tool":
            end += 1
        results = messages[index:end]
        index = end
        for number, call in enumerate(calls):
            own = [each for each in results if call.get("id") and each.get("tool_call_id") == call["id"]]
            yield {**message, "tool_calls": [call], "content": message["content"] if number == 0 else ""}
            yield from own
            results = [each for each in results if each not in own]
        yield from results
