"""sentencepiece's models: ids, text and pieces are the library's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.base import Tokenizer
from numballama.tokenizers.sentencepiece import SentencePieceTokenizer, changed_model
from numballama.tokenizers.sentencepiece_proto import Double, message_bytes
from tests.helpers.sentencepiece_models import PAIRS, Pair, load, trained

words = st.lists(
    st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ.,!?'\"-0123456789:;()", min_size=1, max_size=9), max_size=15
)


@settings(max_examples=60)
@given(words=words)
def test_model_and_bin_agree_on_ordinary_text(pair: Pair, words: list[str]) -> None:
    model, binary, library = pair
    text = " ".join(words)
    assert model.encode(text) == binary.encode(text) == [1, *library.encode(text)]


def test_model_and_bin_agree_on_a_story(pair: Pair) -> None:
    text = "Once upon a time, there was a little girl named Lily. She said: “I'd like a café crème!”\nThe end."
    model, binary, _ = pair
    assert model.encode(text) == binary.encode(text)
    assert model.decode(model.encode(text)) == binary.decode(binary.encode(text)) == text


def test_ids_of_a_known_sentence(models: Path) -> None:
    for name in PAIRS["llama2"]:
        assert load(models / name).encode("Hello world") == [1, 15043, 3186]


@given(text=st.text(max_size=60))
def test_model_brings_text_back_as_the_library_does(pair: Pair, text: str) -> None:
    model, _, library = pair
    ids = model.encode(text, bos=False)
    assert ids == library.encode(text)
    assert model.decode(ids) == library.decode(ids)
    if model.vocab_size == 32000:  # tok512 itself folds repeated spaces; the library takes ▁ for a space
        assert model.decode(ids) == text.replace("▁", " ")


@pytest.mark.slow
@settings(max_examples=200)
@given(data=st.data())
def test_any_ids_decode_as_in_the_library(pair: Pair, data: st.DataObject) -> None:
    model, binary, library = pair
    common = st.one_of(
        st.integers(0, 2), st.integers(3, 258), st.sampled_from(library.encode("  a é  the▁")), st.integers(0, 511)
    )
    ids = data.draw(st.lists(common, max_size=25))
    assert model.decode(ids) == library.decode(ids)
    if model.vocab_size == 32000:
        assert binary.decode(ids) == library.decode(ids)


def test_bytes_and_pieces(pair: Pair) -> None:
    model, binary, library = pair
    for token in range(model.vocab_size):
        assert model.piece(token) == binary.piece(token) == library.id_to_piece(token)
        assert model.token_bytes(token) == binary.token_bytes(token) or token == 0  # its look is the model's choice
    assert model.token_bytes(1) == model.token_bytes(2) == b""
    assert model.token_bytes(3 + 0xFF) == b"\xff"
    assert model.token_bytes(np.int64(13)) == b"\n"


# ---- what the files beside it add ----


def directory(folder: Path, model: SentencePieceProcessor, **files: object) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model.serialized_model_proto())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(folder)


def test_added_tokens_beside_a_model(tmp_path: Path) -> None:
    """added_tokens.json, or added_tokens_decoder of tokenizer_config.json, with flags; EOS may be one of them."""
    model = trained()
    size = model.vocab_size()
    added = {"<|im_start|>": size, "<|im_end|>": size + 1, "<think>": size + 2}
    tokenizer = directory(tmp_path, model, added_tokens=added, tokenizer_config={"eos_token": "<|im_end|>"})
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.notes) == (size + 3, size + 1, ())
    assert tokenizer.eog_ids == {2, size + 1}
    once = tokenizer.encode("once", bos=False)
    assert tokenizer.encode("once<think>once<|im_end|>", bos=False, special=True) == [
        *once, size + 2, *once, size + 1
    ]  # fmt: skip
    assert tokenizer.encode("<|im_end|>", bos=False) == model.encode("<|im_end|>")
    assert tokenizer.decode([*once, size + 2, size + 1]) == "once<think>"
    vocabulary = tokenizer.vocabulary()
    assert vocabulary.pieces[-3:] == [b"<|im_start|>", b"<|im_end|>", b"<think>"]
    decoder = {str(size + 2): {"content": "<x>", "special": True, "lstrip": True, "rstrip": True}}
    config = {"eos_token": "<x>", "added_tokens_decoder": decoder}
    tokenizer = directory(tmp_path, model, tokenizer_config=config)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (size + 3, size + 2), "the file's id, as in llama.cpp"
    assert tokenizer.encode("once  <x> \n once", bos=False, special=True) == [*once, size + 2, *once]
    tokenizer = directory(tmp_path, model, tokenizer_config={"eos_token": "<y>"})
    assert tokenizer.eos_id == 2 and "has no '<y>'" in tokenizer.notes[0]


def test_legacy(tmp_path: Path) -> None:
    """A space in front of each part, or of the text alone: as transformers decides it."""
    model = trained()
    once, plain = model.encode("once"), model.encode("<s>once")[-1:]
    for config, legacy in (
        ({}, True),
        ({"legacy": False}, False),
        ({"tokenizer_class": "LlamaTokenizer"}, False),
        ({"tokenizer_class": "LlamaTokenizerFast", "legacy": True}, True),
    ):
        tokenizer = directory(tmp_path, model, tokenizer_config=config)
        ids = tokenizer.encode("once</s>once", bos=False, special=True)
        assert ids[: len(once) + 1] == [*once, 2]
        assert (ids[len(once) + 1 :] == once) is legacy
        assert ids[-1] == plain[-1] or legacy
        assert tokenizer.decode(ids) == ("once once" if legacy else "onceonce")


def test_flags_beside_a_model(tmp_path: Path) -> None:
    """BOS unless add_bos_token is false, EOS if add_eos_token is true; one flag says nothing of the other."""
    model = trained()
    once = model.encode("once")
    for bos in (None, False, True):
        for eos in (None, False, True):
            flags = {"add_bos_token": bos, "add_eos_token": eos}
            config = {name: value for name, value in flags.items() if value is not None}
            tokenizer = directory(tmp_path, model, tokenizer_config=config)
            assert tokenizer.encode("once") == [1] * (bos is not False) + once + [2] * (eos is True)


@pytest.mark.parametrize("own", [True, False])
def test_whether_a_text_gets_a_space_in_front(tmp_path: Path, own: bool) -> None:
    """add_prefix_space, if a file beside the model gives it, else the model's own rule."""
    model = trained(add_dummy_prefix=own)
    for given_flag in (None, False, True):
        config = {} if given_flag is None else {"add_prefix_space": given_flag}
        tokenizer = directory(tmp_path, model, tokenizer_config=config)
        prefix = own if given_flag is None else given_flag
        wanted = changed_model(model.serialized_model_proto(), add_dummy_prefix=prefix)
        for text in ("once", " once", "a  b"):
            ids = tokenizer.encode(text, bos=False)
            assert ids == wanted.encode(text)
            assert tokenizer.decode(ids) == wanted.decode(ids)
        assert tokenizer.vocabulary().add_space_prefix is prefix


def test_a_user_defined_piece_that_ends_a_turn(tmp_path: Path) -> None:
    """Its name makes it a control token: the library itself no longer finds it in text."""
    model = trained(user_defined_symbols=["<|im_end|>", "<think>"])
    end, think = model.piece_to_id("<|im_end|>"), model.piece_to_id("<think>")
    tokenizer = directory(tmp_path, model)
    assert end in model.encode("once<|im_end|>") and end not in tokenizer.encode("once<|im_end|>")
    assert tokenizer.encode("once<|im_end|>", special=True)[-1] == end and tokenizer.decode([end]) == ""
    assert tokenizer.eog_ids == {2, end}
    assert think in tokenizer.encode("once<think>") and tokenizer.decode([think]) == "<think>"


@pytest.mark.parametrize(("text", "shown"), [("x▁y", "x y"), ("▁▁", "  "), ("<think>", "<think>"), ("é▁", "é ")])
def test_an_added_token_is_decoded_with_spaces(tmp_path: Path, text: str, shown: str) -> None:
    """As transformers decodes it, which makes a tokenizer.json of the model; it is found where ▁ is written."""
    model = trained()
    (tmp_path / "tokenizer.model").write_bytes(model.serialized_model_proto())
    (tmp_path / "added_tokens.json").write_text(json.dumps({text: model.vocab_size()}))
    ours = load_tokenizer(tmp_path)
    ids = ours.encode(f"once{text}once", bos=False)
    assert ids.count(model.vocab_size()) == 1 and ours.piece(model.vocab_size()) == text
    once = ours.encode("once", bos=False)
    assert ours.decode([*once, model.vocab_size(), *once]) == f"once{shown} once"


@settings(max_examples=60)
@given(data=st.data())
def test_a_field_of_another_type_is_unknown(data: st.DataObject) -> None:
    """As in the library, whose protobuf skips it: at the top, and in the trainer's and the normalizer's part."""
    number = data.draw(st.integers(1, 5))
    values = st.integers(0, 9) | st.floats(0, 1, width=32) | st.floats(allow_nan=False).map(Double)
    extra = message_bytes([(number, data.draw(values))])
    proto = trained().serialized_model_proto() + extra
    for part, field in ((2, (3, b"x")), (3, (4, b"x"))):  # numbers that are texts
        if data.draw(st.booleans()):
            proto += message_bytes([(part, message_bytes([field]))])
    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(proto)
    plain, own = (SentencePieceTokenizer(each, legacy=False) for each in (trained(), model))
    text = "once</s> upon"  # what follows a control token is encoded with another setting of the model
    assert own.encode(text, special=True) == plain.encode(text, special=True)
    assert own.vocabulary() == plain.vocabulary()
    last = plain.vocab_size - 1
    assert not model.is_control(last) and changed_model(proto, control=[last]).is_control(last)
