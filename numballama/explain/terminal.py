"""An `Explanation` on a terminal: lines of coloured text. Without colours the same lines say all of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TextIO

from .tokens import INCOMPLETE, Alternative, ExplainedToken, visible

if TYPE_CHECKING:
    from .explanation import Attention, Explanation, Lens

LENS_TOKENS, ATTENTION_TOKENS = 8, 32
"""How many of the last tokens the logit lens and attention show: what a line of a terminal holds."""
GUESS_WIDTH, LABEL_WIDTH = 10, 14
"""Columns of a guess of the lens, and of a token before a line of attention."""


class Span(NamedTuple):
    """A part of a line, and its style as rich writes it."""

    text: str
    style: str = ""


Line = Sequence[Span]


def as_text(explanation: Explanation) -> str:
    """The lines without colours."""
    return "\n".join("".join(span.text for span in line).rstrip() for line in lines(explanation))


def show(explanation: Explanation, file: TextIO | None) -> None:
    """Print the lines. rich leaves colours out where `file` is no terminal, and where NO_COLOR is set."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, highlight=False)
    for line in lines(explanation):
        text = Text.assemble(*line)
        text.rstrip()
        console.print(text, soft_wrap=True)


def lines(explanation: Explanation) -> Iterator[Line]:
    """All lines of an explanation."""
    yield [Span(f"{explanation.title}: {len(explanation.tokens)} tokens", "bold")]
    yield from _running_text(explanation.tokens)
    yield []
    yield [Span("probability  token           likeliest in its place", "bold")]
    for token in explanation.tokens:
        p = token.probability
        figure = "         " if p is None else f"{p:9.4f}"
        yield [Span(f"{figure}    "), _fitted(f"'{visible(token.text)}'", 16, _by_probability(p)),
               *_alternatives(token.alternatives, token.id)]  # fmt: skip
    if explanation.following:
        yield [Span(f"{'':13}"), _fitted("after the text", 16, "italic"), *_alternatives(explanation.following)]
    texts = [visible(token.text) for token in explanation.tokens]
    if explanation.attention is not None:
        yield []
        yield from _attention(explanation.attention, texts)
    if explanation.lens is not None:
        yield []
        yield from _lens(explanation.lens, texts)


def _running_text(tokens: Iterable[ExplainedToken]) -> Iterator[Line]:
    """The text itself, each token in the colour of its probability. A line ends where the text's does."""
    line: list[Span] = []
    for token in tokens:
        style = _by_probability(token.probability)
        line.append(Span(visible(token.completes) or INCOMPLETE, style))
        if token.completes.endswith("\n"):
            yield line
            line = []
    if line:
        yield line


def _alternatives(found: Iterable[Alternative], chosen: int | None = None) -> Iterator[Span]:
    for each in found:
        yield Span(f"'{visible(each.text)}' {each.probability:.3f}", "bold" if each.id == chosen else "")
        yield Span("  ")


def _attention(attention: Attention, texts: Sequence[str]) -> Iterator[Line]:
    """A line for each token: how much it attends to each of the tokens shown, in tenths."""
    first = max(0, len(texts) - ATTENTION_TOKENS)
    yield [
        Span(f"attention of {heading(attention)}, in tenths: a line for each token, a column for each it sees", "bold")
    ]
    if first:
        yield [Span(f"the last {ATTENTION_TOKENS} of {len(texts)} tokens")]
    for row in range(first, len(texts)):
        weights = attention.weights[row, first : row + 1].tolist()
        cells = (Span(f"{tenths(weight)} ", _by_weight(weight**0.5)) for weight in weights)
        yield [_fitted(texts[row], LABEL_WIDTH), *cells]


def heading(attention: Attention) -> str:
    """The layer and head of an attention, in words."""
    return f"layer {attention.layer}, {'mean of all heads' if attention.head is None else f'head {attention.head}'}"


def tenths(weight: float) -> str:
    """A weight as a digit, or a dot for nearly nothing."""
    return "·" if weight < 0.05 else str(min(9, round(10 * weight)))


def _lens(lens: Lens, texts: Sequence[str]) -> Iterator[Line]:
    """A line for each layer, the last one first: its guess of the token after each of the tokens shown."""
    first = max(0, len(texts) - LENS_TOKENS)
    yield [Span("logit lens: the token that each layer would write next", "bold")]
    yield [Span(f"{'after':10}"), *(_fitted(text, GUESS_WIDTH, "italic") for text in texts[first:])]
    for layer in reversed(range(len(lens.ids))):
        cells = []
        for position in range(first, len(texts)):
            best = lens.guesses(layer, position)[0]
            cells.append(_fitted(visible(best.text), GUESS_WIDTH, _by_weight(best.probability)))
        yield [Span(f"layer {layer:<4}"), *cells]


def _fitted(text: str, width: int, style: str = "") -> Span:
    """A text in exactly `width` columns, at least one of which is a space after it."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) >= width:
        text = set_cell_size(text, width - 2) + "…"
    return Span(set_cell_size(text, width), style)


Colour = tuple[int, int, int]
ORANGE, GREY, BLUE, WHITE = (255, 176, 102), (226, 226, 226), (100, 180, 255), (245, 245, 245)


def _by_probability(p: float | None) -> str:
    """Orange for 0, grey for a half, blue for 1: colours that the colour-blind can tell. Black on them in any theme."""
    if p is None:
        return ""
    return _on(_between(ORANGE, GREY, 2 * p) if p < 0.5 else _between(GREY, BLUE, 2 * p - 1))


def _by_weight(weight: float) -> str:
    """White for 0, blue for 1."""
    return _on(_between(WHITE, BLUE, weight))


def _between(low: Colour, high: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * min(max(share, 0), 1)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _on(colour: Colour) -> str:
    red, green, blue = colour
    return f"#000000 on #{red:02x}{green:02x}{blue:02x}"
