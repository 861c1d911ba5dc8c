"""Gives the tensors of a file the names that transformers uses, whichever program saved them.

A base model saved by itself lacks the prefix `model.`; `torch.compile`, data parallelism, LoRA's tools and models of
text and images put their own in front. Buffers, which are computed from the configuration, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import dropwhile
from pathlib import Path

from ...errors import FormatError, UnsupportedError
from ..tensor_names import is_buffer
from ..tensors import TensorInfo

_INSIDE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that wrappers of a model, and of parts of it, put anywhere."""
_OUTSIDE = {"model", "module", "base_model", "language_model", "text_model", "_forward_module"}
"""Parts of names that wrappers put in front, one or more in any order."""
_BASE = re.compile(r"(embed_tokens|layers|norm)\.")
_HEAD = "lm_head."
_ADAPTER = "a LoRA adapter: merge it into its model first (peft's merge_and_unload)"
_NATIVE = "a name of Meta's and Mistral's own programs: take the model in Hugging Face's format"
_FOREIGN = {
    **dict.fromkeys(("lora_", ".base_layer.", ".modules_to_save.", ".original_module."), _ADAPTER),
    ".qkv_proj.": "q, k and v in one matrix: save the model with transformers",
    ".gate_up_proj.": "gate and up in one matrix: save the model with transformers",
    **dict.fromkeys(("tok_embeddings.", ".attention.w", ".feed_forward.w"), _NATIVE),
    "score.": "a classifier of texts, which is no language model",
    "v_head.": "a value head, which reinforcement learning trains: save the model without it",
    ".experts.": "a mixture of experts",
    ".absmax": "quantised by bitsandbytes",
    ".weight_scale": "quantised to FP8 or by compressed-tensors",
    "vision": "a model of text and images",
}
"""Part of a tensor's name → what such a file is."""


def rename(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Name in transformers → tensor, without buffers. A name that is no weight's, or a second time the same, stays."""
    plain = {name: _plain(name) for name in tensors if not is_buffer(name)}
    found = {name: tensors[name] for name, own in plain.items() if own == name}
    for name, own in plain.items():
        if own != name:
            found[name if own in found else own] = tensors[name]
    return found


def _plain(name: str) -> str:
    """The name of a weight in transformers, without what wrappers add. Other names stay."""
    parts = [part for part in name.split(".") if part not in _INSIDE]
    own = ".".join(dropwhile(_OUTSIDE.__contains__, parts))
    if own.startswith(_HEAD):
        return own
    return f"model.{own}" if _BASE.match(own) else name


def no_place(info: TensorInfo, name: str, kind: str) -> UnsupportedError:
    """The error for a tensor that a model of this `model_type` does not have."""
    return UnsupportedError(
        f"{info.file.path}: tensor {name[:100]} has no place in a {kind} model of this version{_reason(name)}"
    )


def missing(directory: Path, name: str, shape: tuple[int, ...], others: Collection[str]) -> FormatError:
    """The error for a weight that is not there. `others` are tensors without a place; the likeliest is named."""
    found = "none"
    if others:
        near = max(sorted(others), key=lambda other: sum(a == b for a, b in zip(name, other, strict=False)))
        found = f"none, but {near[:100]}{_reason(near)}"
    return FormatError("a tensor is missing", path=directory, where=f"tensor {name}", expected=shape, found=found)


def _reason(name: str) -> str:
    return next((f": {what}" for part, what in _FOREIGN.items() if part in name), "")
