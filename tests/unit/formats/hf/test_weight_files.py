"""Which files of a directory hold the weights: indexes, shards, PyTorch's files, files that only look like weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from numballama.checkpoint import Checkpoint
from numballama.errors import FormatError, UnsupportedError
from numballama.loader import open_checkpoint
from tests.helpers.hf_files import HF, save_tensors, tensors
from tests.helpers.torch_files import save_torch

LLAMA = HF / "llama-0"
INDEX, TORCH_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return one.config == other.config and all(
        np.array_equal(weight.data, other.weights[name].data) for name, weight in one.weights.items()
    )


def shards(folder: Path, count: int, stem: str, suffix: str, index: str = "") -> list[str]:
    """Write llama's tensors into that many files, with an index if it has a name; returns the files' names."""
    arrays, names, table = tensors(LLAMA), [], {}
    keys = list(arrays)
    for part in range(count):
        own = {key: arrays[key] for key in keys[part::count]}
        names.append(f"{stem}-{part + 1:05}-of-{count:05}{suffix}")
        (save_torch if suffix == ".bin" else save_tensors)(folder / names[-1], own)
        table |= dict.fromkeys(own, names[-1])
    if index:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return names


def test_a_stale_index_beside_the_file(copy: Callable[[str], Path]) -> None:
    """As in transformers: `model.safetensors` counts, and the user hears of it."""
    folder = copy("llama")
    shards(folder, 2, "model", ".safetensors", INDEX)
    zeros = {name: np.zeros_like(array) for name, array in tensors(LLAMA).items()}
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_tensors(folder / name, {key: zeros[key] for key in tensors(folder, name)})
    opened = open_checkpoint(folder)
    assert same(opened, open_checkpoint(LLAMA))
    assert opened.notes == [f"{INDEX} is beside model.safetensors and not used, as in transformers: it may be stale"]
    assert same(open_checkpoint(folder / "model.safetensors"), opened)
    (folder / "model.safetensors").unlink()
    assert not open_checkpoint(folder).weights["layers.0.wq"].data.any()


@pytest.mark.parametrize("index", ["", "named"])
@pytest.mark.parametrize(
    ("stem", "suffix"), [("model", ".safetensors"), ("pytorch_model", ".bin"), ("m", ".safetensors")]
)
def test_shards_with_and_without_an_index(copy: Callable[[str], Path], stem: str, suffix: str, index: str) -> None:
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    names = shards(folder, 3, stem, suffix, (INDEX if suffix != ".bin" else TORCH_INDEX) if index else "")
    for path in (folder, *(folder / name for name in names)):
        opened = open_checkpoint(path)
        assert same(opened, open_checkpoint(LLAMA))
        assert opened.notes == ([] if index else ["no index says which files belong together: all 3 parts are read"])
    (folder / names[1]).unlink()
    with pytest.raises(FormatError, match=r"a part of the model is missing|not clear which file"):
        open_checkpoint(folder)


def test_one_shard_is_the_whole_model(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    opened = open_checkpoint(folder)
    assert same(opened, open_checkpoint(LLAMA)) and opened.notes == []


def test_an_index_whose_table_is_wrong(copy: Callable[[str], Path]) -> None:
    """The tensors of all named files count, wherever the table puts them; of two, the one that it names."""
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    first, second = shards(folder, 2, "model", ".safetensors", INDEX)
    table = json.loads((folder / INDEX).read_text())["weight_map"]
    moved = next(name for name, file in table.items() if file == second)
    (folder / INDEX).write_text(json.dumps({"weight_map": table | {moved: first}}))
    opened = open_checkpoint(folder)
    assert same(opened, open_checkpoint(LLAMA))
    assert opened.notes == [f"{INDEX} names another file for {moved} than the one that holds it"]
    twice = tensors(folder, first) | {moved: np.zeros_like(tensors(LLAMA)[moved])}
    save_tensors(folder / first, twice)
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    assert same(open_checkpoint(folder), open_checkpoint(LLAMA))


@pytest.mark.parametrize("others", [["adapter_model"], ["a", "b"], ["embeddings"]])
def test_other_safetensors_beside_pytorchs_files(copy: Callable[[str], Path], others: list[str]) -> None:
    """An adapter, or what some other program saved: the names that transformers looks for come first."""
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    for name in others:
        save_tensors(folder / f"{name}.safetensors", {"x": np.zeros(3, np.float32)})
    save_torch(folder / "pytorch_model.bin", tensors(LLAMA))
    opened = open_checkpoint(folder)
    names = ", ".join(f"{name}.safetensors" for name in others)
    assert same(opened, open_checkpoint(LLAMA))
    assert opened.notes == [f"{names} beside PyTorch's files: not used, as in transformers"]
    (folder / "pytorch_model.bin").unlink()
    shards(folder, 2, "pytorch_model", ".bin", TORCH_INDEX)
    assert same(open_checkpoint(folder), open_checkpoint(LLAMA))


@pytest.mark.parametrize("torch", [False, True])
def test_float64_becomes_float32(copy: Callable[[str], Path], torch: bool) -> None:
    folder = copy("llama")
    arrays = {name: array.astype(np.float64) * (1 + 1e-12) for name, array in tensors(LLAMA).items()}
    arrays["model.norm.weight"][0] = 1e300
    (folder / "model.safetensors").unlink()
    (save_torch if torch else save_tensors)(folder / ("pytorch_model.bin" if torch else "model.safetensors"), arrays)
    opened, plain = open_checkpoint(folder), open_checkpoint(LLAMA)
    assert opened.weights["norm"].data[0] == np.inf, "as float32 has it"
    opened.weights["norm"] = plain.weights["norm"]
    assert same(opened, plain) and {weight.type.name for weight in opened.weights.values()} == {"f32"}
    assert opened.notes == ["matrices in float64 run as f32, converted in memory: 22.0 KiB"]
    assert opened.nbytes == plain.nbytes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pytorchs_matrices_in_another_order(copy: Callable[[str], Path], dtype: type[np.floating]) -> None:
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    arrays = {n: np.asfortranarray(a.astype(dtype)) if "mlp" in n else a for n, a in tensors(LLAMA).items()}
    save_torch(folder / "pytorch_model.bin", arrays)
    opened = open_checkpoint(folder)
    assert same(opened, open_checkpoint(LLAMA))
    assert opened.notes == ["matrices not in C order run as f32, converted in memory: 9.0 KiB"]
    assert opened.weights["layers.0.w1"].data.flags.c_contiguous


def test_pytorch_files(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    arrays = tensors(LLAMA)
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.layers.0.attn.bias": np.ones((4, 4), bool),
        "model.position_ids": np.arange(4),
    }
    save_torch(folder / "pytorch_model.bin", {n: np.zeros_like(a) for n, a in arrays.items()})
    assert same(open_checkpoint(folder), open_checkpoint(LLAMA)), "safetensors first"
    (folder / "model.safetensors").unlink()
    save_torch(folder / "pytorch_model.bin", arrays | buffers)
    for path in (folder, folder / "pytorch_model.bin"):
        assert same(open_checkpoint(path), open_checkpoint(LLAMA))
    other = (folder / "pytorch_model.bin").rename(folder / "weights.pt")
    assert same(open_checkpoint(other), open_checkpoint(LLAMA))
    with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
        open_checkpoint(folder)
    save_torch(
        folder / "pytorch_model.bin",
        arrays | {"model.norm.weight": np.ones(arrays["model.norm.weight"].size, np.int64)},
    )
    with pytest.raises(UnsupportedError, match=r"tensor model\.norm\.weight is a LongStorage"):
        open_checkpoint(folder)
    save_torch(
        folder / "pytorch_model.bin",
        arrays | {"model.norm.weight": np.ones(arrays["model.norm.weight"].size, np.int32)},
    )
    with pytest.raises(UnsupportedError, match=r"tensor model\.norm\.weight has type IntStorage"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", b"<!DOCTYPE html>"]
)
def test_a_text_in_place_of_the_weights(copy: Callable[[str], Path], text: bytes) -> None:
    """What Git leaves without LFS, and what a site answers in place of a file."""
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(text)
    message = (
        "a pointer of Git LFS.*git lfs pull" if b"lfs" in text else "not a safetensors file.*found '<!DOCTYPE html"
    )
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)


def test_shared_storage_is_tied(copy: Callable[[str], Path]) -> None:
    """PyTorch saves a tied classifier under both names, with one storage."""
    folder = copy("smollm2")
    arrays = tensors(folder)
    (folder / "model.safetensors").unlink()
    save_torch(folder / "pytorch_model.bin", arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]})
    opened = open_checkpoint(folder)
    assert opened.config.tied_embeddings and opened.notes == [] and same(opened, open_checkpoint(HF / "smollm2-0"))


@pytest.mark.parametrize(
    "junk", ["._model.safetensors", "._x.safetensors", "._model-00001-of-00002.safetensors", ".hidden.safetensors",
             "._pytorch_model.bin", "._m.gguf", "training_args.bin", "optimizer.pt"]
)  # fmt: skip
def test_files_that_only_look_like_weights(copy: Callable[[str], Path], junk: str) -> None:
    """AppleDouble files, which macOS leaves on other file systems, and what trainers save."""
    for name in ("llama", "qwen3-f16-sharded"):
        folder = copy(name)
        (folder / junk).write_bytes(b"\0\5\x16\7" + bytes(60))
        assert same(open_checkpoint(folder), open_checkpoint(HF / f"{name}-0"))
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert same(open_checkpoint(folder), open_checkpoint(LLAMA))


def test_hidden_files_alone_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "._model.safetensors").write_bytes(bytes(60))
    with pytest.raises(FormatError, match="directory without a model"):
        open_checkpoint(tmp_path)


def test_directories_without_weights_of_their_own(tmp_path: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    shutil.copytree(Path(HF).parent / "meta" / "llama2", folder, dirs_exist_ok=True)
    assert open_checkpoint(folder).format == "Meta"
    for name in ("consolidated.00.pth", "params.json"):
        (folder / name).unlink()
    with pytest.raises(
        FormatError, match=r"expected model\.safetensors.*pytorch_model\.bin.*found config\.json, expected\.npz, gen"
    ):
        open_checkpoint(folder)
