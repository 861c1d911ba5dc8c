"""`TextModel`: text to token ids and back, and requests. `Model` computes them itself; others ask another process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoint import Checkpoint
from ..config import ModelConfig
from ..engine.request import Request, TokenLogprobs
from ..generate import GenerationResponse, HowToSubmit, TextEngine, TextStreams
from ..sampling import DEFAULTS, NOT_GIVEN, SamplingParams, merge
from ..tokenizers.base import Tokenizer
from .encoder import NO_BOS, Encoders, encode_prompt, note_once
from .template import Message, TemplateSet, conversation_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MayFail(Protocol):
    """What may fail for good."""

    @property
    def failure(self) -> BaseException | None:
        """Why no run is possible any more."""


class TextModel(ABC):
    """What a model is without its weights: a configuration, a tokenizer, chat templates, and an engine somewhere."""

    context: int
    """Tokens that a sequence may have."""
    max_sequences: int
    """How many sequences a step may hold."""
    device: str

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.path, self.format = checkpoint.path, checkpoint.format
        self.config: ModelConfig = checkpoint.config
        self.tokenizer: Tokenizer | None = checkpoint.tokenizer
        if self.tokenizer is not None:
            self.tokenizer.prepare()
        self.notes = list(checkpoint.notes)

    @property
    def checkpoint(self) -> Checkpoint:
        """The model's file."""
        return self._checkpoint

    @property
    @abstractmethod
    def backend(self) -> MayFail:
        """What computes."""

    @property
    @abstractmethod
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds, of all sequences together."""

    @abstractmethod
    def engine(self) -> TextEngine:
        """What generates for many requests at once."""

    @abstractmethod
    def _submit_tokens(
        self, ids: Iterable[int], settings: SamplingParams, ends: frozenset[int], streams: TextStreams, how: HowToSubmit
    ) -> Request[GenerationResponse]:
        """Submit token ids. `ends` are the tokens that end a text, `streams` makes responses of tokens."""

    @abstractmethod
    def prompt_logprobs(self, ids: Sequence[int], top: int) -> list[TokenLogprobs | None]:
        """See `engine.logprobs.prompt_logprobs`."""

    @abstractmethod
    def check_constraint(self, settings: SamplingParams) -> None:
        """Raise `Error` for a schema, an expression or a grammar that cannot be followed."""

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises `Error`, which says how to give one, if the model has none."""
        return self._checkpoint.require_tokenizer()

    def submit(
        self,
        prompt: str | Iterable[int] | None,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        reuse_prefix: bool = True,
        salt: str | None = None,
        strip_leading_space: bool = False,
        shown_tokens: Collection[int] = (),
    ) -> Request[GenerationResponse]:
        """Queue a prompt, text or token ids, and return the request to read. `TextEngine` explains the arguments.

        Raises `ContextError` for a prompt that can never fit; `Error` for an empty or invalid one, an id in use, or a
        model without a tokenizer.
        """
        how = HowToSubmit(priority=priority, request_id=request_id, reuse_prefix=reuse_prefix, salt=salt)
        settings = merge(params, DEFAULTS, NOT_GIVEN, {})
        if prompt is None or isinstance(prompt, str):
            prompt, strip_leading_space = self._encode_prompt(prompt, settings)
        return self._submit_ids(prompt, strip_leading_space, settings, shown_tokens, **how)

    def _encode_prompt(self, prompt: str | None, settings: SamplingParams) -> tuple[list[int], bool]:
        """(ids of a prompt, whether the output is a new text). None: the beginning-of-text token alone."""
        return encode_prompt(self.require_tokenizer(), prompt, settings.special, self.notes), prompt is None

    def _submit_ids(
        self, ids: Iterable[int], new_text: bool, settings: SamplingParams, shown: Collection[int] = (),
        **how: Unpack[HowToSubmit],
    ) -> Request[GenerationResponse]:  # fmt: skip
        """Submit token ids. `new_text` is `strip_leading_space` of `TextEngine.submit`, `shown` its `shown_tokens`."""
        tokenizer = self.require_tokenizer()
        strip = new_text and not settings.is_constrained  # a grammar means the tokens' own text
        streams = TextStreams(lambda: tokenizer.decoder(strip, shown), settings.stop, settings.n, settings.min_tokens)
        ends = frozenset() if settings.ignore_eos else self._checkpoint.end_ids
        return self._submit_tokens(ids, settings, ends.union(settings.stop_token_ids), streams, how)

    def apply_chat_template(
        self,
        messages: Sequence[Message] | None = None,
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tokenize: bool = True,
        **template_kwargs: Any,
    ) -> list[int] | str:
        """A conversation as the model's chat template writes it: token ids, or with `tokenize=False` text.

        Each message is {"role": "system" | "user" | "assistant", "content": text}; `conversation=` is another name of
        the list. `add_generation_prompt` adds the beginning of the model's answer. That is the default, unless
        `continue_final_message=True`: then the text ends with that of the last message. `tools` and `template_kwargs`
        are passed to the template, except `chat_template`: another template, or the name of one of the file's. Control
        tokens that a message spells out ("<|im_end|>") are encoded as ordinary text.

        Raises `Error` without a tokenizer or a template, or when the template refuses the messages.
        """
        wanted = template_kwargs.pop("chat_template", None)
        given, variables = conversation_of(messages, add_generation_prompt, {"tools": tools, **template_kwargs})
        encoder = self._encoders.get(self.require_tokenizer(), wanted, tools is not None)
        if not tokenize:
            return encoder.template.render(given, **variables)
        ids = encoder.encode(given, **variables)
        if encoder.misses_bos(ids):
            note_once(self.notes, NO_BOS)
        return ids

    def chat_template(self, template: str | None = None) -> str:
        """The source of a chat template: `template`, the one of this name, or the model's. Raises as `Model.chat`."""
        return self._encoders.get(self.require_tokenizer(), template or None, False).template.source

    @cached_property
    def _encoders(self) -> Encoders:
        return Encoders(TemplateSet(self._checkpoint.chat_templates, self._checkpoint.template_tokens))
