"""Importance of columns: mean squares of what the layers really multiply."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numballama
from numballama.checkpoint import Weight
from numballama.config import ModelConfig
from numballama.errors import ContextError, Error
from numballama.export import WRITERS
from numballama.formats.gguf.writer import write_gguf
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.importance import FLOOR, OWN_TEXTS, OWN_TOKENS, beginning, inputs_of_weights, measure, own_text
from numballama.loader import open_checkpoint
from numballama.model import Model
from numballama.quantization.convert import dequantize
from numballama.quantization.types import F32
from numballama.sampling import SamplingParams
from tests.helpers.bpe import real, save_json, trained
from tests.helpers.command_line import call
from tests.helpers.random_models import random_checkpoint

STORY = Path(numballama.__file__).parent / "story.gguf"
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play in the park.\n" * 3


@pytest.fixture(scope="module")
def model() -> Model:
    return numballama.compile(None, device="cpu")


def test_mean_squares_of_the_inputs(model: Model) -> None:
    found = measure(model, TEXT)
    config, tokenizer = model.config, model.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT, bos=True)
    assert len(ids) < 512, "one window"
    matrices = {name for name, weight in model.weights.items() if len(weight.shape) == 2}
    assert set(found) == matrices - ({"tok_embeddings"} if not config.tied_embeddings else set())
    for name in ("layers.0.wq", "layers.2.w2", "layers.4.wo", "output" if "output" in found else "tok_embeddings"):
        value = model.values(ids, inputs_of_weights(model.value_reader.graph)[name])
        squares = np.square(value.astype(np.float64)).mean(axis=0)
        np.testing.assert_allclose(found[name], np.maximum(squares / squares.mean(), FLOOR), rtol=1e-4)
        assert found[name].shape == (model.weights[name].shape[1],)


def test_windows_begin_as_texts_do(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows with the same tokens are as one."""
    monkeypatch.setattr("numballama.importance.WINDOW", 9)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    step = 9 - tokenizer.add_bos
    words = " ".join(["dog"] * 3 * step)
    ids = tokenizer.encode(words, bos=False)
    assert ids[:step] == ids[step : 2 * step] == ids[2 * step :], "each window has the same tokens"
    whole, one = measure(model, words), measure(model, " ".join(["dog"] * step))
    for name in whole:
        np.testing.assert_allclose(whole[name], one[name], rtol=1e-4)


def test_a_text_without_tokens(model: Model) -> None:
    with pytest.raises(Error, match="the text to calibrate with is empty"):
        measure(model, "")


def test_a_window_without_room_for_the_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.tokenizer is not None and len(model.tokenizer.bos) == 1
    monkeypatch.setattr(model, "config", replace(model.config, context=1))
    with pytest.raises(ContextError, match=r"no token of the text after BOS.*without an importance matrix"):
        measure(model, TEXT)
    with (
        numballama.compile(None, device="cpu", context=1) as small,
        pytest.raises(ContextError, match=r"a window of 1 .*no token of the text after BOS: compile with context=2"),
    ):
        measure(small, TEXT)
    with numballama.compile(None, device="cpu", context=2) as two:
        found = measure(two, TEXT[:20])
    assert all(np.isfinite(columns).all() for columns in found.values())


def test_own_text_is_what_the_model_writes_after_bos() -> None:
    with numballama.compile(None, device="cpu", max_sequences=OWN_TEXTS, context=512) as writer:
        text = own_text(writer)
        assert text == own_text(writer), "the same each time"
        stories = text.split("\n")
        assert len(stories) >= OWN_TEXTS and len(set(stories)) > OWN_TEXTS // 2, "different texts"
        assert writer.tokenizer is not None
        count = len(writer.tokenizer.encode(text, bos=False))
        assert OWN_TEXTS * OWN_TOKENS / 4 < count < OWN_TEXTS * OWN_TOKENS * 1.1


def test_a_model_with_no_text_of_its_own(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.tokenizer is not None and model.tokenizer.eos_id is not None
    ends = partial(SamplingParams, logit_bias={model.tokenizer.eos_id: 100.0})
    monkeypatch.setattr("numballama.importance.OWN_TEXTS", 1)
    monkeypatch.setattr("numballama.importance.SamplingParams", ends)
    with pytest.raises(Error, match=r"it ends every text at once; .*--calibrate"):
        own_text(model)


def qwen2_file(folder: Path) -> Path:
    """A random model in GGUF with Qwen2's special tokens: no BOS, and EOS is the end of a turn."""
    beside = {"eos_token": "<|im_end|>", "add_bos_token": False}
    tokenizer = load_tokenizer(save_json(folder, trained("qwen2"), beside))
    config = ModelConfig(256, 256, 1, 4, 4, tokenizer.vocab_size, 128, tied_embeddings=False)
    write_gguf(folder / "qwen2.gguf", config, random_checkpoint(config, 0).weights, tokenizer=tokenizer)
    return folder / "qwen2.gguf"


def test_a_model_without_bos_begins_after_the_token_between_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen2_file(tmp_path)
    with numballama.compile(source, device="cpu", max_sequences=OWN_TEXTS, context=128) as model:
        assert model.tokenizer is not None and model.tokenizer.bos_id is None
        assert list(map(model.tokenizer.piece, beginning(model.tokenizer))) == ["<|endoftext|>"]
        assert own_text(model).strip()
    for name, more in (("plain", ("--no-calibrate",)), ("own", ())):
        done = call(capsys, "export", source, tmp_path / name, "--to", "gguf", "--dtype", "q4_k", *more)
        assert done.code == 0 and "all inputs count alike" not in done.err, done.err
    assert (tmp_path / "own").read_bytes() != (tmp_path / "plain").read_bytes()


def test_where_a_text_begins(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With BOS if there is one, with EOS if there is no other separator, and with a newline if there is nothing."""
    tokenizer = model.tokenizer
    assert tokenizer is not None and beginning(tokenizer) == [tokenizer.bos_id]
    monkeypatch.setattr(tokenizer, "bos_id", tokenizer.usable)  # a token that the model has no row for
    assert beginning(tokenizer) == [tokenizer.eos_id]
    monkeypatch.setattr(tokenizer, "bos_id", None)
    monkeypatch.setattr(tokenizer, "eos_id", None)
    assert tokenizer.decode(beginning(tokenizer)) == "\n"


def test_where_qwens_texts_begin() -> None:
    """Base and instruct models have the same separator, whatever their EOS is."""
    if (path := real("qwen2_5")) is None:
        pytest.skip("needs qwen2_5's tokenizer")
    tokenizer = load_tokenizer(path)
    assert tokenizer.bos_id is None and tokenizer.eos_id == 151645
    assert beginning(tokenizer) == [151643]


def test_the_output_is_closer(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What counts is the layer's output: its error for inputs of a text is less with calibration by that text or by the
    model's own than without.
    """
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    copies = {"plain": ("--no-calibrate",), "own": (), "again": (), "calibrated": ("--calibrate", text)}
    for name, more in copies.items():
        done = call(capsys, "export", STORY, tmp_path / name, "--to", "gguf", "--dtype", "q4_k", *more)
        assert done.code == 0, done.err
    assert (tmp_path / "own").read_bytes() == (tmp_path / "again").read_bytes()
    assert model.tokenizer is not None
    ids, inputs = model.tokenizer.encode(TEXT, bos=True), inputs_of_weights(model.value_reader.graph)
    ratios = []
    for name in ("layers.0.wq", "layers.1.w1", "layers.3.w2", "layers.3.wv", "layers.4.wo"):
        x, exact = model.values(ids, inputs[name]), dequantize(model.weights[name])
        plain, own, calibrated = (
            float(np.square(x @ (exact - dequantize(open_checkpoint(tmp_path / copy).weights[name])).T).sum())
            for copy in ("plain", "own", "calibrated")
        )
        ratios.append((own / plain, calibrated / plain))
    assert (np.mean(ratios, axis=0) < 0.9).all(), ratios


def test_a_model_that_writes_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no tokenizer: the export says so and weighs the errors of all inputs alike."""
    config = ModelConfig(dim=256, hidden_dim=256, n_layers=1, n_heads=4, n_kv_heads=4, vocab_size=64, context=64)
    rng = np.random.default_rng(0)
    weights = {
        name: Weight(shape, F32, rng.standard_normal(shape).astype(np.float32))
        for name, shape in config.weight_shapes().items()
    }
    WRITERS["llama2c-v1"](tmp_path / "m.bin", config, weights)
    for name, more in (("plain", ("--no-calibrate",)), ("own", ())):
        done = call(capsys, "export", tmp_path / "m.bin", tmp_path / name, "--to", "gguf", "--dtype", "q4_k", *more)
        assert done.code == 0 and ("so all inputs count alike: m.bin carries no tokenizer" in done.err) == (
            name == "own"
        ), done.err
    assert (tmp_path / "own").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "target", "what"),
    [
        ("q5_0", "m.gguf", "its rows of 40 elements are not a whole number of blocks of 32"),
        ("q4_k", "none/m.gguf", "there is no folder"),
        ("q4_k", "m.bin", "is what is read, and would be lost"),
    ],
)
def test_what_cannot_be_written_is_not_measured(
    dtype: str,
    target: str,
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To run a large model takes minutes."""

    def measured(*arguments: Any) -> None:
        raise AssertionError("it runs the model")

    monkeypatch.setattr("numballama.importance.measure", measured)
    (tmp_path / "text.txt").write_text(TEXT)
    config = ModelConfig(dim=40, hidden_dim=64, n_layers=1, n_heads=4, n_kv_heads=4, vocab_size=64, context=64)
    WRITERS["llama2c-v1"](tmp_path / "m.bin", config, random_checkpoint(config, 0).weights)
    words = ("--to", "gguf", "--dtype", dtype, "--calibrate", tmp_path / "text.txt")
    done = call(capsys, "export", tmp_path / "m.bin", tmp_path / target, *words)
    assert done.code == 1 and what in done.err, done.err


def test_calibration_is_for_types_that_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.gguf"
    done = call(capsys, "export", STORY, out, "--to", "gguf", "--dtype", "q8_0", "--calibrate", "text.txt")
    assert done.code == 1 and "--calibrate is for --dtype q4_k, q5_0, q5_1, q5_k, q6_k; found --dtype q8_0" in done.err
    done = call(capsys, "export", STORY, out, "--to", "gguf", "--dtype", "q4_k", "--calibrate", tmp_path / "none.txt")
    assert done.code == 1 and "none.txt: cannot be read" in done.err
    assert not out.exists()
    flags = ("--calibrate", "text.txt", "--no-calibrate")
    done = call(capsys, "export", STORY, out, "--to", "gguf", "--dtype", "q4_k", *flags)
    assert done.code == 2 and "not allowed with argument --calibrate" in done.err
