"""Requests: what they yield, how they end, and that what happens to one happens to no other."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.engine import engine as engine_module
from numballama.engine import pages as pages_module
from numballama.engine import scheduler as scheduler_module
from numballama.engine import sequence as sequence_module
from numballama.engine.engine import Engine
from numballama.engine.request import Request, TokenEvent
from numballama.errors import NOT_NUMBERS, ContextError, DeviceError, Error
from numballama.sampling import SamplingParams
from tests.helpers.engine_machine import check_engine
from tests.helpers.fake_runner import FakeRunner, expected, make_params, next_token, read_until_error, tokens_of

PROMPT = [1, 2, 3, 4, 5]


def make(**options: Any) -> tuple[Engine, FakeRunner]:
    runner = FakeRunner(**options)
    return Engine(runner), runner


@pytest.fixture(params=[0, 1, 2])
def lookahead(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def alone(prompt: list[int], count: int = 8, seed: int = 0) -> list[int]:
    return expected(prompt, count, 1000, seed)


def settle(engine: Engine) -> None:
    """Step until nothing is left to do."""
    while engine._has_work():
        engine._step()


def test_a_request_yields_its_tokens(lookahead: int) -> None:
    engine, runner = make(lookahead=lookahead)
    request = engine.submit(PROMPT, make_params(max_tokens=6))
    events = list(request)
    assert [event.token for event in events] == alone(PROMPT, 6)
    assert [event.finish_reason for event in events] == [None] * 5 + ["length"]
    assert events[-1].stop_reason is None and events[-1].prompt_tokens == 5
    assert request.finished and list(request) == []
    settle(engine)
    check_engine(engine, runner)
    assert runner.rows == 5 + 5, "no row was computed in vain"


def test_a_stop_token_ends_the_text(lookahead: int) -> None:
    engine, runner = make(lookahead=lookahead)
    third = alone(PROMPT)[2]
    events = list(engine.submit(PROMPT, make_params(), stop_token_ids=[third]))
    assert [event.token for event in events] == alone(PROMPT)[:3]
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", third)
    settle(engine)
    check_engine(engine, runner)
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize(("context", "pages"), [(None, 33), (12, 33), (None, 4)])
def test_the_text_ends_with_the_context_or_with_the_pages(context: int | None, pages: int, lookahead: int) -> None:
    runner = FakeRunner(lookahead=lookahead, pages=pages)
    engine = Engine(runner, context=context)
    room = {(None, 33): 64, (12, 33): 12, (None, 4): 12}[context, pages]
    for most in (None, 1000):
        events = list(engine.submit(PROMPT, make_params(max_tokens=most)))
        assert len(events) == room - 5 + 1
        assert (events[-1].finish_reason, events[-1].stop_reason) == ("length", "context")
    events = list(engine.submit(PROMPT, make_params(max_tokens=room - 5 + 1)))
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("length", None)


def test_no_tokens_are_no_run() -> None:
    engine, runner = make()
    assert list(engine.submit(PROMPT, make_params(max_tokens=0))) == [] and runner.runs == 0


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], Error, "the prompt is empty"),
        ([1, 1000], Error, "token 1 of the prompt is 1000; the vocabulary has 0 to 999"),
        ([1, -1], Error, "token 1 of the prompt is -1"),
        ([1, 2**70], Error, "token 1 of the prompt is 1180591620717411303424"),
        ([1.0], Error, "whole numbers"),
        (["a"], Error, "whole numbers"),
        ([[1], [2, 3]], Error, "whole numbers"),
        (7, Error, "a sequence of whole numbers, found 7"),
        ([1] * 65, ContextError, "has 65 tokens and the context 64; shorten it, or compile with context="),
    ],
)
def test_prompts_that_are_refused(prompt: list[Any], error: type[Error], message: str) -> None:
    engine, _ = make()
    with pytest.raises(error, match=message):
        engine.submit(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": "high"}, "priority must be a whole number, found 'high'"),
        ({"priority": None}, "priority must be a whole number, found None"),
        ({"priority": float("nan")}, "priority must be a whole number, found nan"),
        ({"salt": ["a"]}, r"salt must be a string or None, found \['a'\]"),
        ({"request_id": ["a"]}, r"request_id must be a string or None, found \['a'\]"),
        ({"reuse_prefix": "no"}, "reuse_prefix must be True or False, found 'no'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    """They ended the engine for all requests when it compared or looked them up."""
    engine, _ = make()
    other = engine.submit([7], make_params())
    with pytest.raises(Error, match=f"^{message}$"):
        list(engine.submit(list(range(9)), make_params(), **options))
    assert tokens_of(other) == alone([7])


def test_a_prompt_larger_than_all_pages_is_refused() -> None:
    engine, _ = make(pages=4)
    with pytest.raises(ContextError, match=r"13 tokens and all pages of the KV cache 12; shorten it, .* kv_tokens="):
        engine.submit([1] * 13)


def test_numpy_ids_and_any_iterable_are_prompts() -> None:
    engine, _ = make()
    for prompt in (np.array(PROMPT, np.int32), iter(PROMPT), tuple(PROMPT)):
        assert tokens_of(engine.submit(prompt, make_params())) == alone(PROMPT)


def test_what_process_returns_is_yielded_and_may_end_the_text(lookahead: int) -> None:
    class Text(str):
        finish_reason: str | None = None

    def process(event: TokenEvent) -> Text | None:
        if event.token % 2:
            return None
        text = Text(f"<{event.token}>")
        seen.append(event.token)
        if len(seen) == 3:
            text.finish_reason = "stop"
        return text

    seen: list[int] = []
    engine, _ = make(lookahead=lookahead)
    texts = list(engine.submit(PROMPT, make_params(max_tokens=40), process=process))
    assert texts == [f"<{token}>" for token in [each for each in alone(PROMPT, 40) if each % 2 == 0][:3]]
    settle(engine)
    assert engine.stats().pages_used == 0


def test_what_is_processed_when_it_is_read(lookahead: int) -> None:
    """By the reader, in order, and with all that the engine knows of the tokens; they know when they came."""

    def process(event: TokenEvent) -> TokenEvent:
        seen.append((threading.get_ident(), event.token))
        return event

    seen: list[tuple[int, int]] = []
    engine, _ = make(lookahead=lookahead)
    params = make_params(max_tokens=8, n=2)
    with engine:
        request = engine.submit(PROMPT, params, process=process, when_read=True)
        plain = list(engine.submit(PROMPT, params))
        while not request.finished:
            time.sleep(0.001)
        assert not seen
        events = list(request)
    assert seen == [(threading.get_ident(), event.token) for event in events]
    for index in range(2):
        own = [event for event in events if event.index == index]
        assert [event.token for event in own] == tokens_of(plain, index)
        assert [event.finish_reason for event in own] == [None] * 7 + ["length"]
        assert {(event.prompt_tokens, event.logprobs) for event in own} == {(len(PROMPT), None)}
        assert [event.time for event in own] == sorted({event.time for event in own})


def test_an_exception_of_process_ends_its_request_only(lookahead: int) -> None:
    def process(event: TokenEvent) -> TokenEvent:
        if event.token == alone(PROMPT)[3]:
            raise ValueError("my fault")
        return event

    engine, runner = make(lookahead=lookahead)
    others = [engine.submit([9, number], make_params()) for number in range(3)]
    read, error = read_until_error(engine.submit(PROMPT, make_params(), process=process))
    assert read == alone(PROMPT)[:3] and isinstance(error, ValueError)
    assert [tokens_of(other) for other in others] == [alone([9, number]) for number in range(3)]
    settle(engine)
    check_engine(engine, runner)


def test_logits_that_are_not_numbers_end_their_request_only(lookahead: int) -> None:
    engine, _ = make(lookahead=lookahead, nan_after={7: 3})
    broken, other = engine.submit([7, 7], make_params()), engine.submit(PROMPT, make_params())
    read, error = read_until_error(broken)
    assert read == alone([7, 7])[:3] and str(error) == NOT_NUMBERS
    assert tokens_of(other) == alone(PROMPT)


def test_params_that_the_runner_refuses_end_their_request_only(lookahead: int) -> None:
    class Picky(FakeRunner):
        def start(self, slot: int, params: SamplingParams, *rest: Any) -> None:
            if params.top_k == 13:
                raise Error("no thirteen")
            super().start(slot, params, *rest)

        def sample(self, slot: int, history: list[int]) -> int:
            return 0 if history[0] == 8 else super().sample(slot, history)

    engine = Engine(Picky(lookahead=lookahead))
    refused, other = engine.submit([8, 8], make_params(top_k=13)), engine.submit(PROMPT, make_params())
    with pytest.raises(Error, match="no thirteen"):
        list(refused)
    assert tokens_of(other) == alone(PROMPT)


def test_a_failure_of_the_device_ends_everything(lookahead: int) -> None:
    def fail(number: int) -> None:
        if number == 5:
            raise DeviceError("the card fell off the bus")

    engine, _ = make(lookahead=lookahead, before_collect=fail)
    requests = [engine.submit([3, number], make_params(max_tokens=20)) for number in range(6)]
    for request in requests:
        with pytest.raises(DeviceError, match="fell off"):
            list(request)
    with pytest.raises(DeviceError, match="fell off"):
        engine.submit(PROMPT)
    assert engine.stats().running == engine.stats().waiting == 0
    engine.close()


def test_n_sequences_share_the_prompt(lookahead: int) -> None:
    engine, runner = make(lookahead=lookahead)
    params = make_params(temperature=1.0, seed=11, max_tokens=5, n=3)
    prompt = list(range(9))
    events = list(engine.submit(prompt, params))
    for index in range(3):
        own = [event for event in events if event.index == index]
        assert [event.token for event in own] == alone(prompt, 5, 11 + index)
        assert own[-1].finish_reason == "length"
        assert own[0].cached_tokens == (0 if index == 0 else 8)
    assert sum(batch.rows - batch.decodes for batch in runner.batches) == 9 + 1 + 1
    assert engine.stats().prefix_hits == 16 and engine.stats().prefix_queries == 27


def test_the_next_turn_finds_the_conversation(lookahead: int) -> None:
    engine, runner = make(lookahead=lookahead)
    history = list(PROMPT)
    for turn in range(3):
        known = len(history)
        events = list(engine.submit(history, make_params()))
        assert [event.token for event in events] == alone(history)
        assert events[0].cached_tokens == (0 if turn == 0 else (known - 4) // 4 * 4)
        history += [*(event.token for event in events), 77, 78, 79]
    settle(engine)
    check_engine(engine, runner)


@pytest.mark.parametrize("options", [{"reuse_prefix": False}, {"salt": "other"}])
def test_prefixes_are_shared_only_where_they_may(options: dict[str, Any]) -> None:
    engine, _ = make()
    prompt = list(range(12))
    list(engine.submit(prompt, make_params()))
    assert next(iter(engine.submit(prompt, make_params()))).cached_tokens == 8
    assert next(iter(engine.submit(prompt, make_params(), **options))).cached_tokens == 0
    again = next(iter(engine.submit(prompt, make_params(), **options)))
    assert again.cached_tokens == (8 if "salt" in options else 0)


def test_a_random_seed_survives_preemption(lookahead: int) -> None:
    """The seed is drawn when the request is submitted, so that the same draws follow."""
    engine, runner = make(lookahead=lookahead, pages=9, max_sequences=3)
    params = make_params(temperature=1.0, max_tokens=14)
    requests = [engine.submit([number] * 6, params) for number in range(3)]
    seeds = [request._state.sequences[0].params.seed for request in requests]
    assert len(set(seeds)) == 3 and None not in seeds
    results = [tokens_of(request) for request in requests]
    assert results == [alone([number] * 6, 14, seed or 0) for number, seed in enumerate(seeds)]
    assert engine.stats().preemptions > 0 and sum(request.preemptions for request in requests) > 0
    settle(engine)
    check_engine(engine, runner)


def test_log_probabilities(lookahead: int) -> None:
    engine, _ = make(lookahead=lookahead)
    params = make_params(max_tokens=2)
    plain, wanted = engine.submit(PROMPT, params), engine.submit(PROMPT, make_params(max_tokens=2, logprobs=2))
    assert [event.logprobs for event in plain] == [None, None]
    for event in wanted:
        assert event.logprobs is not None
        assert event.logprobs.logprob == -event.token / 8
        assert event.logprobs.top == [(event.token, -event.token / 8), (1, -9)]


class EveryThird:
    """Allows tokens that are `residue` modulo 3, then the next residue."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.accepted: list[int] = []
        self.fail_at = fail_at

    def mask(self) -> np.ndarray:
        bits = np.zeros(1024, np.uint8)
        bits[len(self.accepted) % 3 : 1000 : 3] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        if len(self.accepted) == self.fail_at:
            raise Error("the grammar is stuck")
        self.accepted.append(token)


def test_a_constraint_restricts_each_token(lookahead: int) -> None:
    engine, _ = make(lookahead=lookahead, pages=7, max_sequences=3)
    bound = engine.submit(PROMPT, make_params(max_tokens=12), constraint=EveryThird)
    others = [engine.submit([4, number], make_params(max_tokens=12)) for number in range(2)]
    tokens = tokens_of(bound)
    assert [token % 3 for token in tokens] == [0, 1, 2] * 4
    assert [tokens_of(other) for other in others] == [alone([4, number], 12) for number in range(2)]
    with pytest.raises(Error, match="stuck"):
        list(engine.submit(PROMPT, make_params(), constraint=lambda: EveryThird(2)))


def test_a_cancelled_request_ends_at_the_next_step(lookahead: int) -> None:
    engine, runner = make(lookahead=lookahead)
    waiting = [engine.submit([6, number] * 3, make_params(max_tokens=40)) for number in range(8)]
    reader = iter(waiting[0])
    next(reader)
    for request in waiting[1:]:  # some generate, some wait
        request.cancel()
        request.cancel()
    assert [list(request) for request in waiting[1:]] == [[]] * 7
    next(reader)
    assert engine.stats().running == 1 and engine.stats().waiting == 0
    assert engine.cancel(waiting[0].id) and not engine.cancel("nobody")
    assert list(reader) == []
    settle(engine)
    check_engine(engine, runner)
    assert engine.stats().pages_used == 0


def test_cancelling_one_cancels_no_other() -> None:
    """Also when the one still waits, and others generate."""
    engine, _ = make(max_sequences=1)
    first, second = (engine.submit([5, number], make_params(), request_id=f"r{number}") for number in range(2))
    reader = iter(first)
    read = [next(reader).token]
    second.cancel()
    assert read + [event.token for event in reader] == alone([5, 0])


@pytest.mark.parametrize("how", ["break", "drop the iterator", "drop the request", "raise"])
def test_a_dropped_stream_is_cancelled(how: str, lookahead: int) -> None:
    engine, _ = make(lookahead=lookahead)
    request: Request[TokenEvent] | None = engine.submit(PROMPT, make_params(max_tokens=50))
    assert request is not None
    if how == "break":
        for _ in request:
            break
    elif how == "drop the iterator":
        iterator: Any = iter(request)
        next(iterator)
        del iterator
    elif how == "raise":
        with contextlib.suppress(ZeroDivisionError):
            for _ in request:
                raise ZeroDivisionError
    elif how == "drop the request":
        request = None
    settle(engine)
    assert engine.stats().generated_tokens < 5 and engine.stats().pages_used == 0


def test_the_engine_keeps_nothing_of_what_has_ended() -> None:
    """vLLM #44175, PR #44490."""
    engine, _ = make(lookahead=1)
    request = engine.submit(PROMPT, make_params())
    state, sequence = weakref.ref(request), weakref.ref(request._engine)
    list(request)
    settle(engine)
    del request
    assert state() is None and sequence() is engine
    assert not (engine._requests or engine._inbox or engine._cancelled or engine._runs or engine._touched)
    scheduler = engine.scheduler
    assert not (scheduler.waiting or scheduler.decoding or scheduler.prefilling or scheduler.leaving)
    assert not scheduler._parked and not scheduler.pages._writers


def test_callbacks_submit_and_cancel_and_must_not_wait() -> None:
    engine, _ = make()
    more: list[Request[TokenEvent]] = []

    def process(event: TokenEvent) -> TokenEvent:
        if not more:
            more.append(engine.submit([2, 2], make_params()))
            victim.cancel()
            with pytest.raises(Error, match="a callback cannot wait"):
                next(iter(engine.submit([4], make_params())))
            with pytest.raises(Error, match="a callback cannot"):
                engine.close()
        return event

    victim = engine.submit([8, 8], make_params())
    assert tokens_of(engine.submit(PROMPT, make_params(), process=process)) == alone(PROMPT)
    assert tokens_of(more[0]) == alone([2, 2]) and list(victim) == []


def test_ids_of_requests() -> None:
    engine, _ = make()
    first, second = engine.submit(PROMPT), engine.submit(PROMPT, request_id="mine")
    assert first.id == "request-0" and second.id == "mine"
    with pytest.raises(Error, match="a request with the id 'mine' is running"):
        engine.submit(PROMPT, request_id="mine")
    second.cancel()
    settle_one = engine.submit(PROMPT, make_params(max_tokens=1))
    list(settle_one)
    assert engine.submit(PROMPT, request_id="mine").id == "mine", "the id is free again"


def test_close_ends_all_requests() -> None:
    engine, runner = make(lookahead=1)
    reader = iter(engine.submit(PROMPT, make_params(max_tokens=50)))
    other = engine.submit([5], make_params())
    next(reader)
    engine.close()
    engine.close()
    assert not runner.in_flight
    assert str(read_until_error(reader)[1]) == "this engine is closed"
    with pytest.raises(Error, match="this engine is closed"):
        list(other)
    with pytest.raises(Error, match="this engine is closed"):
        engine.submit(PROMPT)


def test_exclusive_lends_the_whole_cache(lookahead: int) -> None:
    engine, runner = make(lookahead=lookahead)
    requests = [engine.submit([number, 4, 4, 4, 4, 4], make_params(max_tokens=20)) for number in range(6)]
    reader = iter(requests[0])
    read = [next(reader).token for _ in range(3)]
    with engine.exclusive():
        assert not runner.in_flight and engine.stats().pages_free == 32
        runner.queue.append(("poison", (list(range(33)),)))
    assert read + [event.token for event in reader] == alone([0, 4, 4, 4, 4, 4], 20)
    for number, request in enumerate(requests[1:], 1):
        assert tokens_of(request) == alone([number, 4, 4, 4, 4, 4], 20)


@pytest.mark.parametrize("where", ["before_submit", "before_collect"])
@pytest.mark.parametrize("nth", [0, 1, 3, 6])
def test_an_interrupted_step_is_computed_again(where: str, nth: int, lookahead: int) -> None:
    """The caller's request is cancelled, the others go on."""

    def interrupt(number: int) -> None:
        if number == nth and not done:
            done.append(number)
            raise KeyboardInterrupt

    done: list[int] = []
    engine, runner = make(lookahead=lookahead, **{where: interrupt})
    others = [engine.submit([number] * 5, make_params(max_tokens=12)) for number in range(5)]
    own = engine.submit(PROMPT, make_params(max_tokens=12))
    with pytest.raises(KeyboardInterrupt):
        list(own)
    assert list(own) == []
    for number, other in enumerate(others):
        assert tokens_of(other) == alone([number] * 5, 12)
    settle(engine)
    check_engine(engine, runner)


class InterruptAtLine:
    """Traces the engine's step and raises KeyboardInterrupt before the nth of its lines."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self, frame: FrameType, event: str, arg: object) -> InterruptAtLine | None:
        if frame.f_code.co_filename not in TORN or not self.is_step(frame):
            return None
        if event == "line":
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self

    @staticmethod
    def is_step(frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code.co_name != "_step":
            frame = frame.f_back
        return frame is not None


TORN = {module.__file__ for module in (engine_module, scheduler_module, pages_module, sequence_module)}


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 60, 120])
def test_a_step_torn_at_any_line_loses_nothing(start: int) -> None:
    """What two Ctrl-C do. Only the request whose token is being handed out can fail, and says so."""
    for nth in range(start, 3000, 181):
        engine, runner = make(lookahead=start // 60, pages=12, max_sequences=3, max_tokens=8)
        others = [engine.submit([number] * 5, make_params(max_tokens=9)) for number in range(3)]
        own = engine.submit([9] * 6, make_params(max_tokens=6))
        before = sys.gettrace()
        sys.settrace(InterruptAtLine(nth))
        try:
            with pytest.raises(KeyboardInterrupt):
                list(own)
        finally:
            sys.settrace(before)
        for number, other in enumerate(others):
            tokens, error = read_until_error(other)
            assert tokens == alone([number] * 5, 9)[: len(tokens)]
            assert len(tokens) == 9 if error is None else "interrupted while a token" in str(error)
        settle(engine)
        check_engine(engine, runner)
        assert engine.stats().pages_used == 0


def test_statistics() -> None:
    engine, _ = make(max_sequences=2)
    requests = [engine.submit(list(range(10)), make_params(max_tokens=5)) for _ in range(3)]
    readers = [iter(request) for request in requests]
    next(readers[0])
    stats = engine.stats()
    assert (stats.requests, stats.running, stats.waiting, stats.generated_tokens, stats.steps) == (3, 1, 2, 1, 1)
    assert stats.pages_used + stats.pages_cached + stats.pages_free == 32
    for reader in readers:
        list(reader)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used, stats.stalled_s) == (0, 0, 0, 0.0)
    assert (stats.prefix_queries, stats.prefix_hits) == (30, 16)
    assert (stats.prompt_tokens, stats.generated_tokens) == (10 + 2 + 2, 15)
    assert stats.generated_tokens_per_second > 0


@pytest.mark.parametrize("ahead", [0, 2])
def test_tokens_behind_the_end_are_not_counted(ahead: int) -> None:
    """Runs that are submitted ahead sample more than a text that has ended needs."""
    engine, _ = make(lookahead=ahead)
    third = tokens_of(engine.submit(PROMPT, make_params(max_tokens=3)))[2]
    before = engine.stats().generated_tokens
    tokens = tokens_of(engine.submit(PROMPT, make_params(max_tokens=50), stop_token_ids=[third]))
    settle(engine)
    assert engine.stats().generated_tokens - before == len(tokens) == 3


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(1, 20)), max_size=8),
    st.integers(0, 2),
    st.integers(9, 30),
)
def test_together_as_alone(jobs: list[tuple[list[int], int]], ahead: int, pages: int) -> None:
    engine, runner = make(lookahead=ahead, pages=pages, vocab_size=3)
    requests = [engine.submit(prompt, make_params(max_tokens=most)) for prompt, most in jobs]
    for (prompt, most), request in zip(jobs, requests, strict=True):
        count = min(most, engine.capacity - len(prompt) + 1)
        assert tokens_of(request) == expected(prompt, count, 3)
    settle(engine)
    check_engine(engine, runner)


def test_the_fake_model_depends_on_all_of_its_history() -> None:
    assert next_token([1, 2], 1000) != next_token([2, 1], 1000) != next_token([2, 1, 0], 1000)
