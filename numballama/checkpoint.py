"""`Checkpoint`, what every reader returns: a config, and named weights that are views of a mapped file."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .config import ModelConfig
from .errors import Error, UnsupportedError

if TYPE_CHECKING:
    from .quantization.types import WeightType
    from .tokenizers.base import Tokenizer


class Weight:
    """One tensor of a checkpoint, usually a view of its file. Immutable.

    `shape` is (rows, columns) or (length,). `data` holds the elements in C order: float32 for "f32", uint16 bit
    patterns for "f16" and "bf16", int8 for "int8", each of that shape. For block types it holds the bytes of the
    blocks: uint8 (rows, columns / block_size · block_bytes). `scales` is the float32 vector of an "int8" weight:
    element i of the flat data has scale i // group. Arrays may be read-only and, in some files, unaligned.
    """

    def __init__(
        self, shape: tuple[int, ...], type: WeightType, data: np.ndarray, scales: np.ndarray | None = None
    ) -> None:
        self.shape, self.type = shape, type
        self._data: np.ndarray | None = data
        self._scales = scales

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, type={self.type})"

    @property
    def data(self) -> np.ndarray:
        assert self._data is not None
        return self._data

    @property
    def scales(self) -> np.ndarray | None:
        return self._scales

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, scales included: what a step reads to use all of it."""
        return self.data.nbytes + (self.scales.nbytes if self.scales is not None else 0)


class LazyWeight(Weight):
    """A weight that `make` computes when `data` is asked for: each time, or once if `cache`."""

    def __init__(
        self, shape: tuple[int, ...], type: WeightType, make: Callable[[], Weight], cache: bool = False
    ) -> None:
        self.shape, self.type = shape, type
        self.make = make
        """Computes the weight. The caller may keep or change it."""
        self._cache = cache
        self._data = self._scales = None

    @property
    def data(self) -> np.ndarray:
        if self._data is not None:
            return self._data
        weight = self.make()
        self._scales = weight.scales  # small, and asked for next
        if self._cache:
            self._data = weight.data
        return weight.data

    @property
    def scales(self) -> np.ndarray | None:
        if self.type.group and self._scales is None:
            _ = self.data
        return self._scales

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(math.prod(self.shape))


def require_weights(config: ModelConfig, weights: Mapping[str, Weight]) -> None:
    """Raise `Error` unless `weights` are exactly those of `config`, each of the shape that it gives."""
    expected = config.weight_shapes()
    if wrong := expected.keys() ^ weights.keys():
        raise Error(f"weights and config do not belong together: {', '.join(sorted(wrong))} in one but not the other")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise Error(f"weight {name} has shape {weights[name].shape}, its config says {shape}")


def require_types(weights: Mapping[str, Weight], types: Collection[str], what: str) -> None:
    """Raise `UnsupportedError` for a weight whose type is not one of `types`: those that `what` can hold."""
    for name, weight in weights.items():
        if weight.type.name not in types:
            raise UnsupportedError(f"{what} cannot hold {name} as {weight.type}; convert it to {', '.join(types)}")


@dataclass
class Checkpoint:
    """An opened model file. No weight has been read yet."""

    path: Path
    format: str
    """Name that `inspect` prints: "llama2.c v0", "llama2.c v1", "llama2.c v2", "KuiperLLama fp32", "KuiperLLama int8",
    "GGUF v3", "Hugging Face, qwen2" or "Meta"."""
    config: ModelConfig
    weights: dict[str, Weight]
    """Name in `ModelConfig.weight_shapes` → weight."""
    int8_activations: bool = False
    """The format's own program (llama2.c's runq) multiplies int8 weights with int8 activations."""
    bos_is_stop_token: bool = False
    """Stories in this format end with BOS as well as with EOS."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a text or a turn according to the file. The tokenizer's EOS always ends a text."""
    tokenizer: Tokenizer | None = None
    tokenizer_path: str | None = None
    """Where the tokenizer is from, if the caller gave one beside the model."""
    tokenizer_error: str = ""
    """Why the file's own tokenizer was left out; "" if it was not, or there is none."""
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    """Name → chat template in jinja2. "default" is the usual one, "tool_use" the one for conversations with tools."""
    template_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that a template sees as variables, "pad_token" for instance → text of the token."""
    defaulted_fields: tuple[str, ...] = ()
    """Names of `ModelConfig` fields that have their default because neither the file nor the caller gives them."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user on how the file was interpreted, one sentence each."""

    @property
    def chat_template(self) -> str | None:
        """The chat template named "default"."""
        return self.chat_templates.get("default")

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises `Error`, which says how to give one, if there is none."""
        if self.tokenizer is None:
            why = f", because {self.tokenizer_error}" if self.tokenizer_error else ""
            raise Error(
                f"{self.path.name} carries no tokenizer{why}: pass its file to compile(…, tokenizer=…), "
                "--tokenizer on the command line"
            )
        return self.tokenizer

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a text: those of the file and of the tokenizer."""
        tokenizer = self.require_tokenizer()
        bos = {tokenizer.bos_id} if self.bos_is_stop_token and tokenizer.bos_id is not None else set()
        return tokenizer.eog_ids | bos | frozenset(self.stop_token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.nbytes for weight in self.weights.values())
