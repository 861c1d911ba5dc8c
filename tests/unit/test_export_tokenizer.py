"""Byte-level BPE between GGUF and Hugging Face directories: the same ids, special tokens and chat template.

`golden/check_hf_tokenizer.py` and `check_llama_cpp_tokenizer.py` ask transformers and llama.cpp, by hand.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library

from numballama.export import export_model
from numballama.formats.gguf.writer import write_gguf
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.loader import open_checkpoint
from numballama.tokenizers.base import Vocabulary
from numballama.tokenizers.bpe import BPETokenizer
from numballama.tokenizers.pretokenizers import PRE_TOKENIZERS
from tests.golden.lines import lines
from tests.helpers.bpe import ADDED, CHAT_CONFIG, SPECIAL, chat_model, save_json, trained
from tests.helpers.gguf_files import CONFIG, edited, u32
from tests.helpers.random_models import random_checkpoint

TEXTS = [
    *lines()[::60],
    *(f"{SPECIAL[2]}user\n{line}{SPECIAL[3]} {ADDED[0]}{line}<s>" for line in lines()[::250]),
    " ".join([*SPECIAL, *ADDED]),
]


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True), (False, True)])
def test_a_gguf_becomes_a_directory(tmp_path: Path, pre: str, bos: bool, eos: bool) -> None:
    if (bos, eos) != (True, False) and pre not in ("smollm", "llama-bpe"):
        return
    settings = CHAT_CONFIG | {"add_bos_token": bos, "add_eos_token": eos}
    own = load_tokenizer(save_json(tmp_path / "given", trained(pre), settings))
    config = replace(CONFIG, vocab_size=own.vocab_size)
    path, copy = tmp_path / "m.gguf", tmp_path / "copy"
    write_gguf(path, config, random_checkpoint(config).weights, tokenizer=own, chat_template="{{ 'ü' }}\n{{ x }}")
    assert export_model(path, copy, "safetensors", "f32").notes == ()
    source, opened = open_checkpoint(path), open_checkpoint(copy)
    assert source.tokenizer is not None and opened.tokenizer is not None
    assert opened.chat_template == source.chat_template == "{{ 'ü' }}\n{{ x }}"
    assert (opened.tokenizer.bos_id, opened.tokenizer.eos_id) == (own.bos_id, own.eos_id)
    assert opened.stop_token_ids == source.stop_token_ids == (own.eos_id,)
    assert opened.tokenizer.special_tokens == own.special_tokens
    library = Library.from_file(str(copy / "tokenizer.json"))
    for text in TEXTS:
        for special in (False, True):
            ids = own.encode(text, special=special)
            assert source.tokenizer.encode(text, special=special) == ids
            assert opened.tokenizer.encode(text, special=special) == ids
        assert library.encode(text).ids == ids, "the library's own post-processor"
        assert library.encode(text, "b").ids == ids + own.encode("b")
        assert opened.tokenizer.decode(ids) == own.decode(ids) == library.decode(ids)
    assert ids[:1] == [own.bos_id] if bos else ids[:1] == [own.special_tokens[SPECIAL[0]]]
    assert (ids[-1] == own.eos_id) is eos
    # and back: what GGUF says of it is the same again
    export_model(copy, tmp_path / "back.gguf", "gguf")
    back = open_checkpoint(tmp_path / "back.gguf")
    assert back.tokenizer is not None and back.chat_template == source.chat_template
    assert back.tokenizer.vocabulary() == source.tokenizer.vocabulary()
    written = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (written["eos_token"], written["model_max_length"]) == (SPECIAL[3], config.context)


def test_a_tokenizer_given_beside_the_model(tmp_path: Path) -> None:
    """A GGUF file may be the tokenizer of another model; files of a directory are copied as they are."""
    path = chat_model(tmp_path, template="{{ z }}")
    export_model(path, tmp_path / "first", "safetensors", "f32")
    (tmp_path / "first" / "tokenizer_config.json").unlink()
    (tmp_path / "first" / "tokenizer.json").unlink()
    export_model(tmp_path / "first", tmp_path / "second", "safetensors", tokenizer=path)
    first, second = load_tokenizer(path), load_tokenizer(tmp_path / "second")
    assert [first.encode(text) for text in TEXTS] == [second.encode(text) for text in TEXTS]
    export_model(tmp_path / "second", tmp_path / "third", "safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "third" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_tokens_spelled_alike_are_named(tmp_path: Path) -> None:
    """Of two tokens with the same text, a `tokenizer.json` can hold one."""
    path = chat_model(tmp_path)
    vocabulary = load_tokenizer(path).vocabulary()
    pieces = list(vocabulary.pieces)
    pieces[300] = pieces[301] = pieces[310]

    class Doubled(BPETokenizer):
        def vocabulary(self) -> Vocabulary:
            return replace(vocabulary, pieces=pieces, merges=[])

    config = replace(CONFIG, vocab_size=len(pieces))
    own = Doubled(lambda: trained("smollm"), [p.decode() for p in pieces], {}, frozenset())
    write_gguf(tmp_path / "twice.gguf", config, random_checkpoint(config).weights, tokenizer=own)
    done = export_model(tmp_path / "twice.gguf", tmp_path / "copy", "safetensors", "f32")
    assert done.notes == ("tokens 301, 310 have the text of other tokens: left out of the tokenizer",)
    source, opened = load_tokenizer(tmp_path / "twice.gguf"), load_tokenizer(tmp_path / "copy")
    assert [source.encode(text) for text in TEXTS] == [opened.encode(text) for text in TEXTS]


def test_no_token_ends_a_text(tmp_path: Path) -> None:
    """Files write 4,294,967,295 for a missing id: it is not a stop token, nor part of a config."""
    path = chat_model(tmp_path)
    path.write_bytes(edited(path, {"tokenizer.ggml.eos_token_id": u32("tokenizer.ggml.eos_token_id", 0xFFFFFFFF)}))
    assert open_checkpoint(path).stop_token_ids == ()
    export_model(path, tmp_path / "copy", "safetensors", "f32")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["eos_token_id"] is None
    assert "eos_token" not in json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
