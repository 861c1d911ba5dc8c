"""What a `Parser` finds in generated text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text between the markers of reasoning, such as `<think>` and `</think>`."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins. `index` counts the calls of an answer from 0; `id` is unique."""

    index: int
    id: str
    name: str
    custom: bool = False
    """The tool is one of OpenAI's custom tools."""


@dataclass(frozen=True)
class CallArguments:
    """The next piece of a call's arguments. All pieces together are the JSON text that the model wrote."""

    index: int
    text: str
    custom: bool = False
    """The text is of a custom tool's input."""


Event = Content | Reasoning | CallStart | CallArguments


def merge(events: Iterable[Event]) -> Iterator[Event]:
    """Events with adjacent ones of a kind joined to one."""
    first: Content | Reasoning | CallArguments | None = None
    texts: list[str] = []
    for event in events:
        if isinstance(event, CallStart) or not _continues(first, event):
            if first is not None:
                yield _with_text(first, texts)
            first, texts = None, []
        if isinstance(event, CallStart):
            yield event
        else:
            first = first or event
            texts.append(event.text)
    if first is not None:
        yield _with_text(first, texts)


def _continues(first: Event | None, event: Event) -> bool:
    return type(first) is type(event) and getattr(first, "index", None) == getattr(event, "index", None)


def _with_text(event: Content | Reasoning | CallArguments, texts: list[str]) -> Event:
    return event if len(texts) == 1 else replace(event, text="".join(texts))
