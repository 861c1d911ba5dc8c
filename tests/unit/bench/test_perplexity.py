"""Perplexity and KL divergence: the windows, the figures against NumPy over `model.logits`, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numballama
from numballama import ContextError, Error, FormatError, Model
from numballama.bench.perplexity import as_table, perplexity, read_text
from numballama.checkpoint import Weight
from numballama.export import WRITERS
from numballama.quantization.types import F32
from tests.helpers.bounds import shared_model
from tests.helpers.random_models import save
from tests.helpers.sampling import log_softmax
from tests.helpers.tiny import CHUNK, TINY


@pytest.fixture(scope="module")
def model(tiny_file: Path, tiny_tokenizer: Path) -> Model:
    return shared_model(tiny_file, tiny_tokenizer, device="cpu")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Model:
    """Other weights, the same vocabulary."""
    return shared_model(save(tmp_path_factory.mktemp("o"), "llama2c-v0", TINY, seed=6)[0], tiny_tokenizer, device="cpu")


def expected(model: Model, ids: list[int], context: int) -> np.ndarray:
    """float64 [counted tokens, vocab]: log probabilities before each counted token, from whole windows' logits."""
    parts = []
    for start in range(0, len(ids) // context * context, context):
        window = [1, *ids[start + 1 : start + context]]  # the vocabulary puts BOS before a text
        parts.append(np.array([log_softmax(row.astype(float)) for row in model.logits(window)])[context // 2 : -1])
    return np.concatenate(parts)


def targets(ids: list[int], context: int) -> list[int]:
    whole = np.array(ids[: len(ids) // context * context]).reshape(-1, context)
    return [int(token) for token in whole[:, context // 2 + 1 :].ravel()]


@given(context=st.integers(3, TINY.context), windows=st.integers(1, 3), rest=st.integers(0, 2), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_figures_are_numpys(model: Model, other: Model, context: int, windows: int, rest: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 300, context * windows + rest).tolist()
    log_p, log_base, tokens = expected(model, ids, context), expected(other, ids, context), targets(ids, context)
    nll = -log_p[np.arange(len(tokens)), tokens]
    found = perplexity(model, ids, context, base=other)
    assert (found.windows, found.tokens, found.context) == (windows, len(tokens), context)
    assert found.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    if len(tokens) > 1:
        error = np.exp(nll.mean()) * nll.std() / np.sqrt(len(tokens) - 1)
        assert found.standard_error == pytest.approx(error, rel=1e-4, abs=1e-6)
    kl = (np.exp(log_base) * (log_base - log_p)).sum(1)
    assert found.divergence is not None
    assert found.divergence.mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.divergence.maximum == pytest.approx(kl.max(), rel=1e-4)
    assert found.divergence.percentiles["90"] == pytest.approx(np.percentile(kl, 90), rel=1e-4)
    assert found.divergence.same_top == np.mean(log_p.argmax(1) == log_base.argmax(1))
    more = nll + log_base[np.arange(len(tokens)), tokens]
    assert found.divergence.log_ratio == pytest.approx(more.mean(), rel=1e-4, abs=1e-6)
    base_alone = perplexity(other, ids, context)
    assert found.perplexity / base_alone.perplexity == pytest.approx(np.exp(found.divergence.log_ratio), rel=1e-9)
    if len(tokens) > 1:
        error = more.std() / np.sqrt(len(tokens) - 1)
        assert found.divergence.log_ratio_error == pytest.approx(error, rel=1e-4, abs=1e-6)


def test_text_has_bos_in_every_window(model: Model) -> None:
    text = "the story of abc, the story of cab " * 15
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(text)
    assert ids[0] == 1 and len(ids) >= 3 * CHUNK
    assert perplexity(model, text, CHUNK).perplexity == perplexity(model, ids, CHUNK).perplexity
    elsewhere = [token if place % CHUNK else 299 for place, token in enumerate(ids)]
    assert perplexity(model, elsewhere, CHUNK).perplexity == perplexity(model, ids, CHUNK).perplexity
    first = perplexity(model, text, CHUNK, chunks=1)
    assert first.windows == 1 and first.perplexity == perplexity(model, ids[:CHUNK], CHUNK).perplexity


def test_a_model_that_knows_nothing_has_the_size_of_its_vocabulary(tmp_path: Path) -> None:
    weights = {name: Weight(shape, F32, np.zeros(shape, np.float32)) for name, shape in TINY.weight_shapes().items()}
    WRITERS["llama2c-v0"](tmp_path / "zero.bin", TINY, weights)
    with numballama.compile(tmp_path / "zero.bin", device="cpu") as model:
        found = perplexity(model, range(3, 103), 50)
    assert found.perplexity == pytest.approx(300) and found.standard_error == pytest.approx(0, abs=1e-9)


def test_a_model_does_not_diverge_from_itself(model: Model, tiny_file: Path) -> None:
    """From itself as an object, which computes one thing at a time, and from its file opened again."""
    ids = list(range(3, 200))
    with numballama.compile(tiny_file, device="cpu") as again:
        for base in (model, again):
            found = perplexity(model, ids, 60, base=base).divergence
            assert found is not None and (found.mean, found.maximum, found.same_top) == (0, 0, 1)
            assert (found.log_ratio, found.log_ratio_error) == (0, 0)


def test_what_is_refused(model: Model, tmp_path: Path, tiny_file: Path) -> None:
    with pytest.raises(Error, match=r"the text has 5 tokens, fewer than a window of 40; .*context="):
        perplexity(model, range(3, 8), 40)
    with pytest.raises(ContextError, match=rf"windows of 512 tokens do not fit .* context of {TINY.context}"):
        perplexity(model, range(3, 8))
    with pytest.raises(Error, match="context must be at least 3"):
        perplexity(model, range(3, 8), 2)
    with pytest.raises(Error, match="chunks must be at least 1"):
        perplexity(model, range(3, 8), 4, chunks=0)
    with pytest.raises(Error, match="token id 300 is not in the vocabulary of 300"):
        perplexity(model, [3, 4, 300], 3)
    narrow = shared_model(save(tmp_path, "llama2c-v0", dataclasses.replace(TINY, vocab_size=290))[0], device="cpu")
    with pytest.raises(Error, match=r"has 290 tokens, .* 300: KL divergence compares models with the same vocabulary"):
        perplexity(model, [3, 4, 5], 3, base=narrow)
    with pytest.raises(Error, match="carries no tokenizer"):
        perplexity(shared_model(tiny_file, device="cpu"), "a text", 3)


def test_after_an_error_the_model_goes_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is given back when the measurement ends in the middle of a window."""
    with monkeypatch.context() as patch:
        patch.setattr("numballama.bench.perplexity.log_softmax", lambda row: 1 / 0)
        with pytest.raises(ZeroDivisionError) as caught:
            perplexity(model, range(3, 43), 40)
    assert model.generate("the", max_tokens=2, temperature=0), "a notebook keeps the last traceback"
    assert caught.tb is not None


def test_a_perplexity_beyond_all_numbers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numballama.bench.perplexity.log_softmax", lambda row: np.full(300, -1e4))
    assert perplexity(model, range(3, 43), 40).perplexity == float("inf")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "text"
    for data, kind, message in (
        (b"", Error, "there is no text in it"),
        (b" \n\n", Error, "there is no text in it"),
        (b"caf\xe9 au lait", FormatError, "not a text; at byte 3; expected UTF-8; found 0xe9"),
        (b"_logits_\0\2\0\0", FormatError, "logits saved by llama.cpp"),
    ):
        path.write_bytes(data)
        with pytest.raises(kind, match=message) as caught:
            read_text(path)
        assert str(path) in str(caught.value)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(Error, match="cannot be read"):
            read_text(missing)
    path.write_bytes("a\r\nbé\n\n".encode())
    assert read_text(path) == "a\r\nbé\n"


def test_text_of_a_result(model: Model, other: Model) -> None:
    ids = list(range(3, 63))
    plain, compared = perplexity(model, ids, 30), perplexity(model, ids, 30, base=other)
    assert f"perplexity {plain.perplexity:.4f}" in plain.as_text() and "KL" not in plain.as_text()
    text = compared.as_text()
    assert f"KL divergence from {other.path.name}: mean " in text and "50 %" in text and "99.9 %" in text
    head, first, second, last = as_table({"f32": plain, "f16": compared}).splitlines()
    assert len(head) == len(first) == len(second) and first.endswith("–") and second.endswith("%")
    assert last == f"KL divergence from {other.path.name}, in nats"
    assert "KL" not in as_table({"f32": plain, "f16": plain})
