"""Kernels that are not in the cache yet, compiled by several processes at once, as Numba compiles one at a time.

This process takes part; its helpers are fresh interpreters that import the package, read on their standard input which
kernels to compile, a line of JSON each, and answer on their standard output once a kernel lies in the cache. None of
them needs a GPU. What a helper fails at, for whatever reason, this process compiles.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from .. import progress
from .driver import Code, cache_entry, compile_kernel
from .launch import Launch

WORTH_IT = 3
"""Fewer kernels than this are compiled before a helper has imported what it needs."""
LEAST_HELPERS, MOST_HELPERS = 2, 8
"""A helper takes a second to begin, and two cores are no faster with one than without."""
PATIENCE_S = 60.0
"""Longer than any kernel takes: helpers that say nothing for so long are given up."""
BOOT = (
    "import sys, json; job = json.loads(sys.stdin.readline()); sys.path[:] = job['path']; "
    "from numballama.cuda.compile_worker import help_out; help_out(job)"
)
"""What a helper runs. It gets this process's module search path before it imports anything of ours."""


def compile_ahead(
    launches: Sequence[Launch],
    capability: tuple[int, int],
    cache: Path,
    report: progress.Report | None = None,
    helpers: int | None = None,
) -> dict[int, Code]:
    """Compile the kernels that are not in `cache`, with `helpers` processes beside this one (by default a core each).

    Returns index → code of those that were compiled, all of them if nothing goes wrong; the cache then has them too.
    `report(kernel, done, total)` is called as they become ready. Few kernels, or a Python that cannot be started once
    more, return nothing.
    """
    missing = []
    for index, launch in enumerate(launches):
        entry = cache_entry(launch.kernel, launch.kinds, capability, launch.threads, cache)
        if entry is not None and not entry.is_file():
            missing.append(index)
    if helpers is None:
        helpers = min(len(missing), _cores() - 1, MOST_HELPERS)
        helpers = helpers if helpers >= LEAST_HELPERS else 0
    if len(missing) < WORTH_IT or helpers < 1 or not _can_start_python():
        return {}
    return _Crew(launches, missing, capability, cache, helpers).run(report)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _can_start_python() -> bool:
    """Whether `sys.executable` is a Python: a frozen program, or one that embeds Python, would start itself."""
    return not getattr(sys, "frozen", False) and "python" in os.path.basename(sys.executable or "").lower()


class _Crew:
    """Helpers and what there is to do: a thread for each hands it the next kernel when it is done with one."""

    def __init__(
        self, launches: Sequence[Launch], todo: Sequence[int], capability: tuple[int, int], cache: Path, helpers: int
    ) -> None:
        self._launches, self._todo, self._capability, self._cache = launches, deque(todo), capability, cache
        self._helpers, self._total = helpers, len(todo)
        self._answers: queue.SimpleQueue[int] = queue.SimpleQueue()
        """Kernels that helpers are done with, by index: the cache has them now, or they failed."""

    def run(self, report: progress.Report | None) -> dict[int, Code]:
        done: dict[int, Code] = {}
        if report:
            report(self._name(self._todo[0]), 0, self._total)
        with self._processes():
            while len(done) < self._total:
                try:
                    index = self._todo.popleft()
                except IndexError:  # the rest is with the helpers
                    try:
                        index = self._answers.get(timeout=PATIENCE_S)
                    except queue.Empty:
                        progress.log.info("the helpers that compile kernels are given up")
                        break
                done[index] = self._compile(index)
                while not self._answers.empty():
                    index = self._answers.get()
                    done[index] = self._compile(index)
                if report:
                    report(self._name(index), len(done), self._total)
        return done

    def _name(self, index: int) -> str:
        return self._launches[index].name

    def _compile(self, index: int) -> Code:
        """A kernel, from the cache if a helper put it there."""
        launch = self._launches[index]
        code = compile_kernel(launch.kernel, launch.kinds, self._capability, launch.threads, self._cache)
        return replace(code, cached=False)

    @contextlib.contextmanager
    def _processes(self) -> Iterator[None]:
        """Helpers at work, who end with the block however it ends: Ctrl-C leaves none behind."""
        processes: list[subprocess.Popen[str]] = []
        threads: list[threading.Thread] = []
        flags = ["-I"] + ["-B"] * sys.dont_write_bytecode
        try:
            for _ in range(self._helpers):
                try:
                    process = subprocess.Popen(
                        [sys.executable, *flags, "-c", BOOT], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
                    )  # fmt: skip
                except OSError as error:
                    progress.log.info("no helper can be started: %r", error)
                    break
                processes.append(process)
                threads.append(threading.Thread(target=self._lead, args=(process,), daemon=True))
                threads[-1].start()
            yield
        finally:
            for process in processes:
                process.kill()
            for thread in threads:
                thread.join()
            for process in processes:
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    with contextlib.suppress(OSError):  # a last line that nobody reads
                        if pipe is not None:
                            pipe.close()

    def _lead(self, process: subprocess.Popen[str]) -> None:
        """Hand a helper one kernel after the other, until none is left or it fails."""
        assert process.stdin is not None and process.stdout is not None
        path = [entry for entry in sys.path if isinstance(entry, str)]
        index = None
        try:
            _write_line(process.stdin, {"path": path, "capability": self._capability, "cache": str(self._cache)})
            json.loads(process.stdout.readline())
            while True:
                try:
                    index = self._todo.popleft()
                except IndexError:
                    return
                launch = self._launches[index]
                names = [*launch.source, launch.kinds, launch.threads]
                _write_line(process.stdin, names)
                answer = json.loads(process.stdout.readline())
                if "error" in answer:
                    progress.log.info("%s: a helper could not compile it: %s", self._name(index), answer["error"])
                self._answers.put(index)
                index = None
        except (OSError, ValueError, TypeError) as error:  # it ended, or was killed
            progress.log.info("a helper that compiles kernels failed: %r", error)
        finally:
            if index is not None:
                self._answers.put(index)


def _write_line(file: IO[str], message: Any) -> None:
    file.write(json.dumps(message) + "\n")
    file.flush()


def help_out(job: dict[str, Any]) -> None:
    """The life of a helper: compile what standard input names, a line each, until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(ImportError):
        importlib.import_module("_numba_cuda_redirector")  # where this interpreter's own start did not do it
    capability, cache = (job["capability"][0], job["capability"][1]), Path(job["cache"])
    importlib.import_module("numba.cuda")
    _write_line(answers, {"ready": True})
    for line in sys.stdin:
        module, qualname, kinds, threads = json.loads(line)
        try:
            kernel: Any = importlib.import_module(module)
            for name in qualname.split("."):
                kernel = getattr(kernel, name)
            compile_kernel(kernel, kinds, capability, threads, cache)
            entry = cache_entry(kernel, kinds, capability, threads, cache)
            if entry is None or not entry.is_file():
                raise OSError(f"nothing can be written to {cache}")
            answer = {"ready": qualname}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        _write_line(answers, answer)
