"""Solutions of docs/course/19-story.md."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import numballama
from numballama import Model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with numballama.compile(None, device="cpu", context=128, max_sequences=8) as made:
        yield made


def log_probabilities(model: Model, ids: list[int]) -> np.ndarray:
    """log p of each token but the first."""
    logits = model.logits(ids[:-1]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return log_p[np.arange(len(ids) - 1), ids[1:]]


def encode(model: Model, text: str) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode(text)


def test_1_diversity(model: Model) -> None:
    """More temperature: more different tokens, and texts that the model finds less likely."""
    different, surprise = [], []
    for temperature in (0.2, 0.8, 1.5):
        options = [
            numballama.SamplingParams(temperature=temperature, top_k=0, top_p=1, seed=seed, max_tokens=20)
            for seed in range(8)
        ]
        texts = model.generate(["Once upon a time"] * 8, params=options)
        ids = [encode(model, "Once upon a time" + text) for text in texts]
        different.append(len({token for each in ids for token in each}))
        surprise.append(float(-np.mean([log_probabilities(model, each)[4:].mean() for each in ids])))
    assert different == sorted(different) and different[0] < different[2]
    assert surprise == sorted(surprise)


def test_2_beam_search(model: Model) -> None:
    start = encode(model, "The little dog")
    beams: list[tuple[float, list[int]]] = [(0.0, start)]
    for _ in range(6):
        found = []
        for score, ids in beams:
            logits = model.logits(ids)[-1].astype(np.float64)
            log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            found += [(score + log_p[token], [*ids, int(token)]) for token in log_p.argsort()[-3:]]
        beams = sorted(found, reverse=True)[:3]
    greedy = list(start)
    for _ in range(6):
        greedy.append(int(model.logits(greedy)[-1].argmax()))
    own = log_probabilities(model, greedy)[len(start) - 1 :].sum()
    assert beams[0][0] >= own - 1e-3  # the greedy text may fall out of the beams, but here the best is no worse


def test_3_a_word(model: Model) -> None:
    start = encode(model, "The animal was called")
    values = {}
    for word in ("Timmy", "dinosaur", "jurisprudence"):
        ids = encode(model, f"The animal was called {word}")
        assert ids[: len(start)] == start
        values[word] = float(np.exp(log_probabilities(model, ids)[len(start) - 1 :].sum()))
    assert values["jurisprudence"] < min(values["Timmy"], values["dinosaur"]) < 1
