"""`ConversationEncoder`: messages to the token ids that a model continues.

A user may write "<|im_end|>" in a message. If that became the token, the message could end its turn and speak for
another role. So the encoder finds out which control tokens of the rendered text the template wrote, and which come
from a message: those are encoded as text. Nothing else differs from the rendered text's own ids.

How: render the messages as they are. If control tokens are in the result, render them again with marks, characters
that stand in for those that control tokens are made of. A template copies a mark like any other character, through
filters too. Where the second result with its marks read back is the first one, the marks tell which characters come
from a message. Two ways to mark are tried:

* every character of the messages that may be a part of a control token. This also finds a token that the template
  joined from several strings, but a template that looks for "<…" in a message may render something else;
* only the first characters of control tokens that messages spell out.

If neither gives the first result, the template decides by a control token in a message. Then the second result counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import quote

from .. import progress
from ..errors import Error
from ..tokenizers.base import Span, Tokenizer
from .template import ChatTemplate, Message, TemplateSet, plain_messages, plain_variables

_MARKS = [chr(code) for code in (*range(0x1D800, 0x1DA00), *range(0x2800, 0x2900))]
"""Characters that stand in for others: signs of SignWriting and Braille, which are printable, and neither letters nor
spaces, and have no case. Those that a conversation contains are not used."""
_TAG = re.compile(r"</?\w+>")
_PLAIN_ROLE = re.compile(r"[\w.-]*")

Mark = Callable[[str], str]


class ConversationEncoder:
    """A tokenizer with a chat template: one of `templates` (see `TemplateSet.choose`), or `template` in jinja2.

    Raises `Error` when the template does not compile, or none fits.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        templates: TemplateSet | None = None,
        tools: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.template: ChatTemplate = (templates or TemplateSet()).choose(tokenizer, template, tools)

    def encode(self, messages: Sequence[Message], special: bool = False, **variables: Any) -> list[int]:
        """Ids of a conversation. `variables` are passed to the template. Raises `Error` when the template fails.

        `special`: control tokens that the messages spell out are tokens.
        """
        return self.encode_after("", [], messages, variables, special)[1]

    def encode_after(
        self,
        known: str,
        known_ids: Sequence[int],
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        special: bool = False,
    ) -> tuple[str, list[int]]:
        """The rendered conversation and its ids. If the text begins with `known`, the ids begin with `known_ids`."""
        spans = self.render(messages, variables, special)
        rendered = "".join(text for text, _ in spans)
        if known and rendered.startswith(known):
            rest = _skip(spans, len(known))
            if rest and rest[0][1] and self._control.match(rest[0][0]):
                return rendered, [*known_ids, *self.tokenizer.encode_spans(rest)]
        return rendered, self.tokenizer.encode_spans(spans)

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any], special: bool = False) -> list[Span]:
        """The rendered conversation in spans. The first character of a control token from a message is untrusted.

        A message's role is the template's own if it is a single word: "<|{{ role }}|>" writes a token.
        """
        given, values = plain_messages(messages), plain_variables(variables)
        rendered = self.template.render_plain(given, **values)
        strings = list(_strings([given, values]))
        if special or not self._any_part.search("".join(strings)):
            return [(rendered, True)]
        tokens = set(self._overlapping.findall(rendered))
        parts = {character for token in tokens for character in _telling(token)}
        used = parts & set("".join(strings))
        if not used:
            return [(rendered, True)]
        marks = self._choose_marks(used, {*rendered, *self.template.source, *"".join(strings)})
        if marks is None:
            return self._without(rendered, strings)
        tags = sorted(map(re.escape, self._tags), key=len, reverse=True)
        anywhere = re.compile("|".join([*tags, f"([{re.escape(''.join(used))}])"]))
        starts = self._starts
        spelled: list[Span] | None = None
        for mark, roles in (
            (lambda text: anywhere.sub(lambda found: marks[found[0]] if found[1] else found[0], text), False),
            (lambda text: starts.sub(lambda found: marks.get(found[0], found[0]), text), True),
        ):
            try:
                marked = _marked_variables(values, mark)
                again = self.template.render_plain(_marked(given, mark, roles), **marked)
            except Error:  # it refuses what it does not know
                continue
            spelled = _read_marks(again, marks)
            if "".join(text for text, _ in spelled) == rendered:
                return spelled
        return self._without(rendered, strings) if spelled is None else spelled

    def misses_bos(self, ids: Sequence[int]) -> bool:
        """Whether a conversation begins without the BOS token that the vocabulary puts before a text."""
        tokenizer = self.tokenizer
        return bool(ids) and tokenizer.add_bos and tokenizer.bos_id is not None and ids[0] != tokenizer.bos_id

    def _without(self, rendered: str, strings: Sequence[str]) -> list[Span]:
        """The text, in which no control token counts that a string spells out."""
        spelled = {token for token in self.tokenizer.special_tokens if any(token in text for text in strings)}
        parts = _any_of(spelled).split(rendered) if spelled else [rendered]
        return [(part, index % 2 == 0) for index, part in enumerate(parts) if part]

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches every control token."""
        return _any_of(self.tokenizer.special_tokens)

    @cached_property
    def _overlapping(self) -> re.Pattern[str]:
        """Matches in front of every control token; the token is the group."""
        return re.compile(f"(?={self._control.pattern})")

    @cached_property
    def _any_part(self) -> re.Pattern[str]:
        """Matches a character that is a part of a control token."""
        parts = {character for token in filter(None, self.tokenizer.special_tokens) for character in _telling(token)}
        return re.compile(f"[{re.escape(''.join(parts))}]" if parts else r"(?!)")

    @cached_property
    def _starts(self) -> re.Pattern[str]:
        """Matches the first character of every control token, also of those that overlap."""
        tokens = filter(None, self.tokenizer.special_tokens)
        texts = [f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in tokens]
        return re.compile("|".join(texts) or r"(?!)")

    @cached_property
    def _tags(self) -> set[str]:
        """Tags that the template mentions and that are no control tokens: it may look for them in messages."""
        return set(_TAG.findall(self.template.source)) - self.tokenizer.special_tokens.keys()

    @staticmethod
    def _choose_marks(characters: set[str], taken: set[str]) -> dict[str, str] | None:
        """Character → its mark; None if too many marks are taken."""
        free = [mark for mark in _MARKS if mark not in taken]
        return dict(zip(sorted(characters), free, strict=False)) if len(free) >= len(characters) else None


class Encoders:
    """The encoders of a model's templates. The latest `MOST` are kept, because one takes milliseconds to make."""

    MOST = 8

    def __init__(self, templates: TemplateSet) -> None:
        self._templates = templates
        self._made: dict[tuple[str | None, bool], ConversationEncoder] = {}

    def get(self, tokenizer: Tokenizer, template: str | None, tools: bool) -> ConversationEncoder:
        """The encoder for a template, see `TemplateSet.choose`. Raises `Error` as `ConversationEncoder`."""
        found = self._made.get((template, tools)) if isinstance(template, str | None) else None
        if found is None:
            found = ConversationEncoder(tokenizer, template, self._templates, tools)
            if len(self._made) >= self.MOST:
                self._made.clear()
            self._made[template, tools] = found
        return found


NO_BOS = (
    "the chat template writes no BOS token, with which this vocabulary begins a text: left out, as in transformers "
    "(llama.cpp adds it)"
)
SPELLED = (
    "the prompt spells control tokens, which are fed as text: special=True (--special) makes them tokens, and "
    "model.chat() (numballama chat) applies the model's template"
)

TWICE_BOS = (
    "the prompt begins with BOS, and this vocabulary puts BOS before every text: the model reads it twice, as in "
    "llama.cpp and transformers; leave it out of the prompt"
)


def note_once(notes: list[str], text: str) -> None:
    """Add a note to those of a model and show it, unless it is among them."""
    if text not in notes:
        notes.append(text)
        progress.info(text)


def encode_prompt(tokenizer: Tokenizer, prompt: str | None, special: bool, notes: list[str]) -> list[int]:
    """Ids of a prompt, in which no template is applied. None: the beginning-of-text token alone.

    `special`: control tokens that it spells out are tokens. Otherwise a note says that they are text. Raises `Error`
    for an empty prompt, or one that is no text.
    """
    if not (prompt is None or isinstance(prompt, str)):
        raise Error(f"the prompt must be a string or None, found {prompt!r:.200}; stream_ids() takes token ids")
    if prompt == "":
        raise Error("the prompt is empty; None starts from the beginning-of-text token alone")
    if prompt is None and tokenizer.bos_id is not None:  # also if this tokenizer puts no BOS before a text
        return [tokenizer.bos_id]
    ids = tokenizer.encode(prompt or "", bos=True, special=special)
    if prompt is not None and not special and spells_control_tokens(tokenizer, prompt):
        note_once(notes, SPELLED)
    if special and tokenizer.add_bos and ids[:2] == [tokenizer.bos_id] * 2:
        note_once(notes, TWICE_BOS)
    return ids


def spells_control_tokens(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text spells a control token out."""
    return any(token in text for token in tokenizer.special_tokens if token)


def _telling(token: str) -> set[str]:
    """The characters of a control token that mark it: its first, its last, and signs inside."""
    return {token[0], token[-1], *(each for each in token if not (each.isalnum() or each.isspace() or each in "_-"))}


def _marked(value: Any, mark: Mark, roles: bool = True) -> Any:
    """The value with marks in all its strings. `roles` False: without marks in roles that are one word."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, dict):
        return {
            _marked(key, mark, roles): item
            if key == "role" and not roles and isinstance(item, str) and _PLAIN_ROLE.fullmatch(item)
            else _marked(item, mark, roles)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [_marked(item, mark, roles) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _marked_variables(variables: Mapping[str, Any], mark: Mark) -> dict[str, Any]:
    """The variables with marks, except "bos_token" and its like: a caller who sets them means the token."""
    return {
        name: value if name.endswith("_token") or name == "continue_final_message" else _marked(value, mark)
        for name, value in variables.items()
    }


def _read_marks(text: str, marks: Mapping[str, str]) -> list[Span]:
    """Spans of a text with marks: each mark becomes the character that it stands for, untrusted.

    Marks that a filter escaped are read too, as in JSON and in addresses.
    """
    forms = {mark: character for character, mark in marks.items()}
    forms |= {json.dumps(mark)[1:-1]: json.dumps(character)[1:-1] for character, mark in marks.items()}
    forms |= {quote(mark): quote(character) for character, mark in marks.items()}
    parts = re.split(f"({'|'.join(map(re.escape, forms))})", text)
    return [(forms[part] if index % 2 else part, index % 2 == 0) for index, part in enumerate(parts) if part]


def _skip(spans: Sequence[Span], length: int) -> list[Span]:
    """The spans without their first `length` characters."""
    rest = []
    for text, trusted in spans:
        if len(text) > length:
            rest.append((text[length:], trusted))
        length = max(length - len(text), 0)
    return rest


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(name)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches one of the texts, the longest that fits; as a group."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")
