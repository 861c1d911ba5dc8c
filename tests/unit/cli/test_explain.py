"""`numballama explain`."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

import numballama
from numballama.errors import Error
from tests.helpers.command_line import call


@pytest.fixture
def words(tiny_file: Path, tiny_tokenizer: Path) -> list[object]:
    return ["explain", tiny_file, "--tokenizer", tiny_tokenizer, "--device", "reference"]


def test_a_report_without_colours(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, *words, "the story", "--layer", 0, "--head", 1)
    assert done.code == 0 and done.err == ""
    assert done.out.startswith("llama2c-v0.bin: ") and "\x1b" not in done.out
    for part in ("likeliest in its place", "attention of layer 0, head 1", "logit lens", "layer 1"):
        assert part in done.out
    assert "logit lens" not in call(capsys, *words, "the story", "--no-lens").out


def test_json(words: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the story"))
    found = json.loads(call(capsys, *words, "-", "--json", "--logprobs", 2).out)
    assert len(found["tokens"]) > 1 and len(found["tokens"][1]["alternatives"]) == 2


def test_a_page(words: list[object], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = call(capsys, *words, "<b>", "--html", page)
    assert done.code == 0 and done.out == ""
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "<b>" not in text
    done = call(capsys, *words, "a", "--html", tmp_path / "no" / "page.html")
    assert done.code == 1 and "there is no folder" in done.err


def test_special_tokens_of_the_text(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    def ids(*more: object) -> list[int]:
        found = json.loads(call(capsys, *words, "</s>", "--json", *more).out)
        return [token["id"] for token in found["tokens"]]

    assert 2 in ids("--special") and 2 not in ids()


def test_errors_name_the_option(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, *words, "a", "--layer", 2)
    assert done.code == 1 and "--layer must be 0 to 1, found 2" in done.err
    assert "--tokenizer" in call(capsys, "explain", words[1], "a", "--device", "reference").err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="processes inherit a file")
def test_several_gpus(
    ranks_for_gpus: None, tiny_file: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same probabilities as of one, without what is split; what is exchanged, and the plan of rank 0."""
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu", threads=1) as alone:
        one, config = alone.explain("the story"), alone.config
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu", threads=1, gpus=2) as several:
        two = several.explain("the story")
        assert several.notes[-1] == "attention and what layers would predict are split over 2 GPUs: not shown"
        with pytest.raises(
            Error, match=r"attention is split over 2 GPUs: explain\(\) shows a layer or a head with gpus=1"
        ):
            several.explain("the story", layer=0)
    assert two.attention is two.lens is None and one.lens
    for a, b in zip(one.tokens[1:], two.tokens[1:], strict=True):
        assert a.id == b.id and b.logprob == pytest.approx(a.logprob, abs=1e-4)
    words = ["explain", tiny_file, "--tokenizer", tiny_tokenizer, "--device", "cpu", "--threads", 1, "the story"]
    done = call(capsys, *words, "--gpus", 2)
    assert done.code == 0 and done.err == "" and "likeliest in its place" in done.out
    assert "attention and the guesses of layers are split over 2 GPUs: --gpus 1 shows them" in done.out
    total = 2 * config.n_layers * 4 * config.dim + 2 * config.vocab_size
    for line in (
        f"{2 * config.n_layers} all_reduce  {4 * config.dim:,} bytes from each rank to each other",
        f"1 all_gather  {2 * config.vocab_size:,} bytes from each rank to each other",
        f"together up to {total:,} bytes that a rank writes",
    ):
        assert line in done.out
    assert "rank 0 of 2 on cpu" in done.out and "layers.0.wq" in done.out and "layers.1.wq" not in done.out
