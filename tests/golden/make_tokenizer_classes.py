"""What transformers makes of the flags in tokenizer_config.json, into tokenizer_classes.json beside this file.

    python tests/golden/make_tokenizer_classes.py        # in transformers' environment; 5.24.0

Small tokenizers with every post-processor, class and combination of flags encode `TEXTS`. The file has one row for each
tokenizer, post-processor and class: for each combination of flags, the number of its result. Results are listed once.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_suffix("").with_name("tokenizer_classes.json")
TEXTS = ("frog", "the  frog</s> the", "<s>a b", " x\n    y <think> z", "é", "")
FLAGS = ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space")
VALUES = (None, False, True)  # None: the key is not there
TOKENIZERS = ("bytes", "normalizer", "metaspace", "unknown", "unigram")
POST_PROCESSORS = ("none", "bos", "bos eos", "bytes", "eos bos")
CLASSES = (  # tokenizer_class, model_type
    (None, "llama"),
    ("PreTrainedTokenizerFast", "llama"),
    ("LlamaTokenizer", "llama"),
    ("LlamaTokenizerFast", "qwen3"),
    ("LlamaTokenizer", "mistral"),
)
_MERGES = [("t", "h"), ("th", "e"), ("▁", "the"), ("f", "r"), ("o", "g"), ("fr", "og"), ("▁", "frog"), ("▁", "▁")]


def combinations() -> Iterator[tuple[str, str, str | None, str]]:
    """Tokenizer, post-processor, class and model type of each row."""
    for tokenizer, post, (name, model) in itertools.product(TOKENIZERS, POST_PROCESSORS, CLASSES):
        # that class runs neither a Unigram nor unknown text, so numballama keeps to the file there
        if tokenizer not in ("unknown", "unigram") or "Llama" not in str(name) or model == "mistral":
            yield tokenizer, post, name, model


def settings() -> Iterator[dict[str, bool]]:
    """Every combination of flags."""
    for values in itertools.product(VALUES, repeat=len(FLAGS)):
        yield {name: value for name, value in zip(FLAGS, values, strict=True) if value is not None}


def tokenizer_json(kind: str, post: str) -> dict[str, Any]:
    """A tokenizer with the special tokens <s> and </s>, and two added tokens that are not special."""
    special = ["<unk>", "<s>", "</s>"]
    space = "Ġ" if kind == "bytes" else "▁"
    merges = [(a.replace("▁", space), b.replace("▁", space)) for a, b in _MERGES]
    pieces = list(special)
    if kind == "bytes":
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        pieces += [*map(chr, visible), *(chr(256 + n) for n in range(256 - len(visible)))]
    else:
        pieces += [f"<0x{byte:02X}>" for byte in range(256)] if kind != "unknown" else []
        pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    pieces += [a + b for a, b in merges]
    model: dict[str, Any] = {
        "type": "BPE",
        "unk_token": None if kind == "bytes" else "<unk>",
        "fuse_unk": kind != "bytes",
        "byte_fallback": kind in ("normalizer", "metaspace"),
        "vocab": {piece: token for token, piece in enumerate(pieces)},
        "merges": [" ".join(merge) for merge in merges],
    }
    if kind == "unigram":
        vocabulary = [[piece, -float(number)] for number, piece in enumerate(pieces)]
        model = {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": vocabulary}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": token, "content": text, "special": True, **flags} for token, text in enumerate(special)]
    for text in ("<think>", "    "):
        added.append({"id": len(pieces) + len(added) - 3, "content": text, "special": False, **flags})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer if kind == "normalizer" else None,
        "pre_tokenizer": byte_level if kind == "bytes" else None if kind == "normalizer" else metaspace,
        "post_processor": _post_processor(post, byte_level),
        "decoder": byte_level if kind == "bytes" else decoder,
        "model": model,
    }


def _post_processor(post: str, byte_level: dict[str, Any]) -> dict[str, Any] | None:
    if post in ("none", "bytes"):
        return None if post == "none" else byte_level
    names = {"bos": "<s>", "eos": "</s>"}
    tokens = [{"SpecialToken": {"id": names[word], "type_id": 0}} for word in post.split()]
    first, last = (tokens[:1], tokens[1:]) if post.startswith("bos") else (tokens, [])
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    ids = {text: {"id": text, "ids": [token], "tokens": [text]} for token, text in ((1, "<s>"), (2, "</s>"))}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids}


def write(folder: Path, kind: str, post: str, name: str | None, model: str, flags: dict[str, bool]) -> None:
    """A directory of such a tokenizer."""
    config = {"bos_token": "<s>", "eos_token": "</s>", **flags} | ({"tokenizer_class": name} if name else {})
    files = {"tokenizer": tokenizer_json(kind, post), "tokenizer_config": config, "config": {"model_type": model}}
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    results: list[list[list[int]]] = []
    rows: dict[str, list[int]] = {}
    for tokenizer, post, name, model in combinations():
        row = rows[f"{tokenizer} | {post} | {name} | {model}"] = list[int]()
        for flags in settings():
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), tokenizer, post, name, model, flags)
                loaded = transformers.AutoTokenizer.from_pretrained(folder)
            ids = [loaded(text).input_ids for text in TEXTS]
            if ids not in results:
                results.append(ids)
            row.append(results.index(ids))
        if len(set(row)) == 1:  # no flag matters
            rows[f"{tokenizer} | {post} | {name} | {model}"] = row[:1]
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}" for name, row in rows.items())
    found = ",\n".join(f"  {json.dumps(result, separators=(',', ':'))}" for result in results)
    peer = f"transformers {transformers.__version__}"
    GOLDEN.write_text(f'{{"peer": "{peer}", "rows": {{\n{lines}\n }}, "results": [\n{found}\n ]}}\n')
    print(len(rows), "rows", len(results), "results")


if __name__ == "__main__":
    main()
