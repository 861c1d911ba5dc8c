"""The engine for requests of other processes, with both sides in this one. Other files test what clients see."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import numballama
from numballama.errors import DeviceError, Error
from numballama.model import Model
from numballama.sampling import SamplingParams
from numballama.server.engine_host import EngineHost, Outputs, RemoteRequest
from numballama.server.link import Link, pack
from numballama.server.remote import RemoteEngine, params_as_json, params_of
from numballama.server.service import LOADING
from numballama.server.settings import Settings
from tests.helpers.http_server import LONG, eventually, read_until, serving_linked

BODY: dict[str, Any] = {"prompt": "Once", "max_tokens": 3, "temperature": 0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens": None, "seed": 2**63, "logprobs": 0, "n": 3, "temperature": 0.1},
        {"logit_bias": {5: -100.0, 7: 0.1}, "stop_token_ids": [3, 4], "min_tokens": 2, "ignore_eos": True},
        {"json_schema": {"type": "object", "properties": {"ü": {"const": "\ud800"}}}},
        {"grammar": 'start: "a"', "frequency_penalty": 1, "presence_penalty": -1, "repetition_penalty": 1.5},
        {"regex": "a+", "top_k": 0, "top_p": 0.5, "min_p": 0.25},
    ],
)
def test_settings_are_the_same_in_the_other_process(options: dict[str, Any]) -> None:
    """Strings that end a text are looked for where the text is."""
    params = SamplingParams(**options, stop=["x"])
    assert params_of(params_as_json(params)) == SamplingParams(**options)


def test_a_model_that_is_loaded_again(model: Model) -> None:
    with serving_linked(model) as server:
        held = server.begin("/v1/completions", BODY | {"max_tokens": 10_000, "ignore_eos": True, "n": 4})
        eventually(lambda: server.stats.running == 4, "the request")
        server.host.unload("the device is tired")
        answer = server.post("/v1/completions", BODY)
        assert answer.status == 503 and answer.error["message"] == "the device is tired"
        assert server.get("/health").error["message"] == "the device is tired"
        assert read_until(held, b"the device is tired").startswith(b"HTTP/1.1 503 ")
        held.close()
        server.host.ready(model)
        server.host.reloaded()
        eventually(lambda: server.get("/health").status == 200, "the model")
        assert server.post("/v1/completions", BODY).status == 200
        assert "numballama:model_reloads_total 1.0" in server.get("/metrics").body.decode()
        eventually(lambda: server.idle, "the end of all requests")


def test_a_device_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request ends with the failure, and further ones are refused, until the model is loaded again."""

    def collect(ticket: object) -> None:
        raise DeviceError("it burns")

    with numballama.compile(None, device="cpu", max_sequences=2) as model, serving_linked(model) as server:
        assert server.post("/v1/completions", BODY).status == 200
        monkeypatch.setattr(model._runner, "collect", collect)
        for _ in range(2):
            answer = server.post("/v1/completions", BODY)
            assert answer.status == 503 and answer.error["code"] == "engine_failed"
            assert answer.error["message"] == "it burns"
        assert "it burns" in server.get("/health").error["message"]


def test_a_model_that_is_unloaded_while_a_grammar_is_compiled(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, let = threading.Event(), threading.Event()

    def constraint(*_: object) -> None:
        asked.set()
        assert let.wait(LONG)

    monkeypatch.setattr(model, "constraint", constraint)
    with serving_linked(model) as server:
        held = server.begin("/v1/completions", BODY | {"regex": "a"})
        assert asked.wait(LONG)
        server.host.unload("the device is tired")
        let.set()
        assert read_until(held, b"the device is tired").startswith(b"HTTP/1.1 503 ")
        held.close()
        assert not server.host._remotes


def test_no_thread_waits_for_an_answer_when_the_process_ends(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python waits for its threads when it ends."""
    asked, let, ended = threading.Event(), threading.Event(), threading.Event()
    ask = RemoteEngine.ask

    def watched(*arguments: Any) -> Any:
        try:
            return ask(*arguments)
        finally:
            ended.set()

    def check(*_: object) -> None:
        asked.set()
        assert let.wait(LONG)

    monkeypatch.setattr(RemoteEngine, "ask", watched)
    monkeypatch.setattr(model, "check_constraint", check)
    try:
        with serving_linked(model) as server:
            held = server.begin("/v1/completions", BODY | {"max_tokens": 0, "regex": "a"})
            assert asked.wait(LONG) and not ended.is_set()
            held.close()
        assert ended.wait(5)
    finally:
        let.set()


@pytest.fixture
def host() -> Iterator[EngineHost]:
    host = EngineHost(Settings(), lambda link, head: None)
    yield host
    host.close()


@contextlib.contextmanager
def served(host: EngineHost, kind: type[Link] = Link) -> Iterator[Link]:
    """The far end of a link that a host serves."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=host.serve, args=(kind(ours, "http"),))
        thread.start()
        far = Link(theirs, "far")
        try:
            yield far
        finally:
            far.close()
            thread.join(LONG)
    assert not thread.is_alive()


def test_grammars_do_not_wait_for_the_logits_of_prompts(host: EngineHost) -> None:
    """Of which one request at a time has some, whichever process it is from."""
    let, here, most = threading.Event(), [0], [0]

    class Slow:
        def prompt_logprobs(self, ids: list[int], top: int) -> list[None]:
            here[0] += 1
            most[0] = max(most[0], here[0])
            assert let.wait(LONG)
            here[0] -= 1
            return [None for _ in ids]

        def check_constraint(self, settings: SamplingParams) -> None:
            pass

    host._model = Slow()  # type: ignore[assignment]
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(served(host)) for _ in range(3)]
        for link in links:
            assert link.receive_one() is not None
            link.send(pack({"do": "logprobs", "top": 0, "ask": 1}, [1, 2]))
        links[0].send(pack({"do": "check", "params": "{}", "ask": 2}))
        links[0].socket.settimeout(LONG)
        try:
            assert links[0].receive_one() == {"answer": 2}
        finally:
            let.set()
        assert [link.receive_one() for link in links] == [{"answer": 1, "logprobs": [None, None]}] * 3
    assert most == [1]
    host._model = None


def test_requests_of_a_process_that_ends_while_others_submit(host: EngineHost) -> None:
    """All are cancelled, though more come meanwhile."""
    ours, theirs = socket.socketpair()
    others = Outputs(Link(ours, "other"))

    class Watched(RemoteRequest):
        @property
        def outputs(self) -> Outputs:
            host._remotes[f"more {len(host._remotes)}"] = RemoteRequest(others, 0)
            return self._outputs

        @outputs.setter
        def outputs(self, outputs: Outputs) -> None:
            self._outputs = outputs

    with ours, theirs, served(host) as far:
        assert far.receive_one() is not None
        (outputs,) = host._outputs.values()
        remotes = [Watched(outputs, number) for number in range(3)]
        host._remotes.update({str(each.number): each for each in remotes})
    assert all(each.cancelled for each in remotes)
    assert not any(each.cancelled for each in host._remotes.values() if type(each) is RemoteRequest)


def test_a_process_that_starts_hears_the_latest_of_the_model_last(host: EngineHost) -> None:
    told: list[threading.Thread] = []

    class Slow(Link):
        def send(self, message: bytes) -> None:
            if not told:  # what was true when the process came; the model is loaded just now
                told.append(threading.Thread(target=host._tell, args=({"ready": {}},)))
                told[0].start()
                told[0].join(0.3)
            super().send(message)

    with served(host, Slow) as far:
        heard: list[Any] = []
        while len(heard) < 2:
            heard += [head for head, _ in far.receive()]
        told[0].join(LONG)
    assert heard == [{"unload": LOADING}, {"ready": {}}]


def test_a_template_of_the_operator_is_checked(model: Model) -> None:
    host = EngineHost(Settings(chat_template="absent"), lambda link, head: None)
    with pytest.raises(Error, match="no chat template 'absent'"):
        host.ready(model)
    host.close()


def test_the_other_process_does_not_answer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_linked(model) as server:
        assert server.get("/health").status == 200
        with monkeypatch.context() as patch:
            patch.setattr("numballama.server.remote.ANSWERED_WITHIN_S", 0.05)
            patch.setattr(EngineHost, "stats", property(lambda host: time.sleep(0.5)))
            answer = server.get("/health")
        assert answer.status == 503 and "does not answer" in answer.error["message"]
        eventually(lambda: server.get("/health").status == 200, "an answer")
