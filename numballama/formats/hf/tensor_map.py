"""Gives the tensors of a file the names that transformers uses, whichever program saved them.

A base model saved by itself lacks the prefix `model.`; `torch.compile`, data parallelism and LoRA's tools put their own
in front. Buffers, which are computed from the configuration, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import UnsupportedError
from ..tensors import TensorInfo

_WRAPPERS = re.compile(r"((_orig_mod|module|base_model)\.|(?<=base_model\.)model\.)+")
"""What wrappers of a model put before its own names."""
_BASE = re.compile(r"(embed_tokens|layers|norm)\.")
_BUFFERS = re.compile(
    r".*\brotary(_pos)?_emb\.((original_)?inv_freq|(cos|sin)_cached)|.*\.(masked_bias|causal_mask|position_ids)"
    r"|.*\battn\.bias|.*\.rotary_emb\.\w*_cached|.*_extra_state"
)
_FOREIGN = {
    "lora_": "a LoRA adapter: merge it into its model first (peft's merge_and_unload)",
    ".experts.": "a mixture of experts",
    ".absmax": "quantised by bitsandbytes",
    ".weight_scale": "quantised to FP8 or by compressed-tensors",
    "vision": "a model of text and images",
}
"""Part of a tensor's name → what such a file is."""


def is_buffer(name: str) -> bool:
    """Whether the tensor is a buffer: a table that a program computes and needs not save."""
    return _BUFFERS.fullmatch(name) is not None


def rename(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Name in transformers → tensor, without buffers."""
    plain: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        short = name[match.end() :] if (match := _WRAPPERS.match(name)) else name
        if not is_buffer(short):
            plain[short if short not in plain else name] = info
    if any(name.startswith("model.") for name in plain):
        return plain
    return {f"model.{name}" if _BASE.match(name) else name: info for name, info in plain.items()}


def no_place(info: TensorInfo, name: str, kind: str) -> UnsupportedError:
    """The error for a tensor that a model of this `model_type` does not have."""
    reason = next((f": {what}" for part, what in _FOREIGN.items() if part in name), "")
    return UnsupportedError(
        f"{info.file.path}: tensor {name[:100]} has no place in a {kind} model of this version{reason}"
    )
