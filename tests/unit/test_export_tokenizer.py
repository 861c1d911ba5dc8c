"""Byte-level BPE between GGUF and Hugging Face directories: the same ids, special tokens and chat template.

`golden/check_hf_tokenizer.py` and `check_llama_cpp_tokenizer.py` ask transformers and llama.cpp, by hand.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Library

from numballama.config import HALF_SPLIT
from numballama.errors import UnsupportedError
from numballama.export import export_model
from numballama.files import map_file
from numballama.formats.gguf.header import Header
from numballama.formats.gguf.writer import write_gguf
from numballama.formats.hf.writer import write_safetensors
from numballama.formats.llama2c.llama2c import write_v1
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.loader import open_checkpoint
from numballama.tokenizers.base import Vocabulary
from numballama.tokenizers.bpe import BPETokenizer
from numballama.tokenizers.pretokenizers import PRE_TOKENIZERS
from tests.golden.lines import lines
from tests.helpers.bpe import ADDED, CHAT_CONFIG, SPECIAL, chat_model, save_json, trained
from tests.helpers.extent import EVERYTHING
from tests.helpers.gguf_files import CONFIG, edited, u32
from tests.helpers.random_models import random_checkpoint
from tests.helpers.sentencepiece_models import FIXED, STORY_BEGINS, write_bin
from tests.helpers.sentencepiece_models import trained as spm


@pytest.fixture(scope="module")
def small_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat"))


TEXTS = [
    *lines()[:: 60 if EVERYTHING else 180],
    *(f"{SPECIAL[2]}user\n{line}{SPECIAL[3]} {ADDED[0]}{line}<s>" for line in lines()[::250]),
    " ".join([*SPECIAL, *ADDED]),
]


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True), (False, True)])
def test_a_gguf_becomes_a_directory(tmp_path: Path, pre: str, bos: bool, eos: bool) -> None:
    if (bos, eos) != (True, False) and pre not in ("smollm", "llama-bpe"):
        return
    own = load_tokenizer(save_json(tmp_path / "given", trained(pre, bos=bos, eos=eos), CHAT_CONFIG))
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
    ids = own.encode("frog")
    assert (ids[0] == own.bos_id) is bos and (ids[-1] == own.eos_id) is eos
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


# ---- what lies beside a tokenizer ----

BESIDE = CHAT_CONFIG | {"pad_token": ADDED[2], "sep_token": ADDED[0], "mask_token": "no such token"}


def directory(folder: Path, settings: dict[str, object], template: str | None = None) -> Path:
    """A model in a Hugging Face directory, with a byte-level BPE."""
    path = save_json(folder / "tokenizer", trained("smollm"), settings)
    size = load_tokenizer(path).vocab_size
    config = replace(CONFIG, vocab_size=size, rope_pairing=HALF_SPLIT)
    write_safetensors(folder / "hf", config, random_checkpoint(config).weights, files=sorted(path.parent.iterdir()))
    if template is not None:
        (folder / "hf" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder / "hf"


def named_templates(folder: Path, **templates: str) -> None:
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    for name, template in templates.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(template)


@pytest.mark.parametrize("own", [False, True])
def test_the_files_beside_a_given_tokenizer_go_along(tmp_path: Path, own: bool) -> None:
    """They give EOS, added tokens and special tokens. A chat template is that of the model, if it has one."""
    source = directory(tmp_path, CHAT_CONFIG, template="{{ own }}" if own else None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    given = save_json(tmp_path / "given", trained("smollm"), BESIDE | {"chat_template": "{{ given }}"})
    added = {SPECIAL[0]: load_tokenizer(given).special_tokens[SPECIAL[0]]}
    (given.parent / "added_tokens.json").write_text(json.dumps(added))
    (given.parent / "tokenizer.model").write_bytes(b"of another model")
    named_templates(given.parent, tools="{{ t }}")
    done = export_model(source, tmp_path / "copy", "safetensors", tokenizer=given)
    assert done.notes == ()
    opened, wanted = open_checkpoint(tmp_path / "copy"), load_tokenizer(given)
    assert opened.tokenizer is not None and opened.tokenizer.eos_id == wanted.eos_id is not None
    assert json.loads((tmp_path / "copy" / "added_tokens.json").read_text()) == added
    assert not (tmp_path / "copy" / "tokenizer.model").exists(), "it is not the one that was given"
    assert opened.template_tokens == BESIDE
    assert opened.chat_templates == ({"default": "{{ own }}"} if own else {"tools": "{{ t }}"})


def test_vocab_and_merges_become_a_tokenizer_json(tmp_path: Path) -> None:
    """It says how text is split: transformers does not read the pair beside a model of type llama."""
    path = chat_model(tmp_path, pre="gpt-2")
    given = save_json(tmp_path / "given", trained("gpt-2"), CHAT_CONFIG)
    wanted, whole = load_tokenizer(given), json.loads(given.read_text(encoding="utf-8"))
    added = {token.pop("id"): token for token in whole["added_tokens"]}
    pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"])
    given.unlink()
    (given.parent / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]), encoding="utf-8")
    (given.parent / "merges.txt").write_text("\n".join(pairs), encoding="utf-8")
    config = given.parent / "tokenizer_config.json"
    config.write_text(json.dumps(CHAT_CONFIG | {"added_tokens_decoder": added, "chat_template": "{{ given }}"}))
    for number, tokenizer in enumerate((given.parent, given.parent / "vocab.json")):
        export_model(path, copy := tmp_path / f"copy{number}", "safetensors", "f32", tokenizer=tokenizer)
        assert not (copy / "vocab.json").exists() and (copy / "tokenizer.json").exists()
        opened = open_checkpoint(copy)
        assert opened.tokenizer is not None and opened.tokenizer.special_tokens == wanted.special_tokens
        assert all(opened.tokenizer.encode(text) == wanted.encode(text) for text in TEXTS[:20])


def test_the_template_of_the_model_goes_along_with_a_given_tokenizer(tmp_path: Path) -> None:
    path = chat_model(tmp_path, template="{{ x }}")
    given = tmp_path / "tokenizer" / "tokenizer.json"
    export_model(path, tmp_path / "copy", "safetensors", "f32", tokenizer=given)
    opened = open_checkpoint(tmp_path / "copy")
    assert opened.chat_templates == {"default": "{{ x }}"}
    assert opened.tokenizer is not None and opened.tokenizer.piece(opened.tokenizer.eos_id or 0) == SPECIAL[3]


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_chat_templates_go_round(tmp_path: Path, default: bool, named: bool) -> None:
    source = directory(tmp_path, CHAT_CONFIG, template="{{ d }}" if default and not named else None)
    templates = {"default": "{{ d }}\n"} if default else {}
    if named:
        named_templates(source, tool_use="{{ 'ü' }}", rag="{{ r }}")
        templates |= {"tool_use": "{{ 'ü' }}", "rag": "{{ r }}"}
        if default:
            (source / "chat_template.jinja").write_text("{{ d }}\n")
    templates = dict(open_checkpoint(source).chat_templates)
    assert len(templates) == default + 2 * named
    for number, (to, path) in enumerate([("safetensors", "a"), ("gguf", "b"), ("gguf", "c"), ("safetensors", "d")]):
        done = export_model(source, tmp_path / path, to, None if number < 3 else "f32")
        assert done.notes == () and open_checkpoint(tmp_path / path).chat_templates == templates
        source = tmp_path / path
    names = Header(map_file(tmp_path / "b")).strings("tokenizer.chat_templates")
    assert sorted(names or []) == ([b"rag", b"tool_use"] if named else [])


def test_names_of_chat_templates_are_not_trusted(tmp_path: Path) -> None:
    several = [{"name": name, "template": "{{ x }}"} for name in ("default", "../x", "/tmp/x", "", ".", "ü", "good")]
    source = directory(tmp_path, {**CHAT_CONFIG, "chat_template": several})
    done = export_model(source, tmp_path / "m.gguf", "gguf")
    note = r"chat templates with unusual names are left out: '../x', '/tmp/x', '', '.', '\xfc'"
    assert done.notes == (note,)
    (source / "tokenizer_config.json").rename(tmp_path / "tokenizer_config.json")
    assert set(open_checkpoint(tmp_path / "m.gguf").chat_templates) == {"default", "good"}
    path = tmp_path / "odd.gguf"
    config, weights = open_checkpoint(tmp_path / "m.gguf").config, open_checkpoint(tmp_path / "m.gguf").weights
    write_gguf(path, config, weights, load_tokenizer(tmp_path / "m.gguf"), None, {"../x": "{{ x }}", "good": "{{ y }}"})
    done = export_model(path, tmp_path / "copy", "safetensors", "f32")
    assert done.notes == ("chat templates with unusual names are left out: '../x'",)
    assert open_checkpoint(tmp_path / "copy").chat_templates == {"good": "{{ y }}"}


def test_special_tokens_that_templates_see_go_into_gguf(tmp_path: Path) -> None:
    source = directory(tmp_path, BESIDE)
    export_model(source, tmp_path / "m.gguf", "gguf")
    opened = open_checkpoint(tmp_path / "m.gguf")
    assert opened.template_tokens == {"pad_token": ADDED[2], "sep_token": ADDED[0]}
    export_model(tmp_path / "m.gguf", tmp_path / "again.gguf", "gguf")
    assert open_checkpoint(tmp_path / "again.gguf").template_tokens == opened.template_tokens


KINDS = {
    "padding": "pad_token", "unknown": "unk_token", "seperator": "sep_token", "cls": "cls_token", "mask": "mask_token",
}  # fmt: skip
"""GGUF's name of a token → that of Hugging Face."""


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(KINDS)), st.sampled_from([*SPECIAL, *ADDED, "a"])))
def test_special_tokens_of_gguf_go_into_a_directory(
    tmp_path_factory: pytest.TempPathFactory, small_chat_model: Path, chosen: dict[str, str]
) -> None:
    """Their ids into config.json, pad's into generation_config.json too, their names into tokenizer_config.json: but
    only those of control tokens, because a token that has a name becomes one."""
    folder = tmp_path_factory.mktemp("export")
    own = open_checkpoint(small_chat_model).tokenizer
    assert own is not None
    ids = {own.piece(token): token for token in range(own.vocab_size)}
    keys = {f"tokenizer.ggml.{kind}_token_id": ids[text] for kind, text in chosen.items()}
    path = folder / "m.gguf"
    path.write_bytes(edited(small_chat_model, {key: u32(key, token) for key, token in keys.items()}))
    export_model(path, folder / "copy", "safetensors", "f32")
    there = {KINDS[kind]: text for kind, text in chosen.items()}
    config, generation, names = (
        json.loads((folder / "copy" / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    shown = {name: text for name, text in there.items() if text in SPECIAL}
    assert {name: names[name] for name in KINDS.values() if name in names} == shown
    for name in KINDS.values():
        assert config.get(f"{name}_id") == (ids[there[name]] if name in there else None)
    assert generation.get("pad_token_id") == config.get("pad_token_id")
    copy = open_checkpoint(folder / "copy")
    assert copy.tokenizer is not None and copy.tokenizer.encode("a <think> a") == own.encode("a <think> a")
    assert {name: text for name, text in copy.template_tokens.items() if name in KINDS.values()} == shown


# ---- a tokenizer that GGUF cannot express, and another file of the same one ----


def with_merges(processor: SentencePieceProcessor) -> Library:
    """The tokenizer.json of a sentencepiece BPE, as transformers writes it."""
    pieces = [processor.IdToPiece(token) for token in range(processor.vocab_size())]
    ids = {piece: token for token, piece in enumerate(pieces)}
    pairs = [
        (ids[piece], piece[:at], piece[at:])
        for piece in pieces
        if not processor.IsByte(ids[piece]) and ids[piece] > 2
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    ordered = sorted(pairs, key=lambda pair: -processor.GetScore(pair[0]))
    merges = [(left, right) for _, left, right in ordered]
    library = Library(models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return library


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_flags_beside_a_tokenizer_model_go_into_gguf(tmp_path: Path, add_bos: bool, add_eos: bool) -> None:
    """The model itself does not have them; the copy puts the same ids around a text."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(spm().serialized_model_proto())
    settings = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    source = load_tokenizer(folder)
    config = replace(CONFIG, vocab_size=source.vocab_size)
    write_gguf(tmp_path / "copy.gguf", config, random_checkpoint(config).weights, tokenizer=source)
    copy = load_tokenizer(tmp_path / "copy.gguf")
    assert copy.encode(STORY_BEGINS) == source.encode(STORY_BEGINS)
    assert (copy.add_bos, copy.add_eos) == (add_bos, add_eos)


def test_an_empty_piece_is_no_special_token(tmp_path: Path) -> None:
    """llama2.c's files have pieces without bytes; a token that the model does not name is not one of them."""
    pieces = [*FIXED, b"a", b"", b" ", b"b"]
    write_bin(tmp_path / "t.bin", pieces, [-float(n) for n in range(len(pieces))])
    config = replace(CONFIG, vocab_size=len(pieces))
    write_v1(tmp_path / "m.bin", config, random_checkpoint(config).weights)
    export_model(tmp_path / "m.bin", tmp_path / "m.gguf", "gguf", tokenizer=tmp_path / "t.bin")
    assert open_checkpoint(tmp_path / "m.gguf").template_tokens == {"unk_token": "<unk>"}


@pytest.mark.parametrize("beside", ["same", "other", "larger", "none"])
@pytest.mark.parametrize("given", [False, True])
def test_gguf_takes_the_tokenizer_model_beside_a_tokenizer_json(tmp_path: Path, beside: str, given: bool) -> None:
    processor = spm()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "add_bos_token": True}
    path = save_json(tmp_path / "tokenizer", with_merges(processor), names | {"tokenizer_class": "LlamaTokenizer"})
    if beside != "none":
        other = {"same": processor, "larger": spm(vocab_size=384)}.get(beside) or spm(user_defined_symbols=["xyz"])
        (path.parent / "tokenizer.model").write_bytes(other.serialized_model_proto())
    config = replace(CONFIG, vocab_size=processor.vocab_size(), rope_pairing=HALF_SPLIT)
    files = [] if given else sorted(path.parent.iterdir())
    write_safetensors(tmp_path / "hf", config, random_checkpoint(config).weights, files=files)
    own = load_tokenizer(path)
    with pytest.raises(UnsupportedError, match="merges in place of scores"):
        own.vocabulary()
    done = export_model(tmp_path / "hf", tmp_path / "m.gguf", "gguf", tokenizer=path if given else None)
    copy = open_checkpoint(tmp_path / "m.gguf").tokenizer
    if beside != "same":
        assert "the tokenizer is left out: GGUF cannot hold a sentencepiece BPE" in done.notes[-1]
        assert copy is None
        return
    assert "the tokenizer is written from tokenizer.model, because GGUF cannot hold" in "".join(done.notes)
    assert copy is not None and (copy.bos_id, copy.eos_id) == (own.bos_id, own.eos_id) == (1, 2)
    assert [copy.piece(token) for token in range(copy.vocab_size)] == [own.piece(t) for t in range(own.vocab_size)]
    for text in (STORY_BEGINS, "Once upon  a time 12, ü🙂\n", ""):
        assert copy.encode(text) == own.encode(text)
