"""No number of threads, threading layer or way to start a process makes a result wrong or hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numballama
from numballama.config import ModelConfig
from tests.helpers.bounds import shared_model
from tests.helpers.processes import PACKAGE, run_python
from tests.helpers.random_models import save

SMALL = ModelConfig(32, 64, 2, 4, 2, 120, 40)
IDS = [1, 5, 9, 77, 3]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model in float32, and one in int8 with int8 activations."""
    folder = tmp_path_factory.mktemp("small")
    return {name: save(folder, name, SMALL)[0] for name in ("llama2c-v0", "llama2c-v2")}


LOGITS = """
import json, sys, threading
import numballama

def use(threads=None):
    model = numballama.compile(sys.argv[1], device="cpu", threads=threads)
    return model.logits([1, 5, 9, 77, 3]).tolist()
"""


@pytest.fixture(scope="module")
def wanted(files: dict[str, Path]) -> np.ndarray:
    return shared_model(files["llama2c-v0"], device="reference").logits(IDS)


def check(found: Any, wanted: np.ndarray) -> None:
    assert np.abs(np.array(found) - wanted).max() < 1e-4


VARIANTS: list[tuple[str, dict[str, str]]] = [
    ("1, 2", {}),
    ("None, 4", {"NUMBA_NUM_THREADS": "1"}),
    ("8, 3", {"NUMBA_NUM_THREADS": "8"}),
    ("8", {"NUMBA_NUM_THREADS": "8", "NUMBA_THREADING_LAYER": "workqueue"}),
    ("None", {"NUMBA_THREADING_LAYER": "workqueue"}),
    ("2", {"OMP_THREAD_LIMIT": "1"}),
    ("8", {"NUMBA_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "3"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "environment"), VARIANTS, ids=str)
def test_any_number_of_threads(
    files: dict[str, Path], wanted: np.ndarray, threads: str, environment: dict[str, str]
) -> None:
    """`threads`: numbers that models of one process ask for."""
    code = f"{LOGITS}\nprint(json.dumps([use(threads) for threads in [{threads}]]))"
    for logits in run_python(code, files["llama2c-v0"], **environment):
        check(logits, wanted)


def test_more_threads_than_there_may_be_are_noted(files: dict[str, Path]) -> None:
    limit = int(os.environ.get("NUMBA_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    with numballama.compile(files["llama2c-v0"], device="cpu", threads=limit + 1) as model:
        assert model.plan.workers <= limit + 1
        assert any(f"{limit + 1} threads asked for" in note for note in model.notes)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_two_python_threads_at_once(files: dict[str, Path], wanted: np.ndarray, layer: str) -> None:
    """Each thread with its own model, and both with one: the workqueue layer aborts the process on two parallel
    regions."""
    code = f"""{LOGITS}
shared = numballama.compile(sys.argv[1], device="cpu")
own = [numballama.compile(sys.argv[1], device="cpu", threads=n) for n in (1, None)]
results = []
def work(model):
    for _ in range(30):
        results.append(model.logits([1, 5, 9, 77, 3]).tolist())
threads = [threading.Thread(target=work, args=(m,)) for m in (*own, shared, shared)]
for t in threads: t.start()
for t in threads: t.join()
spread = max(abs(a - b) for r in results for x, y in zip(r, results[0]) for a, b in zip(x, y))
print(json.dumps([len(results), results[0], spread]))
"""
    count, one, spread = run_python(code, files["llama2c-v0"], NUMBA_THREADING_LAYER=layer)
    assert count == 120 and spread < 1e-4
    check(one, wanted)


@pytest.mark.slow
def test_numbas_own_thread_count_is_put_back(files: dict[str, Path]) -> None:
    code = f"""{LOGITS}
import numba
numba.set_num_threads(3)
use(1)
use(2)
print(json.dumps(numba.get_num_threads()))
"""
    assert run_python(code, files["llama2c-v0"], NUMBA_NUM_THREADS="4") == 3


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_use_is_an_error_and_not_a_hang(files: dict[str, Path], wanted: np.ndarray) -> None:
    code = f"""{LOGITS}
import os, signal
model = numballama.compile(sys.argv[1], device="cpu")
model.logits([1])
child = os.fork()
if child == 0:
    signal.alarm(30)  # a hang ends here
    try:
        model.logits([1])
    except numballama.DeviceError as error:
        os._exit(42 if "spawn" in str(error) else 43)
    os._exit(44)
_, status = os.waitpid(child, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), model.logits([1, 5, 9, 77, 3]).tolist()]))
"""
    exit_code, logits = run_python(code, files["llama2c-v0"])
    assert exit_code == 42
    check(logits, wanted)


@pytest.mark.slow
def test_spawned_child(files: dict[str, Path], wanted: np.ndarray, tmp_path: Path) -> None:
    """Parent and child each compile the model, as the error after a fork advises."""
    script = tmp_path / "spawned.py"
    script.write_text(f"""{LOGITS}
import multiprocessing
if __name__ == "__main__":
    mine = use()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        theirs = pool.map(use, [None, 1])
    print(json.dumps([mine, *theirs]))
""")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    found = subprocess.run(
        [sys.executable, str(script), str(files["llama2c-v0"])],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    for logits in json.loads(found.stdout.splitlines()[-1]):
        check(logits, wanted)


@pytest.mark.slow
def test_any_cpu_tells_the_story() -> None:
    code = "import json, numballama; m = numballama.compile(None, kv_dtype='f16', threads=1)\n"
    code += "print(json.dumps(m.generate('Once upon a time', max_tokens=5, temperature=0)))"
    for features in ({}, {"NUMBA_CPU_FEATURES": ""}):  # the second start finds the first one's kernels
        assert run_python(code, timeout=600, NUMBA_CPU_NAME="generic", **features) == ", there was a little"
