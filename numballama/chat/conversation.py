"""`Chat`: a conversation through a model's chat template. Each turn reuses the KV cache of earlier turns."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from ..engine.request import FinishReason
from ..errors import ContextError, Error, Interrupted
from ..generate import GenerationResponse, ResponseStream
from ..sampling import CHAT_DEFAULTS, NOT_GIVEN, NotGiven, SamplingOptions, SamplingParams, merge
from .encoder import NO_BOS, ConversationEncoder, note_once
from .template import ChatTemplate, Message, plain_message, stop_token_ids

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..model import Model


@dataclass
class Turn:
    """Token counts and speed of one turn: a message and its answer."""

    prompt_tokens: int
    """Tokens of the whole rendered conversation."""
    reused_tokens: int = 0
    """Tokens of the conversation that were in the KV cache already."""
    tokens: int = 0
    """Tokens of the answer, its end included."""
    tokens_per_second: float = 0.0
    """Speed of the answer's tokens after the first. 0.0 until the second."""
    finish_reason: FinishReason | None = None
    """As in `GenerationResponse`. None if the answer was interrupted or is not complete yet."""
    stop_reason: str | int | None = None
    """As in `GenerationResponse`."""

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of the prompt that had to be computed."""
        return self.prompt_tokens - self.reused_tokens


class Chat:
    """A conversation. Use `model.chat()`; see there for the arguments.

    Control tokens that a message spells out ("<|im_end|>") are encoded as text, unless `special=True`. A turn computes
    only tokens that are not in the KV cache: the new message, and whatever the template renders differently than
    before. Several chats of one model share its cache. `turn` describes the last turn; None before the first.
    """

    def __init__(
        self,
        model: Model,
        encoder: ConversationEncoder,
        system: str | None = None,
        messages: Sequence[Message] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._model, self._encoder = model, encoder
        self._variables = dict(template_kwargs or {})
        self._stop_token_ids = stop_token_ids(encoder.tokenizer)
        self.turn: Turn | None = None
        self._history: list[dict[str, Any]] = []
        self._rendered, self._ids = "", list[int]()  # the conversation as the model has seen it, as text and as ids
        self.system = None
        if messages is not None:
            self.messages = messages
        if system is not None:
            if self._system is not None:
                raise Error("the system message is given twice: by system= and as the first of messages=")
            self.system = system

    def __copy__(self) -> Chat:
        """A chat that continues from here; both use the same model."""
        other = Chat(self._model, self._encoder, template_kwargs=self._variables)
        other.messages = self.messages
        other._rendered, other._ids, other.turn = (
            self._rendered,
            list(self._ids),
            replace(self.turn) if self.turn else None,
        )
        return other

    def __deepcopy__(self, memo: object) -> Chat:
        return self.__copy__()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise Error("a chat cannot be pickled: save chat.messages, and continue with model.chat(messages=…)")

    @property
    def template(self) -> ChatTemplate:
        """The chat template."""
        return self._encoder.template

    @property
    def system(self) -> str | None:
        """The system message. After a change, the next turn computes the whole conversation again."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if not isinstance(text, str | None):
            raise Error(f"the system message must be a string or None, found {text!r:.200}")
        self._system = text or None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far, a copy: {"role": "system" | "user" | "assistant", "content": text} each.

        It can be set, to continue a saved conversation.
        """
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return system + [dict(message) for message in self._history]

    @messages.setter
    def messages(self, messages: Iterable[Message]) -> None:
        if not isinstance(messages, Iterable) or isinstance(messages, str | bytes | Mapping):
            raise Error(f"messages must be a list, found {messages!r:.200}")
        history = [_checked(message) for message in messages]
        first_is_system = bool(history) and history[0]["role"] == "system"
        self._system = history.pop(0)["content"] or None if first_is_system else None
        self._history, self.turn = history, None
        self._rendered, self._ids = "", []

    def reset(self) -> None:
        """Forget the messages, except the system message."""
        self._history, self.turn = [], None

    def send(
        self,
        text: str,
        max_tokens: int | NotGiven | None = NOT_GIVEN,
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> str:
        """Send a message and return the answer. The arguments are those of `stream`.

        Ctrl-C raises `Interrupted` with the answer so far, which stays in the conversation.
        """
        answer: list[str] = []
        try:
            for response in self.stream(text, max_tokens, params=params, **options):
                answer.append(response.text)
        except KeyboardInterrupt:
            raise Interrupted("".join(answer)) from None
        return "".join(answer)

    def stream(
        self,
        text: str,
        max_tokens: int | NotGiven | None = NOT_GIVEN,
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> ResponseStream:
        """Send a message and yield the answer: a `GenerationResponse` for each token.

        `max_tokens` is 1024 unless it or `params` is given. The other arguments are as in `Model.stream`. The message
        is added to the conversation with the first token of the answer; of the answer, the tokens that were read are.

        Raises `ContextError`, and leaves the conversation as it was, when it no longer fits the context: no message is
        dropped silently. Raises `Error` when the template refuses the message.
        """
        if not isinstance(text, str):
            raise Error(f"a message must be a string, found {text!r:.200}")
        settings = merge(params, CHAT_DEFAULTS, max_tokens, options)
        if settings.n > 1:
            raise Error(f"a message has one answer in a chat: n must be 1, found {settings.n}")
        if not settings.ignore_eos:
            settings = replace(settings, stop_token_ids={*settings.stop_token_ids, *self._stop_token_ids})
        history = [*self._history, {"role": "user", "content": text}]
        rendered, ids = self._encode(history, settings.special)
        if self._encoder.misses_bos(ids):
            note_once(self._model.notes, NO_BOS)
        if len(ids) > self._model.context:
            raise ContextError(
                f"the conversation would have {len(ids):,} tokens and the context holds {self._model.context:,}: "
                "reset() the chat, shorten the message, or compile with a larger context="
            )
        responses = self._model.stream_ids(ids, params=settings, strip_leading_space=True, reuse_prefix=True)
        return ResponseStream(self._answer(history, rendered, ids, responses))

    def _encode(self, history: Sequence[Message], special: bool = False) -> tuple[str, list[int]]:
        """The conversation rendered, and its ids. `special`: control tokens that messages spell are tokens."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        known = self._rendered if self._history else ""
        return self._encoder.encode_after(known, self._ids, [*system, *history], self._variables, special)

    def _answer(
        self, history: list[dict[str, Any]], rendered: str, ids: list[int], responses: Iterator[GenerationResponse]
    ) -> Generator[GenerationResponse, None, None]:
        """The responses. The text of each enters the conversation before it is yielded."""
        before, turn, tokens = self._history, Turn(len(ids)), list[int]()
        answer = {"role": "assistant", "content": ""}
        history = [*history, answer]
        decoder = self._encoder.tokenizer.decoder(strip_leading_space=False)
        for response in responses:
            if self._history is not (history if tokens else before):
                raise Error("the conversation was continued without this answer")
            tokens.append(response.token)
            self._history, self.turn = history, turn
            turn.reused_tokens, turn.tokens = response.cached_tokens, len(tokens)
            turn.tokens_per_second = response.tokens_per_second
            turn.finish_reason, turn.stop_reason = response.finish_reason, response.stop_reason
            answer["content"] += response.text
            if not isinstance(response.stop_reason, int):  # a stop token is not part of the answer
                rendered += decoder.push(response.token)
                ids.append(response.token)
            if response.finish_reason is not None:
                rendered += decoder.flush()
            self._rendered, self._ids = rendered, ids
            yield response


def _checked(given: object) -> dict[str, Any]:
    message = plain_message(given)
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise Error(f'a message must be {{"role": text, "content": text}}, found {message!r:.200}')
    return message
