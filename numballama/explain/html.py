"""An `Explanation` as HTML for a notebook, or as a page. It loads nothing and runs no script; every text is escaped.

Colours are laid thinly over the page's own background, so that its own text colour is readable on a light and on a dark
one. Orange is improbable, blue is probable: the colour-blind can tell them.

Where a viewer drops style sheets (GitHub, and JupyterLab before a notebook is trusted), a reader still has the text,
the likeliest tokens as a table, and attention in tenths: what the style sheet shows in a place of its own is in
attributes, and what it hides can be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from .terminal import heading, tenths
from .tokens import INCOMPLETE, Alternative, ExplainedToken, visible

if TYPE_CHECKING:
    from .explanation import Attention, Explanation, Lens

LENS_TOKENS, ATTENTION_TOKENS, TABLE_TOKENS = 48, 48, 48
"""How many of the last tokens the logit lens, attention and the table show."""

STYLE = """
.nb-explain { font: 14px/1.45 system-ui, sans-serif; max-width: 72rem; padding-bottom: 1rem }
.nb-explain h4 { font-size: 14px; font-weight: 600; margin: 1.1em 0 .4em }
.nb-explain summary { cursor: pointer; font-size: 13px }
.nb-explain .note { opacity: .75; font-size: 12px; margin: .2em 0 }
.nb-explain .text { font-size: 16px; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
.nb-explain .token { position: relative; border-radius: 3px; padding: .15em 0; margin-right: 1px; cursor: default }
.nb-explain .token:hover, .nb-explain .token:focus { outline: 1.5px solid currentColor }
.nb-explain .mark { opacity: .5 }
.nb-explain .card { display: none; position: absolute; z-index: 9; left: 0; top: 1.9em; padding: .5em .7em;
  background: Canvas; color: CanvasText; border: 1px solid GrayText; border-radius: 5px; white-space: pre;
  font-size: 13px; line-height: 1.4; box-shadow: 0 2px 8px #0004 }
.nb-explain .token:hover .card, .nb-explain .token:focus .card { display: block }
.nb-explain .card .row { display: grid; grid-template-columns: minmax(6em, auto) 6em 4em; gap: .7em }
.nb-explain .card .chosen { font-weight: bold }
.nb-explain .card [data-text]::before { content: attr(data-text) }
.nb-explain .card .bar { height: .7em; align-self: center; background: #2878f0 }
.nb-explain .card .figure { text-align: right; font-variant-numeric: tabular-nums }
.nb-explain .wide { overflow-x: auto }
.nb-explain .grid { border-collapse: separate; border-spacing: 1px; margin: 0; font-size: 12px; color: inherit;
  table-layout: auto; width: auto }
.nb-explain .grid thead, .nb-explain .grid tr, .nb-explain .grid tr:hover { background: none !important }
.nb-explain .grid th, .nb-explain .grid td { padding: 1px 4px !important; border: 0 !important; font-weight: normal;
  text-align: left !important; white-space: pre; line-height: 1.4; color: inherit }
.nb-explain .likeliest td, .nb-explain .likeliest th { padding-right: 1.5em !important }
.nb-explain .lens td, .nb-explain .lens th { max-width: 7em; overflow: hidden; text-overflow: ellipsis }
.nb-explain .lens td { border-radius: 2px }
.nb-explain .heat td { width: 13px; min-width: 13px; height: 13px; padding: 0 !important }
.nb-explain .heat td span, .nb-explain .instead { display: none }
.nb-explain .heat th { text-align: right !important; padding: 0 5px !important; line-height: 13px; max-width: 9em;
  overflow: hidden }
.nb-explain .heat thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left !important;
  padding: 4px 0 !important; max-height: 9em; vertical-align: top }
.nb-explain .scale { display: inline-block; width: 9em; height: .8em; border-radius: 3px; vertical-align: middle }
"""


def page(explanation: Explanation) -> str:
    """A document of its own."""
    title = escape(explanation.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title></head>\n<body>{fragment(explanation)}</body></html>\n"
    )


def fragment(explanation: Explanation) -> str:
    """What a notebook shows."""
    tokens = explanation.tokens
    parts = [
        f'<div class="nb-explain"><style>{STYLE}</style>',
        f"<h4>{escape(explanation.title)}: {len(tokens)} tokens</h4>",
        f'<p class="text">{"".join(map(_token, tokens))}{_following(explanation.following)}</p>',
        f'<p class="note">Probability of each token after those before it: 0 <span class="scale" style="background: '
        f'linear-gradient(to right, {", ".join(_by_probability(n / 8) for n in range(9))})"></span> 1. '
        "Point at a token, or move to it with Tab, for the likeliest in its place.</p>",
        _likeliest(explanation),
    ]
    texts = [visible(token.text) for token in tokens]
    if explanation.attention is not None:
        parts.append(_attention(explanation.attention, texts))
    if explanation.lens is not None:
        parts.append(_lens(explanation.lens, texts))
    return "\n".join([*parts, "</div>"])


def _shown(text: str) -> str:
    """What a token completes, escaped for HTML. A line ends where the text's does."""
    if not text:
        return f'<span class="mark">{INCOMPLETE}</span>'
    shown = escape(visible(text.rstrip("\n")))
    return shown + '<span class="mark">↵</span>\n' * (len(text) - len(text.rstrip("\n")))


def _token(token: ExplainedToken) -> str:
    p = token.probability
    style = "" if p is None else f' style="background: {_by_probability(p)}"'
    return (
        f'<span class="token" tabindex="0"{style}>{_shown(token.completes)}{_card(token.alternatives, token, p)}</span>'
    )


def _following(found: Sequence[Alternative]) -> str:
    if not found:
        return ""
    return f'<span class="token" tabindex="0" aria-label="after the text"> …{_card(found)}</span>'


def _card(found: Iterable[Alternative], token: ExplainedToken | None = None, p: float | None = None) -> str:
    """The likeliest tokens in a place, shown while a reader points at it."""
    rows = [(each.text, each.probability, token is not None and each.id == token.id) for each in found]
    if token is not None and p is not None and not any(chosen for _, _, chosen in rows):
        rows.append((token.text, p, True))
    if not rows:
        return ""
    entries = (
        f'<span class="row{" chosen" if chosen else ""}"><span data-text="{escape(visible(text))}"></span>'
        f'<span class="bar" style="width: {100 * probability:.1f}%"></span>'
        f'<span class="figure" data-text="{probability:.4f}"></span></span>'
        for text, probability, chosen in rows
    )
    return f'<span class="card" role="tooltip">{"".join(entries)}</span>'


def _likeliest(explanation: Explanation) -> str:
    """The cards as a table, for a touch screen, and where there are no cards."""
    tokens = explanation.tokens
    first = max(0, len(tokens) - TABLE_TOKENS)
    rows = [
        (visible(token.text), "" if token.probability is None else f"{token.probability:.4f}", token.alternatives)
        for token in tokens[first:]
    ]
    if explanation.following:
        rows.append(("after the text", "", explanation.following))
    lines = "".join(
        f'<tr><th scope="row">{escape(text)}</th><td>{probability}</td><td>{escape(_listed(found))}</td></tr>'
        for text, probability, found in rows
    )
    headings = "".join(f'<th scope="col">{each}</th>' for each in ("token", "probability", "likeliest in its place"))
    return (
        f"<details><summary>The likeliest tokens as a table{_of_all(first, len(tokens))}</summary>"
        f'<div class="wide"><table class="grid likeliest"><thead><tr>{headings}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></details>"
    )


def _listed(found: Iterable[Alternative]) -> str:
    return ", ".join(f"'{visible(each.text)}' {each.probability:.3f}" for each in found)


def _attention(attention: Attention, texts: Sequence[str]) -> str:
    first = max(0, len(texts) - ATTENTION_TOKENS)
    names = [escape(text) for text in texts]
    head = "".join(f'<th scope="col">{name}</th>' for name in names[first:])
    rows = []
    for row in range(first, len(texts)):
        cells = (
            f'<td style="background: {_by_weight(weight**0.5)}" '
            f'title="{names[row]} → {names[column]}: {weight:.3f}"><span>{tenths(weight)}</span></td>'
            for column, weight in enumerate(attention.weights[row, first : row + 1].tolist(), first)
        )
        rows.append(f'<tr><th scope="row">{names[row]}</th>{"".join(cells)}</tr>')
    return (
        f"<h4>Attention of {heading(attention)}</h4>"
        f'<p class="note">A line for each token, a column for each token that it sees{_of_all(first, len(texts))}. '
        "Blue grows with the root of the weight; point at a square for the weight."
        '<span class="instead"> Numbers are tenths.</span></p>'
        f'<div class="wide"><table class="grid heat"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _lens(lens: Lens, texts: Sequence[str]) -> str:
    first = max(0, len(texts) - LENS_TOKENS)
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in texts[first:])
    rows = []
    for layer in reversed(range(len(lens.ids))):
        cells = (_guess(lens.guesses(layer, position)) for position in range(first, len(texts)))
        rows.append(f'<tr><th scope="row">layer {layer}</th>{"".join(cells)}</tr>')
    return (
        "<h4>Logit lens: the token that each layer would write next</h4>"
        f'<p class="note">A column for each token of the text, a line for each layer{_of_all(first, len(texts))}. '
        "A stronger blue is a more probable guess.</p>"
        f'<div class="wide"><table class="grid lens"><thead><tr><th>after</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _guess(found: Sequence[Alternative]) -> str:
    best = found[0]
    title = "&#10;".join(f"{each.probability:.3f} {escape(visible(each.text))}" for each in found)
    return f'<td style="background: {_by_weight(best.probability)}" title="{title}">{escape(visible(best.text))}</td>'


def _of_all(first: int, tokens: int) -> str:
    return f"; the last {tokens - first} of {tokens} tokens" if first else ""


def _by_probability(p: float) -> str:
    """Orange for 0, nothing for a half, blue for 1."""
    red, green, blue = (240, 130, 20) if p < 0.5 else (40, 120, 240)
    return f"rgba({red}, {green}, {blue}, {0.06 + 0.94 * 0.6 * abs(2 * p - 1):.2f})"


def _by_weight(weight: float) -> str:
    """A thin blue for 0, a strong one for 1."""
    return f"rgba(40, 120, 240, {0.05 + 0.75 * weight:.2f})"
