"""Measure how well a model predicts a text: perplexity, and KL divergence from another model, by llama.cpp's windows.

The text's tokens are cut into windows of `context` tokens; a rest that fills none is left out. The model reads each
window from an empty cache, its first token replaced by BOS where the vocabulary puts one before a text. Counted are the
predictions of the second half, from token `context // 2 + 1` on, which have half a window before them. These are the
windows of llama.cpp's tools/perplexity, so the figures can be compared with its own.

    nll        -log p(token), in nats, of each counted token
    perplexity exp(mean nll); a model that knows nothing has the size of its vocabulary
    ln ratio   mean (nll - nll_base), which is ln(perplexity / perplexity of the base)
    KL         sum of p_base · (log p_base - log p) over the vocabulary, at each counted token, in nats

One row of logits is looked at at a time, in float64. Kept are a few numbers for each counted token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import progress
from ..engine.logprobs import log_softmax
from ..errors import ContextError, Error, FormatError
from ..files import read_all
from ..memory import format_bytes
from ..validation import whole_number

if TYPE_CHECKING:
    from ..model import Model

CONTEXT = 512
"""Tokens of a window, as in llama.cpp."""
SMALLEST = 3
"""Tokens of the smallest window that has a token to count."""
PERCENTILES = (50, 90, 95, 99, 99.9)


@dataclass(frozen=True)
class Divergence:
    """KL divergence, in nats, of a model's distributions from those of `base`, over all counted tokens."""

    base: str
    mean: float
    standard_error: float
    """Of the mean."""
    percentiles: dict[str, float]
    """ "50" (the median) to "99.9" → KL divergence."""
    maximum: float
    same_top: float
    """Share of the positions, 0 to 1, at which both models have the same likeliest token."""
    log_ratio: float
    """ln(perplexity / perplexity of the base): the mean difference of nll, token by token. Below 0: better than it."""
    log_ratio_error: float
    """Its standard error, far less than those of both perplexities, because easy and hard tokens are the same ones."""


@dataclass(frozen=True)
class Perplexity:
    """Result of `perplexity`."""

    model: str
    device: str
    types: list[str]
    """Element types of the weights."""
    weight_bytes: int
    context: int
    """Tokens of a window."""
    windows: int
    tokens: int
    """Tokens that were counted: `context - context // 2 - 1` a window."""
    perplexity: float
    standard_error: float
    """Of the perplexity, from the spread of the tokens' nll."""
    seconds: float
    divergence: Divergence | None
    """None without a base."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    def as_text(self) -> str:
        """The result as a few lines of text."""
        lines = [
            f"{self.model} on {self.device}, {', '.join(self.types)}, {format_bytes(self.weight_bytes)} of weights",
            f"  perplexity {self.perplexity:.4f} ± {self.standard_error:.4f}   ({self.tokens:,} tokens of "
            f"{self.windows:,} windows of {self.context:,})",
        ]
        if (found := self.divergence) is not None:
            shares = "   ".join(f"{name} % {value:.4g}" for name, value in found.percentiles.items())
            lines += [
                f"  KL divergence from {found.base}: mean {found.mean:.4g} ± {found.standard_error:.2g}",
                f"    percentiles   {shares}   max {found.maximum:.4g}",
                f"    the same likeliest token at {found.same_top:.2%} of the positions",
                f"  ln(perplexity / perplexity of {found.base}): {found.log_ratio:+.4g} ± {found.log_ratio_error:.2g}",
            ]
        return "\n".join(lines)


def perplexity(
    model: Model,
    text: str | Iterable[int],
    context: int = CONTEXT,
    chunks: int | None = None,
    base: Model | None = None,
) -> Perplexity:
    """The perplexity of `model` on a text, or on the token ids of one, in windows of `context` tokens.

    `chunks` is how many windows to read at most. With a `base`, also the KL divergence from that model, whose
    vocabulary must be the same. On a terminal a bar shows the perplexity so far.

    Raises `Error` for a text of less than a window, a model without a tokenizer or another vocabulary in `base`;
    `ContextError` when a model's context is smaller than a window.
    """
    context = whole_number("context", context, SMALLEST)
    chunks = None if chunks is None else whole_number("chunks", chunks, 1)
    for each in (model, base):
        if each is not None and each.context < context:
            raise ContextError(
                f"windows of {context} tokens do not fit {each.path.name}'s context of {each.context}; "
                f"pass context={context} to compile()"
            )
    windows = _windows(model, _ids(model, text, base), context, chunks)
    counted = context - context // 2 - 1
    nll = np.empty((len(windows), counted))
    kl, base_nll, same = np.empty_like(nll), np.empty_like(nll), np.empty(nll.shape, bool)
    started = time.perf_counter()
    progress.info(f"perplexity of {len(windows):,} windows of {context:,} tokens, {nll.size:,} of them counted")
    with progress.progress_bar("perplexity") as report:
        done, total = 0, 0.0
        for number, window in enumerate(windows):
            targets = window[context // 2 + 1 :]
            with closing(_rows(model, base, window[:-1], context // 2)) as rows:  # a traceback must not keep the model
                for at, (target, (row, base_row)) in enumerate(zip(targets, rows, strict=True)):
                    log_p = log_softmax(row)
                    nll[number, at] = -log_p[target]
                    if base_row is not None:
                        log_base = log_softmax(base_row)
                        kl[number, at] = np.exp(log_base) @ (log_base - log_p)
                        base_nll[number, at] = -log_base[target]
                        same[number, at] = log_base.argmax() == log_p.argmax()
                    done, total = done + 1, total + nll[number, at]
                    report(f"{_exp(total / done):.4f} so far", done, nll.size)
    mean, error = _mean(nll)
    return Perplexity(
        model=model.path.name,
        device=model.device,
        types=sorted({str(weight.type) for weight in model.weights.values()}),
        weight_bytes=sum(weight.nbytes for weight in model.weights.values()),
        context=context,
        windows=len(windows),
        tokens=nll.size,
        perplexity=_exp(mean),
        standard_error=_exp(mean) * error,
        seconds=time.perf_counter() - started,
        divergence=None if base is None else _divergence(base.path.name, kl, same, nll - base_nll),
    )


def as_table(found: dict[str, Perplexity]) -> str:
    """Results by the type of their weights, a line for each: bytes, perplexity, KL divergence from the base."""
    base = next((each.divergence.base for each in found.values() if each.divergence is not None), None)
    head = f"{'type':8}{'weights':>12}{'perplexity':>13}{'±':>9}"
    lines = [head if base is None else f"{head}{'mean KL':>12}{'99 % KL':>11}{'max KL':>11}{'same top':>11}"]
    for name, each in found.items():
        line = f"{name:8}{format_bytes(each.weight_bytes):>12}{each.perplexity:13.4f}{each.standard_error:9.4f}"
        if (kl := each.divergence) is not None:
            line += f"{kl.mean:12.4g}{kl.percentiles['99']:11.4g}{kl.maximum:11.4g}{kl.same_top:11.2%}"
        elif base is not None:
            line += f"{'–':>12}{'–':>11}{'–':>11}{'–':>11}"
        lines.append(line)
    if base is not None:
        lines.append(f"KL divergence from {base}, in nats")
    return "\n".join(lines)


def read_text(path: str | PathLike[str]) -> str:
    """The text of a UTF-8 file, without a newline at its end, as llama.cpp reads it.

    Raises `Error` for a file that cannot be read or is empty, `FormatError` for bytes that are not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            data = read_all(file, str(path))
    except OSError as error:
        raise Error(f"{path}: cannot be read: {error.strerror or error}; pass a text file") from None
    if data.startswith(b"_logits_"):
        raise FormatError("logits saved by llama.cpp, not a text", path=path, expected="a text in UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        found = f"0x{data[error.start]:02x}"
        raise FormatError("not a text", path=path, where=error.start, expected="UTF-8", found=found) from None
    if not text.strip():
        raise Error(f"{path}: there is no text in it; expected some thousand words of plain text")
    return text.removesuffix("\n")


def _ids(model: Model, text: str | Iterable[int], base: Model | None) -> list[int]:
    """The ids of a text; no EOS after it. Raises `Error` if `base` has other ids for it."""
    if not isinstance(text, str):
        ids = [whole_number("a token id", token, 0) for token in text]
        if ids and max(ids) >= model.config.vocab_size:
            raise Error(f"token id {max(ids)} is not in the vocabulary of {model.config.vocab_size:,}")
    else:
        ids = _encode(model, text)
        if base is not None and base is not model and _encode(base, text) != ids:
            raise Error(f"{base.path.name} makes other tokens of this text than {model.path.name}: {SAME_VOCABULARY}")
    if base is not None and base.config.vocab_size != model.config.vocab_size:
        sizes = f"{base.config.vocab_size:,} tokens, {model.path.name} {model.config.vocab_size:,}"
        raise Error(f"{base.path.name} has {sizes}: {SAME_VOCABULARY}")
    return ids


SAME_VOCABULARY = "KL divergence compares models with the same vocabulary"


def _encode(model: Model, text: str) -> list[int]:
    tokenizer = model.require_tokenizer()
    return [*tokenizer.bos, *tokenizer.encode(text, bos=False)]


def _windows(model: Model, ids: list[int], context: int, chunks: int | None) -> list[list[int]]:
    """The windows of a text, each with BOS in place of its first token where the vocabulary puts one before a text."""
    count = len(ids) // context
    if not count:
        raise Error(
            f"the text has {len(ids):,} tokens, fewer than a window of {context:,}; pass a longer text, or a smaller "
            "context="
        )
    bos = [] if model.tokenizer is None else model.tokenizer.bos
    windows = [ids[start * context : (start + 1) * context] for start in range(min(count, chunks or count))]
    for window in windows:
        window[: len(bos)] = bos
    return windows


Rows = Generator[tuple[np.ndarray, np.ndarray | None]]


def _rows(model: Model, base: Model | None, ids: list[int], start: int) -> Rows:
    """The logits after each token from `start` on, of the model and of the base."""
    if base is None or base is model:  # a model computes one thing at a time
        for row in _each(model, ids, start):
            yield row, None if base is None else row
    else:
        with closing(_each(model, ids, start)) as own, closing(_each(base, ids, start)) as others:
            yield from zip(own, others, strict=True)


def _each(model: Model, ids: list[int], start: int) -> Generator[np.ndarray]:
    with closing(model.iter_logits(ids, start)) as parts:
        for rows in parts:
            yield from rows


def _exp(nll: float) -> float:
    """exp, which is infinite for a model that is certain of other tokens: its weights may be damaged."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean of all values and its standard error, by llama.cpp's formula: 0 for a single value."""
    return float(values.mean()), float(values.std()) / math.sqrt(max(values.size - 1, 1))


def _divergence(base: str, kl: np.ndarray, same: np.ndarray, more: np.ndarray) -> Divergence:
    mean, error = _mean(kl)
    percentiles = {f"{each:g}": float(np.percentile(kl, each)) for each in PERCENTILES}
    return Divergence(base, mean, error, percentiles, float(kl.max()), float(same.mean()), *_mean(more))
