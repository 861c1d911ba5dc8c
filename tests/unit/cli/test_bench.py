"""`numballama bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.command_line import call


@pytest.mark.slow
def test_bench_json_has_the_promised_keys(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("bench", models / "stories260K.bin", "--device", "cpu", "--threads", 2, "--prompt-tokens", 16)
    found = json.loads(call(capsys, *words, "--max-tokens", 8, "--json", "--repeats", 2).out)
    for key in (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "time_to_first_token_s",
        "peak_memory_bytes",
        "bandwidth_fraction",
    ):
        assert found[key] > 0, key
    assert found["tokens"] == 8
    text = call(capsys, *words, "--tokens", 8, "--repeats", 1)  # the old spelling
    assert "tokens/s" in text.out and "GB/s" in text.out and text.err == ""
