"""The cache of compiled kernels: nothing is compiled twice, and nothing stale is used."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from numballama import kernel_cache
from numballama.config import ModelConfig
from tests.helpers.processes import PACKAGE, run_python
from tests.helpers.random_models import save

SMALL = ModelConfig(32, 64, 2, 4, 2, 120, 40)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model in float32, and one in int8 with int8 activations."""
    folder = tmp_path_factory.mktemp("small")
    return {name: save(folder, name, SMALL)[0] for name in ("llama2c-v0", "llama2c-v2")}


USE = """
import json, sys
import numballama
from numba.core.dispatcher import Dispatcher
from numballama import SamplingParams
from numballama.cpu import backend, executor, sampling
from numballama.sampling import SamplerTable

hits = []
real = backend.compile_step
def counting(function, operands):
    found = real(function, operands)
    hits.append(found.cache_hits)
    return found
backend.compile_step = counting

results = []
for path, options in zip(sys.argv[1:], ({}, {"kv_dtype": "f16"})):
    model = numballama.compile(path, device="cpu", **options)
    ids = [1, 5, 9, 77, 3]
    logits = model.logits(ids)[-1].tolist()
    sampler = SamplerTable(1, model.config.vocab_size)
    sampler.assign(0, SamplingParams(seed=1, repeat_penalty=1.2))
    model.session.truncate()
    tokens = [model.session.prefill(ids, sampler)]
    for _ in range(8):
        tokens.append(model.session.step(tokens[-1], sampler))
    results.append({"logits": logits, "tokens": tokens})
used = {id(v): v for m in (executor, sampling) for v in vars(m).values() if isinstance(v, Dispatcher)}.values()
counted = [d.stats for d in used if d.__name__ in ("run_steps", "run_and_sample", "sample_rows")]
print(json.dumps({
    "results": results,
    "hits": sum(h > 0 for h in hits) + sum(sum(s.cache_hits.values()) for s in counted),
    "misses": sum(h == 0 for h in hits) + sum(sum(s.cache_misses.values()) for s in counted),
    "file": numballama.__file__,
}))
"""


class Copy:
    """A copy of the package whose sources may be edited, with its own kernel cache."""

    def __init__(self, folder: Path, files: dict[str, Path]) -> None:
        self.package, self.files = folder / "numballama", files
        self.cache = folder / "cache"
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))

    def use(self, *names: str) -> Any:
        paths = [self.files[name] for name in names]
        environment = {"PYTHONPATH": str(self.package.parent), "NUMBALLAMA_CACHE": str(self.cache)}
        found = run_python(USE, *paths, timeout=600, **environment)
        assert found["file"] == str(self.package / "__init__.py")
        return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, files: dict[str, Path]) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy"), files)


@pytest.fixture(scope="module")
def first(copy: Copy) -> Any:
    """Result of the first process, which starts with an empty cache."""
    return copy.use("llama2c-v0", "llama2c-v2")


@pytest.mark.slow
def test_a_second_process_compiles_nothing(copy: Copy, first: Any) -> None:
    assert first["misses"] > 20, "the first process does compile"
    entries = sorted(copy.cache.rglob("*.nb[ic]"))
    second = copy.use("llama2c-v0", "llama2c-v2")
    assert second["misses"] == 0 and second["hits"] >= first["misses"]
    assert second["results"] == first["results"]
    assert sorted(copy.cache.rglob("*.nb[ic]")) == entries, "the cache does not grow"


@pytest.mark.slow
def test_editing_a_kernel_source_changes_the_result(copy: Copy, first: Any) -> None:
    """One edit from end to end, of a helper in another file than its kernels. The next test covers the other files."""
    path = copy.package / "cpu" / "intrinsics.py"
    old, new = "        return bits\n", "        return builder.fmul(bits, ir.Constant(FLOAT, 1.5))\n"
    source, times = path.read_text(), path.stat()
    assert source.count(old) == 1, f"{old!r} is no longer in {path}: choose another edit"
    try:
        path.write_text(source.replace(old, new))
        edited = copy.use("llama2c-v0")
    finally:
        path.write_text(source)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert edited["misses"] > 0
    assert edited["results"][0]["logits"] != first["results"][0]["logits"]
    again = copy.use("llama2c-v0")
    assert again["results"][0] == first["results"][0] and again["misses"] == 0, "the old sources find their old cache"


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
    wanted.remove("kernel_cache.py")  # asks for Numba's version, and compiles nothing
    assert set(kernel_cache.KERNEL_SOURCES) == wanted


@pytest.mark.slow
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
