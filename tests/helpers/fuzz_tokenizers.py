"""Tokenizers and chat templates for `fuzz_formats.py`: valid files, and how the damaged ones are opened."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from numballama.chat.builtin_templates import CHATML
from numballama.chat.template import choose, stop_token_ids
from numballama.errors import Error
from numballama.formats.hf.text_files import read_text_files
from numballama.formats.tokenizer_files import load_tokenizer
from tests.golden.make_templates import CONVERSATIONS, OWN
from tests.golden.make_tokenizers import SMALL
from tests.helpers.bpe import CHAT_CONFIG, SPECIAL, save_json, trained, vocabulary_gguf

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
    pieces = [piece.decode() for piece in load_tokenizer(SMALL).vocabulary().pieces[:1800]]
    return sorted(pieces, key=lambda piece: len(piece) > 1)


def template(folder: Path) -> Path:
    """A chat template of its own, beside a tokenizer."""
    save_json(folder, trained("smollm", 300), CHAT_CONFIG)
    (folder / "chat_template.jinja").write_text("".join(OWN.values()), encoding="utf-8")
    return folder / "chat_template.jinja"


MAKERS: dict[str, Callable[[Path], Path]] = {
    "tokenizer-directory": directory,
    "tokenizer-gguf-bpe": vocabulary,
    "tokenizer-tiktoken": tiktoken,
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
        tokenizer.encode_guarded(TEXT.replace("<|", "<\ufdd0|"), "\ufdd0")
        tokenizer.vocabulary()
    stop_token_ids(tokenizer)
    if found.chat_template is not None:
        choose(found.chat_template, tokenizer).render(CONVERSATIONS[3])
