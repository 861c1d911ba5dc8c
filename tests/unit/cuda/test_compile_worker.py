"""Kernels compiled by several processes at once, and the cache they fill; no GPU is needed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings", reason="NVIDIA's Python packages are not installed")

ROOT = Path(__file__).parents[3]

PRELUDE = """
import json, os, subprocess, sys
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from numballama.cuda.ops import elementwise
from numballama.cuda import compile_worker as compile, compiler
from numballama.cuda.launch import Array, LaunchContext, Specialization

def array(*shape, dtype="f32"):
    return Array(0, shape, dtype)

ctx = LaunchContext(2, 99 << 10, array(1, dtype="i32"), array(2, 2, dtype="i32"), lambda n: array(n, dtype="i32"))
x = array(1, 64)
launches = [
    *elementwise.add(ctx, x, x, x), *elementwise.swiglu(ctx, x, x, x),
    *elementwise.rows(ctx, x, array(1, dtype="i32"), x),
    *elementwise.bias(ctx, x, array(64), x), *elementwise.rmsnorm(ctx, x, array(64), x, 1e-5),
]
kernels = [launch.specialization for launch in launches]
cache, told, started = Path(sys.argv[2]), [], []

def report(what, done, total):
    told.append((what, done, total))

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        started.append(self)
        super().__init__(*arguments, **options)

subprocess.Popen = Popen

def ahead(workers=2, report=report, kernels=kernels):
    done = compile.compile_ahead(kernels, (9, 0), cache, report, workers)
    return {index: (code.entry, code.registers, len(code.machine), code.cached) for index, code in done.items()}
"""
"""A process of its own for each test: a process compiles for one compute capability only."""


def program(text: str, cache: Path, folder: Path | None = None, more: str = "") -> Any:
    """What a program prints, as JSON. It runs isolated, so that it finds this package only through its sys.path."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", PRELUDE + text, str(ROOT), str(cache), more],
        capture_output=True, text=True, timeout=300, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_workers_fill_the_cache(tmp_path: Path) -> None:
    """A worker finds the package by the search path of the process that started it."""
    found = program(
        """
# all to the workers: this process would be faster than they are with kernels as small as these
take = compile._WorkerPool.run
def idle(pool, report):
    class Todo(type(pool._todo)):
        def popleft(self):
            if compile.threading.current_thread() is compile.threading.main_thread():
                raise IndexError
            return super().popleft()
    pool._todo = Todo(pool._todo)
    return take(pool, report)
compile._WorkerPool.run = idle
first = ahead()
again = ahead()
codes = [compiler.compile_kernel(kernel, (9, 0), cache) for kernel in kernels]
fresh = [compiler.compile_kernel(kernel, (9, 0), None) for kernel in kernels]
print(json.dumps({
    "first": first, "again": again, "told": told, "cached": [c.cached for c in codes],
    "same": [(len(c.machine), c.registers) == (len(f.machine), f.registers) for c, f in zip(codes, fresh)],
    "ended": [p.poll() is not None for p in started],
}))
""",
        tmp_path,
    )
    assert sorted(found["first"], key=int) == list("01234") and not any(code[3] for code in found["first"].values())
    assert found["again"] == {}, "the second time nothing is missing"
    assert found["cached"] == [True] * 5 and found["same"] == [True] * 5
    done = [done for _, done, _ in found["told"]]  # two that end together are told at once
    assert found["told"][0] == ["add_kernel", 0, 5] and done == sorted({*done, 5}), "each is more than the one before"
    assert found["ended"] == [True, True]
    assert {path.suffix for path in tmp_path.iterdir()} == {".cubin"}


IN_TURN = """
before, folder, found = (compile.COMMAND, compile.usable_cores, sys.executable), cache, []
for number, case in enumerate(json.loads(sys.argv[3])):
    scope = {"compile": compile, "sys": sys, "partial": partial, "ahead": ahead, "kernels": kernels}
    cache = folder / str(number)
    exec(case, scope)
    found.append([case, scope["ahead"](kernels=scope["kernels"]), list(told), len(started)])
    compile.COMMAND, compile.usable_cores, sys.executable = before
    vars(sys).pop("frozen", None)
    told.clear()
    started.clear()
print(json.dumps(found))
"""
"""Cases in one process, each with a cache of its own: [case, what `ahead` returns, what is told, workers] of each."""


def test_failing_workers_cost_only_time(tmp_path: Path) -> None:
    cases = [
        "compile.COMMAND = '-c', 'raise SystemExit(1)'",
        "compile.COMMAND = '-c', 'print(1, flush=True); print(2, flush=True)'",
        "compile.COMMAND = '-c', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)'",
        "sys.executable = '/nonexistent/python'",
        "compile.COMMAND = '-m', 'no_such_package.compile_worker'",
        "compile.COMMAND = '-c', 'input(); print(1, flush=True); input()'",
    ]
    found = program(IN_TURN, tmp_path, more=json.dumps(cases))
    assert [each[0] for each in found] == cases
    for case, compiled, told, _ in found:
        assert sorted(compiled, key=int) == list("01234"), case
        assert told[-1][1:] == [5, 5], case


def test_a_worker_survives_a_kernel_that_it_cannot_find(tmp_path: Path) -> None:
    found = program(
        """
import dataclasses
from types import SimpleNamespace
hidden = kernels[0].function.py_func
def todo(kernel):  # of the package's own files, under a name that it does not have
    function = type(hidden)(hidden.__code__, hidden.__globals__, "add_kernel")
    function.__module__, function.__qualname__ = hidden.__module__, "no_such_kernel"
    return dataclasses.replace(kernel, kernel=SimpleNamespace(py_func=function))
pool = compile._WorkerPool([todo(kernels[0]), kernels[1]], [0, 1], (9, 0), cache, 1)
import threading
with pool._processes():
    answers = [pool._answers.get(timeout=60) for _ in range(2)]
print(json.dumps([answers, len(list(cache.iterdir()))]))
""",
        tmp_path,
    )
    assert found == [[0, 1], 1]


def test_no_worker_where_it_is_not_worth_it_or_would_be_another_program(tmp_path: Path) -> None:
    cases = [
        "compile.usable_cores = lambda: 2; ahead = partial(ahead, None)",
        "kernels = kernels[:2]",
        "sys.frozen = True",
        "sys.executable = '/opt/some/editor'",
        "sys.executable = None",
    ]
    assert program(IN_TURN, tmp_path, more=json.dumps(cases)) == [[case, {}, [], 0] for case in cases]


def test_an_interrupt_ends_the_workers(tmp_path: Path) -> None:
    found = program(
        """
def report(*arguments):
    if started:
        raise KeyboardInterrupt
try:
    ahead(report=report)
    print(json.dumps("no interrupt"))
except KeyboardInterrupt:
    print(json.dumps([p.poll() is not None for p in started]))
""",
        tmp_path,
    )
    assert found == [True, True]


def test_kernels_that_were_edited_or_replaced_meanwhile_are_not_kept(tmp_path: Path) -> None:
    """They are imported long after the folder was named after their sources, and a notebook may replace one."""
    found = program(
        """
from numba import cuda
from numballama import kernel_cache

kernel = kernels[0]
def kept(folder):
    folder.mkdir(exist_ok=True)
    compiler.compile_kernel(kernel, (9, 0), folder)
    return len(list(folder.glob("*.cubin")))

now = cache / kernel_cache._cuda_name()
found = [kept(now), kept(cache / ("0" * 16))]

@cuda.jit
def add_kernel(tokens, a, b, out, columns):
    out[0] = 1

from numballama import kernels_cuda
kernels_cuda.add_kernel = add_kernel
replaced = compiler.compile_kernel(kernel, (9, 0), now)
print(json.dumps([*found, replaced.cached, kept(now)]))
""",
        tmp_path,
    )
    assert found == [1, 0, False, 1]


def test_only_kernels_of_the_package_are_kept(tmp_path: Path) -> None:
    """The cache's folder is named after the package's sources: a kernel of another file could be stale there."""
    (tmp_path / "mine.py").write_text("from numba import cuda\n@cuda.jit\ndef mine(x):\n    x[0] = 1\n")
    found = program(
        f"sys.path.insert(0, {str(tmp_path)!r})\nimport mine\n"
        "kernel = Specialization(mine.mine, (('x', 'f32*'),), 32)\n"
        "first = compiler.compile_kernel(kernel, (9, 0), cache)\n"
        "second = compiler.compile_kernel(kernel, (9, 0), cache)\n"
        "print(json.dumps([first.cached, second.cached, compiler.cache_entry(kernel, (9, 0), cache)]))",
        tmp_path / "cache",
    )
    assert found == [False, False, None]


def test_there_are_as_many_workers_as_cores_for_them(tmp_path: Path) -> None:
    text = "compile.COMMAND = '-c', 'raise SystemExit(1)'\n"  # they are only counted
    text += "compile.usable_cores = lambda: {}\nahead(None)\nprint(json.dumps(len(started)))"
    assert program(text.format(4), tmp_path / "4") == 3
    assert program(text.format(64), tmp_path / "64") == 5, "no more than kernels"
