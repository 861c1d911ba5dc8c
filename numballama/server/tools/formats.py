"""How models write tool calls and reasoning, and which of these formats a model uses."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...chat.tool_messages import tool_messages
from ...errors import Error
from .definitions import CheckedTool, check_tools
from .grammar import CALL_ID, CallText, build, build_free
from .messages import plain_conversation
from .parser import Dialect, Parser

REASONING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Markers around reasoning: Qwen's and DeepSeek's, and Mistral's."""


@dataclass(frozen=True)
class ToolFormat:
    """One way to write tool calls. `choose_format` makes it."""

    name: str
    """ "llama", "hermes", "mistral" or "json"."""
    dialect: Dialect
    call_text: CallText
    in_template: bool = True
    """Whether the chat template describes tools in this format. If not, `instructions` do; see `conversation`."""
    system_role: bool = True
    """Whether the chat template accepts a system message."""
    reasoning: tuple[str, str] | None = None
    """The markers around reasoning; None for a model without it."""
    special_tokens: Mapping[str, int | None] = field(default_factory=dict)
    """Text → id of the markers that are control tokens of the vocabulary; None for an id that is not known."""

    @property
    def tokens_to_show(self) -> frozenset[str]:
        """Control tokens whose text must stay in the generated text. The parser takes them out again."""
        return frozenset(self.special_tokens)

    def shown_tokens(self, tools: bool) -> frozenset[int]:
        """Ids of `tokens_to_show` for an answer that may have calls, or without `tools` reasoning alone."""
        markers = self.tokens_to_show if tools else self.reasoning or ()
        ids = (self.special_tokens.get(marker) for marker in markers)
        return frozenset(token for token in ids if token is not None)

    def parser(self, tools: Sequence[Mapping[str, Any]] | None, in_reasoning: bool = False) -> Parser:
        """A parser of one answer. Without tools there are no calls, and only reasoning is taken out of the content.

        `in_reasoning`: the prompt ends inside reasoning, see `opens_reasoning`. Raises `Error` as `check_tools`.
        """
        return self.parsers(tools, 1, in_reasoning)[0]

    def parsers(
        self, tools: Sequence[Mapping[str, Any]] | None, count: int, in_reasoning: bool = False
    ) -> list[Parser]:
        """Parsers of `count` answers, as `parser`. The tools are checked once."""
        names = {tool.name for tool in check_tools(tools)}
        return [Parser(self.dialect, names, self.reasoning, in_reasoning) for _ in range(count)]

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether a rendered prompt ends inside reasoning: its template writes `<think>` for the model."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning[0])

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]] | None,
        choice: str = "required",
        parallel: bool = True,
        in_reasoning: bool = False,
        enforced: Collection[str] = (),
    ) -> str:
        """A Lark grammar for llguidance: an answer of nothing but calls, after reasoning where the model has it.

        `choice` is "required" or the name of the tool to call; a named one is called once. "auto": the answer is text
        and calls, and what begins as a call can only go on with the name of one of the tools; arguments are any object,
        or fit the tool's schema if its name is in `enforced`.
        `parallel`: there may be more calls than one. Raises `Error` as `check_tools`, and when no tool has the name.
        """
        checked = check_tools(tools)
        markers = {marker: self.special_tokens.get(marker) for marker in _markers(self.dialect, self.reasoning)}
        if choice == "auto" and checked:
            opens, separators = self.dialect.opens, self.dialect.separators
            return build_free(
                self.call_text, checked, opens, separators, markers, self.reasoning, in_reasoning, enforced
            )
        if choice not in ("required", "auto"):
            checked = tuple(tool for tool in checked if tool.name == choice)
            parallel = False
        if not checked:
            what = "there are no tools" if choice in ("required", "auto") else f"no tool is named {choice!r:.100}"
            raise Error(f"tool_choice: {what}")
        return build(self.call_text, checked, parallel, markers, self.reasoning, in_reasoning)

    def conversation(
        self, messages: Iterable[object], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """OpenAI's messages and tools as (messages, `tools`) for the chat template.

        A template that knows the format gets the tools, and calls and results as `tool_messages` makes them. Another
        one gets no tools: `instructions` are in the system message, and calls and results are text. Raises `Error`
        as `check_tools` and `tool_messages`.
        """
        check_tools(tools)
        if self.in_template:
            plain = tool_messages(messages, short_ids=self.dialect.short_ids, one_call_each=self.name == "llama")
            return plain, [_for_template(tool) for tool in tools] if tools else None
        return plain_conversation(messages, self.call_text, self.instructions(tools), self.system_role), None

    def instructions(self, tools: Sequence[Mapping[str, Any]] | None) -> str | None:
        """A text for the system message that describes the tools; None if the template does, or there are no tools.

        Raises `Error` as `check_tools`.
        """
        checked = check_tools(tools)
        if self.in_template or not checked:
            return None
        call_text = self.call_text
        example = f"{call_text.begin}NAME{call_text.middle}{{…}}{call_text.end}"
        return (
            "You can call functions. To call one, answer with this and nothing else, where {…} is a JSON object of its "
            f"arguments:\n{example}\nYou can call several, one after the other. If you need no function, answer in "
            "plain text.\nThe functions, with JSON schemas of their arguments:\n"
            + "\n".join(json.dumps(_described(tool), ensure_ascii=False) for tool in checked)
        )


def _for_template(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool with all that templates read without looking whether it is there. Its other keys and their order stay."""
    function = tool["function"]
    parameters = {"type": "object", "properties": {}} | dict(function.get("parameters") or {})
    description = function.get("description") or ""
    return {"type": "function", **tool, "function": {**function, "description": description, "parameters": parameters}}


def _described(tool: CheckedTool) -> dict[str, Any]:
    description = {"description": tool.description} if tool.description else {}
    return {"name": tool.name, **description, "parameters": tool.parameters}


_HERMES = (
    Dialect(opens=("<tool_call>",), close="</tool_call>"),
    CallText(begin='<tool_call>\n{"name": "', end="}\n</tool_call>"),
)
_LLAMA = (
    Dialect(opens=("<|python_tag|>",), bare=True, separators=";"),
    CallText(middle='", "parameters": ', between="; "),
)
_JSON = Dialect(opens=("```json",), close="```", bare=True, separators=",;"), CallText()
_MISTRAL = Dialect(opens=("[TOOL_CALLS]",), named=True, short_ids=True)
_MISTRAL_TEXTS = (
    (("[CALL_ID]",), CallText("", "[TOOL_CALLS]", f"[CALL_ID]{CALL_ID}[ARGS]", "", "")),
    (("[ARGS]",), CallText("", "[TOOL_CALLS]", "[ARGS]", "", "")),
    ((), CallText("[TOOL_CALLS][", between=", ", after="]")),
)
"""Control tokens in a Mistral template → how its calls are spelled; the first that fits."""
_OTHER_CALLS = ("<function=", "<parameter=", "<arg_key>", "<invoke", "<tool_calls>")
"""Templates with these have another format, also if they mention markers of a known one."""


_NO_SYSTEM = re.compile(r"raise_exception\([^)]*system role", re.IGNORECASE)
"""What templates have that refuse a system message, such as Gemma 2's."""


def choose_format(template: str | None, special_tokens: Collection[str]) -> ToolFormat:
    """The format of a model with this chat template and these control tokens.

    `special_tokens` is best `Tokenizer.special_tokens`: a grammar needs ids of control tokens. The first that fits:

    * "mistral": the template has `[TOOL_CALLS]`;
    * "hermes": it has `<tool_call>` and "arguments", and no XML inside (Hermes, Qwen 2.5, Qwen 3);
    * "llama": it has `<|python_tag|>`, or "name" and "parameters" in an object (Llama 3.1 and later);
    * "hermes" or "llama", described by `instructions`: the template knows no tools, and the vocabulary has the
      control token `<tool_call>` or `<|python_tag|>`;
    * "json": every other model. Its template may know tools in a format that is not supported here, so they are
      described by `instructions` too.
    """
    text = template or ""
    reasoning = next((pair for pair in REASONING if pair[1] in text), None)
    if reasoning is None and template is None:
        reasoning = next((pair for pair in REASONING if set(pair) <= set(special_tokens)), None)
    name, in_template = _choose(text, special_tokens)
    if name == "mistral":
        dialect = _MISTRAL
        call_text = next(call_text for tokens, call_text in _MISTRAL_TEXTS if all(token in text for token in tokens))
    else:
        dialect, call_text = {"hermes": _HERMES, "llama": _LLAMA, "json": _JSON}[name]
    ids = special_tokens if isinstance(special_tokens, Mapping) else dict.fromkeys(special_tokens)
    shown = {marker: ids[marker] for marker in _markers(dialect, reasoning) if marker in ids}
    system_role = not _NO_SYSTEM.search(text) and ("system" in text or "raise_exception" not in text)
    return ToolFormat(name, dialect, call_text, in_template, system_role, reasoning, shown)


def _choose(template: str, special_tokens: Collection[str]) -> tuple[str, bool]:
    """(name of the format, whether the template describes tools in it)."""
    if "[TOOL_CALLS]" in template:
        return "mistral", True
    if not any(marker in template for marker in _OTHER_CALLS):
        if "<tool_call>" in template and "arguments" in template:
            return "hermes", True
        if "<|python_tag|>" in template or re.search(r'"name": .{0,60}"parameters": ', template):
            return "llama", True
    if not re.search(r"\btools\b", template):
        for token, name in (("<tool_call>", "hermes"), ("<|python_tag|>", "llama")):
            if token in special_tokens:
                return name, False
    return "json", False


def _markers(dialect: Dialect, reasoning: tuple[str, str] | None) -> list[str]:
    """All markers of a format that may be control tokens."""
    named = ("[CALL_ID]", "[ARGS]") if dialect.named else ()
    return [marker for marker in (*dialect.opens, dialect.close, *named, *(reasoning or ())) if marker]
