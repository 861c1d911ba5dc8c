"""Fixtures of the tests on a GPU. They import the backend late: the simulator must come first."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

if TYPE_CHECKING:
    from numballama.cuda.driver import Device
    from numballama.model import Model
    from tests.cuda.checks import Bench


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    from tests.cuda.checks import Bench

    made = Bench()
    yield made
    made.close()


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    """A small random model with a float32 cache on the GPU."""
    import numballama
    from tests.cuda.gpu import SHAPE
    from tests.helpers.random_models import save

    path, _ = save(tmp_path, "llama2c-v0", SHAPE)
    with numballama.compile(path, device="cuda", kv_dtype="f32") as made:
        yield made


@pytest.fixture
def card() -> Device:
    """The GPU, after garbage of earlier tests was collected."""
    from numballama.cuda.driver import Device

    gc.collect()
    device = Device("cuda")
    device.make_current()
    return device


@pytest.fixture(scope="module")
def exact_kernels() -> Iterator[None]:
    """Linear layers of few tokens by `gemv`, whose results are as close to the reference's as float32 allows.

    Tensor cores round activations to 16 bits: test_tensor_cores.py has their bounds.
    """
    from numballama.cuda.ops import gemm, linear

    with mock.patch.object(linear, "EXACT", gemm.FEW):
        yield
