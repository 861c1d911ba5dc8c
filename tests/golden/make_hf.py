"""Small random models of every architecture, written by Hugging Face transformers, with its logits: tests/golden/hf.

    python tests/golden/make_hf.py tests/golden/hf [CASE …]     # transformers 5.23.0 (yarn, longrope: 5.24.0), torch

Each folder is what `save_pretrained` writes, and `expected.npz`: `ids` and float32 `logits` [tokens, vocab] of one
forward pass over them, computed in float32 whatever the type of the stored weights.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32  # pairs of every kind: kept, on the ramp, divided
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 5.0, 9.5]}
TOKENS = 48
CASES = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "tinyllama": ("llama", {"rms_norm_eps": 1e-5}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}),
    "llama3": ("llama", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-dynamic": (
        "llama",
        {
            "head_dim": 8,
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        },
    ),
    "llama-yarn": ("llama", {"head_dim": 16, "max_position_embeddings": 128, "rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"head_dim": 16, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
    ),
    "qwen3-yarn-attention": (
        "qwen3",
        {"head_dim": 8, "rope_parameters": YARN | {"attention_factor": 1.7, "beta_fast": 4.0, "beta_slow": 0.5}},
    ),
    "llama-longrope": ("llama", {"head_dim": 8, "max_position_embeddings": 128, "rope_parameters": LONGROPE}),
    "llama-longrope-short": (
        "llama",
        {"head_dim": 8, "rope_parameters": LONGROPE | {"original_max_position_embeddings": 48, "factor": 8.0}},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "qwen2-tied-window": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {"head_dim": 8, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "qwen3-biases": ("qwen3", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True}),
    "llama-bf16": ("llama", {"dtype": "bfloat16"}),
    "olmo2": ("olmo2", {"dtype": "bfloat16"}),  # of docs/architecture.md, which adds it
    "qwen3-f16-sharded": ("qwen3", {"head_dim": 8, "dtype": "float16"}),
}
SEEDS = {"olmo2": (0,)}
CHOSEN = sys.argv[2:] or list(CASES)


def make(folder: Path, kind: str, options: dict, seed: int) -> None:
    options = dict(options)
    dtype = getattr(torch, options.pop("dtype", "float32"))
    config = AutoConfig.for_model(
        kind, **(SHAPE | options), bos_token_id=1, eos_token_id=2, attn_implementation="eager"
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:  # rows of about unit length: activations near 1, so that every mistake shows
                weight.normal_(0, weight.shape[1] ** -0.5)
            elif name.endswith("norm.weight"):
                weight.normal_(1, 0.2)
            else:
                weight.normal_(0, 0.3)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, **({"max_shard_size": "5KB"} if "sharded" in folder.name else {}))
    ids = torch.randint(0, config.vocab_size, (1, TOKENS))
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = oracle(ids, use_cache=False).logits[0]
    np.savez(folder / "expected.npz", ids=ids[0].numpy().astype(np.int32), logits=logits.numpy())


for name, (kind, options) in ((name, CASES[name]) for name in CHOSEN):
    for seed in SEEDS.get(name, (0, 1)):
        make(Path(sys.argv[1]) / f"{name}-{seed}", kind, options, seed)
