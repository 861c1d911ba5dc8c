"""`ConstraintWorker`: advances constraints by sampled tokens beside the thread that steps the engine."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .request import TokenLogprobs
from .sequence import BatchConstraint, Constraint, Sequence

SLOW_S = 0.01
"""A constraint that needs longer for a token is advanced by itself, so that others do not wait for it."""
MASK_WAIT_S = 0.002
"""How long a step waits for the next masks, once for each. Sequences whose mask is later have no row in its run."""
MASK_WAIT, MASK_WAIT_IN_FLIGHT = 0.05, 0.5
"""Where a sequence without a constraint runs too, the part of the last step's time that a step waits for masks at most:
while the device has no run, and while another run is in flight.
"""
IDLE_S = 0.05
"""How long a step that has nothing to compute waits for the next mask."""
THREADS = 4
"""Most constraints, or groups of constraints, that are advanced at a time."""


@dataclass(slots=True, eq=False)
class Advance:
    """One sampled token of a sequence with a constraint."""

    sequence: Sequence
    constraint: Constraint
    token: int
    logprobs: TokenLogprobs | None
    result: bool | Exception = False
    """Whether the text is complete, or what the constraint raised."""
    forced: tuple[int, ...] = ()
    """Tokens that must follow, and that the constraint has accepted too."""


def mask_wait_s(sequences: Iterable[Sequence], step_s: float, in_flight: bool) -> float:
    """How long a step waits for masks if these sequences run, and the last step took `step_s`.

    Those without a constraint do not wait for masks of others: it is a small part of a step if the device has nothing
    to do meanwhile, so that a quick mask costs no sequence a step.
    """
    if all(sequence.constraint is not None for sequence in sequences):
        return MASK_WAIT_S
    return min(MASK_WAIT_S, step_s * (MASK_WAIT_IN_FLIGHT if in_flight else MASK_WAIT))


class ConstraintWorker:
    """Calls `accept` and `mask` of constraints in threads of its own, those of one step together.

    The thread that steps the engine calls `put`, `take` and `wait`. The threads start with the first `put`.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._changed = threading.Condition()
        self._done: deque[Advance] = deque()
        self._numbers = itertools.count()
        self._running: set[int] = set()  # jobs that are not done
        self._awaited: set[int] = set()  # those of them that the next step waits for
        self._alone: set[Constraint] = set()  # constraints that were slow at their last token

    @property
    def waiting(self) -> bool:
        """Whether there is or will be something to take."""
        return bool(self._running or self._done)

    def put(self, advances: Iterable[Advance]) -> None:
        """Advance constraints: each by one token."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(THREADS, (os.cpu_count() or 1) + 1), "numballama constraints")
        together: list[Advance] = []
        for each in advances:
            if each.constraint in self._alone:
                self._start([each], fast=False)
            else:
                together.append(each)
        if together:
            self._start(together, fast=True)

    def _start(self, advances: list[Advance], fast: bool) -> None:
        assert self._pool is not None
        number = next(self._numbers)
        with self._changed:
            self._running.add(number)
            if fast:
                self._awaited.add(number)
        self._pool.submit(self._run, advances, number)

    def _run(self, advances: list[Advance], number: int) -> None:
        started = time.perf_counter()
        try:
            _advance(advances)
        except BaseException as error:
            for each in advances:
                each.result = error if isinstance(error, Exception) else RuntimeError(repr(error))
        slow = time.perf_counter() - started > SLOW_S
        with self._changed:
            (self._alone.update if slow else self._alone.difference_update)(each.constraint for each in advances)
            self._running.discard(number)
            self._awaited.discard(number)
            self._done.extend(advances)
            self._changed.notify_all()

    def take(self, wait_s: float = MASK_WAIT_S) -> list[Advance]:
        """What is done by now. Waits up to `wait_s` seconds, but not for constraints that were slow before.

        What is late once is not waited for again: a grammar that hangs delays one step, not all of them.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._awaited, wait_s):
                self._awaited.clear()
            done = list(self._done)
            self._done.clear()
        return done

    def wait(self, timeout_s: float = IDLE_S) -> None:
        """Wait up to `timeout_s` seconds until there is something to take."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._done), timeout_s)

    def forget(self, constraint: Constraint) -> None:
        """Keep no reference to a constraint, whose sequence has ended."""
        if self._alone:
            with self._changed:
                self._alone.discard(constraint)

    def close(self) -> None:
        """End the threads. What they still do is of no use to anybody."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _advance(advances: list[Advance]) -> None:
    """Advance each constraint and compute its next mask."""
    groups: dict[type[BatchConstraint], list[tuple[Advance, BatchConstraint]]] = {}
    for each in advances:
        if isinstance(each.constraint, BatchConstraint):
            groups.setdefault(type(each.constraint), []).append((each, each.constraint))
    for kind, group in groups.items():
        results = kind.advance([(constraint, each.token) for each, constraint in group])
        for (each, constraint), result in zip(group, results, strict=True):
            each.result, each.forced = result, tuple(constraint.forced)
    for each in advances:
        if not isinstance(each.constraint, BatchConstraint):
            try:
                each.result = bool(each.constraint.accept(each.token))
                each.constraint.mask()
            except Exception as error:
                each.result = error
