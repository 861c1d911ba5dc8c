"""Sessions: prompts in chunks, what fits, interrupts. A token is one entry into compiled code and allocates nothing."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.runtime import _nrt_python as nrt
from numba.core.runtime import rtsys

from numballama import ContextError, Model
from numballama.config import ModelConfig
from numballama.cpu.sampling import greedy
from numballama.session import Session
from tests.helpers.bounds import shared_model
from tests.helpers.random_models import save
from tests.helpers.sampling import make_sampler
from tests.helpers.tiny import CHUNK, TINY, InterruptAt, ids_of

WIDE = ModelConfig(64, 8192, 1, 4, 2, 20000, 600)
IDS = [1, 5, 9, 77, 3]
SAMPLED: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "repeat_penalty": 1.2,
    "seed": 1,
}


@pytest.fixture
def model(tiny_file: Path, tiny_tokenizer: Path) -> Model:
    return shared_model(tiny_file, tiny_tokenizer, device="cpu")


@pytest.fixture
def session(model: Model) -> Iterator[Session]:
    with model.exclusive() as session:
        yield session


@pytest.mark.parametrize(
    "length", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1]
)
def test_prompt_lengths_around_the_chunk(tiny_file: Path, tiny_tokenizer: Path, model: Model, length: int) -> None:
    ids = [int(token) for token in np.random.default_rng(length).integers(3, 300, length)]
    want = shared_model(tiny_file, tiny_tokenizer, device="reference").logits(ids)
    assert np.abs(model.logits(ids) - want).max() < 1e-4
    with model.exclusive() as session:
        session.prefill(ids)
        assert session.tokens == ids
        assert np.abs(session.logits - want[-1]).max() < 1e-4
        session.truncate(length // 2)
        session.prefill(ids[length // 2 :])
        assert np.abs(session.logits - want[-1]).max() < 1e-4


def test_chunks_of_a_text(model: Model, session: Session) -> None:
    """Each is run before the next, and counts as appended then."""
    program, ids = model.program, [5, 7, 9]
    assert len(program.inputs["ids"]) == 1
    for number, (start, count) in enumerate(session.chunks(program, ids)):
        assert (start, count) == (number, 1) and session.tokens == ids[:number]
        assert program.inputs["ids"][0] == ids[number] and program.inputs["positions"][0] == number
    assert session.tokens == ids


def test_session_refuses_what_does_not_fit(session: Session) -> None:
    session.prefill(list(range(3, 3 + TINY.context)))
    for call in (lambda: session.step(3), lambda: session.prefill([3, 4])):
        with pytest.raises(ContextError, match="do not fit"):
            call()


def test_an_interrupted_run_is_done_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The history has not grown, so the next run does the same again."""
    whole = [response.token for response in model.stream("ab", max_tokens=6, temperature=0)]
    prompt = [1, *ids_of(model, "ab")]
    with model.exclusive() as session:
        session.prefill(prompt)
        decode = session._decode
        monkeypatch.setattr(decode, "run", InterruptAt(decode.run, 1, after=True))
        with pytest.raises(KeyboardInterrupt):
            session.step(whole[0])
        assert session.tokens == prompt
        session.step(whole[0])
        assert session.logits.argmax() == whole[1]


# A token


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose rows are large enough to be noticed where memory is counted."""
    return shared_model(save(tmp_path_factory.mktemp("wide"), "llama2c-v0", WIDE)[0], device="cpu")


SAMPLERS = pytest.mark.parametrize(
    "settings", [{"temperature": 0}, SAMPLED, {"temperature": 0, "repeat_penalty": 1.5}], ids=str
)


@pytest.fixture
def wide_session(wide: Model) -> Iterator[Session]:
    with wide.exclusive() as session:
        yield session


def decode(session: Session, settings: dict[str, Any], steps: int) -> Callable[[], None]:
    """A loop of `steps` tokens, warmed up."""
    sampler = make_sampler(session.vocab_size, **settings)
    session.prefill(IDS)

    def loop() -> None:
        for _ in range(steps):
            session.step(7, sampler)

    loop()
    return loop


@SAMPLERS
def test_a_token_is_one_entry_into_compiled_code(wide_session: Session, settings: dict[str, Any]) -> None:
    program: Any = wide_session._decode
    loop = decode(wide_session, settings, 50)
    before = program.entries
    loop()
    assert program.entries - before == 50


def test_a_prompt_is_one_entry_a_chunk(wide_session: Session) -> None:
    program: Any = wide_session._prompt
    before = program.entries
    wide_session.prefill([5] * 200)
    assert program.entries - before == -(-200 // CHUNK) > 1


@SAMPLERS
def test_compiled_code_allocates_nothing(wide_session: Session, settings: dict[str, Any]) -> None:
    """Not even the record that Numba makes of an array argument: the arguments are addresses."""
    loop = decode(wide_session, settings, 50)
    nrt.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        loop()
        after = rtsys.get_allocation_stats()
        greedy(np.zeros(4, np.float32))
        counted = rtsys.get_allocation_stats()
    finally:
        nrt.memsys_disable_stats()
    assert after == before
    assert counted.alloc > after.alloc, "the counter counts"


@pytest.mark.slow
@SAMPLERS
def test_python_keeps_nothing_of_a_token(wide_session: Session, settings: dict[str, Any]) -> None:
    """A loop leaves some tens of blocks, its own and the interpreter's, and as many when it is 200 tokens longer: one
    per token would be 200 more. The history grows by an id per token, here a small one that Python has anyway."""
    short, long = decode(wide_session, settings, 50), decode(wide_session, settings, 250)

    def kept(loop: Callable[[], None]) -> int:
        wide_session.truncate(len(IDS))
        gc.collect()
        before = sys.getallocatedblocks()
        loop()
        return sys.getallocatedblocks() - before

    gc.disable()
    try:
        # the least of three: the interpreter keeps some more at times, but never one for each token
        assert min(kept(long) for _ in range(3)) - min(kept(short) for _ in range(3)) <= 20
    finally:
        gc.enable()


@pytest.mark.slow
@SAMPLERS
def test_no_array_is_made_for_a_token(wide_session: Session, settings: dict[str, Any]) -> None:
    """The highest memory during the loop, Python's and NumPy's, is below the smallest row of this model but its
    residual stream: a copy of the logits would be 80 KB, of a hidden row 32 KB."""
    loop = decode(wide_session, settings, 100)
    tracemalloc.start()
    try:
        loop()
        wide_session.truncate(len(IDS))
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        loop()
        now, peak = tracemalloc.get_traced_memory()
        assert peak - before < 8192 and now - before < 4096
        domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        kept = tracemalloc.take_snapshot().filter_traces([domain])
        assert sum(trace.size for trace in kept.traces) <= 16, "NumPy holds more than the last token"
        wide_session.logits.copy()
        assert tracemalloc.get_traced_memory()[1] - before > 80_000, "the measure notices a copy of the logits"
    finally:
        tracemalloc.stop()
