"""docs/tour.md: its anchors have the right lines, and its list of files is the path of a token."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
from numba import types

import numballama
from numballama.cpu import backend as cpu_backend
from numballama.cpu import matmul

ROOT = Path(__file__).parents[2]
PACKAGE = Path(numballama.__file__).parent


def tour() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tour", ROOT / "docs" / "tour.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_anchors_are_where_the_tour_says() -> None:
    """After an edit: python docs/tour.py"""
    page, anchors = (
        tour().PAGE.read_text(encoding="utf-8"),
        list(tour().ANCHOR.finditer(tour().PAGE.read_text("utf-8"))),
    )
    assert page.count("](../numballama/") == len(anchors) >= 12
    for match in anchors:
        file, line, text, linked, linked_line = match.groups()
        assert (file, line) == (linked, linked_line)
        assert int(line) == tour().line_of(file, text), f"{file}:{line} is not where `{text}` stands"


def test_a_text_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"0 lines of numballama/ir.py begin with 'def nowhere'"):
        tour().line_of("numballama/ir.py", "def nowhere")


def codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def compiled_files(function: Any, chosen: dict[Any, Any], seen: set[Any]) -> set[Path]:
    """Files of this package with a function that `function` calls, directly or not, once it is compiled.

    `chosen` says which function Numba puts in the place of one that is overloaded.
    """
    function = getattr(chosen.get(function, function), "py_func", chosen.get(function, function))
    if function in seen or not hasattr(function, "__code__"):
        return set()
    seen.add(function)
    found = {Path(function.__code__.co_filename)}
    for name in {name for code in codes(function.__code__) for name in code.co_names}:
        called = function.__globals__.get(name)
        if callable(called) and getattr(called, "__module__", "").startswith("numballama"):
            found |= compiled_files(called, chosen, seen)
            definition = getattr(called, "_defn", None)  # an intrinsic: its file is where it is written
            found |= {Path(definition.__code__.co_filename)} if definition is not None else set()
    return found


def files_of_a_token(model: numballama.Model) -> tuple[list[str], list[str]]:
    """Files on the way of a token: Python's, in the order of calls, then those of the compiled code that it enters."""
    stacks: list[list[str]] = []
    enter = cpu_backend.run_steps

    def recording(*arguments: Any) -> Any:
        frame, stack = sys._getframe(1), []
        while frame is not None and frame.f_code is not files_of_a_token.__code__:
            stack.insert(0, frame.f_code.co_filename)
            frame = frame.f_back  # type: ignore[assignment]
        stacks.append(stack)
        return enter(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_backend, "run_steps", recording)
        model.generate("Once upon a time", max_tokens=3, temperature=0)
    python = [Path(name) for name in dict.fromkeys(stacks[-1]) if Path(name).is_relative_to(PACKAGE)]
    array = types.Array(types.float32, 2, "C")
    chosen = {matmul.row_dot: matmul._row_dot(array, 0, array, 0)}
    compiled = compiled_files(enter, chosen, set())
    for step in model.plan.steps:
        if step.kernel.op in ("norm_qkv", "norm_gate_up", "linear_add"):
            compiled |= compiled_files(step.kernel.function, chosen, set())
    names = [str(path.relative_to(PACKAGE)) for path in python]
    return names, sorted(
        {str(path.relative_to(PACKAGE)) for path in compiled if path.is_relative_to(PACKAGE)} - {*names}
    )


def test_a_token_passes_through_few_files() -> None:
    with numballama.compile(None, device="cpu", dtype="f32", context=64) as model:
        python, compiled = files_of_a_token(model)
    print("python:", *python, "compiled:", *compiled)
    assert python[0] == "model.py" and "kernels_cpu.py" in compiled and "cpu/matmul.py" in compiled
    assert len(python) + len(compiled) <= 12, (python, compiled)
    (chain,) = re.findall(r"^model\.py → .*$", tour().PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert chain.split(" → ")[: len(python)] == python and set(chain.split(" → ")) == {*python, *compiled}
