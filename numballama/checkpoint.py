"""What a reader hands over: `Checkpoint`, a config with named weights that are views of an mmapped file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .config import ModelConfig

if TYPE_CHECKING:
    from .quantization.types import WeightType
    from .tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint, not copied from its file.

    `data` holds the payload in C order: float32 for "f32", uint16 bit patterns for "f16" and "bf16", int8 for "int8",
    shaped like `shape` (rows, columns) or (length,); for block types the blocks' bytes, uint8 (rows, columns / numbers
    of a block · bytes of a block, see `quantization.types`). `scales` is the float32 vector of an "int8" weight: number
    i of the flat payload has scale i // group. Views may be read-only and, in some files, unaligned.
    """

    shape: tuple[int, ...]
    type: WeightType
    data: np.ndarray
    scales: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes a step reads to use the whole weight."""
        return self.data.nbytes + (self.scales.nbytes if self.scales is not None else 0)


class LazyWeight(Weight):
    """A weight whose numbers are made when `data` is asked for: each time, or with `keep` once."""

    def __init__(
        self, shape: tuple[int, ...], type: WeightType, make: Callable[[], Weight], keep: bool = False
    ) -> None:
        vars(self).update(shape=shape, type=type, _make=make, _keep=keep, _made=None)

    def make(self) -> Weight:
        """The weight itself, made for the caller and not kept."""
        result: Weight = vars(self)["_make"]()
        return result

    def _result(self) -> Weight:
        own = vars(self)
        result: Weight = own["_made"] or self.make()
        if own["_keep"]:
            own["_made"] = result
        return result

    @property
    def data(self) -> np.ndarray:  # type: ignore[override]
        result = self._result()
        vars(self)["_scales"] = result.scales  # small, and asked for next
        return result.data

    @property
    def scales(self) -> np.ndarray | None:  # type: ignore[override]
        if self.type.group and "_scales" not in vars(self):
            vars(self)["_scales"] = self._result().scales
        return vars(self).get("_scales")

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(math.prod(self.shape))


@dataclass
class Checkpoint:
    """A model file, opened: nothing of its weights is read yet."""

    path: Path
    format: str
    """As `inspect` names it: "llama2.c v0", "llama2.c v1", "llama2.c v2", "KuiperLLama fp32", "KuiperLLama int8",
    "GGUF v3", "Hugging Face, qwen2" or "Meta"."""
    config: ModelConfig
    weights: dict[str, Weight]
    """Canonical name (see `ModelConfig.weight_shapes`) → weight."""
    int8_activations: bool = False
    """The format's own program multiplies int8 weights with int8 activations (llama2.c's runq)."""
    bos_is_stop_token: bool = False
    """Stories in this format end with BOS as well as with EOS."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that the file names as the end of a text or of a turn; the tokenizer's EOS ends a text anyway."""
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    assumed: tuple[str, ...] = ()
    """Names of the `ModelConfig` fields that the file does not state and nobody gave: their defaults stand."""
    notes: list[str] = field(default_factory=list)
    """What a user should know about how the file was understood, a sentence each."""

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.nbytes for weight in self.weights.values())
