"""`Chat`: turns of a conversation, rendered by a chat template, each answered from the KV cache of those before it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import ContextError, Error, Interrupted
from ..tokenizers.base import Tokenizer, TokenKind
from . import template as templates
from .template import ChatTemplate

if TYPE_CHECKING:
    from ..model import Model, Piece

_GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode's noncharacters: no text has a use for them all


@dataclass
class Turn:
    """Figures of a turn: tokens of the whole rendered conversation, of those how many the KV cache still held, and the
    answer's tokens, its end included, with their speed (of those after the first; 0.0 before).

    `finish_reason` is as in `Piece`; None when the answer was interrupted, or is under way.
    """

    prompt_tokens: int
    reused_tokens: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    finish_reason: str | None = None

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of the prompt that had to be computed."""
        return self.prompt_tokens - self.reused_tokens


class Chat:
    """A conversation. Use `model.chat()`; see there for the arguments.

    Special tokens spelled out in what is said ("<|im_end|>") stay text. Each turn computes only what the KV cache does
    not hold: the new message, and whatever the template renders otherwise than before. Several chats with one model
    take turns with its cache. `turn` has the last turn's figures, or is None.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, system: str | None, source: str | None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.template: ChatTemplate = templates.choose(source, tokenizer)
        self._enders = templates.stop_token_ids(tokenizer)
        self.turn: Turn | None = None
        self._said: list[dict[str, str]] = []
        self._rendered, self._ids = "", list[int]()
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message. It may be set at any time; the next turn then computes the whole conversation anew."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if not isinstance(text, str | None):
            raise Error(f"the system message must be a string or None, found {text!r}")
        self._system = text or None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, a copy: {"role": "system" | "user" | "assistant", "content": text} each."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return system + [dict(message) for message in self._said]

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self._said, self.turn = [], None

    def send(self, text: str, **options: Any) -> str:
        """Say something; returns the answer. `options` are those of `stream`.

        Ctrl-C raises `Interrupted` with the answer so far, which stays in the conversation.
        """
        answer: list[str] = []
        with self._model.using():
            try:
                for piece in self.stream(text, **options):
                    answer.append(piece.text)
            except KeyboardInterrupt:
                raise Interrupted("".join(answer)) from None
        return "".join(answer)

    def stream(
        self,
        text: str,
        max_tokens: int = 1024,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Say something; yields the answer, a `Piece` a token. Other arguments are as in `Model.stream`.

        A message is part of the conversation once its answer has begun, and an answer as far as it was read. Raises
        `ContextError`, and leaves the conversation as it was, when it no longer fits the context: nothing is dropped
        silently. Raises `Error` when the template refuses it.
        """
        if not isinstance(text, str):
            raise Error(f"a message must be a string, found {text!r}")
        said = [*self._said, {"role": "user", "content": text}]
        rendered, ids = self._encode(said)
        if len(ids) > self._model.context:
            raise ContextError(
                f"the conversation would have {len(ids):,} tokens and the context holds {self._model.context:,}: "
                "reset() the chat, say less, or compile with a larger context="
            )
        options = (max_tokens, temperature, top_k, top_p, min_p, repeat_penalty, seed, stop)
        pieces = self._model.stream_ids(ids, *options, at_start=True, enders=self._enders, keep=True)
        return self._answer(said, rendered, ids, pieces)

    def _answer(
        self, said: list[dict[str, str]], rendered: str, ids: list[int], pieces: Iterator[Piece]
    ) -> Iterator[Piece]:
        """The pieces; what they say enters the conversation before each is handed on."""
        before, turn, tokens = self._said, Turn(len(ids)), list[int]()
        answer = {"role": "assistant", "content": ""}
        said = [*said, answer]
        decoder = self._tokenizer.decoder(strip_leading_space=False)
        spoken = rendered
        for piece in pieces:
            if self._said is not (said if tokens else before):
                raise Error("the conversation went on without this answer")
            tokens.append(piece.token)
            self._said, self.turn = said, turn
            turn.reused_tokens, turn.tokens = piece.reused, len(tokens)
            turn.tokens_per_second, turn.finish_reason = piece.tokens_per_second, piece.finish_reason
            answer["content"] += piece.text
            # what the model has read and said, as text and as ids: the next turn continues it where it can
            if piece.finish_reason != "eos":
                spoken += decoder.push(piece.token)
                ids.append(piece.token)
            if piece.finish_reason is not None:
                spoken += decoder.flush()
            self._rendered, self._ids = spoken, ids
            yield piece

    def _encode(self, said: list[dict[str, str]]) -> tuple[str, list[int]]:
        """The conversation rendered, and its ids."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        messages = system + said
        guard = self._guard_for(messages)
        rendered = self.template.render([self._guarded(message, guard) for message in messages])
        known = self._rendered if self._said else ""
        rest = rendered.removeprefix(known)
        if known and len(rest) < len(rendered) and self._special.match(rest):
            return rendered, [*self._ids, *self._tokenizer.encode_guarded(rest, guard)]
        if guard:
            return rendered, self._tokenizer.encode_guarded(rendered, guard)
        return rendered, self._tokenizer.encode(rendered, bos=False, special=True)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return _any_of(self._tokenizer.special_tokens)

    @cached_property
    def _silent(self) -> re.Pattern[str]:
        """Special tokens without a text: an answer that spells one did not say the token."""
        special = self._tokenizer.special_tokens.items()
        return _any_of(text for text, token in special if self._tokenizer.entry(token)[0] is TokenKind.CONTROL)

    def _guard_for(self, messages: list[dict[str, str]]) -> str:
        """A character that no message has, if any message spells a special token."""
        if not any(self._special.search(message["content"]) for message in messages):
            return ""
        for guard in _GUARDS:
            if not any(guard in message["content"] for message in messages):
                return guard
        raise Error("the messages hold special tokens and all of Unicode's noncharacters: that is no text")

    def _guarded(self, message: dict[str, str], guard: str) -> dict[str, str]:
        """The message with the guard in every special token that it spells."""
        if not guard:
            return message
        pattern = self._silent if message["role"] == "assistant" else self._special
        content = message["content"]
        while pattern.search(content):  # again: what overlapped with a token is one now
            content = pattern.sub(lambda match: f"{match[0][0]}{guard}{match[0][1:]}", content)
        return message | {"content": content}


def _any_of(texts: Any) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")
