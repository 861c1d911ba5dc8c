"""`config.json`: transformers' defaults, and errors that name what is not computed or impossible."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from numballama.config import ModelConfig, RopeScaling
from numballama.errors import FormatError, UnsupportedError
from numballama.formats.hf.config import config_json, config_of
from numballama.formats.json_reader import Keys
from numballama.loader import open_checkpoint
from tests.helpers.hf_files import HF, edit

YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.0, 2.0]}


def test_configs_of_the_golden_models() -> None:
    def config(name: str) -> ModelConfig:
        return open_checkpoint(HF / f"{name}-0").config

    base = ModelConfig(16, 24, 2, 4, 2, 40, 64, norm_eps=1e-5, rope_pairing="half", tied_embeddings=False)
    assert config("tinyllama") == base
    base = replace(base, norm_eps=1e-6)
    assert config("smollm2") == replace(base, tied_embeddings=True, rope_theta=1e5)
    assert config("llama3") == replace(
        base, head_dim=16, tied_embeddings=True, rope_theta=500.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    )
    assert config("llama-linear").rope_scaling == RopeScaling("linear", 4.0)
    assert config("llama-dynamic").rope_scaling == RopeScaling("dynamic", 2.0)
    attention_factor = 0.1 * math.log(4) + 1
    yarn = RopeScaling("yarn", 4.0, original_context=32, attention_factor=attention_factor)
    assert config("llama-yarn").rope_scaling == yarn
    own = replace(yarn, beta_fast=4.0, beta_slow=0.5, attention_factor=1.7)
    assert config("qwen3-yarn-attention").rope_scaling == own
    both = (0.07 * math.log(4) + 1) / (0.13 * math.log(4) + 1)
    assert config("llama-yarn-mscale").rope_scaling == replace(yarn, truncate=False, attention_factor=both)
    attention_factor = math.sqrt(1 + math.log(128 / 32) / math.log(32))
    lists = {"factors": (1.0, 1.1, 1.3, 2.0), "long_factors": (1.0, 2.0, 5.0, 9.5)}
    longrope = RopeScaling("longrope", original_context=32, **lists, attention_factor=attention_factor)
    assert config("llama-longrope").rope_scaling == longrope
    assert config("llama-biases") == replace(base, head_dim=6, qkv_bias=True, o_bias=True, mlp_bias=True)
    assert config("mistral") == replace(base, window=8)
    assert config("mistral-no-window") == replace(base, head_dim=8)
    assert config("qwen2") == replace(base, qkv_bias=True, rope_theta=1e6)
    assert config("qwen2-tied-window") == replace(base, qkv_bias=True, tied_embeddings=True, window=5)
    assert config("qwen3") == replace(base, head_dim=8, qk_norm=True, rope_theta=1e6)
    assert config("qwen3-biases") == replace(
        base, head_dim=10, qk_norm=True, qkv_bias=True, o_bias=True, tied_embeddings=True
    )


@pytest.mark.parametrize("name", ["smollm2", "llama3", "llama-linear", "llama-dynamic", "qwen2", "qwen3"])
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_configs_as_transformers_4_wrote_them(copy: Callable[[str], Path], name: str, type_key: str) -> None:
    """`rope_theta` beside `rope_scaling`, which is null for none."""
    folder = copy(name)
    wanted = open_checkpoint(folder).config
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    edit(folder, {"rope_parameters": None, "rope_theta": theta})
    text = (folder / "config.json").read_text()
    scaling = "null" if kind == "default" else json.dumps({type_key: kind, **rope})
    (folder / "config.json").write_text(text[:-1] + f', "rope_scaling": {scaling}}}')
    assert open_checkpoint(folder).config == wanted


@pytest.mark.parametrize(
    ("name", "missing", "changed"),
    [
        ("llama", ["rms_norm_eps", "head_dim", "tie_word_embeddings", "rope_parameters", "attention_bias"], {}),
        ("llama", ["num_key_value_heads", "hidden_act", "mlp_bias"], {}),
        ("tinyllama", ["max_position_embeddings"], {"context": 2048}),
        ("mistral", ["max_position_embeddings", "sliding_window"], {"context": 131072, "window": 4096}),
        ("qwen2", ["max_position_embeddings", "layer_types", "use_sliding_window"], {"context": 32768}),
        ("qwen2-tied-window", ["layer_types"], {}),
        ("qwen2-tied-window", ["layer_types", "sliding_window"], {"window": 4096}),
    ],
)
def test_keys_that_are_missing_have_transformers_defaults(
    copy: Callable[[str], Path], name: str, missing: list[str], changed: dict[str, Any]
) -> None:
    folder = copy(name)
    wanted = replace(open_checkpoint(folder).config, **changed)
    assert open_checkpoint(edit(folder, dict.fromkeys(missing))).config == wanted


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [
        (YARN | {"attention_factor": 1.0}, RopeScaling("yarn", 4.0, original_context=64)),
        (YARN | {"factor": None, "original_max_position_embeddings": 32, "attention_factor": 1.0},
         RopeScaling("yarn", 2.0, original_context=32)),
        (LONGROPE, RopeScaling("longrope", original_context=64, factors=(1.0, 1.0), long_factors=(1.0, 2.0))),
        (LONGROPE | {"type": "su", "rope_type": None},
         RopeScaling("longrope", original_context=64, factors=(1.0, 1.0), long_factors=(1.0, 2.0))),
    ],
)  # fmt: skip
def test_keys_of_scaling_that_are_missing(
    copy: Callable[[str], Path], scaling: dict[str, Any], wanted: RopeScaling
) -> None:
    assert open_checkpoint(edit(copy("llama"), {"rope_parameters": scaling})).config.rope_scaling == wanted


@pytest.mark.parametrize(
    "name", ["llama3", "llama-linear", "llama-yarn-mscale", "qwen3-yarn-attention", "llama-longrope"]
)
def test_what_is_written_is_read(name: str) -> None:
    config = open_checkpoint(HF / f"{name}-0").config
    written = json.loads(json.dumps(config_json(config, "float32", {})))
    assert config_of(Keys(written, "config.json", "configuration")) == config


def test_what_config_json_cannot_hold() -> None:
    config = open_checkpoint(HF / "llama-linear-0").config
    config = replace(config, rope_scaling=RopeScaling("linear", 4.0, attention_factor=2.0))
    with pytest.raises(UnsupportedError, match="no attention factor for linear"):
        config_json(config, "float32", {})


def test_layer_types_of_a_mistral(copy: Callable[[str], Path]) -> None:
    """transformers' AutoModel makes a Ministral of it."""
    folder = copy("mistral")
    assert open_checkpoint(edit(folder, {"layer_types": ["sliding_attention"] * 2})).config.window > 0
    assert open_checkpoint(edit(folder, {"layer_types": ["full_attention"] * 2})).config.window == 0


def test_names_of_one_thing(copy: Callable[[str], Path]) -> None:
    folder = copy("llama3")
    expected = open_checkpoint(folder).config
    assert open_checkpoint(edit(folder, {"hidden_act": "swish"})).config == expected
    scaling = open_checkpoint(edit(folder, {"original_max_position_embeddings": 16})).config.rope_scaling
    assert scaling is not None and scaling.original_context == 16, "as in transformers: the outer one first"


def test_null_is_no_window(copy: Callable[[str], Path]) -> None:
    for name in ("mistral", "qwen2-tied-window"):
        folder = edit(copy(name), {"sliding_window": None, "layer_types": None})
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text[:-1] + ', "sliding_window": null}')
        assert open_checkpoint(folder).config.window == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "gemma2"}, "model_type is 'gemma2'; supported are llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("mistral", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("llama", {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "rope_type of rope_parameters is 'ntk'"),
        ("llama", {"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope_type of rope_scaling is 'mrope'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set for all layers is"),
        ("qwen2-tied-window", {"layer_types": ["full_attention", "sliding_attention"]}, "1 of 2 layers a sliding"),
        ("qwen2-tied-window", {"layer_types": None, "max_window_layers": 1}, "max_window_layers gives 1 of 2 layers"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "1 of 2 layers a sliding"),
    ],
)
def test_what_is_not_computed_is_named(
    copy: Callable[[str], Path], name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(edit(copy(name), changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "key hidden_size; expected a whole number; found no such key"),
        ({"hidden_size": "16"}, "key hidden_size.*found '16'"),
        ({"hidden_size": True}, "key hidden_size"),
        ({"hidden_size": 1 << 40}, "key hidden_size"),
        ({"hidden_size": 10**30}, "key hidden_size.*beyond 64 bits"),
        ({"hidden_size": 18}, "wrong shape"),
        ({"num_attention_heads": 0}, "key num_attention_heads"),
        ({"num_attention_heads": 100, "head_dim": None}, "head_dim"),
        ({"num_key_value_heads": 3}, "multiple of n_kv_heads"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight"),
        ({"num_hidden_layers": 2000}, "from 1 to 1,024"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"rms_norm_eps": -1.0}, "norm_eps"),
        ({"rms_norm_eps": "small"}, "key rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
        ({"rope_parameters": [1]}, "key rope_parameters; expected an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "key factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}}, "key high_freq_factor"),
        ({"rope_parameters": YARN | {"factor": 0.5}}, "factor must be at least 1"),
        ({"rope_parameters": YARN | {"beta_slow": 64.0}}, "0 < beta_slow <= beta_fast"),
        ({"rope_parameters": YARN | {"truncate": 1}}, "key truncate"),
        ({"rope_parameters": YARN | {"rope_theta": 1.0}}, "rope_theta above 1"),
        ({"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": -9.0}}, "key mscale_all_dim"),
        ({"rope_parameters": YARN | {"attention_factor": 0}}, "attention_factor must be positive"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 1.0]}}, "key long_factor"),
        ({"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "2 pairs per head, found 1 factors"),
        ({"rope_parameters": LONGROPE | {"long_factor": [1.0, "2"]}}, "key long_factor; expected a list of numbers"),
        ({"rope_parameters": LONGROPE | {"short_factor": 1.0}}, "key short_factor; expected a list of numbers"),
        ({"rope_parameters": LONGROPE | {"short_factor": [1.0, 0.0]}}, "factors must be positive"),
        ({"tie_word_embeddings": 1}, "key tie_word_embeddings"),
        ({"eos_token_id": "2"}, ""),  # generation_config.json is asked first
    ],
)
def test_impossible_configs(copy: Callable[[str], Path], changes: dict[str, Any], message: str) -> None:
    folder = edit(copy("llama"), changes)
    if not message:
        assert open_checkpoint(folder).stop_token_ids == (2,)
        (folder / "generation_config.json").unlink()
        message = "key eos_token_id"
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)
