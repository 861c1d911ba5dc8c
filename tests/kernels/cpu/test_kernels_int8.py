"""Activations rounded to int8 for weights of blocks: beside ggml's own functions, and in whole models.

What each kernel computes is compared with the reference in `test_kernels_cpu`; here the reference itself with numbers
that llama.cpp's library made (`golden/make_ggml_int8.py`), and models of all types step by step.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numballama
from numballama import graph, model
from numballama.checkpoint import Weight
from numballama.cli import main as cli
from numballama.config import ModelConfig
from numballama.cpu.intrinsics import cpu_features
from numballama.cpu.products_int8 import least_tokens
from numballama.cpu.tiling import BYTES_COLUMNS, PANEL_ROWS, PANEL_TOKENS
from numballama.errors import Error, UnsupportedError
from numballama.export import WRITERS
from numballama.fusion import FUSIONS, fuse
from numballama.graph import KVLayout
from numballama.ir import Graph, verify
from numballama.quantization.activations import quantize_activations
from numballama.quantization.convert import convert, dequantize
from numballama.quantization.types import ACTIVATION_QUANT, BLOCKS, VEC_DOT_TYPE, WeightType
from numballama.reference import ReferenceBackend
from tests.helpers.bounds import check_step, compiled, cpu_backend, poison, run_workers
from tests.helpers.gguf_files import random_blocks
from tests.helpers.random_models import random_checkpoint
from tests.models.test_model_values import run_checked

GOLDEN = Path(__file__).parents[2] / "golden" / "ggml_int8.npz"


@pytest.fixture(scope="module")
def ggml() -> Mapping[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def halves(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[..., at : at + 2].copy().view(np.float16).astype(np.float32)[..., 0]


def as_ggml_rounded(ggml: Mapping[str, np.ndarray], kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quants, scales and sums from ggml's blocks."""
    x, stored = ggml["x"], ggml[f"x_{kind}"]
    blocks = stored.reshape(len(x), x.shape[1] // ACTIVATION_QUANT[kind][0], -1)
    if kind == "q8_k":
        numbers, scales = blocks[..., 4:260], blocks[..., :4].copy().view(np.float32)[..., 0]
        sums = blocks[..., 260:].copy().view(np.int16).reshape(len(x), -1)
    else:
        numbers, scales = blocks[..., 4 if kind == "q8_1" else 2 :], halves(blocks, 0)
        sums = halves(blocks, 2) if kind == "q8_1" else numbers.view(np.int8).sum(axis=2, dtype=np.int32)
    return numbers.reshape(x.shape).view(np.int8), scales, sums


@pytest.mark.parametrize("kind", ACTIVATION_QUANT)
def test_rounding_is_ggmls_to_the_bit(ggml: Mapping[str, np.ndarray], kind: str) -> None:
    for ours, theirs in zip(quantize_activations(kind, ggml["x"]), as_ggml_rounded(ggml, kind), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    numbers, scales, _ = quantize_activations(kind, ggml["x"])
    assert (scales[6] == 0).any() and (np.abs(numbers[5]).max() == 127) and scales.dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", VEC_DOT_TYPE)
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_products_are_ggmls(ggml: Mapping[str, np.ndarray], name: str, device: str) -> None:
    """Up to the order of sums in float32: much nearer than to the product with the numbers before they were rounded."""
    x, stored, wanted = ggml["x"], ggml[f"w_{name}"], ggml[f"dot_{name}"]
    weights = {"w": Weight((len(stored), x.shape[1]), WeightType(name), stored)}
    net = Graph("case")
    rounded = net.add(f"quantize_{VEC_DOT_TYPE[name]}", net.input("x", x.shape, "f32"), out=("q", "s", "sums"))
    net.add("linear", *rounded, net.weight("w", weights["w"].shape, name), out="y")
    net.outputs = ["y"]
    numbers = dequantize(weights["w"]).astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(numbers).T
    for tokens in (1, 2, 3, 4, 8):  # row by row, and by panels
        program: Any = (
            compiled(cpu_backend(weights), net) if device == "cpu" else ReferenceBackend(weights).program(net)
        )
        program.inputs["x"][:] = x
        program.run(tokens)
        got, size_of, want = program.value("y")[:tokens], size[:tokens], wanted[:tokens]
        assert (np.abs(got - want) <= 1e-6 * size_of).all(), np.abs(got - want).max() / size_of.max()
        assert (np.abs(x[:tokens] @ numbers.T - want) > 1e-5 * size_of).any(), "rounding would not have been noticed"


@pytest.mark.slow
@pytest.mark.parametrize("name", VEC_DOT_TYPE)
def test_rows_longer_than_a_panel(name: str) -> None:
    """Sums go on from one panel of columns to the next, also where a panel has fewer rows, whatever the tokens."""
    rows, columns, most = 2 * PANEL_ROWS + 3, 2 * BYTES_COLUMNS + 256, 9
    rng = np.random.default_rng(0)
    weights = {"w": random_blocks(name, rows, columns // BLOCKS[name][0], rng)}
    net = Graph("case")
    rounded = net.add(f"quantize_{VEC_DOT_TYPE[name]}", net.input("x", (most, columns), "f32"), out=("q", "s", "sums"))
    net.add("linear", *rounded, net.weight("w", (rows, columns), name), out="y")
    net.outputs = ["y"]
    program, reference = compiled(cpu_backend(weights, workers=2), net), ReferenceBackend(weights)
    for tokens in (2, 3, 4, most):
        poison(program)
        program.inputs["x"][:] = rng.standard_normal((most, columns), np.float32)
        run_workers(program, tokens, 0, (0, 1))
        check_step(program, 1, tokens, reference, lambda tokens=tokens: run_workers(program, tokens, 1, (1, 0)))


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_a_token_has_the_same_bits_in_each_pass(name: str) -> None:
    """Whether it is the first of a pass or the last, of a short pass or a whole one: tokens are computed alike."""
    most = 2 * PANEL_TOKENS + 1
    rng = np.random.default_rng(0)
    weights = {"w": random_blocks(name, PANEL_ROWS + 3, 256 // BLOCKS[name][0], rng)}
    net = Graph("case")
    rounded = net.add(f"quantize_{VEC_DOT_TYPE[name]}", net.input("x", (most, 256), "f32"), out=("q", "s", "sums"))
    net.add("linear", *rounded, net.weight("w", (PANEL_ROWS + 3, 256), name), out="y")
    net.outputs = ["y"]
    program, x = compiled(cpu_backend(weights), net), rng.standard_normal((most, 256), np.float32)

    def results(first: int, tokens: int) -> np.ndarray:
        program.inputs["x"][:tokens] = x[first : first + tokens]
        program.run(tokens)
        return np.array(program.value("y")[:tokens])

    wanted, least = results(0, most), least_tokens(name)
    for tokens in range(least, most):
        np.testing.assert_array_equal(results(0, tokens), wanted[:tokens])
        np.testing.assert_array_equal(results(most - tokens, tokens), wanted[most - tokens :])
    assert (wanted != 0).all()


def test_groups_with_no_answer() -> None:
    """NaN and infinity are carried by the scale; zeros and what is too small are zeros; what float16 lacks stays."""
    x = np.ones((6, 256), np.float32)
    x[0, 3], x[1, 40], x[2], x[3], x[4] = np.nan, -np.inf, 0, 1e-38, 3e36
    x[5, :] = 60000
    net = Graph("case")
    value = net.input("x", x.shape, "f32")
    for kind in ACTIVATION_QUANT:
        net.add(f"quantize_{kind}", value, out=[f"{kind}_{part}" for part in ("q", "s", "sums")])
        net.outputs += [f"{kind}_{part}" for part in ("q", "s", "sums")]
    program = compiled(cpu_backend(), net)
    program.inputs["x"][:] = x
    program.run(6)
    for kind in ACTIVATION_QUANT:
        numbers, scales, sums = quantize_activations(kind, x)
        for part, array in zip(("q", "s", "sums"), (numbers, scales, sums), strict=True):
            np.testing.assert_array_equal(program.value(f"{kind}_{part}"), array, err_msg=f"{kind} {part}")
        assert np.isnan(scales[0, 0]) and np.isnan(scales[1]).any() and not np.isnan(scales[2:]).any()
        assert not numbers[2:4].any() and not sums[2:4].any() and np.isfinite(scales[2:]).all()
        assert np.abs(numbers[4:]).min() == 127 and np.isfinite(sums[2:].astype(np.float64)).all()


# Whole models

CONFIG = ModelConfig(256, 512, 2, 4, 2, 50, 24, tied_embeddings=False)
NARROW = ModelConfig(96, 160, 2, 4, 2, 50, 24, tied_embeddings=True)
"""Rows that are shorter than a panel, and no multiples of the largest blocks."""


def blocks_model(config: ModelConfig, kinds: list[str], seed: int) -> dict[str, Weight]:
    """Each matrix of a type of these, in turn, with numbers as large as a model's."""
    weights, rng = dict(random_checkpoint(config, seed).weights), np.random.default_rng(seed)
    for i, (name, weight) in enumerate(sorted(weights.items())):
        kind = kinds[i % len(kinds)]
        if len(weight.shape) == 2 and kind in BLOCKS:
            size = float(np.std(weight.data))
            weights[name] = random_blocks(kind, weight.shape[0], weight.shape[1] // BLOCKS[kind][0], rng, size=size)
        elif len(weight.shape) == 2:
            weights[name] = convert(weight, WeightType(kind, 32 if kind == "int8" else 0))
    return weights


def build(config: ModelConfig, weights: Mapping[str, Weight], tokens: int, logits: str = "rows") -> Graph:
    kv = KVLayout.of(config, config.context)
    types = {name: weight.type for name, weight in weights.items()}
    return graph.build(config, types, kv, tokens, logits, activations="int8")


@pytest.mark.slow
@given(
    st.lists(st.sampled_from([*VEC_DOT_TYPE, *VEC_DOT_TYPE, "f32", "f16", "int8"]), min_size=1, max_size=4),
    st.booleans() | st.sets(st.sampled_from(list(FUSIONS))).map(sorted),
    st.integers(1, 9),
    st.integers(1, 2),
    st.integers(0, 1000),
)
@settings(max_examples=25)
def test_every_value_of_models_of_any_types(
    kinds: list[str], fusions: bool | list[str], chunk: int, workers: int, seed: int
) -> None:
    """Each step on the operands that it had, the KV cache in float32; no other live byte changes."""
    wide = {"q4_k", "q5_k", "q6_k"} & set(kinds)
    config = CONFIG if wide else NARROW
    weights = blocks_model(config, kinds, seed)
    cpu, reference = cpu_backend(weights, workers), ReferenceBackend(weights)
    rng, start = np.random.default_rng(seed), 0
    for tokens in (chunk, 1):
        net = build(config, weights, tokens)
        program = compiled(cpu, net, fusions)
        if start == 0:
            poison(program)
        ids = [int(token) for token in rng.integers(0, config.vocab_size, tokens)]
        run_checked(program, reference.program(net), ids, start, 0, whole=False)
        start += tokens


def op_kinds(net: Graph) -> list[str]:
    return [op.kind for op in net.ops]


def test_one_rounding_for_all_that_read_it() -> None:
    weights = blocks_model(CONFIG, ["q4_k"], 0)
    kinds = op_kinds(build(CONFIG, weights, 1))
    assert kinds.count("quantize_q8_k") == 4 * CONFIG.n_layers + 1  # q/k/v share one, gate and up
    assert not {"quantize", "quantize_q8_0", "quantize_q8_1"} & set(kinds)
    fused = op_kinds(fuse(build(CONFIG, weights, 1), "cpu"))
    assert fused.count("qkv") == fused.count("gate_up") == 2 and fused.count("linear_add") == 4
    for name in [name for name in weights if name.endswith(("wv", "w2"))]:
        rows, columns = weights[name].shape
        weights[name] = random_blocks("q6_k", rows, columns // 256, np.random.default_rng(0))
    mixed = fuse(build(CONFIG, weights, 1), "cpu")
    verify(mixed)
    assert op_kinds(mixed).count("qkv") == 2, "q4_k and q6_k are rounded for alike"


def test_only_those_inputs_are_rounded_that_quantised_weights_read() -> None:
    weights = blocks_model(CONFIG, ["f32", "f16", "bf16"], 0)
    kinds = op_kinds(build(CONFIG, weights, 1))
    assert not [kind for kind in kinds if kind.startswith("quantize")]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "model.gguf"
    WRITERS["gguf"](path, CONFIG, blocks_model(CONFIG, ["q4_1", "q8_0", "q4_k", "q4_0", "q6_k"], 3))
    return path


IDS = [int(token) for token in np.random.default_rng(1).integers(0, 50, 20)]


@pytest.mark.slow
def test_compile_rounds_on_request_only(mixed: Path) -> None:
    results = {}
    for options in ({}, {"activations": "f32"}, {"activations": "int8"}):
        with numballama.compile(mixed, device="cpu", threads=1, **options) as opened:  # type: ignore[arg-type]
            kinds = {op.kind for op in opened.graph.ops if op.kind.startswith("quantize")}
            results[options.get("activations")] = opened.logits(IDS)
            assert opened.activations == options.get("activations", "f32")
        assert kinds == ({f"quantize_{kind}" for kind in ACTIVATION_QUANT} if opened.activations == "int8" else set())
    np.testing.assert_array_equal(results[None], results["f32"])
    size = np.sqrt((results["f32"] ** 2).mean())
    error = np.sqrt(((results["int8"] - results["f32"]) ** 2).mean()) / size
    assert 1e-3 < error < 0.1, f"each rounding is off by up to 1/254: {error}"
    oracle = numballama.compile(mixed, device="reference", activations="int8").logits(IDS)
    between = np.sqrt(((results["int8"] - oracle) ** 2).mean()) / size
    assert between < 0.1, "not to the bit: a number that is rounded the other way moves all that follow"


@pytest.mark.slow
def test_a_prompt_in_chunks_and_steps(mixed: Path) -> None:
    """Rows and panels add up in different orders, so hence the same tolerance as above."""
    with numballama.compile(mixed, device="cpu", threads=2, activations="int8") as opened:
        wanted, size = opened.logits(IDS), 0.0
        with opened.exclusive() as session:
            session.prefill(IDS[:5])
            for step, token in enumerate(IDS[5:], 5):
                session.step(token)
                size = np.sqrt((wanted[step] ** 2).mean())
                assert np.sqrt(((session.logits - wanted[step]) ** 2).mean()) < 0.1 * size


@pytest.mark.slow
@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_damaged_weights_show(tmp_path: Path, damage: float) -> None:
    weights = blocks_model(CONFIG, ["q4_k", "q8_0"], 0)
    weights["layers.0.ffn_norm"].data[7] = damage
    path = tmp_path / "model.gguf"
    WRITERS["gguf"](path, CONFIG, weights)
    with (
        numballama.compile(path, device="cpu", threads=1, activations="int8") as opened,
        pytest.raises(Error, match="the logits are not numbers: the weights may be damaged"),
    ):
        opened.logits(IDS[:2])


def test_arguments(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="activations 'int4' is not supported; choose from f32, int8"):
        numballama.compile(mixed, device="cpu", activations="int4")
    monkeypatch.setattr(model, "choose_device", lambda device, gpus: ("cuda", "of a test"))
    backend = SimpleNamespace(activation_types=("f32",))
    monkeypatch.setattr(model, "backend_class", lambda device, batch_invariant: backend)
    with pytest.raises(UnsupportedError, match="activations 'int8' are for the CPU, not for cuda"):
        numballama.compile(mixed, activations="int8")


def test_a_model_without_quantised_weights_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    WRITERS["llama2c-v0"](path, NARROW, random_checkpoint(NARROW).weights)
    with numballama.compile(path, device="cpu", threads=1, activations="int8") as opened:
        assert any("no activations are rounded" in note for note in opened.notes)
    with numballama.compile(path, device="cpu", threads=1, activations="int8", dtype="int8") as opened:
        assert not any("no activations are rounded" in note for note in opened.notes)
        assert "quantize" in op_kinds(opened.graph), "groups of int8 weights are met as llama2.c's are"


@pytest.mark.slow
def test_the_command_line_passes_it_on(mixed: Path) -> None:
    program = [sys.executable, "-m", "numballama", "bench", str(mixed), "--device", "cpu", "--json"]
    short = ["--prompt-tokens", "4", "--tokens", "2", "--repeats", "1", "--context", "8", "--activations"]
    done = subprocess.run([*program, *short, "int8"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["activations"] == "int8"
    done = subprocess.run([*program, *short, "int3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "activations 'int3' is not supported" in done.stderr


@pytest.mark.parametrize("command", ["story", "generate FILE TEXT", "chat FILE", "bench"])
def test_every_command_that_compiles_has_the_option(command: str) -> None:
    assert cli.parser().parse_args(command.split()).activations == "f32"
    assert cli.parser().parse_args([*command.split(), "--activations", "int8"]).activations == "int8"


# Any CPU

PRODUCTS = """
import sys
import numpy as np
from tests.helpers.gguf_files import random_blocks
from numballama.quantization.types import VEC_DOT_TYPE
from numballama.cpu.backend import CpuBackend
from numballama.ir import Graph
from numballama.quantization.activations import quantize_activations

rng = np.random.default_rng(0)
for name in ("q8_0", "q4_1", "q4_k", "q6_k"):
    kind = VEC_DOT_TYPE[name]
    weight = random_blocks(name, 19, 7, rng, odd=True)
    x = rng.standard_normal((9, weight.shape[1]), np.float32)
    graph = Graph("case")
    rounded = graph.add(f"quantize_{kind}", graph.input("x", x.shape, "f32"), out=("q", "s", "m"))
    graph.add("linear", *rounded, graph.weight("w", weight.shape, name), out="y")
    graph.outputs = ["q", "s", "m", "y"]
    backend = CpuBackend({"w": weight}, threads=1)
    program = backend.program(graph)
    program.inputs["x"][:] = x
    for tokens in (2, 9):
        program.run(tokens)
        for got, want in zip("qsm", quantize_activations(kind, x)):
            assert (program.value(got)[:tokens] == want[:tokens]).all(), (name, got)
        np.save(sys.stdout.buffer, program.value("y")[:tokens])
sys.stdout.flush()
"""


SSE_AND_AVX2 = "+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2"


@pytest.mark.slow
def test_any_cpu_gives_the_same() -> None:
    """With `vpdpbusd` of either kind, and on a CPU that has none: integer sums are exact, so floats differ by the order
    of sums. They share the tests' cache: what is of another CPU is not found in it."""
    machines = [{}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}]
    if cpu_features().get("avx512f"):
        machines.append({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": SSE_AND_AVX2})
    if cpu_features().get("avxvnni"):
        machines.append({"NUMBA_CPU_NAME": "alderlake", "NUMBA_CPU_FEATURES": f"{SSE_AND_AVX2},+avxvnni"})
    results = []
    for machine in machines:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | machine
        found = subprocess.run([sys.executable, "-c", PRODUCTS], env=environment, capture_output=True, timeout=200)
        assert found.returncode == 0, found.stderr[-3000:]
        results.append(found.stdout)
    streams = [io.BytesIO(result) for result in results]
    for _ in range(2 * 4):
        first, *others = map(np.load, streams)
        for other in others:
            assert np.abs(first - other).max() <= 1e-5 * np.abs(first).max()


@pytest.mark.slow
def test_the_instruction_is_used_where_it_is(tmp_path: Path) -> None:
    if not cpu_features().get("avx512vnni") and not cpu_features().get("avxvnni"):
        pytest.skip("this CPU has no vpdpbusd")
    code = (
        "import numba\nfrom numballama.cpu import kernels_int8 as k\nfrom numballama.cpu.vecdot import RECORD_TYPES\n"
    )
    code += "from numba import types as t\nA = lambda kind, n=2: t.Array(kind, n, 'C')\n"
    code += "from numballama.cpu.compiler import compile_step\n"
    code += "f = numba.njit((t.int64, t.int64, t.int64, A(t.int8), A(t.float32), A(t.int32), A(RECORD_TYPES['q8_0']), "
    code += "A(t.float32), A(t.float32)))(k.linear_blocks_int8)\n"
    code += "asm = next(iter(f.inspect_asm().values()))\nprint('vpdpbusd' in asm, '{1to16}' in asm)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    wide = bool(cpu_features().get("avx512vnni"))
    assert done.stdout.split() == ["True", str(wide)]
