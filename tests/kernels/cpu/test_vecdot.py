"""Weights of GGUF's blocks on the CPU, of every bit pattern, and whole models: against the dequantised elements."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numballama
from numballama.checkpoint import Weight
from numballama.config import ModelConfig
from numballama.cpu.vecdot import RECORD_TYPES
from numballama.errors import Error
from numballama.export import WRITERS
from numballama.ir import Graph
from numballama.kernel_cache import cache_directory
from numballama.quantization.convert import convert, dequantize
from numballama.quantization.types import BLOCKS, F16, FALLBACK_TYPE, LINEAR_TYPES, Q4_0, Q8_0, TYPE_TRAITS, WeightType
from numballama.reference import ReferenceBackend
from tests.helpers.bounds import check_step, compiled, cpu_backend, run_workers
from tests.helpers.gguf_files import random_blocks
from tests.helpers.random_models import random_checkpoint

NATIVE = sorted(RECORD_TYPES)
halves = st.floats(width=16, allow_nan=False, allow_infinity=False)
"""Factors of blocks: negative, subnormal, zero too."""


def test_the_layouts_are_the_formats() -> None:
    sizes = {name: (TYPE_TRAITS[name].block_size, TYPE_TRAITS[name].record.itemsize) for name in RECORD_TYPES}
    assert sizes == {name: BLOCKS[name] for name in NATIVE}
    assert RECORD_TYPES.keys() == BLOCKS.keys() - FALLBACK_TYPE.keys()
    assert set(LINEAR_TYPES) >= RECORD_TYPES.keys() and {target.name for target in FALLBACK_TYPE.values()} <= set(
        LINEAR_TYPES
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
@settings(max_examples=40)
@given(
    rows=st.integers(1, 13),
    count=st.integers(1, 9),
    tokens=st.integers(1, 9),
    odd=st.booleans(),
    extreme=halves,
    seed=st.integers(0, 2**32 - 1),
)
def test_products_with_rows_of_blocks(
    name: str, rows: int, count: int, tokens: int, odd: bool, extreme: float, seed: int
) -> None:
    """Up to three tokens go row by row (`row_dot`), more through decoded tiles (`dequantize_rows`)."""
    rng = np.random.default_rng(seed)
    weight = random_blocks(name, rows, count, rng, extreme, odd)
    graph = Graph("case")
    x = graph.input("x", (tokens, weight.shape[1]), "f32")
    graph.outputs = [graph.add("linear", x, graph.weight("w", weight.shape, name), out="y").name]
    program = compiled(cpu_backend({"w": weight}, workers=2), graph)
    program.inputs["x"][:] = rng.standard_normal(x.shape, np.float32)
    check_step(program, 0, tokens, ReferenceBackend({"w": weight}), lambda: run_workers(program, tokens, 0, (1, 0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
@settings(max_examples=20)
@given(data=st.data(), rows=st.integers(1, 9), count=st.integers(1, 9), extreme=halves, seed=st.integers(0, 2**32 - 1))
def test_embeddings_are_the_dequantised_rows_exactly(
    name: str, data: st.DataObject, rows: int, count: int, extreme: float, seed: int
) -> None:
    weight = random_blocks(name, rows, count, np.random.default_rng(seed), extreme, odd=True)
    graph = Graph("case")
    ids = graph.input("ids", (3,), "i32")
    graph.outputs = [graph.add("embedding", ids, graph.weight("w", weight.shape, name), out="x").name]
    program = compiled(cpu_backend({"w": weight}), graph)
    program.inputs["ids"][:] = data.draw(st.lists(st.integers(0, rows - 1), min_size=3, max_size=3))
    program.run(3)
    wanted = dequantize(weight)[program.inputs["ids"]]
    np.testing.assert_array_equal(program.value("x").view(np.uint32), wanted.view(np.uint32))


MIXTURES = {
    "Q4_K_M": {"default": "q4_k", "wv": "q6_k", "w2": "q6_k", "output": "q6_k"},
    "Q4_0": {"default": "q4_0", "w2": "q4_1", "tok_embeddings": "q6_k"},
    "all": {"wq": "q4_0", "wk": "q4_1", "wv": "q8_0", "w1": "q4_k", "w3": "q6_k", "wo": "f32", "default": "f16"},
    "Q5_K_M": {"default": "q5_k", "wv": "q6_k", "w2": "q6_k", "output": "q6_k"},
    "converted": {
        "wq": "q5_0",
        "wk": "q5_1",
        "wv": "q2_k",
        "w1": "q3_k",
        "w3": "iq4_xs",
        "wo": "iq4_nl",
        "default": "q5_0",
    },
}
"""What a model's tensors are: files mix types between layers' parts, and within q/k/v and gate/up."""


def mixed_weights(config: ModelConfig, types: dict[str, str]) -> dict[str, Weight]:
    weights, rng = dict(random_checkpoint(config).weights), np.random.default_rng(5)
    for name, weight in weights.items():
        if len(weight.shape) == 2:
            kind = types.get(name.rpartition(".")[2], types["default"])
            if kind in BLOCKS:
                weights[name] = random_blocks(kind, weight.shape[0], weight.shape[1] // BLOCKS[kind][0], rng)
            elif kind == "f16":
                weights[name] = convert(weight, F16)
    return weights


def logits_agree(path: Path, ids: list[int]) -> None:
    wanted = numballama.compile(path, device="reference").logits(ids)
    with numballama.compile(path, threads=1) as model:
        got = model.logits(ids)
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
        with model.exclusive() as session:
            for step, token in enumerate(ids[:4]):  # the kernels of one token
                session.step(token) if step else session.prefill([token])
                np.testing.assert_allclose(session.logits, wanted[step], atol=1e-4 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("mixture", MIXTURES)
def test_models_of_mixed_types_agree_with_the_reference(tmp_path: Path, mixture: str) -> None:
    config = ModelConfig(256, 256, 2, 4, 2, 50, 24, tied_embeddings=mixture == "Q4_0")
    path, types = tmp_path / "model.gguf", MIXTURES[mixture]
    weights = mixed_weights(config, types)
    WRITERS["gguf"](path, config, weights)
    logits_agree(path, np.random.default_rng(1).integers(0, 50, 20).tolist())
    with numballama.compile(path, threads=1) as model:
        for name, weight in weights.items():
            assert model.weights[name].type == FALLBACK_TYPE.get(weight.type.name, weight.type)
            if weight.type.name not in FALLBACK_TYPE:
                assert not model.weights[name].data.flags.owndata  # as it lies in the file


GENERIC = """
import sys
import numba, numpy as np
from tests.helpers.gguf_files import random_blocks
from numballama.cpu.vecdot import RECORD_TYPES, dequantize_blocks, dot_blocks
from numballama.quantization.convert import convert, dequantize
from numballama.quantization.types import TYPE_TRAITS

@numba.njit
def decode(weight, out):
    dequantize_blocks(weight, 0, out, 0, weight.size)

@numba.njit
def dot(weight, x):
    return dot_blocks(weight, 0, x, 0, weight.size)

rng = np.random.default_rng(0)
for name in RECORD_TYPES:
    for count in (1, 4, 7):
        weight = random_blocks(name, 1, count, rng, odd=True)
        wanted, out = dequantize(weight)[0], np.empty(weight.shape[1], np.float32)
        blocks, x = weight.data.view(TYPE_TRAITS[name].record).reshape(-1), rng.standard_normal(out.size, np.float32)
        decode(blocks, out)
        assert (out.view(np.uint32) == wanted.view(np.uint32)).all(), name
        error = abs(dot(blocks, x) - wanted.astype(float) @ x)
        assert error <= 2.0**-24 * out.size * (abs(wanted) @ abs(x)), (name, error)
print("permvar" in next(iter(decode.inspect_llvm().values())))
"""


@pytest.mark.slow
@pytest.mark.parametrize("generic", [False, True])
def test_any_cpu_decodes_blocks(generic: bool) -> None:
    """With AVX-512 some types are looked up in registers, elsewhere computed: the same values, to the bit."""
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""} if generic else {}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | plain
    command = [sys.executable, "-c", GENERIC]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr[-3000:]
    assert not generic or found.stdout.split() == ["False"]


COUNT_MISSES = """
import sys, numballama, numballama.cpu.backend as cpu
misses, real = [], cpu.compile_step
def counting(function, operands):
    found = real(function, operands)
    misses.append(found.cache_hits == 0)
    return found
cpu.compile_step = counting
numballama.compile(sys.argv[1], device="cpu", threads=1)
print(len(misses), sum(misses))
"""


@pytest.mark.slow
def test_a_second_process_finds_the_kernels_of_block_types(tmp_path: Path) -> None:
    """Record types are part of the cache's keys: they must come out equal in every process."""
    path = tmp_path / "model.gguf"
    config = ModelConfig(256, 256, 1, 4, 2, 50, 24, tied_embeddings=False)
    WRITERS["gguf"](path, config, mixed_weights(config, MIXTURES["Q4_K_M"]))
    own, shared = tmp_path / "cache", cache_directory()
    if shared is not None and shared.exists():  # a start with these kernels, but for those of linear layers
        shutil.copytree(shared, own / shared.name, ignore=shutil.ignore_patterns("linear*", "*.tmp"))
    environment = os.environ | {"NUMBALLAMA_CACHE": str(own), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COUNT_MISSES, str(path)]
    counts = []
    for _ in range(2):
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        counts.append(tuple(map(int, found.stdout.split())))
    (kernels, first), (again, second) = counts
    assert kernels == again > 10
    assert first > 0 and second == 0


def test_what_runs_as_another_type_is_noted(tmp_path: Path) -> None:
    config = ModelConfig(256, 256, 2, 4, 2, 50, 24, tied_embeddings=False)
    path = tmp_path / "model.gguf"
    WRITERS["gguf"](path, config, mixed_weights(config, MIXTURES["converted"]))
    inspected = numballama.inspect(path)
    assert inspected.notes == [
        "Q5_0 (tok_embeddings and 5 more) runs as q8_0, with the same values: a copy of 298.6 KiB",
        "Q5_1 (layers.0.wk and 1 more) runs as f16, rounded: a copy of 128.0 KiB",
        "Q2_K (layers.0.wv and 1 more) runs as f16, rounded: a copy of 128.0 KiB",
        "Q3_K (layers.0.w1 and 1 more) runs as q6_k, with the same values: a copy of 105.0 KiB",
        "IQ4_NL (layers.0.wo and 1 more) runs as q8_0, with the same values: a copy of 136.0 KiB",
        "IQ4_XS (layers.0.w3 and 1 more) runs as q8_0, rounded: a copy of 136.0 KiB",
    ]
    assert inspected.tensors["layers.0.w3"] == ("iq4_xs", (256, 256))
    assert inspected.tensors["layers.0.wv"] == ("q2_k", (128, 256))
    assert "linear" in str(inspected.plan)
    with numballama.compile(path, threads=1, dtype="q4_0") as model:  # asked for: instead of what it would run as
        assert {w.type.name for n, w in model.weights.items() if n.startswith("layers.0.w")} == {"q4_0"}
        assert model.weights["tok_embeddings"].type.name == "q8_0"


CONFIG = ModelConfig(64, 96, 2, 4, 2, 50, 24, tied_embeddings=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Q8_0, Q4_0], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_agrees_with_the_reference(tmp_path: Path, tied: bool, kind: WeightType) -> None:
    config = ModelConfig(64, 96, 2, 4, 2, 50, 24, tied_embeddings=tied, qkv_bias=not tied)
    source, path = random_checkpoint(config), tmp_path / "model.gguf"
    weights = {name: convert(w, kind) if len(w.shape) == 2 else w for name, w in source.weights.items()}
    WRITERS["gguf"](path, config, weights)
    logits_agree(path, np.random.default_rng(1).integers(0, 50, 20).tolist())
    with numballama.compile(path, threads=1) as model:
        assert {w.type for w in model.weights.values() if len(w.shape) == 2} == {kind}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "near"), [(Q8_0, 0.05), (Q4_0, 0.5)], ids=str)
def test_compile_converts_linear_weights(tmp_path: Path, kind: WeightType, near: float) -> None:
    source, path = random_checkpoint(CONFIG), tmp_path / "model.bin"
    WRITERS["llama2c-v1"](path, CONFIG, source.weights)
    with numballama.compile(path, dtype=kind.name, threads=1) as model:
        for name, weight in model.weights.items():
            plain = len(weight.shape) == 1 or name == "tok_embeddings"
            assert weight.type.name == ("f32" if plain else kind.name)
            if not plain:
                np.testing.assert_array_equal(weight.data, convert(source.weights[name], kind).data)
                assert weight.nbytes == math.prod(weight.shape) // 32 * {Q8_0: 34, Q4_0: 18}[kind]
        exact = numballama.compile(path, device="reference").logits([1, 2, 3])
        assert np.abs(model.logits([1, 2, 3]) - exact).max() < near * np.abs(exact).max()


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_rows_that_blocks_do_not_fill_are_named(tmp_path: Path, dtype: str) -> None:
    config = ModelConfig(64, 100, 1, 4, 4, 50, 24)
    path = tmp_path / "model.bin"
    WRITERS["llama2c-v1"](path, config, random_checkpoint(config).weights)
    with pytest.raises(Error, match=rf"layers\.0\.w2 cannot become {dtype}: its rows of 100 elements"):
        numballama.compile(path, dtype=dtype, threads=1)
