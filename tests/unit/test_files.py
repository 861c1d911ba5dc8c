"""Files are mapped read-only, and written completely or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from numballama import files
from numballama.errors import Error, FormatError
from numballama.files import atomic_write, atomic_write_directory, expand_user, map_file, require_folder


def test_only_regular_files_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"abc")
    file = map_file(tmp_path / "data")
    assert (file.size, file.data[:]) == (3, b"abc")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    for name, kind, message in (
        ("missing", Error, "no such file"),
        ("", Error, "is a directory"),
        ("fifo", Error, "is a FIFO"),
        ("empty", FormatError, "the file is empty"),
        ("a\0b", Error, "cannot be opened"),
    ):
        with pytest.raises(kind, match=message):
            map_file(tmp_path / name)


def test_a_text_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_TEXT_BYTES", 1 << 20)
    assert files.read_all(io.BytesIO(bytes(1 << 20)), "x") == bytes(1 << 20)
    assert files.read_line(io.BytesIO(b"ab\n" + bytes(2 << 20)), "x") == b"ab\n"
    for read in (files.read_all, files.read_line):
        with open("/dev/zero", "rb") as file, pytest.raises(Error, match=r"^x has more than 1 MiB: pass a"):
            read(file, "x")


def test_a_file_is_replaced_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(Error, match="is not a regular file"), atomic_write(tmp_path):
        pass


def test_a_directory_appears_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "model"

    def fail() -> None:
        with atomic_write_directory(path) as directory:
            (directory / "part").write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    with atomic_write_directory(path) as directory:
        (directory / "part").write_bytes(b"whole")
        assert not path.exists()
    assert (path / "part").read_bytes() == b"whole"
    with pytest.raises(Error, match="exists and is not an empty directory"), atomic_write_directory(path):
        pass


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand_user("~/x") == Path("/somewhere/x")
    with pytest.raises(Error, match="must be a string or a Path"):
        expand_user(3)  # type: ignore[arg-type]
    with pytest.raises(Error, match="the path is empty"):
        expand_user("")  # a variable of the shell that is not set
    with pytest.raises(Error, match="~nobody-of-this-name"):
        expand_user("~nobody-of-this-name/x")


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """And not the temporary file."""
    target = tmp_path / "none" / "file"
    with pytest.raises(Error, match=rf"^{target}: cannot be written: there is no folder {target.parent}$"):
        require_folder(target)
    with (
        pytest.raises(Error, match=rf"^{target}: cannot be written: there is no folder {target.parent}$"),
        atomic_write(target),
    ):
        pass
    require_folder(tmp_path / "file")
