"""The CUDA kernels without a GPU: the tests of `simulated_kernels.py` and its neighbours, by their names.

Numba's simulator is chosen by an environment variable before Numba is imported, so these tests run in two processes of
their own, once a session. For each test there is one here with its name, which reports all of its parameters:

    python -m pytest tests/cuda/test_simulator.py -k argmax

One process runs `WHOLE` with the blocks that a GPU runs, the other one the rest with blocks of two warps
(`simulator.SMALL_BLOCKS`). NUMBALLAMA_TEST_ALL=1 runs all with whole blocks, in two processes.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.helpers.cuda_host import missing_packages

pytestmark = pytest.mark.slow

if reason := missing_packages():
    pytest.skip(f"no CUDA simulator: {reason}", allow_module_level=True)

ROOT, FOLDER = Path(__file__).parents[2], "tests/cuda"
WHOLE = (
    "test_every_value[config0-f32-f32-True]", "test_every_value[config7-bf16-f16-False]", "test_long_rows[q8_0]",
    "test_block_types[q4_k-2304-fusions1]", "test_block_types[q6_k-1536-fusions1]", "test_lanes_that_copy_for_others",
    "test_a_context_split_over_blocks[2-2-f32]", "test_rows_of_many_sequences[3-1-f16]",
    "test_a_cache_of_q8_0[6-True]", "test_argmax", "test_quantize",
    "test_filters[{'top_k': 12", "test_top_k_among_more_than_are_ranked",
)  # fmt: skip
"""Beginnings of the names of the tests that run with whole blocks: each kind of kernel once."""
EVERYTHING = os.environ.get("NUMBALLAMA_TEST_ALL") == "1"
TIMEOUT_S = 1200


def names_of_tests(name: str) -> list[str]:
    """`file::function` of the tests in a file, which cannot be imported here."""
    tree = ast.parse((ROOT / FOLDER / name).read_text(encoding="utf-8"))
    functions = (node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    return [f"{name}::{function}" for function in functions if function.startswith("test_")]


FILES = ("simulated_kernels.py", "simulated_rows.py", "simulated_ranks.py", "simulated_detection.py")
TESTS = [test for name in FILES for test in names_of_tests(name)]


def in_parts(cases: list[str]) -> list[tuple[str, list[str]]]:
    """(size of blocks, cases) of each process."""
    if EVERYTHING:
        return [("whole", cases[::2]), ("whole", cases[1::2])]
    names = [case.rpartition("::")[2] for case in cases]
    whole = [case for case, name in zip(cases, names, strict=True) if name.startswith(WHOLE)]
    functions = {name.partition("[")[0] for name in names}
    unknown = [
        begin for begin in WHOLE if begin.partition("[")[0] in functions and not any(n.startswith(begin) for n in names)
    ]
    assert not unknown, f"no cases of these names: {unknown}"
    return [("whole", whole), ("small", [case for case in cases if case not in whole])]


def start(*arguments: str, blocks: str = "small") -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": path, "NUMBALLAMA_TEST_BLOCKS": blocks}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip


def read_report(report: Path) -> dict[str, list[str]]:
    """Test → what failed or was skipped of it, a text for each set of parameters; empty texts are for what passed."""
    results: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.attrib["classname"].rpartition(".")[2]
        test = f"{file}.py::{case.attrib['name'].partition('[')[0]}"
        problems = [f"{case.attrib['name']}: {problem.tag}\n{problem.text}" for problem in case]
        results.setdefault(test, []).append("\n".join(problems))
    return results


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """`read_report` of all tests of this file that were selected."""
    selected = [
        item.callspec.params["test"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_in_the_simulator
    ]
    listed, _ = start("--collect-only", *(f"{FOLDER}/{test}" for test in selected)).communicate(timeout=300)
    cases = [line for line in listed.splitlines() if line.startswith(f"{FOLDER}/") and "::" in line]
    assert {case.partition("[")[0] for case in cases} == {f"{FOLDER}/{test}" for test in selected}, listed
    folder = tmp_path_factory.mktemp("simulator")
    parts = [(folder / f"{number}.xml", *part) for number, part in enumerate(in_parts(cases)) if part[1]]
    processes = [start("--tb=short", f"--junitxml={report}", *some, blocks=blocks) for report, blocks, some in parts]
    found: dict[str, list[str]] = {}
    try:
        for (report, _, _), process in zip(parts, processes, strict=True):
            output, _ = process.communicate(timeout=TIMEOUT_S)
            assert report.exists(), output[-20000:]
            for test, problems in read_report(report).items():
                found.setdefault(test, []).extend(problems)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sum(len(problems) for problems in found.values()) == len(cases), "a process ended before its last test"
    return found


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.partition("::")[2])
def test_in_the_simulator(results: dict[str, list[str]], test: str) -> None:
    assert test in results
    problems = [problem for problem in results[test] if problem]
    assert not problems, "\n\n".join(problems)[-20000:]


def test_all_tests_are_found() -> None:
    assert len(TESTS) >= 30 and len(set(TESTS)) == len(TESTS)
    names = [test.rpartition("::")[2] for test in TESTS]
    assert {whole.partition("[")[0] for whole in WHOLE} <= set(names)
