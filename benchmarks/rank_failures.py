"""Let a rank of a model that several GPUs share fail in five ways at thirteen moments, and look at what happens then.

python benchmarks/rank_failures.py [--device cpu] [--gpus 2] [--moments idle …] [--ways kill …] [--json FILE.json]

The ways are SIGKILL, `os._exit`, an exception, SIGSTOP, and a loop without end in which signs of life go on. The rank
that fails is the last one (`faulty_rank.py`); rank 0, which has the engine, raises an exception or ends with its
process. Measured are the seconds from the failure to the error of the last request (of a rank that is stopped while it
is idle: from the next request). Checked are what the error says, that processes, threads, shared memory and device
memory are gone, and that the next model gives the same tokens, greedy and drawn. The model is small, its weights are
random.

A table is printed, and the results are written after each failure. With --seconds no new one is begun after that time;
failures that FILE.json has, of the same commit, are not repeated. Needs Linux. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faulty_rank
from faulty_rank import EXIT_CODE, WAYS, WORDS
from gpu import commit
from left_behind import LeftBehind
from rank_moments import (
    HANGS,
    LOADING,
    MOMENTS,
    RANK_0,
    SHAPE,
    Place,
    decode,
    fail,
    fail_loading,
    impatient,
    rank_0_ends,
    ranks_of,
    tokens_of,
)
from ranks import SHAPES, Case, written

from numballama import Error
from numballama.bench.benchmark import machine
from numballama.files import atomic_write, require_folder
from numballama.parallel import processes

LIMIT_S = 2.0
"""Seconds to the error, and then until all processes are gone."""
OTHER_DEVICE = ("kernels are prepared", "graphs are captured")
"""Moments that a GPU and a CPU do not have: what prepares kernels on a GPU captures graphs."""
CAUSES = {
    "kill": r"rank {rank} ended with signal SIGKILL", "exit": rf"rank {{rank}} ended with exit code {EXIT_CODE}",
    "exception": rf"rank {{rank}} (ended with exit code 1|has failed): RuntimeError: {WORDS}",
    "stop": r"rank {rank} has given no sign of life for [\d.]+ seconds: it is stopped",
    "loop": r"rank {rank} has made no progress for [\d.]+ seconds",
}  # fmt: skip
"""What an error must say: which rank, and what happened to it."""


class Trials:
    """Runs failures one after the other. The model after a failure, `self.model`, serves for the next."""

    def __init__(self, place: Place) -> None:
        self.place, self._open = place, contextlib.ExitStack()
        faulty_rank.prepare(place.folder, "", "")
        self._next_model()
        self.want = tokens_of(self.model)
        self.close()
        self._before = LeftBehind(0 if place.device == "cpu" else place.gpus)

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
        problems += self._before.problems(pids, LIMIT_S)
        if seconds > LIMIT_S:
            problems.append(f"{seconds:.2f} s")
        self._before = LeftBehind(self._before.gpus)  # what is left is told once
        started = time.monotonic()
        self._next_model()
        if (found := tokens_of(self.model)) != self.want:
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
    where = f"{result['gpus']} ranks on {result['device']}, {result['machine']['date']}, commit {result['commit']}"
    lines = [f"{where}: seconds to the error of the last request, at most {LIMIT_S:g}.", ""]
    lines += [f"| moment | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
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
    SHAPES["of failures"] = SHAPE
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
