"""Ranks in processes: the same text as one rank, and what happens when one of them, or the first, is gone."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numballama
from numballama import Model, SamplingParams, loader, model
from numballama.checkpoint import Weight
from numballama.errors import DeviceError, Error, UnsupportedError
from numballama.graph import KVLayout, build
from numballama.parallel import processes
from numballama.parallel.processes import ProcessBackend, ProcessProgram
from numballama.parallel.rank_memory import Kind, Until
from tests.helpers.processes import is_alive, run_python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="processes inherit a file")]

GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
LIMIT_S = 2.0
"""Seconds from a failure to its error, and to the end of all processes."""


def assert_gone(pids: list[int]) -> None:
    end = time.monotonic() + LIMIT_S
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(is_alive, pids))


class Opened:
    """A model that processes share, and its backend."""

    def __init__(self, made: Model, backend: ProcessBackend) -> None:
        self.model, self.backend = made, backend
        self.pids = [process.pid for process in backend.group.processes]


@pytest.fixture
def open_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Opened]]:
    """open_ranks(ranks, …): the packaged story model, split over this number of processes."""
    opened: list[Opened] = []

    def open_ranks(ranks: int, path: Path = loader.STORY_MODEL, *tokenizer: Path, **options: Any) -> Opened:
        config, backends = loader.open_checkpoint(path).config, list[ProcessBackend]()
        dtype = options.get("dtype")

        def open_backend(
            device: str, weights: dict[str, Weight], threads: int, invariant: bool, *others: Any
        ) -> ProcessBackend:
            backends.append(ProcessBackend(path, config, weights, ["cpu"] * ranks, threads, invariant, dtype=dtype))
            return backends[-1]

        with monkeypatch.context() as patch:
            patch.setattr(model, "open_backend", open_backend)
            made = numballama.compile(path, *tokenizer, device="cpu", threads=1, **options)
        opened.append(Opened(made, backends[0]))
        return opened[-1]

    yield open_ranks
    for each in opened:
        with contextlib.suppress(Error):
            each.model.close()
        each.backend.close()
        assert_gone(each.pids)


@pytest.mark.parametrize(("ranks", "dtype"), [(2, None), (4, None), (2, "f32")])
def test_the_story_of_several_processes_is_that_of_one(
    open_ranks: Callable[..., Opened], ranks: int, dtype: Any
) -> None:
    with numballama.compile(None, device="cpu", dtype=dtype) as one:
        want = one.generate("Once upon a time", params=GREEDY)
    several = open_ranks(ranks, dtype=dtype)
    assert len(several.pids) == ranks - 1
    assert several.model.generate("Once upon a time", params=GREEDY) == want
    several.model.close()
    assert_gone(several.pids)


def test_a_real_model_and_many_sequences(open_ranks: Callable[..., Opened], models: Path) -> None:
    """Prompts longer than a chunk, some without logits, beside others that decode; pages are given by commands."""
    files = models / "stories260K.bin", models / "tok512.bin"
    prompts = ["Once", "The dog " * 60, "A cat", "Once upon"]
    options: dict[str, Any] = {"max_sequences": 3, "batch_invariant": True}
    with numballama.compile(*files, device="cpu", **options) as one:
        want = one.generate(prompts, params=GREEDY)
    several = open_ranks(2, *files, **options)
    assert several.model.generate(prompts, params=GREEDY) == want
    assert several.model.logits([1, 2, 3]).shape == (3, 512)


def test_exchanges_are_timed(open_ranks: Callable[..., Opened]) -> None:
    """For one token and for two; a rank that is gone ends it. The text is the same before and after."""
    several = open_ranks(2, max_sequences=2)
    before = several.model.generate("Once", params=GREEDY)
    with several.model.exclusive():
        found = [several.backend.time_exchanges(several.model.graph, tokens) for tokens in (1, 2)]
    assert all(0 <= seconds < 1 for seconds in found)
    assert several.model.generate("Once", params=GREEDY) == before
    os.kill(several.pids[0], signal.SIGKILL)
    with pytest.raises(DeviceError, match="rank 1 ended with signal SIGKILL"):
        several.backend.time_exchanges(several.model.graph, 3)


def test_steps_with_an_exchange_are_not_timed(open_ranks: Callable[..., Opened]) -> None:
    """They would wait for the others. Where they are fused with more, a program is made in which they are not."""
    made = open_ranks(2)
    program: Any = made.model.program
    assert made.backend.program_to_time(program, made.model.graph) is program
    ops = program.graph.ops
    with made.model.exclusive() as session:
        session.set_inputs(program, [1])
        seconds, whole = made.backend.time_steps(program, ops, [0] * len(ops))
    assert [each > 0 for each in seconds] == [op.kind not in ("all_reduce", "all_gather") for op in ops] and whole > 0
    index = next(index for index, op in enumerate(ops) if op.kind == "all_reduce")
    ops[index] = replace(ops[index], kind="linear_all_reduce", body=(ops[index],))
    program.fusions = ["norm", "all_reduce"]
    timed = made.backend.program_to_time(program, made.model.graph)
    assert isinstance(timed, ProcessProgram) and timed is not program and timed.fusions == ["norm"]


def test_bandwidth_is_that_of_all_gpus(open_ranks: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's ranks share one memory: there it means nothing."""
    backend = open_ranks(2).backend
    first = backend.ranks[0]
    monkeypatch.setattr(first, "measure_bandwidth", lambda: 4e12)
    monkeypatch.setattr(first, "machine", lambda: {"gpu": {"name": "a GPU"}})
    assert backend.measure_bandwidth() is None and backend.machine() == {"gpu": {"name": "a GPU"}}
    monkeypatch.setattr(backend, "on_gpus", True)
    assert backend.measure_bandwidth() == 8e12


def test_batches_preemption_and_cancelled_requests(open_ranks: Callable[..., Opened], models: Path) -> None:
    """1 to 64 sequences in few pages, some of which are cancelled, and a session that goes back: as with one rank."""
    files = models / "stories260K.bin", models / "tok512.bin"
    options: dict[str, Any] = {"max_sequences": 64, "kv_tokens": 1024, "batch_invariant": True}
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    several = open_ranks(2, *files, **options)

    def generated(made: Model, count: int) -> list[list[int]]:
        prompts = [[1, *range(3 + number, 20 + number)] for number in range(count)]
        requests = [made.token_engine.submit(prompt, params) for prompt in prompts]
        for request in requests[5::7]:
            next(iter(request))
            request.cancel()
        return [[event.token for event in request] for number, request in enumerate(requests) if number % 7 != 5]

    with numballama.compile(*files, device="cpu", **options) as one:
        for count in (1, 7, 64):
            assert generated(several.model, count) == generated(one, count)
        assert several.model.token_engine.stats().preemptions > 0
        with one.exclusive() as alone, several.model.exclusive() as shared:
            for session in (alone, shared):
                session.prefill([1, 5, 9, 40, 7])
                session.truncate(2)
                session.prefill([8, 3])
            np.testing.assert_allclose(shared.logits, alone.logits, rtol=1e-4, atol=1e-4)


def kill_soon(pid: int, how: signal.Signals, killed: list[float], delay: float = 0.3) -> threading.Thread:
    def kill() -> None:
        time.sleep(delay)
        killed.append(time.monotonic())
        os.kill(pid, how)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_is_killed_ends_every_request(
    open_ranks: Callable[..., Opened], ranks: int, how: signal.Signals
) -> None:
    several = open_ranks(ranks, max_sequences=2)
    several.model.generate("Once", params=GREEDY)
    killed: list[float] = []
    thread = kill_soon(several.pids[-1], how, killed)

    def generate_on() -> None:
        while True:
            several.model.generate(["Once", "A cat"], params=GREEDY)

    with pytest.raises(DeviceError, match=f"rank {ranks - 1} ended with signal {how.name}; the model must be compiled"):
        generate_on()
    assert time.monotonic() - killed[0] < LIMIT_S
    thread.join()
    assert_gone(several.pids)
    with pytest.raises(DeviceError, match=f"rank {ranks - 1} ended with signal {how.name}"):
        several.model.generate("Once", params=GREEDY)


def test_requests_that_run_and_that_wait_all_end(open_ranks: Callable[..., Opened]) -> None:
    several = open_ranks(2, max_sequences=2)
    long = SamplingParams(max_tokens=400, temperature=1.0, ignore_eos=True)
    requests = [iter(several.model.submit(f"Story {number}", long)) for number in range(5)]
    next(requests[0])
    os.kill(several.pids[0], signal.SIGKILL)
    started = time.monotonic()
    for request in requests:
        with pytest.raises(DeviceError, match="rank 1 ended with signal SIGKILL"):
            list(request)
    assert time.monotonic() - started < LIMIT_S


def test_a_rank_that_is_stopped_is_killed(open_ranks: Callable[..., Opened]) -> None:
    """While it has nothing to do it may be stopped for as long as one likes."""
    several = open_ranks(2)
    want = several.model.generate("Once", params=GREEDY)
    several.backend.group.wait()  # rank 1 has done its last command too
    os.kill(several.pids[0], signal.SIGSTOP)
    time.sleep(LIMIT_S)
    os.kill(several.pids[0], signal.SIGCONT)
    assert several.model.generate("Once", params=GREEDY) == want
    os.kill(several.pids[0], signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(
        DeviceError,
        match=r"rank 1 has given no sign of life for 1.5 seconds: it is stopped; the model must be compiled",
    ):
        several.model.generate("Once", params=GREEDY)
    assert time.monotonic() - started < LIMIT_S + 0.5
    assert_gone(several.pids)


def test_the_end_of_a_rank_is_told_to_the_device(open_ranks: Callable[..., Opened]) -> None:
    """Its kernels may wait without a look at the memory of all. Also where the end came before it asked."""
    several, told = open_ranks(2), threading.Event()
    several.backend.group.on_stop(told.set)
    assert not told.is_set()
    os.kill(several.pids[0], signal.SIGKILL)
    assert told.wait(LIMIT_S)
    calls: list[str] = []
    several.backend.group.on_stop(lambda: calls.append("late"))
    assert calls == ["late"]
    several.backend.close()
    assert len(calls) == 2


def test_a_rank_that_is_killed_while_it_compiles(
    open_ranks: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    several = open_ranks(2)
    send = several.backend.group.send

    def send_and_kill(messages: list[bytes]) -> None:
        os.kill(several.pids[0], signal.SIGSTOP)  # else it may have answered before it is killed
        send(messages)
        os.kill(several.pids[0], signal.SIGKILL)

    monkeypatch.setattr(several.backend.group, "send", send_and_kill)
    with pytest.raises(DeviceError, match="rank 1 ended with signal SIGKILL"):
        several.backend.program(several.model.graph)


def test_a_rank_that_is_killed_while_nobody_waits(open_ranks: Callable[..., Opened]) -> None:
    several = open_ranks(2)
    os.kill(several.pids[0], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(DeviceError, match="rank 1 ended with signal SIGKILL"):
        several.model.generate("Once", params=GREEDY)
    assert time.monotonic() - started < LIMIT_S


@pytest.fixture
def signal_rank_1(monkeypatch: pytest.MonkeyPatch) -> Callable[[signal.Signals], list[subprocess.Popen[bytes]]]:
    """signal_rank_1(how): sends rank 1 a signal once its process is started. The result is all processes, by rank.

    One gets it: of several that are killed at once, any may be seen first.
    """

    def prepare(how: signal.Signals) -> list[subprocess.Popen[bytes]]:
        started: list[subprocess.Popen[bytes]] = []
        popen = subprocess.Popen

        def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
            started.append(popen(*arguments, **options))
            if len(started) == 1:
                os.kill(started[0].pid, how)
            return started[-1]

        monkeypatch.setattr(processes.subprocess, "Popen", start)
        return started

    return prepare


def test_a_rank_that_is_killed_while_it_loads(
    open_ranks: Callable[..., Opened], signal_rank_1: Callable[[signal.Signals], list[subprocess.Popen[bytes]]]
) -> None:
    started = signal_rank_1(signal.SIGKILL)
    with pytest.raises(DeviceError, match="rank 1 ended with signal SIGKILL"):
        open_ranks(4)
    assert_gone([process.pid for process in started])


def test_a_rank_that_is_stopped_while_it_loads(
    open_ranks: Callable[..., Opened],
    signal_rank_1: Callable[[signal.Signals], list[subprocess.Popen[bytes]]],
) -> None:
    """A minute without a sign of life is for ranks that run."""
    started, begin = signal_rank_1(signal.SIGSTOP), time.monotonic()
    with pytest.raises(DeviceError, match=r"rank 1 has given no sign of life for 1.5 seconds: it is stopped"):
        open_ranks(2)
    assert time.monotonic() - begin < 20
    assert_gone([process.pid for process in started])


@pytest.fixture
def fail_rank_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Opened, str, str], None]:
    """fail_rank_1(opened, moment, way): rank 1 of a model in `tmp_path` fails, as `benchmarks/faulty_rank.py` says."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    faulty_rank = importlib.import_module("faulty_rank")
    monkeypatch.setattr(processes, "RANK_PROCESS", faulty_rank.__name__)
    faulty_rank.prepare(tmp_path, "", "")

    def fail(several: Opened, moment: str, way: str) -> None:
        faulty_rank.prepare(tmp_path, moment, way)
        faulty_rank.arm(tmp_path, several.pids[0])

    return fail


def test_a_rank_that_goes_round_in_circles_is_killed(
    open_ranks: Callable[..., Opened], tmp_path: Path, fail_rank_1: Callable[[Opened, str, str], None]
) -> None:
    """It gives signs of life, but rank 0 waits for it."""
    several = open_ranks(2, Path(shutil.copy(loader.STORY_MODEL, tmp_path)))
    several.model.generate("Once", params=GREEDY)
    fail_rank_1(several, "decode of 1 5", "loop")
    started = time.monotonic()
    with pytest.raises(DeviceError, match=r"rank 1 has made no progress for 1.[5-9] seconds, and rank 0 waits for it"):
        several.model.generate("Once", params=GREEDY)
    assert time.monotonic() - started < LIMIT_S + 0.5
    assert_gone(several.pids)


def test_a_consequence_on_rank_0_is_not_taken_for_the_cause(open_ranks: Callable[..., Opened]) -> None:
    """As where a GPU cannot reach the memory of a rank that is gone."""
    several = open_ranks(2)

    def connect() -> None:
        with several.backend.group.together():
            os.kill(several.pids[0], signal.SIGKILL)
            raise DeviceError("cuda:0 does not reach the memory of rank 1")

    with pytest.raises(DeviceError, match="rank 1 ended with signal SIGKILL"):
        connect()


def test_all_ranks_are_waited_for(open_ranks: Callable[..., Opened]) -> None:
    several = open_ranks(2)
    backend, (pid,) = several.backend, several.pids
    os.kill(pid, signal.SIGSTOP)
    continued: list[float] = []
    thread = kill_soon(pid, signal.SIGCONT, continued, 0.5)
    backend.synchronize()
    assert continued
    thread.join()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DeviceError, match="rank 1 ended with signal SIGKILL"):
        backend.synchronize()


def test_an_error_of_a_rank_is_told(open_ranks: Callable[..., Opened]) -> None:
    """An exception, not a signal: its message comes through the shared memory."""
    several = open_ranks(2)
    group = several.backend.group
    group.command(Kind.RUN, 99, 1, 1, Until.END, data={})
    with pytest.raises(
        DeviceError, match="rank 1 ended with exit code 1: IndexError: list index out of range; the model"
    ):
        group.wait()
    assert_gone(several.pids)


def test_a_rank_that_fails_and_takes_long_to_end(
    open_ranks: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a GPU's memory is freed: its own words are the cause."""
    several = open_ranks(2)
    several.backend.group.memory.fail(1, "MemoryError: no more")
    several.backend.group.memory.stop()
    monkeypatch.setattr(processes, "END_S", 0.1)
    with pytest.raises(DeviceError, match="rank 1 has failed: MemoryError: no more; the model must be compiled again"):
        several.backend.group.check_results()


def test_steps_of_ranks_are_not_watched(
    open_ranks: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NUMBALLAMA_DEBUG", "3")
    with pytest.raises(Error, match="cannot be printed one at a time: set NUMBALLAMA_DEBUG to 2 at most"):
        open_ranks(2)
    assert "rank 0 of 2" in capsys.readouterr().err


def test_a_model_that_a_rank_cannot_open(tmp_path: Path) -> None:
    checkpoint = loader.open_checkpoint(None)
    started = time.monotonic()
    with pytest.raises(DeviceError, match=r"rank 1 ended with exit code 1: Error: .*gone.bin: no such file"):
        ProcessBackend(tmp_path / "gone.bin", checkpoint.config, checkpoint.weights, ["cpu"] * 2, 1)
    assert time.monotonic() - started < 60
    with pytest.raises(UnsupportedError, match="3 ranks cannot share 8 query heads and 4 KV heads"):
        ProcessBackend(checkpoint.path, checkpoint.config, checkpoint.weights, ["cpu"] * 3, 1)


def test_rank_0_that_fails_alone_ends_the_others(open_ranks: Callable[..., Opened]) -> None:
    several = open_ranks(2)
    program: Any = several.model.program

    def fail(*arguments: Any) -> None:
        raise MemoryError("no more")

    program.first.run = fail
    with pytest.raises(MemoryError):
        program.run(1)
    assert_gone(several.pids)
    with pytest.raises(Error, match="this model is closed"):
        program.run(1)


@pytest.mark.parametrize("moment", ["idle", "run", "stopped"])
def test_ranks_end_with_rank_0(moment: str) -> None:
    """Killed, it can tell nobody. Ranks that wait for it in a kernel must not wait for ever."""
    code = """
import json, os, signal, sys, threading, time
from numballama import loader
from numballama.graph import KVLayout, build
from numballama.parallel.processes import ProcessBackend
from numballama.parallel.rank_memory import Kind, Until

if __name__ == "__main__":
    checkpoint = loader.open_checkpoint(None)
    backend = ProcessBackend(loader.STORY_MODEL, checkpoint.config, checkpoint.weights, ["cpu"] * 2, 1)
    types = {name: weight.type for name, weight in checkpoint.weights.items()}
    backend.program(build(checkpoint.config, types, KVLayout.of(checkpoint.config, 64), 1))
    if sys.argv[1] == "run":
        backend.group.command(Kind.RUN, 0, 1, 1, Until.END, data={})  # without rank 0: rank 1 waits in a kernel
        time.sleep(0.5)
        assert backend.group.memory.done[1, 0] < backend.group._task.number
    if sys.argv[1] == "stopped":
        os.kill(backend.group.processes[0].pid, signal.SIGSTOP)
    print(json.dumps([process.pid for process in backend.group.processes]), flush=True)
    os._exit(0)
"""
    pids = run_python(code, moment)
    assert len(pids) == 1
    assert_gone(pids)


def test_ctrl_c_leaves_the_ranks_in_step(open_ranks: Callable[..., Opened]) -> None:
    """It comes between the steps of a request, and the next request is right."""
    several = open_ranks(2)
    want = several.model.generate("Once", params=GREEDY)
    for delay in (0.01, 0.05, 0.2):
        thread = kill_soon(os.getpid(), signal.SIGINT, [], delay)
        with pytest.raises(KeyboardInterrupt):
            several.model.generate("Once", params=SamplingParams(temperature=1, max_tokens=500, ignore_eos=True))
        thread.join()
        assert several.model.generate("Once", params=GREEDY) == want
    assert all(map(is_alive, several.pids))


def test_ctrl_c_while_tokens_are_awaited_ends_no_rank(
    open_ranks: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a session, or a second Ctrl-C: what the ranks were sent is whole."""
    several = open_ranks(2)
    want = several.model.generate("Once", params=GREEDY)
    program: Any = several.model.program

    def interrupt(ticket: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(program.first, "collect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            program.collect(0)
    assert all(map(is_alive, several.pids))
    assert several.model.generate("Once", params=GREEDY) == want


def test_a_forked_child_leaves_the_ranks_alone(open_ranks: Callable[..., Opened]) -> None:
    several = open_ranks(2)
    want = several.model.generate("Once", params=GREEDY)
    child = os.fork()
    if child == 0:
        try:
            several.model.program.run(1)
        except DeviceError:
            several.backend.close()  # as the end of a `with` would
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert several.model.generate("Once", params=GREEDY) == want


def test_ranks_end_with_a_backend_that_nobody_has_any_more() -> None:
    """A program keeps it. Threads that watch the processes do not."""
    checkpoint = loader.open_checkpoint(None)
    backend = ProcessBackend(loader.STORY_MODEL, checkpoint.config, checkpoint.weights, ["cpu"] * 2, 1)
    pids = [process.pid for process in backend.group.processes]
    types = {name: weight.type for name, weight in checkpoint.weights.items()}
    program = backend.program(build(checkpoint.config, types, KVLayout.of(checkpoint.config, 64), 1))
    del backend
    gc.collect()
    program.run(1)
    assert all(map(is_alive, pids))
    del program
    gc.collect()
    assert_gone(pids)


def test_more_pages_than_a_command_holds(open_ranks: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    several = open_ranks(2)
    sent: list[tuple[int, ...]] = []

    def command(kind: Kind, *arguments: int, data: dict[int, Any]) -> None:
        sent.append((kind, *arguments, *data[0].tolist()))

    monkeypatch.setattr(processes, "ROWS", 3)
    monkeypatch.setattr(several.backend.group, "command", command)
    several.backend.set_pages(0, 1, [5, 6, 7, 8, 9])
    assert sent == [(Kind.PAGES, 0, 1, 3, 5, 6, 7), (Kind.PAGES, 0, 4, 2, 8, 9)]
