"""Small random checkpoints as Meta published them, and the logits of Hugging Face transformers for them:
tests/golden/meta.

    python tests/golden/make_meta.py tests/golden/meta      # transformers 5.23.0, torch 2.13.0 (CPU)

The tensors go to transformers by the permutation of its own convert_llama_weights_to_hf.py; `expected.npz` holds `ids`
and float32 `logits` [tokens, vocab]. `legacy.pth` is a file from before PyTorch 1.6.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

DIM, FFN, LAYERS, HEADS, KV_HEADS, VOCAB, TOKENS = 16, 24, 2, 4, 2, 40, 24
BASE = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "multiple_of": 8, "norm_eps": 1e-5}
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES = {
    "llama2": (BASE | {"vocab_size": -1, "n_kv_heads": KV_HEADS}, 1, torch.bfloat16),
    "llama2-2-parts": (BASE | {"vocab_size": -1, "n_kv_heads": KV_HEADS}, 2, torch.float16),
    "llama3.1-2-parts": (
        BASE | {"vocab_size": VOCAB, "n_kv_heads": KV_HEADS, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0}
        | {"use_scaled_rope": True, "rope_scaling_factor": 8.0},
        2,
        torch.bfloat16,
    ),
}  # fmt: skip
HF_NAMES = {
    "attention_norm": "input_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    kv = KV_HEADS * DIM // HEADS
    shapes = {"tok_embeddings.weight": (VOCAB, DIM), "norm.weight": (DIM,), "output.weight": (VOCAB, DIM)}
    for layer in range(LAYERS):
        for name, shape in {
            "attention.wq": (DIM, DIM), "attention.wk": (kv, DIM), "attention.wv": (kv, DIM),
            "attention.wo": (DIM, DIM),
            "feed_forward.w1": (FFN, DIM), "feed_forward.w2": (DIM, FFN), "feed_forward.w3": (FFN, DIM),
            "attention_norm": (DIM,), "ffn_norm": (DIM,),
        }.items():  # fmt: skip
            shapes[f"layers.{layer}.{name}.weight"] = shape
    return {
        name: (torch.randn(shape) * shape[-1] ** -0.5 if len(shape) == 2 else 1 + 0.2 * torch.randn(shape)).to(dtype)
        for name, shape in shapes.items()
    }


def part(name: str, tensor: torch.Tensor, index: int, parts: int, rows: bool) -> torch.Tensor:
    """Meta's model parallelism: `rows` for Llama 3's vocabulary."""
    if tensor.ndim == 1 or parts == 1:
        return tensor
    columns = name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok_") and not rows)
    return tensor.chunk(parts, dim=1 if columns else 0)[index].clone()


def permute(w: torch.Tensor, heads: int) -> torch.Tensor:
    return w.view(heads, w.shape[0] // heads // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def in_transformers(params: dict, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    rope = {"rope_theta": params.get("rope_theta", 10000.0), "rope_type": "default"}
    if params.get("use_scaled_rope"):
        rope |= {"rope_type": "llama3"} | SCALED
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, rms_norm_eps=params["norm_eps"], rope_parameters=rope,
        max_position_embeddings=131072,
        attn_implementation="eager",
    )  # fmt: skip
    state = {}
    for name, tensor in weights.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            short = rest.removesuffix(".weight")
            if short in ("attention.wq", "attention.wk"):
                tensor = permute(tensor, HEADS if short == "attention.wq" else KV_HEADS)
            state[f"model.layers.{layer}.{HF_NAMES[short]}.weight"] = tensor.float()
        else:
            theirs = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
            state[f"{theirs[name.removesuffix('.weight')]}.weight"] = tensor.float()
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(state)
    return model


target = Path(sys.argv[1])
shutil.rmtree(target, ignore_errors=True)
for number, (name, (params, parts, dtype)) in enumerate(CASES.items()):
    torch.manual_seed(number)
    folder = target / name
    folder.mkdir(parents=True)
    weights = tensors(dtype)
    for index in range(parts):
        own = {key: part(key, tensor, index, parts, "llama3" in name) for key, tensor in weights.items()}
        if "llama2" in name:
            own["rope.freqs"] = torch.arange(DIM // HEADS // 2, dtype=torch.float32)
        torch.save(own, folder / f"consolidated.{index:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    ids = torch.randint(0, VOCAB, (1, TOKENS))
    with torch.no_grad():
        logits = in_transformers(params, weights)(ids, use_cache=False).logits[0]
    np.savez(folder / "expected.npz", ids=ids[0].numpy().astype(np.int32), logits=logits.numpy())
torch.save({"norm.weight": torch.ones(4)}, target / "legacy.pth", _use_new_zipfile_serialization=False)
