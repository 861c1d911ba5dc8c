"""/tokenize, /detokenize, /apply-template."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest

from numballama.model import Model
from numballama.server import tokens
from numballama.server.http import SLICE, json_parts
from tests.helpers.http_server import Running

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_tokenize(server: Running, model: Model) -> None:
    assert model.tokenizer is not None
    bare, begun = (model.tokenizer.encode("Hi, Tom é", bos=bos) for bos in (False, True))
    answer = server.post("/tokenize", {"content": "Hi, Tom é"}).json
    assert answer == {"tokens": bare, "count": len(bare), "max_model_len": 512}
    assert server.post("/tokenize", {"content": "Hi, Tom é", "add_special": True}).json["tokens"] == begun
    assert server.post("/tokenize", {"prompt": "Hi, Tom é"}).json["tokens"] == begun
    assert server.post("/tokenize", {"prompt": "Hi, Tom é", "add_special_tokens": False}).json["tokens"] == bare
    assert 2 in server.post("/tokenize", {"content": "</s>", "parse_special": True}).json["tokens"]
    pieces = server.post("/tokenize", {"content": "Hi, Tom 🐕", "with_pieces": True}).json["tokens"]
    data = b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces)
    assert data.decode() == " Hi, Tom 🐕"
    found = server.post("/tokenize", {"prompt": "Hi", "return_token_strs": True}).json
    assert found["token_strs"][0] == "<s>" and len(found["token_strs"]) == found["count"]


def test_a_large_answer_is_not_written_on_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of the tokens of 8 MB took seconds, in which no stream went on."""
    threads: list[str] = []

    def parts(value: dict[str, object]) -> Iterable[bytes]:
        threads.append(threading.current_thread().name)
        return json_parts(value)

    monkeypatch.setattr(tokens, "json_parts", parts)
    found = server.post("/tokenize", {"content": "a b" * 10_000, "with_pieces": True}).json
    assert len(found["tokens"]) == found["count"] > SLICE
    assert [name.startswith("numballama server") for name in threads] == [True]


def test_tokenize_messages(server: Running, model: Model) -> None:
    answer = server.post("/tokenize", {"messages": MESSAGES}).json
    assert answer["tokens"] == model.apply_chat_template(MESSAGES)


def test_detokenize(server: Running) -> None:
    ids = server.post("/tokenize", {"content": "A dog, a cat 🐕"}).json["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json["content"] == "A dog, a cat 🐕"
    assert server.post("/detokenize", {"tokens": []}).json["content"] == ""


def test_templates(server: Running) -> None:
    assert server.post("/apply-template", {"messages": MESSAGES}).json == {"prompt": "<s>[INST] Hi [/INST]"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "a", "prompt": "b"}, "content"),
        ("/tokenize", {"content": 3}, "content"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/detokenize", {}, "tokens"),
        ("/apply-template", {"messages": []}, "messages"),
        ("/apply-template", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/apply-template", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ],
)
def test_wrong_fields(server: Running, path: str, body: dict[str, Any], param: str) -> None:
    answer = server.post(path, body)
    assert answer.status == 400 and answer.error["param"] == param, answer.body
