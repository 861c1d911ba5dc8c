"""`inspect`: its plan is the CPU's, though it knows the kernels by an outline only, and so needs no Numba."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from numballama.kernels_outline import OUTLINE

import numballama
from numballama import kernels_cpu, registry
from numballama.config import ModelConfig
from numballama.fusion import fuse
from numballama.graph import KVLayout, build
from numballama.plan import lower
from numballama.quantization.types import F32, WeightType
from tests.helpers.random_models import architectures


def entries(backend: str, home: str) -> dict[tuple[str, tuple[registry.Types, ...]], registry.Kernel]:
    found = [kernel for (_, own), kernels in registry._kernels.items() if own == backend for kernel in kernels]
    return {(kernel.op, kernel.types): kernel for kernel in found if kernel.function.__module__ == home}


@given(data=st.data())
def test_the_outline_is_that_of_the_kernels(data: st.DataObject) -> None:
    outlined, kernels = entries(OUTLINE, "numballama.kernels_outline"), entries("cpu", kernels_cpu.__name__)
    assert len(kernels) > 25 and outlined.keys() == kernels.keys()
    workers = data.draw(st.integers(1, 9))
    for key, kernel in kernels.items():
        outline = outlined[key]
        assert outline.name == kernel.name
        assert ("window" in outline.parameters) == ("window" in kernel.parameters)
        assert list(outline.scratch) == list(kernel.scratch)
        shape = st.tuples(*[st.integers(1, 99)] * 4)
        shapes = data.draw(st.tuples(*[shape] * len(kernel.types)))
        for name, of in kernel.scratch.items():
            assert outline.scratch[name](*shapes, workers=workers) == of(*shapes, workers=workers), (kernel.name, name)


@settings(max_examples=60)
@given(config=architectures(), data=st.data(), int8=st.booleans(), tokens=st.sampled_from([1, 7]))
def test_the_plan_is_the_same(config: ModelConfig, data: st.DataObject, int8: bool, tokens: int) -> None:
    kinds = [WeightType("int8", 2)] if int8 else [WeightType(name) for name in kernels_cpu.LINEAR if name != "int8"]
    types = {
        name: data.draw(st.sampled_from(kinds)) if len(shape) == 2 else F32
        for name, shape in config.weight_shapes().items()
    }
    graph = build(config, types, KVLayout.of(config, config.context), tokens, int8_activations=int8)
    outlined, plan = (lower(fuse(graph, backend), backend, 3) for backend in (OUTLINE, "cpu"))
    assert str(replace(outlined, backend="cpu")) == str(plan)
    assert outlined.placements == plan.placements


def test_a_report_needs_no_numba() -> None:
    code = "import sys, numballama as n; assert 'plan of llama' in str(n.inspect(None)); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert {"numballama.plan", "numpy"} <= set(done.stdout.split())
    assert not {"numba", "llvmlite", "numballama.kernels_cpu"} & set(done.stdout.split())


def test_its_plan_is_that_of_the_model() -> None:
    found = numballama.inspect(None)
    with numballama.compile(None, device="cpu", threads=1) as model:
        assert [step.kernel.name for step in found.plan.steps] == [step.kernel.name for step in model.plan.steps]
        assert found.plan.arena_bytes == found.memory["arena"] == model.plan.arena_bytes
