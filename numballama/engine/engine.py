"""`Engine`: takes requests, plans and submits runs, and hands their tokens out."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, overload

from ..errors import NOT_NUMBERS, DeviceError, Error
from ..sampling import DEFAULTS, Sampled, SamplingParams
from ..validation import check_how
from .constraints import Advance, ConstraintWorker, mask_wait_s
from .driver import ENGINE_CLOSED, Driver
from .pages import BlockManager
from .request import FinishReason, R, Request, RequestState, Response, TokenEvent, TokenLogprobs, check_prompt
from .runner import Runner
from .scheduler import Run, Scheduler
from .sequence import Constraint, Sequence, Status, make_sequences, owner
from .stats import EngineStats, Rates

if TYPE_CHECKING:
    import asyncio


class Engine:
    """Generates for many requests at once, on one runner.

    `submit` takes a prompt, from any thread or event loop, and returns a `Request` to read the tokens from. Whoever
    reads steps the engine; after `start`, or inside `with engine:`, a thread does.

    A step plans runs and submits them until `runner.lookahead` + 1 are in flight, then waits for the oldest and hands
    its tokens out. So a run may be planned before the tokens of the one before it are known.

    `context`: tokens a sequence may have; default and maximum is what a row of the page table holds. `mixed_tokens`:
    rows of a run, at most, in which others generate beside a prompt. Default: `runner.max_tokens`.
    """

    def __init__(self, runner: Runner, *, context: int | None = None, mixed_tokens: int | None = None) -> None:
        self.runner = runner
        pages: BlockManager[Sequence] = BlockManager(runner.pages, runner.page)
        self.scheduler = Scheduler(pages, runner.max_sequences, runner.max_tokens, mixed_tokens)
        table = runner.pages_per_sequence * runner.page
        self.context = min(context or table, table)
        self.capacity = min(self.context, (runner.pages - 1) * runner.page)
        """Tokens a sequence can have: the context, or what all pages hold."""
        self._lookahead = runner.lookahead
        self._requests: dict[str, RequestState] = {}  # those that have not ended
        self._inbox: deque[RequestState] = deque()  # submitted, and not yet with the scheduler
        self._cancelled: deque[RequestState] = deque()
        self._runs: deque[Run] = deque()  # in flight, the oldest first
        self._constraints = ConstraintWorker()
        self._touched: list[RequestState] = []  # requests whose readers must be woken after this step
        self._handling: RequestState | None = None  # whose token is being handed out
        self._failure: BaseException | None = None
        self._numbers = itertools.count()
        self._submitted = self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._rates, self._last_step, self._step_s, self._now = Rates(), time.monotonic(), 0.0, 0.0
        self.hand_over: Callable[[list[RequestState]], list[RequestState]] = list  # see `_wake`
        self._driver = Driver(self._step, self._has_work, self._fail, "numballama engine")

    @overload
    def submit(
        self, prompt: Iterable[int], params: SamplingParams | None = ..., *, priority: int = ...,
        request_id: str | None = ..., reuse_prefix: bool = ..., salt: str | None = ...,
        stop_token_ids: Iterable[int] = ..., process: None = ..., constraint: Callable[[], Constraint] | None = ...,
    ) -> Request[TokenEvent]: ...  # fmt: skip

    @overload
    def submit(
        self, prompt: Iterable[int], params: SamplingParams | None = ..., *, priority: int = ...,
        request_id: str | None = ..., reuse_prefix: bool = ..., salt: str | None = ...,
        stop_token_ids: Iterable[int] = ..., process: Callable[[TokenEvent], R | None],
        when_read: bool = ..., constraint: Callable[[], Constraint] | None = ...,
    ) -> Request[R]: ...  # fmt: skip

    def submit(
        self, prompt: Iterable[int], params: SamplingParams | None = None, *, priority: int = 0,
        request_id: str | None = None, reuse_prefix: bool = True, salt: str | None = None,
        stop_token_ids: Iterable[int] = (), process: Callable[[TokenEvent], Response | None] | None = None,
        when_read: bool = False, constraint: Callable[[], Constraint] | None = None,
    ) -> Request[TokenEvent] | Request[R]:  # fmt: skip
        """Queue a prompt and return the request to read its tokens from. Keep it: without a reference it is cancelled.

        `params` say how to sample, and how many sequences (`n`) to generate. A lower `priority` comes first.
        `reuse_prefix`: take tokens at the beginning of the prompt from pages that other requests with the same `salt`
        have computed. False: compute all, and share with nobody. `stop_token_ids` end a sequence, all of them: the
        engine knows no end-of-sequence token.

        `process` is called with each token, in the thread that steps the engine, and returns what the request yields:
        anything with a `finish_reason`, which ends the sequence if it is not None; or None, which yields nothing. What
        it raises ends this request and is raised where it is read. It may submit and cancel, and must not wait for
        responses. With `when_read` the reader calls it, for what is read; its responses end nothing. `constraint` makes
        the object that restricts the tokens of one sequence. It is not asked about stop tokens. When it says that the
        text is complete, the sequence ends with "stop".

        Raises `ContextError` for a prompt that can never fit, `Error` for an invalid one, for an id in use, and when
        the engine is closed, `DeviceError` in a forked child, and the device's error after it has failed.
        """
        self._driver.check_process()
        priority = check_how(priority, request_id, reuse_prefix, salt)
        settings = DEFAULTS if params is None else params
        ids, number = self.validate(prompt), next(self._numbers)
        state = RequestState(f"request-{number}" if request_id is None else request_id, process, when_read)
        room = self.capacity - len(ids) + 1
        most = room if settings.max_tokens is None else min(settings.max_tokens, room)
        state.context_bound = settings.max_tokens is None or room < settings.max_tokens
        state.logprobs = settings.logprobs is not None
        root: Hashable = ("salt", salt) if reuse_prefix else ("request", number)
        if most:
            state.sequences = make_sequences(
                ids, settings, most, priority, number, root=root, stop_token_ids=frozenset(stop_token_ids),
                constraint=constraint, request=state,
            )  # fmt: skip
        state.live, state.done = len(state.sequences), not most
        with self._driver.lock:
            if self._failure is not None:
                raise self._failure
            if self._driver.closed:
                raise Error(ENGINE_CLOSED)
            if state.id in self._requests:
                raise Error(f"a request with the id {state.id!r} is running; choose another id")
            self._submitted += 1
            if most:
                if not self._requests:
                    self._last_step = time.monotonic()
                self._requests[state.id] = state
                self._inbox.append(state)
                self._driver.notify()
        return Request(self, state)

    def validate(self, prompt: Iterable[int]) -> list[int]:
        """The prompt as a list of int. Raises `Error`, or `ContextError` if it can never fit."""
        return check_prompt(prompt, self.runner.vocab_size, self.context, self.capacity)

    def cancel(self, request_id: str) -> bool:
        """End a request at the next step, from any thread. False if there is none of this id."""
        state = self._requests.get(request_id)
        if state is None:
            return False
        self.cancel_state(state)
        return True

    def cancel_state(self, state: RequestState) -> None:
        if not (state.done or state.cancelled):
            state.cancelled = True
            self._cancelled.append(state)

    def wait(self, state: RequestState) -> None:
        """Return when the request has something to read."""
        self._driver.wait(state)

    async def wait_async(self, state: RequestState) -> None:
        """Return when the request has something to read."""
        await self._driver.wait_async(state)

    async def pause(self, state: RequestState, future: asyncio.Future[None]) -> None:
        """Return when a future of the running loop is set, or the request has ended."""
        await self._driver.pause(state, future)

    def start(self) -> None:
        """Step in a thread of the engine's own from now on."""
        self._driver.start()

    def enter(self) -> None:
        """Step in a thread as long as somebody who has entered has not left."""
        self._driver.enter()

    def leave(self) -> None:
        """End the thread if nobody else has entered. Requests go on when they are read."""
        self._driver.leave()

    def stop(self) -> None:
        """End the engine's thread. Requests go on when they are read."""
        self._driver.stop()

    def close(self) -> None:
        """End all requests with an `Error`, and wait for the runs in flight. Further requests are refused.

        Does nothing in a forked child: the engine is its parent's.
        """
        if self.forked:
            return
        self._driver.close()
        self._constraints.close()
        self._end_all(Error(ENGINE_CLOSED))
        while self._runs and self._failure is None:
            try:
                self.runner.collect(self._runs.popleft().ticket)
            except Exception as error:
                self._failure = error

    @property
    def forked(self) -> bool:
        """Whether this process is a child that was forked after the engine was made. It cannot use the engine."""
        return self._driver.forked

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Have the runner and the whole KV cache for the block. Requests continue after it and compute all again."""
        with self._driver.paused():
            if self._failure is not None:
                raise self._failure
            try:
                while self._runs:
                    self._collect()
            except Exception as error:
                self._fail(error)
                raise
            except BaseException:
                self._recover()
                raise
            finally:
                self._wake()
            self._requeue()
            try:
                yield
            except BaseException:
                if not self.forked:
                    self.runner.reset()  # a run may have been interrupted
                raise

    def stats(self) -> EngineStats:
        """What the engine is doing now, and what it has done."""
        scheduler, pages = self.scheduler, self.scheduler.pages
        rates = self._rates.per_second(self._prompt_tokens, self._generated_tokens)
        return EngineStats(
            running=scheduler.running,
            waiting=scheduler.queued + sum(len(state.sequences) for state in tuple(self._inbox)),
            pages_used=pages.used,
            pages_cached=pages.cached,
            pages_free=pages.free,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            requests=self._submitted,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prompt_tokens_per_second=rates[0],
            generated_tokens_per_second=rates[1],
            stalled_s=time.monotonic() - self._last_step if self._requests else 0.0,
            failure=self._failure,
        )

    def _has_work(self) -> bool:
        return bool(self._requests or self._runs or self._cancelled)

    def _step(self) -> None:
        """Plan and submit runs, then collect the oldest and hand its tokens out."""
        try:
            if self._inbox or self._cancelled:
                self._take_inbox()
            if self._constraints.waiting:
                self._take_advanced()
            runs = self._runs
            while len(runs) <= self._lookahead and (run := self.scheduler.plan()) is not None:
                self._submit(run)
            if runs:
                self._collect()
            elif self._constraints.waiting:
                self._constraints.wait()
            elif self._requests and not (self._inbox or self._cancelled):
                raise Error(f"the scheduler plans nothing for {list(self._requests)}: {self.stats()}")
        except Exception as error:
            self._fail(error)
        except BaseException:
            self._recover()
            raise
        finally:
            self._wake()

    def _take_inbox(self) -> None:
        """Take in what other threads have submitted and cancelled since the last step."""
        while self._inbox:
            state = self._inbox.popleft()
            if not state.done:
                for sequence in state.sequences:
                    self.scheduler.add(sequence)
        while self._cancelled:
            self._end(self._cancelled.popleft(), None)

    def _submit(self, run: Run) -> None:
        """Tell the runner what is new before the run, and start it."""
        for sequence in run.starts:
            try:
                self.runner.start(
                    sequence.slot, sequence.params, sequence.ids[: sequence.prompt_tokens], sequence.output,
                    sequence.stop_token_ids,
                )  # fmt: skip
            except DeviceError:
                raise
            except Error as error:  # its rows are in this run all the same, and nobody reads what they sample
                self._end(owner(sequence), error)
                continue
            self._set_mask(sequence)
        for slot, first, pages in run.tables:
            self.runner.set_pages(slot, first, pages)
        run.ticket = self.runner.submit(run.batch)
        self._prompt_tokens += run.prompt_tokens
        self._runs.append(run)

    def _set_mask(self, sequence: Sequence) -> None:
        """Tell the runner what a sequence's constraint allows."""
        if sequence.constraint is not None:
            try:
                self.runner.set_mask(sequence.slot, sequence.constraint.mask())
            except Exception as error:
                self._end(owner(sequence), error)

    def _collect(self) -> None:
        """Wait for the oldest run and hand its tokens out."""
        run = self._runs[0]
        sampled = self.runner.collect(run.ticket)
        self._runs.popleft()
        self.scheduler.collected(run)
        self._hand_out(run, sampled)
        self._steps += 1
        now = time.monotonic()
        self._step_s, self._last_step = now - self._last_step, now
        if now >= self._rates.next_sample:
            self._rates.sample(now, self._prompt_tokens, self._generated_tokens)

    def _hand_out(self, run: Run, sampled: Sampled) -> None:
        """Add the tokens of a run to their sequences, and what is made of them to their requests."""
        tokens, self._now = sampled.tokens.tolist(), time.perf_counter()
        advances: list[Advance] = []
        try:
            for row, sequence in enumerate(run.sampled):
                if sequence.status is Status.FINISHED:
                    continue
                token, state = tokens[row], owner(sequence)
                self._handling = state
                if token < 0:
                    self._end(state, Error(NOT_NUMBERS))
                    continue
                sequence.ids.append(token)
                logprobs = TokenLogprobs.of(sampled, row) if state.logprobs else None
                if token in sequence.stop_token_ids:
                    self._deliver(sequence, state, token, logprobs, "stop", token)
                elif sequence.constraint is None:
                    self._deliver(sequence, state, token, logprobs)
                else:  # what the token ends is known when the constraint has accepted it
                    sequence.advancing = True
                    advances.append(Advance(sequence, sequence.constraint, token, logprobs))
            self._handling = None
        finally:
            if advances:
                self._constraints.put(advances)

    def _take_advanced(self) -> None:
        """Deliver tokens that constraints have accepted, and those that they force; set the next masks."""
        running = *self.scheduler.decoding, *self.scheduler.prefilling
        for advance in self._constraints.take(mask_wait_s(running, self._step_s, bool(self._runs))):
            sequence, result = advance.sequence, advance.result
            sequence.advancing = False
            if sequence.status is Status.FINISHED:
                continue
            state = self._handling = owner(sequence)
            if isinstance(result, Exception):
                self._end(state, result)
                continue
            self._deliver_advanced(sequence, state, advance)
            if sequence.status is Status.RUNNING:
                if advance.forced:  # its next row is a chunk's, before which sampler and mask are set
                    self.scheduler.prefill_forced(sequence)
                else:
                    self._set_mask(sequence)
        self._handling = None

    def _deliver_advanced(self, sequence: Sequence, state: RequestState, advance: Advance) -> None:
        """Deliver the sampled token and those that its constraint forces after it. The last one may end the text."""
        self._now = time.perf_counter()
        for number, token in enumerate((advance.token, *advance.forced)):
            if number:
                sequence.ids.append(token)
            reason: FinishReason | None = "stop" if advance.result and number == len(advance.forced) else None
            self._deliver(sequence, state, token, None if number else advance.logprobs, reason)
            if sequence.status is Status.FINISHED:
                return

    def _deliver(
        self,
        sequence: Sequence,
        state: RequestState,
        token: int,
        logprobs: TokenLogprobs | None,
        reason: FinishReason | None = None,
        stop: int | str | None = None,
    ) -> None:
        """Hand a sequence's latest token to its request, and end the sequence if it was the last one."""
        self._generated_tokens += 1
        if reason is None and len(sequence.ids) > sequence.end:
            reason, stop = "length", "context" if state.context_bound else None
        if reason is None and logprobs is None and state.process is None:
            state.events.append((token, sequence.index, self._now))
            self._touched.append(state)
            return
        counts = sequence.prompt_tokens, sequence.cached_tokens
        event = TokenEvent(token, sequence.index, reason, stop, logprobs, *counts, self._now)
        try:
            response: Response | None = event if state.process is None else state.process(event)
        except Exception as error:
            self._end(state, error)
            return
        if response is not None:
            state.events.append(response)
            self._touched.append(state)
        if reason is not None or (response is not None and response.finish_reason is not None):
            self._end_sequence(sequence, state)

    def _end_sequence(self, sequence: Sequence, state: RequestState) -> None:
        self.scheduler.finish(sequence)
        state.live -= 1
        if not state.live:
            self._end(state, None)

    def _end(self, state: RequestState, error: BaseException | None) -> None:
        """End a request and all its sequences."""
        if state.done:
            return
        for sequence in state.sequences:
            if sequence.status is not Status.FINISHED:
                self.scheduler.finish(sequence)
            if sequence.constraint is not None:
                self._constraints.forget(sequence.constraint)
        self._forget(state, error)

    def _forget(self, state: RequestState, error: BaseException | None) -> None:
        """Tell the request's reader that it has ended. It is known until then, so that an interrupt cannot lose it."""
        for sequence in state.sequences:  # its constraint may still be advanced by a token
            sequence.status = Status.FINISHED
        if not state.done:
            state.error = error
            state.done = True
        self._touched.append(state)
        if self._requests.get(state.id) is state:
            del self._requests[state.id]

    def _end_all(self, error: BaseException) -> None:
        """End all requests, whatever state the scheduler is in."""
        with self._driver.lock:
            states = tuple(self._requests.values())
            self._inbox.clear()
            self._cancelled.clear()
        for state in states:
            self._forget(state, error)
        self._wake()

    def _wake(self) -> None:
        """Wake the readers of requests that have something to read, except those that `hand_over` keeps for itself."""
        if self._touched:
            self._driver.wake(self.hand_over(self._touched))
            self._touched.clear()

    def _fail(self, error: BaseException) -> None:
        """The device has failed: end all requests, and refuse further ones."""
        with self._driver.lock:
            self._failure = error
        self._runs.clear()
        self._end_all(error)
        self.scheduler.reset(())

    def _recover(self) -> None:
        """Continue after a step was interrupted: what was in flight is computed again."""
        self._runs.clear()
        try:
            self.runner.reset()
        except Exception as error:
            self._fail(error)
            return
        self._requeue()

    def _requeue(self) -> None:
        """Let all requests start again from an empty KV cache, with the tokens that were handed out."""
        with self._driver.lock:
            states = tuple(self._requests.values())
            self._inbox.clear()
            self._cancelled.clear()
        torn, self._handling = self._handling, None
        kept: list[Sequence] = []
        for state in states:
            if state.done:
                self._forget(state, None)
            elif state is torn:
                self._forget(state, Error("interrupted while a token was handed out; submit the request again"))
            elif state.cancelled:
                self._forget(state, None)
            else:
                kept += [each for each in state.sequences if each.status is not Status.FINISHED]
        self.scheduler.reset(kept)
