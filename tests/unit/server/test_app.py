"""The server's application: paths, errors, health, the model's properties, and slow requests that delay no other."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from numballama.errors import Error
from numballama.model import Model
from numballama.server.answers import ErrorAnswer
from numballama.server.app import POSTS, create_app
from numballama.server.service import SLOW_THREADS, THREADS
from numballama.server.settings import Settings
from numballama.server.tools import formats
from numballama.server.tools.definitions import check_tools
from numballama.structured import compiler
from tests.helpers.http_server import (
    LONG,
    LONG_TEXT,
    PATHS,
    Running,
    Serving,
    eventually,
    read_until,
    serving,
    serving_linked,
)

# Errors


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"a":' + b"[" * 10_000, b'{"n": NaN}']
)
def test_a_body_that_is_no_request(server: Running, path: str, body: bytes) -> None:
    answer = server.post(path, body)
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"
    ErrorAnswer.model_validate(answer.json)


def test_paths_and_methods_that_do_not_exist(server: Running) -> None:
    assert server.get("/v1/embeddings").status == 404 and server.get("/v1/embeddings").error["code"] == "not_found"
    assert server.get("/v1/completions").status == 405
    assert server.post("/health", {}).error["code"] == "method_not_allowed"
    assert server.request("OPTIONS", "/v1/models", Origin="http://evil.example").status == 405


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/completions", {"prompt": "Hi", "max_tokens": 3}, "text_completion"),
        ("/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}, "chat.completion"),
        ("/responses", {"input": "Hi", "max_output_tokens": 3}, "response"),
    ],
)
def test_paths_without_their_version(server: Running, path: str, body: dict[str, Any], kind: str) -> None:
    """As llama.cpp answers them."""
    assert server.post(path, body).json["object"] == server.post(f"/v1{path}", body).json["object"] == kind
    assert server.get(path).status == 405
    assert server.get("/models").json == server.get("/v1/models").json


def test_no_other_site_may_read(server: Running) -> None:
    answer = server.get("/v1/models", Origin="http://evil.example")
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_only_json(server: Running) -> None:
    answer = server.post("/v1/completions", LONG_TEXT, Content_Type="text/plain")
    assert answer.status == 415 and answer.error["code"] == "unsupported_media_type"
    assert server.post("/tokenize", {"content": "a"}, Content_Type="application/json; charset=utf-8").status == 200


def test_a_page_of_another_site_sends_nothing(server: Running) -> None:
    """Browsers ask nobody before they send a body without a type. Programs that leave it out send no Origin."""
    body = json.dumps({"content": "a"}).encode()
    assert server.request("POST", "/tokenize", body).status == 200
    answer = server.request("POST", "/tokenize", body, Origin="http://evil.example")
    assert answer.status == 415 and answer.error["code"] == "unsupported_media_type"
    assert server.post("/tokenize", {"content": "a"}, Origin=server.url).status == 200


# Health, metrics, properties


def test_loading(model: Model) -> None:
    with serving(None) as server:
        for method, path in PATHS:
            answer = server.request(method, path, b"{}" if method == "POST" else None)
            if path in ("/", "/metrics", "/openapi.json"):
                assert answer.status == 200
            else:
                assert answer.status == 503 and answer.headers["retry-after"]
        server.service.ready(model)
        assert server.get("/health").json == {"status": "ok"}
        assert server.post("/v1/completions", LONG_TEXT | {"max_tokens": 1}).status == 200


@pytest.mark.parametrize("serve", [serving, serving_linked])
def test_health_sees_an_engine_that_stands_still(model: Model, serve: Serving) -> None:
    """vLLM #2731, #1492, #17972."""
    with serve(model, Settings(stall_s=0.05)) as server:
        assert server.get("/health").status == 200
        with model.exclusive():  # no step ends
            connection = server.begin("/v1/completions", LONG_TEXT | {"max_tokens": 1})
            eventually(lambda: server.get("/health").status == 503, "a bad health")
            assert "no step" in server.get("/health").error["message"]
        connection.recv(10)
        connection.close()
        eventually(lambda: server.get("/health").status == 200, "a good health")


@pytest.mark.parametrize("serve", [serving, serving_linked])
def test_draining(model: Model, serve: Serving) -> None:
    with serve(model) as server:
        connection = server.begin("/v1/completions", LONG_TEXT | {"stream": True, "max_tokens": 100})
        data = read_until(connection, b"data: ")
        server.service.draining = True
        answer = server.post("/v1/completions", LONG_TEXT)
        assert answer.status == 503 and answer.error["code"] == "draining"
        assert answer.headers["connection"] == "close"  # the next request goes to another server
        assert server.get("/health").status == 503 and server.get("/metrics").status == 200
        data += read_until(connection, b"\r\n0\r\n\r\n")
        assert data.rstrip(b"0\r\n").endswith(b"data: [DONE]")
        connection.close()


@pytest.mark.parametrize("serve", [serving, serving_linked])
def test_the_time_to_drain_is_over(model: Model, serve: Serving) -> None:
    """What still runs ends with an error, in its protocol's shape, and not with a torn connection."""
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10_000, "n": 8, "seed": 1, "stream": True}
    with serve(model, Settings(drain_s=0, queue_sequences=100)) as server:
        with model.exclusive():  # nothing ends before
            found = [
                server.begin(path, body)
                for path, body in (
                    ("/v1/completions", LONG_TEXT | {"prompt": ["a", "b"]}),
                    ("/v1/chat/completions", chat),
                    ("/v1/responses", {"input": "Hi", "stream": True}),
                    ("/v1/messages", chat),
                )
            ]
            eventually(lambda: len(server.service.running) == 4, "the requests")
            server.server.drain()
            eventually(lambda: not server.service.running, "the end")
        answers = [b"".join(iter(partial(connection.recv, 1 << 16), b"")) for connection in found]
        for connection in found:
            connection.close()
    assert answers[0].startswith(b"HTTP/1.1 503 ")
    assert all(b'"code":"draining"' in each for each in answers)
    assert all(each.startswith(b"HTTP/1.1 200 ") and each.endswith(b"\r\n0\r\n\r\n") for each in answers[1:])
    assert b"data: [DONE]" in answers[1] and b"event: error" in answers[2] and b"event: error" in answers[3]


def test_models_and_properties(server: Running, model: Model) -> None:
    (found,) = server.get("/v1/models").json["data"]
    assert found["id"] == "story.gguf" and found["max_model_len"] == model.context
    assert server.get("/v1/models/story.gguf").json == found
    assert server.get("/v1/models/a/b").error["code"] == "model_not_found"
    props = server.get("/props").json
    assert props["total_slots"] == 4 and "[INST]" in props["chat_template"] and props["bos_token"] == "<s>"
    assert "/" not in json.dumps(props["model_name"])
    info = server.get("/tokenizer_info").json
    assert (info["bos_token"], info["eos_token"], info["vocab_size"]) == ("<s>", "</s>", model.config.vocab_size)
    assert info["chat_template"] == props["chat_template"] and info["model_max_length"] == model.context


def test_names_and_templates_of_the_operator(model: Model) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ mark }}{% endfor %}"
    settings = Settings(model_name="storyteller", chat_template=template, template_kwargs={"mark": "!"})
    with serving(model, settings) as server:
        assert server.get("/v1/models").json["data"][0]["id"] == "storyteller"
        body = {"messages": [{"role": "user", "content": "hi"}]}
        assert server.post("/apply-template", body).json == {"prompt": "hi!"}
        body["chat_template_kwargs"] = {"mark": "?"}  # type: ignore[assignment]
        assert server.post("/apply-template", body).json == {"prompt": "hi?"}


@pytest.mark.parametrize(
    ("template", "message"), [("chatml", "no chat template 'chatml'"), ("{% if %}", "does not compile")]
)
def test_a_template_of_the_operator_is_checked_at_the_start(model: Model, template: str, message: str) -> None:
    """Not when the first client asks."""
    app = create_app(None, Settings(chat_template=template))
    with pytest.raises(Error, match=message):
        app.state.service.ready(model)
    app.state.service.close()


def test_many_clients_at_once(server: Running) -> None:
    """Each gets what it gets alone. vLLM #5898, #23138, #51187, #7779."""
    bodies = [
        {"prompt": f"{name} went to", "temperature": 0, "max_tokens": 20, "stream": n % 2 == 0}
        for n, name in enumerate(("Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Sue"))
    ]

    def text(body: dict[str, Any]) -> str:
        answer = server.post("/v1/completions", body)
        if not body["stream"]:
            return str(answer.json["choices"][0]["text"])
        return "".join(event["choices"][0]["text"] for event in answer.events)

    alone = [text(body) for body in bodies]
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n, body=body: found.update({n: text(body)})) for n, body in enumerate(bodies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(bodies))] == alone


# What is slow


def test_nobody_waits_for_grammars_of_others(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are threads, and each takes seconds to compile."""
    go_on = threading.Event()
    monkeypatch.setattr(compiler._checker, "check", lambda grammar, what: go_on.wait(LONG))
    body = {"prompt": "Once", "max_tokens": 2}
    with ThreadPoolExecutor(THREADS + SLOW_THREADS + 2) as pool:
        try:
            slow = [
                pool.submit(server.post, "/v1/completions", body | {"regex": f"x{n}|[^y]+"})
                for n in range(THREADS + SLOW_THREADS)
            ]
            eventually(lambda: server.service.active == len(slow), "the arrival of all grammars")
            assert pool.submit(server.post, "/v1/completions", body).result(10).status == 200
            assert not any(each.done() for each in slow)
        finally:
            go_on.set()
        assert [each.result().status for each in slow] == [200] * len(slow)


def test_tools_are_not_checked_on_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would take seconds for many answers with large tools."""
    places: list[bool] = []

    def checked(tools: Any) -> Any:
        places.append(asyncio._get_running_loop() is not None)
        return check_tools(tools)

    monkeypatch.setattr(formats, "check_tools", checked)
    tool = {"type": "function", "function": {"name": "look"}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "tools": [tool]}
    assert server.post("/v1/chat/completions", body).status == 200
    count = len(places)
    assert server.post("/v1/chat/completions", body | {"n": 4}).status == 200
    assert count and places == [False] * 2 * count


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_leaves_nothing_to_the_garbage_collector(server: Running, stream: bool) -> None:
    """All of it is freed when it ends: a collection would stop the engine's thread, too, for milliseconds."""
    body = {"messages": [{"role": "user", "content": "a story"}], "max_tokens": 4, "stream": stream}

    def ask() -> None:
        assert server.post("/v1/chat/completions", body).status == 200
        eventually(lambda: server.idle, "the end of the request")

    ask()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):
            ask()
        gc.collect()
        found = {type(each).__qualname__ for each in gc.garbage if type(each).__module__.startswith("numballama.")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not found
