"""What runs hold, who is admitted and who gives way; a machine that submits, cancels and steps at random."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from numballama.engine.engine import Engine
from numballama.engine.pages import BlockManager
from numballama.engine.request import Request
from numballama.engine.scheduler import Run, Scheduler
from numballama.engine.sequence import Sequence, Status
from numballama.errors import Error
from numballama.sampling import FEED, SamplingParams
from tests.helpers.engine_machine import check_engine
from tests.helpers.extent import EVERYTHING
from tests.helpers.fake_runner import FakeRunner, expected, make_params, next_token

PAGE = 4


def make(pages: int = 33, sequences: int = 4, rows: int = 16, mixed: int | None = None) -> Scheduler:
    return Scheduler(BlockManager(pages, PAGE), sequences, rows, mixed)


arrivals = iter(range(10**9))


def sequence(length: int, output: int = 50, *, priority: int = 0, ids: Iterable[int] = (), **options: Any) -> Sequence:
    prompt = [*ids] or [next(arrivals)] * length
    return Sequence(prompt, make_params(), output, order=(priority, next(arrivals), 0), **options)


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for each in sequences:
        scheduler.add(each)


def collect(scheduler: Scheduler, run: Run | None, token: int = 7) -> None:
    """End a run; each of its logit rows has sampled the same token."""
    assert run is not None
    scheduler.collected(run)
    for each in run.sampled:
        if each.status is not Status.FINISHED:
            each.ids.append(token)


def step(scheduler: Scheduler) -> Run:
    run = scheduler.plan()
    assert run is not None
    collect(scheduler, run)
    return run


def test_a_prompt_is_computed_in_chunks_then_row_by_row() -> None:
    scheduler, one = make(rows=8), sequence(18)
    add(scheduler, one)
    chunks = [step(scheduler) for _ in range(3)]
    assert [run.batch.rows for run in chunks] == [8, 8, 2]
    assert [run.batch.logits.tolist() for run in chunks] == [[], [], [1]]
    assert [run.sampled for run in chunks] == [[], [], [one]]
    for position in (18, 19, 20, 21):
        batch = step(scheduler).batch
        assert (batch.ids.tolist(), batch.positions.tolist(), batch.logits.tolist()) == ([FEED], [position], [0])
        assert batch.decodes == 1


def test_all_that_generate_have_a_row_beside_a_long_prompt() -> None:
    """llama.cpp #10860, #10054, #4875, #22921: others wait for a long prompt."""
    scheduler = make(pages=2000, sequences=17, rows=256, mixed=48)
    streams = [sequence(5, 100) for _ in range(16)]
    add(scheduler, *streams)
    step(scheduler)
    add(scheduler, sequence(2000))
    for _ in range(2000 // 32):
        run = step(scheduler)
        assert run.decodes == streams and run.batch.rows == 48 and run.batch.decodes == 16


def test_a_prompt_alone_takes_all_rows() -> None:
    scheduler = make(rows=16, mixed=6)
    add(scheduler, sequence(40))
    assert step(scheduler).batch.rows == 16


def test_first_come_first_served_by_priority() -> None:
    scheduler = make(sequences=1)
    late, early, urgent = sequence(3), sequence(3), sequence(3, priority=-1)
    add(scheduler, early, late, urgent)
    for expected_next in (urgent, *sorted((early, late), key=lambda each: each.order)):
        assert step(scheduler).starts == [expected_next]
        scheduler.finish(expected_next)


def test_nobody_overtakes_a_prompt_that_waits_for_pages() -> None:
    scheduler = make(pages=9, sequences=4)
    first, large, small = sequence(16, 9), sequence(20, 9), sequence(2, 9)
    add(scheduler, first, large, small)
    assert step(scheduler).starts == [first]
    assert step(scheduler).starts == [] and scheduler.waiting == [large, small]
    scheduler.finish(first)
    assert step(scheduler).starts == [large], "no more than 16 rows a run: the small one is next"
    assert step(scheduler).starts == [small]


def test_the_last_in_order_gives_way_and_continues_with_what_it_has() -> None:
    scheduler = make(pages=9, sequences=2)
    old, new = sequence(12, 15), sequence(12, 15)
    add(scheduler, old, new)
    while not new.preemptions:
        step(scheduler)
    assert new.status is Status.WAITING and old.status is Status.RUNNING and scheduler.waiting == [new]
    known = list(new.ids)
    scheduler.finish(old)
    run = step(scheduler)
    assert run.starts == [new] and new.ids[:-1] == known
    assert new.output == [7] * new.output_tokens
    scheduler.pages.check()


def test_a_preempted_sequence_with_rows_in_flight_keeps_its_pages_until_they_are_collected() -> None:
    scheduler = make(pages=8, sequences=2)
    old, new = sequence(12, 15), sequence(12, 15)
    add(scheduler, old, new)
    runs = [scheduler.plan()]
    while not new.preemptions:
        runs.append(scheduler.plan())  # the old one asks for a page while the new one's row is in flight
        if not new.preemptions:
            collect(scheduler, runs.pop(0))
    assert new.status is Status.PREEMPTED and new in scheduler.leaving and new.pages and new.slot >= 0
    while runs:
        collect(scheduler, runs.pop(0))
    assert new.status is Status.WAITING and not new.pages and not scheduler.leaving


def test_a_finished_sequence_keeps_its_pages_while_a_row_is_in_flight() -> None:
    scheduler, one = make(), sequence(4)
    add(scheduler, one)
    step(scheduler)
    first, second = scheduler.plan(), scheduler.plan()
    collect(scheduler, first)
    scheduler.finish(one)
    assert one.pages and scheduler.pages.used == 2 and scheduler.plan() is None
    collect(scheduler, second)
    assert scheduler.pages.used == 0 and scheduler.pages.cached == 1 and scheduler.running == 0


def test_no_row_is_planned_beyond_the_last_token() -> None:
    scheduler, one = make(), sequence(4, 3)
    add(scheduler, one)
    runs = [scheduler.plan() for _ in range(4)]
    assert [run is not None for run in runs] == [True, True, True, False]
    for run in runs[:3]:
        collect(scheduler, run)
    assert one.output_tokens == 3


def test_a_constrained_sequence_waits_for_its_token() -> None:
    class Nothing:
        def mask(self) -> None:
            return None

        def accept(self, token: int) -> None:
            pass

    scheduler, free, bound = make(), sequence(4), sequence(4, constraint=Nothing())
    add(scheduler, free, bound)
    first = scheduler.plan()
    second = scheduler.plan()
    assert second is not None and second.decodes == [free]
    collect(scheduler, first)
    third = scheduler.plan()
    assert third is not None and third.decodes == [free, bound]


def test_prompts_wait_for_the_beginning_that_another_one_computes() -> None:
    """64 requests with a common prompt of 1,000 tokens compute it once."""
    scheduler = Scheduler(BlockManager(4000, 32), 64, 512)
    common = [5] * 1000
    everyone = [sequence(0, ids=[*common, number]) for number in range(64)]
    add(scheduler, *everyone)
    rows = 0
    while scheduler.running < 64:
        run = step(scheduler)
        rows += run.batch.rows - run.batch.decodes
    rows += sum(each.prompt_tokens - each.planned for each in scheduler.prefilling)
    new = 63 * (1001 - 31 * 32)
    assert rows == 1001 + new
    assert scheduler.prefix_hits == 63 * 31 * 32
    scheduler.pages.check()


def test_those_who_wait_for_a_page_do_not_block_others() -> None:
    scheduler = make(rows=24)
    leader, follower, other = sequence(0, ids=[3] * 20), sequence(0, ids=[3] * 21), sequence(4)
    add(scheduler, leader, follower, other)
    run = scheduler.plan()
    assert run is not None and run.starts == [leader, other]
    assert follower.parked_on == leader.pages[4] and scheduler.queued == 1
    collect(scheduler, run)
    assert step(scheduler).starts == [follower] and follower.cached_tokens == 20


def test_those_who_wait_for_a_page_wait_no_longer_when_its_writer_ends() -> None:
    scheduler = make(rows=24, mixed=12)
    leader, follower = sequence(0, ids=[3] * 20), sequence(0, ids=[3] * 21)
    add(scheduler, sequence(2))
    step(scheduler)
    add(scheduler, leader)
    step(scheduler)
    scheduler.finish(scheduler.decoding[0])
    add(scheduler, follower)
    run = scheduler.plan()
    assert run is not None and follower.parked_on == leader.pages[4]
    scheduler.finish(leader)
    collect(scheduler, run)
    assert not follower.parked_on, "nobody computes its page any more"
    assert step(scheduler).starts == [follower] and follower.cached_tokens == 8


def test_an_urgent_prompt_does_not_wait_for_the_page_of_another() -> None:
    scheduler = make(rows=4, sequences=4)
    leader, urgent = sequence(0, ids=[3] * 20), sequence(0, ids=[3] * 21, priority=-1)
    add(scheduler, leader)
    step(scheduler)
    scheduler.finish(waiting := sequence(0, ids=[3] * 22))
    add(scheduler, urgent)
    step(scheduler)
    assert urgent.parked_on == 0 and waiting.status is Status.FINISHED


def test_one_that_waits_for_a_page_can_end() -> None:
    scheduler = make(rows=4)
    leader, follower = sequence(0, ids=[3] * 20), sequence(0, ids=[3] * 21)
    add(scheduler, leader, follower)
    step(scheduler)
    scheduler.finish(follower)
    assert scheduler.queued == 0 and follower.status is Status.FINISHED
    while leader in scheduler.prefilling:
        step(scheduler)


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(Error, match="can never fit into 8 pages"):
        make(pages=9).add(sequence(33))
    with pytest.raises(Error, match="too small for 4 sequences"):
        make(rows=3)


PROMPTS = st.builds(
    lambda start, middle, end: [*([1, 2, 0] * 3)[:start], *([0] * middle), *end],
    st.integers(0, 9),
    st.integers(0, 12),
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
)


class Forcing:
    """Each token forces as many as its id, of 0 and 1."""

    forced: tuple[int, ...] = ()

    def mask(self) -> None:
        return None

    def accept(self, token: int) -> None:
        self.forced = tuple(number % 2 for number in range(token))

    @staticmethod
    def advance(steps: list[tuple[Forcing, int]]) -> list[bool | Exception]:
        for each, token in steps:
            each.accept(token)
        return [False] * len(steps)


class AtOnce:
    """In place of a pool of threads: a function is called where it is submitted, so that a machine can be replayed."""

    def submit(self, function: Callable[..., None], *arguments: object) -> None:
        function(*arguments)

    def shutdown(self, **options: bool) -> None:
        pass


def forcing(prompt: list[int], count: int, seed: int) -> list[int]:
    """What a prompt continues with under `Forcing`."""
    history, constraint = list(prompt), Forcing()
    while len(history) < len(prompt) + count:
        history.append(next_token(history, 3, seed))
        constraint.accept(history[-1])
        history += constraint.forced
    return history[len(prompt) : len(prompt) + count]


class Machine(RuleBasedStateMachine):
    """Requests come, are cancelled and end, while runs are up to two steps ahead. Each must get its own tokens."""

    @initialize(
        lookahead=st.integers(0, 2),
        sequences=st.integers(1, 4),
        more_rows=st.integers(0, 12),
        mixed=st.integers(1, 16),
        page=st.sampled_from([1, 2, 4, 8]),
        tokens=st.integers(24, 100),
    )
    def open(self, lookahead: int, sequences: int, more_rows: int, mixed: int, page: int, tokens: int) -> None:
        pages = 1 + -(-tokens // page)
        self.runner = FakeRunner(
            sequences, sequences + more_rows, page, pages, pages_per_sequence=64 // page, lookahead=lookahead,
            vocab_size=3,
        )  # fmt: skip
        self.engine = Engine(self.runner, mixed_tokens=mixed)
        self.engine._constraints._pool = AtOnce()  # type: ignore[assignment]
        self.live: list[tuple[Request[Any], list[int], SamplingParams, int, frozenset[int], bool]] = []
        self.submitted = 0

    @rule(
        prompt=PROMPTS,
        most=st.integers(1, 30),
        priority=st.integers(-1, 1),
        n=st.integers(1, 3),
        seed=st.sampled_from([None, 5]),
        salt=st.sampled_from([None, "a"]),
        reuse=st.booleans(),
        stops=st.sampled_from([frozenset[int](), frozenset([2])]),
        forces=st.booleans(),
    )
    def submit(
        self,
        prompt: list[int],
        most: int,
        priority: int,
        n: int,
        seed: int | None,
        salt: str | None,
        reuse: bool,
        stops: frozenset[int],
        forces: bool,
    ) -> None:
        params = make_params(max_tokens=most, seed=seed, temperature=0 if seed is None else 1, n=n)
        request = self.engine.submit(
            prompt, params, priority=priority, salt=salt, reuse_prefix=reuse, stop_token_ids=stops,
            constraint=Forcing if forces else None,
        )  # fmt: skip
        most = min(most, self.engine.capacity - len(prompt) + 1)
        self.live.append((request, prompt, params, most, stops, forces))
        self.submitted += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.live) - 1))
        request = self.live.pop(place)[0]
        request.cancel()

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            if self.engine._has_work():
                self.engine._step()
                check_engine(self.engine, self.runner)
        self.check_finished()

    @rule()
    def interrupt(self) -> None:
        """As Ctrl-C in the middle of a step does: everything starts again from the tokens that are known."""
        self.engine._recover()

    def check_finished(self) -> None:
        for entry in [each for each in self.live if each[0].finished]:
            request, prompt, params, most, stops, forces = entry
            self.live.remove(entry)
            assert request._state.error is None, request._state.error
            events = list(request)
            for index in range(params.n):
                own = [event for event in events if event.index == index]
                own_seed = (params.seed or 0) + index if params.temperature else 0
                alone = forcing(prompt, most, own_seed) if forces else expected(prompt, most, 3, own_seed)
                end = next((number for number, token in enumerate(alone, 1) if token in stops), most)
                assert [event.token for event in own] == alone[:end]
                assert [event.finish_reason for event in own[:-1]] == [None] * (end - 1)
                assert own[-1].finish_reason == ("stop" if alone[end - 1] in stops else "length")

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "engine"):
            check_engine(self.engine, self.runner)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        work = sum((len(prompt) + most) * params.n for _, prompt, params, most, *_ in self.live)
        for _ in range(20 + 20 * work):
            if not self.engine._has_work():
                break
            self.engine._step()
            check_engine(self.engine, self.runner)
        self.check_finished()
        assert not self.live and not self.engine._has_work(), "every request ends"
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        assert stats.requests == self.submitted
        self.engine.close()


class TestMachine(Machine.TestCase):
    settings = settings(suppress_health_check=list(HealthCheck), stateful_step_count=15)


def test_forced_text_that_waits_for_pages() -> None:
    """A page that a sequence has got before it waits for more is in the device's page table, too."""
    machine = Machine()
    machine.open(lookahead=1, more_rows=0, page=1, sequences=2, tokens=24, mixed=1)
    machine.submit(
        forces=True, most=14, n=2, priority=0, prompt=[0], reuse=False, salt=None, seed=None, stops=frozenset()
    )
    machine.teardown()


EXAMPLES = 200 if EVERYTHING else 100


@pytest.mark.slow
class TestLongMachine(Machine.TestCase):
    settings = settings(suppress_health_check=list(HealthCheck), stateful_step_count=50, max_examples=EXAMPLES)
