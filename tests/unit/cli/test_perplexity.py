"""`numballama perplexity`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.command_line import call

WORDS = "the story of abc, the story of cab " * 12


@pytest.fixture
def words(tiny_file: Path, tiny_tokenizer: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "text.txt").write_text(WORDS)
    model = ["--tokenizer", tiny_tokenizer, "--device", "cpu", "--threads", 1]
    return ["perplexity", tiny_file, tmp_path / "text.txt", "--context", 40, *model]


def test_text_and_json(words: list[object], tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, *words, "--chunks", 2, "--kl", tiny_file, "--json")
    assert done.code == 0 and done.err == "", "quiet when piped"
    found = json.loads(done.out)
    assert found["windows"] == 2 and found["tokens"] == 2 * 19 and found["dtype"] is None
    assert found["perplexity"] > 1 and found["divergence"]["mean"] == 0
    text = call(capsys, *words, "--chunks", 2)
    assert text.code == 0 and f"perplexity {found['perplexity']:.4f} ± " in text.out


def test_a_table_of_types(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, *words, "--dtype", "f32,f16,bf16")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == ["type", "f32", "f16", "bf16", "KL"]
    f16, bf16 = (float(line.split()[5]) for line in lines[2:4])
    assert 0 < f16 < bf16, "fewer bits of mantissa, more divergence from f32"
    found = json.loads(call(capsys, *words, "--dtype", "f32,f16", "--json").out)
    assert [each["dtype"] for each in found] == ["f32", "f16"] and found[1]["divergence"]["mean"] > 0


def test_errors(words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("the story")
    for change, expected in (
        ({2: tmp_path / "none"}, "none: cannot be read: No such file or directory"),
        ({2: tmp_path / "latin1"}, "latin1: not a text; at byte 3; expected UTF-8; found 0xe9"),
        ({2: tmp_path / "empty"}, "empty: there is no text in it"),
        ({2: tmp_path / "short"}, "fewer than a window of 40; pass a longer text, or a smaller --context"),
        ({1: tmp_path / "none.gguf"}, "none.gguf"),
        ({4: 2}, "--context must be at least 3"),
    ):
        done = call(capsys, *(change.get(place, word) for place, word in enumerate(words)))
        assert done.code == 1 and expected in done.err and done.err.count("\n") == 1, done.err
    done = call(capsys, *words, "--dtype", "f32,q3")
    assert done.code == 1 and "q3" in done.err and done.out == "", "before anything is measured"
    assert call(capsys, *words, "--chunks", 0).err == "numballama: --chunks must be at least 1, found 0\n"
