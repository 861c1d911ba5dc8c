"""The cache of compiled kernels: nothing is compiled twice, and nothing stale is used."""

from __future__ import annotations

import ast
import errno
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama import kernel_cache
from numballama.config import ModelConfig
from numballama.doctor.cache import Cache
from numballama.errors import DeviceError
from tests.helpers import fuzz_kernel_cache
from tests.helpers.processes import PACKAGE, run_python
from tests.helpers.random_models import save

SMALL = ModelConfig(32, 64, 2, 4, 2, 120, 40)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in int8 with int8 activations."""
    return save(tmp_path_factory.mktemp("small"), "llama2c-v2", SMALL)[0]


USE = """
import json, sys
import numballama
from numba.core.dispatcher import Dispatcher
from numballama import SamplingParams
from numballama.cpu import backend, executor, sampling
from numballama.sampling import SamplerTable

compiled = {}
real = backend.compile_step
def counting(function, operands):
    found = real(function, operands)
    compiled[id(found)] = found  # once each
    return found
backend.compile_step = counting

results = []
for path in sys.argv[1:]:
    model = numballama.compile(path, device="cpu", kv_dtype="f16")
    ids = [1, 5, 9, 77, 3]
    logits = model.logits(ids)[-1].tolist()
    sampler = SamplerTable(1, model.config.vocab_size)
    sampler.assign(0, SamplingParams(seed=1, repeat_penalty=1.2))
    with model.exclusive() as session:
        tokens = [session.prefill(ids, sampler)]
        for _ in range(8):
            tokens.append(session.step(tokens[-1], sampler))
    results.append({"logits": logits, "tokens": tokens})
used = {id(v): v for m in (executor, sampling) for v in vars(m).values() if isinstance(v, Dispatcher)}.values()
counted = [d.stats for d in used if d.__name__ in ("run_steps", "serve", "sample_rows")]
print(json.dumps({
    "results": results,
    "hits": sum(found.cache_hits > 0 for found in compiled.values()),
    "misses": sum(found.cache_hits == 0 for found in compiled.values()),
    "others": sum(sum(s.cache_misses.values()) for s in counted),
    "file": numballama.__file__,
}))
"""


LAYER = """
import json
import numballama
import numpy as np
from numballama.checkpoint import Weight
from numballama.cpu import backend
from numballama.ir import Graph
from numballama.quantization.types import F32

found, real = [], backend.compile_step
def counting(function, operands):
    found.append(real(function, operands))
    return found[-1]
backend.compile_step = counting

graph, weight = Graph("layer"), np.arange(12, dtype=np.float32).reshape(3, 4)
graph.outputs = [graph.add("linear", graph.input("x", (1, 4), "f32"), graph.weight("w", (3, 4), "f32"), out="y").name]
program = backend.CpuBackend({"w": Weight((3, 4), F32, weight)}, threads=1).program(graph)
program.inputs["x"][:] = [[1, -2, 3, 0.5]]
program.run(1)
print(json.dumps({
    "results": program.value("y").tolist(),
    "misses": sum(each.cache_hits == 0 for each in found),
    "file": numballama.__file__,
}))
"""
"""A linear layer alone, whose kernel is compiled much sooner than those of a model."""


class Copy:
    """A copy of the package whose sources may be edited, with its own kernel cache."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "numballama"
        self.cache = folder / "cache"
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))

    def use(self, script: str, *paths: Path) -> Any:
        environment = {"PYTHONPATH": str(self.package.parent), "NUMBALLAMA_CACHE": str(self.cache)}
        found = run_python(script, *paths, timeout=600, **environment)
        assert found["file"] == str(self.package / "__init__.py")
        return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy"))


@pytest.mark.slow
def test_a_second_process_compiles_nothing(copy: Copy, file: Path) -> None:
    """The first one starts with an empty cache. Float32 weights: the next test."""
    first = copy.use(USE, file)
    assert first["hits"] == 0 < min(first["misses"], first["others"]), "the first process does compile, all of it"
    entries = sorted(copy.cache.rglob("*.kernel"))
    second = copy.use(USE, file)
    assert second["misses"] == second["others"] == 0 and second["hits"] == first["misses"]
    assert second["results"] == first["results"]
    assert sorted(copy.cache.rglob("*.kernel")) == entries, "the cache does not grow"


@pytest.mark.slow
def test_editing_a_kernel_source_changes_the_result(copy: Copy) -> None:
    """One edit from end to end, of a helper in another file than its kernels. The next test covers the other files."""
    path = copy.package / "cpu" / "intrinsics.py"
    old, new = "    return bits\n", "    return builder.fmul(bits, ir.Constant(FLOAT, 1.5))\n"
    source, times = path.read_text(), path.stat()
    assert source.count(old) == 1, f"{old!r} is no longer in {path}: choose another edit"
    first = copy.use(LAYER)
    assert first["results"] == [[5.5, 15.5, 25.5]]
    try:
        path.write_text(source.replace(old, new))
        edited = copy.use(LAYER)
    finally:
        path.write_text(source)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert edited["misses"] > 0
    assert edited["results"] != first["results"]
    again = copy.use(LAYER)
    assert again["results"] == first["results"] and again["misses"] == 0, "the old sources find their old cache"


@pytest.mark.slow
def test_every_kernel_source_counts_for_the_cache(tmp_path: Path) -> None:
    """The folder depends on the text of each file of the list, and not on modification times."""
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
    path = pathlib.Path(kernel_cache.__file__).parent / name
    path.write_text(path.read_text() + "\\n# a comment")
    found.append(directory())
print(json.dumps(found))
"""
    found = run_python(
        code, package / "kernel_cache.py", PYTHONPATH=str(tmp_path), NUMBALLAMA_CACHE=str(tmp_path / "cache")
    )
    assert found[0] == found[1]
    assert len(set(found)) == 1 + len(kernel_cache.KERNEL_SOURCES)


def siblings(path: Path) -> set[str]:
    """What a file imports: files of this package, as in KERNEL_SOURCES, and "numba"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {"numba" for alias in node.names if alias.name.split(".")[0] == "numba"}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {"numba"} if (node.module or "").split(".")[0] == "numba" else set()
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            files = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
            found |= {file.relative_to(PACKAGE).as_posix() for file in files if file.exists()}
    return found


@pytest.mark.slow
def test_list_of_kernel_sources_is_complete() -> None:
    """A file is listed that imports Numba, or the modules whose functions are compiled. Files of kernels alone import
    only these, and the registry, errors and checks, which leave no trace in compiled code. GPU kernels have a cache of
    their own, named by all files of their two folders."""
    compiled = {"numba", "cpu/compiler.py", "cpu/intrinsics.py", "cpu/matmul.py", "kernels_cpu.py"}
    sources = {
        path.relative_to(PACKAGE).as_posix(): siblings(path)
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in ("cuda", "kernels_cuda.py")
    }
    wanted = {name for name, found in sources.items() if compiled & found}
    for name in (
        "cpu/intrinsics.py",
        "cpu/matmul.py",
        "kernels_cpu.py",
        "cpu/kernels_int8.py",
        "cpu/vecdot.py",
        "cpu/sampling.py",
    ):
        wanted |= sources[name] - {"numba", "registry.py", "errors.py", "validation.py"}
    wanted.add("sampling.py")  # `cpu.executor` has its constants in compiled code
    # these ask for Numba's version and settings, and compile nothing
    wanted -= {"kernel_cache.py", "host/environment.py", "doctor/cpu.py"}
    assert set(kernel_cache.KERNEL_SOURCES) == wanted


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


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of a process that has noted nothing yet."""
    monkeypatch.setattr(kernel_cache, "_noted", set())
    return caplog


KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(KEYS, st.binary(max_size=300)), min_size=1, max_size=4), st.data())
def test_an_entry_is_what_was_stored_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, bytes]], data: st.DataObject
) -> None:
    """Whatever is done to the files, and when several keys get the same file."""
    folder = tmp_path_factory.mktemp("cache")
    paths = [folder / f"{data.draw(st.integers(0, 2))}.kernel" for _ in entries]
    for path, (key, content) in zip(paths, entries, strict=True):
        assert kernel_cache.store(path, key, content)
        assert kernel_cache.load(path, key) == content
    whole = {path: path.read_bytes() for path in paths}
    for path in whole:
        fuzz_kernel_cache.damage(data.draw(st.randoms(use_true_random=False)), path, list(whole.values()))
    for path, (key, content) in zip(paths, entries, strict=True):
        written = {own for p, own in zip(paths, entries, strict=True) if own[0] == key}
        assert kernel_cache.load(path, key) in (None, *(own[1] for own in written)), "of this key, or nothing"
        fuzz_kernel_cache.remove(path)
        assert kernel_cache.load(path, key) is None
        assert kernel_cache.store(path, key, content) and kernel_cache.load(path, key) == content, "it heals"
    assert not list(folder.glob("*.tmp"))


def test_many_writers_and_readers_of_one_file(tmp_path: Path) -> None:
    path, wrong = tmp_path / "one.kernel", []

    def work(index: int) -> None:
        key, content = f"key {index % 3}", bytes([index % 3]) * 20_000
        for _ in range(40):
            kernel_cache.store(path, key, content)
            if kernel_cache.load(path, key) not in (None, content):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and [each.name for each in tmp_path.iterdir()] == ["one.kernel"]


def test_a_damaged_entry_is_noted_once(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"")
        assert kernel_cache.load(tmp_path / name, "key") is None
    assert [record.getMessage() for record in notes.records] == [
        f"{tmp_path / 'a'} is damaged; such kernels are compiled again"
    ]


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(st.none() | st.binary(max_size=9), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    st.booleans(),
)
def test_a_folder_in_the_place_of_an_entry_is_replaced(
    tmp_path_factory: pytest.TempPathFactory, content: object, link: bool
) -> None:
    """An empty one, one with files, folders and links in it, and a link to a folder, whose content stays."""
    base = tmp_path_factory.mktemp("cache")
    path, elsewhere = base / "cache" / "a.kernel", base / "elsewhere"

    def make(place: Path, what: object) -> None:
        if isinstance(what, bytes):
            place.write_bytes(what)
        elif what is None:
            place.symlink_to(elsewhere)
        else:
            place.mkdir()
            for index, item in enumerate(cast("list[object]", what)):
                make(place / str(index), item)

    (base / "cache").mkdir()
    make(elsewhere, [b"mine"])
    make(path, None if link else [content])
    with mock.patch.object(kernel_cache, "_note") as note:
        assert kernel_cache.load(path, "key") is None
        assert kernel_cache.store(path, "key", b"content") and kernel_cache.load(path, "key") == b"content"
    assert note.call_count == 1 and "is damaged" in note.call_args.args[1]
    assert (elsewhere / "0").read_bytes() == b"mine"
    assert [each.name for each in (base / "cache").iterdir()] == ["a.kernel"]


def test_a_folder_that_cannot_be_searched_is_a_problem_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Python 3.12, `Path.exists` and the like raise there; root may search everywhere, so a patch refuses."""
    stat = os.stat

    def refuse(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert kernel_cache.Usage.of(tmp_path / "x").entries == 0


def test_a_full_disk_costs_a_line(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    """A limit on the size of files stands in for it: part of the entry is written."""
    kernel_cache._prepare(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        stored = kernel_cache.store(tmp_path / "a.kernel", "key", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not stored and list(tmp_path.iterdir()) == [], "nothing is left"
    (record,) = notes.records
    assert os.strerror(errno.EFBIG) in record.getMessage() and "NUMBALLAMA_CACHE" in record.getMessage()
    assert "Errno" not in record.getMessage()


@pytest.mark.parametrize("where", ["a file", "under a file", "not writable"])
def test_a_folder_that_cannot_be_written_costs_a_line(
    tmp_path: Path, notes: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / {"a file": "file", "under a file": "file/x", "not writable": "x"}[where]
    if where == "not writable":  # root may write everywhere
        kernel_cache.store(folder / "old.kernel", "key", b"old")

        def refuse(*arguments: object, **options: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("builtins.open", refuse)
        assert kernel_cache.load(folder / "old.kernel", "key") == b"old", "what is there is used"
    for _ in range(2):
        assert not kernel_cache.store(folder / "a.kernel", "key", b"content")
        assert kernel_cache.load(folder / "a.kernel", "key") is None
    monkeypatch.undo()
    assert [("each start compiles them" in record.getMessage()) for record in notes.records] == [True]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kernel_cache.store(tmp_path / "a.kernel", "key", b"content")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_after_a_while(tmp_path: Path) -> None:
    old, new = tmp_path / "a.kernel.1.tmp", tmp_path / "a.kernel.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    folder = tmp_path / "a.kernel.0.tmp"
    folder.mkdir()
    (folder / "x").write_bytes(b"x")
    for path in (old, folder):
        os.utime(path, (1, 1))
    kernel_cache.store(tmp_path / "b.kernel", "key", b"content")
    assert {path.name for path in tmp_path.iterdir()} == {"a.kernel.2.tmp", "b.kernel"}


def test_kernels_of_edited_sources_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of folder is known by its name, also where the other kind cannot be named."""

    def missing() -> str:
        raise DeviceError("numba-cuda is missing")

    for name, other in (("_cpu_name", "_cuda_name"), ("_cuda_name", "_cpu_name")):
        with monkeypatch.context() as patch:
            patch.setattr(kernel_cache, other, missing)
            patch.setattr(kernel_cache, name, lambda: "0" * 16)
            assert kernel_cache.is_current(tmp_path / ("0" * 16))
            assert not kernel_cache.is_current(tmp_path / ("1" * 16)), "the sources were edited"
            assert kernel_cache.is_current(tmp_path / "a folder of a test")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable names a folder, and the system does not know the user."""
    for name in ("HOME", "NUMBALLAMA_CACHE", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    kernel_cache.cache_directory.cache_clear()
    yield
    kernel_cache.cache_directory.cache_clear()


def test_no_home_directory_costs_a_line(no_home: None, notes: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert kernel_cache.cache_directory() is None
    (record,) = notes.records
    assert "no home directory" in record.getMessage() and "NUMBALLAMA_CACHE" in record.getMessage()


def test_sources_that_are_no_files_cost_a_line(
    tmp_path: Path, notes: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a zip archive, which this is the path of."""
    (tmp_path / "archive.zip").write_bytes(b"PK")
    monkeypatch.setattr(kernel_cache, "__file__", str(tmp_path / "archive.zip" / "numballama" / "kernel_cache.py"))
    kernel_cache.cache_directory.cache_clear()
    try:
        assert [kernel_cache.cache_directory() for _ in range(2)] == [None, None]
    finally:
        kernel_cache.cache_directory.cache_clear()
    assert [record.getMessage() for record in notes.records] == [
        f"compiled kernels are not kept: {kernel_cache.NO_SOURCES}"
    ]
    assert Cache.of(None).problem == kernel_cache.NO_SOURCES


def test_usage_says_why_nothing_can_be_stored(tmp_path: Path) -> None:
    """As `store` finds it: a link to nothing or to itself in the place of a folder, a full disk. Nothing is left."""
    (tmp_path / "nothing").symlink_to(tmp_path / "unmounted" / "cache")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    for name in ("nothing", "itself"):
        for folder in (tmp_path / name, tmp_path / name / "x"):
            assert kernel_cache.Usage.of(folder).problem == f"{tmp_path / name} is not a folder"
            assert not kernel_cache.store(folder / "a.kernel", "key", b"")
    assert kernel_cache.Usage.of(tmp_path / "new" / "x") == kernel_cache.Usage(0, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        problem = kernel_cache.Usage.of(tmp_path / "new").problem
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert problem == f"{tmp_path} cannot be written: {os.strerror(errno.EFBIG)}"
    assert {path.name for path in tmp_path.iterdir()} == {"nothing", "itself"}


def test_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative XDG_CACHE_HOME does not count, as XDG's rule says; a relative NUMBALLAMA_CACHE does."""
    monkeypatch.setenv("HOME", "/home/ada")
    for own, xdg, expected in (
        (None, "here", "/home/ada/.cache/numballama"),
        (None, "/x/y", "/x/y/numballama"),
        ("", "", "/home/ada/.cache/numballama"),
        ("~/k", "/x", "/home/ada/k"),
        ("a b/ü", "/x", f"{os.getcwd()}/a b/ü"),
        ("~nobody-of-this-name/k", "/x", None),
    ):
        for name, value in (("NUMBALLAMA_CACHE", own), ("XDG_CACHE_HOME", xdg)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert kernel_cache.cache_root() == (expected and Path(expected))
    assert kernel_cache.no_place() == "there is no home directory for NUMBALLAMA_CACHE=~nobody-of-this-name/k"


def test_usage_and_clearing(tmp_path: Path) -> None:
    """All caches are removed and counted, those of the layout before too, and nothing else."""
    ours, older, other = tmp_path / ("a" * 16), tmp_path / ("b" * 16), tmp_path / "other"
    kernel_cache.store(ours / "a.kernel", "key", bytes(1000))
    kernel_cache.store(ours / "b.kernel", "key", b"")
    (older / "numballama_0123").mkdir(parents=True)
    (older / "numballama_0123" / "x.1.nbc").write_bytes(bytes(500))
    (older / kernel_cache._MARK).touch()
    other.mkdir()
    (other / "file").write_text("mine")
    found = kernel_cache.Usage.of(ours)
    assert found.entries == 2 and found.nbytes == sum(p.stat().st_size for p in ours.iterdir()) and not found.problem
    assert kernel_cache.Usage.of(older) == kernel_cache.Usage(1, 500)
    assert kernel_cache.clear(tmp_path) == kernel_cache.Usage(3, found.nbytes + 500)
    assert [path.name for path in tmp_path.iterdir()] == ["other"] and (other / "file").exists()
    assert kernel_cache.clear(tmp_path / "missing") == kernel_cache.Usage(0, 0)
    assert "is not a folder" in kernel_cache.Usage.of(other / "file" / "x").problem


@pytest.mark.slow
def test_damaged_entries_of_all_kinds_cost_only_time(tmp_path: Path) -> None:
    """Through Numba: the results are right, and the next process finds whole entries."""
    _, counts = fuzz_kernel_cache.fuzz(60, 0, tmp_path)
    assert sum(counts.values()) == 60 and counts["compiled again"] > 20, counts
