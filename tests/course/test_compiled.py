"""The CUDA kernels of the course compile to machine code for an H200, and spill nothing."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from tests.helpers.cuda_host import missing_packages

if reason := missing_packages():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.slow
CAPABILITY = (9, 0)


def names() -> list[str]:
    """Those with shared memory, shuffles, vector loads and asynchronous copies."""
    gemv, attention = ("block_per_row", "two_rows", "ring"), ("warp_per_key", "online", "split", "combine")
    return [*(f"gemv.{name}" for name in gemv), *(f"attention.{name}" for name in attention)]


def machine_code(kernel: Any, types: tuple[Any, ...]) -> str:
    """PTX of a kernel, which is assembled too: nothing may spill, and nothing may be float64."""
    from numba import cuda

    from numballama.cuda import compiler

    with compiler._compiling_for(CAPABILITY):
        ptx, _ = cuda.compile_ptx(kernel.py_func, types, cc=CAPABILITY)
    code = compiler.assemble(str(ptx), CAPABILITY)
    assert code.local_bytes == 0, f"{code.registers} registers"
    assert ".f64" not in ptx, "float64 would be slow"
    return str(ptx)


@pytest.mark.parametrize("name", names())
def test_gemv_and_attention(name: str) -> None:
    from course.attention import kernels as attention
    from course.gemv import kernels as gemv
    from numba.cuda import types

    folder, function = name.split(".")
    kernel: Any = getattr({"gemv": gemv, "attention": attention}[folder], function)
    count = kernel.py_func.__code__.co_argcount
    arrays = {"gemv": 3, "attention": 5}[folder] if function != "combine" else 2
    ptx = machine_code(kernel, (*[types.float32[::1]] * arrays, *[types.int64] * (count - arrays)))
    if function in ("two_rows", "split"):
        assert "v4" in ptx, "loads of 16 bytes"


PAGE_KERNELS = {
    "scale_rows": "212", "sum_rows_by_warps": "21", "rmsnorm_kernel": "212f", "softmax_kernel": "22",
}  # fmt: skip
"""Kernel of pages 13 and 14 → dimensions of its arrays, f for a float32."""


@pytest.mark.parametrize("number", ["13", "14"])
def test_pages(number: str) -> None:
    """Kernels, constants and imports of a page, without the code that launches them."""
    from course import pages
    from numba.cuda import types

    (page,) = (page for page in pages.english() if page.name.startswith(number))
    kept = [
        node
        for node in ast.parse(pages.code(page)).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        or (isinstance(node, ast.FunctionDef) and "cuda.jit" in map(ast.unparse, node.decorator_list))
        or (isinstance(node, ast.FunctionDef) and "cuda.jit(device=True)" in map(ast.unparse, node.decorator_list))
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("THREADS", "FULL", "WARPS"))
    ]
    namespace: dict[str, Any] = {}
    exec(compile(ast.Module(kept, []), page.name, "exec"), namespace)
    kinds = {"1": types.float32[::1], "2": types.float32[:, ::1], "f": types.float32}
    found = [name for name in PAGE_KERNELS if name in namespace]
    assert len(found) == 2
    for name in found:
        machine_code(namespace[name], tuple(kinds[letter] for letter in PAGE_KERNELS[name]))
