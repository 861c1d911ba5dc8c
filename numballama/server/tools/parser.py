"""`Parser`: generated text, in pieces of any size, to content, reasoning and tool calls.

A state machine. Each state is a method that reads `data` from a position and returns where the next one reads on. Text
is held back only while it may begin a marker or a call. No text is read twice, except for the length of a marker, so
time is linear. What turns out to be no call is content, exactly as it was written.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache

from .call import CallReader, Status
from .events import CallArguments, CallStart, Content, Event, Reasoning, merge


@dataclass(frozen=True)
class Dialect:
    """How a model writes calls. `CallReader` says what a call is."""

    opens: tuple[str, ...] = ()
    """Markers that begin calls, anywhere in the text."""
    close: str = ""
    """Marker behind a call that a marker began; "" for none. It is not required."""
    bare: bool = False
    """Whether an object, or a list of them, is a call without a marker, at the text's beginning and after a call."""
    separators: str = ""
    """Characters that may stand between two calls."""
    named: bool = False
    """As in `CallReader`, after a marker."""
    short_ids: bool = False
    """Ids of calls are 9 alphanumeric characters, as Mistral's templates want. Otherwise "call_" and 24."""


_SPACES = 16
"""White space directly before a marker belongs to the marker; at most so many characters."""
_SPACE = re.compile(r"[ \t\r\n]*")
_ALPHABET = string.ascii_letters + string.digits


class _Markers:
    """Finds the first of some markers. Those of a model are the same for all answers: see `_markers`."""

    def __init__(self, markers: tuple[str, ...]) -> None:
        self.pattern = re.compile(
            "|".join(map(re.escape, sorted(filter(None, markers), key=len, reverse=True))) or "(?!)"
        )
        self._beginnings = {marker[:size] for marker in markers for size in range(1, len(marker))}
        self._longest = max(map(len, self._beginnings), default=0)

    def cut(self, data: str, at: int) -> int:
        """Where a marker may begin that the end of the data cuts; the end if there is none."""
        for start in range(max(at, len(data) - self._longest), len(data)):
            if data[start:] in self._beginnings:
                return start
        return len(data)


_markers = lru_cache(64)(_Markers)


class Parser:
    """Reads one answer. Use `ToolFormat.parser`.

    `names` are the tools: an object that names none of them is content. `reasoning` are the two markers of reasoning,
    None where there is none. `in_reasoning`: the prompt ends with the first marker.
    """

    def __init__(
        self,
        dialect: Dialect,
        names: Collection[str],
        reasoning: tuple[str, str] | None = None,
        in_reasoning: bool = False,
    ) -> None:
        self._dialect, self._names, self._reasoning = dialect, frozenset(names), reasoning
        self._opens = dialect.opens if names else ()
        self._begins, self._ends = _markers(dialect.opens), _markers((*dialect.opens, dialect.close))
        self._reasoning_ends = _markers(reasoning[1:] if reasoning else ())
        self._bare = dialect.bare and bool(names)
        self._forbidden = "".join({marker[0] for marker in (*dialect.opens, dialect.close) if marker} - {"[", "{", '"'})
        self._held, self._wait = "", False
        self._found: list[Event] = []
        self._calls, self._ids = 0, set[str]()
        self._call: CallReader | None = None
        self._closing = False  # the marker behind the last call may still come
        self._closing_next = False  # `_closing` once the current call is one
        self._keep_space = True  # white space that comes next is content
        self._may_reason = reasoning is not None  # the first marker of reasoning may come next
        self._step: Callable[[Parser, str, int], int] = Parser._begin  # a bound method would be a reference cycle
        if in_reasoning and reasoning:
            self._step, self._keep_space = Parser._reason, False

    @property
    def in_reasoning(self) -> bool:
        """Whether reasoning has begun and not ended."""
        return self._step is Parser._reason

    @property
    def may_reason(self) -> bool:
        """Whether reasoning has begun or may come next."""
        return self.in_reasoning or (self._may_reason and self._step is Parser._begin)

    @property
    def in_arguments(self) -> bool:
        """Whether the arguments of a call have begun and not ended."""
        return self._step is Parser._read_call and self._call is not None and self._call.in_arguments

    @property
    def held(self) -> int:
        """Characters of which nothing was said yet."""
        call = self._call
        return len(self._held) + (0 if call is None or call.is_call else len(call.text))

    def feed(self, text: str) -> list[Event]:
        """The events of the next piece of text."""
        if self._step is Parser._content and not (self._opens or self._held):  # all that comes is content
            return [Content(text)] if text else []
        data, at = self._held + text, 0
        self._wait = False
        while at < len(data) and not self._wait:
            at = self._step(self, data, at)
        self._held = data[at:]
        return self._events()

    def finish(self) -> list[Event]:
        """The events of what was held back: the text ends here.

        A call whose arguments have begun stays, with the arguments so far. Before that its text is content.
        """
        held, self._held = self._held, ""
        if self._step is Parser._reason:
            self._put(Reasoning(held))
        elif self._step is Parser._after:
            ends = (self._dialect.close if self._closing else "", *self._dialect.separators)
            if not any(end.startswith(held.rstrip()) for end in ends):
                self._put(Content(held))
        else:
            before = self._call.text if self._call and not self._call.is_call else ""
            self._put(Content(before + held))
        self._call, self._opens, self._closing, self._step = None, (), False, Parser._content
        return self._events()

    def _put(self, event: Content | Reasoning | CallArguments) -> None:
        if event.text:
            self._found.append(event)

    def _events(self) -> list[Event]:
        found, self._found = self._found, []
        return list(merge(found)) if len(found) > 1 else found

    def _begin(self, data: str, at: int) -> int:
        """The beginning of the answer, or of what follows the reasoning."""
        start = _end_of_space(data, at)
        if not self._keep_space:
            at = start
        elif start - at > _SPACES:
            self._step = Parser._content
            return at
        if start == len(data):
            self._wait = True
            return at
        if self._may_reason and self._reasoning and (end := self._marker(data, start, self._reasoning[0])) is not None:
            if end:
                self._step, self._keep_space, self._may_reason = Parser._reason, False, False
            return end or at
        if self._bare and data[start] in "[{":
            return self._open(data, at, start, marked=False)
        self._step = Parser._content
        return at

    def _reason(self, data: str, at: int) -> int:
        """Inside the reasoning. White space at its ends belongs to the markers."""
        assert self._reasoning is not None
        if not self._keep_space:
            at = _end_of_space(data, at)
            if at == len(data):
                return at
            # the prompt has the first marker; some models write it once more
            if self._may_reason and (end := self._marker(data, at, self._reasoning[0])) is not None:
                self._may_reason = not end
                return end or at
            self._keep_space = True
        start, end = self._find(self._reasoning_ends, data, at)
        self._put(Reasoning(data[at:start]))
        if self._wait:
            return start
        self._step, self._keep_space, self._may_reason = Parser._begin, False, False
        return end

    def _content(self, data: str, at: int) -> int:
        """Content, up to a marker."""
        if not self._opens:
            self._put(Content(data[at:]))
            return len(data)
        start, end = self._find(self._ends if self._closing else self._begins, data, at)
        self._put(Content(data[at:start]))
        if self._wait:
            return start
        if self._closing and data.startswith(self._dialect.close, end - len(self._dialect.close)):
            self._closing, self._step = False, Parser._after
            return end
        return self._open(data, start, end)

    def _find(self, markers: _Markers, data: str, at: int) -> tuple[int, int]:
        """(begin, end) of the first marker, with the white space before it. Waits for more text if there is none."""
        found = markers.pattern.search(data, at)
        self._wait = found is None
        begin = found.start() if found else markers.cut(data, at)
        return _start_of_space(data, at, begin), found.end() if found else begin

    def _open(self, data: str, at: int, end: int, marked: bool = True, in_list: bool = False) -> int:
        """A call may begin behind data[at:end]. `marked`: that ends with a marker, or a marker came before the list."""
        dialect = self._dialect
        self._closing_next = bool(dialect.close) if marked and not in_list else self._closing
        self._call = CallReader(
            self._names, data[at:end], marked, dialect.named and marked, in_list, forbidden=self._forbidden
        )
        self._step = Parser._read_call
        return end

    def _read_call(self, data: str, at: int) -> int:
        """A call, or what looks like one."""
        call = self._call
        assert call is not None
        known = call.is_call
        at = call.read(data, at)
        if call.is_call:
            if not known:
                self._found.append(CallStart(self._calls, self._new_id(call.id), call.name or ""))
                self._calls += 1
            self._put(CallArguments(self._calls - 1, "".join(call.arguments)))
            call.arguments.clear()
        self._wait = call.wait
        if call.status is Status.DONE:
            self._closing, self._step = self._closing_next, Parser._after
        elif call.status is Status.BROKEN:
            if call.is_call:
                self._closing = self._closing_next
            else:
                self._put(Content(call.text))
            self._call, self._step = None, Parser._content
        return at

    def _after(self, data: str, at: int) -> int:
        """After a call: its closing marker, another call, or content."""
        at = _end_of_space(data, at)
        if at == len(data):
            return at
        character, dialect, call = data[at], self._dialect, self._call
        if call is not None and call.in_list and character in ",]":
            if character == ",":
                return self._open(data, at, at + 1, call.marked, in_list=True)
            self._call = None
            return at + 1
        if self._closing and (end := self._marker(data, at, dialect.close)) is not None:
            self._closing = not end
            return end or at
        if character in "[{" and (dialect.bare or self._closing):
            return self._open(data, at, at, marked=self._closing)
        if character in dialect.separators:
            start = _end_of_space(data, at + 1)
            if start - at <= _SPACES:
                if start == len(data):
                    self._wait = True
                    return at
                if data[start] in "[{":
                    return self._open(data, at, start, marked=False)
                for marker in self._opens:
                    if (end := self._marker(data, start, marker)) is not None:
                        return self._open(data, at, end) if end else at
        self._call, self._step = None, Parser._content
        return at

    def _marker(self, data: str, at: int, marker: str) -> int | None:
        """The end of the marker that stands here, 0 if only the next text will tell, None if it does not."""
        if data.startswith(marker, at):
            return at + len(marker)
        if marker.startswith(data[at : at + len(marker)]):
            self._wait = True
            return 0
        return None

    def _new_id(self, given: str | None) -> str:
        """A new id, or the one that the model wrote if it has the form of ids and is new."""
        length, prefix = (9, "") if self._dialect.short_ids else (24, "call_")
        found = given if given and given.isalnum() and len(given) == length and not prefix else ""
        while not found or found in self._ids:
            found = prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))
        self._ids.add(found)
        return found


def _end_of_space(data: str, at: int) -> int:
    found = _SPACE.match(data, at)
    assert found is not None
    return found.end()


def _start_of_space(data: str, at: int, end: int) -> int:
    """Where the white space before `end` begins; not before `at`, and at most 16 characters."""
    start = max(at, end - _SPACES)
    return start + len(data[start:end].rstrip(" \t\r\n"))
