"""The tokenizer inside a GGUF file: its ids and text against sentencepiece, and text end to end."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

import numballama
from numballama.errors import Error, FormatError, UnsupportedError
from numballama.formats.gguf.writer import write_gguf
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.loader import open_checkpoint
from numballama.quantization.types import Q8_0
from numballama.tokenizers.base import PieceType, Tokenizer
from tests.golden.make_tokenizers import SMALL
from tests.helpers.bpe import vocabulary_gguf
from tests.helpers.gguf_files import (
    ARRAY,
    BOOL,
    CONFIG,
    F32_,
    STRING,
    U32,
    array,
    container,
    edited,
    entries_of,
    entry,
    letters,
    save,
    text,
    u32,
    weights_of,
)
from tests.helpers.sentencepiece_models import through_gguf, trained

# ---- tokenizers ----

STORY = "Once upon a time, there was a little girl named Lily. She said: “I'd like a café crème!”\nThe end. 12 34  5\t6"


@pytest.fixture(scope="module", params=["trained", "no prefix", "llama2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "llama2":
        models: Path = request.getfixturevalue("models")
        return through_gguf(folder, SentencePieceProcessor(str(models / "llama2_tokenizer.model")))
    return through_gguf(folder, trained(add_dummy_prefix=request.param == "trained"))


@pytest.mark.slow
@settings(max_examples=200)
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.text("aeoth ▁.,\n🙂é", max_size=80),
        st.text(" ", max_size=70),
        st.lists(st.sampled_from([*STORY.split(), " ", "  ", "<s>", "</s>", "<0x41>", "<unk>"])).map(" ".join),
    )
)
def test_ids_and_text_are_sentencepieces(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    library, ours = pair
    assert ours.encode(text) == library.encode(text)
    assert ours.encode(text, special=True) == library.encode(text, special=True)
    ids = ours.encode(text, bos=False)
    assert ours.decode(ids) == library.decode(ids) == text.replace("▁", " ")


@pytest.mark.slow
def test_a_story_and_long_runs(pair: tuple[Tokenizer, Tokenizer]) -> None:
    library, ours = pair
    for story in (STORY, "a" * 5000, " " * 5000, "🙂" * 500, STORY * 20):
        assert ours.encode(story) == library.encode(story)


@pytest.mark.slow
@settings(max_examples=100)
@given(data=st.data())
def test_any_ids_decode_as_sentencepieces(pair: tuple[Tokenizer, Tokenizer], data: Any) -> None:
    library, ours = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1) | st.integers(0, 300), max_size=25))
    assert ours.decode(ids) == library.decode(ids)


def test_every_piece(pair: tuple[Tokenizer, Tokenizer]) -> None:
    library, ours = pair
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (library.bos_id, library.eos_id, library.vocab_size)
    for token in range(ours.vocab_size):
        assert ours.piece(token) == library.piece(token)
        assert ours.entry(token) == library.entry(token)


def test_models_that_cannot_be_expressed(tmp_path: Path, models: Path) -> None:
    for options, message in (
        ({"model_type": "unigram", "vocab_size": 300}, "not BPE"),
        ({"treat_whitespace_as_suffix": True}, "after words"),
    ):
        path = tmp_path / "t.model"
        path.write_bytes(trained(**options).serialized_model_proto())
        with pytest.raises(UnsupportedError, match=message):
            load_tokenizer(path).vocabulary()
    config = replace(CONFIG, vocab_size=512)
    tok512 = load_tokenizer(models / "tok512.model")
    notes = write_gguf(tmp_path / "t.gguf", config, weights_of(config), tokenizer=tok512)
    assert len(notes) == 1
    assert "normalises" in notes[0]
    ours = load_tokenizer(tmp_path / "t.gguf")
    assert ours.encode(STORY.split("\n")[0]) == tok512.encode(STORY.split("\n")[0])


def test_llama2c_tokenizers_are_written_alike(tmp_path: Path, models: Path) -> None:
    """tokenizer.bin, the .model that it was made from, and what came out of a GGUF file: one vocabulary."""
    model, binary = (load_tokenizer(models / name) for name in ("llama2_tokenizer.model", "tokenizer_llama2.bin"))
    assert model.vocabulary() == binary.vocabulary()
    path = save(tmp_path / "m.gguf", replace(CONFIG, vocab_size=32000), Q8_0, tokenizer=binary)
    assert load_tokenizer(path).encode(STORY) == binary.encode(STORY)


def vocabulary_only(**changes: bytes | None) -> bytes:
    """A GGUF file without tensors, of a vocabulary of six; keys without their prefix."""
    pieces = [b"<unk>", b"<s>", b"</s>", "▁".encode(), b"a", "▁a".encode()]
    entries: dict[str, bytes | None] = {
        "model": entry("tokenizer.ggml.model", STRING, text("llama")),
        "tokens": entry("tokenizer.ggml.tokens", ARRAY, array(STRING, 6, b"".join(map(text, pieces)))),
        "scores": entry("tokenizer.ggml.scores", ARRAY, array(F32_, 6, struct.pack("<6f", 0, 0, 0, -3, -2, -1))),
        "token_type": entry("tokenizer.ggml.token_type", ARRAY, array(5, 6, struct.pack("<6i", 2, 3, 3, 1, 1, 1))),
    } | changes
    return container([value for value in entries.values() if value], [])


def flag(name: str, value: bool) -> bytes:
    return entry(f"tokenizer.ggml.{name}", BOOL, bytes([value]))


def test_a_file_of_a_vocabulary_alone(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"

    def load(**changes: bytes | None) -> Tokenizer:
        path.unlink(missing_ok=True)
        path.write_bytes(vocabulary_only(**changes))
        return load_tokenizer(path)

    assert load().encode("aa") == [1, 5, 4]  # BOS 1 and the space are the defaults
    assert (load().bos_id, load().eos_id) == (1, 2)
    assert load().decode([1, 5, 4, 2]) == "aa"
    assert load(x=flag("add_bos_token", False)).encode("aa") == [5, 4]
    assert load(x=flag("add_eos_token", True)).encode("aa") == [1, 5, 4, 2]
    assert load(x=flag("add_eos_token", True)).encode("aa", bos=False) == [5, 4]
    assert load(x=flag("add_space_prefix", False)).encode("aa") == [1, 4, 4]
    assert load(x=flag("add_space_prefix", False)).decode([1, 5, 4, 2]) == " aa"
    assert load(token_type=None).encode("a<s>a", special=True) == [1, 5, 1, 5]
    assert load(x=u32("tokenizer.ggml.eos_token_id", 4)).token_bytes(4) == b""  # EOS is never text, whatever its type
    assert load(x=u32("tokenizer.ggml.bos_token_id", 0xFFFFFFFF)).encode("a") == [5]
    assert load().encode("ab") == [1, 5, 0]
    assert load(scores=None).encode("aa") == [1, 5, 4], "scores are 0, as in llama.cpp"
    for name in ("bos", "unknown"):
        outside = load(x=u32(f"tokenizer.ggml.{name}_token_id", 99))
        assert outside.notes == (f"tokenizer.ggml.{name}_token_id is 99, outside the vocabulary of 6: taken for none",)
    with pytest.raises(Error, match="no token for 'b', nor for unknown"):
        load(x=u32("tokenizer.ggml.unknown_token_id", 99)).encode("ab")
    with pytest.raises(FormatError, match=r"general\.architecture"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": entry("tokenizer.ggml.model", STRING, text("bert"))}, UnsupportedError, "bert.*WordPiece"),
        ({"model": entry("tokenizer.ggml.model", STRING, text("gpt2"))}, FormatError, "tokenizer.ggml.merges"),
        ({"model": entry("tokenizer.ggml.model", STRING, text("x"))}, UnsupportedError, "'x'"),
        ({"model": None}, FormatError, "without a tokenizer"),
        ({"model": u32("tokenizer.ggml.model", 1)}, FormatError, "wrong type"),
        ({"tokens": None}, FormatError, "tokenizer.ggml.tokens; expected 1 to"),
        ({"tokens": entry("tokenizer.ggml.tokens", ARRAY, array(STRING, 0))}, FormatError, "expected 1 to"),
        ({"tokens": entry("tokenizer.ggml.tokens", ARRAY, array(U32, 1, bytes(4)))}, FormatError, "wrong type"),
        ({"scores": entry("tokenizer.ggml.scores", ARRAY, array(F32_, 5, bytes(20)))}, FormatError, "found 5"),
        ({"token_type": entry("tokenizer.ggml.token_type", ARRAY, array(5, 7, bytes(28)))}, FormatError, "found 7"),
    ],
)
def test_damaged_vocabularies(
    tmp_path: Path, changes: dict[str, bytes | None], kind: type[Error], message: str
) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(vocabulary_only(**changes))
    with pytest.raises(kind, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_names_of_tokens_that_end_a_turn_count(tmp_path: Path, kind: str) -> None:
    """Whatever their type, as in llama.cpp, with a note; they are not printed, and not found in text."""
    path = tmp_path / "v.gguf"
    if kind == "llama":
        pieces = [
            b"<unk>",
            b"<s>",
            b"</s>",
            "▁".encode(),
            b"a",
            "▁a".encode(),
            b"<|eot_id|>",
            b"<think>",
            b"<|fim_prefix|>",
        ]
        types = [2, 3, 3, 1, 1, 1, 4, 4, 1]
        tokens = entry("tokenizer.ggml.tokens", ARRAY, array(STRING, 9, b"".join(map(text, pieces))))
        kinds = entry("tokenizer.ggml.token_type", ARRAY, array(5, 9, struct.pack("<9i", *types)))
        scores = entry("tokenizer.ggml.scores", ARRAY, array(F32_, 9, struct.pack("<9f", *[0.0] * 9)))
        path.write_bytes(vocabulary_only(tokens=tokens, token_type=kinds, scores=scores))
    else:
        vocabulary = load_tokenizer(SMALL).vocabulary()
        pieces = [*vocabulary.pieces, b"<|eot_id|>", b"<think>", b"<|fim_prefix|>", b"<eos>", b"eos>"]
        types = [*vocabulary.types, 1, 4, 1, 1, 1]
        merges = [*vocabulary.merges, b"< eos>"]
        path.write_bytes(vocabulary_gguf(replace(vocabulary, pieces=pieces, types=types, merges=merges), "gpt-2"))
    tokenizer = load_tokenizer(path)
    end, think, fim = (pieces.index(name) for name in (b"<|eot_id|>", b"<think>", b"<|fim_prefix|>"))
    assert end in tokenizer.eog_ids and fim not in tokenizer.eog_ids and "<|eot_id|>" in tokenizer.notes[0]
    assert tokenizer.decode([end, think, fim]) == "<think>"
    spelled = "a<|eot_id|>a<think><|fim_prefix|>"
    assert {end, think, fim} & set(tokenizer.encode(spelled)) == {think}
    assert {end, think, fim} & set(tokenizer.encode(spelled, special=True)) == {end, think, fim}
    assert {end, think} <= set(tokenizer.encode_spans([("a<|eot_id|>", False), ("a<|eot_id|><think>", True)]))
    if kind == "gpt2":
        word = pieces.index(b"<eos>")
        assert word not in tokenizer.eog_ids and tokenizer.decode([word]) == "<eos>", "merges make it: a word"


def vocabulary_of(pieces: list[bytes], types: list[int], scores: list[float], **more: bytes) -> bytes:
    """A GGUF file of model "llama" without tensors, with these tokens."""
    size = len(pieces)
    return vocabulary_only(
        tokens=entry("tokenizer.ggml.tokens", ARRAY, array(STRING, size, b"".join(map(text, pieces)))),
        token_type=entry("tokenizer.ggml.token_type", ARRAY, array(5, size, struct.pack(f"<{size}i", *types))),
        scores=entry("tokenizer.ggml.scores", ARRAY, array(F32_, size, struct.pack(f"<{size}f", *scores))),
        **more,
    )


@pytest.mark.parametrize("kind", [0, PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED])
def test_bytes_that_have_another_type(tmp_path: Path, kind: int) -> None:
    """llama.cpp encodes by their names, whatever their type; it prints "<0x0A>" where a newline is meant."""
    source = letters(300).vocabulary()
    path = tmp_path / "v.gguf"
    types = [kind if each == PieceType.BYTE else each for each in source.types]
    path.write_bytes(vocabulary_of(list(source.pieces), types, list(source.scores)))
    ours, said = load_tokenizer(path), "a\n\u00e9 \U0001f642 <0x0A>"
    assert ours.encode(said) == letters(300).encode(said) and ours.decode(ours.encode(said)) == said
    assert ours.notes == ("tokens of bytes by their names, not their types: <0x00> and 255 more",)
    path.unlink()
    few = [b"x" if piece == b"<0x0A>" else piece for piece in source.pieces]
    path.write_bytes(vocabulary_of(few, types, list(source.scores)))
    assert load_tokenizer(path).notes == (), "a few such names are words"


def test_user_defined_spaces_of_older_converters(tmp_path: Path) -> None:
    """Their pieces have \u2581 where newer ones have a space. Spaces merge to them, as in llama.cpp."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(each.encode() for each in ("\u2581", "a", "\u2581\u2581"))]
    path = tmp_path / "v.gguf"
    path.write_bytes(vocabulary_of(pieces, [2, 3, 3, 1, 1, 4], [0, 0, 0, -1, -1, -1000]))
    assert load_tokenizer(path).encode("a  a") == [1, 3, 4, 5, 4]
    assert load_tokenizer(path).encode("\u2581\u2581") == [1, 5], "and it is found as it is"


@pytest.mark.parametrize(("name", "strips"), [("Phi-3 mini llamafied", True), ("my phi3", True), ("Phi 2", False)])
def test_white_space_after_control_tokens_of_phi_3(tmp_path: Path, name: str, strips: bool) -> None:
    """GGUF does not say that it belongs to them; llama.cpp goes by the name of the model."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(each.encode() for each in ("\u2581", "a", "\n", "<|user|>"))]
    path = tmp_path / "v.gguf"
    named = entry("general.name", STRING, text(name))
    path.write_bytes(vocabulary_of(pieces, [2, 3, 3, 1, 1, 1, 3], [0, 0, 0, -1, -1, -1, 0], x=named))
    ids = load_tokenizer(path).encode("<|user|>\n a<s>\n", special=True)
    assert ids == ([1, 6, 3, 4, 1, 3, 5] if strips else [1, 6, 3, 5, 3, 4, 1, 3, 5])


def test_a_byte_level_bpe_that_is_called_llama(tmp_path: Path) -> None:
    """As a converter wrote Llama 3's. Without its merges it is no tokenizer; llama.cpp ends on both."""
    vocabulary = load_tokenizer(SMALL).vocabulary()
    data = vocabulary_gguf(vocabulary, "llama-bpe")
    path = tmp_path / "v.gguf"
    path.write_bytes(data)
    expected = load_tokenizer(path).encode("Once upon a time\n 123")
    path.unlink()
    path.write_bytes(vocabulary_gguf(replace(vocabulary, model="llama"), "llama-bpe"))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("Once upon a time\n 123") == expected
    assert tokenizer.notes[0].startswith(
        "tokenizer.ggml.model is 'llama', but its pieces are those of a byte-level BPE"
    )
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(edited_bytes(data, "tokenizer.ggml.merges"))
    with pytest.raises(UnsupportedError, match=r"byte-level BPE, 'gpt2', and there are no merges; convert"):
        load_tokenizer(path)


def test_merges_that_lead_to_no_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A vocabulary that was cut and kept its merges: llama.cpp runs it, the tokenizers library refuses it."""
    vocabulary = load_tokenizer(SMALL).vocabulary()
    path = tmp_path / "v.gguf"
    path.write_bytes(vocabulary_gguf(vocabulary, "llama-bpe"))
    expected = load_tokenizer(path).encode("zz Once upon a time")
    path.unlink()
    merges = [b"z z", b"zz z", *vocabulary.merges, b"a b c"]
    path.write_bytes(vocabulary_gguf(replace(vocabulary, merges=merges), "llama-bpe"))
    assert load_tokenizer(path).encode("zz Once upon a time") == expected
    assert caplog.messages == [f"{path}: 3 of {len(merges):,} merges lead to no token: left out"]


def test_a_missing_pre_tokenizer_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    data = vocabulary_gguf(load_tokenizer(SMALL).vocabulary(), "default")
    path.write_bytes(data)
    expected = load_tokenizer(path).encode("It's 12345 <b>")
    path.unlink()
    path.write_bytes(edited_bytes(data, "tokenizer.ggml.pre"))
    tokenizer = load_tokenizer(path)
    assert "no pre-tokenizer" in tokenizer.notes[0] and tokenizer.encode("It's 12345 <b>") == expected
    for name in ("gemma4", "kilngon"):
        path.unlink()
        path.write_bytes(vocabulary_gguf(load_tokenizer(SMALL).vocabulary(), name))
        with pytest.raises(UnsupportedError, match=f"pre-tokenizer '{name}'"):
            load_tokenizer(path)


def edited_bytes(data: bytes, key: str) -> bytes:
    """The file without a metadata key."""
    kept = [data[start:end] for name, (start, end) in entries_of(data).items() if name != key]
    return container(kept, [])


def test_why_a_model_carries_no_tokenizer(tmp_path: Path) -> None:
    """The reason stands in the error of everything that needs a tokenizer."""
    path = save(tmp_path / "m.gguf", replace(CONFIG, vocab_size=512), tokenizer=letters(300))
    path.write_bytes(edited(path, {"tokenizer.ggml.model": entry("tokenizer.ggml.model", STRING, text("bert"))}))
    with (
        numballama.compile(path, device="reference") as model,
        pytest.raises(Error, match=r"carries no tokenizer, because .*'bert' \(WordPiece\) is not read"),
    ):
        model.generate("a")


def test_several_ids_that_end_a_text(tmp_path: Path) -> None:
    """ollama writes all of a model's under keys of their own."""
    path = save(tmp_path / "m.gguf", tokenizer=letters(300))
    key = "tokenizer.ggml.eos_token_ids"
    for kind, form, ids, ends in ((4, "I", (2, 270, 299), (2, 270, 299)), (5, "i", (-1, 280, 300), (2, 280))):
        value = array(kind, len(ids), struct.pack(f"<{len(ids)}{form}", *ids))
        path.write_bytes(edited(path, {key: entry(key, ARRAY, value)}))
        opened = open_checkpoint(path)
        assert opened.stop_token_ids == ends
        assert set(ends) <= opened.end_ids
    path.write_bytes(edited(path, {key: entry(key, ARRAY, array(8, 1, text("</s>")))}))
    with pytest.raises(FormatError, match=f"{key} has the wrong type.*an array of numbers"):
        open_checkpoint(path)


def test_the_files_tokenizer_and_the_users(tmp_path: Path, models: Path) -> None:
    config = replace(CONFIG, vocab_size=512)
    data = save(tmp_path / "small.gguf", tokenizer=letters(300)).read_bytes()
    tokens: dict[str, bytes | None] = {
        key: data[start:end] for key, (start, end) in entries_of(data).items() if key.startswith("tokenizer.")
    }
    path = save(tmp_path / "m.gguf", config)
    path.write_bytes(edited(path, tokens))
    opened = open_checkpoint(path)
    assert opened.tokenizer is not None
    assert opened.tokenizer.vocab_size == 300
    assert opened.stop_token_ids == (2,)
    assert any("212" in note and "padding" in note for note in opened.notes)
    other = open_checkpoint(path, models / "tok512.bin").tokenizer
    assert other is not None
    assert other.vocab_size == 512
    bert = entry("tokenizer.ggml.model", STRING, text("bert"))
    path.write_bytes(edited(path, {"tokenizer.ggml.model": bert}))
    opened = open_checkpoint(path)
    assert opened.tokenizer is None
    assert any("bert" in note for note in opened.notes)
    assert open_checkpoint(path, models / "tok512.bin").notes == []
    bare = save(tmp_path / "bare.gguf", replace(CONFIG, vocab_size=299))
    bare.write_bytes(edited(bare, tokens))
    opened = open_checkpoint(bare)  # one token more than rows
    assert opened.tokenizer is not None and opened.tokenizer.vocab_size == 300
    assert opened.notes[-1] == "the tokenizer has 300 tokens, the embedding 299 rows: 'piece13' cannot be used"
    bare = save(tmp_path / "bare.gguf", replace(CONFIG, vocab_size=260))
    bare.write_bytes(edited(bare, tokens))
    with pytest.raises(FormatError, match="more tokens than embeddings"):
        open_checkpoint(bare)


# ---- end to end ----


@pytest.mark.slow
def test_named_templates_and_tokens_that_they_see(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", CONFIG, tokenizer=letters(300), chat_template="{{ pad_token }}{{ unk_token }}")
    key, other = "tokenizer.chat_template", path.with_suffix(".named.gguf")
    more = {
        f"{key}.tool_use": entry(f"{key}.tool_use", STRING, text("T")),
        f"{key}.x": entry(f"{key}.x", STRING, text("")),
    }
    more |= {"pad": u32("tokenizer.ggml.padding_token_id", 5), "sep": u32("tokenizer.ggml.seperator_token_id", 1 << 31)}
    other.write_bytes(edited(path, more))
    opened = open_checkpoint(other)
    assert opened.tokenizer is not None
    assert opened.chat_templates == {"default": "{{ pad_token }}{{ unk_token }}", "tool_use": "T"}
    piece = opened.tokenizer.piece
    assert opened.template_tokens == {"pad_token": piece(5), "unk_token": piece(0)}
    with numballama.compile(other, threads=1) as model:
        messages = [{"role": "user", "content": "a"}]
        assert model.apply_chat_template(messages, tokenize=False) == piece(5) + piece(0)
        assert model.apply_chat_template(messages, tokenize=False, tools=[]) == "T"
        assert model.chat(tools=[{"type": "function"}]).template.source == "T"


def test_eos_ends_the_text(tmp_path: Path) -> None:
    """Whatever token the file names, of the end of a text or of a turn; BOS does not end it."""
    path = save(
        tmp_path / "m.gguf", replace(CONFIG, tied_embeddings=True), tokenizer=letters(300), chat_template="{{x}}"
    )
    with numballama.compile(path, threads=1) as model:
        assert model.tokenizer is not None
        first = [piece.token for piece in model.stream("abc", temperature=0, max_tokens=5)]
    assert open_checkpoint(path).chat_template == "{{x}}"
    for key in ("eos", "eot"):
        end = next(token for token in first if token > 2)
        full = f"tokenizer.ggml.{key}_token_id"
        other = path.with_suffix(f".{key}.gguf")
        other.write_bytes(edited(path, {full: u32(full, end)}))
        with numballama.compile(other, threads=1) as model:
            pieces = list(model.stream("abc", temperature=0, max_tokens=5))
            assert [piece.token for piece in pieces] == first[: first.index(end) + 1]
            assert pieces[-1].finish_reason == "stop"
    report = str(numballama.inspect(save(tmp_path / "q.gguf", kind=Q8_0, tokenizer=letters(300))))
    assert "GGUF v3" in report
    assert "q8_0" in report
    assert "300 tokens" in report


def test_a_story_from_gguf_is_the_story(tmp_path: Path, models: Path) -> None:
    """stories260K through GGUF gives the tokens that llama2.c's file gives."""
    source = open_checkpoint(models / "stories260K.bin")
    path = tmp_path / "m.gguf"
    write_gguf(path, source.config, source.weights, tokenizer=load_tokenizer(models / "tok512.bin"))
    with numballama.compile(path) as model:
        got = [piece.token for piece in model.stream("Once upon a time", temperature=0, max_tokens=60)]
    with numballama.compile(models / "stories260K.bin", models / "tok512.bin") as model:
        assert got == [piece.token for piece in model.stream("Once upon a time", temperature=0, max_tokens=60)]
