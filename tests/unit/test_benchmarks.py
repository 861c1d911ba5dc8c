"""The benchmark of the GPU backend, run on the CPU with a stand-in for llama.cpp: what it writes and prints."""

import importlib.util
import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from numballama.kernel_cache import cache_root
from tests.helpers.cuda_host import HostDevice, HostGraph, HostMemory, install, missing_packages
from tests.helpers.extent import EVERYTHING
from tests.helpers.fake_nccl import FakeNccl

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"

LLAMA_BENCH = f"""#!{sys.executable}
import json, sys
from numballama import loader
words = sys.argv[1:]
options = dict(zip(words[::2], words[1::2]))
checkpoint = loader.open_checkpoint(options["-m"])
assert {{str(w.type) for n, w in checkpoint.weights.items() if len(w.shape) == 2}} == {{"f16"}}
assert (options["-p"], options["-n"], options["-ngl"], options["-o"]) == ("512", "128", "99", "json")
print(json.dumps([
    {{"build_commit": "abc", "n_prompt": 512, "n_gen": 0, "avg_ts": 7000.0, "samples_ts": [6000.0, 9000.0, 6500.0]}},
    {{"build_commit": "abc", "n_prompt": 0, "n_gen": 128, "avg_ts": 700.0, "samples_ts": [600.0, 900.0, 650.0]}},
]))
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_cuda", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmarks_cuda", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(LLAMA_BENCH)
    program.chmod(0o755)
    out = tmp_path / "out.json"
    words = ["--device", "cpu", "--quick", "--only-models", "--models", "stories260K:f16", "stories260K:q8_0"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--out", str(out)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    found = result["models"]["stories260K:f16"]
    assert found["decode_tokens_per_second"] > 0 and found["prefill_tokens_per_second"] > 0
    assert len(found["decode_rounds"]) == result["rounds"] == 3
    peer = {"decode_tokens_per_second": 650, "prefill_tokens_per_second": 6500, "build": "abc"}
    assert found["llama.cpp"] == peer
    assert "blocks of 32" in result["models"]["stories260K:q8_0"]["error"], "one failure does not end the run"
    assert "| 650, 6,500 |" in done.stdout and "| stories260K | q8_0 | failed" in done.stdout


def test_table_says_what_was_reached(script: ModuleType) -> None:
    def found(decode: float, prompt: float | None = None) -> dict[str, float | None]:
        return {"decode_tokens_per_second": decode, "prefill_tokens_per_second": prompt, "bandwidth_fraction": 0.5}

    result = {
        "device": "cuda", "rounds": 7, "commit": "abc", "memory_bandwidth_bytes_per_second": 4.3e12,
        "machine": {"date": "2026-01-01", "gpu": {"name": "a GPU", "driver": "580.1"}},
        "models": {
            "TinyLlama-1.1B:bf16": found(1500), "TinyLlama-1.1B:q4_0": found(1299), "Llama-2-7B:f16": found(260, 34000),
        },
        "context": {"model": "m", "near": 128, "far": 4096, "ratio": 1.3},
        "first_token": {"model": "m", "cached_s": 2.0, "empty_cache_s": 30.0, "compilation_s": 28.0},
    }  # fmt: skip
    text = script.table(result)
    assert "a GPU, driver 580.1, 2026-01-01, commit abc; a copy moves 4,300 GB/s" in text
    rows = {tuple(line.split(" | ")[:2]): line for line in text.splitlines()}
    assert rows["| TinyLlama-1.1B", "bf16"].endswith("| 764 | 1,150 | 1,470 | aim |")
    assert rows["| TinyLlama-1.1B", "q4_0"].endswith("| **missed** |")
    assert rows["| Llama-2-7B", "f16"].endswith("| must |") and "aim 40,000: must" in rows["| Llama-2-7B", "f16"]
    assert "| 1.30× | ≤ 1.2× | **missed** |" in text and "| 2.00 s | ≤ 2.5 s | must |" in text


def test_models_are_chosen(script: ModuleType) -> None:
    assert {case.shape for case in script.chosen(None, True)} == {"stories15M", "TinyLlama-1.1B", "Llama-3.2-1B"}
    assert [case.name for case in script.chosen(["Llama-3.2-1B", "stories42M:q8_0"], False)] == [
        "Llama-3.2-1B:bf16", "stories42M:q8_0"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="no shape"):
        script.chosen(["GPT-9"], False)


@pytest.mark.slow
def test_far_context(script: ModuleType) -> None:
    cost = script.context_cost("cpu", 1, "stories260K", 256)
    assert cost["far"] == 256 and cost["near"] == 128 and cost["ratio"] > 0


@pytest.mark.slow
def test_first_token(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start has an empty cache, which others use. By default the starts are not timed: kernels are compiled
    for half a minute."""
    if EVERYTHING:
        found = script.first_tokens("cpu", [], 1)
        assert 0 < found["cached_s"] < found["empty_cache_s"]
    assert script.first_token_s("cpu", [], str(cache_root())) > 0
    seen: list[list[str]] = []

    def start(device: str, story: list[str], cache: str) -> float:
        seen.append(os.listdir(cache))
        Path(cache, str(len(seen))).touch()
        return 10.0 / len(seen)

    monkeypatch.setattr(script, "first_token_s", start)
    found = script.first_tokens("cpu", [], 3)
    assert [len(files) for files in seen] == [0, 1, 2, 3]
    assert (found["cached_s"], found["empty_cache_s"]) == (10 / 3, 10) and found["compilation_s"] == 10 - 10 / 3


# Many sequences


@pytest.mark.slow
@pytest.mark.parametrize("invariant", [True, False])
def test_many_sequences(tmp_path: Path, invariant: bool) -> None:
    out = tmp_path / "batched.json"
    words = [
        "--device",
        "cpu",
        "--models",
        "stories260K:f16",
        "--sequences",
        "1",
        "2",
        "--prompt",
        "4",
        "--tokens",
        "20",
    ]
    words += ["--rounds", "1", "--out", str(out), *["--batch-invariant"] * invariant, "--threads", "1"]
    command = [sys.executable, str(SCRIPT.with_name("batched.py")), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["batch_invariant"] is invariant
    assert all(found["models"]["stories260K:f16"][count]["tokens_per_second"] > 0 for count in ("1", "2"))


def test_many_sequences_beside_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in ("gpu", "batched"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    batched = importlib.import_module("batched")
    program = tmp_path / "llama-batched-bench"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "words = sys.argv\n"
        "after = lambda name: words[words.index(name) + 1]\n"
        "assert pathlib.Path(after('-m')).read_bytes()[:4] == b'GGUF'\n"
        "assert after('-t') == '2' and after('-c') in ('30', '70')\n"
        "print('loading')\n"
        "for count in map(int, after('-npl').split(',')):\n"
        "    print(json.dumps({'pl': count, 'speed_tg': 10.0 * count}))\n"
        "sys.exit(after('-npl') == '7' and 'no memory')\n"
    )
    program.chmod(0o755)
    checkpoint = batched.random_checkpoint("stories260K", "f16")
    found = batched.llama_batched_bench(str(program), checkpoint, [1, 3], 4, 6, 2, 2)
    assert found["3"] == {"tokens_per_second": 30.0, "rounds": [30.0, 30.0]} and list(found) == ["1", "3"]
    refused = batched.llama_batched_bench(str(program), checkpoint, [7], 4, 6, 1, 2)
    assert refused == {"error": "no memory"}


# Two checkouts

COMPARE = SCRIPT.with_name("compare.py")


def compare(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(COMPARE), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_comparing_a_checkout_with_itself(tmp_path: Path) -> None:
    out = tmp_path / "compare.json"
    words = ["--against", COMPARE.parents[1], "--device", "cpu", "--threads", 1, "--rounds", 2, "--tokens", 4]
    words += ["--prompt-tokens", 8, "--models", "stories260K:f32", "--out", out]
    done = compare(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["models"]["stories260K:f32"]
    assert found["this"]["tokens"] == 4 and found["against"]["prompt_tokens"] == 8
    for what in ("decode", "prefill"):
        assert found[what]["this_tokens_per_second"] > 0 and len(found[what]["rounds"]["against"]) == 2
        assert found[what]["ratio"] > 0 and found[what]["ratio_of_best"] > 0
    assert "| stories260K:f32 |" in done.stdout
    again = compare(*words)
    assert again.returncode == 0 and again.stderr == "", "what the file has is not measured again"
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_a_checkout_that_fails_does_not_end_the_comparison(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu.py").write_text("raise SystemExit('of a test')")
    done = compare("--against", tmp_path, "--device", "cpu", "--models", "stories260K:f32", "--rounds", 1)
    assert done.returncode == 0 and "of a test" in done.stderr
    assert "| stories260K:f32 | failed: " in done.stdout and "ended with exit status 1" in done.stdout


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    assert "--against PATH is missing" in compare().stderr
    assert "it is no checkout of numballama" in compare("--against", tmp_path).stderr


@pytest.mark.slow
def test_turns(tmp_path: Path) -> None:
    """Each side is asked once a round; a peer that ends is named."""
    peer, out = tmp_path / "peer", tmp_path / "out.json"
    peer.write_text(f"#!{sys.executable}\nimport sys\nprint('ready', flush=True)\nfor _ in sys.stdin:\n"
                    "    print('[0.5, 0.25]', flush=True)\n")  # fmt: skip
    peer.chmod(0o755)
    model = Path(__file__).parents[2] / "numballama" / "story.gguf"
    words = [sys.executable, str(SCRIPT.parent / "turns.py"), str(model), "--rounds", "2", "--sequences", "2"]
    words += ["--prompt-tokens", "8", "--tokens", "4", "--activations", "f32", "--out", str(out), "--llama-cpp"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*words, str(peer)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["models"]["story.gguf"]
    assert found["llama.cpp"]["prompt_tokens_per_second"] == 2 * 8 / 0.5
    assert found["llama.cpp"]["decode_tokens_per_second"] == 2 * 4 / 0.25
    assert len(found["f32"]["seconds"]) == 2 and found["f32"]["prompt_tokens_per_second"] > 0
    assert found["f32"]["prompt_of_llama_cpp"] == found["f32"]["prompt_tokens_per_second"] / 32
    peer.write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
    done = subprocess.run([*words, str(peer)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 1 and "a side has ended with exit status 3" in done.stderr


# Several GPUs


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="processes inherit a file")
def test_ranks(tmp_path: Path) -> None:
    """On the CPU, with processes in place of GPUs. What the file has is not measured again; a failure is named."""
    out = tmp_path / "ranks.json"
    words = ["--device", "cpu", "--gpus", "1,2", "--prompt", "40", "--tokens", "60", "--sequences", "2"]
    words += ["--rounds", "1", "--folder", str(tmp_path), "--json", str(out), "--models", "tiny:q8_0"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT.with_name("ranks.py")), *words, *more]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)

    done = run()
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["ranks.json"], "the model's file is deleted"
    first = json.loads(out.read_text())
    one, two = (first["models"]["tiny:q8_0"][count] for count in ("1", "2"))
    for found in (one, two):
        for what in ("decode", "batch", "prefill"):
            assert found[f"{what}_tokens_per_second"] > 0
    assert one["communication_s"] is one["batch_communication_s"] is None
    assert two["communication_s"] >= 0 and two["batch_communication_s"] >= 0
    assert first["machine"]["cores"] and "machine" not in one
    assert "2 ranks in processes" in two["device"] and "2 ranks" not in one["device"]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "tiny" in line]
    assert [row[1] for row in rows] == ["1", "2"] and rows[0][-1] == "– |" and "missed" not in done.stdout
    assert float(rows[1][-3]) == round(two["decode_tokens_per_second"] / one["decode_tokens_per_second"], 2)
    again = run("tiny:q4_k")
    assert again.returncode == 0 and "tiny:q8_0" not in again.stderr
    models = json.loads(out.read_text())["models"]
    assert models["tiny:q8_0"] == first["models"]["tiny:q8_0"] and "blocks of 256" in models["tiny:q4_k"]["1"]["error"]
    assert "no model 'GPT-9'" in run("GPT-9").stderr


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in ("gpu", "batched", "ranks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("ranks")


def test_table_of_ranks_says_what_was_reached(ranks: ModuleType) -> None:
    def found(decode: float, batch: float, prompt: float, communication: float | None) -> dict[str, Any]:
        return {
            "decode_tokens_per_second": decode, "batch_tokens_per_second": batch, "prefill_tokens_per_second": prompt,
            "communication_s": communication, "batch_communication_s": communication, "bandwidth_fraction": 0.5,
        }  # fmt: skip

    result: dict[str, Any] = {
        "device": "cuda", "commit": "abc",
        "machine": {"date": "2026-01-01", "gpu": {"name": "a GPU", "driver": "580.1"}},
        "sizes": {"prompt": 2048, "tokens": 128, "sequences": 64, "rounds": 5},
        "models": {
            "Llama-2-7B:f16": {"1": found(278, 7500, 35000, None), "2": found(430, 12750, 52500, 0.0003)},
            "Llama-2-7B:q8_0": {"1": found(400, 8000, 30000, None), "2": found(520, 12000, 60000, 0.0003)},
            "Llama-2-7B:q4_0": {"1": {"error": "DeviceError: of a test"}, "2": found(1, 1, 1, 0.1)},
        },
    }  # fmt: skip
    assert ranks.table(result).startswith("a GPU, driver 580.1, 2026-01-01, commit abc; medians of 5.")
    rows = [line for line in ranks.table(result).splitlines() if line.startswith("| Llama")]
    assert rows[0].endswith("| 7,500 | – | 35,000 | – | – | – |") and "430 (must)" in rows[1]
    assert "| 300 of 2,326 µs | 12,750 | 300 of 5,020 µs |" in rows[1]
    assert rows[1].endswith("| 1.55 | 1.70 (must) | 1.50 (**missed**) |")
    assert rows[3].endswith("| 1.30 (**missed**) | 1.50 (**missed**) | 2.00 (must) |")
    assert "failed: DeviceError: of a test" in rows[4] and rows[5].endswith("| – | – | – |"), "nothing to compare with"


def test_a_model_needs_room_on_the_disk(ranks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "ROOM", 1 << 60)
    with pytest.raises(OSError, match="pass a --folder with more"), ranks.written(ranks.Case("tiny", "f16"), tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_models_of_ranks_are_chosen(ranks: ModuleType) -> None:
    assert [case.name for case in ranks.chosen(None, True)][-2:] == ["Llama-3.1-8B:bf16", "Llama-2-70B:q8_0"]
    assert ranks.chosen(["Llama-2-7B:q8_0", "tiny:f16"], False) == [ranks.CASES[1], ranks.Case("tiny", "f16")]
    weights = ranks.random_weights(ranks.SHAPES["tiny"], "q8_0")
    assert {name: weight.shape for name, weight in weights.items()} == ranks.SHAPES["tiny"].weight_shapes()


# Failures of a rank


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in ("gpu", "batched", "ranks", "left_behind", "faulty_rank", "rank_moments", "rank_failures"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("rank_failures")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_failures_of_a_rank(tmp_path: Path) -> None:
    """One on the CPU, which the file then has."""
    out = tmp_path / "failures.json"
    command = [sys.executable, str(SCRIPT.with_name("rank_failures.py")), "--device", "cpu", "--json", str(out)]
    command += ["--moments", "idle", "--ways", "kill"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    (found,) = json.loads(out.read_text())["failures"]
    assert (found["moment"], found["way"], found["problems"]) == ("idle", "kill", []) and found["seconds"] < 2
    assert found["errors"] == ["rank 1 ended with signal SIGKILL; the model must be compiled again"]
    assert "| idle | 0." in done.stdout and "0 of 1 failures with something wrong" in done.stdout


def test_table_of_failures_says_what_is_wrong(failures: ModuleType) -> None:
    def failure(moment: str, way: str, seconds: float | None, *problems: str) -> dict[str, Any]:
        return {"moment": moment, "way": way, "seconds": seconds, "errors": [], "problems": problems}

    result = {
        "device": "cuda", "gpus": 2, "commit": "abc", "machine": {"date": "2026-01-01"},
        "failures": [
            failure("idle", "kill", 0.015), failure("idle", "loop", 2.5, "2.50 s"),
            failure("ranks connect", "exit", None, "TimeoutError: of a test"),
        ],
    }  # fmt: skip
    text = failures.table(result)
    assert (
        "2 ranks on cuda, 2026-01-01, commit abc" in text and "| ranks connect | – | **–, wrong** | – | – | – |" in text
    )
    assert "| idle | 0.01 | – | – | – | **2.50, wrong** |" in text and "2 of 3 failures" in text
    assert text.endswith("* ranks connect, exit: TimeoutError: of a test")
    assert failures.ways_of("idle", failures.WAYS, "cpu") == list(failures.WAYS)
    assert failures.ways_of("graphs are captured", ["kill"], "cpu") == []
    assert failures.ways_of("kernels are prepared", ["kill"], "cuda") == []
    assert failures.ways_of("ranks connect", ["kill", "loop"], "cuda") == ["kill"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_what_is_left_behind(failures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [[8 << 30, 8 << 30]]
    monkeypatch.setattr(failures.LeftBehind, "_free_bytes", lambda self: free[-1])
    before, done = failures.LeftBehind(2), threading.Event()
    assert before.problems([], 0) == []
    thread = threading.Thread(target=done.wait, name="of a test")
    thread.start()
    file = os.memfd_create("numballama of a test")
    os.ftruncate(file, 4096)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        free.append([8 << 30, 7 << 30])
        processes, threads, files, memory = before.problems([os.getpid()], 0)
        assert processes.startswith("processes left: ")
        assert {str(process.pid), str(os.getpid())} == {*processes.partition(": ")[2].split(", ")}
        assert threads.startswith("threads left: of a test") and "memfd:numballama of a test" in files
        assert memory == "GPU 1 keeps 1,074 MB"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert any(each == f"processes left: {process.pid}" for each in before.problems([], 0)), "a zombie"
    with mmap.mmap(file, 4096):
        os.close(file)
        assert any(each.startswith("shared memory left: ") for each in before.problems([], 0))
    done.set()
    thread.join()
    free.append([8 << 30, (8 << 30) - (1 << 20)])
    assert before.problems([process.pid], 1) == []


@pytest.fixture
def all_reduce(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in ("gpu", "all_reduce"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("all_reduce")


def test_the_table_of_all_reduces_says_from_where_nccl_is_faster(all_reduce: ModuleType) -> None:
    seconds = {
        "4096": {"words": 2e-6, "flags": 4e-6, "nccl": 8e-6},
        "65536": {"words": 5e-6, "flags": 6e-6, "nccl": 4e-6},
        "1048576": {"words": 30e-6, "flags": 20e-6, "nccl": 25e-6},
        "4194304": {"words": 90e-6, "flags": 70e-6, "nccl": 50e-6},
        "67108864": {"words": 2e-3, "flags": 1e-3, "nccl": 5e-4},
    }
    result = {
        "gpus": 2, "nccl": "2.28.5", "nvls": "0", "commit": "abc", "ways": ["words", "flags", "nccl"],
        "machine": {"date": "2026-01-01", "gpu": {"name": "a GPU", "driver": "580.1"}}, "missing": {},
        "seconds": seconds,
    }  # fmt: skip
    lines = all_reduce.table(result).splitlines()
    assert "| 4 KB | 2.0 (2) | 4.0 (1) | 8.0 (1) | words |" in lines
    assert "| 64 MB | 2,000.0 (34) | 1,000.0 (67) | 500.0 (134) | nccl |" in lines
    assert lines[-1] == "NCCL is faster from 4 MB on"
    assert all_reduce.border({"4096": seconds["4096"]}) == "NCCL is faster from no size on"
    alone = {size: {"nccl": times["nccl"]} for size, times in seconds.items()}
    result |= {"ways": ["nccl"], "seconds": alone, "missing": {"ours": "no peer access: cuda:0 and cuda:1"}}
    assert all_reduce.table(result).splitlines()[-1] == "ours not measured: no peer access: cuda:0 and cuda:1"


@pytest.mark.skipif(bool(missing_packages()), reason="the backend cannot be imported")
@pytest.mark.parametrize("wrong", [False, True])
def test_all_reduces_are_measured_and_checked(
    all_reduce: ModuleType, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    """Two ranks, each in a thread, on a stand-in of NCCL; a sum that is wrong is an error."""
    from numballama.cuda import driver
    from numballama.errors import DeviceError
    from numballama.parallel.rank_memory import RankMemory, Sizes

    class Watch:
        def __init__(self, device: HostDevice) -> None:
            pass

        def measure(self, action: Any) -> float:
            action()
            return 1.0

    install(patch=monkeypatch.setattr)
    for name, stand_in in {"Memory": HostMemory, "Stopwatch": Watch, "CudaGraph": HostGraph}.items():
        monkeypatch.setattr(driver, name, stand_in)
    monkeypatch.setattr(all_reduce, "MOST_TOGETHER", 4)
    if wrong:
        monkeypatch.setattr(FakeNccl, "_write", staticmethod(lambda out, data: None))
        monkeypatch.setattr("numballama.cuda.peers.NcclPeers.connect", unchecked)
    memory, found = RankMemory.create(Sizes(2, 1, 0)), dict[int, Any]()

    def run(rank: int) -> None:
        meet = all_reduce.Meeting(memory, rank, lambda: True)
        try:
            found[rank] = all_reduce.measure(meet, 2, ["nccl"], [4096, 8192])
        except DeviceError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        assert {*found.values()} == {"nccl, 4,096 bytes: wrong sums"}
    else:
        assert found[0] == found[1] == {"4096": {"nccl": 0.25}, "8192": {"nccl": 0.25}}


def unchecked(peers: Any, unique_id: bytes, shares: Any, stopped: Any) -> Any:
    """`NcclPeers.connect` without its check of a sum."""
    from numballama.cuda.launch import Array, Peers
    from numballama.cuda.nccl import Communicator

    made = Communicator(peers._library, 2, peers.rank, unique_id, lambda: None, stopped)
    peers._communicator = made
    nothing = Array(256, (2, 1, 1), "i32")
    return Peers(peers.rank, nothing, nothing, nothing, shares, nothing, 0, communicator=made)
