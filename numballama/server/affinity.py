"""Which replica of a model answers a request: one that has the beginning of its prompt in its cache, or a free one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from .http import dumps

BEGINNING = 4096
"""Bytes of a prompt that are compared: about 1,000 tokens, 32 pages of the KV cache."""


def routing_key(body: bytes) -> str:
    """A hash of the first pages of a request's prompt; "" for a body without one.

    Of a conversation it is what stands before the first answer, so that all its requests have one key, and another
    conversation with the same short system prompt has another. Requests with another `cache_salt` share no pages.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ""  # the server says what is wrong with it
    if not isinstance(request, dict):
        return ""
    prompt = next((request[name] for name in ("messages", "input", "prompt") if request.get(name)), None)
    if prompt is None:
        return ""
    before = [request.get(name) for name in ("cache_salt", "instructions", "system")]
    return hashlib.blake2b(dumps([*before, _opening(prompt)])[:BEGINNING], digest_size=16).hexdigest()


def _opening(prompt: object) -> object:
    """The messages of a conversation up to the first of the user; any other prompt as it is."""
    if isinstance(prompt, list):
        for number, message in enumerate(prompt):
            if isinstance(message, dict) and message.get("role") == "user":
                return prompt[: number + 1]
    return prompt


def choose(key: str, queues: Mapping[str, int], slack: int) -> str:
    """The replica for a request with this key. `queues`: its name → requests that it has, running and waiting.

    Every key has an order of the replicas of its own, by their hashes together (rendezvous hashing): a replica that
    comes or goes changes the choice only of the keys that it has. The first in that order answers, unless its queue is
    longer than the shortest by `slack` or more: then the shortest does, the first of those in the order. Without a key
    the shortest queue does.
    """
    shortest = min(queues.values())
    order = sorted(queues, key=lambda name: hashlib.blake2b(f"{key}/{name}".encode()).digest())
    if key and queues[order[0]] - shortest < slack:
        return order[0]
    return next(name for name in order if queues[name] == shortest)
