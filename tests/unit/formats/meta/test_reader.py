"""Meta's checkpoints: logits of transformers (golden/make_meta.py), merged parts, pickles that try to run code."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numballama
from numballama.checkpoint import LazyWeight
from numballama.config import ModelConfig, RopeScaling
from numballama.errors import Error, FormatError, UnsupportedError
from numballama.files import map_file
from numballama.formats.meta.torch_zip import TorchFile
from numballama.loader import open_checkpoint
from numballama.quantization.types import BF16, F32
from tests.helpers.torch_files import save_torch

META = Path(__file__).parents[3] / "golden" / "meta"
FOLDERS = sorted(path for path in META.iterdir() if path.is_dir())


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(META / name, tmp_path / name, dirs_exist_ok=True))


@pytest.mark.parametrize("name", ["rope.freqs", "freqs_cis", "mask", "layers.0.attention.cache_k"])
@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.int64])
def test_buffers_are_left_out(copy: Callable[[str], Path], name: str, dtype: type[np.generic]) -> None:
    path = copy("llama2") / "consolidated.00.pth"
    found = TorchFile(map_file(path), lambda other: other == "rope.freqs").tensors
    arrays = {
        each: np.frombuffer(info.file.data[info.offset : info.offset + info.nbytes], np.uint16).reshape(info.shape)
        for each, info in found.items()
    }
    del found
    path.unlink()
    save_torch(path, arrays | {name: np.ones(3, dtype)})
    assert open_checkpoint(path.parent).weights.keys() == open_checkpoint(META / "llama2").weights.keys()


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_logits_are_those_of_transformers(folder: Path, device: str) -> None:
    expected = np.load(folder / "expected.npz")
    with numballama.compile(folder, device=device, threads=1) as model:
        difference = np.abs(model.logits(expected["ids"]) - expected["logits"]).max()
    assert difference <= 2e-4 < 1 < np.abs(expected["logits"]).max()


def test_configs() -> None:
    opened = open_checkpoint(META / "llama2")
    base = ModelConfig(16, 24, 2, 4, 2, 40, 4096, tied_embeddings=False)
    assert (opened.config, opened.format, opened.stop_token_ids, opened.tokenizer) == (base, "Meta", (), None)
    assert opened.notes == ["params.json does not say for how many tokens the model was made: 4,096 assumed"]
    scaled = open_checkpoint(META / "llama3.1-2-parts").config
    assert scaled.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (scaled.rope_theta, scaled.context) == (5e5, 131072)


@pytest.mark.parametrize(
    ("changes", "wanted", "note"),
    [
        ({"norm_eps": 1e-6}, {"context": 2048}, "2,048 assumed"),
        ({"rope_theta": 500000.0}, {"context": 8192}, "8,192 assumed"),
        ({"use_scaled_rope": True}, {"rope_scaling": RopeScaling("llama3", 32.0)}, "32, as in Llama 3.2"),
        ({"max_seq_len": 100, "sliding_window": 7}, {"context": 100, "window": 7}, ""),
    ],
)
def test_what_params_say_and_leave_out(
    copy: Callable[[str], Path], changes: dict[str, Any], wanted: dict[str, Any], note: str
) -> None:
    folder = copy("llama2")
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | changes))
    opened = open_checkpoint(folder)
    for name, value in wanted.items():
        assert getattr(opened.config, name) == value
    assert (note in " ".join(opened.notes)) if note else opened.notes == []


def test_one_file_is_mapped_and_parts_are_merged_when_they_are_used(copy: Callable[[str], Path]) -> None:
    whole = open_checkpoint(META / "llama2")
    for weight in whole.weights.values():
        assert weight.type == (BF16 if len(weight.shape) == 2 else F32)
        assert len(weight.shape) == 1 or not (weight.data.flags.owndata or weight.data.flags.writeable)
    parts = open_checkpoint(META / "llama2-2-parts")
    assert parts.notes[-1] == "2 parts are merged in memory, 10.0 KiB of it"
    for name, weight in parts.weights.items():
        assert isinstance(weight, LazyWeight) == (len(weight.shape) == 2)
        assert not isinstance(weight, LazyWeight) or vars(weight)["_data"] is None
        size = weight.nbytes
        assert weight.data.shape == weight.shape == whole.weights[name].shape
        assert weight.data.nbytes == size
        assert weight.data is weight.data
    assert open_checkpoint(META / "llama2-2-parts" / "consolidated.01.pth").config == parts.config
    folder = copy("llama2")
    (folder / "consolidated.00.pth").rename(folder / "model.pt")
    assert open_checkpoint(folder / "model.pt").config == whole.config


def test_the_sentencepiece_model_beside_is_its_tokenizer(copy: Callable[[str], Path], models: Path) -> None:
    folder = copy("llama2")
    shutil.copy(models / "tok512.model", folder / "tokenizer.model")
    with pytest.raises(FormatError, match="more tokens than embeddings"):
        open_checkpoint(folder)
    assert open_checkpoint(META / "llama2").tokenizer is None


# ---- parts, params and tensors that do not fit ----


def edited(folder: Path, **changes: Any) -> Path:
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps({key: value for key, value in params.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dim": None}, FormatError, "key dim"),
        ({"dim": 32}, FormatError, "wrong shape"),
        ({"n_heads": 3}, FormatError, "head_dim must be even"),
        ({"n_layers": 3}, FormatError, r"layers\.2\.attention_norm\.weight"),
        ({"n_layers": 1}, UnsupportedError, r"tensor layers\.1\."),
        ({"vocab_size": 41}, FormatError, r"tok_embeddings\.weight"),
        ({"vocab_size": -2}, FormatError, "key vocab_size"),
        ({"norm_eps": None}, FormatError, "key norm_eps"),
        ({"use_scaled_rope": 1}, FormatError, "key use_scaled_rope"),
        ({"use_scaled_rope": True, "rope_scaling_factor": 0.1}, FormatError, "factor must be at least 1"),
        ({"moe": {"num_experts": 8}}, UnsupportedError, "moe is"),
    ],
)
def test_params_that_do_not_fit(
    copy: Callable[[str], Path], changes: dict[str, Any], error: type[Error], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_checkpoint(edited(copy("llama2"), **changes))


def test_missing_parts_and_params(copy: Callable[[str], Path]) -> None:
    folder = copy("llama2-2-parts")
    (folder / "consolidated.00.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(FormatError, match=r"expected consolidated\.00\.pth"):
        open_checkpoint(folder)
    (folder / "consolidated.02.pth").unlink()
    (folder / "consolidated.01.pth").rename(folder / "consolidated.00.pth")
    with pytest.raises(FormatError, match="wrong shape"):  # one part of two
        open_checkpoint(folder)
    (folder / "params.json").unlink()
    with pytest.raises(FormatError, match=r"expected params\.json"):
        open_checkpoint(folder / "consolidated.00.pth")


def test_files_from_before_1_6_say_how_to_convert_them() -> None:
    with pytest.raises(UnsupportedError, match=r"before PyTorch 1\.6.*torch\.save\(torch\.load"):
        open_checkpoint(META / "legacy.pth")


# ---- damage ----


def test_truncation(copy: Callable[[str], Path]) -> None:
    folder = copy("llama2")
    path = folder / "consolidated.00.pth"
    data = path.read_bytes()
    for size in (4, 30, 100, len(data) // 2, len(data) - 300, len(data) - 22, len(data) - 1):
        path.unlink()
        path.write_bytes(data[:size])
        with pytest.raises(FormatError):
            open_checkpoint(folder)


@pytest.mark.slow
def test_mutations_end_in_an_error_or_in_a_model(copy: Callable[[str], Path]) -> None:
    """Bits, bytes, words, cuts and moves, in the pickle, in the archive's directory and elsewhere."""
    rng, folder = random.Random(11), copy("llama2")
    path = folder / "consolidated.00.pth"
    sample = path.read_bytes()
    start, end = sample.index(b"data.pkl"), sample.index(b"PK\3\4", 40)
    directory = sample.index(b"PK\1\2")
    extremes = [0, 1, 2, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1]
    opened = 0
    tracemalloc.start()
    for _ in range(1500):
        data = bytearray(sample)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            low, high = rng.choice(((start, end), (directory, len(sample)), (0, len(sample))))
            at = min(rng.randrange(low, high), len(data) - 1)
            match rng.randrange(5):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.randrange(256)
                case 2:
                    width = rng.choice((2, 4, 8))
                    data[at : at + width] = rng.choice(extremes).to_bytes(8, "little")[:width]
                case 3:
                    del data[at : at + rng.choice((1, 4, 8, 100))]
                case 4:
                    data[at:at] = data[low : low + rng.choice((1, 4, 8, 60))]
        path.unlink()
        path.write_bytes(data)
        try:
            checkpoint = open_checkpoint(folder)
        except Error:
            continue
        opened += 1
        for weight in checkpoint.weights.values():
            assert weight.data.nbytes == weight.type.nbytes(int(np.prod(weight.shape)))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert 50 < opened < 1400, opened
