"""Tokenizers of the tokenizers library: spans, flags of added tokens, ids beyond an embedding, panics."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from numballama.errors import Error, FormatError
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.base import Tokenizer
from tests.golden.make_tokenizer_classes import TOKENIZERS, tokenizer_json
from tests.helpers.bpe import save_json, trained
from tests.helpers.extent import EVERYTHING

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
WORDS = ["<x>", "</s>", "<s>", "<think>", "    ", " ", "\n", "frog", "the", "é", "x", "<unk>", "frog frog", "</"]
PLACE = "\ue000"


def save(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


class Pair:
    """A tokenizer's JSON, and ours of it."""

    def __init__(self, content: dict[str, Any], ours: Tokenizer) -> None:
        self.content, self.ours = content, ours


@pytest.fixture(scope="module", params=[(kind, flag) for kind in TOKENIZERS for flag in (None, *FLAGS)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A control token <x> and <think> have one of the flags."""
    kind, flag = request.param
    content = tokenizer_json(kind, "none")
    last = content["added_tokens"][-1]
    content["added_tokens"].append(last | {"id": last["id"] + 1, "content": "<x>", "special": True})
    for entry in content["added_tokens"]:
        if flag is not None and entry["content"] in ("<x>", "<think>"):
            entry[flag] = True
    return Pair(content, load_tokenizer(save(tmp_path_factory.mktemp("library"), content)))


def oracle(content: dict[str, Any]) -> Library:
    """The library with control tokens in `text` replaced by characters of their own, each with its token's flags."""
    library = Library.from_str(json.dumps(content))
    library.encode_special_tokens = True
    for number, entry in enumerate(content["added_tokens"]):
        if entry["special"]:
            flags = {flag: entry[flag] for flag in FLAGS}
            library.add_tokens([AddedToken(chr(ord(PLACE) + number), special=False, **flags)])
    return library


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(spans=st.lists(st.tuples(st.lists(st.sampled_from(WORDS), max_size=4).map("".join), st.booleans()), max_size=5))
def test_spans_are_one_text(pair: Pair, spans: list[tuple[str, bool]]) -> None:
    """Every flag, normaliser and prepend scheme works across the borders of spans, as in one text of the library."""
    content, ours = pair.content, pair.ours
    if any(entry["single_word"] or entry["normalized"] for entry in content["added_tokens"]):
        return  # then a spelling is not always a token
    control = {entry["content"]: entry["id"] for entry in content["added_tokens"] if entry["special"]}
    if any(text[-1:] == "<" or text[:1] == "/" for text, _ in spans):
        return  # a spelling in two spans is not trusted
    places = {entry["content"]: chr(ord(PLACE) + n) for n, entry in enumerate(content["added_tokens"])}
    text = "".join(_placed(part, places, control) if trusted else part for part, trusted in spans)
    library = oracle(content)
    ids = {library.token_to_id(places[name]): token for name, token in control.items()}
    found = library.encode(text).ids
    if set(control.values()).isdisjoint(found):  # a model may make control tokens of words; ours does not
        assert ours.encode_spans(spans) == [ids.get(token, token) for token in found]


def _placed(text: str, places: dict[str, str], control: dict[str, int]) -> str:
    for name in control:
        text = text.replace(name, places[name])
    return text


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from(WORDS), max_size=8).map("".join))
def test_a_text_is_the_librarys(pair: Pair, text: str) -> None:
    content, ours = pair.content, pair.ours
    library = Library.from_str(json.dumps(content))
    control = {entry["id"] for entry in content["added_tokens"] if entry["special"]}
    assert ours.encode(text, bos=False, special=True) == library.encode(text).ids
    library.encode_special_tokens = True
    found = library.encode(text).ids
    assert control.isdisjoint(set(ours.encode(text, bos=False)) - {0})
    if control.isdisjoint(found):
        assert ours.encode(text, bos=False) == found


@settings(max_examples=200 if EVERYTHING else 60, deadline=None)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.lists(st.text("▁x é<", min_size=1, max_size=5), min_size=1, max_size=4, unique=True),
    st.booleans(),
    st.data(),
)
def test_added_tokens_are_decoded_as_the_library_does(
    tmp_path_factory: pytest.TempPathFactory, kind: str, texts: list[str], normalized: bool, data: st.DataObject
) -> None:
    """With a space for ▁, but not in a byte-level vocabulary. At the beginning, too, where decoders remove a space."""
    assume(kind != "bytes" or "é" not in "".join(texts))  # the next test
    content = tokenizer_json(kind, "none")
    library = Library.from_str(json.dumps(content))
    library.add_tokens([AddedToken(text, special=False, normalized=normalized) for text in texts])
    content = json.loads(library.to_str())
    added = [library.token_to_id(text) for text in texts]
    names = map(library.id_to_token, range(library.get_vocab_size()))
    ordinary = [token for token, name in enumerate(names) if name in ("x", "▁", "▁the", "a")]
    ids = data.draw(st.lists(st.sampled_from([*added, *ordinary]), max_size=6))
    ours = load_tokenizer(save(tmp_path_factory.mktemp("added"), content))
    assert ours.decode(ids) == library.decode(ids)


def test_an_added_token_is_its_text(tmp_path: Path) -> None:
    """Also in a byte-level vocabulary, whose letter for a byte it may be: the library decodes é as the byte 0xE9."""
    content = tokenizer_json("bytes", "none")
    library = Library.from_str(json.dumps(content))
    library.add_tokens([AddedToken("é", special=False)])
    ours = load_tokenizer(save(tmp_path, json.loads(library.to_str())))
    token = library.token_to_id("é")
    assert ours.encode("é", bos=False) == [token] and ours.decode([token]) == "é"


def test_unknown_text_does_not_vanish(tmp_path: Path) -> None:
    """Neither beside a control token that stays text, nor in one that is spelled as the unknown token is."""
    ours = load_tokenizer(save(tmp_path, tokenizer_json("unknown", "none")))
    unknown, frog = 0, ours.encode("frog", bos=False)[0]
    assert ours.encode("é", bos=False)[-1] == unknown
    assert ours.encode_spans([("frog", True), ("</s>é", False)])[0] == frog
    assert unknown in ours.encode_spans([("frog", True), ("</s>é", False)])


def test_ids_beyond_the_embedding_are_not_fed(tmp_path: Path) -> None:
    content = tokenizer_json("bytes", "eos bos")
    size = content["added_tokens"][-1]["id"] + 1
    ours = load_tokenizer(save(tmp_path, content))
    assert ours.encode("a<think>    b")[-1] == ours.encode("b", bos=False)[0]
    assert max(ours.encode("a<think>    b")) == size - 1
    ours.limit(size - 2)
    ids = ours.encode("a<think>    b", bos=False)
    assert max(ids) < size - 2 and ours.decode(ids) == "a<think>    b"
    ours.limit(2)
    assert ours.encode("", bos=True) == [1], "EOS, id 2, is not added"


def _no_tokens(content: dict[str, Any]) -> None:
    content["post_processor"]["special_tokens"] = {}


def _other_sequence(content: dict[str, Any]) -> None:
    content["post_processor"]["single"] = [{"Sequence": {"id": "B", "type_id": 0}}]


def _empty_pattern(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}


def _no_length(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "FixedLength", "length": 0}


def _no_map(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


def _cut_map(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AQAAAAAAAAAAAAAA"}


@pytest.mark.parametrize("damage", [_no_tokens, _other_sequence, _empty_pattern, _no_length, _no_map, _cut_map])
def test_a_panic_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[dict[str, Any]], None]
) -> None:
    """Rust writes to file descriptor 2 itself; only our error is left."""
    content = tokenizer_json("bytes", "bos")
    damage(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        load_tokenizer(save(tmp_path, content))
    assert capfd.readouterr() == ("", "")


def test_what_others_print_meanwhile_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    from numballama.tokenizers.library import library_errors

    def fails() -> None:
        with library_errors("message", quiet=True):
            os.write(2, b"a warning\n")
            raise ValueError("reason")

    with pytest.raises(Error, match="message: reason"):
        fails()
    assert capfd.readouterr().err == "a warning\n"


def test_other_threads_run_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    """Those of a server, which send what has been generated for others."""
    ours, text = load_tokenizer(save_json(tmp_path, trained())), " word" * 100_000
    pauses, done = [0.0], threading.Event()

    def watch() -> None:
        latest = time.perf_counter()
        while not done.wait(0.002):
            now = time.perf_counter()
            pauses.append(now - latest)
            latest = now

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.perf_counter()
    ids = ours.encode(text)
    seconds = time.perf_counter() - started
    done.set()
    watching.join()
    assert max(pauses) < seconds / 2
    assert ids == 125 * ours.encode(" word" * 800)  # which is short
