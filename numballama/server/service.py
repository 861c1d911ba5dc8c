"""`Service`: a model behind HTTP. What may enter, whether it is well, and where slow work runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from ..errors import Error
from ..tokenizers.base import Tokenizer
from .errors import ApiError, cause
from .metrics import Metrics
from .pauses import Pauses
from .settings import Settings
from .tools.formats import ToolFormat, choose_format

if TYPE_CHECKING:
    from ..chat.text_model import MayFail, TextModel
    from ..engine.request import Request
    from ..engine.stats import EngineStats
    from ..generate import TextEngine

log = logging.getLogger("numballama.server")

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4
"""Threads that tokenise and render templates."""
SLOW_THREADS = 2
"""Threads for what may take seconds: grammars and large bodies. Other requests do not wait for them."""
SHORT_S = 0.004
"""Seconds of short work at most, that the event loop does itself."""
EVENTS_PER_S = 1000
"""Events that all streams together send: 16 streams have one every 16 ms, 64 streams one every 64 ms."""
SHORTEST_PAUSE_S = 0.001
LOADING, DRAINING = "the model is being loaded", "the server is shutting down"


class Counts:
    """Sequences of requests that have not ended, and prompt tokens of those that wait for their first answer."""

    def __init__(self) -> None:
        self._here = [0, 0]

    def add(self, sequences: int, tokens: int) -> None:
        """So many more, or fewer, are this process's."""
        self._here[0] += sequences
        self._here[1] += tokens

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """A block in which no other process looks for a place or takes one. Here, there is no other process."""
        return contextlib.nullcontext()

    @property
    def here(self) -> int:
        """Sequences of this process."""
        return self._here[0]

    @property
    def sequences(self) -> int:
        """Those of all processes."""
        return self._here[0]

    @property
    def tokens(self) -> int:
        """Those of all processes."""
        return self._here[1]


class Admission:
    """Counts what has been let in, and refuses more than the limits."""

    def __init__(self, sequences: int, slots: int, tokens: int, counts: Counts | None = None) -> None:
        self.limit, self.slots, self.token_limit = sequences, slots, tokens
        self.counts = counts or Counts()

    @property
    def sequences(self) -> int:
        """Sequences of requests that have not ended."""
        return self.counts.sequences

    @property
    def tokens(self) -> int:
        """Prompt tokens of requests that wait for their first answer."""
        return self.counts.tokens

    def enter(self, sequences: int, tokens: int) -> Ticket:
        """Let a request in. Raises `ApiError` 429 when the queue is full. One that comes alone is always let in."""
        with self.counts.locked():
            full = self.sequences >= self.limit
            if not full and (not self.tokens or self.tokens + tokens <= self.token_limit):
                return Ticket(self, sequences, tokens)
        what = "requests" if full else "prompt tokens"
        wait_s = 1 + min(self.sequences // self.slots, 59)
        raise ApiError(f"too many {what} wait: try again later", 429, code="queue_full", retry_after=wait_s)


class Ticket:
    """The place of a request that was let in. `begun` and `leave` give back what it holds, once."""

    def __init__(self, admission: Admission, sequences: int, tokens: int) -> None:
        self._counts, self._sequences, self._tokens = admission.counts, sequences, tokens
        self._counts.add(sequences, tokens)

    def begun(self, tokens: int) -> None:
        """So many tokens of its prompts have been computed."""
        tokens = min(tokens, self._tokens)
        self._tokens -= tokens
        self._counts.add(0, -tokens)

    def leave(self) -> None:
        """The request has ended."""
        self.begun(self._tokens)
        self._counts.add(-self._sequences, 0)
        self._sequences = 0


class Endable(Protocol):
    """What can be ended from outside, with an error."""

    def end(self) -> None: ...


class EngineProcess(Protocol):
    """What a service needs of the process that has the engine, where that is another one."""

    async def refresh(self) -> None:
        """Ask what it does now. Raises `ApiError` 503 when it does not answer."""

    async def figures(self) -> list[str]:
        """What each process has counted, in Prometheus' text format."""


class Texts:
    """How a model writes conversations. Found once for each model: a reload may bring another one."""

    def __init__(self, model: TextModel, template: str | None) -> None:
        self._model, self._template = model, template

    @cached_property
    def chat_template(self) -> str | None:
        """See `Service.chat_template`."""
        try:
            return self._model.chat_template(self._template)
        except Error:
            return None

    @cached_property
    def tool_format(self) -> ToolFormat:
        """See `Service.tool_format`."""
        return choose_format(self.chat_template, self._model.require_tokenizer().special_tokens)


class Service:
    """A model, once `ready` was called, and what the requests for it share. `counts`: those of all processes."""

    def __init__(self, settings: Settings, counts: Counts | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics(self)
        self.started_s = int(time.time())
        self.draining = False
        self.active = 0
        """HTTP requests that are being answered, except those for /health and /metrics."""
        self.running: set[Endable] = set()
        """Generations that have not ended."""
        self._logits_lock = asyncio.Lock()
        """One request at a time has the logits of its whole prompt in memory."""
        self._waits_for = LOADING
        """Why there is no model."""
        self.engine_process: EngineProcess | None = None
        self._model: TextModel | None = None
        self._texts: Texts | None = None
        self._backend: MayFail | None = None
        self._engine: TextEngine | None = None
        self._counts = counts
        self.admission = Admission(0, 1, 0)
        self._pauses = Pauses()
        self._pool = ThreadPoolExecutor(THREADS, "numballama server")
        self._slow_pool = ThreadPoolExecutor(SLOW_THREADS, "numballama server, slow")
        self._jobs: set[Future[Any]] = set()
        """What threads are doing, or will; without short work that waits for other work only."""
        self._is_short = False
        """Whether short work is short. The first loads and compiles what later ones need."""
        self._was_long = True

    def ready(self, model: TextModel) -> None:
        """The model is loaded: start its engine's thread, and answer requests from now on.

        Raises `Error` when the operator's chat template does not compile, or is a name that the model does not have.
        """
        settings = self.settings
        if settings.chat_template is not None:
            model.chat_template(settings.chat_template)
        slots = model.max_sequences
        waiting = 4 * slots if settings.queue_sequences is None else settings.queue_sequences
        tokens = 4 * model.kv_tokens if settings.queue_tokens is None else settings.queue_tokens
        self.admission = Admission(slots + waiting, slots, tokens, self._counts)
        engine = model.engine()
        engine.__enter__()
        if not self.metrics.begun:
            self.metrics.begin(settings.model_name or model.path.name)
        self._texts = Texts(model, settings.chat_template)
        self._engine, self._model, self._backend = engine, model, model.backend

    def unload(self, why: str) -> None:
        """The model cannot be used any more: requests are answered with 503 and this reason until `ready`."""
        self._waits_for = why
        engine, self._engine, self._model, self._texts, self._backend = self._engine, None, None, None, None
        if engine is not None:
            engine.__exit__(None, None, None)

    def reloaded(self) -> None:
        """The model was loaded again."""
        self.metrics.reloads.inc()

    def close(self) -> None:
        """End the engine's thread and the pool. The model stays open."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.__exit__(None, None, None)
        for pool in (self._pool, self._slow_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def end(self) -> None:
        """The time to drain is over: what still runs ends with an error."""
        for each in tuple(self.running):
            each.end()

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> TextModel:
        """The model. Raises `ApiError` 503 while it is being loaded."""
        return self._loaded(self._model)

    def _loaded(self, found: T | None) -> T:
        if found is None:
            raise ApiError(self._waits_for, 503, code="loading", retry_after=5)
        return found

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises `ApiError` 503 while it is being loaded, 501 when there is none."""
        if (tokenizer := self.model.tokenizer) is None:
            raise ApiError("this model has no tokenizer: start the server with --tokenizer", 501, code="no_tokenizer")
        return tokenizer

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template that is used; None when the model has none that fits. Raises as `model`."""
        return self._loaded(self._texts).chat_template

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes tool calls and reasoning. Raises as `tokenizer`."""
        _ = self.tokenizer
        return self._loaded(self._texts).tool_format

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.settings.model_name or self.model.path.name

    @property
    def engine(self) -> TextEngine:
        """The model's engine. Raises `ApiError` 503 while the model is being loaded and after `close`."""
        if self._engine is None:
            raise ApiError(DRAINING if self.loaded else self._waits_for, 503, code="unavailable", retry_after=5)
        return self._engine

    @property
    def stats(self) -> EngineStats | None:
        """What the engine does. None while the model is being loaded."""
        return None if self._engine is None else self._engine.stats()

    @property
    def failure(self) -> BaseException | None:
        """Why the engine has ended, or would end with its next request, if its device has failed for good."""
        backend, stats = self._backend, self.stats
        if backend is None or stats is None:
            return None
        idle = not (stats.running or stats.waiting)  # else its requests end with the device's own error
        return stats.failure or (backend.failure if idle else None)

    def enter(self, sequences: int, tokens: int) -> Ticket:
        """Let a request in, see `Admission`."""
        return self.admission.enter(sequences, tokens)

    async def pause(self, request: Request[Any] | None = None) -> None:
        """Wait a little after an event: many streams together send up to `EVENTS_PER_S`, and more tokens in each.

        Not longer than until `request` has ended: its last tokens are awaited by a client that may send the next one.

        An event costs the process some 0.1 ms, whatever it holds, which the engine's thread could use.
        """
        pause_s = min(self.admission.counts.here, self.admission.slots) / EVENTS_PER_S
        if pause_s >= SHORTEST_PAUSE_S:
            future = self._pauses.start(pause_s)
            await (future if request is None else request.pause(future))

    async def run(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """The result of a function, called in a thread: the event loop must not wait for a tokenizer or a template."""
        return await self._in_thread(self._pool, partial(work, *arguments, **options))

    async def run_slowly(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """The same for what may take seconds: it waits for a thread of the few that others do not need."""
        return await self._in_thread(self._slow_pool, partial(work, *arguments, **options))

    async def run_short(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """The same for work on a short prompt: on the event loop itself, which costs less than a thread.

        Not while a thread is at work, since that may hold the lock of a template for long; and not after such work has
        taken longer than `SHORT_S` twice in a row: once, another thread may have run meanwhile.
        """
        if self._jobs and self._is_short:
            return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *arguments, **options))

        def timed(clock: Callable[[], float]) -> T:
            started = clock()
            try:
                return work(*arguments, **options)
            finally:
                was_long, self._was_long = self._was_long, clock() - started > SHORT_S
                self._is_short = not (self._was_long and (was_long or not self._is_short))

        if self._is_short:
            return timed(time.perf_counter)
        return await self.run(timed, time.thread_time)  # a slow clock

    async def run_alone(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """As `run`, for the logits of a whole prompt: when the one before has ended, also if its client has left."""
        loop, lock = asyncio.get_running_loop(), self._logits_lock
        await lock.acquire()

        def ended(job: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lock.release)

        return await self._in_thread(self._pool, partial(work, *arguments, **options), ended)

    async def _in_thread(
        self, pool: ThreadPoolExecutor, work: Callable[[], T], ended: Callable[[Future[T]], None] | None = None
    ) -> T:
        job = pool.submit(work)
        if ended is not None:
            job.add_done_callback(ended)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)  # also if nobody waits any more
        return await asyncio.wrap_future(job)

    async def refresh(self) -> None:
        """Ask the engine's process for what `stats` says, if it is another one. Raises `ApiError` 503."""
        if self.engine_process is not None:
            await self.engine_process.refresh()

    async def figures(self) -> bytes:
        """Figures for Prometheus, of all processes together. Raises `ApiError` 503."""
        if self.engine_process is None:
            return self.metrics.text()
        await self.engine_process.refresh()
        return self.metrics.text(await self.engine_process.figures())

    def unhealthy(self) -> str | None:
        """Why the server cannot answer requests now; None if it can."""
        if self.draining:
            return DRAINING
        if not self.loaded:
            return self._waits_for
        if (failure := self.failure) is not None:
            return f"the device has failed: {cause(failure)}"
        stats = self.stats
        if stats is not None and stats.stalled_s > self.settings.stall_s:
            return f"requests wait and no step of the engine has ended for {stats.stalled_s:.0f} s"
        return None

    @staticmethod
    def report_failure(error: BaseException) -> None:
        """Log that a generation failed that was accepted."""
        log.error("a generation failed: %s", error, exc_info=None if isinstance(error, Error) else error)
