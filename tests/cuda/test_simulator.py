"""The CUDA kernels without a GPU: the tests of `simulated_kernels.py` and its neighbours, by their names.

Numba's simulator is chosen by an environment variable before Numba is imported, so these tests run in two processes of
their own, each with half of the selected tests, once a session. For each test there is one here with its name, which
reports all of its parameters:

    python -m pytest tests/cuda/test_simulator.py -k argmax
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
PROCESSES = 2
TIMEOUT_S = 1200


def names_of_tests(name: str) -> list[str]:
    """`file::function` of the tests in a file, which cannot be imported here."""
    tree = ast.parse((ROOT / FOLDER / name).read_text(encoding="utf-8"))
    functions = (node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    return [f"{name}::{function}" for function in functions if function.startswith("test_")]


FILES = ("simulated_kernels.py", "simulated_rows.py", "simulated_detection.py")
TESTS = [test for name in FILES for test in names_of_tests(name)]


def start(*arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": path}
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
    reports = [folder / f"{part}.xml" for part in range(PROCESSES)]
    processes = [
        start("--tb=short", f"--junitxml={report}", *cases[part::PROCESSES])
        for part, report in enumerate(reports)
        if cases[part::PROCESSES]
    ]
    found: dict[str, list[str]] = {}
    try:
        for report, process in zip(reports, processes, strict=False):
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
