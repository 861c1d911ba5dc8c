"""What transformers computes inside some of the small models of `hf/`: tests/golden/hf_values.npz.

    python tests/golden/make_hf_values.py tests/golden/hf tests/golden/hf_values.npz    # transformers 5.24.0

For each model, after the first `TOKENS` of its ids: attention probabilities of every layer [heads, T, T], every layer's
output [T, dim], and the logits if the model ended after a layer (final norm and classifier of that output) [T, vocab].
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

MODELS = ("mistral-0", "qwen3-0", "llama-biases-0")
"""A window of 8 tokens with shared keys; norms of q and k; biases, and heads of 6."""
TOKENS = 24

folder, target = Path(sys.argv[1]), Path(sys.argv[2])
arrays: dict[str, np.ndarray] = {}
for name in MODELS:
    ids = np.load(folder / name / "expected.npz")["ids"][:TOKENS]
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, attn_implementation="eager").eval()
    outputs: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: object, outputs: list[torch.Tensor] = outputs) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    with torch.no_grad():
        found = model(torch.tensor(ids[None]).long(), use_cache=False, output_attentions=True)
        for index, output in enumerate(outputs):
            arrays[f"{name}/layers.{index}.x_out"] = output.reshape(TOKENS, -1).numpy()
            arrays[f"{name}/layers.{index}.probabilities"] = found.attentions[index][0].numpy()
            arrays[f"{name}/layers.{index}.lens"] = model.lm_head(model.model.norm(output)).reshape(TOKENS, -1).numpy()
        assert torch.allclose(torch.tensor(arrays[f"{name}/layers.{index}.lens"]), found.logits[0], atol=1e-6)
np.savez_compressed(target, **arrays)
