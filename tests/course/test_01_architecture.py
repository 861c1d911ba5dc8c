"""Solutions of docs/course/01-architecture.md."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from numballama.cpu import CpuBackend
from numballama.fusion import fuse
from numballama.reference import ReferenceBackend
from tests.course.story import checkpoint, graph, layout


def test_1_kinds() -> None:
    """All plain ops of a layer disappear in fused ones: what remains was alone, or has a new name."""
    declared = Counter(op.kind for op in graph().ops)
    fused = Counter(op.kind for op in fuse(graph(), "cpu").ops)
    assert declared["linear"] == 6 * 7 + 1  # q, k, v, o, gate, up, down in each layer, and the classifier
    assert fused == {
        "rope_angles": 1, "embedding": 1, "norm_qkv": 6, "rope_kv_write": 6, "attention": 6, "linear_add": 12,
        "norm_gate_up": 6, "norm_linear": 1, "argmax": 1,
    }  # fmt: skip
    gone = declared.keys() - fused.keys()
    assert gone == {
        "rmsnorm", "linear", "rope", "kv_write", "attention_scores", "softmax", "attention_values", "swiglu", "add",
    }  # fmt: skip


class Hand:
    """A program of one token at a time on some backend."""

    def __init__(self, backend: Any) -> None:
        self.program = backend.program(graph())
        backend.set_pages(0, 0, range(1, layout().pages))

    def step(self, token: int, position: int) -> np.ndarray:
        for name, value in (("ids", token), ("positions", position), ("sequences", 0)):
            self.program.inputs[name][0] = value
        self.program.run(tokens=1)
        return self.program.value("logits")[0].copy()


@pytest.mark.slow
def test_2_the_reference_agrees() -> None:
    weights, tokenizer = checkpoint().weights, checkpoint().tokenizer
    assert tokenizer is not None
    compiled, reference = Hand(CpuBackend(weights)), Hand(ReferenceBackend(weights))
    largest = 0.0
    for position, token in enumerate(tokenizer.encode("Once upon a time, there was")):
        a, b = compiled.step(token, position), reference.step(token, position)
        largest = max(largest, float(np.abs(a - b).max()))
        assert a.argmax() == b.argmax()
    assert 0 < largest < 1e-3  # float32 sums beside float64 sums; logits themselves are around 10


@pytest.mark.slow
def test_3_a_random_token_of_three() -> None:
    def text(seed: int) -> list[int]:
        hand, rng = Hand(CpuBackend(checkpoint().weights)), np.random.default_rng(seed)
        tokenizer = checkpoint().tokenizer
        assert tokenizer is not None
        ids = tokenizer.encode("Once upon a time")
        for position in range(20):
            logits = hand.step(ids[position], position)
            if position + 1 == len(ids):
                best = np.argsort(logits)[-3:]
                powers = np.exp(logits[best] - logits[best].max())
                ids.append(int(rng.choice(best, p=powers / powers.sum())))
        return ids

    assert text(1) == text(1) != text(2)
