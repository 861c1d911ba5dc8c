"""Describes a model file and the memory that running it takes, without reading weights."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cached_property
from os import PathLike
from typing import Any

from . import loader
from .config import ModelConfig
from .cpu import ops  # noqa: F401 (registers the kernels)
from .engine.capacity import choose_context
from .fusion import fuse
from .graph import KVLayout, build
from .ir import Graph
from .memory import available_bytes, format_bytes
from .plan import Plan, lower
from .quantization import policy
from .quantization.types import KV_TYPES, KVType, WeightType
from .validation import require_supported, whole_number
from .visualize import card
from .visualize.html import fold, frame, page, printable
from .visualize.parts import bytes_by_part, layer_of, short_name


def first_layer(text: str) -> list[str]:
    """The lines of a graph or plan as text, without those of layers after the first."""
    # a line with an arrow has its result, which names the layer, after the arrow
    return [line for line in text.splitlines() if not _LATER_LAYER.search(line.rpartition("→")[2])]


_LATER_LAYER = re.compile(r"\blayers\.[1-9]")

PROMPT_TOKENS = 128
"""Tokens of a prompt in one run on the CPU: `CpuBackend.prefill_chunk`, which needs Numba."""
CONTEXTS = (512, 2048, 4096, 8192, 32768, 131072)
"""Contexts, in tokens, for which a report lists the memory: those up to the model's, and the one asked for."""


class Inspection:
    """Result of `numballama.inspect`. Prints as a report; a notebook shows a card, the graph and the memory map.

    `format`, `config`, `tokenizer`, `notes`, `tensors` (name → (type, shape) in the file), `graph` (one token, as
    declared), `plan` (the graph fused and lowered for the CPU with one worker; no kernel is compiled), `kv` (layout of
    the KV cache), `memory` (bytes of weights, KV cache and arenas), `memory_for` (the same for another context).
    """

    def __init__(
        self,
        path: str | PathLike[str] | None,
        tokenizer: str | PathLike[str] | None = None,
        *,
        context: int | None = None,
        kv_dtype: KVType | None = None,
        dtype: policy.Dtype | None = None,
        max_sequences: int = 1,
    ) -> None:
        require_supported("kv_dtype", kv_dtype, (None, *KV_TYPES))
        require_supported("dtype", dtype, (None, *policy.DTYPES))
        self.max_sequences = whole_number("max_sequences", max_sequences, 1)
        checkpoint = loader.open_checkpoint(path, tokenizer)
        self.path, self.format = checkpoint.path, checkpoint.format
        self.config: ModelConfig = checkpoint.config
        self.tokenizer, self.notes = checkpoint.tokenizer, list(checkpoint.notes)
        self.tensors = {name: (str(weight.type), weight.shape) for name, weight in checkpoint.weights.items()}
        self.context = choose_context(self.config, context, self.notes)
        self.kv = self._layout(self.context, kv_dtype or "f32")
        converted = policy.fallback_types(checkpoint.weights)
        converted |= policy.types_to_convert(self.config, checkpoint.weights, dtype)
        self._types: dict[str, WeightType] = {name: weight.type for name, weight in checkpoint.weights.items()}
        self._types |= converted
        self._weight_bytes = {name: weight.nbytes for name, weight in checkpoint.weights.items()}
        self._converted_bytes = {
            name: kind.nbytes(math.prod(self.tensors[name][1])) for name, kind in converted.items()
        }
        self._int8_activations = checkpoint.int8_activations
        self.graph: Graph = self._build(1)

    def _layout(self, context: int, dtype: KVType, max_sequences: int | None = None) -> KVLayout:
        return KVLayout.of(self.config, context, dtype, max_sequences or self.max_sequences)

    def _build(self, tokens: int) -> Graph:
        return build(self.config, self._types, self.kv, tokens, int8_activations=self._int8_activations)

    @cached_property
    def plan(self) -> Plan:
        return lower(fuse(self.graph, "cpu"), "cpu")

    @property
    def parameters(self) -> int:
        """Number of parameters: elements of all weights."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes on the CPU for the context and the types that were asked for.

        `weights` (used as they lie in the mapped file), `converted` (copies of another type), `kv_cache`, `arena` (one
        token), `prompt_arena` (a chunk of a prompt) and `total`. Python and compiled kernels come on top.
        """
        mapped = sum(nbytes for name, nbytes in self._weight_bytes.items() if name not in self._converted_bytes)
        prompt = lower(fuse(self._build(min(PROMPT_TOKENS, self.context)), "cpu"), "cpu")
        memory = {
            "weights": mapped,
            "converted": sum(self._converted_bytes.values()),
            "kv_cache": self.kv.nbytes,
            "arena": self.plan.arena_bytes,
            "prompt_arena": prompt.arena_bytes,
        }
        return memory | {"total": sum(memory.values())}

    def memory_for(
        self, context: int | None = None, kv_dtype: KVType | None = None, max_sequences: int | None = None
    ) -> dict[str, int]:
        """`memory` with another context in tokens, type of the KV cache or number of sequences. None: as inspected.

        Raises `UnsupportedError` for an unknown type, `Error` for numbers below 1.
        """
        require_supported("kv_dtype", kv_dtype, (None, *KV_TYPES))
        context = self.context if context is None else whole_number("context", context, 1)
        slots = None if max_sequences is None else whole_number("max_sequences", max_sequences, 1)
        cache = self._layout(context, kv_dtype or self.kv.dtype, slots).nbytes
        return self.memory | {"kv_cache": cache, "total": self.memory["total"] - self.memory["kv_cache"] + cache}

    @cached_property
    def _needs(self) -> dict[str, dict[int, int]]:
        """Type of the KV cache → context → bytes in all."""
        chosen = {context for context in CONTEXTS if context < self.config.context}
        contexts = sorted({*chosen, self.config.context, self.context})
        names: dict[str, KVType] = {"f32": "f32", "f16 or bf16": "f16", "q8_0": "q8_0"}
        return {
            shown: {context: self.memory_for(context, kind)["total"] for context in contexts}
            for shown, kind in names.items()
        }

    @property
    def _card(self) -> card.Card:
        memory, kv = self.memory, self.kv
        sized = [
            (name, str(self._types[name]), shape, self._converted_bytes.get(name, self._weight_bytes[name]))
            for name, (_, shape) in self.tensors.items()
        ]
        about = f"{self.format}, {self.parameters:,} parameters, {format_bytes(sum(self._weight_bytes.values()))}"
        facts = card.config_facts(self.config)
        facts.append(("tokenizer", "none" if self.tokenizer is None else f"{self.tokenizer.vocab_size:,} tokens"))
        sequences = "1 sequence" if kv.slots == 1 else f"{kv.slots:,} sequences"
        rows: list[tuple[str, int | None, str]] = [
            ("weights", memory["weights"], "mapped from the file"),
            ("converted", memory["converted"], "weights of another type than the file's, copied"),
            ("KV cache", memory["kv_cache"], f"{kv.tokens:,} tokens, {kv.dtype}; {sequences} of up to {kv.context:,}"),
            ("arena", memory["arena"], f"for one token; {format_bytes(memory['prompt_arena'])} for a prompt's chunk"),
            ("total", memory["total"], "without Python and compiled kernels"),
        ]
        rows = [row for row in rows if row[1]]
        parts = bytes_by_part(sized, self.config.tied_embeddings)
        return card.Card(str(self.path), about, facts, parts, rows, self._needs, available_bytes(), self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Everything except graph and plan, as JSON values."""
        return {
            "path": str(self.path),
            "format": self.format,
            "config": dataclasses.asdict(self.config),
            "parameters": self.parameters,
            "tensors": {name: {"type": kind, "shape": list(shape)} for name, (kind, shape) in self.tensors.items()},
            "context": self.context,
            "kv_dtype": self.kv.dtype,
            "max_sequences": self.max_sequences,
            "memory": self.memory,
            "tokenizer": None if self.tokenizer is None else {"vocab_size": self.tokenizer.vocab_size},
            "notes": self.notes,
        }

    def report(self, full: bool = False) -> str:
        """The report as text. Unless `full`, only the first layer is listed; the others are like it."""

        def shorten(text: str) -> list[str]:
            return text.splitlines() if full else first_layer(text)

        rest = "" if full or self.config.n_layers == 1 else f" ({self._other_layers})"
        lines = [
            card.as_text(self._card),
            "",
            f"tensors{rest}",
            *shorten(
                "\n".join(f"  {name:24} {kind:8} {' × '.join(map(str, s))}" for name, (kind, s) in self.tensors.items())
            ),
            "",
            *shorten(str(self.graph)),
            "",
            *shorten(str(self.plan)),
        ]
        return "\n".join(lines)

    @property
    def _other_layers(self) -> str:
        """What a report says of the layers after the first."""
        tensors = [
            {short_name(name): kind for name, (kind, _) in self.tensors.items() if layer_of(name) == layer}
            for layer in range(self.config.n_layers)
        ]
        if all(each == tensors[0] for each in tensors):
            return f"layers 1 to {self.config.n_layers - 1} are like layer 0"
        return f"layer 0 only; others of the {self.config.n_layers} layers have other types: all with --full"

    def page(self) -> str:
        """A page of HTML for a browser: the card, the graph and the plan."""
        return page(self.path.name, card.as_html(self._card), self.graph._repr_html_(), self.plan._repr_html_())

    def __str__(self) -> str:
        return self.report()

    def _repr_html_(self) -> str:
        """The card, for a notebook, with the graph and the plan's memory map folded below it."""
        folded = fold("graph", self.graph._repr_html_()) + fold("plan and memory map", self.plan._repr_html_())
        return card.as_html(self._card) + frame(folded, box=False)

    def __repr__(self) -> str:
        return f"<Inspection of {printable(str(self.path))}: {self.format}, {self.parameters:,} parameters>"
