"""`CallReader`: one call, as the object that a model writes, in text that arrives in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from enum import Enum

from .definitions import NAME
from .scanner import ValueScanner

MAX_HELD = 1 << 16
"""Maximum size in characters of what is held back of a call before its name is known and its arguments begin."""

MAX_STRING = 512
"""Maximum size in characters of a key, and of a name."""

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING_END = re.compile(r'["\\]')
_NAME_KEYS, _ARGUMENT_KEYS = ("name", "function"), ("arguments", "parameters")
_BARE_KEYS = {*_NAME_KEYS, *_ARGUMENT_KEYS, "type", "id"}


def _prefixes(literal: str) -> str:
    """A regular expression of all prefixes of a text."""
    return "(?:" + "(?:".join(map(re.escape, literal)) + ")?" * len(literal)


_ID, _ARGS, _GAP = r"\[CALL_ID\]", r"\[ARGS\]", r"[ \t\r\n]{0,16}"
_HEADER = re.compile(rf"({NAME}){_GAP}(?:{_ID}([a-zA-Z0-9_-]{{1,64}}))?(?:{_ARGS})?{_GAP}(?=\{{)")
_HEADER_PREFIX = re.compile(
    rf"{NAME}{_GAP}(?:{_prefixes('[CALL_ID]')}|(?:{_ID}[a-zA-Z0-9_-]{{0,64}})?"
    rf"(?:{_prefixes('[ARGS]')}|(?:{_ARGS})?{_GAP}))"
)


class Status(Enum):
    """How far a call has been read."""

    OPEN = "its name or its arguments are missing: it may still be content"
    CALL = "its name is known and its arguments have begun"
    DONE = "it is complete"
    BROKEN = "what follows is no part of it"


class CallReader:
    """Reads `{"name": …, "arguments": {…}}`. "parameters" is read as "arguments", and "function" as "name".

    Members may come in any order. `before` is the text in front of the object that is content if this is no call.
    `marked`: a marker says that this is a call. Otherwise an object is one only if it has arguments and no members of
    other kinds. `named`: it may also be `name[ARGS]{…}` or `name[CALL_ID]id[ARGS]{…}`, where {…} are the arguments.
    `forbidden`: see `ValueScanner`.
    """

    def __init__(
        self,
        names: Collection[str],
        before: str,
        marked: bool = True,
        named: bool = False,
        in_list: bool = False,
        forbidden: str = "",
    ) -> None:
        self.status = Status.OPEN
        self.name: str | None = None
        self.id: str | None = None
        """The id that the model wrote before the arguments."""
        self.arguments: list[str] = []
        """Pieces of the arguments. The user takes them out."""
        self.is_call = False
        """Whether it is a call; also when it is broken."""
        self.marked, self.in_list = marked, in_list
        """`in_list`: a list of calls has begun."""
        self.wait = False
        """Whether the rest of the data must be read again with what follows."""
        self._names, self._named, self._forbidden = names, named, forbidden
        self._raw, self._size = [before], len(before)
        self._step: Callable[[str, int], int] = self._object
        self._wrapped = self._has_arguments = self._escaped = False
        self._key, self._string, self._string_size = "", list[str](), 0
        self._scanner = ValueScanner()
        self._name_first = False

    @property
    def in_arguments(self) -> bool:
        """Whether it is a call whose arguments have not ended."""
        return self.is_call and self._step == self._read_arguments

    @property
    def text(self) -> str:
        """All that was read, while it may still be content."""
        return "".join(self._raw)

    def read(self, data: str, at: int) -> int:
        """Read from `data[at]` on. Returns where the next read begins, or what follows the call."""
        self.wait = False
        while at < len(data) and not self.wait and self.status in (Status.OPEN, Status.CALL):
            at = self._step(data, at)
        return at

    def _take(self, data: str, at: int, end: int) -> int:
        if not self.is_call:
            self._raw.append(data[at:end])
            self._size += end - at
            if self._size >= MAX_HELD:
                self.status = Status.BROKEN
        return end

    def _limit(self, data: str, at: int) -> int:
        """The end of what may be read: the same character, whatever the pieces are."""
        return len(data) if self.is_call else min(len(data), at + MAX_HELD - self._size)

    def _peek(self, data: str, at: int) -> tuple[int, str]:
        """(position, character) of the next one that is no white space; "" if there is none yet."""
        found = _SPACE.match(data, at, self._limit(data, at))
        assert found is not None
        at = self._take(data, at, found.end())
        return at, data[at] if at < len(data) and self.status is not Status.BROKEN else ""

    def _break(self, at: int) -> int:
        self.status = Status.BROKEN
        return at

    def _object(self, data: str, at: int) -> int:
        """The beginning of the object, or of a list of them, or the name."""
        at, character = self._peek(data, at)
        if not character:
            return at
        if character == "{":
            self._step = self._member
            return self._take(data, at, at + 1)
        if character == "[" and not self.in_list:
            self.in_list = True
            return self._take(data, at, at + 1)
        return self._header(data, at) if self._named and not self.in_list else self._break(at)

    def _header(self, data: str, at: int) -> int:
        """`name[ARGS]` or `name[CALL_ID]id[ARGS]`. It is short, so all of it is waited for."""
        found = _HEADER.match(data, at)
        if found is not None and found[1] in self._names:
            self._name_first, self.name, self.id = True, found[1], found[2]
            self._take(data, at, found.end())
            self._start()
            self._scan(self._read_arguments)
            return found.end()
        self.wait = found is None and _HEADER_PREFIX.fullmatch(data, at) is not None
        return at if self.wait else self._break(at)

    def _member(self, data: str, at: int) -> int:
        """A key, or the object's end."""
        at, character = self._peek(data, at)
        if character == '"':
            return self._begin_string(data, at, self._read_key)
        if character == "}":
            return self._next(data, at)
        return self._break(at) if character else at

    def _read_key(self, data: str, at: int) -> int:
        end, key = self._read_string(data, at)
        if key is not None:
            self._key, self._step = key, self._colon
        return end

    def _colon(self, data: str, at: int) -> int:
        at, character = self._peek(data, at)
        if character == ":":
            self._step = self._value
            return self._take(data, at, at + 1)
        return self._break(at) if character else at

    def _value(self, data: str, at: int) -> int:
        """The beginning of a member's value."""
        at, character = self._peek(data, at)
        if not character:
            return at
        if self._key in _NAME_KEYS and self.name is None and character == '"':
            return self._begin_string(data, at, self._read_name)
        if self._key == "function" and character == "{" and not (self._wrapped or self.name or self._has_arguments):
            self._wrapped, self._step = True, self._member
            return self._take(data, at, at + 1)
        if self._key in _ARGUMENT_KEYS and not self._has_arguments:
            if character != "{":
                return self._break(at)
            self._has_arguments = True
            if self.name is not None:
                self._start()
            self._scan(self._read_arguments)
        elif self.is_call or self.marked or self._key in _BARE_KEYS:
            self._scan(self._read_other)
        else:
            return self._break(at)
        return at

    def _read_name(self, data: str, at: int) -> int:
        end, name = self._read_string(data, at)
        if name is not None:
            if name not in self._names:
                return self._break(end)
            self.name, self._step = name, self._next
            if self._has_arguments:
                self._start()
        return end

    def _start(self) -> None:
        self.is_call, self._raw = True, []
        if self.status is Status.OPEN:
            self.status = Status.CALL

    def _scan(self, step: Callable[[str, int], int]) -> None:
        self._scanner, self._step = ValueScanner(self._forbidden), step

    def _read_arguments(self, data: str, at: int) -> int:
        """The value of the arguments. Its pieces are kept until the name is known."""
        end = self._scanner.feed(data, at, self._limit(data, at))
        self.arguments.append(data[at:end])
        return self._end_value(data, at, end)

    def _read_other(self, data: str, at: int) -> int:
        """The value of another member, such as "type"."""
        return self._end_value(data, at, self._scanner.feed(data, at, self._limit(data, at)))

    def _end_value(self, data: str, at: int, end: int) -> int:
        self._take(data, at, end)
        if self._scanner.broken:
            return self._break(end)
        if self._scanner.done:
            self._step = self._next
            if self._name_first:
                self.status = Status.DONE
        return end

    def _next(self, data: str, at: int) -> int:
        """A comma or the object's end, after a value."""
        at, character = self._peek(data, at)
        if not character:
            return at
        if character not in ",}":
            return self._break(at)
        self._take(data, at, at + 1)
        if character == ",":
            self._step = self._member
        elif self._wrapped:
            self._wrapped, self._step = False, self._next
        elif self.is_call:
            self.status = Status.DONE
        elif self.marked and self.name is not None:  # a function without parameters
            self._start()
            self.arguments.append("{}")
            self.status = Status.DONE
        else:
            self._break(at)
        return at + 1

    def _begin_string(self, data: str, at: int, step: Callable[[str, int], int]) -> int:
        self._step, self._string, self._string_size, self._escaped = step, [], 0, False
        return self._take(data, at, at + 1)

    def _read_string(self, data: str, at: int) -> tuple[int, str | None]:
        """(where to read on, the string if its end is reached)."""
        start, limit = at, min(self._limit(data, at), at + MAX_STRING - self._string_size)
        complete = False
        while at < limit and not complete:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = _STRING_END.search(data, at, limit)
            at = found.end() if found else limit
            complete, self._escaped = found is not None and found[0] == '"', found is not None and found[0] == "\\"
        self._string.append(data[start:at])
        self._string_size += at - start
        self._take(data, start, at)
        if complete:
            try:
                return at, json.loads('"' + "".join(self._string), strict=False)
            except ValueError:
                return at, ""
        if self._string_size >= MAX_STRING:
            self._break(at)
        return at, None
