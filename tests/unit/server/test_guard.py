"""What every request passes first: host, API key; and what is logged."""

from __future__ import annotations

import base64
import time
from typing import Any

import pytest

from numballama.model import Model
from numballama.server.settings import Settings
from tests.helpers.http_server import PATHS, Running, eventually, serving


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
