"""What happens around the kernels: nothing is allocated a token, nothing is compiled twice, nothing stale is used, and
no number of threads, threading layer or process start makes it wrong or hang."""

from __future__ import annotations

import ast
import gc
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba.core.runtime import _nrt_python as nrt
from numba.core.runtime import rtsys

import numballama
from numballama import kernel_cache
from numballama.config import ModelConfig
from numballama.cpu import compiler as jit
from numballama.cpu.sampling import greedy
from numballama.model import Model
from numballama.sampling import Sampler
from tests.helpers.bounds import shared_model
from tests.helpers.random_models import save

PACKAGE = Path(numballama.__file__).parent
SMALL = ModelConfig(32, 64, 2, 4, 2, 120, 40)
WIDE = ModelConfig(64, 8192, 1, 4, 2, 20000, 600)
IDS = [1, 5, 9, 77, 3]
SAMPLED: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "repeat_penalty": 1.2,
    "seed": 1,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small model in float32, in int8 with int8 activations, and one whose rows are large enough to be noticed."""
    folder = tmp_path_factory.mktemp("runtime")
    small = {name: save(folder, name, SMALL)[0] for name in ("llama2c-v0", "llama2c-v2")}
    (folder / "wide").mkdir()
    return {**small, "wide": save(folder / "wide", "llama2c-v0", WIDE)[0]}


# A token


@pytest.fixture(scope="module")
def wide(files: dict[str, Path]) -> Model:
    return shared_model(files["wide"], device="cpu")


SAMPLERS = pytest.mark.parametrize(
    "settings", [{"temperature": 0}, SAMPLED, {"temperature": 0, "repeat_penalty": 1.5}], ids=str
)


def decode(model: Model, settings: dict[str, Any], steps: int) -> Callable[[], None]:
    """A loop of `steps` tokens, warmed up."""
    session, sampler = model.session, Sampler(model.config.vocab_size, **settings)
    session.rewind()
    session.prefill(IDS)

    def loop() -> None:
        for _ in range(steps):
            session.step(7, sampler)

    loop()
    return loop


@SAMPLERS
def test_a_token_is_one_entry_into_compiled_code(wide: Model, settings: dict[str, Any]) -> None:
    program = wide.session._decode
    loop = decode(wide, settings, 50)
    before = program.entries  # type: ignore[attr-defined]
    loop()
    assert program.entries - before == 50  # type: ignore[attr-defined]


def test_a_prompt_is_one_entry_a_chunk(wide: Model) -> None:
    session = wide.session
    session.rewind()
    before = session._prompt.entries  # type: ignore[attr-defined]
    session.prefill([5] * 200)
    assert session._prompt.entries - before == 4  # type: ignore[attr-defined]


@SAMPLERS
def test_compiled_code_allocates_nothing(wide: Model, settings: dict[str, Any]) -> None:
    """Not even the record that Numba makes of an array that is handed over: what goes in are addresses."""
    loop = decode(wide, settings, 50)
    nrt.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        loop()
        after = rtsys.get_allocation_stats()
        greedy(np.zeros(4, np.float32))
        counted = rtsys.get_allocation_stats()
    finally:
        nrt.memsys_disable_stats()
    assert after == before
    assert counted.alloc > after.alloc, "the counter counts"


@SAMPLERS
def test_python_keeps_nothing_of_a_token(wide: Model, settings: dict[str, Any]) -> None:
    """The history grows by an id a token, here a small one that Python has anyway. Ten blocks are the loop's own and
    the interpreter's; one a token would be 200."""
    loop = decode(wide, settings, 200)
    gc.collect()
    gc.disable()
    try:
        before = sys.getallocatedblocks()
        loop()
        assert sys.getallocatedblocks() - before <= 20
    finally:
        gc.enable()


@SAMPLERS
def test_no_array_is_made_for_a_token(wide: Model, settings: dict[str, Any]) -> None:
    """The highest memory during the loop, Python's and NumPy's, is below the smallest row of this model but its
    residual stream: a copy of the logits would be 80 KB, of a hidden row 32 KB."""
    loop = decode(wide, settings, 100)
    tracemalloc.start()
    try:
        loop()
        wide.session.rewind(len(IDS))
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        loop()
        now, peak = tracemalloc.get_traced_memory()
        assert peak - before < 8192 and now - before < 4096
        domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        kept = tracemalloc.take_snapshot().filter_traces([domain])
        assert sum(trace.size for trace in kept.traces) == 0, "NumPy holds memory of the loop's making"
        wide.session.logits.copy()
        assert tracemalloc.get_traced_memory()[1] - before > 80_000, "the measure notices a copy of the logits"
    finally:
        tracemalloc.stop()


# Processes


def run_python(code: str, *arguments: object, timeout: float = 120, **environment: str) -> Any:
    """Run code in a new process; what it prints last, as JSON. A hang fails by the timeout."""
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=os.path.abspath(os.sep),  # where no package lies that would come before PYTHONPATH's
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
    )
    assert found.returncode == 0, f"exit code {found.returncode}\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}"
    return json.loads(found.stdout.splitlines()[-1])


USE = """
import json, sys
import numballama, numballama.cpu as cpu, numballama.sampler as sampler, numballama.sampling as sampling
from numba.core.dispatcher import Dispatcher

hits = []
real = cpu.compile_step
def counting(function, operands):
    found = real(function, operands)
    hits.append(found.cache_hits)
    return found
cpu.compile_step = counting

results = []
for path, options in zip(sys.argv[1:], ({}, {"kv_dtype": "f16"})):
    model = numballama.compile(path, device="cpu", **options)
    ids = [1, 5, 9, 77, 3]
    logits = model.logits(ids)[-1].tolist()
    drawing = sampler.Sampler(model.config.vocab_size, seed=1, repeat_penalty=1.2)
    model.session.rewind()
    tokens = [model.session.prefill(ids, drawing)]
    for _ in range(8):
        tokens.append(model.session.step(tokens[-1], drawing))
    results.append({"logits": logits, "tokens": tokens})
used = {id(v): v for m in (cpu, sampling) for v in vars(m).values() if isinstance(v, Dispatcher)}.values()
counted = [d.stats for d in used if d.__name__ in ("walk", "walk_and_sample", "sample")]
print(json.dumps({
    "results": results,
    "hits": sum(h > 0 for h in hits) + sum(sum(s.cache_hits.values()) for s in counted),
    "misses": sum(h == 0 for h in hits) + sum(sum(s.cache_misses.values()) for s in counted),
    "file": numballama.__file__,
}))
"""


class Copy:
    """A copy of the package whose sources may be edited, with a kernel cache of its own."""

    def __init__(self, folder: Path, files: dict[str, Path]) -> None:
        self.package, self.files = folder / "numballama", files
        self.cache = folder / "cache"
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))

    def use(self, *names: str) -> Any:
        paths = [self.files[name] for name in names]
        environment = {"PYTHONPATH": str(self.package.parent), "NUMBALLAMA_CACHE": str(self.cache)}
        found = run_python(USE, *paths, **environment)
        assert found["file"] == str(self.package / "__init__.py")
        return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, files: dict[str, Path]) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy"), files)


@pytest.fixture(scope="module")
def first(copy: Copy) -> Any:
    """What the first process with an empty cache found."""
    return copy.use("llama2c-v0", "llama2c-v2")


def test_a_second_process_compiles_nothing(copy: Copy, first: Any) -> None:
    assert first["misses"] > 20, "the first process does compile"
    entries = sorted(copy.cache.rglob("*.nb[ic]"))
    second = copy.use("llama2c-v0", "llama2c-v2")
    assert second["misses"] == 0 and second["hits"] >= first["misses"]
    assert second["results"] == first["results"]
    assert sorted(copy.cache.rglob("*.nb[ic]")) == entries, "the cache does not grow"


EDITS = [
    # a helper in a file other than that of the kernels which use it
    (
        "lowlevel_cpu.py",
        "        return bits\n",
        "        return builder.fmul(bits, ir.Constant(FLOAT, 1.5))\n",
        "logits",
    ),
    ("cpu.py", "min(tokens, row[ROWS])", "min(tokens, row[ROWS]) * (step != begin)", "logits"),
    ("sampling.py", "token = draw(logits, ids, n, temperature, state)", "token = ids[n - 1]", "tokens"),
]


@pytest.mark.parametrize(("name", "old", "new", "changed"), EDITS, ids=[edit[0] for edit in EDITS])
def test_editing_a_kernel_source_changes_the_result(
    copy: Copy, first: Any, name: str, old: str, new: str, changed: str
) -> None:
    path = copy.package / name
    source, times = path.read_text(), path.stat()
    assert source.count(old) == 1, f"{old!r} is no longer in {name}: choose another edit"
    try:
        path.write_text(source.replace(old, new))
        edited = copy.use("llama2c-v0")
    finally:
        path.write_text(source)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert edited["misses"] > 0
    assert edited["results"][0][changed] != first["results"][0][changed]
    if changed == "tokens":
        assert edited["results"][0]["logits"] == first["results"][0]["logits"]
    again = copy.use("llama2c-v0")
    assert again["results"][0] == first["results"][0] and again["misses"] == 0, "the old sources find their old cache"


def test_every_kernel_source_counts_for_the_cache(tmp_path: Path) -> None:
    """The folder depends on the text of each file of the list, and on nothing as fickle as times."""
    package = tmp_path / "numballama"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import json, os, pathlib, sys
from numballama import kernel_cache
assert kernel_cache.__file__ == sys.argv[1], "these sources are not to be edited"
def directory():
    kernel_cache.cache_directory.cache_clear()
    return kernel_cache.cache_directory().name
found = [directory()]
os.utime(kernel_cache.__file__, (1, 1))
found.append(directory())
for name in kernel_cache.KERNEL_SOURCES:
    path = pathlib.Path(kernel_cache.__file__).with_name(name)
    path.write_text(path.read_text() + "\\n# a comment")
    found.append(directory())
print(json.dumps(found))
"""
    found = run_python(
        code, package / "kernel_cache.py", PYTHONPATH=str(tmp_path), NUMBALLAMA_CACHE=str(tmp_path / "cache")
    )
    assert found[0] == found[1]
    assert len(set(found)) == 1 + len(kernel_cache.KERNEL_SOURCES)


def siblings(path: Path) -> dict[str, str]:
    """What a file imports: name → the module of this package that it comes from, or "numba"."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name: "numba" for alias in node.names if alias.name.split(".")[0] == "numba"}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            if module == "numba" or node.level:
                found |= {alias.name: module or alias.name for alias in node.names}
    return found


def test_list_of_kernel_sources_is_complete() -> None:
    """A file is listed that imports Numba, or the modules whose functions are compiled. Files of kernels alone import
    only these, and the registry, errors and checks, which leave no trace in compiled code. GPU kernels have a cache of
    their own, named by all files of their two folders."""
    compiled = {"numba", "jit", "lowlevel_cpu", "matmul_cpu", "kernels_cpu"}
    sources = {
        str(path.relative_to(PACKAGE)): siblings(path)
        for path in PACKAGE.rglob("*.py")
        if path.parent.name not in ("kernels_cuda", "lowlevel_cuda")
    }
    wanted = {name for name, found in sources.items() if compiled & set(found.values())}
    for name in ("lowlevel_cpu.py", "matmul_cpu.py", "kernels_cpu.py", "sampling.py"):
        wanted |= {f"{module}.py" for module in set(sources[name].values()) - {"numba", "registry", "errors", "checks"}}
    wanted.add("quantization/types.py")  # layouts of blocks are in compiled code
    wanted.add("sampler.py")  # `cpu` has its constants in compiled code
    wanted.remove("kernel_cache.py")  # asks for Numba's version, and compiles nothing
    assert set(kernel_cache.KERNEL_SOURCES) == wanted


@jit.exact_device
def to_a_multiple_of_four(x: float) -> float:
    return (x + 2.0**54) - 2.0**54


@jit.device
def left_alone(x: float) -> float:
    return (x + 2.0**54) - 2.0**54


def test_exact_arithmetic_stays_so_in_kernels() -> None:
    """Numba has functions without flags of their own take their caller's, with which nothing would be rounded here."""

    @numba.njit(fastmath=jit.FAST_MATH)  # type: ignore[untyped-decorator]
    def kernel(x: np.ndarray, exact: np.ndarray, fast: np.ndarray) -> None:
        for i in range(x.shape[0]):
            exact[i], fast[i] = to_a_multiple_of_four(x[i]), left_alone(x[i])

    x = np.arange(16.0)
    exact, fast = np.empty_like(x), np.empty_like(x)
    kernel(x, exact, fast)
    np.testing.assert_array_equal(exact, 4 * np.round(x / 4))
    np.testing.assert_array_equal(fast, x, "no reordering: the caller's flags have done nothing")


def test_cache_falls_back_where_it_cannot_write(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    code = "import json; from numballama.kernel_cache import cache_directory\n"
    code += "d = cache_directory(); print(json.dumps([str(d), d.is_dir()]))"
    directory, exists = run_python(code, NUMBALLAMA_CACHE=str(blocked))
    assert exists and not directory.startswith(str(tmp_path / "file"))
    os.rmdir(directory)


def test_pruning_removes_old_caches_and_nothing_else(tmp_path: Path) -> None:
    """The base may be any folder that a user names: what is there and not ours stays."""
    ours = [tmp_path / f"{number:016x}" for number in range(9)]
    others = [tmp_path / "sixteen_letters_", tmp_path / "my-other-project", tmp_path / "x", tmp_path / ("0" * 15 + "f")]
    assert {len(other.name) for other in others} >= {16}
    for age, folder in enumerate([*others, *ours]):
        folder.mkdir()
        if folder in ours:
            (folder / kernel_cache._MARK).touch()
        os.utime(folder, (age + 1, age + 1))
    current = tmp_path / ("f" * 16)
    current.mkdir()
    kernel_cache._prune(tmp_path, current)
    assert all(other.exists() for other in others)
    assert current.exists() and [folder for folder in ours if folder.exists()] == ours[-kernel_cache.KEPT_CACHES :]


# Threads and processes


LOGITS = """
import json, sys, threading
import numballama

def use(threads=None):
    model = numballama.compile(sys.argv[1], device="cpu", threads=threads)
    return model.logits([1, 5, 9, 77, 3]).tolist()
"""


@pytest.fixture(scope="module")
def wanted(files: dict[str, Path]) -> np.ndarray:
    return shared_model(files["llama2c-v0"], device="reference").logits(IDS)


def check(found: Any, wanted: np.ndarray) -> None:
    assert np.abs(np.array(found) - wanted).max() < 1e-4


VARIANTS: list[tuple[str, dict[str, str]]] = [
    ("1", {}),
    ("2", {}),
    ("None", {"NUMBA_NUM_THREADS": "1"}),
    ("4", {"NUMBA_NUM_THREADS": "1"}),
    ("8", {"NUMBA_NUM_THREADS": "8"}),
    ("3", {"NUMBA_NUM_THREADS": "8"}),
    ("8", {"NUMBA_NUM_THREADS": "8", "NUMBA_THREADING_LAYER": "workqueue"}),
    ("None", {"NUMBA_THREADING_LAYER": "workqueue"}),
    ("2", {"OMP_THREAD_LIMIT": "1"}),
    ("8", {"NUMBA_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "3"}),
]


@pytest.mark.parametrize(("threads", "environment"), VARIANTS, ids=str)
def test_any_number_of_threads(
    files: dict[str, Path], wanted: np.ndarray, threads: str, environment: dict[str, str]
) -> None:
    code = f"{LOGITS}\nprint(json.dumps(use({threads})))"
    check(run_python(code, files["llama2c-v0"], **environment), wanted)


def test_more_threads_than_there_may_be_are_noted(files: dict[str, Path]) -> None:
    limit = int(os.environ.get("NUMBA_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    with numballama.compile(files["llama2c-v0"], device="cpu", threads=limit + 1) as model:
        assert model.plan.workers <= limit + 1
        assert any(f"{limit + 1} threads asked for" in note for note in model.notes)


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_two_python_threads_at_once(files: dict[str, Path], wanted: np.ndarray, layer: str) -> None:
    """Each with a model of its own and both with one: the workqueue layer aborts the process on two parallel
    regions."""
    code = f"""{LOGITS}
shared = numballama.compile(sys.argv[1], device="cpu")
own = [numballama.compile(sys.argv[1], device="cpu", threads=n) for n in (1, None)]
results = []
def work(model):
    for _ in range(30):
        results.append(model.logits([1, 5, 9, 77, 3]).tolist())
threads = [threading.Thread(target=work, args=(m,)) for m in (*own, shared, shared)]
for t in threads: t.start()
for t in threads: t.join()
spread = max(abs(a - b) for r in results for x, y in zip(r, results[0]) for a, b in zip(x, y))
print(json.dumps([len(results), results[0], spread]))
"""
    count, one, spread = run_python(code, files["llama2c-v0"], NUMBA_THREADING_LAYER=layer)
    assert count == 120 and spread < 1e-4
    check(one, wanted)


def test_numbas_own_thread_count_is_put_back(files: dict[str, Path]) -> None:
    code = f"""{LOGITS}
import numba
numba.set_num_threads(3)
use(1)
use(2)
print(json.dumps(numba.get_num_threads()))
"""
    assert run_python(code, files["llama2c-v0"], NUMBA_NUM_THREADS="4") == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_use_is_an_error_and_not_a_hang(files: dict[str, Path], wanted: np.ndarray) -> None:
    code = f"""{LOGITS}
import os, signal
model = numballama.compile(sys.argv[1], device="cpu")
model.logits([1])
child = os.fork()
if child == 0:
    signal.alarm(30)  # a hang ends here
    try:
        model.logits([1])
    except numballama.DeviceError as error:
        os._exit(42 if "spawn" in str(error) else 43)
    os._exit(44)
_, status = os.waitpid(child, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), model.logits([1, 5, 9, 77, 3]).tolist()]))
"""
    exit_code, logits = run_python(code, files["llama2c-v0"])
    assert exit_code == 42
    check(logits, wanted)


def test_spawned_child(files: dict[str, Path], wanted: np.ndarray, tmp_path: Path) -> None:
    """Parent and child each compile the model, as the error after a fork advises."""
    script = tmp_path / "spawned.py"
    script.write_text(f"""{LOGITS}
import multiprocessing
if __name__ == "__main__":
    mine = use()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        theirs = pool.map(use, [None, 1])
    print(json.dumps([mine, *theirs]))
""")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    found = subprocess.run(
        [sys.executable, str(script), str(files["llama2c-v0"])],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    for logits in json.loads(found.stdout.splitlines()[-1]):
        check(logits, wanted)


HALVES = """
import json
import numba, numpy as np
from numballama.lowlevel_cpu import as_f32, f32_to

@numba.njit
def decode(bits, out):
    for i in range(len(bits)):
        out[i] = as_f32(bits[i])

@numba.njit
def encode(numbers, out):
    for i in range(len(numbers)):
        out[i] = f32_to(out[i], numbers[i])

np.seterr(all="ignore")
bits = np.arange(65536, dtype=np.uint16)
exact, decoded = bits.view(np.float16).astype(np.float32), np.empty(65536, np.float32)
decode(bits, decoded)
drawn = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
numbers = np.concatenate([drawn, exact, (exact[:-1] + exact[1:]) / 2, np.float32([65519.99, 65520, 2**-25, -0.0])])
encoded = np.empty(len(numbers), np.uint16)
encode(numbers, encoded)
same = lambda a, b: bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())
signs = bool((np.signbit(decoded) == np.signbit(exact))[~np.isnan(exact)].all())
print(json.dumps([same(decoded, exact), same(encoded.view(np.float16), numbers.astype(np.float16)), signs]))
"""


@pytest.mark.parametrize("generic", [False, True])
def test_float16_is_converted_with_and_without_the_cpu(generic: bool) -> None:
    """A CPU without such instructions (or a user who has Numba compile for any) gets them in integer arithmetic."""
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""} if generic else {}
    assert run_python(HALVES, **plain) == [True, True, True]


def test_any_cpu_tells_the_story(tmp_path: Path) -> None:
    code = "import json, numballama; m = numballama.compile(None, kv_dtype='f16', threads=1)\n"
    code += "print(json.dumps(m.generate('Once upon a time', max_tokens=5, temperature=0)))"
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBALLAMA_CACHE": str(tmp_path)}
    assert run_python(code, **plain) == ", there was a little"


FORKED = """
import json, os, threading
import numballama
from numballama import DeviceError

model = numballama.compile(None, threads=1)
held, done = threading.Event(), threading.Event()

def hold():
    with model.using():  # as in the middle of a token
        held.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
pid = os.fork()
if pid == 0:
    try:
        model.generate("Once", max_tokens=2)
    except DeviceError:
        os._exit(7)
    os._exit(8)
done.set()
thread.join()
print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_a_lock_is_held_gets_an_error() -> None:
    assert run_python(FORKED) == 7
