"""What `numballama export` writes, in llama.cpp and in transformers: small random models of every architecture with
vocabularies of every kind, their greedy ids and the ids of some texts.

    python -m tests.golden.check_peers write FOLDER [PART]    # in numballama's environment: models, exports, answers
    python -m tests.golden.check_peers check FOLDER [PART]    # in the peers': opens every export and compares

Run by hand; transformers 5.24.0, llama-cpp-python 0.3.36. Each case is exported to GGUF and to a directory, and that
GGUF file to a directory again. A difference that a note of the export announces is printed as "noted". PART: only cases
with it in their names.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.golden.lines import lines

NEW, ANSWERS = 24, "expected.json"
PROMPT = (1, 7, 3, 9, 20, 4)
SPECIAL_KINDS = ("bos", "eos", "pad", "unk")
TEMPLATES = {"default": "{{ messages[0].content }} default", "rag": "rag {{ bos_token }}", "tool_use": "tools"}
TEXTS = [*lines()[::400], "", " ", "  two  spaces ", "a\nb\tc", "naïve 😀 1234567", "def f(x):\n        return x"]


@dataclass(frozen=True)
class Vocabulary:
    """Files of a tokenizer in a folder, and how many rows the embedding has more than it has tokens."""

    write: Callable[[Path], int] | None
    """Writes the files; returns the number of tokens. None: no tokenizer."""
    rows: int = 0
    beside: bool = True
    """The files lie beside the model. Otherwise that is a llama2.c file, and `tokenizer.bin` is given by its path."""


def write(folder: Path, part: str = "") -> None:
    from numballama.errors import UnsupportedError
    from numballama.export import export_model

    for name, architecture, vocabulary in cases():
        if part not in name:
            continue
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        source, tokenizer = make(place, architecture, vocabulary)
        found: dict[str, Any] = {}
        for copy, start, to in (
            ("hf", source, "safetensors"),
            ("m.gguf", source, "gguf"),
            ("hf2", "m.gguf", "safetensors"),
        ):
            own = tokenizer if start == source else None
            try:
                notes = export_model(place / start, place / copy, to, tokenizer=own).notes
            except UnsupportedError:  # nothing is written, and the error says why
                break
            found[copy] = {"notes": list(notes), **ask(place / copy)}
        found["greedy"] = greedy(place / source)
        (place / ANSWERS).write_text(json.dumps(found))
        print(name, flush=True)


def ask(path: Path) -> dict[str, Any]:
    """What numballama makes of the copy."""
    from numballama.errors import Error
    from numballama.loader import open_checkpoint

    opened = open_checkpoint(path)
    ids: list[list[int] | None] | None = None
    if opened.tokenizer is not None:
        ids = []
        for text in TEXTS:
            try:
                ids.append(opened.tokenizer.encode(text, bos=True, special=True))
            except Error:  # no token for a character
                ids.append(None)
    special = {kind: opened.template_tokens.get(f"{kind}_token", "") for kind in SPECIAL_KINDS}
    return {
        "greedy": greedy(path), "rows": opened.config.vocab_size, "ids": ids,
        "said": {**special, **{f"template {name}": text for name, text in opened.chat_templates.items()}},
    }  # fmt: skip


def greedy(path: Path) -> list[int]:
    import numpy as np

    from numballama.loader import open_checkpoint
    from tests.helpers.random_models import reference_logits

    opened, ids = open_checkpoint(path), list(PROMPT)
    for _ in range(NEW):
        ids.append(int(np.argmax(reference_logits(opened.config, opened.weights, ids)[-1])))
    return ids[len(PROMPT) :]


def cases() -> Iterator[tuple[str, Any, Vocabulary]]:
    """(name, config without its vocabulary, vocabulary)."""
    architectures, kinds = _architectures(), _vocabularies()
    for name, architecture in architectures.items():
        for kind in ("none", "spm", "bpe-llama-bpe-padded"):
            yield f"{name}+{kind}", architecture, kinds[kind]
    for name in ("llama", "qwen2", "qwen3-tied"):
        for kind, vocabulary in kinds.items():
            if kind not in ("none", "spm", "bpe-llama-bpe-padded") and (vocabulary.beside or name == "llama"):
                yield f"{name}+{kind}", architectures[name], vocabulary


def _architectures() -> dict[str, Any]:
    from numballama.config import HALF_SPLIT, ModelConfig, RopeScaling

    llama = ModelConfig(48, 64, 2, 6, 2, 1, 128, rope_pairing=HALF_SPLIT, tied_embeddings=False)
    qwen2, qwen3 = replace(llama, qkv_bias=True), replace(llama, qk_norm=True, head_dim=16)
    yarn = RopeScaling("yarn", 4.0, original_context=16)
    # the peers choose longrope's factors by a text's length and by the context: these agree below 4 and above 1,000
    factors = {"factors": (1.0, 1.1, 1.3, 2.0), "long_factors": (1.0, 2.0, 5.0, 9.5)}
    longrope = RopeScaling("longrope", original_context=4, attention_factor=1.2, **factors)
    return {
        "llama": llama,
        "llama-tied": replace(llama, tied_embeddings=True),
        "llama-heads": replace(llama, head_dim=12, n_kv_heads=6),
        "llama-biases": replace(llama, qkv_bias=True, o_bias=True),
        "llama-mlp-biases": replace(llama, mlp_bias=True),
        "llama-all-biases": replace(llama, qkv_bias=True, o_bias=True, mlp_bias=True),
        "llama3": replace(llama, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, original_context=64)),
        "llama-linear": replace(llama, rope_scaling=RopeScaling("linear", 4.0)),
        "llama-dynamic": replace(llama, rope_scaling=RopeScaling("dynamic", 2.0)),
        "llama-yarn": replace(llama, rope_scaling=yarn),
        "llama-yarn-attention": replace(llama, rope_scaling=replace(yarn, attention_factor=1.7)),
        "llama-longrope": replace(llama, rope_scaling=longrope),
        "llama-longrope-short": replace(llama, rope_scaling=replace(longrope, original_context=1000)),
        "qwen2-yarn": replace(qwen2, rope_scaling=yarn),
        "qwen3-yarn": replace(qwen3, rope_scaling=yarn),
        "llama-interleaved": replace(llama, rope_pairing="interleaved", norm_eps=1e-6),
        "mistral-window": replace(llama, window=100),
        "mistral-short-window": replace(llama, window=8),
        "qwen2": qwen2,
        "qwen2-tied": replace(qwen2, tied_embeddings=True, rope_theta=1e6),
        "qwen2-window": replace(qwen2, window=8),
        "qwen2-heads": replace(qwen2, head_dim=12),
        "qwen3": qwen3,
        "qwen3-tied": replace(qwen3, tied_embeddings=True),
        "qwen3-biases": replace(qwen3, qkv_bias=True, o_bias=True),
        "qwen3-linear": replace(qwen3, rope_scaling=RopeScaling("linear", 2.0)),
    }


_BOTH = {"add_bos_token": True, "add_eos_token": True}
_PAD = {"pad_token": "<|endoftext|>", "unk_token": "<|im_start|>"}


def _vocabularies() -> dict[str, Vocabulary]:
    from numballama.tokenizers.pretokenizers import PRE_TOKENIZERS

    kinds = {
        "none": Vocabulary(None),
        "spm": Vocabulary(_sentencepiece),
        "spm-padded": Vocabulary(_sentencepiece, 16),
        "spm-beyond": Vocabulary(_sentencepiece, -3),
        "spm-user-defined": Vocabulary(lambda folder: _sentencepiece(folder, user_defined_symbols=["<|x|>", "ow"])),
        "spm-no-prefix": Vocabulary(lambda folder: _sentencepiece(folder, add_dummy_prefix=False)),
        "spm-no-bos": Vocabulary(lambda folder: _sentencepiece(folder, bos_id=-1)),
        "spm-unigram": Vocabulary(lambda folder: _sentencepiece(folder, model_type="unigram"), 8),
        "spm-json": Vocabulary(lambda folder: _bpe(folder, metaspace=True), 8),
        "llama2c": Vocabulary(_llama2c, beside=False),
        "llama2c-padded": Vocabulary(_llama2c, 8, beside=False),
        "bpe-no-ids": Vocabulary(lambda folder: _bpe(folder, settings={})),
        "bpe-bos-eos": Vocabulary(lambda folder: _bpe(folder, bos=True, settings=_BOTH)),
        "bpe-templates": Vocabulary(lambda folder: _with_templates(folder, _bpe(folder, settings=_PAD))),
        "spm-templates": Vocabulary(lambda folder: _with_templates(folder, _sentencepiece(folder))),
        "bpe-nfc": Vocabulary(lambda folder: _bpe(folder, nfc=True)),
        "bpe-llama-bpe-padded": Vocabulary(_bpe, 24),
        "bpe-llama-bpe-beyond": Vocabulary(_bpe, -2),
        "bpe-hole": Vocabulary(_bpe_hole),
        "bpe-pair": Vocabulary(_bpe_pair, 8),
    }  # fmt: skip
    for pre in PRE_TOKENIZERS:
        kinds[f"bpe-{pre}"] = Vocabulary(lambda folder, pre=pre: _bpe(folder, pre))
    return kinds


def _sentencepiece(folder: Path, **options: Any) -> int:
    import sentencepiece

    model, text = io.BytesIO(), [line for line in lines() if line.isascii()][:1500]
    settings = {
        "model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "hard_vocab_limit": False, "unk_id": 0,
        "bos_id": 1, "eos_id": 2, "minloglevel": 2, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    } | options  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **settings)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    bos = {} if settings["bos_id"] < 0 else {"bos_token": "<s>", "add_bos_token": True}
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False} | bos
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def _bpe(folder: Path, pre: str = "llama-bpe", settings: dict[str, Any] | None = None, **options: Any) -> int:
    from tests.helpers.bpe import SPECIAL, save_json, trained

    library = trained(pre, **options)
    ids = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[3]} | (settings or {})
    save_json(folder, library, {"tokenizer_class": "PreTrainedTokenizerFast"} | ({} if settings == {} else ids))
    return library.get_vocab_size()


def _with_templates(folder: Path, tokens: int) -> int:
    """Adds named templates to the folder of a tokenizer with so many tokens."""
    (folder / "chat_template.jinja").write_text(TEMPLATES["default"])
    (others := folder / "additional_chat_templates").mkdir()
    for name in sorted({*TEMPLATES} - {"default"}):
        (others / f"{name}.jinja").write_text(TEMPLATES[name])
    return tokens


def _bpe_hole(folder: Path) -> int:
    """Added tokens do not follow the others: ids between them have no text."""
    _bpe(folder)
    found = json.loads((folder / "tokenizer.json").read_text())
    for token in found["added_tokens"]:
        token["id"] += 5
        found["model"]["vocab"].pop(token["content"], None)
    (folder / "tokenizer.json").write_text(json.dumps(found))
    return 1 + max(token["id"] for token in found["added_tokens"])


def _bpe_pair(folder: Path) -> int:
    """vocab.json and merges.txt in place of a tokenizer.json."""
    size = _bpe(folder, "gpt-2", {"tokenizer_class": "GPT2Tokenizer"})
    path, beside = folder / "tokenizer.json", folder / "tokenizer_config.json"
    found = json.loads(path.read_text())
    path.unlink()
    (folder / "vocab.json").write_text(json.dumps(found["model"]["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"]["merges"])
    (folder / "merges.txt").write_text("\n".join(merges))
    added = {"added_tokens_decoder": {token.pop("id"): token for token in found["added_tokens"]}}
    beside.write_text(json.dumps(json.loads(beside.read_text()) | added))
    return size


def _llama2c(folder: Path) -> int:
    from tests.helpers.sentencepiece_models import FIXED, write_bin

    words = sorted({piece for line in lines()[::50] for piece in line.split(" ")})[:100]
    letters = sorted({character for word in words for character in word} | {" "})
    pieces = [*FIXED, *(piece.encode() for piece in dict.fromkeys([*letters, *words, *(f" {word}" for word in words)]))]
    write_bin(folder / "tokenizer.bin", pieces, [-float(n) for n in range(len(pieces))])
    return len(pieces)


def make(place: Path, architecture: Any, vocabulary: Vocabulary) -> tuple[str, Path | None]:
    """Write the source into the folder; returns its name there, and the path of a tokenizer that is not beside it."""
    from numballama.formats.hf.writer import write_safetensors
    from numballama.formats.llama2c.llama2c import write_v1
    from tests.helpers.random_models import random_checkpoint

    files = place / "tokenizer"
    files.mkdir()
    tokens = vocabulary.write(files) if vocabulary.write else 300
    rows = tokens + vocabulary.rows
    if not vocabulary.beside and vocabulary.rows:  # a tokenizer given beside it must have as many tokens, or 8 · n rows
        rows += -rows % 8
    config = replace(architecture, vocab_size=rows)
    weights = random_checkpoint(config, seed=len(place.name)).weights
    if not vocabulary.beside:
        config = replace(config, rope_pairing="interleaved")
        write_v1(place / "source.bin", config, weights)
        return "source.bin", files / "tokenizer.bin"
    write_safetensors(
        place / "source", config, weights, files=sorted(path for path in files.iterdir() if path.is_file())
    )
    for sub in (path for path in files.iterdir() if path.is_dir()):
        shutil.copytree(sub, place / "source" / sub.name)
    return "source", None


# ---- in the peers' environment ----


def check(folder: Path, part: str = "") -> None:
    wrong = 0
    for place in sorted(path for path in folder.iterdir() if part in path.name and (path / ANSWERS).exists()):
        expected = json.loads((place / ANSWERS).read_text())
        results = []
        for copy, ask_peer in (("m.gguf", llama_cpp_says), ("hf", transformers_says), ("hf2", transformers_says)):
            if (ours := expected.get(copy)) is None:
                results.append(f"{copy}: refused")
                continue
            try:
                greedy_ids, ids, said_of = ask_peer(place / copy, ours)
            except Exception as error:
                results.append(f"{copy}: NOT OPENED ({type(error).__name__}: {str(error)[:200]})")
                wrong += 1
                continue
            said = []
            own = {key: text for key, text in ours["said"].items() if key.startswith("template") or key in said_of}
            if ours["ids"] is not None and own != said_of:
                differing = {key: (own.get(key), said_of.get(key)) for key in sorted({*own, *said_of})}
                differing = {key: pair for key, pair in differing.items() if pair[0] != pair[1]}
                wrong += 1
                said.append(f"DIFFERENT {differing}")
            if not greedy_ids == ours["greedy"] == expected["greedy"]:
                at = next(
                    (n for n, pair in enumerate(zip(greedy_ids, expected["greedy"], strict=True)) if len({*pair}) > 1),
                    NEW,
                )
                noted = any("window" in note or "dynamic" in note for note in ours["notes"])
                wrong += not noted
                said.append(f"greedy {'noted' if noted else 'DIFFERENT'} from token {at}")
            if ours["ids"] is not None:
                pairs = [
                    (text, a, b) for text, a, b in zip(TEXTS, ours["ids"], ids, strict=True) if a is not None and a != b
                ]
                noted = any("normalises" in note for note in ours["notes"])
                if beyond := [pair for pair in pairs if max(pair[2], default=0) >= ours["rows"]]:
                    said.append(f"in {len(beyond)} texts this peer has ids beyond the embedding")
                    pairs = [pair for pair in pairs if pair not in beyond]
                if pairs and pairs == [pair for pair in pairs if pair[1] == sentencepiece_says(place / copy, pair[0])]:
                    said.append(f"ids of {len(pairs)} texts as sentencepiece's, not as this peer's")
                    pairs = []
                wrong += bool(pairs) and not noted
                if pairs:
                    said.append(
                        f"ids of {len(pairs)}/{len(TEXTS)} texts {'noted' if noted else 'DIFFERENT'} {pairs[0]}"
                    )
            elif any("left out" in note for note in ours["notes"]):
                said.append("tokenizer noted")
            results.append(f"{copy}: {', '.join(said) or 'equal'}")
        print(f"{place.name:34} {' | '.join(results)}", flush=True)
    print(f"{wrong} differences that no note announces")
    sys.exit(wrong > 0)


Answer = tuple[list[int], list[list[int]], dict[str, str]]
"""Greedy ids, ids of `TEXTS`, and what the peer says of special tokens and templates, as `ask`'s "said"."""


def llama_cpp_says(path: Path, ours: dict[str, Any]) -> Answer:
    import ctypes

    import llama_cpp as lc
    import numpy as np

    lc.llama_backend_init()
    quiet = lc.llama_log_callback(lambda level, text, data: None)
    lc.llama_log_set(quiet, ctypes.c_void_p(0))
    options = lc.llama_model_default_params()
    options.use_extra_bufts = False
    model = lc.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise OSError("llama.cpp does not open it")
    settings = lc.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.flash_attn_type, settings.type_k, settings.type_v = 64, 64, 0, 0, 0
    settings.n_threads = settings.n_threads_batch = 1
    context = lc.llama_init_from_model(model, settings)
    vocabulary = lc.llama_model_get_vocab(model)
    rows = lc.llama_vocab_n_tokens(vocabulary)
    assert rows == ours["rows"], (rows, ours["rows"])
    batch, ids = lc.llama_batch_init(64, 0, 1), list(PROMPT)
    done = 0
    for _ in range(NEW):
        batch.n_tokens = len(ids) - done
        for at, token in enumerate(ids[done:]):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, done + at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, done + at == len(ids) - 1
        done = len(ids)
        assert lc.llama_decode(context, batch) == 0
        logits = np.ctypeslib.as_array(lc.llama_get_logits_ith(context, -1), (rows,))
        ids.append(int(np.argmax(logits)))
    room, found = (lc.llama_token * 4096)(), []
    for text in TEXTS if ours["ids"] is not None else []:
        data = text.encode()
        count = lc.llama_tokenize(vocabulary, data, len(data), room, 4096, True, True)
        found.append(list(room[:count]))
    says: dict[str, str] = {}
    for kind in ("bos", "eos", "pad") if ours["ids"] is not None else ():  # it keeps the unknown token to itself
        token = getattr(lc, f"llama_vocab_{kind}")(vocabulary)
        text = lc.llama_vocab_get_text(vocabulary, token).decode() if token >= 0 else ""
        if ours["said"][kind] or kind == "pad":  # without BOS or EOS it assumes ids of its own
            says[kind] = text
    for name in (key.removeprefix("template ") for key in ours["said"] if key.startswith("template ")):
        found_template = lc.llama_model_chat_template(model, None if name == "default" else name.encode())
        says[f"template {name}"] = found_template.decode() if found_template else ""
    lc.llama_batch_free(batch)
    lc.llama_free(context)
    lc.llama_model_free(model)
    return ids[len(PROMPT) :], found, says


def sentencepiece_says(path: Path, text: str) -> list[int] | None:
    """Ids of a text by the library of a directory's tokenizer.model, which transformers 5 converts and changes."""
    if not (path / "tokenizer.model").is_file() or (path / "tokenizer.json").exists():
        return None
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(str(path / "tokenizer.model"))
    begin = [processor.bos_id()] if processor.bos_id() >= 0 else []
    return begin + [int(token) for token in processor.encode(text)]


def transformers_says(path: Path, ours: dict[str, Any]) -> Answer:
    import tokenizers
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    ids = list(PROMPT)
    model.eval()
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    found, says = [], {}
    if ours["ids"] is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if not (path / "tokenizer.json").exists():
            tokenizer = transformers.LlamaTokenizer.from_pretrained(path)
        for kind in SPECIAL_KINDS:  # a class has names for tokens that the vocabulary does not have
            token = getattr(tokenizer, f"{kind}_token_id")
            says[kind] = getattr(tokenizer, f"{kind}_token") if token is not None and token < ours["rows"] else ""
            if type(tokenizer).__name__ == "Qwen2Tokenizer" and not ours["said"][kind]:
                says[kind] = ""  # <|endoftext|> is this class's own, whatever the file says
        templates = tokenizer.chat_template or {}
        templates = {"default": templates} if isinstance(templates, str) else templates
        says |= {f"template {name}": text for name, text in templates.items()}
        if type(tokenizer).__name__ == "Qwen2Tokenizer":  # of model types qwen2 and qwen3, whatever the file says
            library = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            return ids[len(PROMPT) :], [library.encode(text).ids for text in TEXTS], says
        found = [list(tokenizer(text).input_ids) for text in TEXTS]
    return ids[len(PROMPT) :], found, says


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
