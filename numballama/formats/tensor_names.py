"""Names of a model's weights in a file format, and of tensors in PyTorch's files that are no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorNames:
    """Name of a weight in `ModelConfig.weight_shapes` → name of the tensor in a format's files."""

    top: Mapping[str, str]
    """Weights outside the layers: "tok_embeddings" → the whole name."""
    layer: Mapping[str, str]
    """Weights of a layer: "wq" → the name after `prefix` and the layer's number."""
    prefix: str

    def __getitem__(self, name: str) -> str:
        if name in self.top:
            return self.top[name]
        _, layer, short = name.split(".")
        return f"{self.prefix}.{layer}.{self.layer[short]}"


_BUFFERS = re.compile(
    r"""(.+\.)?(
      (rotary\w*|rope)\.(?!(weight|bias)$)[\w.]+       # whatever a module for RoPE holds
    | (\w*_)?inv_freq(_\w+)? | freqs(_(cis|cos|sin))? | (cos|sin|cos_sin)(_cached?)?
    | masked_bias | (attn|attention)\.(bias|mask) | (causal|attn|attention)_mask | mask | tril | position_ids
    | (\w+_)?(kv?|v)_cache | cache_[kv] | kv_cache\.\w+ | _extra_state
    )""",
    re.VERBOSE,
)


def is_buffer(name: str) -> bool:
    """Whether a tensor is a buffer (a table for RoPE, a mask, a cache), which is computed and not loaded."""
    return _BUFFERS.fullmatch(name) is not None
