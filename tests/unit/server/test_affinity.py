"""Which replica answers: requests that begin alike share one, unless its queue is long."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.server.affinity import BEGINNING, choose, routing_key

QUEUES = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=8), st.integers(0, 40), min_size=1, max_size=8)
KEYS = st.text("0123456789abcdef", min_size=1, max_size=32)


def key_of(**request: Any) -> str:
    return routing_key(json.dumps(request).encode())


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation: the system prompt, then user and assistant in turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@given(st.text(), st.lists(st.text(), min_size=1, max_size=4), st.integers(0, 4))
def test_all_requests_of_a_conversation_have_one_key(system: str, texts: list[str], later: int) -> None:
    head = [{"role": "system", "content": system}]
    first = key_of(messages=head + said(texts[0]))
    assert first
    assert key_of(messages=head + said(*texts, *"x" * later), temperature=0.5, stream=True) == first
    assert key_of(input=head + said(*texts)) == first


def test_other_beginnings_have_other_keys() -> None:
    system = {"role": "system", "content": "Be short."}
    requests: list[dict[str, Any]] = [
        {"messages": [system, *said("One")]},
        {"messages": [system, *said("Two")]},
        {"messages": said("One")},
        {"messages": said("One"), "system": "Be short."},
        {"input": "One", "instructions": "Be short."},
        {"input": "One"},
        {"prompt": "One", "cache_salt": "a"},
        {"prompt": "Once"},
        {"prompt": [1, 2, 3]},
        {"prompt": ["One", "Two"]},
    ]
    assert len({key_of(**request) for request in requests}) == len(requests)


@given(st.text("ab", min_size=1), st.text(), st.text())
def test_what_follows_the_first_pages_does_not_count(text: str, one: str, other: str) -> None:
    beginning = text * BEGINNING
    assert key_of(prompt=beginning + one) == key_of(prompt=beginning + other)
    assert key_of(prompt=text + "c") != key_of(prompt=beginning)


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"3", b"[]", b"\xff", b"{}", b'{"messages": []}'])
def test_a_body_without_a_prompt_has_no_key(body: bytes) -> None:
    assert routing_key(body) == ""


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_body_has_an_answer(body: bytes | str) -> None:
    assert isinstance(routing_key(body if isinstance(body, bytes) else body.encode()), str)
    if isinstance(body, str):
        assert isinstance(routing_key(f'{{"messages": {body}, "system": {body}}}'.encode()), str)


@given(KEYS, QUEUES, st.integers(1, 8))
def test_a_replica_is_home_until_its_queue_is_longer_by_the_slack(key: str, queues: dict[str, int], slack: int) -> None:
    home = choose(key, dict.fromkeys(queues, 0), slack)
    chosen, shortest = choose(key, queues, slack), min(queues.values())
    if queues[home] - shortest < slack:
        assert chosen == home
    else:
        assert queues[chosen] == shortest and chosen != home


@given(KEYS, QUEUES)
def test_the_order_of_the_replicas_does_not_count(key: str, queues: dict[str, int]) -> None:
    """Several fronts choose alike, whatever they heard first."""
    assert choose(key, queues, 4) == choose(key, dict(reversed(queues.items())), 4)


@given(QUEUES, st.integers(1, 8))
def test_without_a_key_the_shortest_queue_is_chosen(queues: dict[str, int], slack: int) -> None:
    assert queues[choose("", queues, slack)] == min(queues.values())


@given(KEYS, st.lists(st.text("abcdefgh", min_size=1, max_size=8), min_size=2, max_size=8, unique=True))
def test_a_replica_that_goes_moves_only_its_own_keys(key: str, names: list[str]) -> None:
    before = choose(key, dict.fromkeys(names, 0), 1)
    for gone in names:
        after = choose(key, {name: 0 for name in names if name != gone}, 1)
        assert after == before or gone == before


def test_keys_spread_evenly() -> None:
    """1,000 keys over 4 replicas: each within five standard deviations of 250."""
    queues = dict.fromkeys("abcd", 0)
    chosen = [choose(routing_key(b'{"prompt": "%d"}' % n), queues, 1) for n in range(1000)]
    assert all(abs(chosen.count(name) - 250) < 69 for name in queues)
