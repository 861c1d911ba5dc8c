"""Decode steps that are queued ahead of the host, on a fake device.

The next token is a function of token and position instead of a model's output. `advance` does what its kernel does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.cuda_host import graph_of, install, missing_packages

if reason := missing_packages():
    pytest.skip(f"the backend cannot be imported: {reason}", allow_module_level=True)

from numballama.config import ModelConfig
from numballama.cuda.backend import CudaBackend
from numballama.cuda.decode_pipeline import LOOKAHEAD, N_SLOTS
from numballama.cuda.program import CudaProgram
from numballama.errors import Error
from numballama.graph import KVLayout
from numballama.sampling import SamplerTable
from tests.helpers.random_models import random_checkpoint
from tests.helpers.sampling import make_sampler

CONFIG = ModelConfig(16, 16, 1, 2, 1, 40, 24)
VOCAB = CONFIG.vocab_size


def following(token: int, position: int) -> int:
    return (7 * token + 3 * position + 1) % VOCAB


class FakeKernels:
    """Runs argmax and advance, in the order of the launches; counts whole steps."""

    def __init__(self) -> None:
        self.program: Any = None
        self.steps = 0
        self.broken_at = -1
        """The position whose logits are NaN."""

    def _int32(self, array: Any) -> Any:
        return ctypes.c_int32.from_address(array.address)

    def __call__(self, launch: Any) -> None:
        arguments = launch.arguments
        if launch.name == "argmax_kernel":
            values = self.program.values
            token, position = (self._int32(values[name]).value for name in ("ids", "positions"))
            result = -1 if position == self.broken_at else following(token, position)
            self._int32(arguments["out"]).value = result
        elif launch.name == "advance_kernel":
            self.steps += 1
            token = self._int32(arguments["next_token"]).value
            self._int32(arguments["ids"]).value = max(token, 0)
            self._int32(arguments["positions"]).value += 1
            step = ctypes.c_int64.from_address(arguments["step"].address)
            step.value += 1
            slot = arguments["slots_address"] + 8 * (step.value % arguments["n_slots"])
            ctypes.c_uint64.from_address(slot).value = (step.value & 0x7FFFFFFF) << 32 | token & 0xFFFFFFFF


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernels]:
    fake = FakeKernels()
    install(run=fake, patch=monkeypatch.setattr)
    weights = random_checkpoint(CONFIG).weights
    kv = KVLayout.of(CONFIG, CONFIG.context, "f32", page=8)
    backend = CudaBackend(weights)
    fake.program = backend.program(graph_of(CONFIG, weights, kv, 1))
    yield fake
    backend.close()


def step(program: CudaProgram, token: int, position: int, sampler: SamplerTable) -> int:
    program.inputs["ids"][0], program.inputs["positions"][0], program.inputs["sequences"][0] = token, position, 0
    return program.run(1, sampler=sampler)


def test_there_are_more_slots_than_steps_in_flight() -> None:
    """A step must not overwrite the slot of one whose token the host has not read."""
    assert N_SLOTS > LOOKAHEAD + 1
    assert N_SLOTS & (N_SLOTS - 1) == 0


def test_steps_run_ahead_of_the_host(kernels: FakeKernels) -> None:
    """From the second token on `LOOKAHEAD` steps are queued; at the context's end none beyond it."""
    sampler, token = make_sampler(VOCAB, temperature=0), 5
    for position in range(CONFIG.context):
        want = following(token, position)
        token = step(kernels.program, token, position, sampler)
        assert token == want
        ahead = min(LOOKAHEAD, CONFIG.context - 1 - position) if position else 0
        assert kernels.steps == position + 1 + ahead
    assert kernels.program.entries == CONFIG.context


def test_another_token_than_the_sampled_one_discards_what_is_queued(kernels: FakeKernels) -> None:
    sampler = make_sampler(VOCAB, temperature=0)
    token = step(kernels.program, 1, 0, sampler)
    token = step(kernels.program, token, 1, sampler)
    other = (token + 1) % VOCAB
    assert step(kernels.program, other, 2, sampler) == following(other, 2)
    again = step(kernels.program, 1, 1, sampler)  # a rewind
    assert again == following(1, 1)
    assert step(kernels.program, again, 2, sampler) == following(again, 2)


def test_another_sampler_starts_over(kernels: FakeKernels) -> None:
    first, second = make_sampler(VOCAB, temperature=0), make_sampler(VOCAB, temperature=0)
    token = step(kernels.program, 1, 0, first)
    token = step(kernels.program, token, 1, first)
    assert step(kernels.program, token, 2, second) == following(token, 2)


def test_reading_a_value_recomputes_the_hosts_step(kernels: FakeKernels) -> None:
    """Steps ahead of the host have overwritten it. The next step starts from the host's inputs."""
    sampler = make_sampler(VOCAB, temperature=0)
    first = step(kernels.program, 1, 0, sampler)
    second = step(kernels.program, first, 1, sampler)
    assert int(kernels.program.value("next")[0]) == second
    assert step(kernels.program, second, 2, sampler) == following(second, 2)


def test_logits_that_are_not_numbers(kernels: FakeKernels) -> None:
    """The error comes with the step that has them, although steps ahead of it have run; then decoding goes on."""
    sampler, token = make_sampler(VOCAB, temperature=0), 1
    kernels.broken_at = 3
    for position in range(3):
        token = step(kernels.program, token, position, sampler)
    with pytest.raises(Error, match="not numbers"):
        step(kernels.program, token, 3, sampler)
    kernels.broken_at = -1
    assert step(kernels.program, token, 3, sampler) == following(token, 3)


def test_another_program_discards_what_is_queued(kernels: FakeKernels) -> None:
    """Programs share the KV cache."""
    backend, sampler = kernels.program.backend, make_sampler(VOCAB, temperature=0)
    first = step(kernels.program, 1, 0, sampler)
    token = step(kernels.program, first, 1, sampler)
    kv = KVLayout.of(CONFIG, CONFIG.context, "f32", page=8)
    other = backend.program(graph_of(CONFIG, random_checkpoint(CONFIG).weights, kv, 4))
    for name in ("ids", "positions", "sequences"):
        other.inputs[name][:] = 0
    other.run(2)
    steps = kernels.steps
    assert step(kernels.program, token, 2, sampler) == following(token, 2)
    assert kernels.steps == steps + 1, "the queued steps were not used"
