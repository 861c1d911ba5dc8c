"""Chat templates: a conversation as the text that a model was trained to continue."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import Error
from ..tokenizers.base import Tokenizer, TokenKind

if TYPE_CHECKING:
    from .sandbox import Sandbox

Message = Mapping[str, Any]
"""A turn: {"role": "system" | "user" | "assistant", "content": text}."""

MAX_TEMPLATE = 1 << 16
"""Characters of a template; the longest known have 20,000."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + message['content']) | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
BUILT_IN: Sequence[tuple[str, str, tuple[str, ...]]] = (
    ("ChatML", CHATML, ("<|im_start|>", "<|im_end|>")),
    ("Llama 3's", LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    ("Llama 2's", LLAMA2, ("<s>", "</s>")),
)
"""Name, template and the special tokens that a vocabulary must have for it; the first that fits is taken."""

ENDS_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
"""Special tokens that end a turn or a text in whichever vocabulary has them, as llama.cpp takes them too."""


class ChatTemplate:
    """A jinja2 template, run in a sandbox with a budget of time and memory.

    `name` says in messages which one it is. Raises `Error` when it does not compile.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "the chat template") -> None:
        if len(source) > MAX_TEMPLATE:
            raise Error(f"{name} has {len(source):,} characters; supported are {MAX_TEMPLATE:,}")
        self.source, self.name = source, name
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._words = {word: "" if token is None else tokenizer.piece(token) for word, token in ids.items()}
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
        """The conversation as text, special tokens spelled out; `variables` are what else the template may ask for.

        Raises `Error` when the template fails, refuses the messages, or uses more time or memory than it may.
        """
        from .sandbox import Budget, Refusal, weight_of

        messages = [dict(message) for message in messages]
        given: dict[str, Any] = {"tools": None, "documents": None, **self._words, **variables}
        environment, template = self._compiled
        with self._lock:
            environment.budget = Budget(weight_of([messages, given], 1 << 40))
            try:
                text: str = template.render(messages=messages, add_generation_prompt=add_generation_prompt, **given)
            except Refusal as error:
                raise Error(f"{self.name} refuses this conversation: {_one_line(error)}") from None
            except Exception as error:
                raise Error(f"{self.name} fails: {_one_line(error)}") from None
        return text


def _one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:300]} ({type(error).__name__})"


def choose(source: str | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The file's own template, or for a file without one the built-in one whose special tokens the vocabulary has.

    Raises `Error` when there is none of either.
    """
    if source is not None:
        return ChatTemplate(source, tokenizer)
    special = tokenizer.special_tokens
    for name, text, needed in BUILT_IN:
        if all(token in special for token in needed):
            return ChatTemplate(text, tokenizer, f"{name} chat template")
    raise Error(
        "the model carries no chat template, and its vocabulary has the special tokens of none that is built in: "
        f"{', '.join(name for name, *_ in BUILT_IN)}"
    )


def stop_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the vocabulary's special tokens that end a turn, EOS among them."""
    special = tokenizer.special_tokens
    found = {special[token] for token in ENDS_OF_TURN if token in special}
    silent = {token for token in found if tokenizer.entry(token)[0] is TokenKind.CONTROL}
    return frozenset(silent if tokenizer.eos_id is None else {*silent, tokenizer.eos_id})
