"""What transformers and llama.cpp make of `lines.py`, into tokenizers.json beside this file.

    python make_tokenizers.py vocabularies FOLDER     with this package: writes vocabulary-only GGUF files for llama.cpp
    python make_tokenizers.py transformers FOLDER     with transformers: FOLDER/tokenizer-NAME of the real tokenizers
    python make_tokenizers.py llama.cpp FOLDER        with llama-cpp-python: the GGUF files in FOLDER

A digest stands for the ids of 100 lines, so that a difference has a place; of some lines the ids stand there as well.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GOLDEN = HERE / "tokenizers.json"
SMALL = HERE / "small.json"
REAL = ("llama3_2", "qwen2_5", "qwen3")
SAMPLE = slice(0, None, 211)
sys.path.insert(0, str(HERE))

from lines import lines  # noqa: E402


def digests(ids: Sequence[Sequence[int]]) -> list[str]:
    """A digest for every 100 lines."""
    return [digest(ids[start : start + 100]) for start in range(0, len(ids), 100)]


def digest(ids: Sequence[Sequence[int]]) -> str:
    flat = [number for line in ids for number in (len(line), *line)]
    return hashlib.sha256(struct.pack(f"<{len(flat)}I", *flat)).hexdigest()[:12]


def with_special(special: Sequence[str]) -> list[str]:
    """Lines in which special tokens are spelled out, alone, in words and side by side."""
    base = lines()[200:1000:7]
    return [
        f"{line[: index % 5]}{special[index % len(special)]}{line}{special[(index * 7) % len(special)]}"
        + special[index % len(special)] * (index % 3)
        for index, line in enumerate(base)
    ]


def record(name: str, peer: str, encode: Callable[[str, bool], list[int]], special: Sequence[str]) -> None:
    """`encode(text, special)` gives the ids without BOS; `special` are the tokens to spell out."""
    ids = [encode(line, False) for line in lines()]
    marked = with_special(special)
    found: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    found[name] = {
        "peer": peer,
        "lines": digests(ids),
        "sample": [" ".join(map(str, line)) for line in ids[SAMPLE]],
        "special": list(special),
        "spelled": digests([encode(line, False) for line in marked]),
        "parsed": digests([encode(line, True) for line in marked]),
    }
    GOLDEN.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    print(name, sum(map(len, ids)), "ids")


def transformers(folder: Path) -> None:
    import transformers as library

    for name in REAL:
        tokenizer = library.AutoTokenizer.from_pretrained(folder / f"tokenizer-{name}")
        backend = tokenizer.backend_tokenizer

        def encode(text: str, special: bool, backend: Any = backend) -> list[int]:
            backend.encode_special_tokens = not special
            return list(backend.encode(text, add_special_tokens=False).ids)

        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special][:24]
        record(name, f"transformers {library.__version__}", encode, special)


def distinct() -> list[str]:
    """A name for each set of rules: the first of those that share it."""
    from numballama.tokenizers.pretokenizers import PRE_TOKENIZERS

    return list({rules: name for name, rules in reversed(PRE_TOKENIZERS.items())}.values())[::-1]


def vocabularies(folder: Path) -> None:
    sys.path.insert(0, str(HERE.parent))
    from numballama.formats.tokenizer_files import load_tokenizer
    from tests.helpers.bpe import real, vocabulary_gguf

    folder.mkdir(exist_ok=True)
    for pre in distinct():
        (folder / f"small-{pre}.gguf").write_bytes(vocabulary_gguf(load_tokenizer(SMALL).vocabulary(), pre))
    for name in REAL:
        if (path := real(name)) is not None:
            (folder / f"gguf-{name}.gguf").write_bytes(vocabulary_gguf(load_tokenizer(path).vocabulary()))


def llama_cpp(folder: Path) -> None:
    import llama_cpp as lc

    lc.llama_backend_init()
    for path in sorted(folder.glob("*.gguf")):
        parameters = lc.llama_model_default_params()
        parameters.vocab_only, parameters.use_extra_bufts = True, False
        model = lc.llama_model_load_from_file(str(path).encode(), parameters)
        vocabulary = lc.llama_model_get_vocab(model)
        room = (lc.llama_token * 4096)()

        def encode(text: str, special: bool, vocabulary: Any = vocabulary, room: Any = room) -> list[int]:
            data = text.encode()
            count = lc.llama_tokenize(vocabulary, data, len(data), room, len(room), False, special)
            assert count >= 0, text
            return list(room[:count])

        count = lc.llama_vocab_n_tokens(vocabulary)
        control = [token for token in range(count) if lc.llama_vocab_get_attr(vocabulary, token) & 8]
        special = [lc.llama_vocab_get_text(vocabulary, token).decode() for token in control][:24]
        if path.stem.startswith("gguf-qwen"):  # an ordinary word there, which llama.cpp takes for a control token
            special.remove("</s>")
        record(path.stem, f"llama.cpp, llama-cpp-python {lc.__version__}", encode, special)
        lc.llama_model_free(model)


if __name__ == "__main__":
    {"transformers": transformers, "vocabularies": vocabularies, "llama.cpp": llama_cpp}[sys.argv[1]](Path(sys.argv[2]))
