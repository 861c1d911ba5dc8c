"""Opening model files: they are recognised by content, arguments override them, and every failure is an Error."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import numballama
from numballama import loader
from numballama.config import ModelConfig
from numballama.errors import Error, FormatError, UnsupportedError
from numballama.export import WRITERS
from numballama.formats.hf.writer import write_safetensors
from numballama.loader import open_checkpoint
from numballama.tokenizers.llama2c import Llama2cTokenizer
from tests.helpers.gguf_files import CONFIG, edited, entries_of, letters, u32
from tests.helpers.gguf_files import save as save_gguf
from tests.helpers.random_models import random_checkpoint

SMALL = ModelConfig(16, 12, 1, 4, 2, 264, 8)


def write_tokenizer(path: Path, vocab_size: int) -> Path:
    """A tokenizer.bin of that many tokens: the fixed 259, then pieces of their own."""
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    pieces += [b"piece%d" % index for index in range(vocab_size - len(pieces))]
    entries = b"".join(struct.pack("<fi", 0, len(piece)) + piece for piece in pieces)
    path.write_bytes(struct.pack("<i", max(map(len, pieces))) + entries)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    WRITERS["llama2c-v0"](path, SMALL, random_checkpoint(SMALL).weights)
    return path


def test_overrides_replace_and_the_rest_is_noted(model: Path) -> None:
    assert loader.open is open_checkpoint
    opened = open_checkpoint(model)
    assert opened.defaulted_fields == ("rope_pairing", "rope_theta", "norm_eps")
    assert "rope_pairing='interleaved', rope_theta=10000.0, norm_eps=1e-05" in opened.notes[-1]
    opened = open_checkpoint(model, rope_pairing="half-split", rope_theta=5e5)
    assert (opened.config.rope_pairing, opened.config.rope_theta) == ("half", 5e5)
    assert opened.defaulted_fields == ("norm_eps",)
    assert "norm_eps=1e-05" in opened.notes[-1]
    assert "theta" not in opened.notes[-1]
    assert open_checkpoint(model, rope_pairing="half", rope_theta=1e6, norm_eps=1e-6).notes == []


@pytest.mark.parametrize(
    "override", [{"rope_pairing": "diagonal"}, {"rope_theta": 0.0}, {"rope_theta": float("nan")}, {"norm_eps": -1.0}]
)
def test_senseless_overrides(model: Path, override: dict[str, Any]) -> None:
    with pytest.raises(Error):
        open_checkpoint(model, **override)


@pytest.mark.parametrize(
    ("vocab_size", "fits"), [(264, True), (263, True), (259, True), (265, True), (297, True), (300, False)]
)
def test_tokenizer_must_fit(model: Path, tmp_path: Path, vocab_size: int, fits: bool) -> None:
    path = write_tokenizer(tmp_path / "t.bin", vocab_size)
    if not fits:
        with pytest.raises(Error, match=f"{vocab_size} tokens does not belong to a model of 264"):
            open_checkpoint(model, path)
        return
    opened = open_checkpoint(model, path)
    assert isinstance(opened.tokenizer, Llama2cTokenizer)
    assert any("padding" in note for note in opened.notes) == (vocab_size < 264)
    assert any("cannot be used" in note for note in opened.notes) == (vocab_size > 264)


def test_padding_has_limits(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "t.bin", 259)
    for vocab_size, fits in ((512, True), (261, False), (656, True), (776, False)):  # Qwen2.5-7B has 399 too many
        config = ModelConfig(16, 12, 1, 4, 2, vocab_size, 8)
        path = tmp_path / f"{vocab_size}.bin"
        WRITERS["llama2c-v1"](path, config, random_checkpoint(config).weights)
        if fits:
            open_checkpoint(path, tokenizer)
        else:
            with pytest.raises(Error, match="does not belong"):
                open_checkpoint(path, tokenizer)


def test_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    """They are named, never sampled, and a prompt with one is an error, whatever the file says of them."""
    whole = save_gguf(tmp_path / "whole.gguf", tokenizer=letters(300)).read_bytes()
    entries = {key: whole[start:end] for key, (start, end) in entries_of(whole).items() if key.startswith("tokenizer.")}
    path = save_gguf(tmp_path / "m.gguf", replace(CONFIG, vocab_size=298))
    entries["tokenizer.ggml.eot_token_id"] = u32("tokenizer.ggml.eot_token_id", 299)
    path.write_bytes(edited(path, entries))
    opened = open_checkpoint(path)
    assert opened.config.vocab_size == 298 and opened.stop_token_ids == (2,)
    assert "the tokenizer has 300 tokens, the embedding 298 rows: 'piece12' to 'piece13' cannot be used" in opened.notes
    with numballama.compile(path, device="reference") as model:
        assert model.logits([1, 297]).shape == (2, 298)
        for token in (298, 299):
            with pytest.raises(Error, match=f"is {token}; the vocabulary has 0 to 297"):
                model.logits([1, token])
        model.generate("abc", max_tokens=3, ignore_eos=True)


def test_real_models_with_their_tokenizers_and_with_the_wrong_ones(models: Path) -> None:
    for name, right, wrong in (
        ("stories260K", ("tok512.model", "tok512.bin"), "llama2_tokenizer.model"),
        ("stories15M", ("llama2_tokenizer.model", "tokenizer_llama2.bin"), "tok512.bin"),
    ):
        for tokenizer in right:
            opened = open_checkpoint(models / f"{name}.bin", models / tokenizer)
            assert opened.tokenizer is not None
            assert opened.tokenizer.vocab_size == opened.config.vocab_size
        with pytest.raises(Error, match="does not belong"):
            open_checkpoint(models / f"{name}.bin", models / wrong)


def test_home_expands(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert open_checkpoint("~/model.bin").path == model
    with pytest.raises(Error):
        open_checkpoint("~no-such-user-here/model.bin")


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (pickle.dumps({"a": 1}, protocol=2), "pickle"),
        (pickle.dumps({"a": 1}, protocol=4), "pickle"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"tjgg\x03\0\0\0", "before GGUF"),  # GGJT, as the file has it
        (b"lmgg\x03\0\0\0", "before GGUF"),
        (b"algg\x01\0\0\0", "a LoRA adapter"),
        (b"\x93NUMPY\1\0", "an array of NumPy"),
        (gzip.compress(bytes(100)), r"a gzip archive \(unpack it\)"),
        (bz2.compress(bytes(100)), "a bzip2 archive"),
        (lzma.compress(bytes(100)), "an xz archive"),
        (b"model/".ljust(257, b"\0") + b"ustar\x0000", r"a tar archive \(unpack it\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a gzip archive has the time of day in it
)
def test_known_foreign_formats_are_named(tmp_path: Path, head: bytes, kind: str) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(head.ljust(100, b" "))
    with pytest.raises(UnsupportedError, match=f"{kind}.*supported are llama2.c v0, v1 and v2, KuiperLLama"):
        open_checkpoint(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_archive_that_is_no_checkpoint(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(path := tmp_path / "model.zip", "w", method) as archive:
        archive.writestr("model/config.json", "{}" * 99)
    with pytest.raises(FormatError, match=r"not a PyTorch checkpoint; .*found a zip archive of other files: unpack it"):
        open_checkpoint(path)


def test_a_dim_of_640_is_no_pickle(tmp_path: Path) -> None:
    config = ModelConfig(640, 1, 1, 320, 1, 4, 1)  # its header begins with 80 02, as pickles do
    WRITERS["llama2c-v0"](tmp_path / "m", config, random_checkpoint(config).weights)
    assert open_checkpoint(tmp_path / "m").config == config


def test_directories(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="directory without a model"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FormatError, match=r"expected config\.json"):
        open_checkpoint(tmp_path)


def test_a_directory_of_one_model_and_what_is_none(tmp_path: Path) -> None:
    """A projector of images or an importance matrix beside the only model is not another one."""
    path = save_gguf(tmp_path / "SmolVLM-Q8_0.gguf")
    for other in ("mmproj-SmolVLM-f16.gguf", "SmolVLM.imatrix.gguf"):
        (tmp_path / other).write_bytes(path.read_bytes())
        assert open_checkpoint(tmp_path).path == path
    path.rename(tmp_path / "mmproj.gguf")  # no other is there
    with pytest.raises(FormatError, match=r"a directory of 3 GGUF models; give the path of one: SmolVLM\.imatrix"):
        open_checkpoint(tmp_path)


def test_links_of_a_hubs_cache_that_lead_nowhere(tmp_path: Path) -> None:
    """`cp -r` of a snapshot copies links to its blobs: a tokenizer_config.json would be as good as not there."""
    snapshot, blob = tmp_path / "snapshot", tmp_path / "blob"
    config = SMALL.with_overrides(rope_pairing="half")
    write_safetensors(snapshot, config, random_checkpoint(config).weights)
    for name in ("tokenizer_config.json", "config.json", "model.safetensors"):
        shutil.rmtree(copy := tmp_path / "copy", ignore_errors=True)
        shutil.copytree(snapshot, copy)
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to("../blob")
        for given_path in (copy, copy / name):
            with pytest.raises(Error, match=rf"{name}: is a link to \.\./blob, which is not there.*cp -rL"):
                open_checkpoint(given_path)
    blob.write_bytes((snapshot / "model.safetensors").read_bytes())
    assert open_checkpoint(copy).config == open_checkpoint(copy / "model.safetensors").config
    (copy / "README.md").symlink_to("../nothing")  # which nobody reads
    open_checkpoint(copy)


def test_a_download_that_has_not_ended(tmp_path: Path) -> None:
    """aria2c gives a file its whole size at once: the rest is zeros, which are weights like any other."""
    path = save_gguf(tmp_path / "m.gguf")
    assert open_checkpoint(path).format == "GGUF v3"
    (tmp_path / "m.gguf.aria2").write_bytes(b"\0\1")
    for place in (path, tmp_path):
        with pytest.raises(FormatError, match=r"m\.gguf: a download that has not ended.*m\.gguf\.aria2"):
            open_checkpoint(place)


@pytest.mark.parametrize("name", ["model.safetensors.incomplete", ".cache/huggingface/download/x=.1f.incomplete"])
def test_a_directory_whose_download_has_not_ended(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"\0")
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"), 4) | {
        "num_attention_heads": 2
    }
    files = {
        "": "",
        "config.json": json.dumps({"model_type": "llama", "vocab_size": 8, **sizes}),
        "model.safetensors.index.json": '{"weight_map": {"x": "model-00001-of-00001.safetensors"}}',
    }
    for more, content in files.items():
        if more:
            (tmp_path / more).write_text(content)
        with pytest.raises(FormatError, match=rf"a download that has not ended: {Path(name).name}"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", [".part{}of2", "-split-{}", ".00{}"])
def test_pieces_of_a_file_that_was_cut(tmp_path: Path, suffix: str) -> None:
    data = save_gguf(tmp_path / "m.gguf").read_bytes()
    for number, piece in ((1, data[:900]), (2, data[900:])):
        path = tmp_path / f"m.gguf{suffix.format('ab'[number - 1] if 'split' in suffix else number)}"
        path.write_bytes(piece)
        with pytest.raises(FormatError, match=r"a piece of m\.gguf, .*: join all pieces .* to m\.gguf$"):
            open_checkpoint(path)
    path.write_bytes(data)  # whole after all
    assert open_checkpoint(path).format == "GGUF v3"


@pytest.mark.parametrize(("name", "expected"), [("m.gguf", "GGUF"), ("m.safetensors", "a length and a directory")])
def test_a_name_that_promises_another_content(tmp_path: Path, name: str, expected: str) -> None:
    path = tmp_path / name
    for content, found in ((bytes(1000), "zeros: was a download interrupted"), (bytes(range(200)), r"b'\\x00\\x01")):
        path.write_bytes(content)
        with pytest.raises(
            FormatError, match=f"not a {path.suffix[1:]} file.*byte 0; expected {expected}.*found {found}"
        ):
            open_checkpoint(path)


def test_a_json_file_of_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text('{"model_type": "llama"}')
        with pytest.raises(
            FormatError, match=rf"a file beside the weights of a model; expected its directory, {tmp_path}"
        ):
            open_checkpoint(tmp_path / name)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    empty, fifo = tmp_path / "empty", tmp_path / "fifo"
    empty.touch()
    os.mkfifo(fifo)
    with pytest.raises(FormatError, match="empty"):
        open_checkpoint(empty)
    with pytest.raises(Error, match="FIFO"):
        open_checkpoint(fifo)
    with pytest.raises(Error, match="special file"):
        open_checkpoint("/dev/zero")
    for path in (tmp_path / "missing", tmp_path / "empty" / "below", "nul\0byte", "x" * 5000):
        with pytest.raises(Error):
            open_checkpoint(path)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root reads everything")
def test_unreadable(model: Path) -> None:
    model.chmod(0)
    with pytest.raises(Error, match="cannot be opened"):
        open_checkpoint(model)


@given(st.integers(1, 1 << 17), st.integers(-600, 600), st.sampled_from([None, "tokenizer.json"]))
@example(32_000, 255, "tokenizer.json")
@example(32_000, 256, "tokenizer.json")
@example(32_000, 256, None)
@example(32_000, 4_001, None)
@example(32_000, 4_002, None)
def test_how_many_tokens_a_tokenizer_may_have_beyond_the_embedding(rows: int, more: int, path: str | None) -> None:
    """An eighth of the rows and one; 255 of these for a tokenizer that is given, which may be another model's."""
    assume(rows + more > 0)
    tokenizer: Any = SimpleNamespace(vocab_size=rows + more, piece=lambda token: f"<{token}>")
    opened: Any = SimpleNamespace(
        config=SimpleNamespace(vocab_size=rows), path=Path("model"), notes=[], stop_token_ids=(0, rows - 1, rows)
    )
    fits = more <= 1 + rows // 8 and (path is None or more < 256)
    if more > 0 and not fits:
        with pytest.raises(Error, match=r"more tokens than embeddings|does not belong to a model of"):
            loader._require_fit(opened, tokenizer, path)
    elif more > 0:
        loader._require_fit(opened, tokenizer, path)
        (note,) = opened.notes
        last = "" if more == 1 else f" to '<{rows + more - 1}>'"
        assert note.endswith(f"the embedding {rows:,} rows: '<{rows}>'{last} cannot be used")
        assert opened.stop_token_ids == (0, rows - 1)
    elif more == 0:
        loader._require_fit(opened, tokenizer, path)
        assert opened.notes == [] and opened.stop_token_ids == (0, rows - 1, rows)


@pytest.mark.parametrize(
    "text", ["# A page\n\nof it", "hello\n", '{"a": 1}', "中文的说明" * 9, "\ufeffa text", "x" * 99]
)
def test_a_text_is_no_model(tmp_path: Path, text: str) -> None:
    """The character that byte 64 cuts is no damage."""
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(UnsupportedError, match="a text file, which is not read; supported are"):
        open_checkpoint(tmp_path / "README.md")


def test_a_name_that_is_no_file() -> None:
    with pytest.raises(Error, match=r"^llama3: no such file; a model is a file, a directory, or a name on the .* hub"):
        open_checkpoint("llama3")
