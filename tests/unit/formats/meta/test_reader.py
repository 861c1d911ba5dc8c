"""Meta's checkpoints: logits of transformers (golden/make_meta.py), parts merged, pickles that want to run code."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
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

META = Path(__file__).parents[3] / "golden" / "meta"
FOLDERS = sorted(path for path in META.iterdir() if path.is_dir())


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(META / name, tmp_path / name, dirs_exist_ok=True))


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
        assert vars(weight).get("_made") is None
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


# ---- pickles ----


def archive(path: Path, data: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A zip archive as torch.save makes them."""
    path.unlink(missing_ok=True)
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", b"little")
        for key, numbers in (storages or {"0": bytes(64)}).items():
            file.writestr(f"archive/data/{key}", numbers)
    return path


class Runs:
    """What a hostile pickle holds: a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call[0], tuple(self.call[1:])


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    for evil in (
        Runs(os.system, f"touch {marker}"),
        {"norm.weight": Runs(eval, f"open({str(marker)!r}, 'w')")},
        {"a": Runs(getattr, os, "system")},
        OrderedDict(a=Runs(exec, f"open({str(marker)!r}, 'w')")),
    ):
        buffer = io.BytesIO()
        try:
            pickle.Pickler(buffer, protocol).dump(evil)
        except TypeError:  # a module cannot be pickled
            continue
        path = archive(tmp_path / "evil.pth", buffer.getvalue())
        with pytest.raises(FormatError, match=r"refused|damaged pickle"):
            TorchFile(map_file(path))
        with pytest.raises(FormatError):
            open_checkpoint(path)
        assert not marker.exists()


def test_calls_are_refused_by_name(tmp_path: Path) -> None:
    path = archive(tmp_path / "evil.pth", pickle.dumps(Runs(os.system, "true"), 2))
    with pytest.raises(FormatError, match=rf"found {os.system.__module__}\.system"):
        TorchFile(map_file(path))
    for name in ("torch.load", "torch._utils._rebuild_tensor_v3", "collections.deque", "builtins.eval"):
        module, _, function = name.rpartition(".")
        path = archive(tmp_path / "evil.pth", b"\x80\2c" + f"{module}\n{function}\n".encode() + b".")
        with pytest.raises(FormatError, match=f"found {name}".replace(".", r"\.")):
            TorchFile(map_file(path))


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\x10tQ"


def tensor(start: bytes = b"K\0", shape: bytes = b"K\4K\4\x86", strides: bytes = b"K\4K\1\x86") -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + start
        + shape
        + strides
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def table(value: bytes) -> bytes:
    return b"\x80\2}X\1\0\0\0w" + value + b"s."


def test_tensors_of_a_pickle_by_hand(tmp_path: Path) -> None:
    numbers = np.arange(16, dtype=np.float32)
    path = archive(tmp_path / "m.pth", table(tensor()), {"0": numbers.tobytes()})
    found = TorchFile(map_file(path))
    np.testing.assert_array_equal(found.view("w").data, numbers.reshape(4, 4))
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor(b"K\2", b"K\2K\7\x86", b"K\7K\1\x86") + b"\x88}tR"
    path = archive(tmp_path / "m.pth", table(parameter), {"0": numbers.tobytes()})
    np.testing.assert_array_equal(TorchFile(map_file(path)).view("w").data, numbers[2:].reshape(2, 7))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged pickle"),
        (b"\x80\2", "damaged pickle"),
        (b"\x80\2.", "damaged pickle"),
        (b"\x80\2(.", "damaged pickle"),
        (b"\x80\2]u.", "damaged pickle"),
        (b"\x80\2h\5.", "damaged pickle"),
        (b"\x80\2K\1.", "no table of tensors"),
        (table(b"K\1"), "no table of tensors"),
        (table(STORAGE), "no table of tensors"),
        (b"\x80\2}K\1" + tensor() + b"s.", "no table of tensors"),
        (b"\x80\2}]K\1s.", "damaged pickle"),
        (table(tensor(b"K\1")), "does not fit its storage"),
        (table(tensor(b"J\xff\xff\xff\xff")), "damaged pickle"),
        (table(tensor(b"\x8a\x09" + b"\xff" * 8 + b"\0")), "damaged pickle"),
        (table(tensor(shape=b"K\4\x85")), "damaged pickle"),
        (table(tensor(shape=b"(" + b"K\4" * 9 + b"t")), "damaged pickle"),
        (table(tensor(shape=b"J\0\0\0\x40J\0\0\0\x40\x86", strides=b"J\0\0\0\x40K\1\x86")), "does not fit"),
        (table(tensor().replace(b"X\1\0\0\0" + b"0", b"X\1\0\0\0" + b"1")), "storage of a tensor is missing"),
        (table(tensor().replace(b"storagec", b"sturagec")), "damaged pickle"),
        (b"\x80\2" + b"(" * 100_000 + b"0" * 99_999 + b".", "found the operation POP"),
        (b"\x80\2]" + b"(" * 100_000 + b".", "damaged pickle"),
        (b"\x80\2}r\xff\xff\xff\x7fX\1\0\0\0w" + b"j\xff\xff\xff\x7fs.", "no table of tensors"),
        (b"\x80\2" + b"]" * (1 << 20) + b".", "too long"),
    ],
)
def test_damaged_pickles(tmp_path: Path, data: bytes, message: str) -> None:
    path = archive(tmp_path / "m.pth", data)
    started = time.perf_counter()
    with pytest.raises(FormatError, match=message):
        TorchFile(map_file(path))
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("strides", [b"K\1K\4\x86", b"K\5K\1\x86", b"K\0K\1\x86"])
def test_tensors_in_another_order_are_named(tmp_path: Path, strides: bytes) -> None:
    path = archive(tmp_path / "m.pth", table(tensor(strides=strides)))
    with pytest.raises(UnsupportedError, match="tensor w does not lie in C order"):
        TorchFile(map_file(path))
    double = table(tensor().replace(b"FloatStorage", b"DoubleStorage"))
    with pytest.raises(UnsupportedError, match="tensor w is a DoubleStorage; supported are FloatStorage, Half"):
        TorchFile(map_file(archive(tmp_path / "m.pth", double)))


# ---- archives ----


def test_archives_that_are_none(tmp_path: Path, copy: Callable[[str], Path]) -> None:
    path = archive(tmp_path / "m.pth", table(tensor()), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="compressed"):
        open_checkpoint(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("document.xml", "<a/>")
    with pytest.raises(FormatError, match="not a PyTorch checkpoint"):
        open_checkpoint(path)
    path = archive(tmp_path / "m.pth", table(tensor()))
    data = path.read_bytes()
    assert data.count(b"little") == 1
    path.write_bytes(data.replace(b"little", b"bigbig"))
    with pytest.raises(UnsupportedError, match="big-endian"):
        open_checkpoint(path)
    for count, length, start in ((1 << 15, 10, 0), (3, 1 << 31, 0), (3, 10, 1 << 31), (0xFFFF, 0, 0)):
        changed = data[:-22] + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, length, start, 0)
        path.write_bytes(changed)
        with pytest.raises(FormatError, match="damaged zip archive"):
            open_checkpoint(path)


def test_zip64_archives(tmp_path: Path) -> None:
    """What torch writes for large models: sizes and offsets in the extra part of an entry, and a longer end."""
    numbers = np.arange(16, dtype=np.float32)
    data = bytearray(archive(tmp_path / "m.pth", table(tensor()), {"0": numbers.tobytes()}).read_bytes())
    *_, count, _, start, _ = struct.unpack("<4s4H2IH", data[-22:])
    entries, at = bytearray(), start
    for _ in range(count):
        fields = list(struct.unpack_from("<4s6H3I5H2I", data, at))
        name = data[at + 46 : at + 46 + fields[10]]
        at += 46 + fields[10] + fields[11]
        wide = struct.pack("<HH3Q", 1, 24, fields[9], fields[8], fields[16])
        fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
        other = struct.pack("<HHI", 0x9999, 4, 7)
        fields[11] = len(other + wide)
        entries += struct.pack("<4s6H3I5H2I", *fields) + name + other + wide
    end = start + len(entries)
    tail = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entries), start)
    tail += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    tail += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = tmp_path / "wide.pth"
    path.write_bytes(bytes(data[:start]) + entries + tail)
    np.testing.assert_array_equal(TorchFile(map_file(path)).view("w").data, numbers.reshape(4, 4))


def test_truncation(copy: Callable[[str], Path]) -> None:
    folder = copy("llama2")
    path = folder / "consolidated.00.pth"
    data = path.read_bytes()
    for size in (4, 30, 100, len(data) // 2, len(data) - 300, len(data) - 22, len(data) - 1):
        path.unlink()
        path.write_bytes(data[:size])
        with pytest.raises(FormatError):
            open_checkpoint(folder)


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
