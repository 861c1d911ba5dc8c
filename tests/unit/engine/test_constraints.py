"""Constraints are advanced beside the engine, and delay no sequence without one."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from numballama.engine.constraints import MASK_WAIT_S, SLOW_S, Advance, ConstraintWorker, mask_wait_s
from numballama.engine.engine import Engine
from numballama.engine.request import TokenEvent
from numballama.engine.sequence import Constraint, Sequence
from numballama.errors import Error
from tests.helpers.engine_machine import check_engine
from tests.helpers.fake_runner import FakeRunner, expected, make_params, next_token, tokens_of

PROMPT = [1, 2, 3]


class Evens:
    """Allows even tokens. Ends after `length` tokens; waits for `gate` before each."""

    def __init__(self, length: int = 10**6, gate: threading.Semaphore | None = None, seconds: float = 0) -> None:
        self.length, self.gate, self.seconds = length, gate, seconds
        self.accepted: list[int] = []
        self.threads: set[int] = set()

    def mask(self) -> NDArray[np.uint32]:
        return np.full(32, 0x55555555, np.uint32)

    def accept(self, token: int) -> bool:
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        time.sleep(self.seconds)
        self.threads.add(threading.get_ident())
        self.accepted.append(token)
        return len(self.accepted) == self.length


class Together(Evens):
    """Advances many at once, and fails at a token that it knows."""

    forced: tuple[int, ...] = ()
    calls: list[int] = []  # noqa: RUF012

    @staticmethod
    def advance(steps: Any) -> list[bool | Exception]:
        Together.calls.append(len(steps))
        return [each.accept(token) if token != 666 else Error("stuck") for each, token in steps]


class Forcing(Together):
    """After a token come two that it forces."""

    @staticmethod
    def advance(steps: Any) -> list[bool | Exception]:
        for each, token in steps:
            each.accept(token)
            each.forced = (token + 1, token + 2)
            each.accepted += each.forced
        return [len(each.accepted) >= each.length for each, _ in steps]


def forcing(prompt: list[int], count: int) -> list[int]:
    """What a prompt continues with under `Forcing`."""
    evens = list(range(0, 1024, 2))
    history = list(prompt)
    while len(history) < len(prompt) + count:
        token = evens[next_token(history, 1000) % len(evens)]
        history += [token, token + 1, token + 2]
    return history[len(prompt) : len(prompt) + count]


@pytest.fixture(params=[0, 1, 2])
def lookahead(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_the_end_of_a_grammar_ends_the_text(lookahead: int) -> None:
    engine = Engine(FakeRunner(lookahead=lookahead))
    for length, most, reason in ((3, 8, "stop"), (3, 3, "stop"), (4, 3, "length")):
        events = list(engine.submit(PROMPT, make_params(max_tokens=most), constraint=lambda n=length: Evens(n)))
        assert len(events) == 3 and {event.token % 2 for event in events} == {0}
        assert [event.finish_reason for event in events] == [None, None, reason]
        assert events[-1].stop_reason is None


@pytest.mark.parametrize("rows", [4, 16])
def test_forced_tokens_need_no_run(lookahead: int, rows: int) -> None:
    runner = FakeRunner(lookahead=lookahead, max_tokens=rows)
    engine = Engine(runner)
    for most, length, reason in ((20, 10**6, "length"), (20, 12, "stop"), (12, 12, "stop"), (11, 12, "length")):
        runs, before = runner.runs, engine.stats()
        params = make_params(max_tokens=most, presence_penalty=1)
        events = list(engine.submit(PROMPT, params, constraint=lambda n=length: Forcing(n), reuse_prefix=False))
        count = min(most, length)
        assert [event.token for event in events] == forcing(PROMPT, count)
        assert [event.finish_reason for event in events] == [None] * (count - 1) + [reason]
        assert runner.runs - runs == -(-count // 3)  # the rows of prompt and forced tokens fit into one run each
        after = engine.stats()
        assert after.generated_tokens - before.generated_tokens == count
        assert after.prompt_tokens - before.prompt_tokens == len(PROMPT)
        check_engine(engine, runner)


def test_a_text_may_end_within_forced_tokens(lookahead: int) -> None:
    """As at a stop string: what follows is not handed out."""
    engine, second = Engine(FakeRunner(lookahead=lookahead)), forcing(PROMPT, 5)[4]

    def process(event: TokenEvent) -> TokenEvent:
        return replace(event, finish_reason="stop") if event.token == second else event

    events = list(engine.submit(PROMPT, make_params(max_tokens=20), process=process, constraint=Forcing))
    assert [event.token for event in events] == forcing(PROMPT, 5)


def test_forced_tokens_are_found_in_the_cache(lookahead: int) -> None:
    runner = FakeRunner(lookahead=lookahead)
    engine = Engine(runner)
    tokens = tokens_of(engine.submit(PROMPT, make_params(max_tokens=14), constraint=Forcing))
    request = engine.submit([*PROMPT, *tokens], make_params(max_tokens=1))
    list(request)
    assert request.cached_tokens == 12  # whole pages of the 15 positions that were computed
    check_engine(engine, runner)


def test_a_stop_token_is_not_offered_to_the_grammar() -> None:
    engine, evens = Engine(FakeRunner()), Evens()
    first = next(iter(engine.submit(PROMPT, make_params(), constraint=Evens))).token
    events = list(engine.submit(PROMPT, make_params(), stop_token_ids=[first], constraint=lambda: evens))
    assert [(event.finish_reason, event.stop_reason) for event in events] == [("stop", first)]
    assert not evens.accepted


def test_others_go_on_while_a_grammar_is_slow(lookahead: int) -> None:
    engine, gate = Engine(FakeRunner(lookahead=lookahead)), threading.Semaphore(0)
    bound = engine.submit(PROMPT, make_params(max_tokens=5), constraint=lambda: Evens(gate=gate))
    free = engine.submit([7, 8], make_params(max_tokens=40))
    assert tokens_of(free) == expected([7, 8], 40, 1000)  # inline: this thread steps, and the gate is shut
    for _ in range(5):
        gate.release()
    assert len(tokens_of(bound)) == 5


def test_sequences_of_one_request_and_preempted_ones(lookahead: int) -> None:
    runner = FakeRunner(lookahead=lookahead, pages=9, max_sequences=4)
    engine, made = Engine(runner), list[Evens]()

    def make() -> Evens:
        made.append(Evens(seconds=0.001))
        return made[-1]

    requests = [
        engine.submit([number] * 6, make_params(max_tokens=10, temperature=1, seed=5, n=2), constraint=make)
        for number in range(1, 3)
    ]
    for request in requests:
        events = list(request)
        assert len(events) == 20 and {event.token % 2 for event in events} == {0}
    assert sum(request.preemptions for request in requests) > 0, "the test is about something"
    assert [len(each.accepted) for each in made] == [10] * 4
    check_engine(engine, runner)


def test_a_failing_grammar_fails_its_request_alone() -> None:
    engine = Engine(FakeRunner())

    class Fails(Evens):
        def accept(self, token: int) -> bool:
            raise ValueError("broken")

    bad = engine.submit(PROMPT, make_params(), constraint=Fails)
    good = engine.submit([9], make_params(), constraint=Evens)
    with pytest.raises(ValueError, match="broken"):
        list(bad)
    assert len(tokens_of(good)) == 8


def test_cancelled_while_the_grammar_works() -> None:
    engine, gate = Engine(FakeRunner()), threading.Semaphore(0)
    bound = engine.submit(PROMPT, make_params(), constraint=lambda: Evens(gate=gate))
    threading.Timer(0.05, bound.cancel).start()
    assert list(bound) == []
    assert tokens_of(engine.submit([9], make_params())) == expected([9], 8, 1000)
    gate.release()
    engine.close()


def advance(constraint: Constraint, token: int) -> Advance:
    sequence = Sequence([1], make_params(), 5, order=(0, 0, 0), constraint=constraint)
    return Advance(sequence, constraint, token, None)


def test_a_class_may_advance_many_at_once() -> None:
    worker, many = ConstraintWorker(), [Together(1), Together(2), Evens(1)]
    Together.calls.clear()
    worker.put([advance(each, token) for each, token in zip(many, (4, 666, 6), strict=True)])
    done = worker.take(10)
    assert Together.calls == [2] and not worker.waiting
    assert done[0].result is True and isinstance(done[1].result, Error) and done[2].result is True
    assert threading.get_ident() not in many[0].threads


def test_a_slow_constraint_is_advanced_by_itself_until_it_is_fast() -> None:
    worker, slow, fast = ConstraintWorker(), Evens(seconds=2 * SLOW_S), Evens()
    worker.put([advance(slow, 2)])
    assert len(worker.take(10)) == 1
    for _ in range(3):
        worker.put([advance(slow, 2), advance(fast, 2)])
        assert [each.constraint for each in worker.take(10)] == [fast]
        worker.wait(10)
        assert [each.sequence.constraint for each in worker.take(0)] == [slow]
    slow.seconds = 0
    worker.put([advance(slow, 2)])
    worker.wait(10)
    worker.take(0)
    worker.put([advance(slow, 2), advance(fast, 2)])
    assert len(worker.take(10)) == 2
    worker.close()


def test_what_is_late_is_waited_for_once() -> None:
    """A grammar that hangs delays one step; what comes after it is waited for as ever."""
    worker, gate = ConstraintWorker(), threading.Semaphore(0)
    stuck, quick = Evens(gate=gate), Evens(seconds=0.005)
    worker.put([advance(stuck, 2)])
    assert worker.take(0.01) == []
    started = time.perf_counter()
    assert worker.take(30) == [] and worker.waiting
    worker.put([advance(quick, 4)])
    assert [each.constraint for each in worker.take(30)] == [quick]
    assert time.perf_counter() - started < 15
    gate.release()
    worker.wait(30)
    assert [each.constraint for each in worker.take(0)] == [stuck] and not worker.waiting
    worker.close()


def test_how_long_a_step_waits_for_masks() -> None:
    """2 ms if all have constraints. Otherwise a part of a step, more of it if the device has a run meanwhile."""
    without, with_one = Sequence([1], make_params(), 5, order=(0, 0, 0)), advance(Evens(), 2).sequence
    assert mask_wait_s([], 1, False) == mask_wait_s([with_one, with_one], 0.001, False) == MASK_WAIT_S
    for step_s in (0.0, 0.001, 0.03):
        assert mask_wait_s([with_one, without], step_s, False) == pytest.approx(0.05 * step_s)
    assert mask_wait_s([without], 0.001, True) == pytest.approx(0.0005)
    assert mask_wait_s([without], 0.03, True) == mask_wait_s([without], 1, False) == MASK_WAIT_S


def test_a_sequence_without_a_constraint_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine waits for masks beside it for a small part of its steps, and as long as it may once it has ended."""
    waits, take = list[float](), ConstraintWorker.take

    def noted(self: ConstraintWorker, wait_s: float) -> list[Advance]:
        waits.append(wait_s)
        return take(self, wait_s)

    monkeypatch.setattr(ConstraintWorker, "take", noted)
    runner = FakeRunner(pages=300, pages_per_sequence=128, before_collect=lambda number: time.sleep(0.0003))
    with Engine(runner) as engine:
        plain = engine.submit(PROMPT, make_params(max_tokens=500))
        limited = engine.submit(PROMPT, make_params(max_tokens=8), constraint=lambda: Evens(seconds=0.0005))
        assert len(tokens_of(limited)) == 8 and engine.stats().running == 1
        beside = list(waits)
        plain.cancel()
        waits.clear()
        assert len(tokens_of(engine.submit(PROMPT, make_params(max_tokens=8), constraint=Evens))) == 8
    assert min(beside) < MASK_WAIT_S / 10 and sum(beside) < len(beside) * MASK_WAIT_S / 2
    assert waits and set(waits) == {MASK_WAIT_S}
