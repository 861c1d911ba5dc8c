"""Compiles kernels that are not in the cache in several processes, because Numba compiles one at a time.

This process compiles too. Its workers are fresh interpreters (`python -m numballama.cuda.compile_worker`). They read
the kernels to compile from standard input, one line of JSON each, and answer on standard output once a kernel is in the
cache. None of them needs a GPU. This process compiles whatever a worker cannot.

Why not concurrent.futures.ProcessPoolExecutor: a forked process cannot use the driver's state and the threads that it
inherits. A spawned one imports the user's `__main__` again, which runs a script without `if __name__ == "__main__"` a
second time. A worker here inherits only this process's module search path.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from .. import progress
from ..host.cgroup import usable_cores
from ..host.child import can_start_python, python_environment
from ..kernel_cache import Usage
from .compiler import Cubin, cache_entry, compile_kernel
from .launch import Specialization

MIN_KERNELS = 3
"""With fewer kernels, all are compiled before a worker has imported what it needs."""
MIN_WORKERS, MAX_WORKERS = 2, 8
"""Limits of the number of workers. A worker takes a second to start, and one alone makes two cores no faster."""
TIMEOUT_S = 60.0
"""Seconds without an answer after which the workers are abandoned. No kernel takes that long."""
COMMAND = ("-m", "numballama.cuda.compile_worker")
"""The interpreter's arguments for a worker."""


def compile_ahead(
    kernels: Sequence[Specialization],
    capability: tuple[int, int],
    cache: Path | None,
    report: progress.Report | None = None,
    workers: int | None = None,
) -> dict[int, Cubin]:
    """Compile the kernels that are not in `cache`, with `workers` more processes (default: one for each other core).

    Where `cache` is None or cannot be written, workers hand their kernels over in a temporary folder.

    Returns index → machine code of the kernels that were compiled, which are now in the cache too; after a failure some
    may be missing. `report(kernel, done, total)` is called as they become ready. If the kernels are few, or no second
    Python can be started, does nothing and returns {}.
    """
    missing = []
    for index, kernel in enumerate(kernels):
        entry = cache_entry(kernel, capability, cache or Path())
        if entry is not None and not (cache is not None and os.path.isfile(entry)):
            missing.append(index)
    if workers is None:
        workers = min(len(missing), usable_cores() - 1, MAX_WORKERS)
        workers = workers if workers >= MIN_WORKERS else 0
    if len(missing) < MIN_KERNELS or workers < 1 or not can_start_python():
        return {}
    with contextlib.ExitStack() as stack:
        if cache is None or Usage.of(cache).problem:
            try:
                temporary = tempfile.TemporaryDirectory(prefix="numballama-", ignore_cleanup_errors=True)
                cache = Path(stack.enter_context(temporary))
            except OSError:
                return {}
        return _WorkerPool(kernels, missing, capability, cache, workers).run(report)


class _WorkerPool:
    """Worker processes and the kernels to compile. A thread for each process sends it one kernel after the other."""

    def __init__(
        self,
        kernels: Sequence[Specialization],
        todo: Sequence[int],
        capability: tuple[int, int],
        cache: Path,
        workers: int,
    ) -> None:
        self._kernels, self._todo, self._capability, self._cache = kernels, deque(todo), capability, cache
        self._workers, self._total = workers, len(todo)
        self._answers: queue.SimpleQueue[int] = queue.SimpleQueue()
        """Indices of kernels that workers have finished: the cache has them now, or they failed."""

    def run(self, report: progress.Report | None) -> dict[int, Cubin]:
        done: dict[int, Cubin] = {}
        if report:
            report(self._kernels[self._todo[0]].name, 0, self._total)
        with self._processes():
            while len(done) < self._total:
                try:
                    index = self._todo.popleft()
                except IndexError:  # the workers have the rest
                    try:
                        index = self._answers.get(timeout=TIMEOUT_S)
                    except queue.Empty:
                        progress.log.info("the processes that compile kernels do not answer; going on without them")
                        break
                done[index] = self._compile(index)
                while not self._answers.empty():
                    index = self._answers.get()
                    done[index] = self._compile(index)
                if report:
                    report(self._kernels[index].name, len(done), self._total)
        return done

    def _compile(self, index: int) -> Cubin:
        """A kernel, from the cache if a worker put it there."""
        return replace(compile_kernel(self._kernels[index], self._capability, self._cache), cached=False)

    @contextlib.contextmanager
    def _processes(self) -> Iterator[None]:
        """Run workers during the block. They end with it in any case: Ctrl-C leaves none behind."""
        processes: list[subprocess.Popen[str]] = []
        threads: list[threading.Thread] = []
        flags = ["-B"] * sys.dont_write_bytecode
        package = Path(__file__).parents[2]  # before Python 3.11 the working directory comes first in the search path
        try:
            for _ in range(self._workers):
                try:
                    process = subprocess.Popen(
                        [sys.executable, *flags, *COMMAND], env=python_environment(CUDA_VISIBLE_DEVICES=""),
                        cwd=package if package.is_dir() else None, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL, encoding="utf-8",
                    )  # fmt: skip
                except OSError as error:
                    progress.log.info("no process to compile kernels can be started: %r", error)
                    break
                processes.append(process)
                threads.append(threading.Thread(target=self._feed, args=(process,), daemon=True))
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
                    with contextlib.suppress(OSError):  # an unread last line
                        if pipe is not None:
                            pipe.close()

    def _feed(self, process: subprocess.Popen[str]) -> None:
        """Send a worker one kernel after the other, until none is left or the worker fails."""
        assert process.stdin is not None and process.stdout is not None
        index = None
        try:
            _write_line(process.stdin, {"capability": self._capability, "cache": str(self._cache)})
            json.loads(process.stdout.readline())
            while True:
                try:
                    index = self._todo.popleft()
                except IndexError:
                    return
                kernel = self._kernels[index]
                _write_line(process.stdin, [*kernel.source, kernel.parameters, kernel.threads])
                answer = json.loads(process.stdout.readline())
                if "error" in answer:
                    progress.log.info("%s: a process could not compile it: %s", kernel.name, answer["error"])
                self._answers.put(index)
                index = None
        except (OSError, ValueError, TypeError) as error:  # it ended, or was killed
            progress.log.info("a process that compiles kernels failed: %r", error)
        finally:
            if index is not None:
                self._answers.put(index)


def _write_line(file: IO[str], message: Any) -> None:
    file.write(json.dumps(message) + "\n")
    file.flush()


def main() -> None:
    """Run a worker: compile the kernels that standard input names, one per line, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the process that started this ends it
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep output of libraries apart from the answers
    job = json.loads(sys.stdin.readline())
    with contextlib.suppress(ImportError):
        importlib.import_module("_numba_cuda_redirector")  # numba-cuda's .pth file, where this interpreter skipped it
    capability, cache = (job["capability"][0], job["capability"][1]), Path(job["cache"])
    importlib.import_module("numba.cuda")
    _write_line(answers, {"ready": True})
    for line in sys.stdin:
        module, qualname, parameters, threads = json.loads(line)
        try:
            function: Any = importlib.import_module(module)
            for name in qualname.split("."):
                function = getattr(function, name)
            kernel = Specialization(function, tuple((name, type_) for name, type_ in parameters), threads)
            compile_kernel(kernel, capability, cache)
            entry = cache_entry(kernel, capability, cache)
            if entry is None or not os.path.isfile(entry):
                raise OSError(f"nothing can be written to {cache}")
            answer = {"ready": qualname}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        _write_line(answers, answer)


if __name__ == "__main__":
    main()
