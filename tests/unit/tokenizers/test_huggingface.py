"""`tokenizer.json`, and what the files beside it say about BOS and EOS."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from numballama.errors import Error, FormatError, UnsupportedError
from numballama.formats.hf.text_files import read_text_files
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.bpe import BPETokenizer
from tests.golden import make_tokenizer_classes
from tests.golden.make_tokenizers import SMALL
from tests.helpers.bpe import CHAT_CONFIG, save_json, trained
from tests.helpers.extent import EVERYTHING


@pytest.mark.parametrize(
    ("bos", "config", "expected"),
    [
        (False, {}, (False, False)),
        (True, {}, (True, False)),
        (True, CHAT_CONFIG, (True, False)),
        (True, CHAT_CONFIG | {"add_bos_token": False}, (True, False)),
        (True, CHAT_CONFIG | {"add_eos_token": False}, (True, False)),
        (False, CHAT_CONFIG | {"add_bos_token": True, "add_eos_token": True}, (False, False)),
        (False, {"add_bos_token": True}, (False, False)),  # there is no BOS
        (False, CHAT_CONFIG | {"add_bos_token": None}, (False, False)),
        (True, {"bos_token": {"content": "<|begin_of_text|>"}, "add_bos_token": True}, (True, False)),
    ],
)
def test_bos_and_eos(tmp_path: Path, bos: bool, config: dict[str, Any], expected: tuple[bool, bool]) -> None:
    """The post-processor decides, as in transformers 5, not tokenizer_config.json. A contradiction is noted."""
    tokenizer = load_tokenizer(save_json(tmp_path, trained(bos=bos), config))
    first, last = (tokenizer.special_tokens[token] for token in ("<|begin_of_text|>", "<|im_end|>"))
    plain = tokenizer.encode("hi", bos=False)
    assert tokenizer.encode("hi") == [first] * expected[0] + plain + [last] * expected[1]
    assert (tokenizer.add_bos, tokenizer.add_eos) == expected
    wrong = [
        f"add_{name}_token"
        for name, added in zip(("bos", "eos"), expected, strict=True)
        if f"{name}_token" in config and config.get(f"add_{name}_token") not in (None, added)
    ]
    assert [note.split(" is ")[0] for note in tokenizer.notes] == wrong
    if "eos_token" in config:
        assert tokenizer.eos_id == last


CLASSES: dict[str, Any] = json.loads(make_tokenizer_classes.GOLDEN.read_text())


ROWS = list(make_tokenizer_classes.combinations())


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_flags_and_classes_are_transformers(tmp_path: Path, row: tuple[str, str, str | None, str]) -> None:
    """Ids of every combination of flags, post-processor and class. A class without flags of its own has one result.

    By default each row is tried with a third of the settings, in which any three flags have all values together.
    """
    expected = CLASSES["rows"][" | ".join(map(str, row))]
    tried = list(enumerate(make_tokenizer_classes.settings()))
    if not EVERYTHING:
        turn, values, names = ROWS.index(row), make_tokenizer_classes.VALUES, make_tokenizer_classes.FLAGS
        tried = [
            (number, flags)
            for number, flags in tried
            if (sum(values.index(flags.get(name)) for name in names) - turn) % len(values) == 0
        ]
        assert len(tried) == 27
    for number, flags in tried:
        make_tokenizer_classes.write(tmp_path, *row, flags)
        tokenizer = load_tokenizer(tmp_path)
        ids = [tokenizer.encode(text, special=True) for text in make_tokenizer_classes.TEXTS]
        assert ids == CLASSES["results"][expected[number % len(expected)]], flags


def test_one_flag_leaves_the_other_alone(tmp_path: Path) -> None:
    """A sample of the above."""
    for flags in ({"add_eos_token": False}, {"add_bos_token": False}, {"add_eos_token": True}, {}):
        make_tokenizer_classes.write(tmp_path, "bytes", "bos", None, "llama", flags)
        assert load_tokenizer(tmp_path).encode("frog") == [1, 264]
    for legacy, expected in ((True, [292, 2, 288]), (False, [292, 2, 287]), (None, [292, 2, 287])):
        flags = {} if legacy is None else {"legacy": legacy}
        make_tokenizer_classes.write(tmp_path, "normalizer", "none", "LlamaTokenizer", "llama", flags)
        assert load_tokenizer(tmp_path).encode("frog</s>the", special=True) == expected


@pytest.mark.parametrize("single", [["x", "A"], ["A", "x"], ["x", "b", "A", "b"]])
def test_a_post_processor_with_an_id_that_no_token_has(tmp_path: Path, single: list[str]) -> None:
    """It would be fed as an id without a row of the embedding. It is left out, with a note, and is no BOS or EOS."""
    content = make_tokenizer_classes.tokenizer_json("bytes", "none")
    ids = {"b": content["model"]["vocab"]["b"], "x": 99_999}
    parts = {name: {"SpecialToken": {"id": name, "type_id": 0}} for name in ids}
    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [parts.get(name, sequences[0]) for name in single],
        "pair": sequences,
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in ids.items()},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    around = [ids["b"]] if "b" in single else []
    assert tokenizer.encode("frog") == [*around, 264, *around]
    assert 99_999 not in (*tokenizer.encode("frog"), tokenizer.bos_id, tokenizer.eos_id)
    (note,) = tokenizer.notes
    assert note == "the post-processor of tokenizer.json adds id 99999, which no token has: left out"


def test_added_tokens_of_the_files_beside(tmp_path: Path) -> None:
    """added_tokens_decoder, added_tokens.json and special_tokens_map.json add tokens and change flags."""
    content = make_tokenizer_classes.tokenizer_json("bytes", "none")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    think, size = content["added_tokens"][-2]["id"], content["added_tokens"][-1]["id"] + 1
    config = {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {str(size): {"content": "<|im_end|>", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.eog_ids) == (size, size + 1, {2, size})
    assert tokenizer.encode("<|im_end|>", special=True) == [size] and size not in tokenizer.encode("<|im_end|>")
    config["added_tokens_decoder"] = {str(think): {"content": "<think>", "special": True, "lstrip": True}}
    config["eos_token"] = "</s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("x  <think>", special=True)[1:] == [think] and think not in tokenizer.encode("<think>")
    content["added_tokens"][-1]["special"] = True
    content["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    last = content["added_tokens"][-1]
    config["added_tokens_decoder"] = {str(last["id"]): {"content": last["content"], "special": False}}
    config["model_specific_special_tokens"] = {"thought_token": "<think>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert {last["content"], "<think>"} <= tokenizer.special_tokens.keys(), "special in either file"
    assert len({tuple(tokenizer.encode("the frog the frog")) for _ in range(9)}) == 1, "dropout is of training"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (size, size + 1)
    (tmp_path / "added_tokens.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id is None and "has no '<|im_end|>'" in tokenizer.notes[0]
    for damage in ({"x": "y"}, {"x": -1}, {"x": True}, {"x": 1 << 40}):
        (tmp_path / "added_tokens.json").write_text(json.dumps(damage))
        with pytest.raises(FormatError, match="key x; expected a token id"):
            load_tokenizer(tmp_path)


def test_names_of_tokens_that_end_a_turn_count(tmp_path: Path) -> None:
    """Whatever their flag, and also in the model alone. A word that merges make is a word."""
    content = make_tokenizer_classes.tokenizer_json("bytes", "none")
    content["added_tokens"][-2]["content"] = "<|im_end|>"
    vocabulary = content["model"]["vocab"]
    size = len(vocabulary)
    content["added_tokens"] = content["added_tokens"][3:]
    for number, piece in enumerate(("<|eot_id|>", "</", "s>", "</s>x")):
        vocabulary[piece] = size + number
    for entry in content["added_tokens"]:
        entry["id"] += 4
    content["model"]["merges"] += ["< /", "s >", "</ s>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    end = content["added_tokens"][0]["id"]
    assert tokenizer.eog_ids == {end, size}
    assert tokenizer.decode([end, size]) == ""
    assert tokenizer.encode("<|im_end|>", special=True) == [end] and end not in tokenizer.encode("<|im_end|>")
    assert tokenizer.decode([2]) == "</s>"


def test_a_file_without_a_decoder(tmp_path: Path) -> None:
    for kind in ("bytes", "normalizer", "metaspace", "unigram"):
        content = make_tokenizer_classes.tokenizer_json(kind, "none") | {"decoder": None}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.decode(tokenizer.encode("the frog é")) == "the frog é"
        assert "has no decoder" in tokenizer.notes[0]
    words = {"type": "WordLevel", "vocab": {"frog": 0, "the": 1, "<unk>": 2}, "unk_token": "<unk>"}
    content |= {"model": words, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the frog")) == Library.from_str(json.dumps(content)).decode([1, 0])


METASPACE = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
REPLACE = {"type": "Replace", "pattern": {"String": "_"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


@pytest.mark.parametrize(
    ("decoder", "error"),
    [
        (METASPACE, ""),
        ({**METASPACE, "prepend_scheme": "never"}, ""),
        ([REPLACE, {"type": "Fuse"}, STRIP], ""),
        ([{**REPLACE, "content": "-"}, {**REPLACE, "pattern": {"String": "-"}}, {"type": "ByteFallback"}], ""),
        ({"type": "Fuse"}, ""),
        ([{"type": "Fuse"}, REPLACE], "Replace"),
        ([REPLACE, STRIP], "Strip"),
        ([{"type": "Fuse"}, {**STRIP, "stop": 1}], "Strip"),
        ({**REPLACE, "pattern": {"Regex": "_"}}, "Replace"),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"),
    ],
)
def test_decoders_are_the_librarys(tmp_path: Path, decoder: dict[str, Any] | list[Any], error: str) -> None:
    """Whatever character stands for a space. What cannot be decoded token by token is named."""
    pieces = ["[UNK]", "_", *"abcdef", "_a", "bc", "_abc", "<0xC3>", "<0xA9>"]
    model = {"type": "BPE", "vocab": {piece: token for token, piece in enumerate(pieces)}, "unk_token": "[UNK]"}
    model |= {"merges": ["_ a", "b c", "_a bc"], "byte_fallback": True}
    sequence = {"type": "Sequence", "decoders": decoder} if isinstance(decoder, list) else decoder
    content = json.dumps({"model": model, "pre_tokenizer": METASPACE, "decoder": sequence, "added_tokens": []})
    (tmp_path / "tokenizer.json").write_text(content)
    if error:
        with pytest.raises(UnsupportedError, match=f'decoder .*"type": "{error}".*supported are'):
            load_tokenizer(tmp_path)
        return
    tokenizer, library = load_tokenizer(tmp_path), Library.from_str(content)
    for text in ("abc a", " a  b", *(("é", "a é") if "ByteFallback" in content else ()), "fed abc", ""):
        ids = library.encode(text).ids
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == library.decode(ids)
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(content) | {"decoder": None}))
    assert load_tokenizer(tmp_path).decode(ids := library.encode("abc a").ids) == "abc a" and ids


def test_what_is_beside_a_byte_level_decoder_is_noted(tmp_path: Path) -> None:
    library = trained()
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    notes = load_tokenizer(save_json(tmp_path, library)).notes
    assert notes == ("decoder ByteLevel alone is followed, not Strip beside it",)


def test_words_that_end_with_a_suffix(tmp_path: Path) -> None:
    pieces = ["a", "b</w>", "ab</w>", "a</w>"]
    model = {"type": "BPE", "vocab": {piece: token for token, piece in enumerate(pieces)}, "merges": ["a b</w>"]}
    content = {"model": model | {"end_of_word_suffix": "</w>"}, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    content |= {"decoder": {"type": "BPEDecoder", "suffix": "</w>"}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("ab a ab")
    assert ids == [2, 3, 2] and tokenizer.decode(ids) == Library.from_str(json.dumps(content)).decode(ids) + " "
    assert "the last of a text too" in tokenizer.notes[0]


def test_an_unsupported_file_gives_way_to_the_next(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The reason is a note, or stands in the error when there is no other file."""
    pieces = {"type": "WordPiece", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    content = {"version": "1.0", "added_tokens": [], "model": pieces | {"max_input_chars_per_word": 100}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match="WordPiece"):
        load_tokenizer(tmp_path)
    folder: Path = request.getfixturevalue("models")
    (tmp_path / "tokenizer.model").write_bytes((folder / "tok512.model").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 512 and "tokenizer.model is used, because" in tokenizer.notes[0]


def test_the_special_tokens_map_names_them_too(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_json(tmp_path, trained(), None, special_tokens_map=CHAT_CONFIG))
    assert tokenizer.piece(tokenizer.bos_id or 0) == "<|begin_of_text|>"
    assert tokenizer.piece(tokenizer.eos_id or 0) == "<|im_end|>"


def test_what_a_directory_says(tmp_path: Path) -> None:
    config = CHAT_CONFIG | {"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}
    save_json(tmp_path, trained(), config, generation_config={"eos_token_id": [603, 601]}, config={"eos_token_id": 2})
    found = read_text_files(tmp_path)
    assert isinstance(found.tokenizer, BPETokenizer)
    assert (found.chat_template, found.stop_token_ids, found.notes) == ("d", (603, 601), ())
    assert read_text_files(tmp_path, load_tokenizer=False).tokenizer is None
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("j")
    assert (read_text_files(tmp_path).chat_template, read_text_files(tmp_path).stop_token_ids) == ("j", (2,))
    library = Library(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    save_json(tmp_path, library)
    assert "WordPiece" in read_text_files(tmp_path).notes[0] and read_text_files(tmp_path).tokenizer is None
    empty = tmp_path / "empty"
    empty.mkdir()
    assert read_text_files(empty) == replace(
        found, tokenizer=None, chat_templates={}, template_tokens={}, stop_token_ids=()
    )
    with pytest.raises(Error, match="no such directory"):
        read_text_files(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config", "[]", r"tokenizer_config\.json: not a JSON object"),
        ("tokenizer_config", "{", r"tokenizer_config\.json: not JSON"),
        ("tokenizer_config", "[" * 100_000, "not JSON"),
        ("tokenizer_config", '{"add_bos_token": "yes"}', "add_bos_token; expected true or false; found 'yes'"),
        ("tokenizer_config", '{"chat_template": 7}', "chat_template; expected a template"),
        ("generation_config", '{"eos_token_id": ["x"]}', "eos_token_id; expected a token id"),
        ("tokenizer", "{}", r"not a tokenizer\.json"),
        ("tokenizer", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 99999999}, "merges": []}}', "tokens"),
        ("tokenizer", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "1 to 1,048,576"),
        (
            "tokenizer",
            '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
            r"bad merges; at model\.merges, number 0; expected two tokens of model\.vocab that join to a third; "
            "found no token 'b' for 'a' and 'b'; vocabulary and merges are of two tokenizers",
        ),
        (
            "tokenizer",
            '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}',
            "number 0.*found no token 'ab' for 'a' and 'b'",
        ),
        (
            "tokenizer",
            '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "aa": 2}, "merges": ["a a", "aa"]}}',
            "number 1; expected two tokens; found 'aa'$",
        ),
        (
            "tokenizer",
            '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": null}}',
            r"not a tokenizer\.json; found Cannot instantiate",
        ),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    save_json(tmp_path, trained(vocab_size=300))
    (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(FormatError, match=message):
        read_text_files(tmp_path)


@settings(max_examples=60)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_json_ends_in_an_error_or_in_a_tokenizer(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL.read_bytes())
    for offset, byte in edits:
        data[offset % len(data)] = byte
    path = tmp_path / "tokenizer.json"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    try:
        tokenizer = load_tokenizer(path)
        tokenizer.encode("Once upon a time 🙂\0 <s>", special=True)
    except Error:
        return
    tokenizer.decode(range(tokenizer.vocab_size))
