"""Opens models that are split over several GGUF files, as llama.cpp's gguf-split and the gguf package write them.

The metadata of each part give its number (`split.no`, from 0), the number of parts (`split.count`) and the number of
tensors in all parts (`split.tensors.count`). All other metadata are in the first part. File names end in
-00001-of-00003.gguf.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import FormatError
from ...files import MappedFile, map_file
from .header import MAGIC, Header

_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def open_header(file: MappedFile) -> tuple[Header, list[str]]:
    """The header of a GGUF file, and notes. For a split model: the first part's header with the tensors of all parts.

    Raises `FormatError` for parts that are missing or do not belong together, and what `Header` and `map_file` raise.
    """
    given = Header(file)
    count = given.integer("split.count", 0)
    assert count is not None
    if count <= 1:
        return given, []
    if (match := _NAME.fullmatch(file.path.name)) is None:
        end = max((info.offset + info.nbytes for info in given.tensors.values()), default=given.data_offset)
        if (at := file.data.find(MAGIC, end, end + 2 * given.alignment + len(MAGIC))) >= 0:
            raise FormatError(
                f"{count:,} parts of a model, put one behind another",
                path=file.path,
                where=at,
                expected="files of their own (give the path of a part), or what llama-gguf-split --merge makes of them",
                found="the header of the next part",
            )
        raise FormatError(
            f"one of {count:,} parts of a model, renamed so that the others cannot be found",
            path=file.path,
            expected=f"…-{_number(given) + 1:05}-of-{count:05}.gguf",
            found=file.path.name,
        )
    part = int(match["part"]) - 1
    _require_numbers(given, part, int(match["count"]))
    headers = [given if index == part else _open(file, match["stem"], index, count) for index in range(count)]
    first = headers[0]
    expected, total = first.integer("split.tensors.count"), sum(len(header.tensors) for header in headers)
    for header in headers[1:]:
        for name in header.tensors:
            if (other := first.tensors.get(name)) is not None:
                raise FormatError(
                    f"a tensor that {other.file.path.name} holds as well", path=header.path, where=f"tensor {name}"
                )
        first.tensors.update(header.tensors)
    if expected is not None and expected != total:
        raise FormatError(
            "the parts do not hold all tensors",
            path=first.path,
            where=first.fields["split.tensors.count"].offset,
            expected=f"{expected:,}",
            found=f"{total:,}",
        )
    notes = [f"part {part + 1} of {count} was given: all parts are opened, from the first"] if part else []
    return first, notes


def first_parts(paths: Sequence[Path]) -> list[Path]:
    """Those of the paths that stand for a model: files that are whole, and first parts. Nothing is opened."""
    matches = {path: _NAME.fullmatch(path.name) for path in paths}
    return [path for path, match in matches.items() if match is None or int(match["part"]) == 1]


def _open(given: MappedFile, stem: str, index: int, count: int) -> Header:
    path = given.path.with_name(f"{stem}-{index + 1:05}-of-{count:05}.gguf")
    if not path.exists():
        raise FormatError(
            f"part {index + 1} of {count} of this model is missing",
            path=given.path,
            expected=path,
            found="no such file",
        )
    header = Header(map_file(path))
    _require_numbers(header, index, count)
    return header


def _number(header: Header) -> int:
    number = header.integer("split.no", 0)
    assert number is not None
    return number


def _require_numbers(header: Header, index: int, count: int) -> None:
    """Raise `FormatError` unless the metadata of a part agree with its file name."""
    numbers = _number(header), header.integer("split.count", 0)
    if numbers != (index, count):
        raise FormatError(
            "split.no and split.count contradict the file name",
            path=header.path,
            where=header.fields[key].offset if (key := "split.no") in header.fields else key,
            expected=f"split.no {index} of split.count {count}",
            found=f"{numbers[0]} of {numbers[1]}",
        )
