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
from .fusion import fuse
from .graph import KVLayout, build
from .ir import Graph
from .memory import format_bytes
from .plan import Plan, lower
from .quantization.types import FALLBACK_TYPE

_LATER_LAYER = re.compile(r"\blayers\.[1-9]")


class Inspection:
    """Result of `numballama.inspect`. Prints as a report.

    `format`, `config`, `tokenizer`, `notes`, `tensors` (name → (type, shape)), `graph` (one token, as declared),
    `plan` (the graph fused and lowered for the CPU with one worker; no kernel is compiled), `memory` (bytes of weights,
    KV cache and arena).
    """

    def __init__(self, path: str | PathLike[str] | None, tokenizer: str | PathLike[str] | None = None) -> None:
        checkpoint = loader.open_checkpoint(path, tokenizer)
        self.path, self.format = checkpoint.path, checkpoint.format
        self.config: ModelConfig = checkpoint.config
        self.tokenizer, self.notes = checkpoint.tokenizer, checkpoint.notes
        self.tensors = {name: (str(weight.type), weight.shape) for name, weight in checkpoint.weights.items()}
        self.kv = KVLayout.of(self.config, self.config.default_context)
        self._weight_bytes = checkpoint.nbytes
        types = {name: FALLBACK_TYPE.get(weight.type.name, weight.type) for name, weight in checkpoint.weights.items()}
        self.graph: Graph = build(self.config, types, self.kv, int8_activations=checkpoint.int8_activations)

    @cached_property
    def plan(self) -> Plan:
        return lower(fuse(self.graph, "cpu"), "cpu")

    @property
    def parameters(self) -> int:
        """Number of parameters: elements of all weights."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes of `weights` (mapped, not copied), `kv_cache` (float32, default context) and `arena` (one token)."""
        return {"weights": self._weight_bytes, "kv_cache": self.kv.nbytes, "arena": self.plan.arena_bytes}

    def to_dict(self) -> dict[str, Any]:
        """Everything except graph and plan, as JSON values."""
        return {
            "path": str(self.path),
            "format": self.format,
            "config": dataclasses.asdict(self.config),
            "parameters": self.parameters,
            "tensors": {name: {"type": kind, "shape": list(shape)} for name, (kind, shape) in self.tensors.items()},
            "memory": self.memory,
            "tokenizer": None if self.tokenizer is None else {"vocab_size": self.tokenizer.vocab_size},
            "notes": self.notes,
        }

    def report(self, full: bool = False) -> str:
        """The report as text. Unless `full`, only the first layer is listed; the others are like it."""

        def shorten(text: str) -> list[str]:
            lines = text.splitlines()
            # a line with an arrow has its result, which names the layer, after the arrow
            return lines if full else [line for line in lines if not _LATER_LAYER.search(line.rpartition("→")[2])]

        rest = (
            "" if full or self.config.n_layers == 1 else f" (layers 1 to {self.config.n_layers - 1} are like layer 0)"
        )
        memory = self.memory
        lines = [
            f"{self.path}",
            f"  format      {self.format}",
            f"  parameters  {self.parameters:,}",
            f"  tokenizer   {'none' if self.tokenizer is None else f'{self.tokenizer.vocab_size:,} tokens'}",
            *(f"  note        {note}" for note in self.notes),
            "",
            "config",
            *(f"  {name:16} {value}" for name, value in dataclasses.asdict(self.config).items()),
            "",
            "memory",
            f"  weights     {format_bytes(memory['weights'])}, mapped from the file",
            f"  KV cache    {format_bytes(memory['kv_cache'])} for {self.kv.tokens:,} tokens, {self.kv.dtype}",
            f"  arena       {format_bytes(memory['arena'])} for one token",
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

    def __str__(self) -> str:
        return self.report()

    def __repr__(self) -> str:
        return f"<Inspection of {self.path}: {self.format}, {self.parameters:,} parameters>"
