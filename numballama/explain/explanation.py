"""`Explanation`: what a model computed for a text, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from .. import progress
from ..chat.encoder import note_once
from ..engine.logprobs import Likeliest, likeliest, log_softmax_parts
from ..engine.request import TokenLogprobs
from ..errors import NOT_NUMBERS, Error
from ..generate import GenerationResponse
from ..memory import ceil_div
from ..sampling import MAX_LOGPROBS
from ..tokenizers.base import Tokenizer
from ..validation import whole_number
from . import html, terminal
from .tokens import Alternative, ExplainedToken, alternatives, explained_tokens
from .values import require_name

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..model import Model

MOST_TOKENS = 2048
"""Tokens of the longest text that is explained: attention takes 4 · tokens² bytes, a page some hundred bytes a token
and layer."""
DECIMALS = 6
"""Decimals of numbers in JSON of which there are many: one for each pair of tokens, or for each token and layer."""
LOGPROBS = 5
"""Alternatives of each token, unless the caller chooses another number."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention probabilities of a layer: row t of `weights` [T, T] says how much token t attends to each token."""

    layer: int
    head: int | None
    """None: the mean of all heads."""
    weights: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Lens:
    """The logit lens: what the model would predict if it ended after a layer.

    `ids` and `logprobs` [n_layers, T, k] are the k likeliest tokens after each token of the text. The last layer's are
    the model's own.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, layers: Sequence[Likeliest], tokenizer: Tokenizer | None) -> Lens:
        """From the likeliest tokens of each layer."""
        ids, logprobs = np.stack([each.ids for each in layers]), np.stack([each.logprobs for each in layers])
        return cls(ids.astype(np.int32), logprobs.astype(np.float32), tokenizer)

    def guesses(self, layer: int, position: int) -> tuple[Alternative, ...]:
        """The likeliest tokens after the token at `position`, if the model ended after `layer`."""
        ids, logprobs = self.ids[layer, position].tolist(), self.logprobs[layer, position].tolist()
        return alternatives(self.tokenizer, zip(ids, logprobs, strict=True))


@dataclass(frozen=True, repr=False, eq=False)
class Explanation:
    """Each token of a text with its probability and its alternatives, attention, and the logit lens.

    A notebook shows it as HTML. `show()` prints it, in colour where stdout is a terminal. `str()` is the same without
    colours. `to_html()` is a page of its own.
    """

    title: str
    tokens: tuple[ExplainedToken, ...]
    following: tuple[Alternative, ...] = ()
    """The likeliest tokens after the text. Empty for a generated text."""
    attention: Attention | None = None
    lens: Lens | None = None

    def _repr_html_(self) -> str:
        return html.fragment(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For IPython on a terminal."""
        printer.text(str(self))

    def __str__(self) -> str:
        return terminal.as_text(self)

    def __repr__(self) -> str:
        return f"<Explanation of {len(self.tokens)} tokens by {self.title}: show() prints it>"

    def show(self, file: TextIO | None = None) -> None:
        """Print it to stdout, or to another file. Colours are for terminals, and not if NO_COLOR is set."""
        terminal.show(self, file)

    def to_html(self) -> str:
        """A whole page, light or dark as the reader's system. It loads nothing."""
        return html.page(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values.

        Row t of the attention's weights has the t + 1 tokens up to t, since nothing after a token is seen. Weights and
        the lens's log probabilities have `DECIMALS` decimals.
        """

        def entries(found: Iterable[Alternative]) -> list[dict[str, Any]]:
            return [each._asdict() for each in found]

        def guesses(lens: Lens, layer: int, position: int) -> list[dict[str, Any]]:
            found = lens.guesses(layer, position)
            return entries(each._replace(logprob=round(each.logprob, DECIMALS)) for each in found)

        attention, lens = self.attention, self.lens
        return {
            "title": self.title,
            "tokens": [
                {"id": t.id, "text": t.text, "logprob": t.logprob, "alternatives": entries(t.alternatives)}
                for t in self.tokens
            ],
            "following": entries(self.following),
            "attention": attention
            and {"layer": attention.layer, "head": attention.head, "weights": _up_to_each_token(attention.weights)},
            "lens": lens
            and [
                [guesses(lens, layer, position) for position in range(len(self.tokens))]
                for layer in range(len(lens.ids))
            ],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON, in one line without spaces."""
        return json.dumps(self.to_dict(), separators=(",", ":"))


def _up_to_each_token(weights: NDArray[np.float32]) -> list[list[float]]:
    rounded = weights.astype(np.float64).round(DECIMALS)
    return [row[: token + 1].tolist() for token, row in enumerate(rounded)]


class ExplainedText(str):
    """A generated text whose tokens have log probabilities: `generate(…, logprobs=5)` returns it.

    It is a string. A notebook shows its tokens coloured; `explanation` has them, and `show()` prints them.
    """

    explanation: Explanation

    def _repr_html_(self) -> str:
        return self.explanation._repr_html_()

    def show(self, file: TextIO | None = None) -> None:
        """Print the tokens as `Explanation.show` does."""
        self.explanation.show(file)


def text_of(model: Model, responses: Sequence[GenerationResponse]) -> str:
    """The text of the responses of one sequence: an `ExplainedText` if they have log probabilities."""
    text = "".join(response.text for response in responses)
    if not any(response.logprobs for response in responses):
        return text
    explained = ExplainedText(text)
    explained.explanation = _of_responses(model, responses)
    return explained


def explain_responses(model: Model, responses: Sequence[GenerationResponse]) -> Explanation:
    """The tokens of generated text. Raises `Error` for responses of several texts, or without log probabilities."""
    if len({response.index for response in responses}) > 1:
        raise Error("the responses belong to several texts (n > 1): explain those of one index at a time")
    if not any(response.logprobs for response in responses):
        raise Error(f"the responses have no log probabilities: ask for them with stream(…, logprobs={LOGPROBS})")
    return _of_responses(model, responses)


def _of_responses(model: Model, responses: Sequence[GenerationResponse]) -> Explanation:
    tokens, found = [each.token for each in responses], [each.logprobs for each in responses]
    return Explanation(model.path.name, explained_tokens(model.tokenizer, tokens, found))


def explain(
    model: Model,
    text: str | Iterable[int] | Iterable[GenerationResponse],
    logprobs: int = LOGPROBS,
    layer: int | None = None,
    head: int | None = None,
    lens: bool = True,
) -> Explanation:
    """`Model.explain`."""
    if isinstance(text, str):
        if not text:
            raise Error("the text is empty: there is nothing to explain")
        ids = model.require_tokenizer().encode(text)
        return _explain_ids(model, model.token_engine.validate(ids), logprobs, layer, head, lens)
    if isinstance(text, bytes | bytearray | Mapping | Set) or not isinstance(text, Iterable):
        raise Error(f"explain() takes a text, token ids or responses, found {text!r:.200}")
    items = list(text)
    if items and all(isinstance(item, GenerationResponse) for item in items):
        return explain_responses(model, cast("list[GenerationResponse]", items))
    return _explain_ids(model, model.token_engine.validate(cast("list[int]", items)), logprobs, layer, head, lens)


def _explain_ids(
    model: Model, ids: Sequence[int], logprobs: int, layer: int | None, head: int | None, lens: bool
) -> Explanation:
    top = _checked(ids, model.config, logprobs, layer, head)
    if several := model.gpus > 1:  # of values inside of the layers each GPU has a part
        if layer is not None or head is not None:
            raise Error(f"attention is split over {model.gpus} GPUs: explain() shows a layer or a head with gpus=1")
        note_once(model.notes, f"attention and what layers would predict are split over {model.gpus} GPUs: not shown")
        lens = False
    reader, n, last = model.value_reader, len(ids), model.config.n_layers - 1
    shown = last if layer is None else layer
    probabilities = f"layers.{shown}.probabilities"
    if layer is not None:
        require_name(reader.graph, probabilities)
    has_attention = not several and probabilities in reader.graph.values  # an architecture's layers may compute none
    classified = [*(f"layers.{each}.lens_logits" for each in range(last) if lens), "logits"]
    best = {name: Likeliest.empty(n, max(top, 1)) for name in classified}
    names = [*classified, probabilities] if has_attention else [*classified]
    logprobs_of_text, weights = np.full(n, np.nan), np.zeros((n, n), np.float32)

    def take(name: str, start: int, logits: NDArray[np.float32]) -> None:
        for first, part in log_softmax_parts(logits):
            if np.isnan(part).any():
                raise Error(NOT_NUMBERS)
            begin = start + first
            best[name].put(begin, likeliest(part, max(top, 1)))
            if name == "logits":
                after = ids[begin + 1 : begin + 1 + len(part)]
                logprobs_of_text[begin + 1 : begin + 1 + len(after)] = part[range(len(after)), after]

    if several or model.batch_invariant:  # the probabilities have the bits of all its runs, whose ops are fused
        names.remove("logits")
        end = 0
        with closing(model.iter_logits(ids)) as parts:
            for logits in parts:
                take("logits", end, logits)
                end += len(logits)
    if names:
        with model.exclusive() as session, progress.progress_bar("explaining") as report:
            total = ceil_div(n, len(reader.program.inputs["ids"])) * len(names)
            for done, (name, start, end, rows) in enumerate(reader.stops(session, ids, names)):
                report(f"token {end} of {n}", done, total)
                if name == probabilities:
                    weights[start:end] = rows[:, :, :n].mean(axis=1) if head is None else rows[:, head, :n]
                else:
                    take(name, start, rows)
    tops = [each[:top] for each in best["logits"].pairs()]
    found = [TokenLogprobs(*each) for each in zip(logprobs_of_text[1:].tolist(), tops[:-1], strict=True)]
    return Explanation(
        model.path.name,
        explained_tokens(model.tokenizer, ids, [None, *found]),
        alternatives(model.tokenizer, tops[-1]),
        Attention(shown, head, weights) if has_attention else None,
        Lens.of([best[name] for name in classified], model.tokenizer) if lens else None,
    )


def _checked(ids: Sequence[int], config: ModelConfig, logprobs: int, layer: int | None, head: int | None) -> int:
    """`logprobs`. Raises `Error` for an argument that is out of range, and for a text that is too long."""
    top = whole_number("logprobs", logprobs, 0)
    if top > MAX_LOGPROBS:
        raise Error(f"logprobs must be at most {MAX_LOGPROBS}, found {top}")
    for name, value, count in (("layer", layer, config.n_layers), ("head", head, config.n_heads)):
        if value is not None and whole_number(name, value, 0) >= count:
            raise Error(f"{name} must be 0 to {count - 1}, found {value}: the model has {count} {name}s")
    if len(ids) > MOST_TOKENS:
        raise Error(
            f"the text has {len(ids):,} tokens and explain() takes up to {MOST_TOKENS:,}: explain a part of it, or "
            "read single values with values()"
        )
    return min(top, config.vocab_size)
