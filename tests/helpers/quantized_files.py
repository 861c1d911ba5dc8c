"""Directories whose matrices are quantised as MLX, GPTQ and AWQ do, packed element by element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.hf_files import save_tensors

DIM, HIDDEN, VOCAB = 64, 128, 40
SHAPES = {
    "self_attn.q_proj": (DIM, DIM), "self_attn.k_proj": (DIM // 2, DIM), "self_attn.v_proj": (DIM // 2, DIM),
    "self_attn.o_proj": (DIM, DIM), "mlp.gate_proj": (HIDDEN, DIM), "mlp.up_proj": (HIDDEN, DIM),
    "mlp.down_proj": (DIM, HIDDEN),
}  # fmt: skip
OURS = dict(zip(SHAPES, ("wq", "wk", "wv", "wo", "w1", "w3", "w2"), strict=True))
CONFIG = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": HIDDEN,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's packing: the element that stands at each position of a word, lowest bits first."""


def pack(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Integers → 32-bit words along the last dimension, one element after another."""
    if 32 % bits:  # MLX's, across the ends of words
        rows = [sum(int(q) << bits * at for at, q in enumerate(row)) for row in values.reshape(-1, values.shape[-1])]
        size = values.shape[-1] * bits // 8
        return np.frombuffer(b"".join(row.to_bytes(size, "little") for row in rows), "<u4").reshape(len(values), -1)
    count = 32 // bits
    words = np.zeros((*values.shape[:-1], values.shape[-1] // count), np.uint32)
    for word in range(words.shape[-1]):
        for position, element in enumerate(order or range(count)):
            words[..., word] |= values[..., word * count + element].astype(np.uint32) << np.uint32(bits * position)
    return words


def write(
    folder: Path, method: str, bits: int, group: int, rng: np.random.Generator, dtype: str = "float16", **more: Any
) -> dict[str, np.ndarray]:
    """A directory with one layer of random quantised matrices; returns our name → their values in float64.

    `more` may have "order" (GPTQ's act-order), "zero" (what GPTQ subtracts from a stored zero), "biases".
    """
    folder.mkdir()
    arrays: dict[str, np.ndarray] = {}
    wanted = {}
    zero_add = more.get("zero", 1)
    for name, (rows, columns) in SHAPES.items():
        base, count = f"model.layers.0.{name}.", columns // group
        q = rng.integers(0, 1 << bits, (rows, columns))
        scale = (rng.random((rows, count)) * 0.02 + 0.001).astype(dtype)
        groups = np.arange(columns) // group
        if method == "mlx":
            offset = (-scale.astype(np.float32) * 7).astype(dtype)
            arrays |= {base + "weight": pack(q, bits), base + "scales": scale, base + "biases": offset}
            wide = np.repeat(offset.astype(np.float64), group, 1)
        else:
            zeros = rng.integers(0, (1 << bits) - zero_add, (rows, count))
            order = AWQ_ORDER if method == "awq" else None
            packed = pack(q.T, bits, order) if method == "awq" else pack(q, bits).T
            if more.get("order"):
                groups = rng.permutation(groups)
            if method == "gptq":
                arrays[base + "g_idx"] = groups.astype(np.int32)
                zero_add = more.get("zero", 1)
            else:
                zero_add = 0
            arrays |= {
                base + "qweight": np.ascontiguousarray(packed).view(np.int32),
                base + "qzeros": pack(zeros.T, bits, order).view(np.int32),
                base + "scales": np.ascontiguousarray(scale.T),
            }
            wide = -(scale.astype(np.float64) * (zeros + zero_add))[:, groups]
            if more.get("biases"):
                arrays[base + "bias"] = np.zeros(rows, np.float16)
        wanted[f"layers.0.{OURS[name]}"] = scale.astype(np.float64)[:, groups] * q + wide
    plain = {"embed_tokens": (VOCAB, DIM), "norm": (DIM,)}
    plain |= {f"layers.0.{norm}": (DIM,) for norm in ("input_layernorm", "post_attention_layernorm")}
    for name, shape in plain.items():
        arrays[f"model.{name}.weight"] = rng.standard_normal(shape).astype(np.float16)
    quantization: dict[str, Any] = {"group_size": group, "bits": bits}
    if method != "mlx":
        quantization |= {"quant_method": method} | ({"checkpoint_format": "gptq_v2"} if zero_add == 0 else {})
    key = "quantization" if method == "mlx" else "quantization_config"
    (folder / "config.json").write_text(json.dumps(CONFIG | {key: quantization}))
    save_tensors(folder / "model.safetensors", arrays)
    return wanted
