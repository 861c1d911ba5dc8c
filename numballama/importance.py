"""How much each column of a weight matters for a text: an importance matrix, as llama.cpp calls it.

A column of a matrix is multiplied with one element of the layer's input. The mean square of that element over a text
says how much an error in the column changes the output, so encoders of K-quants weigh errors with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import progress
from .errors import ContextError, Error
from .ir import Graph
from .model import Model
from .sampling import SamplingParams
from .tokenizers.base import Tokenizer

WINDOW = 512
"""Tokens of the text that are read together, as in llama.cpp. Less where the model's context is shorter."""
MOST_TOKENS = 64 * WINDOW
"""Further tokens of a text are not read: the means have settled."""
FLOOR = 1e-4
"""Least importance of a column, of a mean of 1: a column that this text does not need must not be given up."""
GIVE_TEXT = "give one: --calibrate FILE"
SEPARATOR = "<|endoftext|>"
"""The token between the documents that models without BOS were trained on, as Qwen2."""
OWN_TEXTS, OWN_TOKENS = 16, 64
"""How many texts of how many tokens at most a model writes to be measured with."""

Importance = Mapping[str, np.ndarray]
"""Name of a weight → float32 [columns], with a mean of 1."""


def measure(model: Model, text: str) -> Importance:
    """The importance of the columns of all weights of linear layers, for the first `MOST_TOKENS` tokens of a text.

    Every window of the text begins as a new one does. Raises `Error` for a text without tokens or a model without a
    tokenizer, `ContextError` for a context in which no token of the text follows BOS.
    """
    tokenizer = model.require_tokenizer()
    ids = tokenizer.encode(text, bos=False)[:MOST_TOKENS]
    if not ids:
        raise Error("the text to calibrate with is empty: give some thousand words like those that the model will read")
    inputs = inputs_of_weights(model.value_reader.graph)
    squares: dict[str, np.ndarray] = {}
    step = _text_in_window(model, len(tokenizer.bos))
    with progress.progress_bar("reading the text") as report:
        for start in range(0, len(ids), step):
            report(f"token {start:,}", start, len(ids))
            with model.exclusive() as session:
                window = [*tokenizer.bos, *ids[start : start + step]]
                for stop in model.value_reader.stops(session, window, set(inputs.values())):
                    total = np.einsum("tc,tc->c", stop.rows, stop.rows, dtype=np.float64)
                    squares[stop.name] = squares.get(stop.name, 0) + total
    return {weight: _relative(squares[name]) for weight, name in inputs.items()}


def beginning(tokenizer: Tokenizer) -> list[int]:
    """Ids after which a model begins a text: BOS, otherwise `SEPARATOR`, EOS or a newline, the first that there is.

    Not the end of a turn in a chat, which EOS may be, if it can be avoided: the model would write the next turn.
    """
    for token in (tokenizer.bos_id, tokenizer.special_tokens.get(SEPARATOR), tokenizer.eos_id):
        if token is not None and token < tokenizer.usable:
            return [token]
    return tokenizer.encode("\n", bos=False)


def own_text(model: Model) -> str:
    """What the model writes after `beginning`: the same each time. `model` has room for `OWN_TEXTS` sequences.

    Texts that follow the model's own probabilities are like those that it was trained on. Raises `Error` for a model
    that has no tokenizer or ends every text at once.
    """
    ids = beginning(model.require_tokenizer())
    settings = SamplingParams(
        max_tokens=OWN_TOKENS, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, n=OWN_TEXTS
    )  # one request: all texts start in the same step, so that every step has the same rows whatever the timing
    texts = [""] * OWN_TEXTS
    with progress.progress_bar("writing a text to calibrate with") as report:
        for done, response in enumerate(model.stream_ids(ids, params=settings, strip_leading_space=True)):
            texts[response.index] += response.text
            report(f"token {done:,}", done, OWN_TEXTS * OWN_TOKENS)
    if not any(text.strip() for text in texts):
        raise Error(f"it ends every text at once; {GIVE_TEXT}")
    return "\n".join(texts)


def _text_in_window(model: Model, bos: int) -> int:
    """Tokens of the text in a window, which begins with `bos` tokens. Raises `ContextError` if there is no room."""
    trained, window = model.config.context, min(WINDOW, model.context, model.config.context)
    if window <= bos:
        advice = f"compile with context={bos + 1} or more"
        if trained <= bos:
            advice = "the model was trained for no longer texts, so quantise it without an importance matrix"
        raise ContextError(f"in a window of {window} there is no token of the text after BOS: {advice}")
    return window - bos


def inputs_of_weights(graph: Graph) -> dict[str, str]:
    """Weight of a linear layer → name of the float32 value that it is multiplied with, [tokens, columns]."""
    makers = {name: op for op in graph.ops for name in op.outputs}
    found: dict[str, str] = {}
    for op in graph.ops:
        if op.kind != "linear" or ".lens_" in op.outputs[0]:
            continue
        x = op.inputs[0]
        if graph.values[x].dtype != "f32":  # int8 activations: what they were quantised from
            x = makers[x].inputs[0]
        found |= {name: x for name in op.inputs if graph.values[name].kind == "weight"}
    return found


def _relative(squares: np.ndarray) -> np.ndarray:
    mean = squares.mean()
    if not mean > 0:
        return np.ones(len(squares), np.float32)
    return np.maximum(squares / mean, FLOOR).astype(np.float32)
