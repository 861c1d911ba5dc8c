"""Every kernel once, on small shapes, for NVIDIA's compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest tests/cuda/test_sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python -m pytest tests/cuda/test_sanitize.py
compute-sanitizer --tool synccheck --error-exitcode 1 python -m pytest tests/cuda/test_sanitize.py

memcheck calls it an error that the one block of a cluster sends to itself. So a weight has two slices here at least.
"""

# ruff: noqa: E402
from __future__ import annotations

import pytest

from tests.helpers.cuda_host import require_gpu

require_gpu()

pytestmark = pytest.mark.gpu

from collections.abc import Callable, Iterable, Iterator
from unittest import mock

from numballama.config import ModelConfig
from numballama.cuda.driver import Device
from numballama.cuda.kernels.params import WIDE_STEP_COLUMNS
from numballama.cuda.ops import skinny, wide
from numballama.memory import ceil_div
from numballama.session import Session
from tests.cuda import gemm_cases, rank_cases, skinny_cases, wgmma_cases
from tests.cuda.checks import SHARE, Bench, Pair, check_draws, check_rows, check_runs, check_whole_runs, run_checked
from tests.cuda.gpu import LOGITS, fill_cache
from tests.helpers.sampling import make_sampler


@pytest.fixture
def few_by_mma(exact_kernels: None) -> Iterator[None]:
    """Linear layers of up to 8 tokens by `gemv`, of more by mma.sync: rows of 64 elements have one slice for `wide`."""
    with mock.patch.object(wide, "MOST", 1):
        yield


@pytest.mark.usefixtures("few_by_mma")
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("fusions", [False, True])
def test_sanitize_models(kind: str, fusions: bool) -> None:
    config = ModelConfig(64, 96, 1, 4, 2, 77, 40, qkv_bias=not fusions, qk_norm=not fusions)
    pair = Pair(config, kind, "f32" if kind == "f32" else "f16", sequences=2)
    check_runs(pair, [5, 1, 8, 1], 8, fusions)
    # tensor cores take 16-bit activations; of those of bfloat16 eight bits count
    check_whole_runs(pair, [20, 1], 20, fusions, {"f32": SHARE, "bf16": 2**-6}.get(kind, 2**-8))
    pair.close()


@pytest.mark.usefixtures("few_by_mma")
def test_sanitize_other_shapes() -> None:
    """Odd sizes, heads of six numbers, int8 activations, a split context."""
    for config, kind, kv, int8 in (
        (ModelConfig(18, 7, 1, 3, 1, 11, 8, tied_embeddings=False), "f16", "bf16", False),
        (ModelConfig(64, 32, 1, 4, 4, 33, 8), "int8", "f32", True),
    ):
        pair = Pair(config, kind, kv, group=16, int8_activations=int8)
        check_runs(pair, [3, 1], 4, True)
        pair.close()
    pair = Pair(ModelConfig(32, 16, 1, 4, 2, 20, 600), "f32", "f16")
    program, reference = pair.programs(1)
    fill_cache(pair, program)
    run_checked(pair, program, reference, [1], 590, 0, False)
    pair.close()


@pytest.mark.usefixtures("few_by_mma")
def test_sanitize_sampling(bench: Bench) -> None:
    check_draws(bench, LOGITS, times=2, seed=1)
    check_draws(bench, LOGITS, times=1, seed=1, top_k=0, top_p=0.8)
    check_draws(bench, LOGITS, times=2, seed=1, repeat_penalty=1.3, top_k=0, top_p=1.0, min_p=0.1)
    check_rows(bench, 300, 2)
    pair = Pair(ModelConfig(16, 16, 1, 2, 1, 40, 12))
    (decode, _), (prompt, _) = pair.programs(1), pair.programs(2)
    for sampler in (make_sampler(40, seed=1), make_sampler(40, temperature=0)):
        session = Session(decode, prompt, 12, 40)
        token = session.prefill([1, 2], sampler)
        for _ in range(5):
            token = session.step(int(token or 0), sampler)
    pair.close()


TENSOR_CORES: dict[str, Callable[[], list[gemm_cases.Case]]] = {
    "mma.sync, many tokens": lambda: gemm_cases.cases(("f32", "bf16", "q4_0", "q5_k", "q6_k")),
    "mma.sync, few tokens": lambda: skinny_cases.cases(("f16", "int8", "q4_1", "q4_k")),
    "wgmma, few tokens": skinny_cases.small_wide_cases,
    "wgmma, many tokens": wgmma_cases.small_cases,
    "attention by wgmma": wgmma_cases.cases,
}
"""Kernels that models of this size do not launch, with the smallest cases of each."""


@pytest.mark.parametrize("kernels", TENSOR_CORES)
def test_sanitize_tensor_cores(kernels: str) -> None:
    device = Device()

    def machine_of(tokens: int) -> gemm_cases.Real:
        machine = gemm_cases.Real(device, tokens)
        return gemm_cases.without_wgmma(machine) if "mma.sync" in kernels else machine

    if "wgmma" in kernels and not machine_of(1).ctx.wgmma:
        pytest.skip("this GPU has no wgmma")
    most = (1, 1) if "many tokens" in kernels else (skinny.MOST, wide.MOST)
    with mock.patch.object(skinny, "MOST", most[0]), mock.patch.multiple(wide, MOST=most[1], divide=two_slices):
        assert not gemm_cases.check_all(machine_of, of_two_slices(TENSOR_CORES[kernels]()))


def of_two_slices(cases: Iterable[gemm_cases.Case]) -> list[gemm_cases.Case]:
    """Those whose rows are long enough for `two_slices`."""
    return [case for case in cases if not any(name in case[0] for name in SHORT_ROWS)]


SHORT_ROWS = "one slice", "kernels in turn", "sums rounded"


def two_slices(tiles: int, columns: int, n_sms: int) -> wide.Division:
    """K in two halves."""
    steps = ceil_div(columns, WIDE_STEP_COLUMNS)
    assert steps > 1, "memcheck calls a cluster of one block wrong"
    return wide.Division(ceil_div(steps, 2), 2)


def test_sanitize_ranks() -> None:
    """Two ranks on one GPU, whose kernels must run at the same time."""
    with mock.patch.object(wide, "divide", two_slices):
        assert not gemm_cases.check_all(rank_cases.ranks_maker(()), of_two_slices(rank_cases.cases(2)))
