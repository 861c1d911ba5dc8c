"""`numballama bench`."""

from __future__ import annotations

import csv
import json
import sys
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


def test_lists_give_csv_json_and_a_picture(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--csv", tmp_path / "speeds.csv", "--svg", tmp_path / "speeds.svg")
    words = ("bench", tiny_file, "--device", "cpu", "--threads", 1, "--max-tokens", 4, "--repeats", 1)
    done = call(capsys, *words, "--prompt-tokens", "3,5", "--sequences", "1,2", "--context", 40, "--json", *files)
    assert done.code == 0 and done.err == ""
    runs = json.loads(done.out)["runs"]
    assert [(run["prompt_tokens"], run["sequences"], run["context"]) for run in runs] == [
        (3, 1, 40), (3, 2, 40), (5, 1, 40), (5, 2, 40),
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "speeds.csv").read_text().splitlines()))
    assert [float(row["decode_tokens_per_second"]) for row in rows] == [run["decode_tokens_per_second"] for run in runs]
    assert (tmp_path / "speeds.svg").read_text().startswith("<svg ")
    one = json.loads(call(capsys, *words, "--prompt-tokens", 3, "--sequences", 2, "--json").out)
    assert one["sequences"] == 2 and one["decode_tokens_per_second"] > 0, "one combination is one object, as ever"


@pytest.mark.parametrize("invariant", [True, False])
def test_reports_say_whether_runs_are_batch_invariant(
    invariant: bool, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("bench", tiny_file, "--device", "cpu", "--threads", 1, "--max-tokens", 2, "--repeats", 1)
    words += ("--batch-invariant",) * invariant
    for lengths in ("3", "3,5"):
        found = json.loads(call(capsys, *words, "--prompt-tokens", lengths, "--json").out)
        assert found["batch_invariant"] is invariant
        text = call(capsys, *words, "--prompt-tokens", lengths).out
        assert ("batch-invariant" in text.splitlines()[0]) is invariant, text


def test_what_a_sweep_refuses(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for words, code, expected in (
        (("--compare", "llama.cpp"), 1, "needs llama-cpp-python: pip install"),
        (("--compare", "vllm"), 2, "llama.cpp"),
        (("--threads", "1,2", "--profile"), 1, "--profile and --trace take one combination"),
        (("--prompt-tokens", "8,x"), 2, "must be a whole number, found 'x'"),
        (("--prompt-tokens", "8,0"), 1, "--prompt-tokens must be at least 1"),
        (("--sequences", "0"), 1, "numballama: --sequences must be at least 1, found 0"),
        (("--max-tokens", "0"), 1, "numballama: --max-tokens must be at least 1, found 0"),
    ):
        done = call(capsys, "bench", tiny_file, "--device", "cpu", "--threads", 1, *words)
        assert done.code == code and expected in done.err and done.out == "", (words, done)
    words = ("--max-tokens", 2, "--repeats", 1, "--prompt-tokens", 3, "--svg", tmp_path / "none" / "a.svg")
    done = call(capsys, "bench", tiny_file, "--device", "cpu", "--threads", 1, *words)
    assert done.code == 1 and "there is no folder" in done.err and done.out == "", "before anything is measured"
