"""Readers and writers of checkpoint formats, one module for each family."""

from __future__ import annotations

from collections.abc import Callable

from .gguf_writer import write_gguf
from .hf_writer import write_safetensors
from .kuiper import write_fp32, write_int8
from .llama2c import write_v0, write_v1, write_v2

WRITERS: dict[str, Callable[..., list[str]]] = {
    "llama2c-v0": write_v0,
    "llama2c-v1": write_v1,
    "llama2c-v2": write_v2,
    "kuiper": write_fp32,
    "kuiper-int8": write_int8,
    "gguf": write_gguf,
    "safetensors": write_safetensors,
}
"""Name → `write(path, config, weights)`; the int8 formats take `group_size` as well, GGUF a `tokenizer` and more.
safetensors writes a directory. Each returns notes on what the format cannot hold."""
