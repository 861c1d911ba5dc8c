"""Let a rank of a model that several GPUs share fail in five ways at twelve moments, and look at what happens then.

python benchmarks/rank_failures.py [--device cpu] [--gpus 2] [--moments idle …] [--ways kill …] [--json FILE.json]

The ways are SIGKILL, `os._exit`, an exception, SIGSTOP, and a loop without end in which signs of life go on. The rank
that fails is the last one (`faulty_rank.py`); rank 0, which has the engine, raises an exception or ends with its
process. Measured are the seconds from the failure to the error of the last request (of a rank that is stopped while it
is idle: from the next request). Checked are what the error says, and that processes, threads, shared memory and device
memory are gone, and that the next model gives the same greedy tokens. The model is small, with random weights.

A table is printed, and the results are written after each failure. With --seconds no new one is begun after that time;
failures that FILE.json has, of the same commit, are not repeated. Needs Linux. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import faulty_rank
import numpy as np
from faulty_rank import EXIT_CODE, MANY, NOW, WAYS, WORDS
from gpu import commit
from ranks import SHAPES, Case, opened, written

from numballama import DeviceError, Error, Model, SamplingParams
from numballama.bench.benchmark import machine
from numballama.config import ModelConfig
from numballama.files import atomic_write, require_folder
from numballama.parallel import processes
from numballama.parallel.processes import ProcessBackend, ProcessProgram
from numballama.sampling import SamplerTable

SHAPES["of failures"] = ModelConfig(512, 1536, 4, 8, 2, 768, 2048, tied_embeddings=False)
LIMIT_S = 2.0
"""Seconds to the error, and then until all processes are gone."""
PATIENCE_S = 20.0
"""Seconds after which a rank that nobody ends is killed here."""
SLACK = 16 << 20
"""Bytes of device memory that the driver may keep: it allocates code and bookkeeping 2 MB at a time."""
LOADING = {
    "before weights load": "open", "in the middle of the weights": "weights", "ranks connect": "connect",
    "the first program is made": "program", "graphs are captured": "capture", "kernels are prepared": "prepare",
}  # fmt: skip
"""Moments while a model is compiled, and what `faulty_rank` calls them."""
RUNNING = {
    "first step of a prompt": "prompt 1", "middle of a long prompt": "prompt 3", "first step of decoding": "decode of 1",
    "middle of decoding": "decode of 1 20", f"{MANY} sequences decode": f"decode of {MANY} 20",
}  # fmt: skip
IDLE, CLOSING, RANK_0 = "idle", "the model is closed", "rank 0 itself"
MOMENTS = (*LOADING, *RUNNING, IDLE, CLOSING, RANK_0)
OTHER_DEVICE = ("kernels are prepared", "graphs are captured")
"""Moments that a GPU and a CPU do not have: what prepares kernels on a GPU captures graphs."""
HANGS = ("stop", "loop")
CAUSES = {
    "kill": r"rank {rank} ended with signal SIGKILL", "exit": rf"rank {{rank}} ended with exit code {EXIT_CODE}",
    "exception": rf"rank {{rank}} (ended with exit code 1|has failed): RuntimeError: {WORDS}",
    "stop": r"rank {rank} has given no sign of life for [\d.]+ seconds: it is stopped",
    "loop": r"rank {rank} has made no progress for [\d.]+ seconds",
}  # fmt: skip
"""What an error must say: which rank, and what happened to it."""
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@dataclass(frozen=True)
class Place:
    """The model and where it runs."""

    folder: Path
    path: Path
    device: str
    gpus: int

    def open(self) -> contextlib.AbstractContextManager[Model]:
        return opened(self.path, self.device, self.gpus, 2048, MANY)

    def free_bytes(self) -> list[int]:
        """Free memory of each GPU."""
        if self.device == "cpu":
            return []
        from numballama.cuda.driver import Device

        return [Device(f"cuda:{rank}").free_bytes for rank in range(self.gpus)]


def prompt(tokens: int) -> list[int]:
    return np.random.default_rng(tokens).integers(0, 768, tokens).tolist()


def ranks_of(model: Model) -> list[int]:
    """The processes of ranks 1 and up."""
    return [process.pid for process in cast("ProcessBackend", model.backend).group.processes]


def greedy(model: Model) -> list[int]:
    return [event.token for tokens in (5, 90) for event in model.token_engine.submit(prompt(tokens), GREEDY)]


# What is left


def processes_of(parent: int) -> set[int]:
    """Processes that a process has started, and those of their sessions: a rank begins one. Zombies too."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = path.read_text().rpartition(")")[2].split()
            found.add((int(path.parent.name), int(words[1]), int(words[3])))
    ours = {pid for pid, its_parent, _ in found if its_parent == parent}
    return ours | {pid for pid, _, session in found if session in ours}


def left_behind() -> dict[str, set[str]]:
    """What a model may leave in this process and on this machine, by kind."""
    files = {f"{fd}: {os.readlink(fd)}" for fd in Path("/proc/self/fd").iterdir() if os.path.islink(fd)}
    mapped = {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line}
    return {
        "processes": {str(pid) for pid in processes_of(os.getpid())},
        "threads": {f"{each.name} {each.ident}" for each in threading.enumerate()},
        "shared memory": {*os.listdir("/dev/shm"), *mapped},
        "files": {name for name in files if "memfd:" in name or "pipe:" in name},
    }


def gone(before: Mapping[str, set[str]], pids: set[int], free: Sequence[int], place: Place) -> list[str]:
    """What is still there after `LIMIT_S`, in words. `pids` are processes that must not be there, whoever has them."""
    end = time.monotonic() + LIMIT_S
    while True:
        gc.collect()
        left = {what: found - before[what] for what, found in left_behind().items()}
        left["processes"] |= {str(pid) for pid in pids if Path(f"/proc/{pid}").exists()}
        kept = [was - now for was, now in zip(free, place.free_bytes(), strict=True)]
        memory = [f"GPU {rank} keeps {n / 1e6:,.0f} MB" for rank, n in enumerate(kept) if n > SLACK]
        problems = [f"{what} left: {', '.join(sorted(each))}" for what, each in left.items() if each] + memory
        if not problems or time.monotonic() > end:
            return problems
        time.sleep(0.02)


# Failures


@contextlib.contextmanager
def impatient(place: Place) -> Iterator[None]:
    """Kill the failed rank after `PATIENCE_S`, so that a hang is found and the next failure can come."""
    done = threading.Event()

    def wait() -> None:
        if not done.wait(PATIENCE_S) and (found := faulty_rank.event(place.folder)) is not None:
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
    tokens = 1600 if moment == RUNNING["middle of a long prompt"] else 40
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
        greedy(model)
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
    command = [sys.executable, __file__, "--device", place.device, "--gpus", str(place.gpus), "--decode", place.path]
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
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() - started < PATIENCE_S:
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


# Trials


class Trials:
    """Runs failures one after the other. `self.model` is open between them: that after a failure serves for the next."""

    def __init__(self, place: Place) -> None:
        self.place, self._open = place, contextlib.ExitStack()
        faulty_rank.prepare(place.folder, "", "")
        self._next_model()
        self.want = greedy(self.model)
        self.close()
        self._before, self._free = left_behind(), place.free_bytes()

    def _next_model(self) -> None:
        faulty_rank.prepare(self.place.folder, "", "")
        self.model = self._open.enter_context(self.place.open())

    def close(self) -> None:
        self._open.close()
        self.__dict__.pop("model", None)

    def run(self, moment: str, way: str) -> dict[str, Any]:
        """A failure, and what was found."""
        if moment in LOADING or (ends := moment == RANK_0 and way != "exception"):
            self.close()
        elif not hasattr(self, "model"):
            self._next_model()
        pids, errors, problems = set[int](), list[str](), list[str]()
        with impatient(self.place):
            if moment in LOADING:
                seconds, errors = fail_loading(self.place, moment, way)
            elif ends:
                seconds, pids = rank_0_ends(self.place, way)
            else:
                pids = {*ranks_of(self.model)}
                seconds, errors = fail(self.place, self.model, moment, way)
        self.close()
        cause = rf"rank 0 {WORDS}" if moment == RANK_0 else CAUSES[way].format(rank=self.place.gpus - 1)
        problems += [f"the error is {error!r}" for error in {*errors} if not re.search(cause, error)]
        problems += gone(self._before, pids, self._free, self.place)
        if seconds > LIMIT_S:
            problems.append(f"{seconds:.2f} s")
        self._free = self.place.free_bytes()
        started = time.monotonic()
        self._next_model()
        if (found := greedy(self.model)) != self.want:
            problems.append(f"the next model gives {found} instead of {self.want}")
        after = time.monotonic() - started
        return {
            "moment": moment, "way": way, "seconds": seconds, "errors": errors, "problems": problems,
            "next_model_s": after,
        }  # fmt: skip


def attempt(trials: Trials, moment: str, way: str) -> dict[str, Any]:
    """`Trials.run`, or the exception."""
    try:
        return trials.run(moment, way)
    except Exception as error:
        with contextlib.suppress(Error):
            trials.close()
        problem = f"{type(error).__name__}: {error}"
        return {"moment": moment, "way": way, "seconds": None, "errors": [], "problems": [problem]}


def ways_of(moment: str, ways: Sequence[str], device: str) -> list[str]:
    """What can happen at a moment. A loop while a model loads cannot be told from a model that takes long to load."""
    if moment == OTHER_DEVICE[device == "cpu"]:
        return []
    without = dict.fromkeys(LOADING, HANGS[1:]) | {RANK_0: HANGS}
    return [way for way in ways if way not in without.get(moment, ())]


def table(result: Mapping[str, Any]) -> str:
    """The results as Markdown: seconds, and below it what is wrong."""
    found = {(each["moment"], each["way"]): each for each in result["failures"]}
    lines = [
        f"{result['gpus']} ranks on {result['device']}, {result['machine']['date']}, commit {result['commit']}: seconds "
        f"to the error of the last request, at most {LIMIT_S:g}.", "", f"| moment | {' | '.join(WAYS)} |",
        "|---" * (len(WAYS) + 1) + "|",
    ]  # fmt: skip
    for moment in MOMENTS:
        cells = []
        for each in (found.get((moment, way)) for way in WAYS):
            seconds = "–" if each is None or each["seconds"] is None else f"{each['seconds']:.2f}"
            cells.append(f"**{seconds}, wrong**" if each and each["problems"] else seconds)
        if {*cells} != {"–"}:
            lines.append(f"| {moment} | {' | '.join(cells)} |")
    wrong = [each for each in result["failures"] if each["problems"]]
    lines += ["", f"{len(wrong)} of {len(found)} failures with something wrong."]
    lines += [f"* {each['moment']}, {each['way']}: {'; '.join(each['problems'])}" for each in wrong]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu: processes in place of GPUs")
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="ranks of the model (default 2)")
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS, metavar="MOMENT")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no failure after this time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, after each failure")
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    processes.RANK_PROCESS = faulty_rank.__name__
    if options.decode is not None:
        decode(Place(options.decode.parent, options.decode, options.device, options.gpus))
    if options.json is not None:
        require_folder(options.json)
    result: dict[str, Any] = {
        "what": "failures of a rank", "device": options.device, "gpus": options.gpus, "commit": commit(),
        "machine": machine(), "failures": [],
    }  # fmt: skip
    if options.json is not None and options.json.exists():
        before = json.loads(options.json.read_text())
        if all(before.get(key) == result[key] for key in ("device", "gpus", "commit")):
            result["failures"] = before["failures"]
    done = {(each["moment"], each["way"]) for each in result["failures"]}
    with written(Case("of failures", "f16"), None) as path:
        trials = Trials(Place(path.parent, path, options.device, options.gpus))
        for moment in options.moments:
            for way in ways_of(moment, options.ways, options.device):
                if (moment, way) in done or time.monotonic() - started > options.seconds:
                    continue
                result["failures"].append(each := attempt(trials, moment, way))
                print(f"{moment}, {way}: {each['problems'] or each['seconds']}", file=sys.stderr, flush=True)
                if options.json is not None:
                    with atomic_write(options.json) as file:
                        file.write(json.dumps(result, indent=1).encode() + b"\n")
        trials.close()
    print(table(result))
    sys.exit(any(each["problems"] for each in result["failures"]))


if __name__ == "__main__":
    main()
