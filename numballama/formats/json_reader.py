"""Reads JSON from untrusted files: one object of bounded size. Getters check types.

As in Python's json, and so in transformers, the last of several equal keys counts. A byte order mark is skipped.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..files import MappedFile, map_file

MAX_JSON = 3 << 20
"""Maximum size in bytes. Parsed JSON can take 25 times its size. The directory of a model with 1,000 layers has 1.3 MB.
"""


def read_object(path: Path) -> Keys:
    """The object in the file. Raises `FormatError` when the file holds something else, `Error` when it is missing."""
    return parse_object(file := map_file(path), 0, file.size, path.name)


def parse_object(file: MappedFile, begin: int, end: int, what: str) -> Keys:
    """The object in bytes [begin, end) of a file, called `what` in errors. Raises `FormatError` for anything else."""
    if end - begin > MAX_JSON:
        raise FormatError(
            f"{what} is too long",
            path=file.path,
            where=begin,
            expected=f"at most {MAX_JSON:,} bytes",
            found=end - begin,
        )

    try:
        value = json.loads(file.data[begin:end].decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number of 5,000 digits
        raise FormatError(f"{what} is not JSON: {error}", path=file.path, where=begin) from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not an object", path=file.path, where=begin, expected="{…}", found=_short(value))
    return Keys(value, file.path, what)


class Keys:
    """The keys of a JSON object. Getters return the default for a key that is missing or null. They raise
    `FormatError`, naming the key, for a value of another type or out of range.
    """

    def __init__(self, values: dict[str, Any], path: Path, what: str) -> None:
        self.values, self.path, self.what = values, path, what

    def fault(self, key: str, expected: str) -> FormatError:
        """The error for a bad value of a key."""
        found = _short(self.values[key]) if key in self.values else "no such key"
        return FormatError(f"bad {self.what}", path=self.path, where=f"key {key}", expected=expected, found=found)

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = 1 << 31) -> int:
        value = self._get(key, default, "a whole number")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.fault(key, f"a whole number from {least:,} to {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default, "a number")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e30 < value < 1e30:
            raise self.fault(key, "a number")
        return float(value)

    def floats(self, key: str) -> tuple[float, ...]:
        """The numbers of a list. A key that is missing is an error."""
        value = self._get(key, None, "a list of numbers")
        if not isinstance(value, list):
            raise self.fault(key, "a list of numbers")
        for each in value:
            if not isinstance(each, (int, float)) or isinstance(each, bool) or not -1e30 < each < 1e30:
                raise self.fault(key, "a list of numbers")
        return tuple(map(float, value))

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default, "true or false")
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default, "a string")
        if not isinstance(value, str):
            raise self.fault(key, "a string")
        return value

    def inner(self, key: str) -> Keys | None:
        """The object under a key; None when the key is missing or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fault(key, "an object")
        return Keys(value, self.path, f"{self.what}, {key}")

    def _get(self, key: str, default: Any, expected: str) -> Any:
        value = self.values.get(key)
        if value is None and (value := default) is None:
            raise self.fault(key, expected)
        return value


def _short(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) > 1 << 64:  # Python refuses to print the longest
        return "a number beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
