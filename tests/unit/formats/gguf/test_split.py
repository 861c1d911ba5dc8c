"""Models split over several GGUF files: opened from any part, refused when parts are missing or not of one model."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from numballama.checkpoint import Checkpoint
from numballama.errors import Error, FormatError
from numballama.files import map_file
from numballama.formats.gguf.header import Header
from numballama.formats.gguf.reader import TENSOR_NAMES
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.loader import open_checkpoint
from tests.helpers.gguf_files import CONFIG, edited, entry, letters, save, split, tensor, text, u32, weights_of


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return split(save(tmp_path / "whole.gguf", tokenizer=letters(300)), 3)


def assert_same(opened: Checkpoint, whole: Checkpoint) -> None:
    assert opened.config == whole.config
    assert list(opened.weights) == list(whole.weights)
    for name, weight in whole.weights.items():
        assert opened.weights[name].type == weight.type
        np.testing.assert_array_equal(opened.weights[name].data, weight.data)
        assert not opened.weights[name].data.flags.owndata


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_opens_all(parts: list[Path], given: int) -> None:
    whole = open_checkpoint(parts[0].with_name("whole.gguf"))
    opened = open_checkpoint(parts[given])
    assert_same(opened, whole)
    assert opened.tokenizer is not None
    assert opened.tokenizer.encode("abc") == whole.tokenizer.encode("abc")  # type: ignore[union-attr]
    assert opened.path == parts[given]
    noted = [f"part {given + 1} of 3 was given: all parts are opened, from the first"] if given else []
    assert opened.notes == noted


def test_the_tokenizer_of_a_directory_of_parts(parts: list[Path]) -> None:
    parts[0].with_name("whole.gguf").unlink()
    assert load_tokenizer(parts[0].parent).encode("abc") == letters(300).encode("abc")


@pytest.mark.parametrize("small_first", [False, True], ids=["full first", "metadata alone first"])
def test_what_the_gguf_package_splits(tmp_path: Path, small_first: bool) -> None:
    gguf = pytest.importorskip("gguf")
    weights = weights_of(CONFIG)
    whole = save(tmp_path / "whole.gguf")
    w = gguf.GGUFWriter(None, "llama", split_max_tensors=8, small_first_shard=small_first)
    w.add_vocab_size(CONFIG.vocab_size)
    w.add_context_length(CONFIG.context)
    w.add_embedding_length(CONFIG.dim)
    w.add_block_count(CONFIG.n_layers)
    w.add_feed_forward_length(CONFIG.hidden_dim)
    w.add_head_count(CONFIG.n_heads)
    w.add_head_count_kv(CONFIG.n_kv_heads)
    w.add_layer_norm_rms_eps(CONFIG.norm_eps)
    for name, weight in weights.items():
        w.add_tensor(TENSOR_NAMES[name], weight.data)
    w.write_header_to_file(tmp_path / "split.gguf")
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    found = sorted(tmp_path.glob("split-*.gguf"))
    assert len(found) == -(-len(weights) // 8) + small_first
    for path in found:
        assert_same(open_checkpoint(path), open_checkpoint(whole))


def replace(path: Path, data: bytes) -> None:
    """Replace a file by a new one. The old one may still be mapped, so its bytes must not change."""
    path.unlink()
    path.write_bytes(data)


def rewritten(path: Path, **numbers: int | None) -> None:
    """A part with other values in its metadata: `no`, `count`, `tensors_count`; None leaves one out."""
    changes: dict[str, bytes | None] = {}
    for name, value in numbers.items():
        key = f"split.{name.replace('_', '.')}"
        changes[key] = None if value is None else u32(key, value)
    replace(path, edited(path, changes))


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    for path in (parts[0], parts[2]):
        with pytest.raises(FormatError, match="part 2 of 3 of this model is missing") as caught:
            open_checkpoint(path)
        assert caught.value.expected == parts[1]
    parts[1].mkdir()
    with pytest.raises(Error, match="is a directory"):
        open_checkpoint(parts[0])


def test_another_name_leads_nowhere(parts: list[Path]) -> None:
    for name in ("model.gguf", "model-00001-of-3.gguf", "model-1-of-00003.gguf"):
        path = parts[0].with_name(name)
        shutil.copy(parts[0], path)
        with pytest.raises(FormatError, match="one of 3 parts of a model, renamed") as caught:
            open_checkpoint(path)
        assert caught.value.expected == "…-00001-of-00003.gguf"


def test_parts_that_cat_has_joined(parts: list[Path]) -> None:
    """A model that was cut anywhere is joined so; these have headers of their own."""
    path = parts[0].with_name("joined.gguf")
    for padding in (b"", bytes(32)):
        path.write_bytes(padding.join(part.read_bytes() for part in parts))
        with pytest.raises(FormatError, match=r"parts of a model, put one behind another.*give the path of a part"):
            open_checkpoint(path)


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("numbers", [{"no": 2}, {"no": None}, {"count": 4}, {"count": None}, {"count": 1}])
def test_numbers_that_contradict_the_name(parts: list[Path], given: int, numbers: dict[str, int | None]) -> None:
    """In the part that is given, or in another; a first part without a count is a file of its own, with too little."""
    rewritten(parts[1], **numbers)
    expected = "split.no 1 of split.count 3"
    if given == 1 and numbers.get("count", 3) in (1, None):
        with pytest.raises(FormatError, match=r"metadata key|embeddings"):
            open_checkpoint(parts[1])
        return
    with pytest.raises(FormatError, match="contradict the file name") as caught:
        open_checkpoint(parts[given])
    assert caught.value.path == parts[1]
    assert caught.value.expected == expected


def test_a_part_in_the_place_of_another(parts: list[Path]) -> None:
    """Links and copies, the first part of all others too: each part says which it is."""
    parts[2].unlink()
    for target in parts[:2]:
        parts[2].symlink_to(target)
        with pytest.raises(FormatError, match="contradict the file name"):
            open_checkpoint(parts[0])
        parts[2].unlink()
    parts[2].symlink_to(parts[2])
    with pytest.raises(Error):
        open_checkpoint(parts[0])


def test_tensors_of_two_parts_and_of_none(parts: list[Path]) -> None:
    kept = parts[2].read_bytes()
    name = next(iter(Header(map_file(parts[1])).tensors))
    replace(parts[2], kept)
    end = max(t.offset + t.nbytes for t in Header(map_file(parts[2])).tensors.values())
    start = Header(map_file(parts[2])).data_offset
    twice = edited(parts[2], {}, extra=(tensor(name, [1], 0, -(-(end - start) // 32) * 32),)) + bytes(64)
    replace(parts[2], twice)
    with pytest.raises(FormatError, match=f"{parts[1].name} holds as well") as caught:
        open_checkpoint(parts[0])
    assert (caught.value.path, caught.value.where) == (parts[2], f"tensor {name}")

    replace(parts[2], kept)
    dropped = next(iter(Header(map_file(parts[2])).tensors))
    less = edited(parts[2], {}, drop=dropped)
    replace(parts[2], less)
    with pytest.raises(FormatError, match="the parts do not hold all tensors") as caught:
        open_checkpoint(parts[1])
    assert (caught.value.expected, caught.value.found) == ("21", "20")
    rewritten(parts[0], tensors_count=None)  # then the model itself tells what is missing
    with pytest.raises(FormatError, match="a tensor is missing") as caught:
        open_checkpoint(parts[1])
    assert caught.value.where == f"tensor {dropped}"


def test_damage_names_the_part(parts: list[Path]) -> None:
    data = parts[1].read_bytes()
    replace(parts[1], data[:-100])
    with pytest.raises(FormatError, match="extends beyond the file") as caught:
        open_checkpoint(parts[0])
    assert caught.value.path == parts[1]
    replace(parts[1], b"GGUX" + data[4:])
    with pytest.raises(FormatError, match="not a GGUF file") as caught:
        open_checkpoint(parts[0])
    replace(parts[1], data)
    wrong = entry("split.no", 8, text("1"))
    replace(parts[1], edited(parts[1], {"split.no": wrong}))
    with pytest.raises(FormatError, match=r"split\.no has the wrong type"):
        open_checkpoint(parts[0])


@pytest.mark.parametrize("count", [1 << 31, (1 << 64) - 1])
def test_a_count_is_not_believed(parts: list[Path], count: int) -> None:
    data = edited(parts[0], {"split.count": entry("split.count", 10, struct.pack("<Q", count))})
    replace(parts[0], data)
    with pytest.raises(FormatError, match="contradict the file name"):
        open_checkpoint(parts[0])
