"""sentencepiece models for tests: real ones and their llama2.c files, small trained ones, and what run.c computes."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from numballama.formats.gguf.writer import write_gguf
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.loader import open_checkpoint
from numballama.tokenizers.base import Tokenizer
from numballama.tokenizers.gguf import GgufTokenizer
from tests.helpers.gguf_files import CONFIG, weights_of

PAIRS = {"tok512": ("tok512.model", "tok512.bin"), "llama2": ("llama2_tokenizer.model", "tokenizer_llama2.bin")}
"""Model → its tokenizer as a sentencepiece model, and as a llama2.c file."""

FIXED = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
"""The pieces that every llama2.c file of a Llama begins with."""

Pair: TypeAlias = tuple[Tokenizer, Tokenizer, SentencePieceProcessor]
"""(ours from .model, ours from .bin, the library)."""

STORY_BEGINS = "once upon a time there was a little girl who loved to play in the garden with her red ball"
WORDS = STORY_BEGINS.split(" ")

_loaded: dict[Path, Tokenizer] = {}


def load(path: Path) -> Tokenizer:
    if path not in _loaded:
        _loaded[path] = load_tokenizer(path)
    return _loaded[path]


def write_bin(path: Path, pieces: Sequence[bytes], scores: Sequence[float]) -> Path:
    entries = (struct.pack("<fi", s, len(p)) + p for p, s in zip(pieces, scores, strict=True))
    path.write_bytes(struct.pack("<i", max(map(len, pieces))) + b"".join(entries))
    return path


def llama2c_encode(pieces: Sequence[bytes], scores: Sequence[float], text: str) -> list[int]:
    """run.c's encode(): look at every pair in each round. Control tokens and bytes cannot be spelled out."""
    vocabulary = {piece: token for token, piece in reversed(list(enumerate(pieces))) if token >= len(FIXED)}
    tokens: list[int] = []
    for character in " " + text if text else "":
        data = character.encode()
        tokens += [vocabulary[data]] if data in vocabulary else [byte + 3 for byte in data]
    while True:
        best_score, best_id, best_index = -1e10, -1, -1
        for index in range(len(tokens) - 1):
            token = vocabulary.get(pieces[tokens[index]] + pieces[tokens[index + 1]], -1)
            if token != -1 and scores[token] > best_score:
                best_score, best_id, best_index = scores[token], token, index
        if best_index == -1:
            return tokens
        tokens[best_index : best_index + 2] = [best_id]


def trained(**options: Any) -> SentencePieceProcessor:
    """A small sentencepiece model, trained as the story model's tokenizer is, unless `options` say otherwise."""
    rng = random.Random(1)
    lines = [
        " ".join(rng.choices(WORDS, k=12)).capitalize() + rng.choice([".", "!", "?  Yes", " 12"]) for _ in range(300)
    ]
    out = io.BytesIO()
    options = {
        "vocab_size": 380,
        "model_type": "bpe",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
    } | options
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        normalization_rule_name=options.pop("normalization_rule_name", "identity"),
        minloglevel=2,
        **options,
    )
    return SentencePieceProcessor(model_proto=out.getvalue())


def through_gguf(folder: Path, processor: SentencePieceProcessor) -> tuple[Tokenizer, Tokenizer]:
    """The processor's model by the library, and by ours after it went through a GGUF file."""
    model, path = folder / "t.model", folder / "t.gguf"
    model.write_bytes(processor.serialized_model_proto())
    library = load_tokenizer(model)
    config = replace(CONFIG, vocab_size=processor.vocab_size())
    write_gguf(path, config, weights_of(config), tokenizer=library)
    ours = open_checkpoint(path).tokenizer
    assert ours is not None
    assert isinstance(ours, GgufTokenizer)
    assert ours.vocabulary() == replace(library.vocabulary(), notes=())
    return library, ours
