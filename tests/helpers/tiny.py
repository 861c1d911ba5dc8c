"""A tiny random model with a tokenizer of 300 tokens, for tests of the code around the kernels."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numballama import Model
from numballama.config import ModelConfig
from numballama.cpu import CpuBackend
from numballama.generate import GenerationResponse

CHUNK = CpuBackend.prefill_chunk
"""Tokens of a prompt in one run."""
TINY = ModelConfig(16, 24, 2, 4, 2, 300, 2 * CHUNK + 10)
WORDS = [
    " ",
    *"abcdefghijklmnopqrstuvwxyz",
    " the",
    "the",
    "th",
    "he",
    "ab",
    "abc",
    "é",
    "…",
    " a",
    " b",
    " story",
    "story",
]
FIRST_BYTE, FIRST_WORD = 3, 259
"""Ids of the byte 0 and of the first of WORDS."""


def write_tokenizer(path: Path) -> Path:
    """A llama2.c tokenizer of 300 tokens: bytes, letters, a few words."""
    bytes_ = [b"<0x%02X>" % byte for byte in range(256)]
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *bytes_, *(word.encode() for word in WORDS)]
    pieces += [b"w%d" % index for index in range(300 - len(pieces))]
    entries = (struct.pack("<fi", float(len(piece)), len(piece)) + piece for piece in pieces)
    path.write_bytes(struct.pack("<i", max(map(len, pieces))) + b"".join(entries))
    return path


def ids_of(model: Model, text: str) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode(text, bos=False)


def joined(responses: Sequence[GenerationResponse]) -> str:
    return "".join(response.text for response in responses)


class InterruptAt:
    """A program's `run` that is interrupted at its nth call, before or after the computation."""

    def __init__(self, run: Any, nth: int, after: bool) -> None:
        self.run, self.left, self.after = run, nth, after

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = self.run(*args, **options)
        if self.left == 0:
            raise KeyboardInterrupt
        return result
