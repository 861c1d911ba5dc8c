"""What depends on Numba's private API, and the flags of compiled functions: look here first after a Numba upgrade."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import types

from numballama.cpu import compiler
from tests.helpers.extent import EVERYTHING
from tests.helpers.processes import run_python

STEP = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 4)


def call(function: Callable[..., Any], kinds: list[Any], slots: list[int], *leading: int) -> int:
    """Compile a kernel and call it by its address; returns its status."""
    compiled = compiler.compile_step(function, kinds)
    operands = np.array(slots, np.int64)
    return STEP(compiled.address)(operands.ctypes.data, *leading)


def every_kind(worker, n_workers, tokens, matrix, pair, factor, count, out):  # type: ignore[no-untyped-def]
    vector, group = pair
    out[0, 0], out[0, 1], out[0, 2] = worker, n_workers, tokens
    out[1, 0], out[1, 1], out[1, 2] = matrix[1, 2], vector[group], factor * count


def test_operands_are_read_from_slots_in_the_order_of_parameters() -> None:
    matrix, vector = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.int8)
    out = np.zeros((2, 3))
    kinds = [
        types.Array(types.float32, 2, "C"),
        types.Tuple((types.Array(types.int8, 1, "C"), types.int64)),
        types.float64,
        types.int64,
        types.Array(types.float64, 2, "C"),
    ]
    slots = [
        *(matrix.ctypes.data, 2, 3),
        *(vector.ctypes.data, 4, 3),
        *(struct.unpack("<q", struct.pack("<d", 0.5))[0], 7),
        *(out.ctypes.data, 2, 3),
    ]
    assert call(every_kind, kinds, slots, 4, 9, 11) == 0
    np.testing.assert_array_equal(out, [[4, 9, 11], [5, 3, 3.5]])


def raising(worker, n_workers, tokens, out):  # type: ignore[no-untyped-def]
    if tokens > 1:
        raise ValueError("too many")
    out[0] = 1


def test_a_kernel_that_raises_has_a_status() -> None:
    out = np.zeros(1)
    kinds, slots = [types.Array(types.float64, 1, "C")], [out.ctypes.data, 1]
    assert call(raising, kinds, slots, 0, 1, 1) == 0 and out[0] == 1
    assert call(raising, kinds, slots, 0, 1, 2) != 0


def test_a_function_without_a_source_file_is_compiled_but_not_cached() -> None:
    space: dict[str, Any] = {}
    exec("def typed_in(worker, n_workers, tokens, out):\n    out[0] = tokens", space)
    out = np.zeros(1)
    kinds, slots = [types.Array(types.float64, 1, "C")], [out.ctypes.data, 1]
    assert call(space["typed_in"], kinds, slots, 0, 1, 5) == 0 and out[0] == 5
    assert compiler.compile_step(space["typed_in"], kinds).cache_hits == 0


@compiler.exact_device
def to_a_multiple_of_four(x: float) -> float:
    return (x + 2.0**54) - 2.0**54


@compiler.device
def left_alone(x: float) -> float:
    return (x + 2.0**54) - 2.0**54


def test_exact_arithmetic_stays_so_in_kernels() -> None:
    """Numba compiles functions without flags with those of their caller, and those would remove the rounding here."""

    @numba.njit(fastmath=compiler.FAST_MATH)  # type: ignore[untyped-decorator]
    def kernel(x: np.ndarray, exact: np.ndarray, fast: np.ndarray) -> None:
        for i in range(x.shape[0]):
            exact[i], fast[i] = to_a_multiple_of_four(x[i]), left_alone(x[i])

    x = np.arange(16.0)
    exact, fast = np.empty_like(x), np.empty_like(x)
    kernel(x, exact, fast)
    np.testing.assert_array_equal(exact, 4 * np.round(x / 4))
    np.testing.assert_array_equal(fast, x, "no reordering: the caller's flags have done nothing")


def test_a_kernel_is_compiled_once_for_the_same_operands() -> None:
    kinds = [types.Array(types.float64, 1, "C")]
    first = compiler.compile_step(raising, kinds)
    assert compiler.compile_step(raising, kinds) is first
    assert compiler.compile_step(raising, [types.Array(types.float32, 1, "C")]) is not first


def added(x: float, y: float) -> float:
    return x + y


def test_settings_of_numba_have_entries_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for one setting does not replace what was compiled for another."""
    monkeypatch.setattr(compiler.kernel_cache, "cache_directory", lambda: tmp_path)
    hits = []
    for vectorize in (1, 0, 1, 0):
        monkeypatch.setattr(numba.config, "LOOP_VECTORIZE", vectorize)
        function = compiler.jit(added)
        assert function(1.0, 2.0) == 3
        hits.append(sum(function.stats.cache_hits.values()))
    assert hits == [0, 0, 1, 1]
    assert len(list(tmp_path.glob("added-*.kernel"))) == 2


@pytest.mark.slow
def test_models_that_come_and_go_leave_nothing() -> None:
    code = """
import gc, json, sys, numballama
def cycle():
    with numballama.compile(None, device="cpu") as model:
        model.generate("Once", max_tokens=2)
        model.logits([1, 2, 3])
def state():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4, sum(1 for _ in open("/proc/self/maps")), sum(1 for _ in __import__("os").scandir("/proc/self/fd"))
for _ in range(80):  # the allocator's heaps grow for some dozens
    cycle()
states = [state()]
for _ in range(3):
    for _ in range(int(sys.argv[1])):
        cycle()
    states.append(state())
print(json.dumps(states))
"""
    cycles = 100 if EVERYTHING else 40
    states = run_python(code, cycles, timeout=600)
    growth = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(states)]
    print(f"{cycles} cycles: KiB, mappings and files grow by {growth}")
    # what a model leaves behind shows each time; a heap that the allocator adds, once
    kib, mappings, files = (min(column) for column in zip(*growth, strict=True))
    assert kib < 8 * cycles and mappings < cycles // 10 and files == 0
