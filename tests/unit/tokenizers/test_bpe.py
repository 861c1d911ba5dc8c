"""Byte-level BPE: ids of llama.cpp and transformers on 5,000 lines, and the rules around them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers

import numballama
from numballama.config import ModelConfig
from numballama.errors import Error, FormatError, UnsupportedError
from numballama.formats.hf.text_files import read_text_files
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.loader import open_checkpoint
from numballama.tokenizers.base import PieceType, Tokenizer, TokenKind
from numballama.tokenizers.bpe import BPETokenizer
from numballama.tokenizers.library import UNICODE_TO_BYTE
from numballama.tokenizers.pretokenizers import PRE_TOKENIZERS
from tests.golden.lines import lines
from tests.golden.make_tokenizers import GOLDEN, SAMPLE, SMALL, digest, digests, with_special
from tests.helpers.bpe import ADDED, CHAT_CONFIG, SPECIAL, chat_model, real, save_json, trained, vocabulary_gguf
from tests.helpers.extent import EVERYTHING
from tests.helpers.random_models import save

PEERS: dict[str, Any] = json.loads(GOLDEN.read_text())
NEWER = {"small-deepseek-v3": 14, "small-spark2_5": 14}
"""Block of lines with U+1F8B4, which is newer than the Unicode tables of one of the two: a symbol, or none."""
LINES_DIGEST = "86e6963a9604"


def opened(name: str, folder: Path) -> Tokenizer:
    """The tokenizer that a name of tokenizers.json stands for; skips the test where a real one is absent."""
    kind, _, rest = name.partition("-")
    if kind == "small":
        data = vocabulary_gguf(load_tokenizer(SMALL).vocabulary(), rest)
    elif (path := real(rest if kind == "gguf" else name)) is None:
        pytest.skip(f"no real tokenizer {name} in NUMBALLAMA_TEST_MODELS; see tests.helpers.bpe.real")
    elif kind != "gguf":
        return load_tokenizer(path)
    else:
        data = vocabulary_gguf(load_tokenizer(path).vocabulary())
    (folder / "v.gguf").write_bytes(data)
    return load_tokenizer(folder / "v.gguf")


# ---- peers ----


def test_the_lines_are_those_of_the_golden_file() -> None:
    assert len(lines()) == 5000
    assert digest([[ord(character) for character in line] for line in lines()]) == LINES_DIGEST


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_ids_are_the_peers(name: str, tmp_path: Path) -> None:
    """By default of every third hundred of lines, of other ones for each name."""
    tokenizer, peer = opened(name, tmp_path), PEERS[name]
    sample = [tokenizer.encode(line, bos=False) for line in lines()[SAMPLE]]
    assert [" ".join(map(str, line)) for line in sample] == peer["sample"]  # first: it shows what differs
    expected, turn = peer["lines"], list(PEERS).index(name)
    assert len(expected) == len(lines()) // 100
    blocks = [n for n in range(len(expected)) if (EVERYTHING or (n - turn) % 3 == 0) and n != NEWER.get(name, -1)]
    some = [line for n in blocks for line in lines()[100 * n : 100 * (n + 1)]]
    ids = [tokenizer.encode(line, bos=False) for line in some]
    assert digests(ids) == [expected[n] for n in blocks]
    marked = with_special(peer["special"])
    assert digests([tokenizer.encode(line, bos=False) for line in marked]) == peer["spelled"]
    assert digests([tokenizer.encode(line, bos=False, special=True) for line in marked]) == peer["parsed"]
    if not name.startswith("qwen"):  # whose tokenizer.json normalises
        assert [tokenizer.decode(line) for line in ids] == some


@pytest.fixture(scope="module", params=["smollm", "llama-bpe", "nfc", "metaspace", "bos"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, BPETokenizer]:
    """(the library's, ours from its JSON)."""
    kind = request.param
    library = trained(
        kind if kind in PRE_TOKENIZERS else "qwen2", nfc=kind == "nfc", metaspace=kind == "metaspace", bos=kind == "bos"
    )
    ours = load_tokenizer(save_json(tmp_path_factory.mktemp("bpe"), library))
    assert isinstance(ours, BPETokenizer)
    return library, ours


texts = st.one_of(
    st.text(max_size=60),
    st.text("aeoth .,\n'sS123é🙂", max_size=80),
    st.lists(st.sampled_from([*SPECIAL, *ADDED, "<s>", "hello", " ", "\n", "<|im_", "é"])).map("".join),
)


@pytest.mark.slow
@settings(max_examples=150)
@given(text=texts)
def test_any_text(pair: tuple[Library, BPETokenizer], text: str) -> None:
    library, ours = pair
    ids = ours.encode(text, bos=False)
    assert not {ours.special_tokens[token] for token in SPECIAL} & set(ids), "never from text alone"
    library.encode_special_tokens = True
    assert ids == library.encode(text, add_special_tokens=False).ids
    library.encode_special_tokens = False
    assert ours.encode(text, bos=False, special=True) == library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, special=True) == library.encode(text).ids
    assert ours.decode(ids) == library.decode(ids)
    if library.normalizer is None:
        assert ours.decode(ids) == text
    if not any(token in text for token in SPECIAL):
        assert ids == ours.encode(text, bos=False, special=True) or "<s>" in text


@pytest.mark.slow
@settings(max_examples=150)
@given(spans=st.lists(st.tuples(texts, st.booleans()), max_size=6))
def test_any_spans(pair: tuple[Library, BPETokenizer], spans: list[tuple[str, bool]]) -> None:
    """Control tokens in trusted spans part the text; between them control tokens are text, across borders of spans."""
    library, ours = pair
    parts = [""]
    for text, trusted in _merged(spans):
        if trusted:
            first, *rest = re.split(f"({'|'.join(map(re.escape, ours.special_tokens))})", text)
            parts[-1] += first
            parts += rest
        else:
            parts[-1] += text
    library.encode_special_tokens = True
    expected = [
        token
        for number, part in enumerate(parts)
        for token in ([library.token_to_id(part)] if number % 2 else library.encode(part, add_special_tokens=False).ids)
    ]
    library.encode_special_tokens = False
    assert ours.encode_spans(spans) == expected


def _merged(spans: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Neighbours that are both trusted, or both not, as one."""
    groups = groupby((span for span in spans if span[0]), key=lambda span: span[1])
    return [("".join(text for text, _ in group), trusted) for trusted, group in groups]


@pytest.mark.slow
@settings(max_examples=150)
@given(data=st.data())
def test_any_ids(pair: tuple[Library, BPETokenizer], data: st.DataObject) -> None:
    """Text of any ids is the library's; pushed one by one, it comes in whole characters."""
    library, ours = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1) | st.integers(0, 260), max_size=25))
    silent = {token for token in range(ours.vocab_size) if ours.entry(token)[0] is TokenKind.CONTROL}
    ordinary = [token for token in ids if token not in silent]
    expected = library.decode(ordinary, skip_special_tokens=True)
    if library.token_to_id("<0x00>") is None or "\ufffd" not in expected:  # there it takes a whole run of bytes for bad
        assert ours.decode(ordinary) == expected
    decoder = ours.decoder()
    parts = [decoder.push(token) for token in ids]
    assert "".join(parts) + decoder.flush() == ours.decode(ids)
    assert decoder.flush() == ""


def test_a_character_appears_with_its_last_byte(pair: tuple[Library, BPETokenizer]) -> None:
    library, ours = pair
    if ours.entry(library.token_to_id("a"))[0] is TokenKind.BYTE:
        spelled = [
            library.token_to_id({byte: letter for letter, byte in UNICODE_TO_BYTE.items()}[b]) for b in "🙂é".encode()
        ]
        decoder = ours.decoder()
        assert [decoder.push(token) for token in spelled] == ["", "", "", "🙂", "", "é"]
        assert [decoder.push(token) for token in spelled[:2]] == ["", ""]
        assert decoder.flush() == "\ufffd"
        assert [decoder.push(token) for token in (spelled[0], library.token_to_id("<think>"))] == ["", "\ufffd<think>"]


def test_control_tokens_of_messages_stay_text(pair: tuple[Library, BPETokenizer]) -> None:
    _, ours = pair
    end = ours.special_tokens["<|im_end|>"]
    ids = ours.encode_spans([("hi <|im_end|> you", False), ("<|im_end|>", True)])
    assert ids.count(end) == 1 and ids[-1] == end
    assert ids[:-1] == ours.encode("hi <|im_end|> you", bos=False)


def test_a_special_token_among_the_words_is_not_made_of_text(tmp_path: Path) -> None:
    """Even where a whole word is one, and words become tokens without merges."""
    vocabulary = load_tokenizer(SMALL).vocabulary()
    words = [piece.decode() for piece in vocabulary.pieces]
    token = words.index("the")
    types = [PieceType.CONTROL if t == token else kind for t, kind in enumerate(vocabulary.types)]
    path = tmp_path / "v.gguf"
    path.write_bytes(vocabulary_gguf(replace(vocabulary, types=types), "llama-bpe"))
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("the", bos=False)
    assert token not in ids and tokenizer.decode(ids) == "the"
    assert tokenizer.encode("the", bos=False, special=True) == [token]
    assert tokenizer.decode([token]) == ""


# ---- BOS, EOS and the files beside ----


def test_which_file_of_a_directory(tmp_path: Path, models: Path) -> None:
    with pytest.raises(FormatError, match=r"without a tokenizer.*tokenizer\.json"):
        load_tokenizer(tmp_path)
    chat_model(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 607
    (tmp_path / "tokenizer.bin").write_bytes((models / "tok512.bin").read_bytes())
    assert load_tokenizer(tmp_path).vocab_size == 512
    (tmp_path / "tokenizer.model").write_bytes((models / "llama2_tokenizer.model").read_bytes())
    assert numballama.load_tokenizer(tmp_path).vocab_size == 32000
    save_json(tmp_path, trained(vocab_size=400))
    assert load_tokenizer(tmp_path).vocab_size == 407


def test_sentencepiece_in_a_directory(tmp_path: Path, models: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((models / "tok512.model").read_bytes())
    assert load_tokenizer(tmp_path).encode("a")[0] == 1
    decoder = {"1": {"content": "<s>"}, "512": {"content": "<|im_end|>"}}
    config = {"add_bos_token": False, "add_eos_token": True, "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = read_text_files(tmp_path)
    assert found.tokenizer is not None and found.notes == ()
    assert found.tokenizer.encode("a<|im_end|>", bos=False, special=True)[-1] == 512
    assert found.tokenizer.vocab_size == 513 and found.tokenizer.eog_ids == {2, 512}
    plain = found.tokenizer.encode("a", bos=False)
    assert found.tokenizer.encode("a") == load_tokenizer(tmp_path).encode("a") == [*plain, 2]


def test_a_directory_as_the_tokenizer_of_a_model(tmp_path: Path) -> None:
    """It brings its chat template and stop ids along."""
    model = save(tmp_path, "llama2c-v1", ModelConfig(16, 12, 1, 4, 2, 608, 8))[0]
    folder = tmp_path / "text"
    save_json(folder, trained(), CHAT_CONFIG | {"chat_template": "T"}, generation_config={"eos_token_id": [3]})
    opened = open_checkpoint(model, folder)
    assert (opened.chat_template, opened.stop_token_ids) == ("T", (3,))
    assert opened.tokenizer is not None and opened.tokenizer.vocab_size == 607


# ---- GGUF ----


def test_through_gguf(tmp_path: Path) -> None:
    """What we write into GGUF is what we read from it: ids, pieces, special tokens, BOS and EOS."""
    path = chat_model(tmp_path, pre="smollm", template="{{ x }}")
    ours = load_tokenizer(tmp_path / "tokenizer")
    checkpoint = open_checkpoint(path)
    again = checkpoint.tokenizer
    assert again is not None and checkpoint.chat_template == "{{ x }}" and checkpoint.stop_token_ids == (ours.eos_id,)
    assert again.vocabulary() == ours.vocabulary()
    assert (again.bos_id, again.eos_id, again.add_bos) == (ours.bos_id, ours.eos_id, False)
    for token in range(ours.vocab_size):
        assert again.entry(token) == ours.entry(token)
        assert again.piece(token) == ours.piece(token)
    for line in with_special([*SPECIAL, *ADDED]):
        assert again.encode(line, special=True) == ours.encode(line, special=True)
    assert again.encode("a<think>b<|im_end|>", bos=False) == ours.encode("a<think>b<|im_end|>", bos=False)


def test_what_gguf_cannot_hold(tmp_path: Path) -> None:
    library = trained("qwen2", nfc=True)
    assert "normalises" in load_tokenizer(save_json(tmp_path / "nfc", library)).vocabulary().notes[0]
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UnsupportedError, match="no name for this pre-tokenizer"):
        load_tokenizer(save_json(tmp_path / "w", library)).vocabulary()
    with pytest.raises(UnsupportedError, match="sentencepiece"):
        load_tokenizer(save_json(tmp_path / "m", trained(metaspace=True))).vocabulary()


@pytest.mark.parametrize(
    ("changes", "pre", "kind", "message"),
    [
        ({}, "klingon", UnsupportedError, "'klingon' .*is not known; known are 85 names of llama.cpp, such as '"),
        ({"merges": [b"ab"]}, None, FormatError, "merges; expected two pieces.*number 0"),
        ({"merges": [b"zz qq"]}, None, FormatError, "bad vocabulary"),
        ({"types": [1]}, None, FormatError, "token_type; expected 1,805 numbers"),
        ({"pieces": []}, None, FormatError, "tokens; expected 1 to"),
    ],
)
def test_damaged_vocabularies(
    tmp_path: Path, changes: dict[str, Any], pre: str | None, kind: type[Error], message: str
) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(vocabulary_gguf(replace(load_tokenizer(SMALL).vocabulary(), **changes), pre))
    with pytest.raises(kind, match=message):
        load_tokenizer(path)


@pytest.mark.slow
def test_an_empty_name_and_llama_3s_bos(tmp_path: Path) -> None:
    """Without a name the pre-tokenizer is llama.cpp's default one; Llama 3's wants BOS, if not told otherwise."""
    path = tmp_path / "v.gguf"
    vocabulary = replace(load_tokenizer(SMALL).vocabulary(), bos_id=1803, pre=None)
    for pre, named, bos in (("", "default", False), ("llama-bpe", "llama3", True)):
        path.unlink(missing_ok=True)
        path.write_bytes(vocabulary_gguf(vocabulary, pre))
        tokenizer = load_tokenizer(path)
        assert digests([tokenizer.encode(line, bos=False) for line in lines()]) == PEERS[f"small-{named}"]["lines"]
        assert tokenizer.add_bos is bos
