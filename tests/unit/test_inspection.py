"""`inspect`: its plan is the CPU's, its memory that of a compiled model, and making it needs no Numba."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import numballama
from numballama import Error, UnsupportedError
from numballama.cpu import CpuBackend
from numballama.inspection import PROMPT_TOKENS
from tests.helpers.markup import parsed
from tests.helpers.tiny import TINY


def test_a_report_needs_no_numba() -> None:
    code = (
        "import sys, numballama as n; i = n.inspect(None, context=64, dtype='q4_0'); assert 'plan of llama' in str(i);"
        "assert '<svg' in i.page(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert {"numballama.plan", "numpy"} <= set(done.stdout.split())
    assert not {"numba", "llvmlite", "numballama.kernels_cpu"} & set(done.stdout.split())


def test_its_plan_is_that_of_the_model() -> None:
    found = numballama.inspect(None)
    with numballama.compile(None, device="cpu", threads=1) as model:
        assert [step.kernel.name for step in found.plan.steps] == [step.kernel.name for step in model.plan.steps]
        assert found.plan.arena_bytes == found.memory["arena"] == model.plan.arena_bytes


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"context": 100, "kv_dtype": "q8_0", "dtype": "q8_0"}, {"max_sequences": 3}])
def test_its_memory_is_that_of_the_model(tiny_file: Path, options: dict[str, object]) -> None:
    """What `compile` allocates with the same arguments; a program for several sequences at once comes on top."""
    assert CpuBackend.prefill_chunk == PROMPT_TOKENS
    path = None if "dtype" in options else tiny_file  # the tiny model's rows are no whole blocks
    found = numballama.inspect(path, **options)
    with numballama.compile(path, device="cpu", threads=1, **options) as model:
        weights = sum(weight.nbytes for weight in model.weights.values())
        assert found.memory["weights"] + found.memory["converted"] == weights
        assert found.memory["kv_cache"] == model.kv.nbytes
        assert found.memory["arena"] + found.memory["prompt_arena"] == model.arena_bytes
    *parts, total = found.memory.values()
    assert sum(parts) == total


def test_memory_for_other_settings_is_that_of_another_inspection(tiny_file: Path) -> None:
    found = numballama.inspect(tiny_file)
    assert found.memory_for() == found.memory
    other = numballama.inspect(tiny_file, context=30, kv_dtype="f16", max_sequences=2)
    assert found.memory_for(30, "f16", 2)["kv_cache"] == other.memory["kv_cache"]
    assert other.memory_for(kv_dtype="f32", max_sequences=1)["kv_cache"] == found.memory_for(30)["kv_cache"]
    assert other.to_dict()["kv_dtype"] == "f16" and other.to_dict()["max_sequences"] == 2


def test_a_longer_context_than_the_models_is_noted(tiny_file: Path) -> None:
    found = numballama.inspect(tiny_file, context=5000)
    assert any("5,000" in note for note in found.notes) and "5,000" in str(found)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"context": 0}, Error, "context must be at least 1"),
        ({"kv_dtype": "f8"}, UnsupportedError, "kv_dtype 'f8' is not supported; choose from f32, f16"),
        ({"dtype": "q2"}, UnsupportedError, "dtype 'q2'"),
        ({"max_sequences": 0}, Error, "max_sequences"),
        ({"n_ctx": 5}, Error, r"unknown option of inspect\(\) n_ctx: use context"),
    ],
)
def test_wrong_arguments(tiny_file: Path, options: dict[str, object], error: type[Error], words: str) -> None:
    with pytest.raises(error, match=words):
        numballama.inspect(tiny_file, **options)
    if set(options) <= {"context", "kv_dtype", "max_sequences"}:
        with pytest.raises(error, match=words):
            numballama.inspect(tiny_file).memory_for(**options)


def test_a_report_says_whether_layers_are_alike(tiny_file: Path) -> None:
    found = numballama.inspect(tiny_file)
    assert "tensors (layers 1 to 1 are like layer 0)" in str(found) and "layers.1.w2" not in str(found)
    kind, shape = found.tensors["layers.1.w2"]
    found.tensors["layers.1.w2"] = "q6_k", shape
    assert kind == "f32" and "tensors (layer 0 only; others of the 2 layers have other types" in str(found)
    assert "q6_k" in found.report(full=True)


def test_its_card_and_its_page(tiny_file: Path) -> None:
    found = numballama.inspect(tiny_file, kv_dtype="bf16", context=64)
    root = parsed(found._repr_html_())
    rows = [[cell.text for cell in row.children] for row in root.all("tr")]
    assert ["tokens", "f32", "f16 or bf16", "q8_0"] in rows
    start = rows.index(["tokens", "f32", "f16 or bf16", "q8_0"]) + 1
    assert [row[0] for row in rows[start : start + 2]] == ["64", str(TINY.context)]
    assert any(row[0] == "KV cache" and "64 tokens, bf16" in row[2] for row in rows)
    folds = [fold.children[0].text for fold in root.all("details")]
    assert "graph" in folds and "plan and memory map" in folds
    page = parsed(found.page())
    assert len(list(page.all("svg"))) == len(list(root.all("svg"))) >= 4 and tiny_file.name in page.text
