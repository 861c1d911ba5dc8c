"""The registrations of CUDA's launch functions, and the kernels that they name."""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from numballama import registry
from numballama.cuda import ops
from numballama.cuda.launch import Array, LaunchContext, Matrix
from numballama.cuda.ops import wgmma_gemm
from numballama.registry import KernelRef
from tests.helpers.cuda_host import missing_packages

ROOT = Path(__file__).parents[3]
MODULES = [importlib.import_module(f"numballama.cuda.ops.{each.name}") for each in pkgutil.iter_modules(ops.__path__)]


def refs() -> dict[str, KernelRef]:
    """The kernels that the modules of `cuda.ops` name, by module and name there."""
    return {
        f"{module.__name__}.{name}": value
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, KernelRef)
    }


@pytest.mark.skipif(bool(missing_packages()), reason="kernels cannot be imported")
def test_every_named_kernel_exists() -> None:
    from numba.cuda.dispatcher import CUDADispatcher

    assert len(refs()) > 25
    for name, ref in refs().items():
        kernel = ref.load()
        assert isinstance(kernel, CUDADispatcher), name
        assert not kernel.targetoptions.get("device"), f"{name} is a function that kernels call, no kernel"
        assert kernel.py_func.__name__ == ref.name


def alternatives(types: tuple[registry.Types, ...]) -> set[tuple[str, ...]]:
    """All the types that an entry of the registry accepts."""
    return set(itertools.product(*([each] if isinstance(each, str) else each for each in types)))


def test_no_registration_hides_another() -> None:
    """No two entries of an operator accept the same types, so it does not matter which one was registered first."""
    found = {op: entries for (op, backend), entries in registry._kernels.items() if backend == "cuda"}
    assert len(found) > 20 and len(found["linear"]) > 5
    for op, entries in found.items():
        for first, second in itertools.combinations(entries, 2):
            both = alternatives(first.types) & alternatives(second.types)
            assert not both, f"{op}{sorted(both)[0]}: {first.name} and {second.name} are both registered"


ORDERS = """
import importlib, itertools, json, sys
from numballama import registry
registered = []
entry_of = registry.kernel
def recording(op, backend, *types, **scratch):
    if backend == "cuda":
        registered.append([op, types])
    return entry_of(op, backend, *types, **scratch)
registry.kernel = recording
names = "attention", "collectives", "elementwise", "linear"
modules = [importlib.import_module(f"numballama.cuda.ops.{name}") for name in names]
count = len(registered)
assert all(registered[i] != registered[j] for i in range(count) for j in range(i)), "registered twice"
found = []
for order in itertools.permutations(modules):
    for key in [key for key in registry._kernels if key[1] == "cuda"]:
        del registry._kernels[key]
    for module in order:
        importlib.reload(module)
    found.append(sorted(
        f"{op}{entry.types}: {entry.function.__module__}.{entry.name} {sorted(entry.scratch)}"
        for (op, backend), entries in registry._kernels.items() if backend == "cuda" for entry in entries
    ))
print(json.dumps([count, found]))
"""


def test_the_order_of_imports_does_not_matter() -> None:
    """Each operator is registered once for its types, and by the same function whichever file is imported first."""
    done = subprocess.run(
        [sys.executable, "-c", ORDERS], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    count, found = json.loads(done.stdout)
    entries: Any = found[0]
    assert all(other == entries for other in found)
    assert count == len(entries) > 80


def matrix(kind: str, rows: int, columns: int) -> Matrix:
    """A weight whose memory nobody looks at; int8 has scales in float32, float16 in two pieces has, too."""
    scales = Array(0, (rows, 1), "f32" if kind in ("int8", "two pieces") else "f16")
    return Matrix((rows, columns), Array(0, (rows, columns), "f16" if kind == "two pieces" else kind), columns, scales)


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "n_sms", "want"),
    [
        ("f16", [2048], 5632, 132, True),
        ("q4_0", [2048], 2048, 132, True),
        ("int8", [2048], 2048, 132, True),
        ("two pieces", [2048], 4096, 132, False),  # a thread has two sets of sums already
        ("f16", [2048], 1984, 132, False),  # too short
        ("f16", [4096], 11008, 132, False),  # 128 tiles of 512 tokens are enough
        ("f16", [2048], 5632, 114, False),
        ("f16", [1536, 256, 256], 2048, 132, True),
        ("f16", [2048, 256, 256], 2048, 132, False),
    ],
)
def test_k_is_halved(kind: str, rows: list[int], columns: int, n_sms: int, want: bool) -> None:
    nothing = Array(0, (1,), "i32")
    ctx = LaunchContext(n_sms, 0, nothing, nothing, lambda count: nothing, True, True)
    assert wgmma_gemm.is_halved(ctx, [matrix(kind, each, columns) for each in rows]) is want


def test_k_of_gate_and_up_is_halved() -> None:
    """A tile has 64 rows of each."""
    nothing = Array(0, (1,), "i32")
    ctx = LaunchContext(132, 0, nothing, nothing, lambda count: nothing, True, True)
    for rows, want in ((1024, True), (1088, False)):
        assert wgmma_gemm.is_halved(ctx, [matrix("bf16", rows, 2048)] * 2, paired=True) is want
