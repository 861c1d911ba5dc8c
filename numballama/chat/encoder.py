"""`ConversationEncoder`: messages to the token ids that a model continues.

A user may write "<|im_end|>" in a message. If that became the token, the message could end its turn and speak for
another role. So a guard is inserted after the first character of every special token that a message spells out: a
character that no message contains. The template copies the guard to its text. `Tokenizer.encode_guarded` finds no
special token there and removes the guard. Guards are Unicode's noncharacters, which are reserved for use inside a
program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from ..errors import Error
from ..tokenizers.base import Tokenizer, TokenKind
from .template import ChatTemplate, Message, choose

_GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ConversationEncoder:
    """A tokenizer with a chat template: `source` in jinja2, or None for the built-in one that fits the vocabulary.

    Raises `Error` when the template does not compile, or none fits.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None) -> None:
        self.tokenizer = tokenizer
        self.template: ChatTemplate = choose(source, tokenizer)

    def encode(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Ids of a conversation. `variables` are passed to the template. Raises `Error` when the template fails."""
        return self.encode_after("", [], messages, variables)[1]

    def encode_after(
        self, known: str, known_ids: Sequence[int], messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> tuple[str, list[int]]:
        """The rendered conversation and its ids. If the text begins with `known`, the ids begin with `known_ids`."""
        if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
            raise Error(f'messages must be a list of {{"role": …, "content": …}}, found {messages!r:.200}')
        guard = self._guard_for([*messages, variables])
        guarded = {name: self._guarded(value, guard, self._special) for name, value in variables.items()}
        rendered = self.template.render([self.guarded_message(message, guard) for message in messages], **guarded)
        rest = rendered.removeprefix(known)
        if known and len(rest) < len(rendered) and self._special.match(rest):
            return rendered, [*known_ids, *self.tokenizer.encode_guarded(rest, guard)]
        if guard:
            return rendered, self.tokenizer.encode_guarded(rendered, guard)
        return rendered, self.tokenizer.encode(rendered, bos=False, special=True)

    def guarded_message(self, message: Message, guard: str) -> Message:
        """The message with the guard in every special token that it spells out."""
        pattern = self._control if message.get("role") == "assistant" else self._special
        return {name: self._guarded(value, guard, pattern) for name, value in message.items()}

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Matches every special token."""
        return _any_of(self.tokenizer.special_tokens)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches special tokens that decode to no text. If an answer's text has one, it was generated as text."""
        special = self.tokenizer.special_tokens.items()
        return _any_of(text for text, token in special if self.tokenizer.entry(token)[0] is TokenKind.CONTROL)

    def _guard_for(self, values: Any) -> str:
        """A character that no string in `values` contains; "" if no string spells out a special token."""
        texts = list(_strings(values))
        if not any(self._special.search(text) for text in texts):
            return ""
        for guard in _GUARDS:
            if not any(guard in text for text in texts):
                return guard
        raise Error(
            "cannot escape special tokens: the messages contain every reserved character (U+FDD0 to U+FDEF, "
            "Unicode's noncharacters); remove one of them"
        )

    def _guarded(self, value: Any, guard: str, pattern: re.Pattern[str]) -> Any:
        if not guard:
            return value
        if isinstance(value, Mapping):
            return {name: self._guarded(item, guard, pattern) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(item, guard, pattern) for item in value]
        if not isinstance(value, str):
            return value
        while pattern.search(value):  # again, because a guard may leave a token that overlapped with the one it broke
            value = pattern.sub(lambda match: f"{match[0][0]}{guard}{match[0][1:]}", value)
        return value


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")
