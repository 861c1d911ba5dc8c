"""Names of a model's weights in a file format."""

from __future__ import annotations

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
