"""GGUF of every architecture: what is written comes back, and gives the logits that transformers gave."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.config import HALF_SPLIT, INTERLEAVED, ModelConfig, RopeScaling
from numballama.errors import FormatError, UnsupportedError
from numballama.files import map_file
from numballama.formats.gguf.header import Header
from numballama.formats.gguf.writer import write_gguf
from numballama.loader import open_checkpoint
from numballama.rope import rope_frequencies
from tests.helpers.gguf_files import (
    ARRAY,
    CONFIG,
    STRING,
    array,
    edited,
    entry,
    f32,
    save,
    tensor,
    text,
    u32,
    weights_of,
)
from tests.helpers.random_models import architectures, reference_logits

HF = Path(__file__).parents[1] / "golden" / "hf"


@pytest.mark.slow
@settings(max_examples=60)
@given(config=architectures(), pairing=st.sampled_from([INTERLEAVED, HALF_SPLIT]), seed=st.integers(0, 99))
def test_configs_and_logits_survive(tmp_path: Path, config: ModelConfig, pairing: str, seed: int) -> None:
    config = replace(config, rope_pairing=pairing)
    weights, path = weights_of(config, seed=seed), tmp_path / "model.gguf"
    path.unlink(missing_ok=True)
    notes = write_gguf(path, config, weights)
    opened = open_checkpoint(path)
    dynamic = config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"
    assert sum("dynamic" in note for note in notes) == dynamic
    ids = np.arange(min(config.context, 12)) % config.vocab_size
    wanted = replace(config, rope_scaling=None) if dynamic else config
    got = reference_logits(opened.config, opened.weights, ids)
    np.testing.assert_allclose(got, reference_logits(wanted, weights, ids), atol=1e-4)
    np.testing.assert_allclose(rope_frequencies(opened.config), rope_frequencies(wanted), rtol=1e-6)
    plain = {"rope_scaling": None, "rope_pairing": INTERLEAVED}
    assert replace(opened.config, **plain) == replace(config, **plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture"),
    [("smollm2", "llama"), ("llama3", "llama"), ("llama-linear", "llama"), ("llama-yarn", "llama"),
     ("llama-longrope", "llama"), ("llama-longrope-short", "llama"), ("llama-biases", "llama"),
     ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)  # fmt: skip
def test_golden_models_through_gguf(tmp_path: Path, name: str, architecture: str) -> None:
    source = open_checkpoint(HF / f"{name}-0")
    expected = np.load(HF / f"{name}-0" / "expected.npz")
    path = tmp_path / "model.gguf"
    notes = write_gguf(path, source.config, source.weights)
    assert Header(map_file(path)).text("general.architecture") == architecture
    assert len(notes) == (name == "mistral")
    opened = open_checkpoint(path)
    assert opened.config.rope_pairing == (INTERLEAVED if architecture == "llama" else HALF_SPLIT)
    got = reference_logits(opened.config, opened.weights, expected["ids"])
    assert np.abs(got - expected["logits"]).max() <= 2e-4


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_is_recognised_in_its_factors(tmp_path: Path, factor: float) -> None:
    config = replace(CONFIG, head_dim=64, rope_theta=5e5, rope_scaling=RopeScaling("llama3", factor), context=131072)
    path = tmp_path / "m.gguf"
    save(path, config)
    assert open_checkpoint(path).config == config
    other = replace(config, rope_scaling=RopeScaling("llama3", factor, original_context=4096))
    save(path, other)
    assert open_checkpoint(path).config == other
    other = replace(config, rope_scaling=RopeScaling("llama3", factor, 2.0, original_context=4096))
    save(path, other)
    scaling = open_checkpoint(path).config.rope_scaling
    assert scaling is not None and scaling.kind == "factors" and len(scaling.factors) == 32
    save(tmp_path / "again.gguf", open_checkpoint(path).config)
    assert open_checkpoint(tmp_path / "again.gguf").config == open_checkpoint(path).config


SCALING = "llama.rope.scaling."
LINEAR = entry(f"{SCALING}type", STRING, text("linear"))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({f"{SCALING}type": LINEAR, f"{SCALING}factor": f32(f"{SCALING}factor", 4.0)}, RopeScaling("linear", 4.0)),
        ({f"{SCALING}factor": f32(f"{SCALING}factor", 4.0)}, RopeScaling("linear", 4.0)),
        ({"llama.rope.scale_linear": f32("llama.rope.scale_linear", 2.0)}, RopeScaling("linear", 2.0)),
        ({f"{SCALING}factor": f32(f"{SCALING}factor", 0.0)}, None),
    ],
)
def test_linear_scaling(tmp_path: Path, changes: dict[str, bytes | None], wanted: RopeScaling | None) -> None:
    path = save(tmp_path / "m.gguf")
    path.write_bytes(edited(path, changes))
    assert open_checkpoint(path).config.rope_scaling == wanted


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (f"{SCALING}factor", f32(f"{SCALING}factor", 0.5), "factor must be at least 1"),
        (f"{SCALING}factor", f32(f"{SCALING}factor", float("nan")), "factor must be at least 1"),
        (f"{SCALING}type", entry(f"{SCALING}type", ARRAY, array(STRING, 1, text("linear"))), "wrong type"),
        (
            "llama.attention.sliding_window",
            entry("llama.attention.sliding_window", 10, struct.pack("<Q", 1 << 63)),
            "window must be from 0",
        ),
        (
            "llama.attention.sliding_window",
            entry("llama.attention.sliding_window", 5, struct.pack("<i", -1)),
            "window must be from 0",
        ),
    ],
)
def test_impossible_scaling_and_windows(tmp_path: Path, key: str, change: bytes, message: str) -> None:
    path = save(tmp_path / "m.gguf")
    path.write_bytes(edited(path, {key: change}))
    with pytest.raises(FormatError, match=message):
        open_checkpoint(path)


def test_a_window_is_applied_and_noted(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf")
    key = "llama.attention.sliding_window"
    for window, notes in ((4, 1), (4096, 0), (0, 0)):
        path.write_bytes(edited(path, {key: u32(key, window)}))
        opened = open_checkpoint(path)
        assert opened.config.window == window
        assert len(opened.notes) == notes


def test_factors_that_cannot_be(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", replace(CONFIG, rope_scaling=RopeScaling("llama3", 8.0)))
    whole = path.read_bytes()
    info = Header(map_file(path)).tensors["rope_freqs.weight"]
    assert info.shape == (4,)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        data = bytearray(whole)
        struct.pack_into("<f", data, info.offset + 4, value)
        path.unlink()
        path.write_bytes(data)
        with pytest.raises(FormatError, match="not positive"):
            open_checkpoint(path)
    path.write_bytes(whole)
    path.write_bytes(edited(path, {f"{SCALING}factor": f32(f"{SCALING}factor", 4.0)}))
    with pytest.raises(UnsupportedError, match="both rope_freqs"):
        open_checkpoint(path)


def test_tensors_of_one_architecture_are_wanted_in_every_layer(tmp_path: Path) -> None:
    config: Any = replace(CONFIG, qk_norm=True)
    path = save(tmp_path / "m.gguf", config)
    path.write_bytes(edited(path, {}, drop="blk.1.attn_k_norm.weight"))
    with pytest.raises(FormatError, match=r"tensor blk\.1\.attn_k_norm\.weight"):
        open_checkpoint(path)
    path.unlink()
    save(path, config)
    path.write_bytes(edited(path, {}, extra=(tensor("blk.0.attn_q.bias", [0 + 32], 0, 0),)))
    with pytest.raises(FormatError):  # over another tensor, and the others are missing
        open_checkpoint(path)
