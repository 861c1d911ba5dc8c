"""Log probabilities of prompts."""

from __future__ import annotations

import numpy as np
import pytest

from numballama.model import Model
from numballama.server.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs, token_bytes, token_text


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


def test_tokens_that_are_no_text(model: Model) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert token_text(tokenizer, 2) == "</s>" and token_bytes(tokenizer, 2) == []
    assert token_text(tokenizer, 10**6) == "<token 1000000>" and token_bytes(tokenizer, 10**6) == []
    part = tokenizer.encode("🐕", bos=False)[-1]
    assert token_text(tokenizer, part) == "\ufffd" and len(token_bytes(tokenizer, part)) == 1
    assert chat_logprobs(tokenizer, [5], [None])["content"] == []
    assert completion_logprobs(tokenizer, [5], [None])["token_logprobs"] == [None]
