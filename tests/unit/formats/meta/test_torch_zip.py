"""PyTorch's zip archives: hostile pickles and archives end in an error, without running code or taking memory."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numballama.errors import FormatError, UnsupportedError
from numballama.files import map_file
from numballama.formats.meta import torch_zip
from numballama.formats.meta.torch_zip import TorchFile
from numballama.loader import open_checkpoint
from tests.helpers.torch_files import protocol_4

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
    """An object whose pickle calls a function."""

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


def test_the_table_may_lie_in_another(tmp_path: Path) -> None:
    """As training programs save it: {"state_dict": {…}, "epoch": 3}. Numbers and texts are no weights."""
    storage = {"0": bytes(64)}
    entry = b"X\1\0\0\0w" + tensor()
    inner = b"}(" + entry + b"X\4\0\0\0stepK\7X\4\0\0\0nameNu"
    for data in (
        inner,
        b"}(X\5\0\0\0epochK\3X\5\0\0\0model" + inner + b"X\3\0\0\0opt}u",
        b"}X\6\0\0\0module" + inner + b"s",
    ):
        found = TorchFile(map_file(archive(tmp_path / "m.pth", b"\x80\2" + data + b".", storage)))
        assert found.tensors.keys() == {"w"}
    for data in (
        b"}(X\1\0\0\0a" + inner + b"X\1\0\0\0b" + inner + b"u",  # which of them?
        b"}(" + entry + b"X\1\0\0\0b" + inner + b"u",
        b"}X\1\0\0\0bK\3s",
    ):
        with pytest.raises(FormatError, match=r"not a table of tensors; at key [ab]; expected a name for each tensor"):
            TorchFile(map_file(archive(tmp_path / "m.pth", b"\x80\2" + data + b".", storage)))


def test_tensors_of_a_pickle_by_hand(tmp_path: Path) -> None:
    numbers = np.arange(16, dtype=np.float32)
    path = archive(tmp_path / "m.pth", table(tensor()), {"0": numbers.tobytes()})
    found = TorchFile(map_file(path))
    np.testing.assert_array_equal(found.view("w").data, numbers.reshape(4, 4))
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor(b"K\2", b"K\2K\7\x86", b"K\7K\1\x86") + b"\x88}tR"
    path = archive(tmp_path / "m.pth", table(parameter), {"0": numbers.tobytes()})
    np.testing.assert_array_equal(TorchFile(map_file(path)).view("w").data, numbers[2:].reshape(2, 7))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged pickle"),
        (b"\x80\2", "damaged pickle"),
        (b"\x80\2.", "damaged pickle"),
        (b"\x80\2(.", "damaged pickle"),
        (b"\x80\2]u.", "damaged pickle"),
        (b"\x80\2h\5.", "damaged pickle"),
        (b"\x80\2K\1.", "not a table of tensors"),
        (table(b"K\1"), "not a table of tensors"),
        (table(STORAGE), "not a table of tensors"),
        (b"\x80\2}K\1" + tensor() + b"s.", "not a table of tensors"),
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
        (b"\x80\2}r\xff\xff\xff\x7fX\1\0\0\0w" + b"j\xff\xff\xff\x7fs.", "not a table of tensors"),
        (b"\x80\2" + b"]" * (1 << 20) + b".", "too long"),
    ],
)
def test_damaged_pickles(tmp_path: Path, data: bytes, message: str) -> None:
    path = archive(tmp_path / "m.pth", data)
    started = time.perf_counter()
    with pytest.raises(FormatError, match=message):
        TorchFile(map_file(path))
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (4, 1), (5, 1), (1, 5), (1, 1)])
def test_tensors_in_another_order_are_copied(tmp_path: Path, rows: int, columns: int) -> None:
    """`torch.save` keeps strides: of a transposed matrix, of a part of another one."""
    numbers = np.arange(20, dtype=np.float32)
    strides = b"K" + bytes([rows]) + b"K" + bytes([columns]) + b"\x86"
    path = archive(tmp_path / "m.pth", table(tensor(strides=strides)), {"0": numbers.tobytes()})
    if rows * columns == 1:  # 7 numbers make 16
        with pytest.raises(UnsupportedError, match=r"tensor w repeats its elements, or .* save it with \.contiguous"):
            TorchFile(map_file(path))
        return
    found = TorchFile(map_file(path)).view("w").data
    expected = [[numbers[rows * i + columns * j] for j in range(4)] for i in range(4)]
    np.testing.assert_array_equal(found, expected)
    assert found.flags.c_contiguous


@pytest.mark.parametrize("strides", [b"K\0K\1\x86", b"K\1K\0\x86", b"K\0K\0\x86"])
def test_a_file_is_not_larger_than_it_is(tmp_path: Path, strides: bytes) -> None:
    """A tensor that repeats its elements could take any memory."""
    path = archive(tmp_path / "m.pth", table(tensor(strides=strides)), {"0": bytes(64)})
    with pytest.raises(UnsupportedError, match="tensor w repeats its elements"):
        TorchFile(map_file(path))


def test_protocols_4_and_5(tmp_path: Path) -> None:
    """Their names lie on the stack, and are looked up in the same table of three functions."""
    numbers = np.arange(16, dtype=np.float32)
    for data in (protocol_4(table(tensor())), protocol_4(table(tensor())).replace(b"\x80\4", b"\x80\5", 1)):
        found = TorchFile(map_file(archive(tmp_path / "m.pth", data, {"0": numbers.tobytes()})))
        np.testing.assert_array_equal(found.view("w").data, numbers.reshape(4, 4))
    for data, message in (
        (b"\x80\4\x8c\2os\x8c\6system\x93\x8c\4true\x85R.", r"refused.*found os\.system"),
        (b"\x80\4\x8c\5torch\x8c\rload.__call__\x93.", r"refused.*found torch\.load\.__call__"),
        (b"\x80\4K\1\x8c\4load\x93.", "a global whose name is no text"),
        (b"\x80\4\x8c\5torch})\x93.", "a global whose name is no text"),
        (b"\x80\4\x93.", "damaged pickle"),
    ):
        with pytest.raises(FormatError, match=message):
            TorchFile(map_file(archive(tmp_path / "m.pth", data)))


def test_types_of_storages_that_are_named(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pth", table(tensor(strides=b"K\5K\1\x86")), {"0": bytes(64)})
    with pytest.raises(FormatError, match=r"does not fit its storage; at tensor w; expected at most 16 .*0 \+ 19"):
        TorchFile(map_file(path))
    long = table(tensor().replace(b"FloatStorage", b"LongStorage"))
    with pytest.raises(UnsupportedError, match="tensor w is a LongStorage; supported are FloatStorage, Half"):
        TorchFile(map_file(archive(tmp_path / "m.pth", long)))


# ---- archives ----


def test_archives_that_are_none(tmp_path: Path) -> None:
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


def test_members_overlap_or_have_one_name(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pth", table(tensor()))
    data = bytearray(path.read_bytes())
    *_, count, _, start, _ = struct.unpack("<4s4H2IH", data[-22:])
    places, at = [], start
    for _ in range(count):
        places.append(at)
        at += 46 + sum(struct.unpack_from("<3H", data, at + 28))
    first = struct.unpack_from("<I", data, places[0] + 42)
    struct.pack_into("<I", data, places[-1] + 42, *first)
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"damaged zip archive: members .* overlap"):
        TorchFile(map_file(path))
    path.unlink()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("archive/data.pkl", b"2")
    with pytest.raises(FormatError, match=r"member archive/data\.pkl occurs twice"):
        TorchFile(map_file(path))


def test_a_large_directory_is_not_read(tmp_path: Path) -> None:
    """A file may consist of directory entries: zipfile would make an object for each of them."""
    path = tmp_path / "m.pth"
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, *[0] * 14)
    count = torch_zip.MAX_DIRECTORY // len(entry) + 1
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count & 0xFFFF, count & 0xFFFF, count * len(entry), 0, 0)
    path.write_bytes(entry * count + end)
    with pytest.raises(FormatError, match="a directory of 2,"):
        TorchFile(map_file(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        b"\x80\2]" + b"\x94" * (torch_zip.MAX_PICKLE - 4) + b".",
        b"\x80\2" + b"(" * (torch_zip.MAX_PICKLE - 3) + b".",
        b"\x80\2" + b"}" * (torch_zip.MAX_PICKLE - 4) + b"N.",
        b"\x80\4\x95" + b"\xff" * 7 + b"\x7f.",
        b"\x80\2X\xff\xff\xff\x7fa.",
        b"\x80\2]r\xff\xff\xff\x3f.",
    ],
    ids=["memo", "marks", "dicts", "frame", "string", "memo index"],
)
def test_memory_is_bounded_by_the_size_of_the_pickle(tmp_path: Path, data: bytes) -> None:
    file = map_file(archive(tmp_path / "m.pth", data))
    tracemalloc.start()
    with pytest.raises(FormatError):
        TorchFile(file)
    assert tracemalloc.get_traced_memory()[1] < 90_000_000
    tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("nested", [b")" + b"\x85" * 400_000, b"]q\0h\0a"], ids=["tuples", "a list in itself"])
def test_deep_and_circular_values(tmp_path: Path, nested: bytes) -> None:
    """As keys, arguments, persistent ids and results: nothing hashes, compares or prints them."""
    for data in (
        b"\x80\2}" + nested + b"Ns.",
        b"\x80\2}(" + nested + b"Nu.",
        b"\x80\2ccollections\nOrderedDict\n" + nested + b"R.",
        b"\x80\2ctorch._utils\n_rebuild_parameter\n" + nested + b"\x85R.",
        b"\x80\2" + nested + b"Q.",
        b"\x80\2}X\1\0\0\0w" + nested + b"s.",
        b"\x80\2" + nested + b".",
    ):
        with pytest.raises(FormatError):
            TorchFile(map_file(archive(tmp_path / "m.pth", data)))


def test_nothing_changes_what_stands_for_a_name(tmp_path: Path) -> None:
    """BUILD sets attributes in an ordinary unpickler, of functions and records as well."""
    state = b"}X\5\0\0\0startK\7s"
    slots = b"N}X\14\0\0\0__defaults__K\1\x85s\x86"
    for attributes in (state, slots):
        path = archive(tmp_path / "m.pth", table(tensor() + attributes + b"b"), {"0": bytes(64)})
        assert TorchFile(map_file(path)).view("w").data.shape == (4, 4)
        path = archive(tmp_path / "m.pth", b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n" + attributes + b"b.")
        with pytest.raises(FormatError, match="not a table of tensors"):
            TorchFile(map_file(path))
    assert torch_zip._rebuild_tensor.__defaults__ is None


def test_extensions_are_refused(tmp_path: Path) -> None:
    """Another package may have registered a function under a number."""
    copyreg.add_extension("os", "system", 240)
    copyreg._extension_cache[240] = os.system  # type: ignore[attr-defined]
    try:
        path = archive(tmp_path / "m.pth", b"\x80\2\x82\xf0X\4\0\0\0true\x85R.")
        with pytest.raises(FormatError, match="found the operation EXT1"):
            TorchFile(map_file(path))
    finally:
        copyreg.remove_extension("os", "system", 240)
