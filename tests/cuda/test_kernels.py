"""Single operators, and some that a fusion joins, on a GPU against the NumPy reference: random shapes and types.

Kernels for more tokens than `gemm.FEW` have tests of their own in test_tensor_cores.py, and run in test_models.py.
"""

# ruff: noqa: E402
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers.cuda_host import require_gpu

require_gpu()

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_kernels")]

from numballama.cuda import backend as cuda
from numballama.cuda.ops import gemm
from numballama.ir import Graph, Value
from numballama.reference import ReferenceBackend
from tests.cuda.checks import Bench, bounds_of, check_argmax, check_quantize, poison
from tests.helpers.bounds import check_step
from tests.kernels.cases import CASES, Case


def projections(case: Case, x: Value, heights: tuple[int, int] | None = None) -> list[Value]:
    """Queries, keys and values as models have them: rows in pairs, as many keys as values, weights of one type."""
    q_rows, kv_rows = heights or (2 * case.draw(st.integers(1, 70)), 2 * case.draw(st.integers(1, 70)))
    return [
        case.graph.add("linear", x, case.weight(f"w{name}", rows, x.shape[1], kind=case.type), out=f"{name}_out")
        for name, rows in zip("qkv", (q_rows, kv_rows, kv_rows), strict=True)
    ]


def qkv(case: Case, normed: bool) -> Graph:
    x = case.x("x", case.rows, case.columns())
    return case.done(*[value.name for value in projections(case, case.norm(x) if normed else x)])


def norm_qkv_rope(case: Case) -> Graph:
    case.heads()
    if case.cache_type == "q8_0":  # RoPE and writes are a step of their own
        case.cache_type = "f16"
    width = case.kv_heads * case.head_dim
    x, angles = case.x("x", case.rows, case.columns()), case.angles()
    q, k, v = projections(case, case.norm(x), (width * case.shared, width))
    q, k = case.rope(q, angles), case.rope(k, angles)
    k_cache = case.write(k, "k_cache")
    case.write(v, "v_cache")
    case.graph.add("attention_scores", q, k_cache, *case.where, out="scores", window=0)
    return case.done("scores")


CPU_ONLY = ("quantize_q8_0", "quantize_q8_1", "quantize_q8_k")
CASES_HERE = {
    name: case for name, case in CASES.items() if not name.endswith("_blocks_int8") and name not in CPU_ONLY
} | {
    "qkv": (lambda case: qkv(case, False), ("qkv",)),
    "norm_qkv": (lambda case: qkv(case, True), ("qkv", "norm")),
    "norm_qkv_rope": (norm_qkv_rope, ("qkv", "rope_kv", "norm", "qkv_rope")),
}
"""The CPU's cases, but for int8 activations beside blocks, and those whose kernels want what every model has."""


@pytest.mark.parametrize("name", CASES_HERE)
@given(data=st.data())
@settings(max_examples=20)
def test_kernel_agrees_with_reference(name: str, data: st.DataObject) -> None:
    """Random shapes and types of one operator, or of some that a pass joins."""
    build, passes = CASES_HERE[name]
    case = Case(data.draw)
    graph = build(case)
    assume(getattr(case, "page", 1) & (getattr(case, "page", 1) - 1) == 0)  # kernels shift and mask
    assume(max(value.shape[0] for value in graph.values.values() if value.kind == "input") <= gemm.FEW)
    backend = cuda.CudaBackend(case.weights)
    try:
        program = backend.program(graph, passes)
        if name == "norm_qkv_rope":
            assert [step.op.kind for step in program.plan.steps] == [name, "attention_scores"]
        poison(program)
        for state, array in case.states.items():
            program.write(state, array)
        for operand, array in case.arrays.items():
            program.inputs[operand].view(np.uint8)[...] = 0xFF  # what lies after the run's tokens is nobody's
            program.inputs[operand][: case.tokens] = array[: case.tokens]
        program.run_inputs.send(case.tokens, case.tokens)
        reference = ReferenceBackend(case.weights)
        with bounds_of(reference):
            for step in range(len(program.plan.steps)):
                check_step(
                    program, step, case.tokens, reference,
                    lambda step=step: program.run(case.tokens, step, step + 1, rows=case.tokens),
                )  # fmt: skip
    finally:
        backend.close()


def test_argmax_of_special_rows(bench: Bench) -> None:
    x = np.random.default_rng(0).standard_normal((5, 40000)).astype(np.float32)
    x[0, [300, 39999, 20]] = 9
    x[1, 39999], x[1, 3] = np.nan, np.inf
    x[2] = -np.inf
    x[3, ::2] = x[3].max()
    check_argmax(bench, x)
    for columns in (1, 2, 255, 256, 257, 32000):
        check_argmax(bench, x[:1, :columns].copy())


@given(st.integers(1, 300), st.sampled_from([1, 3, 32, 64]), st.integers(0, 99))
@settings(max_examples=20)
def test_quantize_of_special_groups(bench: Bench, columns: int, group: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, columns)).astype(np.float32) * np.float32(10.0) ** rng.integers(-40, 30, (3, columns))
    chosen = rng.random(x.shape) < 0.02
    x[chosen] = rng.choice(np.array([np.nan, np.inf, -np.inf, 0], np.float32), chosen.sum())
    check_quantize(bench, x.astype(np.float32), group)
