"""Hugging Face directories: weights, indexes, tensors without a place, and damage."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numballama.errors import Error, FormatError, UnsupportedError
from numballama.loader import open_checkpoint
from numballama.quantization.convert import dequantize
from numballama.quantization.types import BF16, F16, F32
from tests.helpers.hf_files import HF, edit, save_tensors, tensors


def test_tied_embeddings(copy: Callable[[str], Path]) -> None:
    """As in transformers 5: a tied model with another classifier uses it, with the same one or only one it is tied. An
    untied model without a classifier is damaged.
    """
    folder = edit(copy("llama"), {"tie_word_embeddings": True})
    opened, arrays = open_checkpoint(folder), tensors(folder)
    assert not opened.config.tied_embeddings
    np.testing.assert_array_equal(opened.weights["output"].data, arrays["lm_head.weight"])
    assert opened.notes == [
        "config.json ties the embeddings, but lm_head.weight is another matrix: it is used, as in transformers"
    ]
    table = arrays["model.embed_tokens.weight"]
    almost = table.copy()
    almost[-1, -1] += 1
    for head, tied in ((table.copy(), True), (almost, False), (table.astype(np.float16), False)):
        save_tensors(folder / "model.safetensors", arrays | {"lm_head.weight": head})
        opened = open_checkpoint(folder)
        assert opened.config.tied_embeddings == tied == (not opened.notes)
    del arrays["model.embed_tokens.weight"]
    save_tensors(folder / "model.safetensors", arrays)
    opened = open_checkpoint(folder)
    assert opened.config.tied_embeddings and opened.notes == []
    np.testing.assert_array_equal(opened.weights["tok_embeddings"].data, arrays["lm_head.weight"])
    with pytest.raises(FormatError, match=r"tensor lm_head\.weight"):
        open_checkpoint(edit(copy("smollm2"), {"tie_word_embeddings": False}))


@pytest.mark.parametrize("stale", [1, 39, 41, 32000])
@pytest.mark.parametrize("model", ["llama", "smollm2"])
def test_a_stale_vocab_size(copy: Callable[[str], Path], model: str, stale: int) -> None:
    """The embedding was resized and the configuration was not: the rows count."""
    opened, whole = open_checkpoint(edit(copy(model), {"vocab_size": stale})), open_checkpoint(HF / f"{model}-0")
    assert opened.config == whole.config
    rows = whole.config.vocab_size
    assert opened.notes == [f"vocab_size of config.json is {stale:,}, the embedding has {rows} rows: the rows count"]


def test_the_classifier_must_have_as_many_rows(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    arrays = tensors(folder)
    save_tensors(folder / "model.safetensors", arrays | {"lm_head.weight": arrays["lm_head.weight"][:-1]})
    with pytest.raises(FormatError, match=r"wrong shape.*lm_head\.weight"):
        open_checkpoint(folder)


# ---- files ----


def test_weights_are_views_in_the_type_of_the_file() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    for name, kind in (("llama", F32), ("llama-bf16", BF16), ("qwen3-f16-sharded", F16)):
        opened = open_checkpoint(HF / f"{name}-0")
        assert opened.format == f"Hugging Face, {'qwen3' if 'qwen3' in name else 'llama'}"
        assert (opened.notes, opened.defaulted_fields, opened.stop_token_ids, opened.tokenizer) == ([], (), (2,), None)
        for weight in opened.weights.values():
            assert weight.type == (kind if len(weight.shape) == 2 else F32)
            assert weight.data.flags.owndata == (len(weight.shape) == 1 and kind != F32) or weight.type == F32
            if len(weight.shape) == 2:
                assert not weight.data.flags.owndata and not weight.data.flags.writeable
    theirs = safetensors.load_file(HF / "llama-0" / "model.safetensors")
    ours = open_checkpoint(HF / "llama-0").weights
    np.testing.assert_array_equal(ours["layers.1.wk"].data, theirs["model.layers.1.self_attn.k_proj.weight"])
    np.testing.assert_array_equal(ours["output"].data, theirs["lm_head.weight"])


def test_a_single_file_beside_its_config(copy: Callable[[str], Path]) -> None:
    whole = open_checkpoint(HF / "llama-0")
    one = open_checkpoint(HF / "llama-0" / "model.safetensors")
    assert one.config == whole.config and one.path.name == "model.safetensors"
    np.testing.assert_array_equal(one.weights["norm"].data, whole.weights["norm"].data)
    shard = open_checkpoint(HF / "qwen3-f16-sharded-0" / "model-00002-of-00003.safetensors")
    assert list(shard.weights) == list(shard.config.weight_shapes())
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / "another.safetensors")
    assert open_checkpoint(folder).config == whole.config
    shutil.copy(folder / "another.safetensors", folder / "third.safetensors")
    assert open_checkpoint(folder / "third.safetensors").config == whole.config
    with pytest.raises(
        FormatError, match=r"or the path of a file; found another\.safetensors, third\.safetensors, config"
    ):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    for path in (folder, folder / "third.safetensors"):
        with pytest.raises(FormatError, match=r"expected config\.json"):
            open_checkpoint(path)


def test_indexes_that_lead_astray(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("qwen3-f16-sharded")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    table = whole["weight_map"]
    name = "model.norm.weight"
    for value, message in (
        ("../model.safetensors", "beside the index"),
        ("/etc/passwd", "beside the index"),
        ("model.safetensors.index.json", "beside the index"),
        (7, "beside the index"),
        ("missing.safetensors", "a part of the model is missing"),
    ):
        index.write_text(json.dumps({"weight_map": table | {name: value}}))
        with pytest.raises(FormatError, match=message):
            open_checkpoint(folder)
    gone = table[name]
    index.write_text(json.dumps({"weight_map": {key: value for key, value in table.items() if value != gone}}))
    with pytest.raises(FormatError, match="tensor is missing"):
        open_checkpoint(folder)
    for text, message in (("{}", "key weight_map"), ("[]", "not an object"), ("{", "not JSON"), ("", "empty")):
        index.write_text(text)
        with pytest.raises(FormatError, match=message):
            open_checkpoint(folder)


def test_mistrals_own_format_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    (folder / "config.json").rename(folder / "params.json")
    with pytest.raises(FormatError, match=r"expected config\.json; found params\.json, of Meta's and Mistral's own"):
        open_checkpoint(folder)


def test_adapters_are_named(copy: Callable[[str], Path]) -> None:
    """An adapter alone is no model; beside one, it is not applied, and a note says so."""
    folder = copy("llama")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    assert open_checkpoint(folder).notes[0].startswith("beside the model is an adapter of some/base")
    weights = (folder / "model.safetensors").rename(folder / "adapters.safetensors")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"model": "mlx/base"}')
    for path in (folder, weights):
        with pytest.raises(UnsupportedError, match=r"an adapter of mlx/base .* merge it into its model first"):
            open_checkpoint(path)
    weights.unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"an adapter .adapter_config\.json., not a model"):
        open_checkpoint(folder)


def test_tensors_without_a_place(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    data = (folder / "model.safetensors").read_bytes()
    for name, message in (
        ("model.layers.0.self_attn.rotary_emb.inv_freq", ""),
        ("model.layers.0.self_attn.q_proj.bias", "no place in a llama model"),
        ("model.layers.2.input_layernorm.weight", "no place in a llama model"),
    ):
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        head[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        write(folder, head, data[8 + int.from_bytes(data[:8], "little") :])
        if message:
            with pytest.raises(UnsupportedError, match=message):
                open_checkpoint(folder)
        else:
            open_checkpoint(folder)


# ---- damage ----


def write(folder: Path, head: dict[str, Any] | bytes, data: bytes) -> None:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.slow
def test_truncation_at_every_tensor(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    ends = {start + entry["data_offsets"][1] for key, entry in json.loads(data[8:start]).items() if key[0] != "_"}
    for size in sorted({1, 7, 8, 9, start - 1, start, *(end - 1 for end in ends), *ends - {len(data)}}):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(FormatError, match="was a download interrupted" if size >= start else None):
            open_checkpoint(folder)


def mutated(data: bytes, rng: random.Random, head: int) -> bytes:
    """Bits, bytes, digits, cuts and moves, most of them in the first `head` bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = min(rng.randrange(rng.choice((8, head, head, len(data)))), len(changed) - 1)
        match rng.randrange(5):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.randrange(256)
            case 2:
                changed[at : at + 1] = rng.choice((b"9" * 30, b"-", b"null", b'"', b"{", b"}", b"[1]", b"0"))
            case 3:
                del changed[at : at + rng.choice((1, 4, 8, 100))]
            case 4:
                start = rng.randrange(head)
                changed[at:at] = changed[start : start + rng.choice((1, 4, 8, 60))]
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["model-00002-of-00003.safetensors", "config.json", "model.safetensors.index.json"])
def test_mutations_end_in_an_error_or_in_a_model(copy: Callable[[str], Path], which: str) -> None:
    folder, rng = copy("qwen3-f16-sharded"), random.Random(7)
    path = folder / which
    sample = path.read_bytes()
    head = 8 + int.from_bytes(sample[:8], "little") if path.suffix == ".safetensors" else len(sample)
    opened = 0
    for _ in range(500):
        path.unlink()  # a mapping may live on
        path.write_bytes(mutated(sample, rng, head))
        try:
            checkpoint = open_checkpoint(folder)
        except Error:
            continue
        opened += 1
        for weight in checkpoint.weights.values():
            assert weight.data.nbytes == weight.type.nbytes(int(np.prod(weight.shape)))
            assert dequantize(weight).size
    assert 5 < opened < 450, opened
