"""GGUF: files are read back as written, the gguf package agrees, and hostile files end in an Error."""

from __future__ import annotations

import contextlib
import math
import random
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.checkpoint import Weight
from numballama.config import ModelConfig, RopeScaling
from numballama.errors import Error, FormatError, UnsupportedError
from numballama.files import map_file
from numballama.formats.gguf.header import TENSOR_TYPES, Header
from numballama.formats.gguf.reader import TENSOR_NAMES
from numballama.formats.gguf.writer import write_gguf
from numballama.loader import open_checkpoint
from numballama.quantization.convert import dequantize
from numballama.quantization.policy import convert_weights
from numballama.quantization.types import BF16, BLOCKS, F16, F32, Q8_0, WeightType
from tests.helpers.gguf_files import (
    ARRAY,
    BOOL,
    CONFIG,
    STRING,
    TYPES,
    U32,
    array,
    container,
    edited,
    entries_of,
    entry,
    f32,
    letters,
    random_blocks,
    save,
    tensor,
    text,
    u32,
    weights_of,
)
from tests.helpers.random_models import configs, reference_logits

# ---- round trips ----


@pytest.mark.slow
@settings(max_examples=40)
@given(config=configs(biases=True), kind=st.sampled_from([F32, F16, BF16]), seed=st.integers(0, 99), data=st.data())
def test_models_round_trip(tmp_path: Path, config: ModelConfig, kind: WeightType, seed: int, data: Any) -> None:
    config = replace(
        config,
        head_dim=data.draw(st.sampled_from([config.head_dim, 2, 6])),
        norm_eps=data.draw(st.sampled_from([1e-5, 1e-6, 0.0])),
        rope_theta=data.draw(st.sampled_from([10000.0, 500000.0, 1e6])),
    )
    path, again = tmp_path / "model.gguf", tmp_path / "again.gguf"
    weights = weights_of(config, kind, seed)
    assert write_gguf(path, config, weights, name="a name") == []
    opened = open_checkpoint(path)
    assert opened.config == config
    assert (opened.format, opened.tokenizer, opened.notes, opened.defaulted_fields) == ("GGUF v3", None, [], ())
    assert not opened.bos_is_stop_token
    assert list(opened.weights) == list(config.weight_shapes())
    for name, weight in opened.weights.items():
        assert (weight.shape, weight.type) == (weights[name].shape, weights[name].type)
        np.testing.assert_array_equal(weight.data, weights[name].data)
        assert not weight.data.flags.writeable
        assert not weight.data.flags.owndata
    write_gguf(again, opened.config, opened.weights, name="a name")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", TYPES)
def test_the_gguf_package_writes_the_same_file(tmp_path: Path, kind: str) -> None:
    """Byte for byte: what a peer's own library makes of the same keys and tensors, in the same order."""
    gguf = pytest.importorskip("gguf")
    config, tokenizer = replace(CONFIG, head_dim=16), letters(300)
    weights = weights_of(config, TYPES[kind])
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    extra = {"general.license": "mit", "general.size_label": "tiny", "test.flag": True, "test.number": 0.5, "test.n": 7}
    write_gguf(ours, config, weights, tokenizer=tokenizer, name="tiny", chat_template="{{x}}", metadata=extra)

    w = gguf.GGUFWriter(theirs, "llama")
    w.add_type("model")
    w.add_name("tiny")
    w.add_file_type({"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3}[kind])
    if kind[:1] == "Q":
        w.add_quantization_version(2)
    w.add_vocab_size(300)
    w.add_context_length(16)
    w.add_embedding_length(32)
    w.add_block_count(2)
    w.add_feed_forward_length(64)
    w.add_rope_dimension_count(16)
    w.add_rope_freq_base(10000.0)
    w.add_head_count(4)
    w.add_head_count_kv(2)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_key_length(16)
    w.add_value_length(16)
    vocabulary = tokenizer.vocabulary()
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(vocabulary.pieces)
    w.add_token_scores(vocabulary.scores)
    w.add_token_types(vocabulary.types)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(True)
    w.add_chat_template("{{x}}")
    w.add_license("mit")
    w.add_size_label("tiny")
    w.add_bool("test.flag", True)
    w.add_float32("test.number", 0.5)
    w.add_uint32("test.n", 7)
    for name, weight in weights.items():
        raw = gguf.GGMLQuantizationType[kind] if len(weight.shape) == 2 else None
        data = weight.data.view(
            {"F16": np.float16, "BF16": np.uint8}.get(kind, weight.data.dtype) if raw else np.float32
        )
        w.add_tensor(TENSOR_NAMES[name], data, raw_dtype=raw)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    assert ours.read_bytes() == theirs.read_bytes()


def test_types_are_ggmls() -> None:
    gguf = pytest.importorskip("gguf")
    assert {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()} == TENSOR_TYPES


# ---- metadata that asks for more or less ----


SCALING = "llama.rope.scaling."


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "general.architecture",
            entry("general.architecture", STRING, text("gemma")),
            "architecture 'gemma'; supported are llama, qwen2, qwen3",
        ),
        ("general.type", entry("general.type", STRING, text("adapter")), "of type 'adapter'.*merge"),
        (f"{SCALING}type", entry(f"{SCALING}type", STRING, text("su")), "'su'.*'longrope' are"),
        (f"{SCALING}yarn_log_multiplier", f32(f"{SCALING}yarn_log_multiplier", 0.1), "yarn_log_multiplier is 0.1,"),
        ("llama.expert_count", u32("llama.expert_count", 8), "expert_count is 8"),
        ("llama.rope.dimension_count", u32("llama.rope.dimension_count", 4), "dimension_count is 4 and heads have 8"),
        ("llama.attention.value_length", u32("llama.attention.value_length", 4), "value_length is 4"),
        ("llama.attention.causal", entry("llama.attention.causal", BOOL, b"\0"), "causal"),
        ("llama.attention.scale", f32("llama.attention.scale", 0.5), r"attention\.scale is 0\.5, .*; 0\.353553 is"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, key: str, change: bytes, message: str) -> None:
    path = save(tmp_path / "m.gguf")
    path.write_bytes(edited(path, {key: change}))
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(path)


def scaled(tmp_path: Path, kind: str, **numbers: float) -> Path:
    """A file whose RoPE scaling is of a type and has numbers, f32 but for the length."""
    path = save(tmp_path / "m.gguf")
    changes: dict[str, bytes | None] = {f"{SCALING}type": entry(f"{SCALING}type", STRING, text(kind))}
    for key, value in numbers.items():
        write = u32 if isinstance(value, int) else f32
        changes[f"{SCALING}{key}"] = write(f"{SCALING}{key}", value)  # type: ignore[operator]
    path.write_bytes(edited(path, changes))
    return path


def test_yarn_that_scales(tmp_path: Path) -> None:
    """Queries and keys grow by llama.cpp's factor, times that of the file."""
    factor = 0.1 * math.log(4) + 1
    yarn = RopeScaling("yarn", 4.0, original_context=16, attention_factor=factor)
    assert open_checkpoint(scaled(tmp_path, "yarn", factor=4.0)).config == replace(CONFIG, rope_scaling=yarn)
    path = scaled(
        tmp_path, "yarn", factor=4.0, original_context_length=8, attn_factor=0.5, yarn_beta_fast=16.0,
        yarn_beta_slow=2.0, yarn_ext_factor=1.0,
    )  # fmt: skip
    wanted = replace(yarn, original_context=8, beta_fast=16.0, beta_slow=2.0, attention_factor=factor / 2)
    assert open_checkpoint(path).config.rope_scaling == wanted
    with pytest.raises(UnsupportedError, match=r"yarn_ext_factor is 0\.5, which is not supported; 1 is"):
        open_checkpoint(scaled(tmp_path, "yarn", factor=4.0, yarn_ext_factor=0.5))


def test_an_attention_factor_counts_with_any_type(tmp_path: Path) -> None:
    path = scaled(tmp_path, "linear", attn_factor=1.5)
    assert open_checkpoint(path).config.rope_scaling == RopeScaling("linear", attention_factor=1.5)


def test_longrope_wants_both_its_tensors(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"tensor rope_factors_short\.weight; expected 4 factors .*longrope"):
        open_checkpoint(scaled(tmp_path, "longrope"))


def test_texts_that_are_not_utf_8(tmp_path: Path) -> None:
    """A chat template is read with a note, a name without one; what decides how the model is read is an error."""
    path, key = save(tmp_path / "m.gguf"), "tokenizer.chat_template"
    plain, template = path.read_bytes(), b"{{ x }}{# caf\xe9 #}"
    path.write_bytes(edited(path, {key: entry(key, STRING, text(template))}))
    opened = open_checkpoint(path)
    assert opened.chat_templates == {"default": "{{ x }}{# caf\ufffd #}"}
    (note,) = [note for note in opened.notes if "UTF-8" in note]
    assert f"{key} is not UTF-8; at byte {path.read_bytes().index(0xE9):,}; expected UTF-8; found b'\\xe9 #}}'" in note
    path.write_bytes(plain)
    path.write_bytes(edited(path, {"general.name": entry("general.name", STRING, text(b"phi-3 \xff"))}))
    assert not [note for note in open_checkpoint(path).notes if "UTF-8" in note]
    path.write_bytes(plain)
    path.write_bytes(edited(path, {"general.type": entry("general.type", STRING, text(b"\xff"))}))
    with pytest.raises(FormatError, match=r"general\.type is not UTF-8"):
        open_checkpoint(path)


def test_outer_dimensions_of_1(tmp_path: Path) -> None:
    """Some writers give every tensor four dimensions; ggml's tensors always have four."""
    path = save(tmp_path / "m.gguf")
    header, data = Header(map_file(path)), path.read_bytes()
    kinds = {name: number for number, (name, *_) in TENSOR_TYPES.items()}
    infos = [
        tensor(t.name, [*t.shape[::-1], 1, 1, 1][:4], kinds[t.type], t.offset - header.data_offset)
        for t in header.tensors.values()
    ]
    entries = [data[start:end] for start, end in entries_of(data).values()]
    copy = tmp_path / "4d.gguf"
    copy.write_bytes(container(entries, infos, data[header.data_offset :]))
    opened, plain = open_checkpoint(copy), open_checkpoint(path)
    assert opened.config == plain.config and opened.notes == plain.notes
    for name, weight in plain.weights.items():
        assert np.array_equal(opened.weights[name].data, weight.data)


def by_layer(key: str, *values: int) -> dict[str, bytes | None]:
    """A key of the config as an array, one number a layer."""
    data = struct.pack(f"<{len(values)}i", *values)
    return {f"llama.{key}": entry(f"llama.{key}", ARRAY, array(5, len(values), data))}


@pytest.mark.parametrize(
    "changes",
    [
        {f"{SCALING}type": entry(f"{SCALING}type", STRING, text("none"))},
        {
            f"{SCALING}type": entry(f"{SCALING}type", STRING, text("none")),
            f"{SCALING}factor": f32(f"{SCALING}factor", 8.0),
        },
        {
            f"{SCALING}type": entry(f"{SCALING}type", STRING, text("linear")),
            f"{SCALING}factor": f32(f"{SCALING}factor", 1.0),
        },
        {"split.count": entry("split.count", 2, struct.pack("<H", 1))},
        {"llama.vocab_size": None},
        {"llama.rope.freq_base": None},
        {"llama.rope.dimension_count": None},
        {"general.type": None, "tokenizer.ggml.model": None},
        {"llama.context_length": entry("llama.context_length", 10, struct.pack("<Q", 16))},
        {"llama.attention.head_count_kv": entry("llama.attention.head_count_kv", 5, struct.pack("<i", 2))},
        {
            "llama.attention.layer_norm_rms_epsilon": entry(
                "llama.attention.layer_norm_rms_epsilon", 12, struct.pack("<d", 1e-5)
            )
        },
        {"x": entry("x", ARRAY, array(BOOL, 3, b"\0\1\0"))},
        {"llama.attention.scale": f32("llama.attention.scale", 8**-0.5)},
        {"llama.attention.scale": f32("llama.attention.scale", 0.0)},
        {f"{SCALING}type": entry(f"{SCALING}type", STRING, text("yarn"))},
        {
            f"{SCALING}type": entry(f"{SCALING}type", STRING, text("yarn")),
            f"{SCALING}factor": f32(f"{SCALING}factor", 1.0),
        },
        by_layer("attention.head_count", 4, 4),
        by_layer("attention.head_count_kv", 2, 2),
        by_layer("feed_forward_length", 64, 64),
    ],
)
def test_what_asks_for_nothing_is_accepted(tmp_path: Path, changes: dict[str, bytes | None]) -> None:
    path = save(tmp_path / "m.gguf")
    path.write_bytes(edited(path, changes))
    assert open_checkpoint(path).config == CONFIG


@pytest.mark.parametrize(("values", "found"), [((2, 4), "2, 4"), ((4, 2, 2), "2, 4"), ((), "empty")])
def test_layers_that_differ(tmp_path: Path, values: tuple[int, ...], found: str) -> None:
    path = save(tmp_path / "m.gguf")
    path.write_bytes(edited(path, by_layer("attention.head_count_kv", *values)))
    with pytest.raises(UnsupportedError, match=f"head_count_kv is {found} by layer.*one number for all layers is"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("general.architecture", None, "expected general.architecture"),
        ("llama.block_count", None, "expected llama.block_count"),
        ("llama.block_count", u32("llama.block_count", 0), "bad llama.block_count.*at byte"),
        ("llama.block_count", u32("llama.block_count", 3), r"blk\.2\.attn_norm\.weight"),
        ("llama.block_count", u32("llama.block_count", 1 << 20), "expected 1 to 1,024"),
        (
            "llama.block_count",
            entry("llama.block_count", STRING, text("two")),
            "wrong type.*expected an integer; found STRING",
        ),
        ("llama.block_count", entry("llama.block_count", ARRAY, array(U32, 1, bytes(4))), "found an array of 1 UINT32"),
        ("llama.context_length", u32("llama.context_length", 0xFFFFFFFF), "context_length"),
        ("llama.feed_forward_length", u32("llama.feed_forward_length", 96), "wrong shape"),
        ("llama.attention.head_count", u32("llama.attention.head_count", 5), "an impossible model"),
        ("llama.attention.head_count", u32("llama.attention.head_count", 33), "key_length"),
        ("llama.attention.head_count_kv", u32("llama.attention.head_count_kv", 3), "multiple of n_kv_heads"),
        ("llama.rope.freq_base", f32("llama.rope.freq_base", float("nan")), "rope_theta"),
        ("llama.rope.freq_base", f32("llama.rope.freq_base", 0.0), "rope_theta"),
        ("llama.attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon"),
        ("general.architecture", entry("general.architecture", STRING, text(b"\xff\xfe")), "not UTF-8"),
        ("llama.attention.causal", entry("llama.attention.causal", BOOL, b"\2"), "neither true nor false"),
    ],
)
def test_impossible_models(tmp_path: Path, key: str, change: bytes | None, message: str) -> None:
    path = save(tmp_path / "m.gguf")
    path.write_bytes(edited(path, {key: change}))
    with pytest.raises(FormatError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("stale", [1, 299, 301, 1 << 31])
def test_a_stale_vocab_size(tmp_path: Path, stale: int) -> None:
    """The embedding's rows count, whatever the key says."""
    path = save(tmp_path / "m.gguf")
    path.write_bytes(edited(path, {"llama.vocab_size": u32("llama.vocab_size", stale)}))
    opened = open_checkpoint(path)
    assert opened.config.vocab_size == 300
    assert opened.notes == [f"llama.vocab_size is {stale:,}, the embedding has 300 rows: the rows count"]


def test_tensors_too_few_and_too_many(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for name in ("token_embd.weight", "blk.1.ffn_up.weight", "output_norm.weight"):
        path.write_bytes(whole)
        path.write_bytes(edited(path, {}, drop=name))
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            open_checkpoint(path)
    path.write_bytes(whole)
    path.write_bytes(edited(path, {}, drop="output.weight"))
    assert open_checkpoint(path).config.tied_embeddings
    path.write_bytes(whole)
    header = Header(map_file(path))
    offset = header.tensors["output.weight"].offset - header.data_offset
    for name, message in (("rope_freqs.weight", "wrong shape"), ("blk.0.attn_sinks.weight", "has no place")):
        path.write_bytes(whole)
        path.write_bytes(edited(path, {}, drop="output.weight", extra=(tensor(name, [1], 0, offset),)))
        with pytest.raises(Error, match=message):
            open_checkpoint(path)


def test_unsupported_tensor_types_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    save(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    supported = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS"
    for number, message in (
        (39, f"has type MXFP4; supported are {supported}$"),
        (4, "has type Q4_2,.*no longer: take a file of another quantisation"),
        (33, "has type Q4_0_8_8, .*no longer: take the model in Q4_0"),
        (36, "has type IQ4_NL_4_4, .*no longer: take the model in IQ4_NL"),
        (99, "has type 99 .*known: F32"),
    ):
        struct.pack_into("<I", data, at, number)
        path.write_bytes(data)
        with pytest.raises(UnsupportedError, match=rf"tensor blk\.0\.attn_q\.weight {message}"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "said"), [("iq4_nl", "as q8_0, with the same values"), ("iq4_xs", "as q8_0, rounded")]
)
def test_types_without_kernels_run_as_others(tmp_path: Path, kind: str, said: str) -> None:
    """iq4_nl is what llama.cpp's Q3_K_M and Q2_K have in rows that are not whole blocks of 256, Qwen2.5 0.5B's."""
    config = ModelConfig(256, 256, 1, 4, 2, 40, 16, tied_embeddings=False)
    weights, path = weights_of(config), tmp_path / "m.gguf"
    block = BLOCKS[kind][0]
    weights["layers.0.w1"] = random_blocks(kind, 256, 256 // block, np.random.default_rng(1))
    write_gguf(path, config, weights)
    opened = open_checkpoint(path)
    assert [note for note in opened.notes if f"{kind.upper()} (layers.0.w1) runs {said}: a copy of" in note]
    ids = np.arange(12) % 40
    again = weights | {"layers.0.w1": Weight((256, 256), F32, dequantize(weights["layers.0.w1"]))}
    np.testing.assert_allclose(
        reference_logits(opened.config, convert_weights(config, opened.weights, None), ids),
        reference_logits(config, again, ids),
        atol=2e-3,
    )


# ---- damage ----


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sample") / "m.gguf"
    config = replace(CONFIG, n_layers=1, vocab_size=290)
    save(path, config, Q8_0, tokenizer=letters(290), name="sample", chat_template="{{ x }}")
    return path.read_bytes()


@pytest.mark.slow
def test_truncation_at_every_boundary(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(sample)
    header = Header(map_file(path))
    places = {4, 8, 16, 24, header.data_offset, *(start for start, _ in entries_of(sample).values())}
    places |= {field.offset for field in header.fields.values()}
    for info in header.tensors.values():
        at = sample.index(info.name.encode())
        places |= {at - 8, at, at + len(info.name), at + len(info.name) + 4, info.offset, info.offset + info.nbytes}
    path = tmp_path / "cut.gguf"
    last = max(info.offset + info.nbytes for info in header.tensors.values())
    for size in sorted({place + more for place in places for more in (-1, 0, 1)} & set(range(1, last))):
        path.write_bytes(sample[:size])
        with pytest.raises(FormatError):
            open_checkpoint(path)


@pytest.mark.slow
def test_mutations_end_in_an_error_or_in_a_model(tmp_path: Path, sample: bytes) -> None:
    """Bits, bytes, words of extreme values, cuts and moves, most of them in the directory; the same ones every time."""
    rng = random.Random(4)
    path = tmp_path / "m.gguf"
    path.write_bytes(sample)
    head = Header(map_file(path)).data_offset
    vocabulary = sample.index(b"tokenizer.ggml.tokens")
    extremes = [0, 1, 2, 3, 7, 8, 9, 13, 31, 32, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1]
    opened = 0
    started = time.process_time()  # what it waits, on a machine with other work, does not count
    for _ in range(3000):
        data = bytearray(sample)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            at = rng.randrange(rng.choice((vocabulary, head, head, len(sample))))
            match rng.randrange(5):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.randrange(256)
                case 2:
                    width = rng.choice((4, 8))
                    data[at : at + width] = rng.choice(extremes).to_bytes(8, "little")[:width]
                case 3:
                    del data[at : at + rng.choice((1, 4, 8, 100))]
                case 4:
                    start = rng.randrange(head)
                    data[at:at] = data[start : start + rng.choice((1, 4, 8, 60))]
        path.unlink()  # the mapping of the last one may live on
        path.write_bytes(data)
        try:
            checkpoint = open_checkpoint(path)
        except Error:
            continue
        opened += 1
        for weight in checkpoint.weights.values():
            assert weight.data.nbytes == weight.type.nbytes(int(np.prod(weight.shape)))
        if (tokenizer := checkpoint.tokenizer) is not None:
            tokenizer.decode(range(tokenizer.vocab_size))
            with contextlib.suppress(Error):  # a vocabulary may lack what a text needs
                tokenizer.encode("Once upon a time 🙂\0 <s>", special=True)
    assert 100 < opened < 2500
    assert time.process_time() - started < 15
