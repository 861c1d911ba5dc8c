"""Chat templates: render a conversation as the text that a model was trained to continue."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import Error
from ..tokenizers.base import Tokenizer
from .builtin_templates import BUILTIN_TEMPLATES

if TYPE_CHECKING:
    from .sandbox import Sandbox

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text}. A template may use more keys."""

MAX_TEMPLATE = 1 << 16
"""Maximum size of a template in characters. The longest known have 20,000."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning. Templates read one of the first two."""
_MAX_DEPTH = 64


class ChatTemplate:
    """A jinja2 template. It runs in a sandbox with limits on time and memory, see `sandbox`.

    The template sees the tokenizer's `bos_token` and `eos_token` and `tokens`, other special tokens by the names of
    their variables ("pad_token" → text). As in transformers, a token that does not exist is undefined. `name` names the
    template in error messages. Raises `Error` when it does not compile.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        name: str = "the chat template",
        tokens: Mapping[str, str] | None = None,
        is_guess: bool = False,
    ) -> None:
        if len(source) > MAX_TEMPLATE:
            raise Error(f"{name} has {len(source):,} characters; supported are {MAX_TEMPLATE:,}")
        self.source, self.name = source, name
        self.is_guess = is_guess
        """A built-in one, for a model that has none."""
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        own = {word: tokenizer.piece(token) for word, token in ids.items() if token is not None}
        self._tokens = {**(tokens or {}), **own}
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

    def render(
        self,
        messages: Iterable[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """The conversation as text, with special tokens spelled out. `variables` are more variables for the template.

        With `continue_final_message` the text ends with that of the last message: its "content", or the key that is
        given. Raises `Error` when the template fails, refuses the messages, or exceeds its time or memory, and when
        the last message has no such text or the template does not show it.
        """
        plain = plain_messages(messages), add_generation_prompt, continue_final_message
        return self.render_plain(*plain, **plain_variables(variables))

    def render_plain(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """As `render`, of what `plain_messages` and `plain_variables` have returned."""
        from .sandbox import Budget, Refusal

        names: dict[str, Any] = {"tools": None, "documents": None, **self._tokens, **variables}
        given = list(messages)
        last = _leave_open(given, continue_final_message, self.source) if continue_final_message else None
        environment, template = self._compiled
        with self._lock:
            environment.budget = Budget(given, names)
            try:
                text: str = template.render(messages=given, add_generation_prompt=add_generation_prompt, **names)
            except Refusal as error:
                raise Error(f"{self.name} refuses this conversation: {_one_line(error, named=False)}") from None
            except Exception as error:
                raise Error(f"{self.name} fails: {_one_line(error)}") from None
        return text if last is None else _cut_after(text, last, self.name)


_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Stands after the text that is to be continued, while the template is rendered, as in transformers."""


def _leave_open(messages: list[dict[str, Any]], continued: bool | str, source: str) -> str:
    """Put `_TAG` after the text of the last message that is to be continued; returns that text without it.

    `continued` is the text's key; True is "content". Raises `Error` if there is no such text, or the template's
    `source` does not mention the key.
    """
    key = continued if isinstance(continued, str) else "content"
    final = messages[-1] if messages else {}
    text = final.get(key)
    if text is None:
        raise Error(f"continue_final_message: the last message has no {key!r} to continue")
    keys = [other for other in _REASONING if final.get(other) == text] if key in _REASONING else [key]
    if not any(each in source for each in keys):
        raise Error(f"continue_final_message: the chat template does not show the {key!r} of messages")
    if isinstance(text, str):
        messages[-1] = {**final, **dict.fromkeys(keys, text + _TAG)}
        return text
    blocks = [dict(block) if isinstance(block, dict) else block for block in text] if isinstance(text, list) else []
    for block in reversed(blocks):
        if isinstance(block, dict) and isinstance(found := block.get("text"), str):
            block["text"] = found + _TAG
            messages[-1] = {**final, key: blocks}
            return found
    raise Error(f"continue_final_message: the {key!r} of the last message has no text to continue")


def _cut_after(rendered: str, text: str, name: str) -> str:
    """A rendered conversation up to the end of the last message's `text`. Raises `Error` if it is not shown."""
    at = rendered.rfind(_TAG.strip())
    if at < 0 or text.strip() not in rendered:
        raise Error(
            f"continue_final_message: {name} does not show the last message as it is, so nothing can continue it"
        )
    return rendered[:at] if rendered.startswith(_TAG, at) else rendered[:at].rstrip()  # it trims messages


def _one_line(error: Exception, named: bool = True) -> str:
    """The message of an error; with `named` also what kind it is, which those of Python and Jinja need."""
    return f"{' '.join(str(error).split())[:300]}" + (f" ({type(error).__name__})" if named else "")


_OTHERS = {
    "return_tensors": "ids are a list of int; numpy.array(ids) is what tensors are made of",
    "return_dict": "ids are returned as a list",
    "return_assistant_tokens_mask": "ids are returned as a list, without a mask",
    "padding": "one conversation is encoded at a time",
    "truncation": "a conversation that does not fit the context is an error",
    "max_length": "a conversation that does not fit the context is an error",
    "continue_final_message": "model.apply_chat_template has it: pass its ids to model.stream_ids",
    "sanitize_control_tokens": "control tokens in messages are always encoded as text",
    "tokenizer_kwargs": "a template's text is encoded in one way only",
}
"""Arguments of transformers' `apply_chat_template` that are no variables of templates → what to do instead."""


def refuse_options(variables: Mapping[str, object]) -> None:
    """Raise `Error` for an argument of transformers' `apply_chat_template` that would have no effect."""
    for name, instead in _OTHERS.items():
        if variables.get(name):
            raise Error(f"{name} is not supported: {instead}")


def conversation_of(
    messages: Sequence[Message] | None, add_generation_prompt: bool | None, variables: Mapping[str, Any]
) -> tuple[Sequence[Message], dict[str, Any]]:
    """(messages, arguments of `ChatTemplate.render`) of a call of `apply_chat_template`, in transformers' names too.

    `add_generation_prompt` None: unless the last message is continued. Raises `Error` for what contradicts itself or
    has no effect.
    """
    variables = dict(variables)
    other, continued = variables.pop("conversation", None), variables.pop("continue_final_message", False)
    if (messages is None) == (other is None):
        raise Error("a conversation is wanted once: as the first argument, or as messages= or conversation=")
    if not isinstance(continued, bool | str | None):
        raise Error(f"continue_final_message must be True, False or a key of messages, found {continued!r:.200}")
    if continued and add_generation_prompt:
        raise Error(
            "continue_final_message and add_generation_prompt=True contradict each other: the model continues the last "
            "message, or begins one"
        )
    refuse_options(variables)
    if continued:
        variables["continue_final_message"] = continued
    prompted = not continued if add_generation_prompt is None else add_generation_prompt
    return other if messages is None else messages, {"add_generation_prompt": prompted, **variables}


def plain_message(given: object) -> dict[str, Any]:
    """A message as a dict of plain values. It may be a mapping, a dataclass or a pydantic model. Raises `Error`."""
    if not isinstance(message := _plain(given), dict):
        raise Error(f'messages must be a list of {{"role": …, "content": …}}, found {given!r:.200} among them')
    return message


def plain_messages(messages: Iterable[object]) -> list[dict[str, Any]]:
    """Messages as templates see them in transformers: dicts of plain values, without keys whose value is None.

    A message's reasoning has the names "reasoning_content" and "thinking". Raises `Error` for what is no message.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise Error(f'messages must be a list of {{"role": …, "content": …}}, found {messages!r:.200}')
    found = []
    for given in messages:
        message = {key: value for key, value in plain_message(given).items() if value is not None}
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        found.append(message)
    return found


def plain_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables as templates see them: plain values. Raises `Error` for tools that are no JSON schemas."""
    tools = variables.get("tools")
    if tools is not None:
        if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
            raise Error(f"tools must be a list of JSON schemas, found {tools!r:.200}")
        tools = [_plain(tool) for tool in tools]
        if wrong := next((tool for tool in tools if not isinstance(tool, dict)), None):
            raise Error(
                f'a tool must be a JSON schema, {{"type": "function", "function": …}}, found {wrong!r:.200}: '
                "transformers.utils.get_json_schema makes one of a Python function"
            )
        variables = {**variables, "tools": tools}
    return {name: _plain(value) for name, value in variables.items()}


def _plain(value: object, depth: int = 0) -> Any:
    """The value in plain Python types: a template must not reach the methods of other objects. As in transformers."""
    if depth > _MAX_DEPTH:
        raise Error(f"messages and variables of a chat template may be nested {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, an enum or NumPy's, the text alone
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, depth + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return _plain(value.item(), depth + 1)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), depth + 1) for name in names}
    if callable(dump := getattr(value, "model_dump", None)):
        return _plain(dump(), depth + 1)
    return f"<{type(value).__name__}>"


@dataclass(frozen=True)
class TemplateSet:
    """The chat templates of a model file by name, and the special tokens that they see (see `ChatTemplate`)."""

    named: Mapping[str, str] = field(default_factory=dict)
    """ "default" is the usual one, "tool_use" the one for conversations with tools."""
    tokens: Mapping[str, str] = field(default_factory=dict)

    def choose(self, tokenizer: Tokenizer, wanted: str | None = None, tools: bool = False) -> ChatTemplate:
        """The template `wanted`: a name in `named`, or a template itself. None: transformers' choice.

        That is "tool_use" if the conversation has `tools`, otherwise "default". If the file has no templates, it is the
        built-in template whose special tokens are in the vocabulary. Raises `Error` when there is none of these.
        """
        if wanted is not None and not isinstance(wanted, str):
            hint = ": pass its text, path.read_text()" if isinstance(wanted, PathLike) else ""
            raise Error(f"a chat template must be a text in jinja2, or the name of one, found {wanted!r:.200}{hint}")
        if wanted is not None and wanted not in self.named:
            if re.fullmatch(r"[\w-]+", wanted):  # a name: no template is a single word
                names = ", ".join(map(repr, self.named)) or "none with a name"
                raise Error(f"the model has no chat template {wanted!r}; it has {names}")
            return ChatTemplate(wanted, tokenizer, tokens=self.tokens)
        if self.named:
            name = wanted or ("tool_use" if tools and "tool_use" in self.named else "default")
            if name not in self.named:
                raise Error(
                    f"the model has the chat templates {', '.join(map(repr, self.named))} and none named 'default': "
                    "choose one, with template= or --chat-template"
                )
            label = "the chat template" if name == "default" else f"the chat template {name!r}"
            return ChatTemplate(self.named[name], tokenizer, label, self.tokens)
        return choose(None, tokenizer, self.tokens)


def choose(source: str | None, tokenizer: Tokenizer, tokens: Mapping[str, str] | None = None) -> ChatTemplate:
    """The template `source`. For None, the built-in template whose special tokens are in the vocabulary.

    Raises `Error` when no built-in template fits the vocabulary.
    """
    if source is not None:
        return ChatTemplate(source, tokenizer, tokens=tokens)
    special = tokenizer.special_tokens
    for builtin in BUILTIN_TEMPLATES:
        if all(token in special for token in builtin.special_tokens):
            return ChatTemplate(builtin.source, tokenizer, f"{builtin.name} chat template", tokens, is_guess=True)
    raise Error(
        "the model carries no chat template, and its vocabulary does not have the special tokens of a built-in one "
        f"({', '.join(builtin.name for builtin in BUILTIN_TEMPLATES)}): pass one, as template= or --chat-template"
    )


def stop_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the vocabulary's special tokens that end a turn, EOS among them."""
    return tokenizer.eog_ids
