"""A rank's process that fails at a moment: `python -m faulty_rank SETTINGS`, for `rank_failures.py` and tests.

`prepare(folder, moment, way)` says when and how the last rank of a model in `folder` fails. Moments while the model
loads are read when the process starts, the others when it gets SIGUSR1. Just before it fails it writes the time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numballama import loader
from numballama.checkpoint import LazyWeight
from numballama.parallel import rank_process
from numballama.parallel.rank_memory import Kind

EXIT_CODE, WORDS = 3, "a fault on purpose"
WAYS = ("kill", "exit", "exception", "stop", "loop")
"""SIGKILL, `os._exit`, an exception, SIGSTOP, and a loop without end, in which signs of life go on."""
NOW = "now"
"""The moment of a rank that fails when it gets the signal, whatever it does then."""
FAULT, EVENT, ARMED = "fault.json", "event", "armed"
MANY = 8
"""Rows of a run that decodes for as many sequences. A run of more has tokens of prompts."""


def prepare(folder: Path, moment: str, way: str) -> None:
    """Say when and how the rank fails."""
    for name in (EVENT, ARMED):
        (folder / name).unlink(missing_ok=True)
    (folder / FAULT).write_text(json.dumps({"moment": moment, "way": way}))


def arm(folder: Path, pid: int) -> None:
    """Tell a rank that has loaded what `prepare` says, and wait until it knows."""
    os.kill(pid, signal.SIGUSR1)
    end = time.monotonic() + 10
    while not (folder / ARMED).exists():
        if time.monotonic() > end:
            raise TimeoutError("the rank does not answer")
        time.sleep(0.001)


def event(folder: Path) -> tuple[float, int] | None:
    """When the rank has failed, by `time.monotonic`, and its process; None if it has not yet."""
    with contextlib.suppress(OSError, ValueError):
        when, pid = (folder / EVENT).read_text().split()
        return float(when), int(pid)
    return None


class Fault:
    """What the rank in this process is to do. `moments` counts those that have come since it knows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read()

    def read(self) -> None:
        found = json.loads((self.folder / FAULT).read_text())
        self.moment, self.way, self.moments = found["moment"], found["way"], Counter[str]()

    def signalled(self, *arguments: object) -> None:
        """Python calls this in the main thread."""
        self.read()
        (self.folder / ARMED).touch()
        self.come(NOW)

    def come(self, kind: str) -> None:
        """A moment has come: "prompt 3" is the third one of that kind. Fail if it is the one."""
        self.moments[kind] += 1
        if self.moment not in (kind, f"{kind} {self.moments[kind]}"):
            return
        written = self.folder / f"{EVENT}.part"
        written.write_text(f"{time.monotonic()} {os.getpid()}")
        written.replace(self.folder / EVENT)
        self.moment = ""
        if self.way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.way == "exit":
            os._exit(EXIT_CODE)
        elif self.way == "exception":
            raise RuntimeError(WORDS)
        elif self.way == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        while self.way == "loop":
            pass

    def before(self, owner: Any, name: str, kind: Callable[..., str]) -> None:
        """Let the moment `kind(arguments)` come at the beginning of each call of a function."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def called(*arguments: Any, **options: Any) -> Any:
            self.come(kind(*arguments))
            return function(*arguments, **options)

        setattr(owner, name, called)

    def install(self, on_gpu: bool) -> None:
        """Let all moments come."""
        self.before(loader, "open_checkpoint", lambda *_: "open")
        self.before(rank_process.Rank, "add_program", lambda *_: "program")
        self.before(rank_process.Rank, "obey", command)
        if on_gpu:
            from numballama.cuda.backend import CudaBackend

            self.before(CudaBackend, "_capture", lambda *_: "capture")
        weights_of = rank_process.rank_weights

        def rank_weights(*arguments: Any) -> dict[str, Any]:
            found = weights_of(*arguments)
            name = list(found)[len(found) // 2]
            weight = found[name]

            def load() -> Any:
                self.come("weights")
                return weight

            return found | {name: LazyWeight(weight.shape, weight.type, load, cache=True)}

        rank_process.rank_weights = rank_weights


def command(rank: Any) -> str:
    """The moment at which a rank is given a command."""
    _, kind, _, tokens, *_ = rank.memory.command.tolist()
    if kind not in (Kind.RUN, Kind.SUBMIT):
        return Kind(kind).name.lower()
    return "prompt" if tokens > MANY else f"decode of {tokens}"


if __name__ == "__main__":
    settings = rank_process.Settings(**json.loads(sys.argv[1]))
    if settings.rank == settings.ranks - 1:
        fault = Fault(Path(settings.path).parent)
        fault.install(settings.device != "cpu")
        signal.signal(signal.SIGUSR1, fault.signalled)
    rank_process.main(sys.argv[1:])
