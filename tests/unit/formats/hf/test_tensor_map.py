"""Names of tensors as programs other than transformers write them, and tensors that are no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from numballama.errors import FormatError, UnsupportedError
from numballama.formats.hf.tensor_map import is_buffer
from numballama.loader import open_checkpoint
from tests.helpers.hf_files import HF, edit, save_tensors, tensors

PREFIXES = (
    "",
    "model.",
    "module.model.",
    "_orig_mod.model.",
    "module._orig_mod.model.",
    "base_model.model.model.",
    "module.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("model", ["llama", "smollm2"])
def test_prefixes(copy: Callable[[str], Path], model: str, prefix: str) -> None:
    folder = copy(model)
    outer = prefix.removesuffix("model.") if prefix.endswith("model.") else prefix
    arrays = {}
    for name, array in tensors(folder).items():
        inner = name.startswith("model.")
        arrays[prefix + name.removeprefix("model.") if inner else outer + name] = array
    save_tensors(folder / "model.safetensors", arrays)
    opened, whole = open_checkpoint(folder), open_checkpoint(HF / f"{model}-0")
    assert opened.config == whole.config and opened.notes == whole.notes
    for name, weight in whole.weights.items():
        np.testing.assert_array_equal(opened.weights[name].data, weight.data)


BUFFERS = (
    "model.rotary_emb.inv_freq", "rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.31.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.rotary_emb.sin_cached", "model.layers.0.attention.masked_bias",
    "model.layers.0.self_attn.masked_bias", "model.layers.0.attn.bias", "model.position_ids",
    "layers.0.self_attn.rotary_emb.inv_freq", "module.model.layers.0.self_attn.rotary_emb.inv_freq",
)  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_left_out(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("llama")
    save_tensors(folder / "model.safetensors", tensors(folder) | {name: np.ones(4, np.float32)})
    assert open_checkpoint(folder).notes == []
    assert is_buffer(name)


def test_weights_are_no_buffers() -> None:
    for name in tensors(HF / "llama-biases-0"):
        assert not is_buffer(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "a LoRA adapter: merge it"),
        ("model.layers.0.mlp.experts.0.w1.weight", "a mixture of experts"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight_scale", "FP8"),
        ("model.vision_tower.patch.weight", "text and images"),
        ("model.layers.0.self_attn.q_proj.bias", "in a llama model of this version$"),
    ],
)
def test_tensors_without_a_place_say_what_they_are(copy: Callable[[str], Path], name: str, reason: str) -> None:
    folder = copy("llama")
    save_tensors(folder / "model.safetensors", tensors(folder) | {name: np.ones(4, np.float32)})
    with pytest.raises(UnsupportedError, match=f"no place in a llama model of this version.*{reason}|{reason}"):
        open_checkpoint(folder)


def test_a_base_model_without_a_classifier(copy: Callable[[str], Path]) -> None:
    """Saved by LlamaModel. Tied, it is whole; otherwise the classifier is missing."""
    folder = copy("llama")
    arrays: Mapping[str, np.ndarray] = {
        name.removeprefix("model."): array for name, array in tensors(folder).items() if name != "lm_head.weight"
    }
    save_tensors(folder / "model.safetensors", arrays)
    with pytest.raises(FormatError, match=r"tensor lm_head\.weight"):
        open_checkpoint(folder)
    assert open_checkpoint(edit(folder, {"tie_word_embeddings": True})).config.tied_embeddings
