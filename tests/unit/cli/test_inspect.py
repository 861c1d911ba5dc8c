"""`numballama inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.command_line import call
from tests.helpers.markup import parsed, tags


def test_inspect_reports_without_numbers_of_weights(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = models / "stories260K.bin", models / "tok512.model"
    done = call(capsys, "inspect", model, "--tokenizer", tokenizer)
    assert done.code == 0
    for word in ("llama2.c v0", "n_kv_heads", "KV cache", "layers.0.wq", "rmsnorm", "norm_qkv", "saved", "512 tokens"):
        assert word in done.out
    assert "layers.4.wq:" not in done.out
    assert "layers.4.wq:" in call(capsys, "inspect", model, "--full").out


def test_inspect_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(call(capsys, "inspect", models / "stories260K.bin", "--json").out)
    assert found["config"]["n_kv_heads"] == 4 and found["parameters"] == 260032
    assert found["tensors"]["layers.0.wk"] == {"type": "f32", "shape": [32, 64]}


def test_inspect_for_a_context_and_types(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--context", 64, "--kv-dtype", "q8_0", "--max-sequences", 3)
    text = call(capsys, "inspect", tiny_file, *words).out
    assert "192 tokens, q8_0; 3 sequences of up to 64" in text and "\x1b" not in text
    found = json.loads(call(capsys, "inspect", tiny_file, *words, "--json").out)
    assert (found["context"], found["kv_dtype"], found["max_sequences"]) == (64, "q8_0", 3)
    assert found["memory"]["total"] == sum(found["memory"].values()) - found["memory"]["total"]
    done = call(capsys, "inspect", tiny_file, "--kv-dtype", "f8")
    assert done.code == 1 and done.out == "" and "choose from f32, f16, bf16, q8_0" in done.err


def test_inspect_writes_a_page(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    done = call(capsys, "inspect", tiny_file, "--html", page)
    assert done.code == 0 and done.out == ""
    assert {"details", "svg", "table"} <= tags(parsed(page.read_text(encoding="utf-8")))
    assert call(capsys, "inspect", tiny_file, "--html", tmp_path / "no" / "page.html").code == 1
