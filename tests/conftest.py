"""Settings of hypothesis for every test and for the fast tier, of processes for speed, and the fixture of models."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# before NumPy is imported: threads of the reference's small products wait for each other longer than they compute
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# before Numba is: it colours even the messages of errors that it catches itself, of which a kernel has a thousand
os.environ.setdefault("NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING", "1")
from hypothesis import HealthCheck, settings

from tests.helpers.random_models import MODELS

settings.register_profile(
    "numballama",
    deadline=None,
    derandomize="CI" in os.environ,  # a failure there is one that anybody can repeat
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("fast", settings.get_profile("numballama"), max_examples=10)
settings.load_profile("numballama")


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -m "not slow"` tries a tenth of the examples, except where a test says how many it needs."""
    if "not slow" in config.getoption("markexpr"):
        settings.load_profile("fast")


def pytest_collection_finish() -> None:
    """Each `compile` collects garbage. It then passes over the tests and modules, which live until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of real models; skips the test where it is absent."""
    if not (MODELS / "stories260K.bin").exists():
        pytest.skip(f"no real models in {MODELS} (set NUMBALLAMA_TEST_MODELS)")
    return MODELS
