"""An explanation with every part, made by hand, with hostile texts."""

from __future__ import annotations

import math

import numpy as np

from numballama.explain.explanation import Attention, Explanation, Lens
from numballama.explain.tokens import Alternative, ExplainedToken

HOSTILE = '<script>alert("1")</script>'
CONTROLS = "\x1b[31m\u202e"


def sample(tokens: int = 4, text: str = " a") -> Explanation:
    """`tokens` tokens: the first without a probability, the second hostile, the third with an end of line."""
    others = (Alternative(7, HOSTILE, math.log(0.5)), Alternative(3, "'&", math.log(0.25)))
    second = ExplainedToken(9, CONTROLS, CONTROLS, math.log(0.125), others)
    third = ExplainedToken(3, f"{HOSTILE}\n", f"{HOSTILE}\n", math.log(0.25), others)
    rest = [ExplainedToken(index, text, text, math.log(0.9), others) for index in range(tokens - 3)]
    weights = np.tril(np.ones((tokens, tokens), np.float32))
    weights /= weights.sum(axis=1, keepdims=True)
    ids = np.zeros((2, tokens, 2), np.int32)
    lens = Lens(ids, np.log(np.full(ids.shape, 0.5, np.float32)), None)
    found = (ExplainedToken(1, "<s>", "<s>"), second, third, *rest)
    return Explanation(f"{HOSTILE}.gguf", found, others, Attention(1, None, weights), lens)
