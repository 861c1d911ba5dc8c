"""Tokenizers and chat templates for `fuzz_formats.py`: valid files, and how the damaged ones are opened."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from numballama.chat.builtin_templates import CHATML
from numballama.chat.template import choose, stop_token_ids
from numballama.errors import Error
from numballama.formats.hf.text_files import read_text_files
from numballama.formats.tokenizer_files import load_tokenizer
from tests.golden.make_templates import CONVERSATIONS, OWN
from tests.golden.make_tokenizer_classes import tokenizer_json
from tests.golden.make_tokenizers import SMALL
from tests.helpers.bpe import CHAT_CONFIG, SPECIAL, save_json, trained, vocabulary_gguf
from tests.helpers.sentencepiece_models import trained as trained_sentencepiece

TEXT = "Once upon a time 🙂\0 <s> 12345 <|im_end|>"


def directory(folder: Path) -> Path:
    """A Hugging Face directory, as far as it concerns text."""
    template = CHATML + OWN["macros"]
    config = CHAT_CONFIG | {"chat_template": template, "add_bos_token": True, "add_eos_token": False}
    save_json(
        folder,
        trained("llama-bpe", 300, bos=True),
        config,
        generation_config={"eos_token_id": [303, 301], "temperature": 0.6},
        special_tokens_map={"bos_token": {"content": SPECIAL[0], "lstrip": False}},
    )
    return folder


def vocabulary(folder: Path) -> Path:
    """A GGUF file of a byte-level vocabulary alone."""
    path = folder / "v.gguf"
    path.write_bytes(vocabulary_gguf(replace(load_tokenizer(SMALL).vocabulary(), bos_id=1803), "smollm"))
    return path


def tiktoken(folder: Path) -> Path:
    """A line per token, by rank."""
    import base64

    from numballama.tokenizers.library import UNICODE_TO_BYTE

    path = folder / "tokenizer.model"
    tokens = [bytes(UNICODE_TO_BYTE[letter] for letter in piece) for piece in _by_rank()]
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


def _by_rank() -> list[str]:
    """The 256 bytes and the first merges."""
    pieces = [piece.decode() for piece in load_tokenizer(SMALL).vocabulary().pieces[:600]]
    return sorted(pieces, key=lambda piece: len(piece) > 1)


def template(folder: Path) -> Path:
    """A chat template of its own, beside a tokenizer."""
    save_json(folder, trained("smollm", 300), CHAT_CONFIG)
    (folder / "chat_template.jinja").write_text("".join(OWN.values()), encoding="utf-8")
    return folder / "chat_template.jinja"


SETTINGS: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": {"content": "<|im_end|>", "lstrip": True, "special": True},
    "pad_token": "<pad>",
    "additional_special_tokens": ["<think>"],
    "extra_special_tokens": {"image_token": "<image>"},
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": True,
    "legacy": False,
    "tokenizer_class": "LlamaTokenizerFast",
    "chat_template": [{"name": "default", "template": CHATML}],
}
GENERATION = {"eos_token_id": [2, 7], "bos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "do_sample": True}


def settings(folder: Path) -> Path:
    """The small files beside a tokenizer.json, whose damage is in them more often than in the large one."""
    content = tokenizer_json("metaspace", "bos")
    size = content["added_tokens"][-1]["id"] + 1
    flags = {"lstrip": True, "rstrip": False, "normalized": True, "single_word": False, "special": False}
    added = {str(size): {"content": "<|im_end|>", **flags}, str(size + 1): {"content": "<|x|>", **flags}}
    files = {
        "tokenizer": content,
        "tokenizer_config": SETTINGS | {"added_tokens_decoder": added},
        "generation_config": GENERATION,
        "config": {"model_type": "llama", "eos_token_id": 2},
        "special_tokens_map": {"bos_token": "<s>", "unk_token": {"content": "<unk>"}},
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def unigram(folder: Path) -> Path:
    """A Unigram tokenizer.json alone."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json("unigram", "eos bos")), encoding="utf-8")
    return folder


def sentencepiece(folder: Path) -> Path:
    """A sentencepiece model, and the files that add tokens to it."""
    model = trained_sentencepiece(vocab_size=300)
    (folder / "tokenizer.model").write_bytes(model.serialized_model_proto())
    added = {"<|im_start|>": model.vocab_size(), "<|im_end|>": model.vocab_size() + 1}
    files = {
        "tokenizer_config": SETTINGS,
        "generation_config": GENERATION,
        "added_tokens": added,
        "special_tokens_map": {"eos_token": "<|im_end|>"},
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "tokenizer-directory": directory,
    "tokenizer-gguf-bpe": vocabulary,
    "tokenizer-tiktoken": tiktoken,
    "tokenizer-settings": settings,
    "tokenizer-unigram": unigram,
    "tokenizer-sentencepiece": sentencepiece,
    "chat-template": template,
}


def examine(path: Path) -> None:
    """Open the tokenizer, encode and decode text, and render a conversation."""
    folder = path if path.is_dir() else path.parent
    found = read_text_files(folder)
    tokenizer = found.tokenizer or load_tokenizer(path)
    tokenizer.decode(range(min(tokenizer.vocab_size, 5000)))
    with contextlib.suppress(Error):  # a vocabulary may lack what a text needs, and rules may fail on it
        tokenizer.encode(TEXT)
        tokenizer.encode(TEXT, special=True)
        tokenizer.encode_spans([(TEXT, True), (TEXT, False), ("<s> ", True)], bos=True)
        tokenizer.vocabulary()
    stop_token_ids(tokenizer)
    if found.chat_template is not None:
        choose(found.chat_template, tokenizer).render(CONVERSATIONS[3])
