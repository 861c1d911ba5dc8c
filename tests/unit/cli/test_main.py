"""The command line as a person and as a pipe meet it: text on stdout, notes on stderr, exit codes."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

LONG = 300


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """One run of the program, its output captured."""
    command = [sys.executable, "-m", "numballama", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG, **options)


@pytest.fixture
def story15m(models: Path) -> tuple[str, ...]:
    return ("--model", str(models / "stories15M.bin"), "--tokenizer", str(models / "llama2_tokenizer.model"))


@pytest.fixture
def model260k(models: Path) -> tuple[str, str]:
    return str(models / "stories260K.bin"), str(models / "tok512.model")


def test_story_tells_a_story(story15m: tuple[str, ...]) -> None:
    done = run("story", *story15m, "--temperature", 0, "--length", 30)
    assert done.returncode == 0
    assert done.stdout.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")
    assert done.stdout.endswith("\n")
    assert done.stderr == "", "quiet when piped"


def test_story_prints_its_opening_and_follows_the_seed(story15m: tuple[str, ...]) -> None:
    first, second, other = (
        run("story", "A dog", *story15m, "--seed", seed, "--length", 20).stdout for seed in (1, 1, 2)
    )
    assert first.startswith("A dog") and first == second != other


def test_the_package_tells_a_story_by_itself(tmp_path: Path) -> None:
    done = run("story", "--seed", 1, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("Once upon a time") and len(done.stdout) > 200
    assert done.stdout == run("story", "--seed", 1, cwd=tmp_path).stdout
    assert run("story", "--opening", "rain", "--length", 9, cwd=tmp_path).stdout.startswith(
        "It was a rainy day and Tom"
    )
    assert run("story", "--opening", "snow").returncode == 2


def test_generate_prints_the_continuation_only(model260k: tuple[str, str]) -> None:
    model, tokenizer = model260k
    words = ("generate", model, "--tokenizer", tokenizer, "--temperature", 0, "--max-tokens", 20)
    direct = run(*words, "Once upon")
    piped = run(*words, "-", input="Once upon")
    assert direct.returncode == 0 and direct.stdout == piped.stdout
    assert direct.stdout.startswith(" a time, there was")


def test_generate_stops_before_a_stop_string(model260k: tuple[str, str]) -> None:
    model, tokenizer = model260k
    words = ("generate", model, "Once upon", "--tokenizer", tokenizer, "--temperature", 0)
    assert run(*words, "--stop", "there", "--stop", "never").stdout == " a time, \n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("generate", "missing.bin", "x"), "missing.bin"),
        (("generate", "{model}", "x"), "--tokenizer"),
        (("generate", "{model}", "", "--tokenizer", "{tokenizer}"), "empty"),
        (("generate", "{model}", "x", "--tokenizer", "{tokenizer}", "--temperature", "-1"), "temperature"),
        (("generate", "{model}", "x", "--tokenizer", "{tokenizer}", "--device", "cuda:99"), "cuda"),
        (("generate", "{model}", "x", "--tokenizer", "{tokenizer}", "--dtype", "q3_k"), "q3_k"),
        (("generate", "{model}", "x", "--tokenizer", "{tokenizer}", "--context", "0"), "context"),
        (("bench", "{model}", "--prompt-tokens", "1000"), "--context"),
        (("inspect", "{tokenizer}"), "{tokenizer}"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(model260k: tuple[str, str], words: tuple[str, ...], expected: str) -> None:
    names = {"model": model260k[0], "tokenizer": model260k[1]}
    done = run(*(word.format(**names) for word in words))
    assert done.returncode == 1, done.stderr
    assert expected.format(**names) in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("numballama: ") and done.stdout == ""


@pytest.mark.parametrize("words", [(), ("sing",), ("generate",), ("story", "--temperature", "warm")])
def test_wrong_usage_exits_with_2(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 2 and "usage" in done.stderr


@pytest.mark.parametrize("command", ["story", "generate", "chat", "inspect", "bench"])
def test_help_names_every_option(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0 and "usage: numballama" in done.stdout
    assert "--tokenizer" in done.stdout


def test_inspect_reports_without_numbers_of_weights(model260k: tuple[str, str]) -> None:
    done = run("inspect", *model260k[:1], "--tokenizer", model260k[1])
    assert done.returncode == 0
    for word in ("llama2.c v0", "n_kv_heads", "KV cache", "layers.0.wq", "rmsnorm", "norm_qkv", "saved", "512 tokens"):
        assert word in done.stdout
    assert "layers.4.wq:" not in done.stdout
    assert "layers.4.wq:" in run("inspect", model260k[0], "--full").stdout


def test_inspect_json(model260k: tuple[str, str]) -> None:
    found = json.loads(run("inspect", model260k[0], "--json").stdout)
    assert found["config"]["n_kv_heads"] == 4 and found["parameters"] == 260032
    assert found["tensors"]["layers.0.wk"] == {"type": "f32", "shape": [32, 64]}


def test_doctor_says_what_there_is(tmp_path: Path) -> None:
    done = run("doctor", env=os.environ | {"NUMBALLAMA_CACHE": str(tmp_path)})
    assert done.returncode == 0 and done.stderr == ""
    for word in ("numballama ", "numba ", "cores", str(tmp_path), "CUDA ", "device='auto' takes"):
        assert word in done.stdout


def test_bench_json_has_the_promised_keys(model260k: tuple[str, str]) -> None:
    words = ("bench", model260k[0], "--device", "cpu", "--threads", 2, "--prompt-tokens", 16, "--tokens", 8)
    found = json.loads(run(*words, "--json", "--repeats", 2).stdout)
    for key in (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "time_to_first_token_s",
        "peak_memory_bytes",
        "bandwidth_fraction",
    ):
        assert found[key] > 0, key
    text = run(*words, "--repeats", 1)
    assert "tokens/s" in text.stdout and "GB/s" in text.stdout and text.stderr == ""


def on_terminal(words: tuple[object, ...], until: str, then: int | None = None) -> tuple[str, str, int]:
    """Run with a terminal as stderr; once stdout holds `until`, send a signal. Returns stdout, what the terminal showed
    and the exit code."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "numballama", *map(str, words)], stdout=subprocess.PIPE, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    assert process.stdout is not None
    text = b""
    deadline = time.monotonic() + LONG
    while until.encode() not in text and time.monotonic() < deadline:
        more = os.read(process.stdout.fileno(), 4096)
        if not more:
            break
        text += more
    if then is not None:
        process.send_signal(then)
    rest, _ = process.communicate(timeout=LONG)
    shown = b""
    try:
        while more := os.read(ours, 4096):
            shown += more
    except OSError:  # the terminal is gone with its last writer
        pass
    os.close(ours)
    return (text + rest).decode(), shown.decode(errors="replace"), process.returncode


def test_a_terminal_gets_notes_and_speed(story15m: tuple[str, ...]) -> None:
    text, shown, code = on_terminal(("story", *story15m, "--temperature", 0, "--length", 20), "Once")
    assert code == 0 and text.startswith("Once upon a time")
    assert "KV cache" in shown and "tokens/s" in shown and "assumed" in shown
    quiet = on_terminal(("story", *story15m, "--length", 5, "--quiet"), "")
    assert quiet[1] == ""


def test_ctrl_c_keeps_the_text(story15m: tuple[str, ...]) -> None:
    """The story takes half a second with one worker; the signal comes with its first words."""
    words = ("story", *story15m, "--temperature", 0, "--threads", 1)
    text, shown, code = on_terminal(words, "Once", signal.SIGINT)
    whole = run(*words).stdout
    assert code == 130, shown
    assert len(text) < len(whole) and text.endswith("\n") and whole.startswith(text.rstrip("\n"))
    assert "interrupted" in shown and "Traceback" not in shown


def test_a_closed_pipe_is_no_error(story15m: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "numballama", "story", *story15m],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(timeout=LONG) in (0, 141) and errors == ""
    process.stderr.close()
