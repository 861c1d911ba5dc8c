"""`numballama bench`."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from numballama.bench import profiler
from numballama.bench.profiler import Profile
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


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="processes inherit a file")
def test_several_gpus(
    ranks_for_gpus: None, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table has a column, and below it the scaling with what communication costs; so have CSV and JSON."""
    words = ("bench", tiny_file, "--device", "cpu", "--threads", 1, "--max-tokens", 4, "--repeats", 1)
    words += ("--prompt-tokens", 5, "--gpus")
    done = call(capsys, *words, "1,2", "--sequences", "1,2", "--csv", tmp_path / "speeds.csv")
    assert done.code == 0 and done.err == ""
    table, scaling = done.out.split("\n\n")
    assert table.splitlines()[1].split()[0] == "gpus"
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["1", "1", "2", "2"]
    head, *lines = scaling.splitlines()
    assert head.split() == [
        "gpus",
        "over",
        "context",
        "sequences",
        "prompt",
        "prompt",
        "×",
        "decode",
        "×",
        "communication",
    ]
    assert [line.split()[:2] for line in lines] == [["2", "1"]] * 2
    assert re.search(r"  [\d,]+ µs of [\d,]+ µs a token$", lines[0])
    assert re.search(r"  [\d,]+ µs of [\d,]+ µs a step of 2 sequences$", lines[1])
    rows = list(csv.DictReader((tmp_path / "speeds.csv").read_text().splitlines()))
    assert [row["gpus"] for row in rows] == ["1", "1", "2", "2"]
    assert [bool(row["communication_s"]) for row in rows] == [False, False, True, True]
    found = json.loads(call(capsys, *words, "1,2", "--json").out)
    one, two = found["runs"]
    assert (one["gpus"], one["communication_s"], two["gpus"]) == (1, None, 2) and two["communication_s"] >= 0
    (scaled,) = found["scaling"]
    assert scaled["decode_ratio"] == two["decode_tokens_per_second"] / one["decode_tokens_per_second"]
    assert (scaled["gpus"], scaled["over_gpus"], scaled["communication_s"]) == (2, 1, two["communication_s"])
    text = call(capsys, *words, 2).out
    assert "shared by 2 GPUs" in text.splitlines()[0] and re.search(
        r"communication [\d,]+ µs of [\d,]+ µs a token", text
    )
    alone = json.loads(call(capsys, *words, 1, "--json").out)
    assert alone["gpus"] == 1 and alone["communication_s"] is None


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="processes inherit a file")
def test_profile_of_several_gpus(
    ranks_for_gpus: None, tiny_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of rank 0, and what exchanges take. Bytes are rank 0's: about half of those of one GPU."""
    made: list[Profile] = []

    def profile(*arguments: Any) -> Profile:
        made.append(profile_of(*arguments))
        return made[-1]

    profile_of = profiler.profile
    monkeypatch.setattr(profiler, "profile", profile)
    monkeypatch.setattr("numballama.cpu.timing.ROUNDS", 3)
    words = ("bench", tiny_file, "--device", "cpu", "--threads", 1, "--max-tokens", 2, "--repeats", 1)
    words += ("--prompt-tokens", 5, "--profile", "--gpus")
    text, _ = (call(capsys, *words, gpus).out for gpus in (2, 1))
    found, alone = (each.to_dict() for each in made)
    assert (found["ranks"], alone["ranks"]) == (2, 1) and found["prompt"] is None and alone["prompt"]["steps"]
    (part,) = [each for each in found["parts"] if each["part"] == "communication"]
    kinds = {row["name"]: row for row in found["rows"]}
    assert part["count"] == kinds["all_reduce"]["count"] + kinds["all_gather"]["count"]
    assert kinds["all_gather"]["count"] == 1 and kinds["all_reduce"]["count"] % 2 == 0
    assert all(step["seconds"] > 0 for step in found["steps"]) and found["whole_step_s"] > 0
    assert 0.4 < found["bytes"] / alone["bytes"] < 0.75
    assert "communication" not in {each["part"] for each in alone["parts"]}
    micros = re.search(r"communication ([\d,]+) µs of [\d,]+ µs a token", text)
    assert micros is not None and int(micros[1].replace(",", "")) == round(part["seconds"] * 1e6)
    assert re.search(r"^  communication +\d+ +[\d,]+\.\d\d ", text, re.M) and "2 ranks in processes" in text
    assert "Steps, bytes and memory are those of rank 0 of 2" in text


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
        (("--gpus", "1,2"), 1, "--gpus 2 is for GPUs: on --device cpu all cores share the model"),
        (("--gpus", "1,0"), 1, "--gpus must be at least 1, found 0"),
        (("--gpus", "1,2", "--profile"), 1, "--gpus 2 is for GPUs: on --device cpu"),
        (("--gpus", "2", "--compare", "llama.cpp"), 1, "--compare measures both on one GPU: leave out --gpus"),
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
