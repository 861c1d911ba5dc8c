"""GGUF files that are written: the gguf package reads them, and what they cannot hold is refused."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import numballama
from numballama.config import HALF_SPLIT
from numballama.errors import Error, UnsupportedError
from numballama.files import map_file
from numballama.formats.gguf.header import Header
from numballama.formats.gguf.reader import TENSOR_NAMES
from numballama.formats.gguf.writer import write_gguf
from numballama.loader import open_checkpoint
from numballama.quantization.convert import convert, dequantize
from numballama.quantization.types import BF16, F16, F32, WeightType
from numballama.tokenizers.base import PieceType
from numballama.tokenizers.gguf import GgufTokenizer
from tests.helpers.gguf_files import (
    CONFIG,
    TYPES,
    letters,
    save,
    weights_of,
)
from tests.helpers.random_models import random_checkpoint, reference_logits


@pytest.mark.parametrize("kind", TYPES)
def test_the_gguf_package_reads_what_we_write(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    path = save(tmp_path / "m.gguf", kind=TYPES[kind], tokenizer=letters(300), name="tiny")
    header, reader = Header(map_file(path)), gguf.GGUFReader(path)
    theirs = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(theirs) == list(header.fields)
    assert header.text("general.name") == theirs["general.name"].contents() == "tiny"
    assert header.integer("llama.context_length") == theirs["llama.context_length"].contents() == 16
    assert header.number("llama.attention.layer_norm_rms_epsilon") == 1e-5
    assert header.flag("tokenizer.ggml.add_bos_token") is theirs["tokenizer.ggml.add_bos_token"].contents() is True
    tokens = theirs["tokenizer.ggml.tokens"]
    assert header.strings("tokenizer.ggml.tokens") == [bytes(tokens.parts[index]) for index in tokens.data]
    for key in ("scores", "token_type"):
        numbers = header.numbers(f"tokenizer.ggml.{key}")
        assert numbers is not None
        assert numbers.tolist() == theirs[f"tokenizer.ggml.{key}"].contents()
    for ours, other in zip(header.tensors.values(), reader.tensors, strict=True):
        assert (ours.name, ours.type, list(ours.shape[::-1])) == (other.name, other.tensor_type.name, list(other.shape))
        assert (ours.offset, ours.nbytes) == (other.data_offset, other.n_bytes)
    opened = open_checkpoint(path)
    for name, weight in opened.weights.items():
        their = next(t for t in reader.tensors if t.name == TENSOR_NAMES[name])
        wanted = gguf.quants.dequantize(their.data, their.tensor_type)
        np.testing.assert_array_equal(dequantize(weight), wanted.reshape(weight.shape))


@pytest.mark.parametrize("kind", TYPES)
def test_half_split_models_are_permuted(tmp_path: Path, kind: str) -> None:
    """To the last bit the permutation of llama.cpp's converter, and the same logits."""
    config = replace(CONFIG, rope_pairing=HALF_SPLIT, qkv_bias=True, o_bias=True)
    weights = weights_of(config, TYPES[kind])
    path = tmp_path / "m.gguf"
    write_gguf(path, config, weights)
    opened = open_checkpoint(path)
    assert opened.config == replace(config, rope_pairing="interleaved")
    for name, heads in (("wq", 4), ("wk", 2), ("bq", 4), ("bk", 2)):
        numbers = weights[f"layers.1.{name}"].data
        wanted = numbers.reshape(heads, 2, len(numbers) // heads // 2, *numbers.shape[1:]).swapaxes(1, 2)
        np.testing.assert_array_equal(opened.weights[f"layers.1.{name}"].data, wanted.reshape(numbers.shape))
    if kind == "F32":
        got = numballama.compile(path, device="reference").logits(range(10))
        np.testing.assert_allclose(got, reference_logits(config, weights, range(10)), atol=1e-5)


def test_narrow_norms_become_float32(tmp_path: Path) -> None:
    """F16 and BF16 norms, which some converters write, and outer dimensions of 1."""
    path = save(tmp_path / "m.gguf")
    header, data = Header(map_file(path)), bytearray(path.read_bytes())
    info = header.tensors["output_norm.weight"]
    name = data.index(b"output_norm.weight")
    kind_at = name + len("output_norm.weight") + 4 + 8
    for number, kind in ((1, F16), (30, BF16)):
        norm = random_checkpoint(CONFIG).weights["norm"]
        narrow = convert(norm, kind)
        struct.pack_into("<I", data, kind_at, number)
        data[info.offset : info.offset + 64] = narrow.data.tobytes()
        path.write_bytes(data)
        weight = open_checkpoint(path).weights["norm"]
        assert weight.type == F32
        np.testing.assert_array_equal(weight.data, dequantize(narrow))
    struct.pack_into("<I", data, kind_at, 8)
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match=r"output_norm\.weight has type Q8_0; supported are F32, F16, BF16$"):
        open_checkpoint(path)


@pytest.mark.parametrize("rows", [300, 301, 320, 512])
def test_a_vocabulary_is_padded_to_the_rows(tmp_path: Path, rows: int) -> None:
    """llama.cpp wants a token for each row. Ids that the vocabulary does not have are left out."""
    vocabulary = letters(300).vocabulary()
    pieces = [*vocabulary.pieces[:-1], b"[PAD301]"]  # a text of its own is no reason for two equal ones
    own = replace(vocabulary, pieces=pieces, bos_id=None, unknown_id=None)
    config = replace(CONFIG, vocab_size=rows)
    write_gguf(tmp_path / "m.gguf", config, weights_of(config), own)
    header = Header(map_file(tmp_path / "m.gguf"))
    tokens, types = header.strings("tokenizer.ggml.tokens"), header.numbers("tokenizer.ggml.token_type")
    scores = header.numbers("tokenizer.ggml.scores")
    assert tokens is not None and types is not None and scores is not None
    assert len(tokens) == len(types) == len(scores) == len(set(tokens)) == rows
    assert tokens[:300] == pieces and set(types[300:].tolist()) <= {PieceType.UNUSED}
    assert tokens[300:302] == [b"[PAD300]", b"[[PAD301]]"][: rows - 300]
    assert {key for key in header.fields if key.endswith("_token_id")} == {"tokenizer.ggml.eos_token_id"}
    opened = open_checkpoint(tmp_path / "m.gguf")
    assert opened.tokenizer is not None and opened.notes == []
    text = "a word, another [PAD300] [PAD301]"
    assert opened.tokenizer.encode(text, bos=False) == GgufTokenizer(own).encode(text, bos=False)


def test_the_writer_refuses(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(UnsupportedError, match="cannot hold tok_embeddings as int8/32; convert it to f32"):
        save(path, kind=WeightType("int8", 32))
    with pytest.raises(Error, match="output in one but not the other"):
        write_gguf(path, CONFIG, weights_of(replace(CONFIG, tied_embeddings=True)))
    with pytest.raises(Error, match="wq has shape"):
        write_gguf(path, replace(CONFIG, head_dim=4), weights_of(CONFIG))
    with pytest.raises(Error, match=r"301 tokens does not belong to a model of 300"):
        save(path, tokenizer=letters(301))
    with pytest.raises(Error, match="repeats a key"):
        save(path, metadata={"general.architecture": "gpt2"})
    for value in (1 << 32, -1, 1e300):
        with pytest.raises(UnsupportedError, match="too small"):
            save(path, metadata={"a": value})
    with pytest.raises(Error, match="found list"):
        save(path, metadata={"a": [1]})  # type: ignore[dict-item]
    with pytest.raises(UnsupportedError, match="rope"):
        save(path, replace(CONFIG, rope_theta=1e300))
    assert not list(tmp_path.iterdir())
