"""q8_0 weights on the CPU: blocks of every bit pattern, and whole models, against the dequantised numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import random_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from support import check_step, compiled, cpu_backend, run_parts

import numballama
from numballama import quant
from numballama.checkpoint import Weight
from numballama.config import Q8_0, ModelConfig
from numballama.errors import Error
from numballama.formats import WRITERS
from numballama.ir import Graph
from numballama.reference import ReferenceBackend


@st.composite
def blocks(draw: st.DrawFn, rows: int, count: int, odd: bool) -> Weight:
    """Rows of blocks with any payload, -128 too, and any finite scale: negative, subnormal, zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    memory = rng.integers(0, 256, rows * count * 34 + 1, np.uint8)
    data = memory[odd : len(memory) - 1 + odd].reshape(rows, count, 34)
    scales = rng.standard_normal((rows, count, 1)).astype(np.float16)
    scales.flat[rng.integers(scales.size)] = draw(
        st.floats(width=16, allow_nan=False, allow_infinity=False).map(np.float16)
    )
    data[:, :, :2] = scales.view(np.uint8)
    return Weight((rows, count * 32), Q8_0, data.reshape(rows, -1))


@settings(max_examples=60)
@given(data=st.data(), rows=st.integers(1, 13), count=st.integers(1, 5), tokens=st.integers(1, 9), odd=st.booleans())
def test_products_with_rows_of_blocks(data: st.DataObject, rows: int, count: int, tokens: int, odd: bool) -> None:
    """One token and two go row by row (`row_dot`), more through decoded tiles (`decode_rows`)."""
    weight = data.draw(blocks(rows, count, odd))
    graph = Graph("case")
    x = graph.input("x", (tokens, count * 32), "f32")
    graph.outputs = [graph.add("linear", x, graph.weight("w", weight.shape, "q8_0"), out="y").name]
    program = compiled(cpu_backend({"w": weight}, workers=2), graph)
    program.inputs["x"][:] = np.random.default_rng(rows).standard_normal(x.shape, np.float32)
    check_step(program, 0, tokens, ReferenceBackend({"w": weight}), lambda: run_parts(program, tokens, 0, (1, 0)))


@settings(max_examples=20)
@given(data=st.data(), rows=st.integers(1, 9), count=st.integers(1, 4))
def test_embeddings_are_the_dequantised_rows_exactly(data: st.DataObject, rows: int, count: int) -> None:
    weight = data.draw(blocks(rows, count, odd=True))
    graph = Graph("case")
    ids = graph.input("ids", (3,), "i32")
    graph.outputs = [graph.add("embedding", ids, graph.weight("w", weight.shape, "q8_0"), out="x").name]
    program = compiled(cpu_backend({"w": weight}), graph)
    program.inputs["ids"][:] = data.draw(st.lists(st.integers(0, rows - 1), min_size=3, max_size=3))
    program.run(3)
    np.testing.assert_array_equal(program.value("x"), quant.dequantize(weight)[program.inputs["ids"]])


CONFIG = ModelConfig(64, 96, 2, 4, 2, 50, 24, tied_embeddings=False)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_agrees_with_the_reference(tmp_path: Path, tied: bool) -> None:
    config = ModelConfig(64, 96, 2, 4, 2, 50, 24, tied_embeddings=tied, qkv_bias=not tied)
    source, path = random_checkpoint(config), tmp_path / "model.gguf"
    weights = {name: quant.convert(w, Q8_0) if len(w.shape) == 2 else w for name, w in source.weights.items()}
    WRITERS["gguf"](path, config, weights)
    ids = np.random.default_rng(1).integers(0, 50, 20).tolist()
    wanted = numballama.compile(path, device="reference").logits(ids)
    with numballama.compile(path, threads=1) as model:
        assert {w.type.name for w in model.weights.values() if len(w.shape) == 2} == {"q8_0"}
        got = model.logits(ids)
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
        model.session.rewind()
        for step, token in enumerate(ids[:4]):  # the kernels of one token
            model.session.step(token) if step else model.session.prefill([token])
            np.testing.assert_allclose(model.session.logits, wanted[step], atol=1e-4 * np.abs(wanted).max())


def test_compile_converts_linear_weights(tmp_path: Path) -> None:
    source, path = random_checkpoint(CONFIG), tmp_path / "model.bin"
    WRITERS["llama2c-v1"](path, CONFIG, source.weights)
    with numballama.compile(path, dtype="q8_0", threads=1) as model:
        for name, weight in model.weights.items():
            plain = len(weight.shape) == 1 or name == "tok_embeddings"
            assert weight.type.name == ("f32" if plain else "q8_0")
            if not plain:
                np.testing.assert_array_equal(weight.data, quant.convert(source.weights[name], Q8_0).data)
                assert weight.nbytes == math.prod(weight.shape) // 32 * 34
        exact = numballama.compile(path, device="reference").logits([1, 2, 3])
        assert np.abs(model.logits([1, 2, 3]) - exact).max() < 0.05 * np.abs(exact).max()


def test_rows_that_blocks_do_not_fill_are_named(tmp_path: Path) -> None:
    config = ModelConfig(64, 100, 1, 4, 4, 50, 24)
    path = tmp_path / "model.bin"
    WRITERS["llama2c-v1"](path, config, random_checkpoint(config).weights)
    with pytest.raises(Error, match=r"layers\.0\.w2 cannot become q8_0: its rows of 100 numbers"):
        numballama.compile(path, dtype="q8_0", threads=1)
