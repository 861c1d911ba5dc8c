"""What `Model.explain` computes: the graph's own values, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import numballama
from numballama import Error, ExplainedText, Explanation
from numballama.engine.logprobs import log_softmax
from numballama.explain import explanation
from numballama.explain.explanation import Attention
from numballama.explain.tokens import explained_tokens
from numballama.export import WRITERS
from numballama.graph import LAYERS, Builder
from numballama.ir import Value
from numballama.model import Model
from tests.helpers.hf_files import HF
from tests.helpers.random_models import random_checkpoint
from tests.helpers.tiny import CHUNK, TINY

IDS = [int(token) for token in np.random.default_rng(1).integers(3, 300, CHUNK + 20)]
"""More than one run takes."""
CLOSE = 2e-4


@pytest.fixture(scope="module")
def tiny(tiny_file: Path, tiny_tokenizer: Path) -> Iterator[Model]:
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu", threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def explained(tiny: Model) -> Explanation:
    return tiny.explain(IDS, 3, layer=0)


def test_probabilities_are_the_softmax_of_the_logits(tiny: Model, explained: Explanation) -> None:
    logprobs = log_softmax(tiny.logits(IDS))
    assert [token.id for token in explained.tokens] == IDS
    assert explained.tokens[0].logprob is None and explained.tokens[0].alternatives == ()
    for position, token in enumerate(explained.tokens[1:]):
        row = logprobs[position]
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        assert [each.logprob for each in token.alternatives] == pytest.approx(np.sort(row)[:-4:-1], abs=1e-4)
    assert [each.id for each in explained.following] == np.argsort(-logprobs[-1])[:3].tolist()


def test_attention_is_causal_and_sums_to_1(tiny: Model, explained: Explanation) -> None:
    assert explained.attention is not None and explained.attention.layer == 0 and explained.attention.head is None
    weights = explained.attention.weights
    assert weights.shape == (len(IDS), len(IDS)) and not np.triu(weights, 1).any()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    probabilities = tiny.values(IDS, "layers.0.probabilities")
    np.testing.assert_allclose(weights, probabilities.mean(axis=1), atol=1e-6)
    one = tiny.explain(IDS, layer=0, head=2, lens=False).attention
    assert one is not None and one.head == 2
    np.testing.assert_array_equal(one.weights, probabilities[:, 2])
    last = tiny.explain(IDS[:9], lens=False).attention
    assert last is not None and last.layer == 1


def test_the_last_layer_of_the_lens_is_the_model(tiny: Model, explained: Explanation) -> None:
    assert explained.lens is not None and explained.lens.ids.shape == (2, len(IDS), 3)
    logprobs = log_softmax(tiny.logits(IDS))
    np.testing.assert_allclose(explained.lens.logprobs[1], np.sort(logprobs)[:, :-4:-1], atol=1e-4)
    for position in (0, CHUNK, len(IDS) - 1):
        guesses = explained.lens.guesses(1, position)
        assert guesses[0].id == logprobs[position].argmax()
    first = log_softmax(tiny.values(IDS, "layers.0.lens_logits"))
    np.testing.assert_allclose(explained.lens.logprobs[0], np.sort(first)[:, :-4:-1], atol=1e-5)
    assert np.abs(explained.lens.logprobs[0] - explained.lens.logprobs[1]).max() > 0.1


def test_an_explanation_is_that_of_transformers() -> None:
    """Of the hidden states and attentions of golden/make_hf_values.py; a model without a tokenizer."""
    golden = np.load(HF.parent / "hf_values.npz")
    name = "qwen3-0"
    ids = np.load(HF / name / "expected.npz")["ids"][: len(golden[f"{name}/layers.0.x_out"])]
    with numballama.compile(HF / name, device="cpu", threads=1) as model:
        found = model.explain(ids, 2, layer=1, head=3)
    assert found.attention is not None and found.lens is not None
    assert np.abs(found.attention.weights - golden[f"{name}/layers.1.probabilities"][3]).max() <= CLOSE
    for layer in range(2):
        logprobs = log_softmax(golden[f"{name}/layers.{layer}.lens"])
        assert np.abs(found.lens.logprobs[layer] - np.sort(logprobs)[:, :-3:-1]).max() <= CLOSE
    for position, token in enumerate(found.tokens[1:]):
        assert token.text == f"<token {ids[position + 1]}>"
        assert token.logprob == pytest.approx(logprobs[position, ids[position + 1]], abs=CLOSE)


def test_a_text_is_encoded_as_a_prompt(tiny: Model) -> None:
    assert tiny.tokenizer is not None
    found = tiny.explain("the story", 0, lens=False)
    assert [token.id for token in found.tokens] == tiny.tokenizer.encode("the story")
    assert found.lens is None and found.following == () and found.tokens[1].alternatives == ()


def test_generated_text_has_the_probabilities_of_its_prompt(tiny: Model) -> None:
    """What the engine's sampler says, with fusions and a cache, is what the unfused graph says of the whole text."""
    text = tiny.generate("the story", 6, temperature=0, logprobs=3, ignore_eos=True)
    assert isinstance(text, ExplainedText) and text == tiny.generate("the story", 6, temperature=0, ignore_eos=True)
    prompt = tiny.require_tokenizer().encode("the story")
    generated = text.explanation.tokens
    whole = tiny.explain([*prompt, *(token.id for token in generated)], 3).tokens[len(prompt) :]
    assert len(generated) == 6
    for one, other in zip(generated, whole, strict=True):
        assert one.id == other.id and one.text == other.text
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [each.logprob for each in one.alternatives] == pytest.approx(
            [each.logprob for each in other.alternatives], abs=1e-3
        )
    responses = list(tiny.stream("the story", 6, temperature=0, logprobs=3, ignore_eos=True))
    assert tiny.explain(responses).tokens == generated
    assert text._repr_html_() == text.explanation._repr_html_()


def test_texts_without_log_probabilities_are_plain(tiny: Model) -> None:
    plain = tiny.generate(["the", "story"], 3, temperature=0)
    assert [type(each) for each in plain] == [str, str]
    both = tiny.generate(["the", "story"], 3, temperature=0, logprobs=0)
    assert both == plain and all(isinstance(each, ExplainedText) for each in both)


def test_responses_that_cannot_be_explained(tiny: Model) -> None:
    with pytest.raises(Error, match=r"no log probabilities: ask for them with stream\(…, logprobs=5\)"):
        tiny.explain(list(tiny.stream("the", 2)))
    with pytest.raises(Error, match="several texts"):
        tiny.explain(list(tiny.stream("the", 2, logprobs=1, n=2)))


def test_a_token_that_a_grammar_forces_has_no_probability(tiny: Model) -> None:
    """The engine does not run the model for it."""
    responses = list(tiny.stream("the", 3, temperature=0, logprobs=2, ignore_eos=True))
    responses[1] = replace(responses[1], logprobs=None)
    text = explanation.text_of(tiny, responses)
    assert isinstance(text, ExplainedText)
    assert [token.logprob is None for token in text.explanation.tokens] == [False, True, False]
    assert tiny.explain(responses).tokens == text.explanation.tokens
    assert text.explanation._repr_html_() and str(text.explanation)


def test_an_architecture_without_attention_probabilities(tiny: Model) -> None:
    def without_attention(b: Builder, x: Value, p: str) -> Value:
        h = b.norm(x, f"{p}attn_norm", f"{p}attn_in")
        q, _, _ = (b.project(h, p, name, name) for name in "qkv")
        x = b.graph.add("add", x, b.project(q, p, "o", "attn_projected"), out=f"{p}x_mid")
        h = b.norm(x, f"{p}ffn_norm", f"{p}ffn_in")
        h = b.graph.add("swiglu", b.project(h, p, "1", "gate"), b.project(h, p, "3", "up"), out=f"{p}ffn_hidden")
        return b.graph.add("add", x, b.project(h, p, "2", "ffn_projected"), out=f"{p}x_out")

    with (
        patch.dict(LAYERS, {type(tiny.config): without_attention}),
        numballama.compile(tiny.path, device="reference") as model,
    ):
        found = model.explain(IDS[:5])
        assert found.attention is None and found.lens is not None and len(found.lens.ids) == 2
        assert "attention" not in str(found)
        with pytest.raises(Error, match=r"no value 'layers\.1\.probabilities'"):
            model.explain(IDS[:5], layer=1)


def test_arguments_out_of_range(tiny: Model) -> None:
    with pytest.raises(Error, match="layer must be 0 to 1, found 2: the model has 2 layers"):
        tiny.explain("a", layer=2)
    with pytest.raises(Error, match="head must be 0 to 3, found 4"):
        tiny.explain("a", head=4)
    with pytest.raises(Error, match="layer must be"):
        tiny.explain("a", layer=-1)
    with pytest.raises(Error, match="logprobs must be at most 20, found 21"):
        tiny.explain("a", 21)
    with pytest.raises(Error, match="the text is empty"):
        tiny.explain("")
    with pytest.raises(Error, match="whole numbers"):
        tiny.explain(["a"])  # type: ignore[list-item]
    with pytest.raises(Error, match="the prompt is empty"):
        tiny.explain([])
    wrongs: list[Any] = [None, 5, b"ab", {1, 2}]
    for wrong in wrongs:
        with pytest.raises(Error, match="a text, token ids or responses, found"):
            tiny.explain(wrong)


def test_a_long_text_is_refused(tiny: Model) -> None:
    with patch.object(explanation, "MOST_TOKENS", 8):
        assert len(tiny.explain(IDS[:8]).tokens) == 8
        with pytest.raises(Error, match=r"9 tokens and explain\(\) takes up to 8"):
            tiny.explain(IDS[:9])
    with pytest.raises(numballama.ContextError, match="the context"):
        tiny.explain([5] * 1000)


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    source = random_checkpoint(TINY)
    source.weights["norm"].data[:] = np.nan
    path = tmp_path / "damaged.bin"
    WRITERS["llama2c-v0"](path, source.config, source.weights)
    with numballama.compile(path, device="reference") as model, pytest.raises(Error, match="logits are not numbers"):
        model.explain([1, 2])


def test_as_json(explained: Explanation) -> None:
    found = json.loads(explained.to_json())
    assert len(found["tokens"]) == len(found["lens"][0]) == len(found["attention"]["weights"]) == len(IDS)
    token = explained.tokens[1]
    assert found["tokens"][1] == {
        "id": IDS[1], "text": token.text, "logprob": token.logprob,
        "alternatives": [{"id": a.id, "text": a.text, "logprob": a.logprob} for a in token.alternatives],
    }  # fmt: skip
    assert found["attention"]["layer"] == 0 and found["attention"]["head"] is None
    assert explained.lens is not None
    assert [each["id"] for each in found["lens"][1][5]] == explained.lens.ids[1, 5].tolist()
    logprobs = [[each["logprob"] for each in position] for position in found["lens"][1]]
    np.testing.assert_allclose(logprobs, explained.lens.logprobs[1], atol=1e-6)
    assert [each["id"] for each in found["following"]] == [each.id for each in explained.following]
    assert explained.attention is not None
    for position, row in enumerate(found["attention"]["weights"]):
        assert len(row) == position + 1
        np.testing.assert_allclose(row, explained.attention.weights[position, : position + 1], atol=1e-6)


def test_json_of_a_long_text_is_small() -> None:
    """A number of attention takes no more bytes than its digits are worth, and what is not seen takes none."""
    n = 300
    weights = np.tril(np.random.default_rng(0).random((n, n), np.float32))
    weights /= weights.sum(axis=1, keepdims=True)
    tokens = explained_tokens(None, range(n), [None] * n)
    made = Explanation("m", tokens, (), Attention(0, None, weights))
    assert len(made.to_json()) < 9 * n * (n + 1) / 2 + 100 * n


def test_how_it_is_called(explained: Explanation, tiny: Model) -> None:
    assert repr(explained) == f"<Explanation of {len(IDS)} tokens by {tiny.path.name}: show() prints it>"
