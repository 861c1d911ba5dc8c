"""`Model`: what `compile()` returns. It wires checkpoint, graph, backend and session together and streams text."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np

from . import ir, loader, memory, plan, progress
from .backend import ACTIVATIONS, KV_TYPES, Backend, Program, backend_class, choose_device, open_backend
from .bench import debug
from .chat.conversation import Chat
from .checkpoint import Checkpoint, Weight
from .config import ModelConfig
from .errors import FORKED, ContextError, DeviceError, Error, Interrupted, UnsupportedError
from .generate import StopStringFilter
from .graph import KVLayout, build
from .memory import format_bytes
from .quantization import policy
from .quantization.convert import convert
from .quantization.types import VEC_DOT_TYPE
from .sampling import Sampler
from .session import Session
from .tokenizers.base import Decoder, Tokenizer
from .validation import strings, whole_number

CLOSED = "this model is closed; compile it again"


@dataclass(frozen=True)
class Piece:
    """A token of a stream, with the text that became certain with it.

    `finish_reason` is None but on the last piece: "eos" (the model ended), "stop" (a stop string), "length"
    (max_tokens) or "context" (the KV cache is full).
    """

    text: str
    token: int
    tokens_per_second: float
    """Of the tokens after the first: decoding, without the prompt. 0.0 on the first."""
    finish_reason: str | None = None
    reused: int = 0
    """How many tokens of the prompt the KV cache held already."""

    def __str__(self) -> str:
        return self.text


class Model:
    """A compiled model. Use `numballama.compile`; see there for the arguments.

    Attributes: `path`, `config`, `tokenizer` (or None), `weights`, `graph` (as declared, for one token), `device`,
    `threads`, `context`, `kv` (the cache's layout), `activations`, `notes` (what was assumed or chosen, a sentence
    each), `load_s` (seconds that compiling took).
    """

    def __init__(
        self,
        model_path: str | PathLike[str] | None,
        tokenizer: str | PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: str | None = None,
        context: int | None = None,
        kv_dtype: str | None = None,
        threads: int | None = None,
        rope_pairing: str | None = None,
        rope_theta: float | None = None,
        norm_eps: float | None = None,
        fusions: bool | Sequence[str] = True,
        activations: str = "f32",
    ) -> None:
        started = time.perf_counter()
        for name, value, known in (
            ("dtype", dtype, (None, *policy.DTYPES)),
            ("kv_dtype", kv_dtype, (None, *KV_TYPES)),
            ("activations", activations, ACTIVATIONS),
        ):
            if value not in known:
                there_are = ", ".join(str(each) for each in known if each is not None)
                raise UnsupportedError(f"{name} {value!r} is not supported; there are {there_are}")
        self.device, why = choose_device(device)
        kind = backend_class(self.device)
        self.activations = activations
        if activations not in kind.activation_types:
            raise UnsupportedError(f"activations {activations!r} are for the CPU, not for {self.device}: device='cpu'")
        self._checkpoint: Checkpoint = loader.open_checkpoint(
            model_path, tokenizer, rope_pairing=rope_pairing, rope_theta=rope_theta, norm_eps=norm_eps
        )
        self.path = self._checkpoint.path
        self.config: ModelConfig = self._checkpoint.config
        self.tokenizer: Tokenizer | None = self._checkpoint.tokenizer
        if self.tokenizer is not None:
            self.tokenizer.prepare()
        self.notes = list(self._checkpoint.notes)
        if device == "auto":
            self.notes.append(f"device {self.device}, chosen because {why}")
        self.context = _choose_context(self.config, context, self.notes)
        self.kv = KVLayout.of(self.config, self.context, kv_dtype or kind.default_kv_dtype)
        progress.info(
            f"{self._checkpoint.format}: {format_bytes(self._checkpoint.nbytes)} of weights mapped, "
            f"{format_bytes(self.kv.nbytes)} KV cache for {self.context:,} tokens ({self.kv.dtype})"
        )
        if kind.in_host_memory:
            memory.require_available(
                self.kv.nbytes, f"a KV cache for {self.context:,} tokens", memory.SHORTER, ContextError
            )

        self._backend: Backend | None = None
        self._program: Program | None = None
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._stream: object = None
        self._fusions = fusions
        self.weights: Mapping[str, Weight] = self._convert(dtype)
        if activations == "int8" and not any(w.type.name in (*VEC_DOT_TYPE, "int8") for w in self.weights.values()):
            self.notes.append("no weight of this model is quantised, so no activations are rounded to int8")
        backend = self._backend = open_backend(self.device, self.weights, threads)
        try:
            self._compile(backend)
        except BaseException:
            backend.close()  # device memory is not to wait for a traceback to be forgotten
            raise
        self.notes += backend.notes
        for note in self.notes:
            progress.info(note)
        self.threads: int = backend.workers
        self.load_s = time.perf_counter() - started

    def _convert(self, dtype: str | None) -> Mapping[str, Weight]:
        """The weights, those of linear layers converted if asked for; a tied classifier takes the embedding along.

        What has a type that no backend has kernels for is converted in any case.
        """
        weights = self._checkpoint.weights
        targets = policy.fallback_types(weights) | policy.types_to_convert(self.config, weights, dtype)
        if not targets:
            return weights
        converted = dict(weights)
        what = dtype or ", ".join(dict.fromkeys(target.name for target in targets.values()))
        hint = "leave dtype= out to use the file's own types" if dtype else "use a file of another quantisation"
        size = sum(target.nbytes(math.prod(weights[name].shape)) for name, target in targets.items())
        memory.require_available(size, f"a copy of the linear weights as {what}", hint)
        with progress.progress_bar(f"converting to {what}") as report:
            for done, (name, target) in enumerate(targets.items()):
                report(name, done, len(targets))
                converted[name] = convert(weights[name], target)
        return converted

    def _build(self, tokens: int, logits: str) -> ir.Graph:
        types = {name: weight.type for name, weight in self.weights.items()}
        int8 = self._checkpoint.int8_activations
        return build(self.config, types, self.kv, tokens, logits, int8, self.activations)

    def _compile(self, backend: Backend) -> None:
        self.graph = self._build(1, "last")
        self._chunk = min(backend.prefill_chunk, self.context)
        debug.print_graph(self.graph)
        with progress.progress_bar("compiling kernels") as report:
            decode = self._program = backend.program(self.graph, self._fusions, report)
            prompt = backend.program(self._build(self._chunk, "last"), self._fusions, report)
            backend.prepare(decode, report)
        decode, prompt = debug.watched(decode, backend), debug.watched(prompt, backend)
        self._session: Session | None = Session(decode, prompt, self.context, self.config.vocab_size)
        self._all_logits: Program | None = None

    @property
    def backend(self) -> Backend:
        """What holds the weights and the KV cache. Raises `Error` once the model is closed."""
        if self._backend is None:
            raise Error(CLOSED)
        return self._backend

    @property
    def program(self) -> Program:
        """The program of a decode step. Raises `Error` once the model is closed."""
        if self._program is None:
            raise Error(CLOSED)
        return self._program

    @property
    def plan(self) -> plan.Plan:
        """The decode plan: steps, kernels, memory map. Raises `Error` on the reference, which has none."""
        found = self.program.plan
        if found is None:
            raise Error("the reference interprets the graph and has no plan; see model.graph")
        return found

    @property
    def session(self) -> Session:
        """The model's token history and KV cache. Raises `Error` once the model is closed."""
        if self._session is None:
            raise Error(CLOSED)
        return self._session

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Have the session for oneself. Raises `DeviceError` in a forked child: a lost thread may hold the lock."""
        if os.getpid() != self._pid:
            raise DeviceError(FORKED)
        with self._lock:
            yield

    @contextlib.contextmanager
    def fresh_session(self) -> Iterator[Session]:
        """The session, empty, and emptied again: streams that were under way recompute what they need."""
        session, self._stream = self.session, None
        session.rewind()
        try:
            yield session
        finally:
            session.rewind()

    def close(self) -> None:
        """Free the KV cache, the arenas, device memory and the mapping of the file now. The model cannot be used
        afterwards.
        """
        with self.using():
            try:
                if self._backend is not None:
                    self._backend.close()
            finally:
                self._session = self._program = self._all_logits = self._backend = None
                self.weights = {}
                self._checkpoint.weights = {}

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        c = self.config
        return f"<Model {self.path.name}: {c.n_layers} layers, dim {c.dim}, on {self.device}, context {self.context}>"

    def logits(self, ids: Iterable[int]) -> np.ndarray:
        """float32 [len(ids), vocab]: logits after each token, from an empty cache.

        Raises `Error` for no ids or ids outside the vocabulary, `ContextError` for more than fit.
        """
        with self.using():
            session = self.session
            tokens = session.check(ids)
            program = self._all_logits
            if program is None:
                graph = self._build(self._chunk, "all")
                with progress.progress_bar("compiling kernels") as report:
                    program = self.backend.program(graph, self._fusions, report)
                program = self._all_logits = debug.watched(program, self.backend)
            out = np.empty((len(tokens), self.config.vocab_size), np.float32)
            step = len(program.inputs["ids"])
            with self.fresh_session():
                for start in range(0, len(tokens), step):
                    chunk = tokens[start : start + step]
                    session.feed(program, chunk)
                    program.run(len(chunk))
                    session.tokens.extend(chunk)
                    out[start : start + len(chunk)] = program.value("logits")[: len(chunk)]
            return out

    def generate(
        self,
        prompt: str | None,
        max_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> str:
        """The continuation of a prompt, as text. `None` as the prompt starts from BOS alone.

        `temperature=0` is greedy. Ends at EOS (llama2.c and KuiperLLama files: also at BOS), at a stop string, which
        is not part of the text, at `max_tokens` or at the end of the context. Raises `ContextError` for a prompt that
        does not fit, `Error` for an empty one or without a tokenizer, and `Interrupted`, with the text so far, on
        Ctrl-C.
        """
        text: list[str] = []
        with self.using():
            try:
                for piece in self.stream(
                    prompt, max_tokens, temperature, top_k, top_p, min_p, repeat_penalty, seed, stop
                ):
                    text.append(piece.text)
            except KeyboardInterrupt:
                raise Interrupted("".join(text)) from None
        return "".join(text)

    def stream(
        self,
        prompt: str | None,
        max_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Like `generate`, a `Piece` a token, as soon as it is there. Arguments are checked at once, not at the first
        piece.

        Text never ends in the middle of a character, and a stop string is never shown in part. Several streams of one
        model may be read in turns or from several threads: each takes the KV cache over and recomputes what it needs.
        """
        session, tokenizer = self.session, self._require_tokenizer()
        if not (prompt is None or isinstance(prompt, str)):
            raise Error(f"the prompt must be a string or None, found {prompt!r}")
        if prompt == "":
            raise Error("the prompt is empty; None starts from the beginning-of-text token alone")
        ids = tokenizer.encode(prompt or "", bos=True)
        if prompt is None and tokenizer.bos_id is not None:  # even where the vocabulary does not want it before a text
            ids = [tokenizer.bos_id]
        options = (max_tokens, temperature, top_k, top_p, min_p, repeat_penalty, seed, stop)
        return self.stream_ids(session.check(ids), *options, at_start=prompt is None)

    def stream_ids(
        self,
        ids: Iterable[int],
        max_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        *,
        at_start: bool = False,
        enders: Iterable[int] = (),
        keep: bool = False,
    ) -> Iterator[Piece]:
        """Like `stream`, from token ids as they are.

        `at_start` when the continuation is a text of its own, so that its first space goes where the tokenizer put it.
        `enders` are ids that end it besides the file's. `keep` starts from what the KV cache holds of the ids'
        beginning, by whichever stream; otherwise all are computed, and nothing depends on what came before.
        """
        ids, tokenizer = self.session.check(ids), self._require_tokenizer()
        max_tokens = whole_number("max_tokens", max_tokens, 0)
        stops = StopStringFilter(strings("stop", stop))
        # a vocabulary may be padded: tokens that the tokenizer does not know are not drawn
        drawn = min(self.config.vocab_size, tokenizer.vocab_size)
        sampler = Sampler(drawn, temperature, top_k, top_p, min_p, repeat_penalty, seed)
        sampler.remember(ids)
        ends = {tokenizer.eos_id, *self._checkpoint.stop_token_ids, *enders}
        if self._checkpoint.bos_is_stop_token:
            ends.add(tokenizer.bos_id)
        decoder = tokenizer.decoder(strip_leading_space=at_start)
        return self._pieces(ids, max_tokens, sampler, decoder, stops, ends, keep)

    def _pieces(
        self,
        history: list[int],
        max_tokens: int,
        sampler: Sampler,
        decoder: Decoder,
        stops: StopStringFilter,
        enders: Container[int | None],
        keep: bool,
    ) -> Iterator[Piece]:
        stream, started = object(), 0.0
        reused = self._take_over(stream, history) if keep and max_tokens else 0
        for index in range(max_tokens):
            token = self._next(stream, history, sampler)
            now = time.perf_counter()
            started = started or now
            speed = index / (now - started) if index else 0.0
            reason = None
            text = ""
            if token in enders:
                reason = "eos"
            else:
                text = stops.push(decoder.push(token))
                if stops.stopped:
                    reason = "stop"
                elif index + 1 == max_tokens:
                    reason = "length"
                elif len(history) == self.context:
                    reason = "context"
            if reason in ("eos", "length", "context"):
                text += stops.push(decoder.flush())
                text += stops.flush()
            yield Piece(text, token, speed, reason, reused)
            if reason is not None:
                return
            history.append(token)

    def _take_over(self, stream: object, history: Sequence[int]) -> int:
        """Make the session the stream's, with what it holds of the history; returns how much that is."""
        with self.using():
            session, self._stream = self.session, stream
            session.rewind(session.common(history))
            return len(session.tokens)

    def _next(self, stream: object, history: Sequence[int], sampler: Sampler) -> int:
        """The token after `history`. Usually the cache holds all but its last; after another stream used it, less."""
        with self.using():
            session = self.session
            if self._stream is not stream:
                self._stream = stream
                session.rewind()
            known = len(session.tokens)
            token = (
                session.step(history[-1], sampler)
                if known == len(history) - 1 and known
                else session.prefill(history[known:], sampler)
            )
            assert token is not None
            return token

    def chat(self, system: str | None = None, template: str | None = None) -> Chat:
        """A conversation with the model. `system` is the system message, `template` a chat template in jinja2, if not
        the file's own or, for a file without one, the built-in one that the vocabulary is made for.

        Raises `Error` without a tokenizer, or when there is no template.
        """
        return Chat(self, self._require_tokenizer(), system, template or self._checkpoint.chat_template)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise Error(
                f"{self.path.name} carries no tokenizer: pass its file to compile(…, tokenizer=…), "
                "--tokenizer on the command line"
            )
        return self.tokenizer


def _choose_context(config: ModelConfig, context: int | None, notes: list[str]) -> int:
    if context is None:
        return config.default_context
    context = whole_number("context", context, 1)
    if context > config.context:
        notes.append(f"context {context:,}: the model was made for {config.context:,}, later text may be poor")
    return context
