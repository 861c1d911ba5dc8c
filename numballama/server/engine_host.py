"""`EngineHost`: in the process with the engine, answers the messages of those for HTTP, and hands them their tokens."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..engine.request import RequestState, TokenEvent
from ..engine.stats import EngineStats
from ..errors import DeviceError, Error
from ..sampling import MAX_N, SamplingParams
from .link import Head, Link, error_as_json, pack
from .remote import NO_FIGURES, Facts, logprobs_as_json, params_of
from .service import LOADING, SLOW_THREADS, log
from .settings import Settings

if TYPE_CHECKING:
    from ..engine.request import Request
    from ..generate import TextEngine
    from ..model import Model

SHORT_PARAMS = 4096
"""Characters of settings that are kept, since many requests have the same."""


class RemoteRequest:
    """A request of a process for HTTP."""

    def __init__(self, outputs: Outputs, number: int) -> None:
        self.outputs, self.number = outputs, number
        self.begun = self.cancelled = False
        """Whether a token has come; whether it was cancelled before the engine had it."""
        self.ended: set[int] = set()
        """Texts that a stop string has ended in its own process, while others of the request go on."""
        self.request: Request[TokenEvent] | None = None

    def process(self, event: TokenEvent) -> TokenEvent:
        """Ends texts that have ended in the other process."""
        return dataclasses.replace(event, finish_reason="stop") if event.index in self.ended else event


class Outputs:
    """What a step of the engine gives to one process for HTTP."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.tokens: list[int] = []
        """Text and token in turns, of tokens that are nothing else. They are read before `events`."""
        self.begun: list[Any] = []
        self.events: list[Any] = []
        """Last tokens, and all those of a request for log probabilities, of which a grammar forces none."""
        self.errors: list[Any] = []

    def add(self, remote: RemoteRequest, state: RequestState) -> None:
        """What a request has to read, and its end."""
        first = remote.number * MAX_N
        if not remote.begun and state.events:
            remote.begun = True
            self.begun.append((remote.number, state.sequences[0].cached_tokens, state.sequences[0].admitted_at))
        while state.events:
            each = state.events.popleft()
            if type(each) is tuple:
                self.tokens += first + each[1], each[0]
                continue
            assert isinstance(each, TokenEvent)
            if each.finish_reason is None and each.logprobs is None:
                self.tokens += first + each.index, each.token
            else:
                end = each.finish_reason, each.stop_reason
                self.events.append((first + each.index, each.token, *end, logprobs_as_json(each.logprobs)))
        if state.done and state.error is not None:
            self.errors.append((remote.number, error_as_json(state.error)))

    def send(self, failure: BaseException | None) -> None:
        """Send it, in one message, and begin the next one."""
        lists = {"begun": self.begun, "events": self.events, "errors": self.errors}
        head: Head = {name: found for name, found in lists.items() if found}
        if failure is not None:
            head["failure"] = error_as_json(failure)
        if head or self.tokens:
            self.link.send(pack(head, self.tokens))
        self.tokens, self.begun, self.events, self.errors = [], [], [], []


class EngineHost:
    """The engine for requests of other processes. `ModelLoader` gives it the model, a thread calls `serve` for a link.

    `other` is called with messages that are not for the engine.
    """

    def __init__(self, settings: Settings, other: Callable[[Link, Head], None]) -> None:
        self.draining = False
        self._settings, self._other = settings, other
        self._model: Model | None = None
        self._engine: TextEngine | None = None
        self._news: Head = {"unload": LOADING}  # what a process that starts has to know
        self._remotes: dict[str, RemoteRequest] = {}
        self._outputs: dict[Link, Outputs] = {}
        self._lock = threading.Lock()  # of `_hand_over` and of what it reads
        self._pool = ThreadPoolExecutor(SLOW_THREADS, "numballama server, slow")
        self._logits = ThreadPoolExecutor(1, "numballama server, logits")
        """One request at a time has the logits of its whole prompt. Grammars do not wait for it."""

    # For the loader

    def ready(self, model: Model) -> None:
        """The model is loaded: requests are answered from now on. Raises as `Service.ready`."""
        if self._settings.chat_template is not None:
            model.chat_template(self._settings.chat_template)
        tokens = model.token_engine
        tokens.hand_over = self._hand_over
        engine = model.engine()
        engine.__enter__()
        checkpoint = model.checkpoint
        facts = Facts(
            str(checkpoint.path), checkpoint.tokenizer_path, model.context, tokens.capacity, model.max_sequences,
            model.kv_tokens, model.device, model.config.vocab_size,
        )  # fmt: skip
        self._model, self._engine = model, engine
        self._tell({"ready": dataclasses.asdict(facts)})

    def unload(self, why: str) -> None:
        """The model cannot be used any more."""
        self._tell({"unload": why})
        self._leave()
        for remote in tuple(self._remotes.values()):  # which the engine has not ended
            remote.outputs.link.send(pack({"errors": [(remote.number, error_as_json(DeviceError(why)))]}))
            self._cancel(remote)
        self._remotes.clear()

    def _leave(self) -> None:
        """Let go of the engine, whose thread then ends."""
        engine, model, self._engine, self._model = self._engine, self._model, None, None
        if engine is not None and model is not None:
            engine.__exit__(None, None, None)
            model.token_engine.hand_over = list

    def reloaded(self) -> None:
        """The model was loaded again."""
        with self._lock:
            links = list(self._outputs)
        if links:
            links[0].send(pack({"reloaded": True}))  # what one counts, all show

    @property
    def stats(self) -> EngineStats | None:
        return None if (engine := self._engine) is None else engine.stats()

    @property
    def failure(self) -> BaseException | None:
        """As `Service.failure`."""
        model, stats = self._model, self.stats
        if model is None or stats is None:
            return None
        return stats.failure or (None if stats.running or stats.waiting else model.backend.failure)

    def close(self) -> None:
        """End the engine's thread. The model stays open."""
        self.draining = True
        self._leave()
        for pool in (self._pool, self._logits):
            pool.shutdown(wait=False, cancel_futures=True)

    def _tell(self, news: Head) -> None:
        with self._lock:  # a process that starts meanwhile hears it last
            self._news = news
            for link in self._outputs:
                link.send(pack(news))

    # For a link

    def serve(self, link: Link) -> None:
        """Answer the messages of a process for HTTP until it ends. Then its requests do, too."""
        with self._lock:
            outputs = self._outputs[link] = Outputs(link)
            link.send(pack(self._news))
        try:
            while not link.closed:
                for head, tail in link.receive():
                    try:
                        self._answer(outputs, head, tail)
                    except Exception as error:
                        self._refuse(link, head, error)
        finally:
            link.release()
            with self._lock:
                del self._outputs[link]
            for remote in tuple(self._remotes.values()):  # others add to them meanwhile
                if remote.outputs is outputs:
                    self._cancel(remote)

    def _answer(self, outputs: Outputs, head: Head, tail: Sequence[int]) -> None:
        what, link = head["do"], outputs.link
        if what == "submit":
            if "ask" in head:
                self._pool.submit(self._in_pool, self._submit, outputs, head, tail)
            else:
                self._submit(outputs, head, tail)
        elif what == "cancel":
            if (remote := self._remotes.get(_name(link, head["id"]))) is not None:
                if "index" in head:
                    remote.ended.add(head["index"])
                else:
                    self._cancel(remote)
        elif what == "stats":
            stats = self.stats
            found = None if stats is None else {name: getattr(stats, name) for name in NO_FIGURES}
            link.send(pack({"answer": head["ask"], "stats": found}))
        elif what == "logprobs":
            self._logits.submit(self._in_pool, self._logprobs, outputs, head, tail)
        elif what == "check":
            self._pool.submit(self._in_pool, self._check, outputs, head, tail)
        else:
            self._other(link, head)

    def _in_pool(
        self, work: Callable[[Outputs, Head, Sequence[int]], None], outputs: Outputs, head: Head, tail: Sequence[int]
    ) -> None:
        try:
            work(outputs, head, tail)
        except Exception as error:
            self._refuse(outputs.link, head, error)

    def _refuse(self, link: Link, head: Head, error: Exception) -> None:
        """Say why a message is not done."""
        if not isinstance(error, Error):
            log.error("a message of a process for HTTP failed", exc_info=error)
        failure, found = self.failure, error_as_json(error)
        news: Head = {} if failure is None else {"failure": error_as_json(failure)}
        if "ask" in head:
            link.send(pack({**news, "answer": head["ask"], "error": found}))
        elif "id" in head:
            link.send(pack({**news, "errors": [(head["id"], found)]}))

    def _loaded(self) -> Model:
        if (model := self._model) is None:
            raise DeviceError(self._news.get("unload", LOADING))
        return model

    def _submit(self, outputs: Outputs, head: Head, tail: Sequence[int]) -> None:
        model, text, number = self._loaded(), head["params"], head["id"]
        params = _kept_params(text) if len(text) <= SHORT_PARAMS else params_of(text)
        ends, remote, name = frozenset(head["ends"]), RemoteRequest(outputs, number), _name(outputs.link, number)
        self._remotes[name] = remote
        try:
            constraint = model.constraint(params, ends) if params.is_constrained else None
            if outputs.link.closed or remote.cancelled:
                raise DeviceError(self._news.get("unload", "the client has left"))
            how: Head = {each: head[each] for each in ("priority", "salt", "reuse_prefix") if each in head}
            if head["stops"] and params.n > 1:
                how["process"] = remote.process
            remote.request = model.token_engine.submit(
                tail, params, request_id=name, stop_token_ids=ends, constraint=constraint, **how
            )
        except BaseException:
            self._remotes.pop(name, None)
            raise
        if outputs.link.closed or remote.cancelled:  # meanwhile
            self._cancel(remote)
        if "ask" in head:
            outputs.link.send(pack({"answer": head["ask"]}))

    def _cancel(self, remote: RemoteRequest) -> None:
        remote.cancelled = True
        if remote.request is not None:
            remote.request.cancel()

    def _logprobs(self, outputs: Outputs, head: Head, tail: Sequence[int]) -> None:
        if outputs.link.closed:
            return
        found = self._loaded().prompt_logprobs(list(tail), head["top"])
        outputs.link.send(pack({"answer": head["ask"], "logprobs": [logprobs_as_json(each) for each in found]}))

    def _check(self, outputs: Outputs, head: Head, tail: Sequence[int]) -> None:
        self._loaded().check_constraint(params_of(head["params"]))
        outputs.link.send(pack({"answer": head["ask"]}))

    # For the engine

    def _hand_over(self, states: list[RequestState]) -> list[RequestState]:
        """Send what a step has given: one message for each process. Returns requests that are no other process's."""
        with self._lock:
            touched: dict[Outputs, None] = {}
            others: list[RequestState] = []
            failed = False
            for state in states:
                remote = self._remotes.get(state.id)
                if remote is None:
                    others.append(state)
                    continue
                remote.outputs.add(remote, state)
                touched[remote.outputs] = None
                if state.done:
                    failed = failed or state.error is not None
                    self._remotes.pop(state.id, None)  # `unload` may have let it go
            failure = self.failure if failed else None
            for outputs in touched:
                outputs.send(failure)
        return others


def _name(link: Link, number: int) -> str:
    """The engine's id of a request."""
    return f"{link.name}-{number}"


_kept_params: Callable[[str], SamplingParams] = lru_cache(maxsize=256)(params_of)
