"""`Model`: what `compile()` returns. It connects checkpoint, graph, backend, session and the generation loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from os import PathLike
from typing import TYPE_CHECKING, Any, NoReturn, get_args, overload

import numpy as np

from . import ir, loader, memory, plan, progress
from .backend import Backend, Program, backend_class, choose_device, collect_forgotten, open_backend
from .bench import debug
from .bench.profiler import Profile, bandwidth_or_note, profile, require_plan
from .chat.conversation import Chat
from .chat.encoder import note_once
from .chat.template import Message, refuse_options
from .chat.text_model import TextModel
from .checkpoint import Weight
from .config import RopePairing
from .engine.capacity import choose_context, kv_layout
from .engine.engine import Engine
from .engine.logprobs import prompt_logprobs
from .engine.model_runner import ModelRunner
from .engine.request import Request, TokenLogprobs
from .engine.sequence import Constraint
from .errors import CLOSED, Error, Interrupted, UnsupportedError
from .explain.explanation import LOGPROBS, Explanation, explain, text_of
from .explain.values import ValueReader
from .generate import GenerationResponse, HowToSubmit, ResponseStream, TextEngine, TextStreams, prompts_with_params
from .graph import Logits, build
from .memory import format_bytes
from .quantization import policy
from .quantization.types import KV_TYPES, VEC_DOT_TYPE, ActivationType, KVType
from .sampling import DEFAULTS, NOT_GIVEN, NotGiven, SamplerTable, SamplingOptions, SamplingParams, merge
from .session import Session, filled
from .structured.compiler import compile_constraint
from .validation import require_supported, whole_number
from .visualize import card

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Model(TextModel):
    """A compiled model. Use `numballama.compile`; see there for the arguments.

    Attributes: `path`, `format` (its name), `config`, `tokenizer` (or None), `weights`, `graph` (as declared, for one
    token), `device`, `gpus`, `threads`, `context`, `kv` (the cache's layout), `activations`, `batch_invariant`, `notes`
    (what was assumed or chosen, a sentence each), `load_s` (seconds that loading and compiling took).
    """

    def __init__(
        self,
        model_path: str | PathLike[str] | None,
        tokenizer: str | PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: policy.Dtype | None = None,
        context: int | None = None,
        kv_dtype: KVType | None = None,
        threads: int | None = None,
        rope_pairing: RopePairing | None = None,
        rope_theta: float | None = None,
        norm_eps: float | None = None,
        fusions: bool | Sequence[str] = True,
        activations: ActivationType = "f32",
        max_sequences: int = 1,
        gpus: int = 1,
        kv_tokens: int | None = None,
        batch_invariant: bool = False,
    ) -> None:
        started = time.perf_counter()
        for name, value, known in (
            ("dtype", dtype, (None, *policy.DTYPES)),
            ("kv_dtype", kv_dtype, (None, *KV_TYPES)),
            ("activations", activations, get_args(ActivationType)),
        ):
            require_supported(name, value, known)
        self.gpus = whole_number("gpus", gpus, 1)
        self.device, why = choose_device(device, self.gpus)
        kind = backend_class(self.device, batch_invariant)
        self.activations, self.batch_invariant, self._fusions = activations, bool(batch_invariant), fusions
        if activations not in kind.activation_types:
            raise UnsupportedError(f"activations {activations!r} are for the CPU, not for {self.device}: device='cpu'")
        collect_forgotten()
        super().__init__(
            loader.open_checkpoint(
                model_path, tokenizer, rope_pairing=rope_pairing, rope_theta=rope_theta, norm_eps=norm_eps
            )
        )
        if device == "auto":
            self.notes.append(f"device {self.device}, chosen because {why}")
        self.context = choose_context(self.config, context, self.notes)
        self.max_sequences = whole_number("max_sequences", max_sequences, 1)
        kv_tokens = None if kv_tokens is None else whole_number("kv_tokens", kv_tokens, 1)
        self._kv_arguments = kv_dtype or kind.default_kv_dtype, self.max_sequences, kv_tokens
        progress.info(f"{self._checkpoint.format}: {format_bytes(self._checkpoint.nbytes)} of weights mapped")
        if kind.in_host_memory:  # before weights are converted
            kv_layout(self.config, self.context, *self._kv_arguments, memory.available_bytes(), [])

        self._backend: Backend | None = None
        self._program: Program | None = None
        self._engine: Engine | None = None
        self.weights: Mapping[str, Weight] = policy.convert_weights(self.config, self._checkpoint.weights, dtype)
        if activations == "int8" and not any(w.type.name in (*VEC_DOT_TYPE, "int8") for w in self.weights.values()):
            self.notes.append("no weight of this model is quantised, so no activations are rounded to int8")
        given = self.device, self.weights, threads, batch_invariant, self.gpus, self._checkpoint, dtype
        backend = self._backend = open_backend(*given)
        try:
            self._compile(backend)
        except BaseException:
            backend.close()  # free device memory now: a traceback may keep this object alive
            raise
        self.notes += backend.notes
        for note in self.notes:
            progress.info(note)
        self.threads, self.load_s = backend.workers, time.perf_counter() - started

    def _build(self, tokens: int, logits: Logits, lens: bool = False) -> ir.Graph:
        types = {name: weight.type for name, weight in self.weights.items()}
        int8 = self._checkpoint.int8_activations
        return build(self.config, types, self.kv, tokens, logits, int8, self.activations, lens)

    def _compile(self, backend: Backend) -> None:
        given = *self._kv_arguments, backend.free_bytes(), self.notes, backend.decode_sizes[0], backend.most_sequences
        self.kv = kv_layout(self.config, self.context, *given)
        self.max_sequences = self.kv.slots
        progress.info(f"{format_bytes(self.kv.nbytes)} KV cache for {self.kv.tokens:,} tokens ({self.kv.dtype})")
        self.graph = self._build(1, "rows")
        debug.print_graph(self.graph)
        vocab = self.config.vocab_size
        candidates = min(vocab, self.tokenizer.vocab_size) if self.tokenizer else vocab  # padding is never chosen
        table = SamplerTable(self.max_sequences, vocab, candidates)
        chunk = min(backend.prefill_chunk, self.context * self.max_sequences)
        with progress.progress_bar("compiling kernels") as report:
            note = partial(note_once, self.notes)
            self._runner = ModelRunner(backend, self.kv, table, self._build, chunk, self._program_of, note)
            self._program, _ = self._runner.compile(report)
            backend.prepare(self._program, report)
            self._runner.prepare(report)
        self._engine = Engine(self._runner, context=self.context, mixed_tokens=self._runner.mixed_tokens)
        self._all_logits: Program | None = None
        self.value_reader = ValueReader(self, partial(self._build, logits="all", lens=True))

    def _program_of(self, graph: ir.Graph, report: progress.Report | None = None) -> Program:
        return debug.watched(self.backend.program(graph, self._fusions, report), self.backend)

    @property
    def backend(self) -> Backend:
        """The backend, which holds the weights and the KV cache. Raises `Error` once the model is closed."""
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

    def engine(self) -> TextEngine:
        """The model's engine, for many requests at once, from any thread or event loop: see `TextEngine`.

        `generate`, `stream` and chats go through the same engine. How many sequences a step holds is `max_sequences` of
        `compile`. Raises `Error` once the model is closed.
        """
        return TextEngine(self.token_engine, self.submit)

    def _submit_tokens(
        self, ids: Iterable[int], settings: SamplingParams, ends: frozenset[int], streams: TextStreams, how: HowToSubmit
    ) -> Request[GenerationResponse]:
        return self.token_engine.submit(
            ids, settings, stop_token_ids=ends, process=streams, when_read=not settings.stop,
            constraint=self.constraint(settings, ends), **how,
        )  # fmt: skip

    def constraint(self, settings: SamplingParams, ends: frozenset[int]) -> Callable[[], Constraint] | None:
        """What makes the constraints that `settings` ask for, see `compile_constraint`. `ends`: the stop tokens."""
        size = self.config.vocab_size
        return compile_constraint(settings, self.require_tokenizer(), vocab_size=size, stop_token_ids=ends)

    def check_constraint(self, settings: SamplingParams) -> None:
        compile_constraint(settings, self.require_tokenizer())

    def prompt_logprobs(self, ids: Sequence[int], top: int) -> list[TokenLogprobs | None]:
        return prompt_logprobs(self.logits(ids), ids, top)

    @property
    def kv_tokens(self) -> int:
        return self.kv.tokens

    @property
    def token_engine(self) -> Engine:
        """The engine below text: token ids in, token events out. Raises `Error` once the model is closed."""
        if self._engine is None:
            raise Error(CLOSED)
        return self._engine

    def profile(self, prompt: str | Iterable[int] = "Once upon a time") -> Profile:
        """Time a decode step after a prompt, text or token ids, and the prompt's last run: by operator and by part.

        The result prints as tables: time, bytes, GB/s, and the share of the memory's bandwidth, which is measured once.
        Raises `Error` on the reference, `ContextError` for a prompt that is too long.
        """
        require_plan(self)
        ids = self._encode_prompt(prompt, DEFAULTS)[0] if isinstance(prompt, str) else prompt
        return profile(self, self.token_engine.validate(ids), self._bandwidth)

    @cached_property
    def _bandwidth(self) -> float | None:
        return bandwidth_or_note(self.backend, self.notes)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[Session]:
        """Have the device and an empty session for the block, for measurements. Requests wait, and compute their tokens
        again after it.

        Raises `Error` once the model is closed, `DeviceError` in a forked child.
        """
        with self.token_engine.exclusive():
            pages = min(self.kv.pages - 1, self.kv.pages_per_sequence)
            self.backend.set_pages(0, 0, range(1, pages + 1))
            context = min(self.context, pages * self.kv.page)
            yield Session(self._runner.decode, self._runner.prompt, context, self.config.vocab_size)
            if not self.token_engine.forked:
                self._runner.check_page(1)  # the first of the session: notes what is saturated

    def close(self) -> None:
        """Free the KV cache, the arenas, device memory and the mapping of the file. The model can no longer be used.

        Does nothing in a forked child: all of this is its parent's.
        """
        engine, backend = self._engine, self._backend
        if engine is None or backend is None or engine.forked:
            return
        engine.close()
        try:
            backend.close()
        finally:
            self._engine = self._program = self._all_logits = self._backend = None
            self.value_reader.close()
            del self._runner
            self.weights = {}
            self._checkpoint.weights = {}

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise Error(
            "a model can be neither copied nor pickled: pass its path, and call numballama.compile() where it is needed"
        )

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arenas of all programs. Raises `Error` once the model is closed."""
        plans = [program.plan for program in self._runner.programs] if self.program else []
        return sum(plan.arena_bytes for plan in plans if plan is not None)

    def __str__(self) -> str:
        return card.as_text(card.of_model(self))

    def _repr_html_(self) -> str:
        """A card for a notebook: configuration, bytes by type and part, device, memory."""
        return card.as_html(card.of_model(self))

    def __repr__(self) -> str:
        c = self.config
        return f"<Model {self.path.name}: {c.n_layers} layers, dim {c.dim}, on {self.device}, context {self.context}>"

    def logits(self, ids: Iterable[int]) -> np.ndarray:
        """float32 [len(ids), vocab]: the logits after each token, computed from an empty cache.

        Raises `Error` for no ids, ids outside the vocabulary and logits that are NaN, `ContextError` for more than fit.
        """
        tokens = self.token_engine.validate(ids)
        return filled(np.empty((len(tokens), self.config.vocab_size), np.float32), self.iter_logits(tokens))

    def iter_logits(self, ids: Iterable[int], start: int = 0) -> Generator[np.ndarray]:
        """Yield `logits(ids)[start:]` in parts, float32 [rows, vocab], each in the same memory. Requests wait."""
        tokens = self.token_engine.validate(ids)
        with self.exclusive() as session:
            if self._all_logits is None:
                least, most = self.backend.decode_sizes[0], min(self.backend.prefill_chunk, 512)  # logits take memory
                with progress.progress_bar("compiling kernels") as report:
                    graph = self._build(min(most, max(least, self.context)), "all")
                    self._all_logits = self._program_of(graph, report)
            yield from session.each_logits(self._all_logits, tokens, start)

    def values(self, ids: Iterable[int], name: str) -> np.ndarray:
        """A value of the graph by name (`print(model.graph)` lists them) for a text of these ids, a row for each id.

        "layers.3.probabilities" is [len(ids), n_heads, len(ids)], a layer's output "layers.3.x_out" [len(ids), dim],
        keys in the cache "layers.3.k_cache" [len(ids), n_kv_heads, head_dim]. A weight comes whole, as float32. Ops run
        one by one, without fusions, from an empty cache.

        Raises `Error` for a name that the graph does not have, with near ones, and for a result that is too large.
        """
        return self.value_reader.read(ids, name)

    def explain(
        self, text: str | Iterable[int] | Iterable[GenerationResponse], logprobs: int = LOGPROBS, *,
        layer: int | None = None, head: int | None = None, lens: bool = True,
    ) -> Explanation:  # fmt: skip
        """What the model computes for a text, a string or token ids: each token's probability and the `logprobs`
        likeliest in its place; attention of a layer (None: the last) and a head (None: the mean of all); with `lens`
        also what each layer would predict, for which the classifier runs once a layer. With several `gpus` only
        probabilities are shown. Responses of `stream(…, logprobs=5)` are shown in the same way, without a run.

        Raises `Error` for more than 2,048 tokens, and for a layer or head that the model does not have.
        """
        return explain(self, text, logprobs, layer, head, lens)

    @overload
    def generate(
        self, prompt: str | None, max_tokens: int | NotGiven | None = ..., *, params: SamplingParams | None = ...,
        **options: Unpack[SamplingOptions],
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: list[str] | list[str | None] | tuple[str | None, ...], max_tokens: int | NotGiven | None = ...,
        *, params: SamplingParams | Sequence[SamplingParams] | None = ..., **options: Unpack[SamplingOptions],
    ) -> list[str]: ...  # fmt: skip

    def generate(
        self,
        prompt: str | list[str] | list[str | None] | tuple[str | None, ...] | None,
        max_tokens: int | NotGiven | None = NOT_GIVEN,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> str | list[str]:
        """Continue a prompt and return the text. For a list of prompts, return a list. None starts from BOS alone.

        `params` are the settings: one for all prompts, or a list with one for each. `max_tokens` and `options` replace
        fields of them (see `SamplingParams`). `temperature=0` is greedy. With `logprobs` the text shows
        its tokens' probabilities in a notebook: `ExplainedText`. It ends at EOS (in llama2.c and KuiperLLama files also
        at BOS), before a stop string, at `max_tokens` or at the end of the context.

        Raises `ContextError` for a prompt that does not fit; `Error` for an empty prompt, an invalid or unknown option,
        or a model without a tokenizer; `Interrupted`, with the text so far, on Ctrl-C.
        """
        prompts, each = prompts_with_params(prompt, params)
        settings = [merge(own, DEFAULTS, max_tokens, options) for own in each]
        if any(own.n > 1 for own in settings):
            raise Error("n > 1 gives several texts, generate() returns one: read them from stream(), by response.index")
        requests: list[Request[GenerationResponse]] = []
        texts: list[str] = []
        try:
            for text, own in zip(prompts, settings, strict=True):
                requests.append(self._submit_ids(*self._encode_prompt(text, own), own))
            for request in requests:
                responses: list[GenerationResponse] = []
                try:
                    for response in request:
                        responses.append(response)
                except KeyboardInterrupt:
                    raise Interrupted("".join(map(str, responses)), texts) from None
                texts.append(text_of(self, responses))
        finally:
            for request in requests:  # a traceback may keep them alive
                request.cancel()
        return texts[0] if isinstance(prompt, str | None) else texts

    def stream(
        self,
        prompt: str | None,
        max_tokens: int | NotGiven | None = NOT_GIVEN,
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> ResponseStream:
        """Like `generate` for one prompt, but yields a `GenerationResponse` for each token as soon as it is known.

        As the last expression of a notebook's cell, it shows its text there while it is generated.

        Arguments are checked by the call, not by the first response. Text never ends inside a character, and no part of
        a stop string is ever yielded. Several streams of one model may be read alternately or from several threads:
        they advance together, as many at a time as `max_sequences` of `compile`.
        """
        settings = merge(params, DEFAULTS, max_tokens, options)
        request = self._submit_ids(*self._encode_prompt(prompt, settings), settings)
        return ResponseStream(request.__iter__(), prompt or "")

    def stream_ids(
        self,
        ids: Iterable[int],
        max_tokens: int | NotGiven | None = NOT_GIVEN,
        *,
        params: SamplingParams | None = None,
        strip_leading_space: bool = False,
        reuse_prefix: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> ResponseStream:
        """Like `stream`, from token ids instead of text.

        `strip_leading_space`: the output is a new text, so drop the space that the tokenizer's encoder prepends.
        `reuse_prefix`: reuse tokens at the beginning of `ids` that are in the KV cache, whoever computed them.
        """
        settings = merge(params, DEFAULTS, max_tokens, options)
        request = self._submit_ids(ids, strip_leading_space, settings, reuse_prefix=reuse_prefix)
        return ResponseStream(request.__iter__())

    def chat(
        self,
        system: str | None = None,
        messages: Sequence[Message] | None = None,
        *,
        template: str | None = None,
        **template_kwargs: Any,
    ) -> Chat:
        """A conversation with the model.

        `system` is the system message. `messages` is a conversation to continue, as `Chat.messages` gives it; it may
        begin with a system message instead. `template` is a chat template in jinja2, or the name of one of the file's.
        Its default is the file's own or, for a file without one, the built-in template that fits the vocabulary.
        `template_kwargs` are passed to the template (`enable_thinking=False`).

        Raises `Error` without a tokenizer or a template.
        """
        refuse_options(template_kwargs)
        tools = template_kwargs.get("tools") is not None
        encoder = self._encoders.get(self.require_tokenizer(), template or None, tools)
        return Chat(self, encoder, system, messages, template_kwargs)
