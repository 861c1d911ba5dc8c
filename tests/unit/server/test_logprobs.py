"""Log probabilities in the shapes of OpenAI, and tokens as text."""

from __future__ import annotations

from numballama.model import Model
from numballama.server.logprobs import chat_logprobs, completion_logprobs, token_bytes, token_text


def test_tokens_that_are_no_text(model: Model) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert token_text(tokenizer, 2) == "</s>" and token_bytes(tokenizer, 2) == []
    assert token_text(tokenizer, 10**6) == "<token 1000000>" and token_bytes(tokenizer, 10**6) == []
    part = tokenizer.encode("🐕", bos=False)[-1]
    assert token_text(tokenizer, part) == "\ufffd" and len(token_bytes(tokenizer, part)) == 1
    assert chat_logprobs(tokenizer, [5], [None])["content"] == []
    assert completion_logprobs(tokenizer, [5], [None])["token_logprobs"] == [None]
