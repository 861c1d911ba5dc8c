"""The application as a whole: paths, errors, keys, limits, clients that leave, health."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from numballama.errors import Error
from numballama.generate import TextPart
from numballama.model import Model
from numballama.server.answers import ErrorAnswer
from numballama.server.app import ALIASES, GETS, POSTS, create_app
from numballama.server.generation import Generation
from numballama.server.service import SLOW_THREADS, THREADS
from numballama.server.settings import Settings
from numballama.server.tools import formats
from numballama.server.tools.definitions import check_tools
from numballama.structured import compiler
from tests.helpers.http_server import LONG, Running, Serving, eventually, read_until, serving, serving_linked

PATHS = [("GET", path.replace("{name:path}", "x")) for path in GETS] + [("POST", path) for path in POSTS]
PATHS += [("GET" if path == "/models" else "POST", path) for path in ALIASES]
LONG_TEXT: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True}


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


def test_a_body_has_a_limit(model: Model) -> None:
    with serving(model, Settings(max_body=1000)) as server:
        assert server.post("/tokenize", {"content": "a" * 900}).status == 200
        answer = server.post("/tokenize", {"content": "a" * 1000})
        assert answer.status == 413 and answer.error["type"] == "request_too_large"
        chunks = iter([b'{"content": "', *[b"a" * 100] * 20, b'"}'])  # no Content-Length
        answer = server.request("POST", "/tokenize", chunks, Content_Type="application/json")  # type: ignore[arg-type]
        assert answer.status == 413


def test_a_body_that_does_not_come(model: Model) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    with (
        serving(model, Settings(body_timeout_s=0.05)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=LONG) as connection,
    ):
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /h"])
def test_a_head_that_does_not_come(model: Model, sent: bytes) -> None:
    with (
        serving(model, Settings(body_timeout_s=0.2)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=LONG) as connection,
    ):
        connection.sendall(sent)
        data = b"".join(iter(lambda: connection.recv(1000), b""))
        assert data.count(b"HTTP/1.1 200 OK") == sent.count(b"\r\n\r\n")


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"HELLO\r\n\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n"],
)
def test_what_is_no_http(server: Running, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=LONG) as connection:
        connection.sendall(sent)
        data = b"".join(iter(lambda: connection.recv(1000), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    ErrorAnswer.model_validate(json.loads(body), strict=True)


@pytest.mark.parametrize(
    ("sent", "more"),
    [
        (b"GET /health HTTP/1.1\r\nHost: a\r\nX: ", b"x"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"X: y\r\n"),
    ],
)
def test_a_head_has_a_limit(server: Running, sent: bytes, more: bytes) -> None:
    """And so have the fields behind a body."""

    def send_much(connection: socket.socket) -> None:
        for _ in range(1000):
            connection.sendall(more * (10_000 // len(more)))
            time.sleep(0.001)

    with socket.create_connection(("127.0.0.1", server.port), timeout=LONG) as connection:
        connection.sendall(sent)
        with pytest.raises(OSError, match=r"[Bb]roken|reset"):
            send_much(connection)


def test_a_client_that_asks_for_another_protocol(server: Running) -> None:
    """Java's client asks for HTTP/2 with its requests. It gets an answer in HTTP/1.1, on a kept connection as well."""
    body = json.dumps({"content": "a"}).encode()
    fields = {"Content-Type": "application/json", "Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG)) as connection:
        for more in ({}, fields, {}, fields):
            connection.request("POST", "/tokenize", body, {"Content-Type": "application/json", **more})
            answer = connection.getresponse()
            assert answer.status == 200 and json.loads(answer.read())["tokens"]


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_body_is_no_request(server: Running, pipelined: bool) -> None:
    """Also where its head asks for another protocol, and comes in parts or behind another request."""
    body = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
    head = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: Upgrade\r\nUpg"
    rest = b"rade: h2c\r\nContent-Length: %d\r\n\r\n" % len(body)
    before = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" if pipelined else b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=LONG) as connection:
        connection.sendall(before + head)
        time.sleep(0.1)
        connection.sendall(rest)
        time.sleep(0.1)
        answer = b""
        with contextlib.suppress(OSError):  # it may be closed already
            connection.sendall(body)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while some := connection.recv(1 << 16):
                answer += some
    assert b'"object":"list"' not in answer and answer.count(b"HTTP/1.1 200") <= pipelined


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_be_larger_than_a_head(server: Running, chunked: bool) -> None:
    body = json.dumps({"content": "a" * 300_000}).encode()
    parts = iter([body[at : at + 100_000] for at in range(0, len(body), 100_000)]) if chunked else body
    answer = server.request("POST", "/tokenize", parts, Content_Type="application/json")  # type: ignore[arg-type]
    assert answer.status == 200


# Keys and hosts


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_path_but_health_needs_a_key(keyed: Running, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"X_Api_Key": "ones"}, {"Authorization": "Basic one"}):
        answer = keyed.request(method, path, b"{}" if method == "POST" else None, **headers)
        if path == "/health":
            assert answer.status == 200
        else:
            assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
            scheme = "Basic" if path == "/" else "Bearer"
            assert answer.headers["www-authenticate"].partition(" ")[0] == scheme


@pytest.fixture(scope="module")
def keyed(model: Model) -> Any:
    with serving(model, Settings(api_keys=("one", "schlüssel"))) as server:
        yield server


def test_keys(keyed: Running) -> None:
    body = {"prompt": "Once there was a fox that liked to run and jump and play all day long in the sun. " * 3}
    body |= {"max_tokens": 1, "temperature": 0}
    answers = [
        keyed.post("/v1/completions", body, **headers)
        for headers in (
            {"Authorization": "Bearer one"},
            {"X_Api_Key": "one"},
            {"Authorization": "bearer  schlüssel".encode().decode("latin-1")},
            {"Authorization": f"Basic {base64.b64encode('any:schlüssel'.encode()).decode()}"},  # a browser's password
        )
    ]
    assert [answer.status for answer in answers] == [200] * 4
    cached = [answer.json["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[0] == cached[2] == 0 and cached[1] > 0  # each key has a cache of its own


def test_hosts(model: Model) -> None:
    with serving(model, Settings(allowed_hosts=("localhost", "[::1]"))) as server:
        for host, status in (
            ("localhost", 200),
            ("LOCALHOST:80", 200),
            ("[::1]:8000", 200),
            ("evil.example", 400),
            ("localhost.evil.example:80", 400),
        ):
            assert server.get("/v1/models", Host=host).status == status


# Queue


@pytest.mark.parametrize("serve", [serving, serving_linked])
def test_too_many_requests(model: Model, serve: Serving) -> None:
    """vLLM #18826, #13395, #2901, PR #49445."""
    with serve(model, Settings(queue_sequences=1)) as server:
        held = [server.begin("/v1/completions", LONG_TEXT | {"stream": True}) for _ in range(5)]  # 4 run, 1 waits
        eventually(lambda: server.service.admission.sequences == 5, "five requests")
        answer = server.post("/v1/completions", LONG_TEXT)
        assert answer.status == 429 and answer.error["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        for connection in held:
            connection.close()
        eventually(lambda: server.idle, "the end of all requests")
        assert server.post("/v1/completions", LONG_TEXT | {"max_tokens": 1}).status == 200


@pytest.mark.parametrize("serve", [serving, serving_linked])
def test_too_many_prompt_tokens(model: Model, serve: Serving) -> None:
    with serve(model, Settings(queue_tokens=100)) as server:
        with model.exclusive():  # no request gets its first token
            first = server.begin("/v1/completions", LONG_TEXT | {"prompt": [5] * 300})  # alone, more than the limit
            eventually(lambda: server.service.admission.tokens == 300, "the first request")
            answer = server.post("/v1/completions", LONG_TEXT | {"prompt": [5] * 10})
            assert answer.status == 429 and "prompt tokens" in answer.error["message"]
        eventually(lambda: server.service.admission.tokens == 0, "the first token")
        first.close()
        eventually(lambda: server.idle, "the end of all requests")


# Clients that leave


def is_running(server: Running) -> bool:
    return server.stats.running > 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_client_leaves_while_tokens_are_generated(either: Running, path: str, stream: bool) -> None:
    """llama.cpp #11414, #11720, #13262."""
    body = {"max_tokens": 490, "ignore_eos": True, "stream": stream, "input": "Hi"}
    body |= {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    before = either.stats.requests
    connection = either.begin(path, body)
    eventually(lambda: either.stats.requests > before and (is_running(either) or either.idle), "the request")
    connection.close()
    eventually(lambda: either.idle, "the end of the request")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_leaves_while_it_waits(either: Running, stream: bool) -> None:
    """llama.cpp #24496, PR #24630."""
    held = [either.begin("/v1/completions", LONG_TEXT | {"n": 1, "seed": n}) for n in range(4)]
    eventually(lambda: either.stats.running == 4, "four texts")
    waiting = either.begin("/v1/completions", LONG_TEXT | {"stream": stream, "prompt": [7] * 200, "n": 2})
    eventually(lambda: either.service.admission.sequences == 6, "the request")
    waiting.close()
    eventually(lambda: either.service.admission.sequences <= 4, "the end of the request that waits")
    for connection in held:
        connection.close()


def test_others_go_on_when_a_client_leaves(either: Running) -> None:
    """ik_llama.cpp #1929."""
    body = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 200, "ignore_eos": True}
    alone = either.post("/v1/completions", body).json["choices"]
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(either.post("/v1/completions", body).json["choices"]))
    thread.start()
    for stream in (True, False) * 4:
        either.begin("/v1/completions", LONG_TEXT | {"stream": stream}).close()
    thread.join()
    assert found == [alone]


@pytest.mark.parametrize("serve", [serving, serving_linked])
def test_a_request_has_a_time_limit(model: Model, serve: Serving) -> None:
    with serve(model, Settings(request_timeout_s=0.05)) as server:
        body = LONG_TEXT | {"n": 16, "prompt": ["a", "b", "c"]}
        answer = server.post("/v1/completions", body)
        assert answer.status == 504 and answer.error["code"] == "timeout"
        answer = server.post("/v1/completions", body | {"stream": True})
        assert answer.status == 504 or answer.events[-1]["error"]["code"] == "timeout"
        eventually(lambda: server.idle, "the end of all requests")


def test_a_silent_stream_sends_comments(model: Model) -> None:
    with serving(model, Settings(keep_alive_s=0.02)) as server:
        with model.exclusive():
            connection = server.begin("/v1/completions", LONG_TEXT | {"stream": True, "max_tokens": 1})
            read_until(connection, b": keep-alive\n\n")
        connection.close()
        eventually(lambda: server.idle, "the end of the request")


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


def samples(server: Running) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(server.get("/metrics").body.decode())
    found: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def test_metrics(either: Running) -> None:
    before = samples(either)
    answer = either.post("/v1/completions", LONG_TEXT | {"max_tokens": 5, "n": 2})
    assert answer.status == 200
    after = samples(either)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    prefix = "numballama:"
    for name, count in (
        ("time_to_first_token_seconds_count", 1),
        ("inter_token_latency_seconds_count", 8),
        ("e2e_request_latency_seconds_count", 2),
        ("request_queue_time_seconds_count", 1),
        ("request_success_total", 2),
        ("request_generation_tokens_sum", 10),
        ("generation_tokens_total", 10),
        ("request_prompt_tokens_sum", 5),
    ):
        assert grown[prefix + name] == count, name
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"):
        assert after[prefix + name] == 0
    assert {f"{prefix}prefix_cache_queries_total", f"{prefix}prefix_cache_hits_total"} <= set(after)


def test_tokens_that_come_together_are_all_counted() -> None:
    """A reader that is late gets several at once, with the first one too: a text of n tokens has n - 1 latencies."""
    seen: list[tuple[float, int]] = []
    metrics = SimpleNamespace(inter_token=SimpleNamespace(observe=lambda *each: seen.append(each)))
    choices = [SimpleNamespace(tokens=0, first=0.0, latest=0.0)]
    generation: Any = SimpleNamespace(_service=SimpleNamespace(metrics=metrics), _choices=choices)
    Generation._count(generation, TextPart(0, tokens=[1, 2, 3]), 5.0)
    Generation._count(generation, TextPart(0, tokens=[4, 5]), 7.0)
    assert seen == [(0, 2), (1, 2)]


@pytest.mark.parametrize("key", ["regex", "grammar"])
def test_a_grammar_is_checked_though_nothing_is_generated(either: Running, key: str) -> None:
    answer = either.post("/v1/completions", LONG_TEXT | {"max_tokens": 0, "ignore_eos": False, key: "[a"})
    assert answer.status == 400 and answer.error["param"] == key


def test_metrics_count_as_usage_does(either: Running) -> None:
    """Tokens that a grammar forces are generated ones."""
    before, schema = samples(either), {"const": {"a long name of a property": ["and a long text", 12345]}}
    body = LONG_TEXT | {"prompt": [40] * 70, "json_schema": schema, "ignore_eos": False}
    body["cache_salt"] = type(either).__name__
    usages = [either.post("/v1/completions", body).json["usage"] for _ in range(2)]
    grown = {name.removeprefix("numballama:"): value - before.get(name, 0) for name, value in samples(either).items()}
    assert [each["prompt_tokens_details"]["cached_tokens"] for each in usages] == [0, 64]
    assert grown["prompt_tokens_total"] == 70 + 6 and grown["prefix_cache_hits_total"] == 64
    assert grown["generation_tokens_total"] == sum(each["completion_tokens"] for each in usages) > 20


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


def test_no_prompt_in_the_log(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    body = {"prompt": "a secret word", "max_tokens": 1}
    with serving(model) as server:
        server.post("/v1/completions", body)
        server.post("/v1/completions", body | {"max_tokens": -1})
        eventually(lambda: server.idle)
    time.sleep(0)
    assert "POST /v1/completions 200" in caplog.text and "secret" not in caplog.text
    with serving(model, Settings(log_prompts=True)) as server:
        server.post("/v1/completions", body)
    assert "secret" in caplog.text


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
