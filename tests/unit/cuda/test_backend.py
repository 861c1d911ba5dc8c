"""`batch_invariant` of the CUDA backend: which kernels it chooses, on a device that computes nothing."""

from __future__ import annotations

import re

import pytest

from tests.helpers.cuda_host import HostDevice, converted, graph_of, install, missing_packages

if reason := missing_packages():
    pytest.skip(f"the backend cannot be imported: {reason}", allow_module_level=True)

import numballama
from numballama.config import ModelConfig
from numballama.cuda.backend import CudaBackend
from numballama.cuda.program import CudaProgram
from numballama.graph import KVLayout
from tests.helpers.random_models import random_checkpoint

CONFIG = ModelConfig(256, 256, 1, 4, 2, 40, 600)
PRODUCTS = re.compile(r"(gemv|linear|gate_up|qkv\w*|gemm\w*|wide\w*|wgmma\w*|skinny)(_\w+)?_kernel")


def kernels_of(backend: CudaBackend, kind: str, tokens: int) -> set[str]:
    """Kernels of a program's linear layers and attention, without what only tells how many tokens they take."""
    weights = converted(random_checkpoint(CONFIG).weights, kind)
    program = backend.program(graph_of(CONFIG, weights, KVLayout.of(CONFIG, CONFIG.context, "f16", 2), tokens))
    names = {launch.name for step in program.launches for launch in step}
    return {
        re.sub(r"^skinny_(\d+|round|sum)_", "skinny_", name)
        for name in names
        if "attention" in name or PRODUCTS.match(name)
    }


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("kind", ["bf16", "q4_0", "q4_k", "int8", "f32"])
def test_all_runs_use_one_family(monkeypatch: pytest.MonkeyPatch, kind: str, capability: tuple[int, int]) -> None:
    install(n_sms=132, patch=monkeypatch.setattr)
    monkeypatch.setattr(HostDevice, "capability", capability)
    monkeypatch.setattr(HostDevice, "shared_limit", 227 << 10)
    weights = converted(random_checkpoint(CONFIG).weights, kind)
    backend = CudaBackend(weights, batch_invariant=True)
    most = 8 if kind == "f32" else 128
    assert backend.prefill_chunk == backend.most_sequences == backend.decode_sizes[-1] == most
    found = [kernels_of(backend, kind, tokens) for tokens in backend.decode_sizes]
    assert all(names == found[0] for names in found), found
    assert len(found[0]) >= 2
    usual = CudaBackend(weights)
    assert usual.most_sequences is None and usual.decode_sizes[0] == 1
    assert kernels_of(usual, kind, 1) != found[0] != kernels_of(usual, kind, usual.prefill_chunk)


def test_a_model_says_that_it_holds_two_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    install(n_sms=4, patch=monkeypatch.setattr)
    for invariant in (True, False):
        with numballama.compile(None, device="cuda", context=64, batch_invariant=invariant) as model:
            assert model.batch_invariant is invariant
            assert model.max_sequences == 1 + invariant and model.kv.tokens == 64
            assert sum("max_sequences is 2, not 1" in note for note in model.notes) == invariant


@pytest.mark.parametrize("context", [1, 64])
def test_values_come_from_the_kernels_of_all_runs(monkeypatch: pytest.MonkeyPatch, context: int) -> None:
    """Also where a text has a single token, for which `gemv` would be faster."""
    install(n_sms=4, patch=monkeypatch.setattr)
    for invariant in (True, False):
        with numballama.compile(None, device="cuda", context=context, batch_invariant=invariant, dtype="q8_0") as model:
            program = model.value_reader.program
            assert isinstance(program, CudaProgram)
            names = {launch.name for step in program.launches for launch in step}
            products = {name.partition("_")[0] for name in names if PRODUCTS.match(name)}
            assert products == {"skinny" if invariant else "wide" if context > 1 else "linear"}, names
