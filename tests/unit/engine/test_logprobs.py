"""Log probabilities from logits."""

from __future__ import annotations

import numpy as np
import pytest

from numballama.engine.logprobs import ROWS, likeliest, log_softmax, log_softmax_parts, prompt_logprobs


@pytest.mark.parametrize("top", [0, 1, 3, 7, 20])
def test_of_a_prompt(top: int) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(70, 7)).astype(np.float32)
    ids = [int(token) for token in rng.integers(0, 7, 70)]
    found = prompt_logprobs(logits, ids, top)
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    assert len(found) == 70 and found[0] is None
    for row, each in enumerate(found[1:]):
        assert each is not None and each.logprob == pytest.approx(expected[row, ids[row + 1]])
        assert [token for token, _ in each.top] == np.argsort(-expected[row])[:top].tolist()


def test_of_one_token() -> None:
    assert prompt_logprobs(np.zeros((1, 4), np.float32), [2], 1) == [None]


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, 0, -1e4]], np.float32)
    np.testing.assert_array_equal(log_softmax(logits), [[0, -1e4, -2e4]])


def test_one_row_is_as_one_of_several() -> None:
    logits = np.random.default_rng(1).normal(size=(3, 1000)).astype(np.float32)
    np.testing.assert_array_equal([log_softmax(row) for row in logits], log_softmax(logits))


def test_of_equal_tokens_the_smaller_id_is_first() -> None:
    found = likeliest(np.log([[0.3, 0.2, 0.3, 0.2]]), 4)
    assert found.ids.tolist() == [[0, 2, 1, 3]]
    np.testing.assert_allclose(np.exp(found.logprobs), [[0.3, 0.3, 0.2, 0.2]])


def test_parts_are_the_whole() -> None:
    logits = np.random.default_rng(0).normal(size=(2 * ROWS + 1, 5)).astype(np.float32)
    parts = list(log_softmax_parts(logits))
    assert [start for start, _ in parts] == [0, ROWS, 2 * ROWS]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in parts]), log_softmax(logits))
