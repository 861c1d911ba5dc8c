"""Markdown of a model → HTML that a browser can show without risk, in time linear in the text's length.

The text is hostile: a model repeats what it has read. HTML in it is shown as text. Links have a scheme of `SCHEMES`,
and images become links, so that nothing is loaded without a click. No attribute but `ATTRIBUTES` is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

SCHEMES = ("http", "https", "mailto")
ATTRIBUTES = frozenset({"href", "title", "target", "rel", "class", "start"})

MAX_NESTING = 24
"""Depth of quotes and brackets; a list counts twice. The parser is recursive, and its time grows with the depth."""

STEPS_PER_CHARACTER = 1
TOKENS_PER_CHARACTER = 2
FREE_STEPS = 1_000
"""Steps of the parser that a text may take. Documentation takes 0.1 a character, "[[[[…" 2. Tokens are what
the block parser makes of it; a list of one-letter items makes 1.25 a character."""

_ALLOWED_LINK = re.compile(rf"(?:{'|'.join(SCHEMES)}):", re.IGNORECASE)
_ALIGNMENT = re.compile(r"text-align:(left|center|right)")


class _TooComplexError(Exception):
    """A text takes more steps than its length justifies, or is nested too deep."""


def render(text: str) -> str:
    """HTML of a Markdown text: CommonMark with tables, strikethrough, and line breaks kept.

    A text that would take much longer than others of its length, or is nested too deep, is returned as plain text.
    """
    steps, tokens = (n * len(text) + FREE_STEPS for n in (STEPS_PER_CHARACTER, TOKENS_PER_CHARACTER))
    try:
        return str(_PARSER.render(text, {"steps": steps, "tokens": tokens}))
    except _TooComplexError:
        return f'<pre class="plain">{escape(text)}</pre>\n'


def _count_step(state: StateBlock | StateInline, *_: object) -> bool:
    """A rule in front of all others, which never matches: it counts where the parser tries to match one."""
    state.env["steps"] -= 1
    if state.env["steps"] < 0:
        raise _TooComplexError
    return False


def _check_depth(state: StateBlock, *_: object) -> bool:
    """The block parser leaves out what is nested deeper than its limit."""
    if state.level > MAX_NESTING - 3:
        raise _TooComplexError
    return False


class _Tokens(list[Token]):
    """Tokens of the block parser, up to a limit. It adds missing cells to tables: 3 KiB of "|" could become 65,536."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def append(self, token: Token) -> None:
        if len(self) >= self.limit:
            raise _TooComplexError
        super().append(token)


def _limit_tokens(state: StateCore) -> None:
    state.tokens = _Tokens(state.env["tokens"])


def _is_allowed(url: str) -> bool:
    return _ALLOWED_LINK.match(url) is not None


def _link_open(self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return self.renderToken(tokens, index, options, env)


def _image(self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    """A link to the image. Loading it would tell its host that the text was read."""
    token = tokens[index]
    label = self.renderInlineAsText(token.children or [], options, env).strip() or "image"
    attrs: dict[str, str | int | float] = {"href": token.attrs.get("src", ""), "class": "image"}
    opening = Token("link_open", "a", 1, attrs=attrs)
    return f"{_link_open(self, [opening], 0, options, env)}{escape(label)}</a>"


def _cell(self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    """The column's alignment as a class: the page's Content-Security-Policy allows no style attribute."""
    aligned = _ALIGNMENT.fullmatch(str(tokens[index].attrs.pop("style", "")))
    if aligned:
        tokens[index].attrSet("class", f"align-{aligned[1]}")
    return self.renderToken(tokens, index, options, env)


def _make_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": MAX_NESTING})
    parser.enable(["table", "strikethrough"])
    parser.validateLink = _is_allowed  # type: ignore[method-assign]
    parser.block.ruler.before("table", "count_step", _count_step)
    parser.block.ruler.before("table", "check_depth", _check_depth)
    parser.inline.ruler.before("text", "count_step", _count_step)
    parser.core.ruler.before("block", "limit_tokens", _limit_tokens)
    parser.add_render_rule("link_open", _link_open)
    parser.add_render_rule("image", _image)
    parser.add_render_rule("th_open", _cell)
    parser.add_render_rule("td_open", _cell)
    return parser


_PARSER = _make_parser()
