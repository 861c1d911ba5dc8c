"""Export: from every reader to every writer that can hold the model, the same logits; notes name what is lost."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numballama
from numballama.checkpoint import LazyWeight, Weight
from numballama.config import HALF_SPLIT, INTERLEAVED, ModelConfig
from numballama.errors import Error, UnsupportedError
from numballama.export import QUANTS, WRITERS, Converting, WriteOptions, export_model
from numballama.files import map_file
from numballama.formats.gguf.header import Header
from numballama.formats.hf.writer import write_safetensors
from numballama.loader import STORY_MODEL, open_checkpoint
from numballama.quantization.convert import convert, dequantize, relative_error
from numballama.quantization.types import BF16, F16, F32, Q8_0, WeightType
from tests.helpers.gguf_files import edited, entries_of, letters, u32
from tests.helpers.gguf_files import save as save_gguf
from tests.helpers.random_models import SMALL, architectures, random_checkpoint, reference_logits, save

GOLDEN = Path(__file__).parents[1] / "golden"
WIDE = ModelConfig(64, 96, 2, 4, 2, 300, 16, tied_embeddings=False)


# ---- safetensors ----


@pytest.mark.slow
@settings(max_examples=80)
@given(config=architectures(), pairing=st.sampled_from([INTERLEAVED, HALF_SPLIT]), seed=st.integers(0, 99))
def test_safetensors_keep_config_and_logits(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, pairing: str, seed: int
) -> None:
    config = replace(config, rope_pairing=pairing)
    weights, path = random_checkpoint(config, seed).weights, tmp_path_factory.mktemp("hf") / "model"
    given = (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, config.window)
    if not _writable(*given):
        with pytest.raises(UnsupportedError, match="no architecture of llama, mistral, qwen2, qwen3 has exactly"):
            write_safetensors(path, config, weights)
        assert not list(path.parent.iterdir())
        return
    assert write_safetensors(path, config, weights, bos_id=1, eos_ids=(2, 3)) == []
    opened = open_checkpoint(path)
    assert opened.config == replace(config, rope_pairing=HALF_SPLIT)
    assert (opened.stop_token_ids, opened.notes) == ((2, 3), [])
    ids = np.arange(min(config.context + 3, 14)) % config.vocab_size
    got = reference_logits(opened.config, opened.weights, ids)
    np.testing.assert_allclose(got, reference_logits(config, weights, ids), atol=1e-5)


def test_most_architectures_can_be_written() -> None:
    """The property above does not hold only because everything is refused."""
    able = []
    for biases in range(8):
        for norm in (False, True):
            for window in (0, 3):
                q, o, mlp = (bool(biases >> bit & 1) for bit in range(3))
                able.append((q, o, mlp, norm, window) if _writable(q, o, mlp, norm, window) else None)
    assert sorted(filter(None, able)) == sorted([
        (False, False, False, False, 0), (False, False, True, False, 0), (True, True, False, False, 0),
        (True, True, True, False, 0), (False, False, False, False, 3), (True, False, False, False, 0),
        (True, False, False, False, 3), (False, False, False, True, 0), (False, False, False, True, 3),
        (True, True, False, True, 0), (True, True, False, True, 3),
    ])  # fmt: skip


def _writable(q: bool, o: bool, mlp: bool, norm: bool, window: int) -> bool:
    from numballama.formats.hf.config import config_json

    config = replace(SMALL, qkv_bias=q, o_bias=o, mlp_bias=mlp, qk_norm=norm, window=window)
    try:
        config_json(config, "float32", {})
    except UnsupportedError:
        return False
    return True


# ---- every reader, every writer ----

SOURCES: dict[str, Callable[[Path], Path]] = {
    "llama2c-v1": lambda folder: save(folder, "llama2c-v1", WIDE)[0],
    "llama2c-v2": lambda folder: save(folder, "llama2c-v2", WIDE)[0],
    "gguf q8_0": lambda folder: save_gguf(folder / "s.gguf", WIDE, Q8_0),
    "hf llama": lambda folder: GOLDEN / "hf" / "llama-0",
    "hf llama3": lambda folder: GOLDEN / "hf" / "llama3-0",
    "hf qwen2": lambda folder: GOLDEN / "hf" / "qwen2-0",
    "hf qwen3": lambda folder: GOLDEN / "hf" / "qwen3-0",
    "hf mistral": lambda folder: GOLDEN / "hf" / "mistral-0",
    "hf sharded": lambda folder: GOLDEN / "hf" / "qwen3-f16-sharded-0",
    "meta": lambda folder: GOLDEN / "meta" / "llama2-2-parts",
}
REFUSED = {
    ("hf llama3", "llama2c-v0"), ("hf llama3", "llama2c-v1"), ("hf llama3", "llama2c-v2"), ("hf llama3", "kuiper"),
    ("hf llama3", "kuiper-int8"),
    ("hf qwen2", "llama2c-v0"), ("hf qwen2", "llama2c-v1"), ("hf qwen2", "llama2c-v2"), ("hf qwen2", "kuiper-int8"),
    *((source, to) for source in ("hf qwen3", "hf sharded", "hf mistral")
      for to in ("llama2c-v0", "llama2c-v1", "llama2c-v2", "kuiper", "kuiper-int8")),
    ("llama2c-v2", "gguf"), ("llama2c-v2", "safetensors"), ("gguf q8_0", "safetensors"),
}  # fmt: skip
"""What needs more than the format has, or another type to be chosen."""


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("name", SOURCES)
def test_the_copy_gives_the_same_logits(tmp_path: Path, name: str, to: str) -> None:
    path, copy = SOURCES[name](tmp_path), tmp_path / "copy"
    if (name, to) in REFUSED:
        with pytest.raises(UnsupportedError, match=r"no place|heads of dim|choose one of"):
            export_model(path, copy, to)
        assert not copy.exists()
        return
    done = export_model(path, copy, to)
    source = open_checkpoint(path)
    silent = {key: getattr(source.config, key) for key in ("rope_pairing", "rope_theta", "norm_eps")}
    opened = open_checkpoint(copy, **({} if to in ("gguf", "safetensors") else silent))
    exact = all(row.error == 0 for row in done.rows)
    # blocks of q8_0 are groups of 32 numbers of which one is 127: they come out as they went in
    assert exact == (to not in ("llama2c-v2", "kuiper-int8") or name in ("llama2c-v2", "gguf q8_0"))
    ids = np.arange(12) % source.config.vocab_size
    wanted = reference_logits(source.config, source.weights, ids)
    difference = np.abs(reference_logits(opened.config, opened.weights, ids) - wanted).max()
    assert difference <= (1e-5 if exact else 0.5), difference
    assert len(done.rows) == sum(len(weight.shape) == 2 for weight in source.weights.values())


@pytest.mark.parametrize("to", ["gguf", "safetensors"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_chosen_types_and_their_errors(tmp_path: Path, to: str, kind: str) -> None:
    path, source = save(tmp_path, "llama2c-v1", WIDE)
    if kind not in QUANTS[to]:
        with pytest.raises(UnsupportedError, match="safetensors cannot hold 'q8_0'; it holds f32, f16, bf16"):
            export_model(path, tmp_path / "copy", to, kind)
        return
    done = export_model(path, tmp_path / "copy", to, kind)
    opened = open_checkpoint(tmp_path / "copy")
    target = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}[kind]
    for row in done.rows:
        assert (row.before, row.after) == (F32, target)
        weight = source.weights[row.name]
        wanted = convert(weight, target)
        assert opened.weights[row.name].type == target and row.nbytes == wanted.nbytes
        values = dequantize(wanted).astype(np.float64)
        error = np.sqrt(((values - weight.data) ** 2).sum() / (weight.data.astype(np.float64) ** 2).sum())
        assert row.error == pytest.approx(error, rel=1e-9)
        assert (row.error == 0) == (kind == "f32")
    # the same conversion as compile's, but for the embedding, which it leaves alone when it is no classifier
    with numballama.compile(path, device="reference", dtype=kind) as model:
        order = "layers.1.w2"
        np.testing.assert_array_equal(model.weights[order].data, opened.weights[order].data)


def test_int8_groups(tmp_path: Path) -> None:
    for config, group in (
        (WIDE, 32),
        (replace(WIDE, dim=128, head_dim=32), 32),
        (replace(WIDE, hidden_dim=128), 64),
        (SMALL, 64),
    ):
        path, _ = save(tmp_path, "llama2c-v1", config)
        export_model(path, tmp_path / "copy.bin", "llama2c-v2")
        assert open_checkpoint(tmp_path / "copy.bin").weights["layers.0.wq"].type == WeightType("int8", group)
    path = tmp_path / "three.bin"
    WRITERS["llama2c-v2"](path, SMALL, random_checkpoint(SMALL).weights, WriteOptions(group_size=3))
    done = export_model(path, tmp_path / "copy.bin", "llama2c-v2")
    assert (tmp_path / "copy.bin").read_bytes() == path.read_bytes(), "int8 stays as it is"
    assert all(row.error == 0 for row in done.rows)


def test_relative_error_over_chunks() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((700, 480), dtype=np.float32)
    weight = Weight(values.shape, F32, values)
    for kind in (F16, BF16, Q8_0, WeightType("int8", 100)):
        result = convert(weight, kind)
        wrong = dequantize(result).astype(np.float64) - values
        assert relative_error(weight, result) == pytest.approx(np.sqrt((wrong**2).mean() / (values**2.0).mean()))
    zeros = Weight((4, 4), F32, np.zeros((4, 4), np.float32))
    assert relative_error(zeros, convert(zeros, F16)) == 0


@pytest.mark.slow
def test_one_matrix_in_memory_at_a_time(tmp_path: Path) -> None:
    config = ModelConfig(256, 1024, 6, 4, 4, 300, 16)
    path, source = save(tmp_path, "llama2c-v1", config)
    largest = 4 * 1024 * 256
    whole = sum(weight.nbytes for weight in source.weights.values())
    del source
    for to, kind in (("gguf", "f16"), ("gguf", "q8_0"), ("safetensors", "bf16"), ("llama2c-v2", None)):
        tracemalloc.start()
        export_model(path, tmp_path / f"{to}-{kind}", to, kind)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * largest < whole / 2, (to, kind, peak)


# ---- what belongs to a model beside its weights ----


def test_tokenizers_go_along(tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "s.gguf", WIDE, tokenizer=letters(300), chat_template="{{ x }}", name="s")
    done = export_model(path, tmp_path / "copy.gguf", "gguf", "q8_0")
    assert done.notes == ()
    opened = open_checkpoint(tmp_path / "copy.gguf")
    assert opened.tokenizer is not None and opened.tokenizer.vocabulary() == letters(300).vocabulary()
    assert opened.chat_template == "{{ x }}"
    done = export_model(path, tmp_path / "copy.bin", "llama2c-v1")
    assert any("llama2c-v1 files hold no tokenizer" in note for note in done.notes)
    done = export_model(path, tmp_path / "copy", "safetensors", "f16")
    assert any("tokenizer is left out" in note for note in done.notes)
    settings = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["dtype"]) == (1, 2, "float16")
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_ids_that_end_a_turn_go_along(tmp_path: Path) -> None:
    config = replace(WIDE, rope_pairing=HALF_SPLIT)
    write_safetensors(tmp_path / "Model-2.5", config, random_checkpoint(config).weights, eos_ids=(2, 7, 9))
    save_gguf(tmp_path / "tokenizer.gguf", WIDE, tokenizer=letters(300))
    done = export_model(tmp_path / "Model-2.5", tmp_path / "m.gguf", "gguf", tokenizer=tmp_path / "tokenizer.gguf")
    assert done.notes == ("GGUF holds two ids that end a text; left out: 9",)
    assert set(open_checkpoint(tmp_path / "m.gguf").stop_token_ids) == {2, 7}
    assert Header(map_file(tmp_path / "m.gguf")).text("general.name") == "Model-2.5"


def test_the_name_of_the_current_directory(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("llama")
    monkeypatch.chdir(folder)
    for source in (".", "./", f"../{folder.name}/", folder / "."):
        export_model(source, "../m.gguf", "gguf")
        assert Header(map_file("../m.gguf")).text("general.name") == folder.name


def test_gguf_that_llama_cpp_would_not_open(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no architecture with q/k norms and biases"):
        export_model(GOLDEN / "hf" / "qwen3-biases-0", tmp_path / "m.gguf", "gguf")
    assert not (tmp_path / "m.gguf").exists()
    config = replace(WIDE, rope_pairing=HALF_SPLIT, qkv_bias=True, head_dim=8)
    write_safetensors(tmp_path / "source", config, random_checkpoint(config).weights)
    export_model(tmp_path / "source", tmp_path / "m.gguf", "gguf")
    header = Header(map_file(tmp_path / "m.gguf"))
    assert header.text("general.architecture") == "llama", "its qwen2 wants heads of dim / n_heads"


@pytest.mark.parametrize("rows", [296, 300, 304])
def test_a_vocabulary_and_an_embedding_of_different_sizes(tmp_path: Path, rows: int) -> None:
    """A GGUF file gets a token for each row: the others are left out, missing ones are padding."""
    config = replace(WIDE, vocab_size=rows)
    data = save_gguf(tmp_path / "whole.gguf", WIDE, tokenizer=letters(300)).read_bytes()
    tokens: dict[str, bytes | None] = {
        key: data[start:end] for key, (start, end) in entries_of(data).items() if key.startswith("tokenizer.")
    }
    source = save_gguf(tmp_path / "source.gguf", config)
    eot = u32("tokenizer.ggml.eot_token_id", 299)  # beyond the embedding in the first case
    source.write_bytes(edited(source, tokens | {"tokenizer.ggml.eot_token_id": eot}))
    export_model(source, tmp_path / "copy.gguf", "gguf")
    opened = open_checkpoint(tmp_path / "copy.gguf")
    assert opened.tokenizer is not None and opened.tokenizer.vocab_size == rows
    assert set(opened.stop_token_ids) == ({2, 299} if rows >= 300 else {2})


def test_parts_are_not_kept_in_memory_by_an_export(tmp_path: Path) -> None:
    opened = open_checkpoint(GOLDEN / "meta" / "llama2-2-parts")
    seen = []
    types = dict.fromkeys(opened.weights, F16)
    weights = Converting(opened.weights, types, lambda name, before, after: seen.append((name, before, after)))
    for name in opened.weights:
        assert weights[name].data.shape == opened.weights[name].shape
    assert len(seen) == 16
    for name, before, after in seen:
        assert not isinstance(before, LazyWeight) and after.type == F16
        assert vars(opened.weights[name])["_data"] is None


def test_tokenizer_files_are_copied(tmp_path: Path, models: Path) -> None:
    model = models / "stories260K.bin"
    given = tmp_path / "tokenizer.model"
    given.write_bytes((models / "tok512.model").read_bytes())
    export_model(model, tmp_path / "copy", "safetensors", tokenizer=given)
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == given.read_bytes()
    source = tmp_path / "copy"
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ y }}"}')
    export_model(source, tmp_path / "again", "safetensors", "bf16")
    assert (tmp_path / "again" / "tokenizer_config.json").exists() and (tmp_path / "again" / "tokenizer.model").exists()


@pytest.mark.slow
def test_the_story_model_goes_round(tmp_path: Path) -> None:
    """GGUF → safetensors → llama2.c → GGUF, and still the same story: bf16 numbers are float32 numbers."""
    export_model(None, tmp_path / "hf", "safetensors", "f32")
    export_model(tmp_path / "hf", tmp_path / "back.gguf", "gguf")
    ids = [1, *range(300, 330)]
    first, last = open_checkpoint(STORY_MODEL), open_checkpoint(tmp_path / "back.gguf")
    assert replace(last.config, rope_pairing=first.config.rope_pairing) == first.config
    got = reference_logits(last.config, last.weights, ids)
    np.testing.assert_allclose(got, reference_logits(first.config, first.weights, ids), atol=1e-4)


# ---- arguments and the command line ----


@pytest.mark.parametrize(
    ("to", "quantize", "message"),
    [
        ("onnx", None, "unknown format 'onnx'; choose from llama2c-v0"),
        ("llama2c-v0", "f16", "llama2c-v0 cannot hold 'f16'; it holds f32"),
        ("llama2c-v2", "q8_0", "it holds int8"),
        ("gguf", "int8", "it holds f32, f16, bf16, q8_0"),
        ("safetensors", "nonsense", "it holds f32, f16, bf16"),
    ],
)
def test_senseless_requests(tmp_path: Path, to: str, quantize: str | None, message: str) -> None:
    path, _ = save(tmp_path, "llama2c-v1")
    with pytest.raises(UnsupportedError, match=message):
        export_model(path, tmp_path / "copy", to, quantize)


def test_the_model_that_is_read_is_not_lost(tmp_path: Path, copy: Callable[[str], Path]) -> None:
    """As llama-quantize: the copy, whose numbers may be rounded, does not take the place of its source."""
    path, _ = save(tmp_path, "llama2c-v0")
    folder = copy("llama")
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    for source, target in (
        (path, path),
        (path, link),
        (folder, folder / "model.safetensors"),
        (folder / "model.safetensors", folder / "model.safetensors"),
    ):
        before = target.read_bytes()
        with pytest.raises(Error, match="is what is read, and would be lost: write the copy to another file"):
            export_model(source, target, "gguf", "f32")
        assert target.read_bytes() == before
    export_model(path, folder / "other.bin", "gguf", "f32")
    export_model(path, folder / "other.bin", "gguf", "f32")  # another file may be replaced


def test_rows_that_are_no_blocks(tmp_path: Path) -> None:
    path, _ = save(tmp_path, "llama2c-v1")
    with pytest.raises(Error, match="cannot become q8_0: its rows of 24 elements"):
        export_model(path, tmp_path / "copy", "gguf", "q8_0")
    assert not (tmp_path / "copy").exists()
