"""Gives the tensors of a file the names that transformers uses, whichever program saved them.

A base model saved by itself lacks the prefix `model.`; `torch.compile`, data parallelism, LoRA's tools and models of
text and images put their own in front. Buffers, which are computed from the configuration, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import dropwhile

from ...errors import UnsupportedError
from ..tensor_names import is_buffer
from ..tensors import TensorInfo

_INSIDE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that wrappers of a model, and of parts of it, put anywhere."""
_OUTSIDE = {"model", "module", "base_model", "language_model", "text_model", "_forward_module"}
"""Parts of names that wrappers put in front, one or more in any order."""
_BASE = re.compile(r"(embed_tokens|layers|norm)\.")
_HEAD = "lm_head."
_FOREIGN = {
    "lora_": "a LoRA adapter: merge it into its model first (peft's merge_and_unload)",
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
    reason = next((f": {what}" for part, what in _FOREIGN.items() if part in name), "")
    return UnsupportedError(
        f"{info.file.path}: tensor {name[:100]} has no place in a {kind} model of this version{reason}"
    )
