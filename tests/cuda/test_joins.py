"""Which steps of a program on sm_90 are joined: attention and SwiGLU write 16 bits where the next step only rounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cuda_host import missing_packages

if reason := missing_packages():
    pytest.skip(reason, allow_module_level=True)

ROOT = Path(__file__).parents[2]
ATTENTION, O_LINEAR, DOWN = 3, 4, 6
"""Steps of the first layer."""


@pytest.fixture(scope="module")
def steps() -> dict[str, list[list[str]]]:
    """Case → the kernels of each step, with the type of what they write to `out`."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.cuda.joined_steps"], capture_output=True, text=True, timeout=300, check=False,
        cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: dict[str, list[list[str]]] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize(
    ("case", "kind", "linear"),
    [("f16", "f16", "wide_64"), ("bf16", "bf16", "wide_64"), ("f16, prompt", "f16", "wgmma_128 f32")],
)  # fmt: skip
def test_attention_writes_what_the_linear_step_reads(
    steps: dict[str, list[list[str]]], case: str, kind: str, linear: str
) -> None:
    assert all(kernel.endswith(f" {kind}") for kernel in steps[case][ATTENTION]), steps[case]
    name, *out = linear.split()
    assert steps[case][O_LINEAR] == [" ".join([f"{name}_kernel", *out])], "no kernel rounds"


@pytest.mark.parametrize("case", ["f16, cache bf16", "f16, prompt, heads of 128", "f16, read twice"])
def test_attention_writes_float32(steps: dict[str, list[list[str]]], case: str) -> None:
    """A bfloat16 may not fit float16, large heads are slower so, and another step may read the results."""
    assert all(kernel.endswith(" f32") for kernel in steps[case][ATTENTION]), steps[case]
    assert len(steps[case][O_LINEAR]) == 2, "one kernel rounds"


def test_swiglu_is_rounded_by_itself_in_bfloat16_only(steps: dict[str, list[list[str]]]) -> None:
    assert steps["bf16"][DOWN] == ["wide_64_kernel"]
    assert steps["f16"][DOWN] == ["wide_round_kernel", "wide_64_kernel"]


def test_another_layer_is_joined_where_one_is_read_twice(steps: dict[str, list[list[str]]]) -> None:
    attention = [step for step in steps["f16, read twice"] if any("attention" in kernel for kernel in step)]
    assert [step[0].split()[-1] for step in attention] == ["f32", "f16"]
