"""Solutions of docs/course/18-generation.md."""

from __future__ import annotations

import numpy as np
import pytest

from numballama.generate import StopStringFilter
from numballama.reference import ReferenceBackend
from tests.course.story import checkpoint, graph, layout


class Hand:
    """The story model on the reference, a token at a time."""

    def __init__(self) -> None:
        backend = ReferenceBackend(checkpoint().weights)
        self.program = backend.program(graph())
        backend.set_pages(0, 0, range(1, layout().pages))

    def step(self, token: int, position: int) -> np.ndarray:
        for name, value in (("ids", token), ("positions", position), ("sequences", 0)):
            self.program.inputs[name][0] = value
        self.program.run(tokens=1)
        return self.program.value("logits")[0].astype(np.float64)


def prompt(text: str) -> list[int]:
    tokenizer = checkpoint().tokenizer
    assert tokenizer is not None
    return tokenizer.encode(text)


@pytest.mark.slow
def test_1_the_same_draw() -> None:
    hand = Hand()
    for position, token in enumerate(prompt("Lily had a")):
        logits = hand.step(token, position)
    rng, draws = np.random.default_rng(0), 2000
    noise = -np.log(-np.log(rng.uniform(size=(draws, len(logits)))))
    counts = np.bincount((logits + noise).argmax(axis=1), minlength=len(logits)) / draws
    p = np.exp(logits - logits.max())
    p /= p.sum()
    assert np.abs(counts - p).max() < 4 * np.sqrt(0.25 / draws)  # four standard deviations


def greedy(penalty: float, count: int) -> list[int]:
    hand, ids = Hand(), prompt("The cat and the cat and the cat")
    for position in range(len(ids) + count - 1):
        logits = hand.step(ids[position], position)
        if position + 1 == len(ids):
            seen = list(set(ids))
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            ids.append(int(logits.argmax()))
    return ids


@pytest.mark.slow
def test_2_repetition() -> None:
    plain, penalised = greedy(1.0, 12), greedy(2.0, 12)
    assert plain != penalised
    start = len(prompt("The cat and the cat and the cat"))
    assert len(set(penalised[start:])) >= len(set(plain[start:]))


def test_3_held_back() -> None:
    """Seven: with the eighth character the stop string is complete."""
    rng, stop = np.random.default_rng(0), "abababac"
    most = 0
    for _ in range(200):
        text = "".join(rng.choice(list("abc"), size=60, p=[0.5, 0.4, 0.1]))
        stops, shown, at = StopStringFilter([stop]), "", 0
        while at < len(text) and stops.found is None:
            size = int(rng.integers(1, 5))
            shown += stops.push(text[at : at + size])
            at += size
            if stops.found is None:
                most = max(most, min(at, len(text)) - len(shown))
        shown += stops.flush()
        assert shown == text.split(stop)[0]
    assert most == len(stop) - 1
