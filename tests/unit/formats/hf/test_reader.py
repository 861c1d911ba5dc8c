"""Hugging Face directories: configurations old and new, files in every arrangement, and what damage gives."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numballama
from numballama import hub
from numballama.config import ModelConfig, RopeScaling
from numballama.errors import Error, FormatError, UnsupportedError
from numballama.formats import tokenizer_files as tokenizer
from numballama.formats.hf import reader as hf
from numballama.formats.hf.writer import write_safetensors
from numballama.loader import open_checkpoint
from numballama.quantization.convert import dequantize
from numballama.quantization.types import BF16, F16, F32
from tests.helpers.random_models import random_checkpoint

HF = Path(__file__).parents[3] / "golden" / "hf"


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """A model of the golden ones, to be changed."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(HF / f"{name}-0", tmp_path / name, dirs_exist_ok=True))

    return make


def edit(folder: Path, changes: dict[str, Any], name: str = "config.json") -> Path:
    """Keys replaced; None takes a key away."""
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


# ---- configurations ----


def test_configs_of_the_golden_models() -> None:
    def config(name: str) -> ModelConfig:
        return open_checkpoint(HF / f"{name}-0").config

    base = ModelConfig(16, 24, 2, 4, 2, 40, 64, norm_eps=1e-5, rope_pairing="half", tied_embeddings=False)
    assert config("tinyllama") == base
    base = replace(base, norm_eps=1e-6)
    assert config("smollm2") == replace(base, tied_embeddings=True, rope_theta=1e5)
    assert config("llama3") == replace(
        base, head_dim=16, tied_embeddings=True, rope_theta=500.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    )
    assert config("llama-linear").rope_scaling == RopeScaling("linear", 4.0)
    assert config("llama-dynamic").rope_scaling == RopeScaling("dynamic", 2.0)
    assert config("llama-biases") == replace(base, head_dim=6, qkv_bias=True, o_bias=True, mlp_bias=True)
    assert config("mistral") == replace(base, window=8)
    assert config("mistral-no-window") == replace(base, head_dim=8)
    assert config("qwen2") == replace(base, qkv_bias=True, rope_theta=1e6)
    assert config("qwen2-tied-window") == replace(base, qkv_bias=True, tied_embeddings=True, window=5)
    assert config("qwen3") == replace(base, head_dim=8, qk_norm=True, rope_theta=1e6)
    assert config("qwen3-biases") == replace(
        base, head_dim=10, qk_norm=True, qkv_bias=True, o_bias=True, tied_embeddings=True
    )


@pytest.mark.parametrize("name", ["smollm2", "llama3", "llama-linear", "llama-dynamic", "qwen2", "qwen3"])
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_configs_as_transformers_4_wrote_them(copy: Callable[[str], Path], name: str, type_key: str) -> None:
    """`rope_theta` beside `rope_scaling`, which is null for none."""
    folder = copy(name)
    wanted = open_checkpoint(folder).config
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    edit(folder, {"rope_parameters": None, "rope_theta": theta})
    text = (folder / "config.json").read_text()
    scaling = "null" if kind == "default" else json.dumps({type_key: kind, **rope})
    (folder / "config.json").write_text(text[:-1] + f', "rope_scaling": {scaling}}}')
    assert open_checkpoint(folder).config == wanted


@pytest.mark.parametrize(
    ("name", "missing", "changed"),
    [
        ("llama", ["rms_norm_eps", "head_dim", "tie_word_embeddings", "rope_parameters", "attention_bias"], {}),
        ("llama", ["num_key_value_heads", "hidden_act", "mlp_bias"], {}),
        ("tinyllama", ["max_position_embeddings"], {"context": 2048}),
        ("mistral", ["max_position_embeddings", "sliding_window"], {"context": 131072, "window": 4096}),
        ("qwen2", ["max_position_embeddings", "layer_types", "use_sliding_window"], {"context": 32768}),
        ("qwen2-tied-window", ["layer_types"], {}),
        ("qwen2-tied-window", ["layer_types", "sliding_window"], {"window": 4096}),
    ],
)
def test_keys_that_are_missing_have_transformers_defaults(
    copy: Callable[[str], Path], name: str, missing: list[str], changed: dict[str, Any]
) -> None:
    folder = copy(name)
    wanted = replace(open_checkpoint(folder).config, **changed)
    assert open_checkpoint(edit(folder, dict.fromkeys(missing))).config == wanted


def test_null_is_no_window(copy: Callable[[str], Path]) -> None:
    for name in ("mistral", "qwen2-tied-window"):
        folder = edit(copy(name), {"sliding_window": None, "layer_types": None})
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text[:-1] + ', "sliding_window": null}')
        assert open_checkpoint(folder).config.window == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "gemma2"}, "model_type is 'gemma2'; supported are llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("mistral", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type of rope_parameters is 'yarn'"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type of rope_scaling is 'longrope'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set for all layers is"),
        ("qwen2-tied-window", {"layer_types": ["full_attention", "sliding_attention"]}, "1 of 2 layers a sliding"),
        ("qwen2-tied-window", {"layer_types": None, "max_window_layers": 1}, "max_window_layers gives 1 of 2 layers"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
    ],
)
def test_what_is_not_computed_is_named(
    copy: Callable[[str], Path], name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(edit(copy(name), changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "key hidden_size; expected a whole number; found no such key"),
        ({"hidden_size": "16"}, "key hidden_size.*found '16'"),
        ({"hidden_size": True}, "key hidden_size"),
        ({"hidden_size": 1 << 40}, "key hidden_size"),
        ({"hidden_size": 10**30}, "key hidden_size.*beyond 64 bits"),
        ({"hidden_size": 18}, "wrong shape"),
        ({"num_attention_heads": 0}, "key num_attention_heads"),
        ({"num_attention_heads": 100, "head_dim": None}, "head_dim"),
        ({"num_key_value_heads": 3}, "multiple of n_kv_heads"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight"),
        ({"num_hidden_layers": 2000}, "from 1 to 1,024"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"rms_norm_eps": -1.0}, "norm_eps"),
        ({"rms_norm_eps": "small"}, "key rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
        ({"rope_parameters": [1]}, "key rope_parameters; expected an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "key factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}}, "key high_freq_factor"),
        ({"tie_word_embeddings": 1}, "key tie_word_embeddings"),
        ({"eos_token_id": "2"}, ""),  # generation_config.json is asked first
    ],
)
def test_impossible_configs(copy: Callable[[str], Path], changes: dict[str, Any], message: str) -> None:
    folder = edit(copy("llama"), changes)
    if not message:
        assert open_checkpoint(folder).stop_token_ids == (2,)
        (folder / "generation_config.json").unlink()
        message = "key eos_token_id"
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)


def test_tied_by_missing_tensors_is_no_guess(copy: Callable[[str], Path]) -> None:
    """An untied model without a classifier is damaged; a tied one ignores a classifier, as transformers does."""
    assert open_checkpoint(edit(copy("llama"), {"tie_word_embeddings": True})).config.tied_embeddings
    with pytest.raises(FormatError, match=r"tensor lm_head\.weight"):
        open_checkpoint(edit(copy("smollm2"), {"tie_word_embeddings": False}))


# ---- files ----


def test_weights_are_views_in_the_type_of_the_file() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    for name, kind in (("llama", F32), ("llama-bf16", BF16), ("qwen3-f16-sharded", F16)):
        opened = open_checkpoint(HF / f"{name}-0")
        assert opened.format == f"Hugging Face, {'qwen3' if 'qwen3' in name else 'llama'}"
        assert (opened.notes, opened.assumed, opened.stop_token_ids, opened.tokenizer) == ([], (), (2,), None)
        for weight in opened.weights.values():
            assert weight.type == (kind if len(weight.shape) == 2 else F32)
            assert weight.data.flags.owndata == (len(weight.shape) == 1 and kind != F32) or weight.type == F32
            if len(weight.shape) == 2:
                assert not weight.data.flags.owndata and not weight.data.flags.writeable
    theirs = safetensors.load_file(HF / "llama-0" / "model.safetensors")
    ours = open_checkpoint(HF / "llama-0").weights
    np.testing.assert_array_equal(ours["layers.1.wk"].data, theirs["model.layers.1.self_attn.k_proj.weight"])
    np.testing.assert_array_equal(ours["output"].data, theirs["lm_head.weight"])


def test_a_single_file_beside_its_config(copy: Callable[[str], Path]) -> None:
    whole = open_checkpoint(HF / "llama-0")
    one = open_checkpoint(HF / "llama-0" / "model.safetensors")
    assert one.config == whole.config and one.path.name == "model.safetensors"
    np.testing.assert_array_equal(one.weights["norm"].data, whole.weights["norm"].data)
    shard = open_checkpoint(HF / "qwen3-f16-sharded-0" / "model-00002-of-00003.safetensors")
    assert list(shard.weights) == list(shard.config.weight_shapes())
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / "another.safetensors")
    assert open_checkpoint(folder).config == whole.config
    shutil.copy(folder / "another.safetensors", folder / "third.safetensors")
    assert open_checkpoint(folder / "third.safetensors").config == whole.config
    with pytest.raises(FormatError, match="found 2 files"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    for path in (folder, folder / "third.safetensors"):
        with pytest.raises(FormatError, match=r"expected config\.json"):
            open_checkpoint(path)


def test_indexes_that_lead_astray(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("qwen3-f16-sharded")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    table = whole["weight_map"]
    name = "model.norm.weight"
    for value, message in (
        ("../model.safetensors", "beside the index"),
        ("/etc/passwd", "beside the index"),
        ("model.safetensors.index.json", "beside the index"),
        (7, "beside the index"),
        ("missing.safetensors", "a part of the model is missing"),
        ("model-00001-of-00003.safetensors", "is not in the file that the index names"),
    ):
        index.write_text(json.dumps({"weight_map": table | {name: value}}))
        with pytest.raises(FormatError, match=message):
            open_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {key: value for key, value in table.items() if key != name}}))
    with pytest.raises(FormatError, match=rf"tensor is missing.*{name}"):
        open_checkpoint(folder)
    for text, message in (("{}", "key weight_map"), ("[]", "not an object"), ("{", "not JSON"), ("", "empty")):
        index.write_text(text)
        with pytest.raises(FormatError, match=message):
            open_checkpoint(folder)


def test_tensors_without_a_place(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    data = (folder / "model.safetensors").read_bytes()
    for name, message in (
        ("model.layers.0.self_attn.rotary_emb.inv_freq", ""),
        ("model.layers.0.self_attn.q_proj.bias", "no place in a llama model"),
        ("model.layers.2.input_layernorm.weight", "no place in a llama model"),
    ):
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        head[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        write(folder, head, data[8 + int.from_bytes(data[:8], "little") :])
        if message:
            with pytest.raises(UnsupportedError, match=message):
                open_checkpoint(folder)
        else:
            open_checkpoint(folder)


def test_stop_ids_and_templates(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    edit(folder, {"eos_token_id": [2, 7, 9]}, "generation_config.json")
    assert open_checkpoint(folder).stop_token_ids == (2, 7, 9)
    edit(folder, {"eos_token_id": None}, "generation_config.json")
    assert open_checkpoint(edit(folder, {"eos_token_id": 5})).stop_token_ids == (5,)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ a }}"}')
    assert open_checkpoint(folder).chat_template == "{{ a }}"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert open_checkpoint(folder).chat_template == "yes"
    (folder / "chat_template.jinja").write_text("{{ ä }}", encoding="utf-8")
    assert open_checkpoint(folder).chat_template == "{{ ä }}"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="UTF-8"):
        open_checkpoint(folder)


def test_the_directorys_tokenizer(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is left out with a note, what is damaged is an error."""
    folder, asked = copy("llama"), []
    result: Error | None = None

    def load(path: Path) -> None:
        asked.append(path)
        if result is not None:
            raise result

    monkeypatch.setattr(tokenizer, "load_tokenizer", load)
    open_checkpoint(folder)
    assert asked == []
    (folder / "tokenizer.json").write_text("{}")
    open_checkpoint(folder)
    assert asked == [folder]
    result = UnsupportedError("of a kind to come")
    assert open_checkpoint(folder).notes == ["its tokenizer is left out: of a kind to come"]
    result = FormatError("damaged tokenizer")
    with pytest.raises(FormatError, match="damaged tokenizer"):
        open_checkpoint(folder)
    assert hf.read(folder, own_tokenizer=False).tokenizer is None


def test_text_from_a_directory(tmp_path: Path) -> None:
    """A tokenizer.json beside random weights: a prompt in, characters out."""
    shutil.copy(HF.parent / "small.json", tmp_path / "tokenizer.json")
    size = tokenizer.load_tokenizer(tmp_path).vocab_size
    config = ModelConfig(16, 24, 1, 2, 1, size + -size % 8, 64, rope_pairing="half")
    write_safetensors(tmp_path / "model", config, random_checkpoint(config).weights, eos_ids=(0,))
    shutil.move(tmp_path / "tokenizer.json", tmp_path / "model")
    with numballama.compile(tmp_path / "model", device="reference") as model:
        assert isinstance(model.tokenizer, tokenizer.BPETokenizer)
        assert model.tokenizer.decode(model.tokenizer.encode("Once upon a time")) == "Once upon a time"
        pieces = list(model.stream("Once", max_tokens=5, temperature=0))
    assert 1 <= len(pieces) <= 5


# ---- damage ----


def write(folder: Path, head: dict[str, Any] | bytes, data: bytes) -> None:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [16], "data_offsets": [0, 63]}, "data_offsets.*expected 64 bytes"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [0, 1 << 50]}, "data_offsets"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [0.0, 64.0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}, "overlap"),
        ({"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}, "shape"),
        ({"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}, "shape"),
        ({"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 64]}, "data_offsets"),
        ({"dtype": "F32", "shape": "16", "data_offsets": [0, 64]}, "shape"),
        ({"dtype": "F32", "data_offsets": [0, 64]}, "shape"),
        ({"dtype": 1, "shape": [16], "data_offsets": [0, 64]}, "dtype"),
        ([], "expected an object"),
        (None, "expected an object"),
    ],
)
def test_bad_directory_entries(copy: Callable[[str], Path], entry: object, message: str) -> None:
    folder = copy("llama")
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:start])
    write(folder, head | {NORM: entry}, data[start:])
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [("I64", [8], "wrong shape"), ("I32", [16], "type I32; supported are F32, F16, BF16"), ("X9", [16], "type 'X9'")],
)
def test_types_that_no_weight_has(copy: Callable[[str], Path], dtype: str, shape: list[int], message: str) -> None:
    folder = copy("llama")
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:start])
    head[NORM] |= {"dtype": dtype, "shape": shape}
    write(folder, head, data[start:])
    with pytest.raises(Error, match=message):
        open_checkpoint(folder)


HOSTILE = {
    "a length beyond the file": struct.pack("<Q", 1 << 62) + b"{}",
    "seven bytes": b"\1\0\0\0\0\0\0",
    "no JSON": struct.pack("<Q", 4) + b"{{{{" + bytes(8),
    "deep JSON": struct.pack("<Q", 100_000) + b'{"a":' * 20_000,
    "a long number": struct.pack("<Q", 20_006) + b'{"a":' + b"9" * 20_000 + b"}",
    "no UTF-8": struct.pack("<Q", 8) + b'{"\xff\xfe":1' + bytes(8),
    "a key twice": struct.pack("<Q", 15) + b'{"a":{},"a":{}}' + bytes(8),
    "too long a directory": struct.pack("<Q", 5 << 20) + b'{"a":[' + b"{}," * (5 << 20 >> 1),
    "many objects": struct.pack("<Q", 3 << 20) + (b'{"a":[' + b"{}," * ((3 << 20) // 3 - 5) + b"{}]}").ljust(3 << 20),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_directories(copy: Callable[[str], Path], what: str) -> None:
    folder = copy("llama")
    (folder / "model.safetensors").write_bytes(HOSTILE[what])
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(FormatError):
        open_checkpoint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(HOSTILE[what]) + 100_000_000
    assert time.perf_counter() - started < 10  # traced; 2 s untraced


def test_truncation_at_every_tensor(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    ends = {start + entry["data_offsets"][1] for key, entry in json.loads(data[8:start]).items() if key[0] != "_"}
    for size in sorted({1, 7, 8, 9, start - 1, start, *(end - 1 for end in ends), *ends - {len(data)}}):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(FormatError):
            open_checkpoint(folder)


def mutated(data: bytes, rng: random.Random, head: int) -> bytes:
    """Bits, bytes, digits, cuts and moves, most of them in the first `head` bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = min(rng.randrange(rng.choice((8, head, head, len(data)))), len(changed) - 1)
        match rng.randrange(5):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.randrange(256)
            case 2:
                changed[at : at + 1] = rng.choice((b"9" * 30, b"-", b"null", b'"', b"{", b"}", b"[1]", b"0"))
            case 3:
                del changed[at : at + rng.choice((1, 4, 8, 100))]
            case 4:
                start = rng.randrange(head)
                changed[at:at] = changed[start : start + rng.choice((1, 4, 8, 60))]
    return bytes(changed)


@pytest.mark.parametrize("which", ["model-00002-of-00003.safetensors", "config.json", "model.safetensors.index.json"])
def test_mutations_end_in_an_error_or_in_a_model(copy: Callable[[str], Path], which: str) -> None:
    folder, rng = copy("qwen3-f16-sharded"), random.Random(7)
    path = folder / which
    sample = path.read_bytes()
    head = 8 + int.from_bytes(sample[:8], "little") if path.suffix == ".safetensors" else len(sample)
    opened = 0
    for _ in range(500):
        path.unlink()  # a mapping may live on
        path.write_bytes(mutated(sample, rng, head))
        try:
            checkpoint = open_checkpoint(folder)
        except Error:
            continue
        opened += 1
        for weight in checkpoint.weights.values():
            assert weight.data.nbytes == weight.type.nbytes(int(np.prod(weight.shape)))
            assert dequantize(weight).size
    assert 5 < opened < 450, opened


# ---- the hub ----


def test_hub_ids() -> None:
    for name in ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B", "a/b"):
        assert hub.is_id(name)
    for name in ("model", "a/b/c", "../b", "./b", "/a/b", "~/b", "a/..", "models/x.bin", "a/b.gguf", "a b/c", "", "a/"):
        assert not hub.is_id(name)


def test_a_hub_id_is_downloaded_once_it_is_no_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, copy: Callable[[str], Path]
) -> None:
    library = pytest.importorskip("huggingface_hub")
    folder, asked = copy("llama"), []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(library, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/name").path == folder
    assert [name for name, _ in asked] == ["owner/name"]
    assert "config.json" in asked[0][1] and not any("pth" in pattern or "bin" in pattern for pattern in asked[0][1])
    shutil.copytree(folder, tmp_path / "owner" / "name")
    assert open_checkpoint("owner/name").path == Path("owner/name")
    assert len(asked) == 1
    with pytest.raises(FormatError, match="without a tokenizer"):
        numballama.load_tokenizer("other/name")
    assert asked[1][0] == "other/name" and not any("safetensors" in pattern for pattern in asked.pop()[1])
    with pytest.raises(Error, match="no such file"):
        open_checkpoint(tmp_path / "owner" / "other")
    assert len(asked) == 1


def test_offline_says_what_to_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Error) as caught:
        open_checkpoint("owner/name")
    text = str(caught.value)
    assert text.startswith("owner/name: no such file or directory, and the hub is switched off (HF_HUB_OFFLINE)")
    assert "config.json" in text and "https://huggingface.co/owner/name" in text and str(tmp_path) in text


def test_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Error, match=r"pip install 'numballama\[hub\]'; or download config\.json"):
        open_checkpoint("owner/name")
