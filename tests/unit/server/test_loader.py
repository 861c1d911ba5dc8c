"""A service whose model is loaded again after its device has failed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import numballama
from numballama import DeviceError, Error, Model
from numballama import model as models
from numballama.checkpoint import Checkpoint, Weight
from numballama.parallel.processes import ProcessBackend
from numballama.server import loader
from numballama.server.loader import ModelLoader
from tests.helpers.http_server import Running, eventually, serving

pytestmark = pytest.mark.slow
GREEDY = {"model": "any", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[ProcessBackend]:
    """The backends of models that are compiled: two ranks on the CPU, each in a process."""
    made: list[ProcessBackend] = []

    def open_backend(
        device: str, weights: dict[str, Weight], threads: int, invariant: bool, gpus: int, checkpoint: Checkpoint,
        dtype: Any,
    ) -> ProcessBackend:  # fmt: skip
        made.append(ProcessBackend(checkpoint.path, checkpoint.config, weights, ["cpu"] * 2, threads, invariant))
        return made[-1]

    monkeypatch.setattr(models, "open_backend", open_backend)
    monkeypatch.setattr(loader, "FIRST_PAUSE_S", 0.05)
    return made


def compiled() -> Model:
    return numballama.compile(None, device="cpu", threads=1, max_sequences=4)


@pytest.fixture
def server() -> Iterator[Running]:
    with serving(None) as running:
        yield running


def answer(server: Running, **fields: Any) -> Any:
    return server.post("/v1/completions", GREEDY | fields)


def test_a_rank_that_is_killed_costs_the_requests_in_flight_only(ranks: list[ProcessBackend], server: Running) -> None:
    loads = ModelLoader(compiled, server.service)
    loads.start()
    try:
        eventually(lambda: server.get("/health").status == 200, "the model")
        want = answer(server).json["choices"][0]["text"]
        (process,) = ranks[0].group.processes
        with ThreadPoolExecutor(6) as pool:
            options = {"max_tokens": 200, "ignore_eos": True}
            pending = [pool.submit(answer, server, **options, stream=number % 2 == 1) for number in range(6)]
            eventually(lambda: server.stats.running > 1, "requests that run")
            os.kill(process.pid, signal.SIGKILL)
            started = time.monotonic()
            answers = [each.result() for each in pending]
            assert time.monotonic() - started < 2
        for found in answers:  # a stream had begun, or the request may be sent again, or it had ended
            assert found.status in (200, 503)
            assert b"rank 1 ended with signal SIGKILL" in found.body or b'"finish_reason":"length"' in found.body
            assert found.status == 200 or found.headers["retry-after"] == "5"
        assert any(b"rank 1 ended with signal SIGKILL" in found.body for found in answers)
        eventually(lambda: len(ranks) == 2 and server.get("/health").status == 200, "the model, again")
        assert answer(server).json["choices"][0]["text"] == want
        assert "numballama:model_reloads_total 1.0" in server.get("/metrics").body.decode()
        assert process.returncode == -signal.SIGKILL
    finally:
        assert loads.stop(10)
    assert ranks[1].group.processes[0].returncode == 0


def test_a_load_that_fails_is_tried_again(ranks: list[ProcessBackend], server: Running) -> None:
    """The reason is told meanwhile. Requests get 503 and may come back."""
    failures: list[str] = []

    def load() -> Model:
        if ranks and len(failures) < 2:
            failures.append(server.get("/health").body.decode())
            raise DeviceError("the card is busy")
        return compiled()

    loads = ModelLoader(load, server.service)
    loads.start()
    try:
        eventually(lambda: server.get("/health").status == 200, "the model")
        os.kill(ranks[0].group.processes[0].pid, signal.SIGKILL)
        refused = answer(server)
        assert refused.status == 503 and refused.headers["retry-after"] == "5"
        assert b"rank 1 ended with signal SIGKILL" in refused.body
        eventually(lambda: len(ranks) == 2 and server.get("/health").status == 200, "the model, again")
        assert answer(server).status == 200
    finally:
        assert loads.stop(10)
    first, second = failures
    assert "the model is being loaded again: rank 1 ended with signal SIGKILL" in first
    assert "the model could not be loaded again: the card is busy" in second


def test_the_first_load_that_fails_is_told(server: Running) -> None:
    told: list[str] = []

    def load() -> Model:
        raise Error("no such file")

    loads = ModelLoader(load, server.service, on_error=lambda: told.append("failed"))
    loads.start()
    eventually(lambda: loads.error is not None, "the error")
    assert loads.stop(10) and told == ["failed"] and str(loads.error) == "no such file"
    assert server.get("/health").status == 503
