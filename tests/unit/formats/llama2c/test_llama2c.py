"""The five checkpoint formats: models are read back as written, and what a format cannot hold is refused."""

from __future__ import annotations

import math
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.checkpoint import Weight
from numballama.config import ModelConfig, RopeScaling
from numballama.errors import Error, UnsupportedError
from numballama.export import WRITERS, WriteOptions
from numballama.formats.limits import MAX_LAYERS
from numballama.formats.llama2c import layout
from numballama.loader import open_checkpoint
from numballama.quantization.convert import convert, quantize_int8
from numballama.quantization.types import F32, WeightType
from tests.helpers.random_models import SMALL, configs, random_checkpoint, save

FLOAT_FORMATS = {"llama2c-v0": "llama2.c v0", "llama2c-v1": "llama2.c v1", "kuiper": "llama2.c v0"}
INT8_FORMATS = {"llama2c-v2": "llama2.c v2", "kuiper-int8": "KuiperLLama int8"}


def assert_same(got: Weight, expected: Weight) -> None:
    assert (got.shape, got.type, got.data.shape) == (expected.shape, expected.type, expected.shape)
    np.testing.assert_array_equal(got.data, expected.data)
    np.testing.assert_array_equal(got.scales, expected.scales)


@settings(max_examples=30)
@given(config=configs(biases=True), name=st.sampled_from(list(FLOAT_FORMATS)), seed=st.integers(0, 99))
def test_float_formats_round_trip(tmp_path: Path, config: ModelConfig, name: str, seed: int) -> None:
    if config.qkv_bias and name != "kuiper":
        with pytest.raises(UnsupportedError, match="no place for q/k/v biases"):
            save(tmp_path, name, config)
        return
    path, source = save(tmp_path, name, config, seed)
    opened = open_checkpoint(path)
    assert opened.config == config
    assert opened.format == ("KuiperLLama fp32" if config.qkv_bias else FLOAT_FORMATS[name])
    assert opened.bos_is_stop_token
    assert not opened.int8_activations
    assert list(opened.weights) == list(config.weight_shapes())
    for weight_name, weight in opened.weights.items():
        assert_same(weight, source.weights[weight_name])
    again = path.with_suffix(".again")
    WRITERS[name](again, opened.config, opened.weights)
    assert again.read_bytes() == path.read_bytes()


@settings(max_examples=30)
@given(config=configs(), name=st.sampled_from(list(INT8_FORMATS)), group=st.integers(1, 100))
def test_int8_formats_round_trip(tmp_path: Path, config: ModelConfig, name: str, group: int) -> None:
    source, path = random_checkpoint(config), tmp_path / "model.bin"
    WRITERS[name](path, config, source.weights, WriteOptions(group_size=group))
    opened = open_checkpoint(path)
    assert opened.config == config
    assert opened.format == INT8_FORMATS[name]
    assert opened.int8_activations == (name == "llama2c-v2")
    kept = {"llama2c-v2": (), "kuiper-int8": ("tok_embeddings",)}[name]
    for weight_name, weight in opened.weights.items():
        plain = len(weight.shape) == 1 or weight_name in kept
        assert_same(weight, convert(source.weights[weight_name], F32 if plain else WeightType("int8", group)))
    again = path.with_suffix(".again")
    WRITERS[name](again, opened.config, opened.weights, WriteOptions(group_size=group))  # int8 stays as it is
    assert again.read_bytes() == path.read_bytes()


MATRICES = "wq* wk* wv* wo* w1* w2* w3*"
PUBLISHED = {  # the order in which the exporters write: * once a layer, ~ in int8
    "llama2c-v0": "tok_embeddings attn_norm* wq* wk* wv* wo* ffn_norm* w1* w2* w3* norm freqs_cos freqs_sin output",
    "llama2c-v1": f"attn_norm* ffn_norm* norm tok_embeddings {MATRICES} output",
    "llama2c-v2": f"attn_norm* ffn_norm* norm tok_embeddings~ {MATRICES.replace('*', '*~')} output~",
    "kuiper-int8": f"{MATRICES.replace('*', '*~')} output~ tok_embeddings attn_norm* ffn_norm* norm",
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_files_are_laid_out_as_published(tmp_path: Path, name: str, tied: bool) -> None:
    config = replace(SMALL, tied_embeddings=tied)
    path, source = save(tmp_path, name, config)
    vocab = config.vocab_size if tied or name in ("llama2c-v1", "llama2c-v2") else -config.vocab_size
    expected = struct.pack("<7i", 24, 10, 2, 6, 2, vocab, 7)
    if name in ("llama2c-v1", "llama2c-v2"):
        expected = struct.pack("<Ii", 0x616B3432, int(name[-1])) + expected + bytes([tied])
    if name in INT8_FORMATS:
        expected += struct.pack("<i", 64)
    if name in ("llama2c-v1", "llama2c-v2"):
        expected += bytes(256 - len(expected))
    angles = np.outer(np.arange(7), 10000.0 ** (-np.arange(0, 4, 2) / 4))
    for entry in PUBLISHED[name].split():
        short = entry.rstrip("*~")
        if short.startswith("freqs"):
            expected += (np.cos if short == "freqs_cos" else np.sin)(angles).astype("<f4").tobytes()
            continue
        for full in [f"layers.{layer}.{short}" for layer in range(2)] if "*" in entry else [short]:
            if full == "output" and tied:
                continue
            values = source.weights[full].data
            for array in quantize_int8(values) if "~" in entry else [values]:
                expected += array.tobytes()
    got = path.read_bytes()
    assert len(got) == len(expected)
    if name == "llama2c-v0":  # the tables are rounded twice on one side
        np.testing.assert_allclose(
            np.frombuffer(got, "<f4", offset=28), np.frombuffer(expected, "<f4", offset=28), atol=1e-6
        )
    else:
        assert got == expected


def test_formats_convert_into_each_other(tmp_path: Path) -> None:
    path, source = save(tmp_path, "llama2c-v2")
    quantised = open_checkpoint(path)
    WRITERS["llama2c-v1"](tmp_path / "v1.bin", quantised.config, quantised.weights)
    for name, weight in open_checkpoint(tmp_path / "v1.bin").weights.items():
        assert_same(weight, convert(quantised.weights[name], F32))
        np.testing.assert_allclose(weight.data, source.weights[name].data, atol=0.02)


@pytest.mark.parametrize("name", WRITERS)
def test_weights_are_readonly_views_of_the_mapping(tmp_path: Path, name: str) -> None:
    path, _ = save(tmp_path, name)
    opened = open_checkpoint(path)
    shutil.rmtree(path) if path.is_dir() else path.unlink()  # the mapping keeps the file
    for weight in opened.weights.values():
        for array in (weight.data, *([] if weight.scales is None else [weight.scales])):
            assert not array.flags.writeable
            assert not array.flags.owndata
            assert array.sum() == array.sum()


def test_biases_stand_behind_their_matrices(tmp_path: Path) -> None:
    config = replace(SMALL, qkv_bias=True, tied_embeddings=True)
    path, source = save(tmp_path, "kuiper", config)
    numbers = np.fromfile(path, "<f4")[7:]
    start = config.vocab_size * config.dim + config.n_layers * config.dim  # tok_embeddings, attn_norm of all layers
    expected = [source.weights[f"layers.{layer}.{name}"].data.ravel() for layer in (0, 1) for name in ("wq", "bq")]
    np.testing.assert_array_equal(numbers[start:][: sum(map(len, expected))], np.concatenate(expected))
    assert any("Qwen2" in note for note in open_checkpoint(path).notes)


def test_kuiper_int8_tied_with_a_classifier_uses_it(tmp_path: Path) -> None:
    path, _ = save(tmp_path, "kuiper-int8")
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 20, SMALL.vocab_size)  # a positive vocab_size: "tied"
    path.write_bytes(data)
    opened = open_checkpoint(path)
    assert not opened.config.tied_embeddings
    assert opened.weights["output"].type.name == "int8"
    assert any("classifier" in note for note in opened.notes)


def test_real_v0_file_comes_back_to_the_byte_up_to_the_tables(models: Path, tmp_path: Path) -> None:
    original = models / "stories260K.bin"
    opened = open_checkpoint(original)
    copy = tmp_path / "copy.bin"
    assert WRITERS["llama2c-v0"](copy, opened.config, opened.weights) == []
    before, after = np.fromfile(original, "<i4"), np.fromfile(copy, "<i4")
    freqs = opened.config.context * opened.config.head_dim  # the tables at the end: PyTorch's cosines, to the last bit
    np.testing.assert_array_equal(after[:-freqs], before[:-freqs])
    np.testing.assert_allclose(after[-freqs:].view("<f4"), before[-freqs:].view("<f4"), atol=1e-7)


def test_writers_refuse_what_a_format_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for name, write in WRITERS.items():
        if name in ("gguf", "safetensors"):  # they can hold all of this
            continue
        wide = replace(SMALL, head_dim=8)
        with pytest.raises(UnsupportedError, match="not 8"):
            write(path, wide, random_checkpoint(wide).weights)
        WRITERS[name](path, replace(SMALL, window=SMALL.context), random_checkpoint(SMALL).weights)
        path.unlink()
        if name != "kuiper":
            biased = replace(SMALL, qkv_bias=True)
            with pytest.raises(UnsupportedError, match="biases"):
                write(path, biased, random_checkpoint(biased).weights)
        for change, message in (
            ({"qk_norm": True}, "norms of queries and keys"),
            ({"o_bias": True, "mlp_bias": True}, "output projection, biases of the feed-forward"),
            ({"window": 3}, "a sliding window of 3 tokens"),
            ({"rope_scaling": RopeScaling("linear", 2.0)}, "RoPE scaled as RopeScaling"),
        ):
            more = replace(SMALL, **change)
            with pytest.raises(UnsupportedError, match=f"has no place for .*{message}"):
                write(path, more, random_checkpoint(more).weights)
        deep = replace(SMALL, n_layers=MAX_LAYERS + 1)
        with pytest.raises(UnsupportedError, match="n_layers"):
            write(path, deep, {})
    for name in INT8_FORMATS:
        for group in (0, -64, layout.MAX_GROUP + 1):
            with pytest.raises(UnsupportedError, match="group"):
                WRITERS[name](path, SMALL, random_checkpoint(SMALL).weights, WriteOptions(group_size=group))
    assert not list(tmp_path.iterdir())


def test_writers_refuse_weights_of_another_model(tmp_path: Path) -> None:
    weights = random_checkpoint(SMALL).weights
    tied = replace(SMALL, tied_embeddings=True)
    with pytest.raises(Error, match="output in one but not the other"):
        WRITERS["llama2c-v0"](tmp_path / "x", tied, weights)
    missing = {name: weight for name, weight in weights.items() if name != "norm"}
    with pytest.raises(Error, match="norm in one"):
        WRITERS["llama2c-v0"](tmp_path / "x", SMALL, missing)
    wrong = weights | {"norm": Weight((1,), F32, np.ones(1, np.float32))}
    with pytest.raises(Error, match=r"norm has shape \(1,\)"):
        WRITERS["llama2c-v0"](tmp_path / "x", SMALL, wrong)
    assert not list(tmp_path.iterdir())


def test_what_a_file_cannot_say_is_noted(tmp_path: Path) -> None:
    config = replace(SMALL, rope_theta=5e5, rope_pairing="half")
    notes = WRITERS["kuiper"](tmp_path / "x", config, random_checkpoint(config).weights)
    assert len(notes) == 1
    assert "rope_pairing='half', rope_theta=500000.0:" in notes[0]
    notes = WRITERS["llama2c-v2"](tmp_path / "x", SMALL, random_checkpoint(SMALL).weights)
    assert len(notes) == 1
    assert "cross rows" in notes[0]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    weights = random_checkpoint(SMALL).weights
    table = np.full(weights["output"].shape, math.nan, np.float32)  # the last tensor of a v2 file
    with pytest.raises(Error, match="NaN"):
        WRITERS["llama2c-v2"](path, SMALL, weights | {"output": Weight(table.shape, F32, table)})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_can_be_rewritten_in_place(tmp_path: Path) -> None:
    path, source = save(tmp_path, "llama2c-v1")
    opened = open_checkpoint(path)
    link = tmp_path / "link.bin"
    link.symlink_to(path)
    WRITERS["llama2c-v1"](link, opened.config, opened.weights)
    assert link.is_symlink()
    for name, weight in open_checkpoint(path).weights.items():
        assert_same(weight, source.weights[name])


@pytest.mark.parametrize("kind", ["directory", "fifo", "nowhere"])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "target"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = path / "missing" / "target"
    with pytest.raises(Error):
        WRITERS["llama2c-v0"](path, SMALL, random_checkpoint(SMALL).weights)
    assert len(list(tmp_path.iterdir())) == (kind != "nowhere")
