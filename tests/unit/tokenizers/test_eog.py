"""Names of tokens that end a generation."""

from __future__ import annotations

import pytest

from numballama.tokenizers.eog import EOG_NAMES, eog_ids, not_eog


@pytest.mark.parametrize("name", sorted(EOG_NAMES))
def test_every_name_counts(name: str) -> None:
    assert eog_ids({name: 7, "<s>": 1}, None) == {7}
    assert eog_ids({name: 7}, 2) == {2, 7}


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (["<|end|>", "<|return|>"], ["<|end|>", "<|return|>"]),
        (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|flush|>", "<|calls|>"], ["<|flush|>", "<|calls|>"]),
        (["</s>", "<|tool_response>"], ["<|tool_response>"]),
        (["</s>", "<|plamo:eos|>"], []),
        (["</s>"], ["</s>"]),
    ],
)
def test_exceptions_of_llama_cpp(names: list[str], ends: list[str]) -> None:
    ids = {name: token for token, name in enumerate(names)}
    assert eog_ids(ids, None) == {ids[name] for name in ends}
    assert not_eog(names).isdisjoint(ends)
