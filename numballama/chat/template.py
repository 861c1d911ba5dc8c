"""Chat templates: render a conversation as the text that a model was trained to continue."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import Error
from ..tokenizers.base import Tokenizer
from .builtin_templates import BUILTIN_TEMPLATES

if TYPE_CHECKING:
    from .sandbox import Sandbox

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text}. A template may use more keys."""

MAX_TEMPLATE = 1 << 16
"""Maximum size of a template in characters. The longest known have 20,000."""


class ChatTemplate:
    """A jinja2 template. It runs in a sandbox with limits on time and memory, see `sandbox`.

    `name` names it in error messages. Raises `Error` when it does not compile.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "the chat template") -> None:
        if len(source) > MAX_TEMPLATE:
            raise Error(f"{name} has {len(source):,} characters; supported are {MAX_TEMPLATE:,}")
        self.source, self.name = source, name
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._token_texts = {word: "" if token is None else tokenizer.piece(token) for word, token in ids.items()}
        self._lock = threading.Lock()
        _ = self._compiled

    @cached_property
    def _compiled(self) -> tuple[Sandbox, Any]:
        from .sandbox import Sandbox  # jinja2 takes 0.05 s to import

        environment = Sandbox()
        try:
            return environment, environment.from_string(self.source)
        except Exception as error:
            raise Error(f"{self.name} does not compile: {_one_line(error)}") from None

    def render(self, messages: Iterable[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as text, with special tokens spelled out. `variables` are more variables for the template.

        Raises `Error` when the template fails, refuses the messages, or exceeds its time or memory.
        """
        from .sandbox import Budget, Refusal, size_of

        messages = [dict(message) for message in messages]
        names: dict[str, Any] = {"tools": None, "documents": None, **self._token_texts, **variables}
        environment, template = self._compiled
        with self._lock:
            environment.budget = Budget(size_of([messages, names], 1 << 40))
            try:
                text: str = template.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
            except Refusal as error:
                raise Error(f"{self.name} refuses this conversation: {_one_line(error)}") from None
            except Exception as error:
                raise Error(f"{self.name} fails: {_one_line(error)}") from None
        return text


def _one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:300]} ({type(error).__name__})"


def choose(source: str | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The template `source`. For None, the built-in template whose special tokens are in the vocabulary.

    Raises `Error` when no built-in template fits the vocabulary.
    """
    if source is not None:
        return ChatTemplate(source, tokenizer)
    special = tokenizer.special_tokens
    for builtin in BUILTIN_TEMPLATES:
        if all(token in special for token in builtin.special_tokens):
            return ChatTemplate(builtin.source, tokenizer, f"{builtin.name} chat template")
    raise Error(
        "the model carries no chat template, and its vocabulary does not have the special tokens of a built-in one "
        f"({', '.join(builtin.name for builtin in BUILTIN_TEMPLATES)}): pass one, as template= or --chat-template"
    )


def stop_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the vocabulary's special tokens that end a turn, EOS among them."""
    return tokenizer.eog_ids
