"""Moments at which a rank of a model fails, for `rank_failures.py`: what runs then, and what comes of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from unittest import mock

import faulty_rank
import numpy as np
from faulty_rank import EXIT_CODE, MANY, NOW, WORDS
from left_behind import processes_of, running
from ranks import opened

from numballama import DeviceError, Model, SamplingParams
from numballama.config import ModelConfig
from numballama.parallel.processes import ProcessBackend, ProcessProgram
from numballama.sampling import SamplerTable

SCRIPT = Path(__file__).with_name("rank_failures.py")
SHAPE = ModelConfig(512, 1536, 4, 8, 2, 768, 6144, tied_embeddings=False)
PATIENCE_S = 20.0
"""Seconds after which this script kills a rank that nothing else has ended."""
LOADING = {
    "before weights load": "open", "in the middle of the weights": "weights", "ranks connect": "connect",
    "the first program is made": "program", "graphs are captured": "capture", "kernels are prepared": "prepare",
}  # fmt: skip
"""Moments while a model is compiled, and what `faulty_rank` calls them."""
RUNNING = {
    "first step of a prompt": "prompt 1", "middle of a long prompt": "prompt 3",
    "first step of decoding": "decode of 1", "middle of decoding": "decode of 1 20",
    f"{MANY} sequences decode": f"decode of {MANY} 20",
}  # fmt: skip
IDLE, CLOSING, RANK_0 = "idle", "the model is closed", "rank 0 itself"
MOMENTS = (*LOADING, *RUNNING, IDLE, CLOSING, RANK_0)
HANGS = ("stop", "loop")
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=1, seed=5, max_tokens=24, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@dataclass(frozen=True)
class Place:
    """The model and where it runs."""

    folder: Path
    path: Path
    device: str
    gpus: int

    def open(self) -> contextlib.AbstractContextManager[Model]:
        return opened(self.path, self.device, self.gpus, SHAPE.context, MANY)


def prompt(tokens: int) -> list[int]:
    return np.random.default_rng(tokens).integers(0, SHAPE.vocab_size, tokens).tolist()


def ranks_of(model: Model) -> list[int]:
    """The processes of ranks 1 and up."""
    return [process.pid for process in cast("ProcessBackend", model.backend).group.processes]


def tokens_of(model: Model) -> list[int]:
    """Some tokens that the model gives: the likeliest ones, and drawn ones, in which all logits have a part."""
    requests = [model.token_engine.submit(prompt(5), GREEDY), model.token_engine.submit(prompt(90), DRAWN)]
    return [event.token for request in requests for event in request]


# Failures


@contextlib.contextmanager
def impatient(place: Place) -> Iterator[None]:
    """Kill the failed rank after `PATIENCE_S`, so that a hang is found and the next failure can come."""
    done = threading.Event()

    def wait() -> None:
        if not done.wait(PATIENCE_S) and (found := faulty_rank.event(place.folder)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[1], signal.SIGKILL)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def failed_at(place: Place) -> float:
    if (found := faulty_rank.event(place.folder)) is None:
        raise AssertionError("the rank did not fail at this moment")
    return found[0]


def while_running(model: Model, moment: str, place: Place) -> tuple[float, list[str]]:
    """Seconds from the failure to the error of the last request, and what the errors say."""
    tokens = 40 + (2 * model.backend.prefill_chunk if moment == RUNNING["middle of a long prompt"] else 0)
    count = MANY if str(MANY) in moment else 1
    requests = [model.token_engine.submit(prompt(tokens)[number:], ENDLESS) for number in range(count)]
    errors = list[str]()
    for request in requests:
        try:
            list(request)
            errors.append("no error")
        except DeviceError as error:
            errors.append(str(error))
    return time.monotonic() - failed_at(place), errors


def while_idle(model: Model, way: str, place: Place) -> tuple[float, list[str]]:
    """The backend knows of a rank that has ended. One that hangs is found when it is needed."""
    started = failed_at(place)
    if way not in HANGS:
        while model.backend.failure is None and time.monotonic() - started < PATIENCE_S:
            time.sleep(0.001)
    else:
        time.sleep(0.3)
        started = time.monotonic()
    try:
        tokens_of(model)
        error = "no error"
    except DeviceError as found:
        error = str(found)
    return time.monotonic() - started, [error]


def fail_loading(place: Place, moment: str, way: str) -> tuple[float, list[str]]:
    """Compile a model whose rank fails meanwhile."""
    faulty_rank.prepare(place.folder, LOADING[moment], way)
    try:
        with place.open():
            errors = ["no error"]
    except DeviceError as error:
        errors = [str(error)]
    return time.monotonic() - failed_at(place), errors


def fail(place: Place, model: Model, moment: str, way: str) -> tuple[float, list[str]]:
    """Let the rank fail: seconds to the error, and what all errors say. `close` ends the request that runs."""
    if moment == RANK_0:
        return rank_0_raises(model)
    if moment == CLOSING:
        model.token_engine.start()
        next(iter(model.token_engine.submit(prompt(5), ENDLESS)))
    faulty_rank.prepare(place.folder, RUNNING.get(moment, NOW), way)
    faulty_rank.arm(place.folder, ranks_of(model)[-1])
    if moment in RUNNING:
        return while_running(model, RUNNING[moment], place)
    while faulty_rank.event(place.folder) is None:
        time.sleep(0.001)
    if moment == IDLE:
        return while_idle(model, way, place)
    model.close()
    return time.monotonic() - failed_at(place), []


def rank_0_raises(model: Model) -> tuple[float, list[str]]:
    """What the device of rank 0 raises while it decodes ends the others, and is the error of the request."""
    first, raised = cast("ProcessProgram", model.program).first, list[float]()
    submit, runs = first.submit, itertools.count()

    def failing(tokens: int, rows: int, table: SamplerTable | None) -> int:
        if next(runs) == 10:
            raised.append(time.monotonic())
            raise RuntimeError(WORDS)
        return submit(tokens, rows, cast("SamplerTable", table))

    with mock.patch.object(first, "submit", failing):
        try:
            list(model.token_engine.submit(prompt(5), ENDLESS))
            errors = ["no error"]
        except RuntimeError as error:
            errors = [f"rank 0 {error}"]
    return time.monotonic() - raised[0], errors


def rank_0_ends(place: Place, way: str) -> tuple[float, set[int]]:
    """End a process that decodes, and wait for its ranks. Returns seconds, and the processes."""
    command = [sys.executable, SCRIPT, "--device", place.device, "--gpus", str(place.gpus), "--decode", place.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "decodes\n":
            raise RuntimeError("the process that decodes has failed")
        ranks = processes_of(process.pid)
        started = time.monotonic()
        if way == "kill":
            process.kill()
        else:
            process.stdin.close()
        process.wait()
    while running(ranks) and time.monotonic() - started < PATIENCE_S:
        time.sleep(0.001)
    return time.monotonic() - started, ranks


def decode(place: Place) -> None:
    """Be a process that decodes until its input ends, and then ends without a word."""
    with place.open() as model:
        model.token_engine.start()
        requests = [model.token_engine.submit(prompt(5), ENDLESS) for _ in range(64)]
        next(iter(requests[0]))
        print("decodes", flush=True)
        sys.stdin.read()
        os._exit(EXIT_CODE)
