"""A service whose model is loaded again after its device has failed."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest

import numballama
from numballama import DeviceError, Error, Model
from numballama import model as models
from numballama.checkpoint import Checkpoint, Weight
from numballama.parallel.processes import ProcessBackend
from numballama.server import loader
from numballama.server.loader import FIRST_PAUSE_S, LONGEST_PAUSE_S, WATCH_S, ModelLoader
from numballama.server.service import DRAINING, Service
from numballama.server.settings import Settings
from tests.helpers.bpe import chat_model
from tests.helpers.http_server import LONG, Answered, Linked, Running, Serving, eventually, serving, serving_linked
from tests.helpers.processes import is_alive

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


def test_a_rank_that_is_killed_while_nothing_runs_costs_no_request(
    ranks: list[ProcessBackend], server: Running
) -> None:
    loads = ModelLoader(compiled, server.service)
    loads.start()
    try:
        eventually(lambda: server.get("/health").status == 200, "the model")
        want = answer(server).json["choices"][0]["text"]
        assert ranks[0].failure is None and server.stats.requests == 1
        os.kill(ranks[0].group.processes[0].pid, signal.SIGKILL)
        eventually(lambda: "rank 1 ended with signal SIGKILL" in server.get("/health").body.decode(), "the failure", 2)
        eventually(lambda: len(ranks) == 2 and server.get("/health").status == 200, "the model, again")
        assert answer(server).json["choices"][0]["text"] == want
    finally:
        assert loads.stop(10)
    assert server.service.failure is None and ranks[1].failure is None  # it was ended, and did not fail


def test_a_load_that_fails_is_tried_again(ranks: list[ProcessBackend], server: Running) -> None:
    """The reason is told meanwhile. Requests get 503 and may come back."""
    failures: list[str] = []
    refused: list[Answered] = []

    def load() -> Model:
        if ranks and len(failures) < 2:
            failures.append(server.get("/health").error["message"])
            refused.append(answer(server))
            raise DeviceError("the card is busy")
        return compiled()

    loads = ModelLoader(load, server.service)
    loads.start()
    try:
        eventually(lambda: server.get("/health").status == 200, "the model")
        os.kill(ranks[0].group.processes[0].pid, signal.SIGKILL)
        eventually(lambda: len(ranks) == 2 and server.get("/health").status == 200, "the model, again")
        assert answer(server).status == 200
    finally:
        assert loads.stop(10)
    assert all(each.status == 503 and each.headers["retry-after"] == "5" for each in refused)
    assert [each.error["message"] for each in refused] == failures
    first, second = failures
    assert first == "the model is being loaded again, because its device has failed: rank 1 ended with signal SIGKILL"
    assert (
        second == "the model could not be loaded again, and the server tries it again within 0.05 s: the card is busy"
    )


@pytest.mark.parametrize("serve", [serving, serving_linked])
def test_a_reload_may_bring_another_model(serve: Serving, model: Model, tmp_path: Path) -> None:
    """Its file may have been replaced: requests then have its tokenizer, template and limits, in all processes."""
    template = "{{ messages[0].content }}"

    def look() -> tuple[Any, ...]:
        """What answers show of the tokenizer, the template and the limits."""
        info, tokens = server.get("/tokenizer_info").json, server.post("/tokenize", {"prompt": "Once upon"}).json
        again = server.post("/detokenize", {"tokens": tokens["tokens"]}).json["prompt"]
        return info["vocab_size"], info["chat_template"] == template, tokens["max_model_len"], again

    with numballama.compile(chat_model(tmp_path, template=template), device="cpu", threads=1, context=24) as other:
        assert other.tokenizer is not None and other.tokenizer.vocab_size != model.config.vocab_size
        with serve(model) as server:
            assert look() == (model.config.vocab_size, False, model.context, "Once upon")
            service = server.host if isinstance(server, Linked) else server.service
            service.unload("the device is tired")
            service.ready(other)
            eventually(lambda: server.get("/health").status == 200, "the other model")
            assert look() == (other.tokenizer.vocab_size, True, 24, "Once upon")
            chat = {"messages": [{"role": "user", "content": "Once upon"}], "max_tokens": 1}
            found = server.post("/v1/chat/completions", chat).json["usage"]["prompt_tokens"]
            assert found == len(other.tokenizer.encode("Once upon"))


def test_the_first_load_that_fails_is_told(server: Running) -> None:
    told: list[str] = []

    def load() -> Model:
        raise Error("no such file")

    loads = ModelLoader(load, server.service, on_error=lambda: told.append("failed"))
    loads.start()
    eventually(lambda: loads.error is not None, "the error")
    assert loads.stop(10) and told == ["failed"] and str(loads.error) == "no such file"
    assert server.get("/health").status == 503


class Pauses(threading.Event):
    """An event that nobody waits for: it notes the pauses, and is set after as many as are wanted."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted, self.found = wanted, list[float]()

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        if timeout != WATCH_S:
            self.found.append(timeout)
            if len(self.found) == self.wanted:
                self.set()
        return self.is_set()


class Failed(Service):
    """A service whose engine has failed, whatever its model is."""

    failure = property(lambda self: DeviceError("rank 1 ended"))

    def ready(self, model: Model) -> None:
        pass


def test_pauses_grow_up_to_the_longest(caplog: pytest.LogCaptureFixture) -> None:
    service, loaded = Failed(Settings()), list[str]()

    def load() -> Any:
        loaded.append(str(service.unhealthy()))
        if len(loaded) > 1:
            raise DeviceError("the card is busy")

    loads = ModelLoader(load, service)
    pauses = loads._stopped = Pauses(9)
    with caplog.at_level(logging.ERROR, "numballama.server"):
        loads.start()
        loads._thread.join(LONG)
    service.close()
    assert FIRST_PAUSE_S == 1 and LONGEST_PAUSE_S == 60
    assert pauses.found == [1, 2, 4, 8, 16, 32, 60, 60, 60] and len(loaded) == 1 + 9
    assert [float(each) for each in re.findall(r"next try in (\d+) s", caplog.text)] == pauses.found


def test_a_pause_ends_when_the_server_does() -> None:
    service, tries = Failed(Settings()), list[float]()

    def load() -> Any:
        tries.append(time.monotonic())
        if len(tries) > 1:
            raise DeviceError("the card is busy")

    loads = ModelLoader(load, service)
    loads.start()
    eventually(lambda: len(tries) == 2, "the second try")
    started = time.monotonic()
    assert loads.stop(LONG) and time.monotonic() - started < FIRST_PAUSE_S / 2
    service.close()
    assert len(tries) == 2 and "tries it again within 1 s: the card is busy" in str(service.unhealthy())
    service.draining = True  # then it does not
    assert service.unhealthy() == DRAINING


SERVE = """
import json, sys, threading, time
import numballama
from numballama import model
from numballama.parallel.processes import ProcessBackend
from numballama.server import run
from numballama.server.settings import Settings

def open_backend(device, weights, threads, invariant, gpus, checkpoint, dtype):
    made = ProcessBackend(checkpoint.path, checkpoint.config, weights, ["cpu"] * 2, threads, invariant)
    say([process.pid for process in made.group.processes])
    return made

def say(what):
    print(json.dumps(what), flush=True)

def load():
    model.open_backend = open_backend
    made = numballama.compile(None, device="cpu", threads=1)
    say("loaded")
    if loads:  # again, and as long as it is told
        time.sleep(float(sys.argv[1]))
    loads.append(made)
    return made

if __name__ == "__main__":
    loads = []
    run.LOADED_WITHIN_S = float(sys.argv[2])
    run.serve(load, Settings(), run.Address(port=0), show=say)
    end = time.monotonic() + 1
    while threading.active_count() > 1 and time.monotonic() < end:
        time.sleep(0.01)
    say([thread.name for thread in threading.enumerate()])
"""


@pytest.mark.skipif(os.name != "posix", reason="processes inherit a file")
@pytest.mark.parametrize(
    ("load_s", "within_s", "last"), [(0.5, 5, ["MainThread"]), (600, 0.5, "loaded")], ids=["ends", "goes on"]
)
def test_sigterm_during_a_reload(load_s: float, within_s: float, last: Any) -> None:
    """The process ends with code 0, and with it its threads and ranks, whether the load ends in time or not."""
    command = [sys.executable, "-c", SERVE, str(load_s), str(within_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            lines = said(process.stdout, "curl ")
            (pid,) = next(line for line in lines if isinstance(line, list))
            os.kill(pid, signal.SIGKILL)
            again = said(process.stdout, "loaded")
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            code = process.wait(LONG)
            took_s = time.monotonic() - started
            after = [json.loads(line) for line in process.stdout]
            log = process.stderr.read()
        finally:
            process.kill()
    assert code == 0 and took_s < min(load_s, within_s) + 4
    assert [*again, *after][-1] == last
    (other,) = again[0]
    eventually(lambda: not is_alive(other), "the end of the other rank", 2)
    assert log.count("because its device has failed: rank 1 ended with signal SIGKILL") == 1 and "Traceback" not in log


def said(lines: IO[str], end: str) -> list[Any]:
    """What the server said, up to a line that begins so."""
    found: list[Any] = []
    for line in lines:
        found.append(json.loads(line))
        if isinstance(found[-1], str) and found[-1].startswith(end):
            return found
    raise AssertionError(found)
