"""The engine for requests of other processes, with both sides in this one. Other files test what clients see."""

from __future__ import annotations

import time
from typing import Any

import pytest

import numballama
from numballama.errors import DeviceError, Error
from numballama.model import Model
from numballama.sampling import SamplingParams
from numballama.server.engine_host import EngineHost
from numballama.server.remote import params_as_json, params_of
from numballama.server.settings import Settings
from tests.helpers.http_server import eventually, serving_linked

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
        data = held.recv(1 << 16)
        assert data.startswith(b"HTTP/1.1 503 ") and b"the device is tired" in data
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


def test_a_template_of_the_operator_is_checked(model: Model) -> None:
    host = EngineHost(Settings(chat_template="absent"), lambda: None, lambda link, head: None)
    with pytest.raises(Error, match="no chat template 'absent'"):
        host.ready(model)
    host.close()


def test_the_other_process_does_not_answer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numballama.server.remote.ANSWERED_WITHIN_S", 0.05)
    with serving_linked(model) as server:
        assert server.get("/health").status == 200
        monkeypatch.setattr(server.host, "_trouble", lambda: time.sleep(0.5))
        answer = server.get("/health")
        assert answer.status == 503 and "does not answer" in answer.error["message"]
        monkeypatch.setattr(server.host, "_trouble", lambda: "one of us has ended")
        eventually(lambda: "one of us has ended" in server.get("/health").error["message"], "the trouble")
