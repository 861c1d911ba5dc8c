"""Fixtures of the tests of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from numballama import backend, loader, model
from numballama.backend import Backend
from numballama.checkpoint import Weight
from numballama.parallel.processes import ProcessBackend


@pytest.fixture
def ranks_for_gpus(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--gpus N opens N ranks on the CPU, each in a process, in place of GPUs."""
    config, open_one = loader.open_checkpoint(tiny_file).config, backend.open_backend

    def choose_device(device: str, gpus: int) -> tuple[str, str]:
        return device, ""

    def open_backend(
        device: str, weights: dict[str, Weight], threads: int, invariant: bool, gpus: int, *others: Any
    ) -> Backend:
        if gpus == 1:
            return open_one(device, weights, threads, invariant)
        return cast("Backend", ProcessBackend(tiny_file, config, weights, [device] * gpus, threads, invariant))

    monkeypatch.setattr(model, "open_backend", open_backend)
    for module in (model, backend):
        monkeypatch.setattr(module, "choose_device", choose_device)
