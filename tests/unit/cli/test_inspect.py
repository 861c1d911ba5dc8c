"""`numballama inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.command_line import call


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
