"""One short test of each area, in the order of the flow: read these first, and run them first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import numballama
from numballama import Model, loader
from numballama.checkpoint import Weight
from numballama.cpu.backend import CpuBackend
from numballama.export import export_model
from numballama.ir import Graph
from numballama.quantization.types import F32
from numballama.reference import ReferenceBackend

OPENING = "Once upon a time"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The story model on the CPU."""
    with numballama.compile(None, device="cpu") as model:
        yield model


def test_the_model_tells_its_story(model: Model) -> None:
    story = model.generate(OPENING, temperature=0, max_tokens=30)
    assert story.startswith(", there was a little girl named Lily.")


def test_cpu_and_reference_agree(model: Model) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(OPENING)
    with numballama.compile(None, device="reference") as reference:
        assert np.abs(model.logits(ids) - reference.logits(ids)).max() < 1e-3
        story = reference.generate(OPENING, temperature=0, max_tokens=5)
    assert model.generate(OPENING, temperature=0, max_tokens=5) == story


def test_a_stream_is_the_text_in_parts(model: Model) -> None:
    parts = list(model.stream(OPENING, temperature=0, max_tokens=12))
    assert "".join(part.text for part in parts) == model.generate(OPENING, temperature=0, max_tokens=12)
    assert len(parts) == 12 and parts[-1].finish_reason == "length"


def test_a_seed_gives_the_same_text_again(model: Model) -> None:
    first, second = (model.generate(OPENING, seed=7, max_tokens=12) for _ in range(2))
    assert first == second


def test_a_tokenizer_gives_the_text_back(model: Model) -> None:
    text = "Lily's cat said: «Où?» 12 times …"
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer.encode(text)).strip() == text


def test_a_gguf_file_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "story.gguf"
    export_model(None, path, "gguf")
    source, copy = loader.open_checkpoint(None), loader.open_checkpoint(path)
    assert copy.config == source.config
    assert source.weights.keys() == copy.weights.keys()
    for name, weight in source.weights.items():
        assert weight.type == copy.weights[name].type
        assert np.array_equal(np.asarray(weight.data), np.asarray(copy.weights[name].data)), name


def test_a_kernel_agrees_with_the_reference() -> None:
    rng = np.random.default_rng(0)
    weights = {"w": Weight((24, 40), F32, rng.standard_normal((24, 40), np.float32))}
    graph = Graph("one product")
    graph.outputs = [
        graph.add("linear", graph.input("x", (3, 40), "f32"), graph.weight("w", (24, 40), "f32"), out="y").name
    ]
    x, results = rng.standard_normal((3, 40), np.float32), []
    for backend in (CpuBackend(weights), ReferenceBackend(weights)):
        program = backend.program(graph)
        program.inputs["x"][:] = x
        program.run(3)
        results.append(program.value("y").copy())
    assert np.abs(results[0] - results[1]).max() < 1e-5
    assert np.abs(results[1] - x @ weights["w"].data.T).max() < 1e-4


def test_a_chat_turn(model: Model) -> None:
    chat = model.chat()
    answer = chat.send("Tell me about a cat.", temperature=0, max_tokens=8)
    assert chat.messages[-1] == {"role": "assistant", "content": answer}


def test_inspection_reads_no_weights() -> None:
    report = str(numballama.inspect(None))
    assert "rmsnorm" in report and "linear" in report


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16)
    with pytest.raises(numballama.FormatError, match=r"damaged\.gguf"):
        numballama.compile(path)
