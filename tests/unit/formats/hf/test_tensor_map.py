"""Names of tensors as programs other than transformers write them, and tensors that are no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.errors import FormatError, UnsupportedError
from numballama.formats.hf.tensor_map import rename
from numballama.formats.tensor_names import is_buffer
from numballama.formats.tensors import TensorInfo
from numballama.loader import open_checkpoint
from tests.helpers.hf_files import ELEMENTS, HF, edit, save_tensors, tensors

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


WRAPPERS = ("_orig_mod", "module", "base_model", "model", "language_model", "text_model", "_fsdp_wrapped_module")
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WEIGHTS = ("embed_tokens.weight", "norm.weight", "layers.0.mlp.up_proj.weight", "layers.11.self_attn.q_proj.bias")


def _info(name: str) -> TensorInfo:
    return TensorInfo(None, name, "F32", (1,), 0, 4)  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(WRAPPERS), max_size=6), st.sampled_from(WEIGHTS), st.data())
def test_any_wrappers_in_any_order(wrappers: list[str], weight: str, data: st.DataObject) -> None:
    parts = weight.split(".")
    for _ in range(data.draw(st.integers(0, 2))):
        parts.insert(data.draw(st.integers(0, len(parts) - 1)), data.draw(st.sampled_from(INSIDE)))
    name, head = ".".join([*wrappers, *parts]), ".".join([*wrappers, "lm_head", "weight"])
    assert {own: info.name for own, info in rename({name: _info(name), head: _info(head)}).items()} == {
        f"model.{weight}": name, "lm_head.weight": head,
    }  # fmt: skip


@given(st.lists(st.sampled_from(WRAPPERS), max_size=3), st.booleans())
def test_of_two_weights_with_one_name_none_is_lost(wrappers: list[str], first: bool) -> None:
    own, other = "model.norm.weight", ".".join([*wrappers, "norm.weight"])
    if own != other:
        both = (own, other) if first else (other, own)
        found = rename({name: _info(name) for name in both})
        assert {name: info.name for name, info in found.items()} == {own: own, other: other}


def test_names_that_are_no_language_models_stay() -> None:
    for name in ("model.vision_tower.patch.weight", "module.visual.norm.weight", "model.score.weight"):
        assert list(rename({name: _info(name)})) == [name]


BUFFERS = (
    "model.rotary_emb.inv_freq", "rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.31.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.rotary_emb.sin_cached", "model.layers.0.attention.masked_bias",
    "model.layers.0.self_attn.masked_bias", "model.layers.0.attn.bias", "model.position_ids",
    "layers.0.self_attn.rotary_emb.inv_freq", "module.model.layers.0.self_attn.rotary_emb.inv_freq",
    "rope.freqs", "freqs_cis", "model.freqs_cis", "freqs_cos", "causal_mask", "model.causal_mask",
    "rotary_emb.inv_freq_scaled", "model.rotary_emb.long_inv_freq", "model.rotary_emb.cos_sin_cache",
    "layers.0.attention.kv_cache.k_cache", "layers.0.attention.cache_v", "model.layers.0.self_attn._extra_state",
    "transformer.rotary_pos_emb.inv_freq", "model.layers.3.attn.mask",
)  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_left_out(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("llama")
    save_tensors(folder / "model.safetensors", tensors(folder) | {name: np.ones(4, np.float32)})
    assert open_checkpoint(folder).notes == []
    assert is_buffer(name)


@pytest.mark.parametrize("dtype", ["BOOL", "I64", "C64", "F64"])
def test_buffers_of_any_type(copy: Callable[[str], Path], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is of bools, position ids are integers, freqs_cis are complex numbers: no weight may be."""
    folder = copy("llama")
    elements = {"BOOL": np.bool_, "I64": np.int64, "C64": np.complex64, "F64": np.float64}
    monkeypatch.setitem(ELEMENTS, dtype, elements[dtype])
    save_tensors(folder / "model.safetensors", tensors(folder) | {"model.freqs_cis": np.ones(4, elements[dtype])})
    assert open_checkpoint(folder).notes == []


def test_weights_are_no_buffers() -> None:
    for name in tensors(HF / "llama-biases-0"):
        assert not is_buffer(name)
    for name in ("model.rotary_emb.weight", "model.layers.0.self_attn.bias", "lm_head.bias", "model.mask.weight"):
        assert not is_buffer(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "a LoRA adapter: merge it"),
        ("model.layers.0.mlp.experts.0.w1.weight", "a mixture of experts"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight_scale", "FP8"),
        ("model.vision_tower.patch.weight", "text and images"),
        ("score.weight", "a classifier of texts"),
        ("v_head.summary.weight", "a value head"),
        ("model.layers.0.self_attn.q_proj.bias", "in a llama model of this version$"),
    ],
)
def test_tensors_without_a_place_say_what_they_are(copy: Callable[[str], Path], name: str, reason: str) -> None:
    folder = copy("llama")
    save_tensors(folder / "model.safetensors", tensors(folder) | {name: np.ones(4, np.float32)})
    with pytest.raises(UnsupportedError, match=f"no place in a llama model of this version.*{reason}|{reason}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("self_attn.q_proj.weight", "self_attn.qkv_proj.weight", "qkv_proj.weight: q, k and v in one matrix"),
        ("mlp.up_proj.weight", "mlp.gate_up_proj.weight", "gate_up_proj.weight: gate and up in one matrix"),
        (
            "self_attn.q_proj.weight",
            "self_attn.q_proj.base_layer.weight",
            "base_layer.weight: a LoRA adapter: merge it",
        ),
        ("mlp.up_proj.weight", "mlp.w3.weight", "mlp.w3.weight$"),
        ("mlp.up_proj.weight", "feed_forward.w3.weight", "w3.weight: a name of Meta's and Mistral's own programs"),
        ("mlp.up_proj.weight", None, "found none$"),
    ],
)
def test_what_is_there_in_place_of_a_weight(
    copy: Callable[[str], Path], name: str, other: str | None, message: str
) -> None:
    """The error for a missing tensor names the likeliest of those without a place."""
    folder = copy("llama")
    arrays = tensors(folder)
    array = arrays.pop(f"model.layers.1.{name}")
    more = {} if other is None else {f"model.layers.1.{other}": array, "else.where": array}
    save_tensors(folder / "model.safetensors", arrays | more)
    with pytest.raises(FormatError, match=rf"a tensor is missing; at tensor model\.layers\.1\.{name}.*{message}"):
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
