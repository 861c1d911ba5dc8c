"""Generations: the queue, clients that leave, limits of time, and what is counted."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from numballama.generate import TextPart
from numballama.model import Model
from numballama.server.generation import Generation
from numballama.server.settings import Settings
from tests.helpers.http_server import LONG_TEXT, Running, Serving, eventually, read_until, serving, serving_linked

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


@pytest.mark.parametrize("serve", [serving, serving_linked])
def test_a_prompt_that_can_never_fit_is_not_told_to_wait(model: Model, serve: Serving) -> None:
    with serve(model, Settings(queue_sequences=0, queue_tokens=100)) as server, model.exclusive():
        held = [server.begin("/v1/completions", LONG_TEXT | {"prompt": [5] * 20})]
        eventually(lambda: server.service.admission.tokens == 20, "a request that waits")
        answer = server.post("/v1/completions", LONG_TEXT | {"prompt": [5] * 513})
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert server.post("/v1/completions", LONG_TEXT | {"prompt": [5] * 512}).status == 429
        held += [server.begin("/v1/completions", LONG_TEXT | {"prompt": [5] * 20}) for _ in range(3)]
        eventually(lambda: server.service.admission.sequences == 4, "a full queue")
        answer = server.post("/v1/completions", LONG_TEXT | {"prompt": [5] * 513})
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        for connection in held:
            connection.close()


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


# What is counted


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
