"""Sampling: `SamplingParams`, the settings of one generation, and `SamplerState`, the buffers it samples with.

The settings apply in llama.cpp's order: repetition penalty, then top-k, top-p and min-p on the model's own
probabilities, then temperature on what is left. `cpu.sampling` does this on the CPU, `cuda.kernels.sampling` on a GPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import Any, Literal, TypedDict

import numpy as np

from .errors import Error, UnsupportedError
from .validation import flag, real_number, require_known, strings, whole_number

REPEAT_WINDOW = 64
"""Number of latest tokens that the repetition penalty applies to (llama.cpp's repeat_last_n)."""
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION_PENALTY = range(5)
"""Indices into `SamplerState.settings`."""
SETTINGS = 5
"""Length of `SamplerState.settings`."""
MIN_TEMPERATURE = 1e-5
"""A lower temperature is treated as 0, because logits divided by it would overflow."""


OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_length": "max_tokens, which does not count the prompt",
    "min_new_tokens": "min_tokens",
    "temp": "temperature",
    "do_sample": "temperature: 0 is greedy, above 0 samples",
    "typical_p": "top_p or min_p",
    "repeat_last_n": "repetition_penalty, of the last 64 tokens",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "eos_token_id": "stop_token_ids",
    "num_return_sequences": "n",
    "best_of": "n",
    "top_logprobs": "logprobs",
    "skip_special_tokens": "stop_token_ids and ignore_eos; control tokens are never part of the text",
    "parse_special": "special",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "response_format": "json_schema",
    "stream": "the method stream() in place of generate()",
    "streamer": "the method stream() in place of generate()",
    "echo": "prompt + model.generate(prompt)",
}
"""What other libraries call an option → what to use here."""


class NotGiven(Enum):
    """The type of `NOT_GIVEN`."""

    NOT_GIVEN = "not given"


NOT_GIVEN: Literal[NotGiven.NOT_GIVEN] = NotGiven.NOT_GIVEN
"""Default of `max_tokens` arguments: use the value of `SamplingParams`. (None means no limit.)"""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The settings of one generation: how tokens are chosen and when the text ends.

    Raises `Error` for a value that is out of range, `UnsupportedError` for a setting that this version does not have.
    Use `override` for a copy with other values.
    """

    max_tokens: int | None = 256
    """Tokens to generate at most. None: until the context is full. A chat's default is 1024."""
    min_tokens: int = 0
    """Tokens to generate before an end-of-sequence token may be chosen. Not supported yet: only 0."""
    temperature: float = 0.8
    """The logits are divided by it: below 1 likely tokens gain, above 1 unlikely ones. 0: always the likeliest."""
    top_k: int = 40
    """Sample among the `top_k` likeliest tokens. 0: off."""
    top_p: float = 0.95
    """Sample among the fewest likeliest tokens whose probabilities sum to `top_p`. 1: off."""
    min_p: float = 0.0
    """Drop tokens less likely than `min_p` times the likeliest. 0: off."""
    repetition_penalty: float = 1.0
    """Above 1: make tokens among the last 64, the prompt's included, less likely. 1: off. Also `repeat_penalty`."""
    presence_penalty: float = 0.0
    """OpenAI's penalty on tokens that the output contains. Not supported yet: only 0."""
    frequency_penalty: float = 0.0
    """OpenAI's penalty on tokens, for each time that the output contains them. Not supported yet: only 0."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Token id → value to add to its logit. Not supported yet: only None or empty."""
    seed: int | None = None
    """The same seed gives the same tokens on one machine. None or -1: a random one."""
    stop: str | Sequence[str] = ()
    """Strings that end the text. They are not part of it. They may spell control tokens ("<|im_end|>"), which are not
    part of the text in any case."""
    stop_token_ids: Iterable[int] = frozenset()
    """Token ids that end the text, besides those of the model file. They add nothing to it."""
    ignore_eos: bool = False
    """Continue after an end-of-sequence token of the model file. `stop_token_ids` still end the text."""
    logprobs: int | None = None
    """Number of log probabilities to return for each token. Not supported yet: only None."""
    n: int = 1
    """Number of texts to generate for each prompt. Not supported yet: only 1."""
    json_schema: Mapping[str, Any] | str | None = field(default=None, hash=False)
    """Generate JSON of this schema. Not supported yet: only None."""
    regex: str | None = None
    """Generate text that matches this expression. Not supported yet: only None."""
    grammar: str | None = None
    """Generate text of this grammar. Not supported yet: only None."""
    special: bool = False
    """Whether control tokens that a prompt or a message spells out ("</s>") are tokens. False: they are text."""
    repeat_penalty: InitVar[float | None] = None
    """llama.cpp's name for `repetition_penalty`: an argument, and the same value to read."""

    def __new__(cls, **options: object) -> SamplingParams:
        """Raises `Error`, which names the right one, for an option that does not exist."""
        known = [each.name for each in dataclasses.fields(cls)]
        require_known("sampling option", [name for name in options if name != "repeat_penalty"], known, OTHER_NAMES)
        return super().__new__(cls)

    def __post_init__(self, repeat_penalty: float | None) -> None:
        penalty_name = "repetition_penalty"
        if repeat_penalty is not None:
            if self.repetition_penalty != 1:
                raise Error("repetition_penalty and repeat_penalty are one setting: pass only one of them")
            penalty_name = "repeat_penalty"
            self._set("repetition_penalty", repeat_penalty)
        if self.max_tokens is not None:
            self._set("max_tokens", whole_number("max_tokens", self.max_tokens, 0))
        self._set("min_tokens", whole_number("min_tokens", self.min_tokens, 0))
        self._set("temperature", real_number("temperature", self.temperature, 0, 1e6, "a number from 0 (greedy) up"))
        self._set("top_k", whole_number("top_k", self.top_k, 0))
        self._set("top_p", real_number("top_p", self.top_p, 1e-9, 1, "above 0 and at most 1 (off)"))
        self._set("min_p", real_number("min_p", self.min_p, 0, 1, "between 0 (off) and 1"))
        penalty = real_number(penalty_name, self.repetition_penalty, 0.01, 100, "between 0.01 and 100 (1 is off)")
        self._set("repetition_penalty", penalty)
        if self.seed is not None:
            self._set("seed", whole_number("seed", self.seed))
        self._set("stop", () if self.stop is None else tuple(strings("stop", self.stop)))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        self._set("n", whole_number("n", self.n, 1))
        for name in ("ignore_eos", "special"):
            self._set(name, flag(name, getattr(self, name)))
        self._refuse_unsupported()

    def override(self, options: Mapping[str, Any]) -> SamplingParams:
        """A copy with other values of some fields. Raises `Error` that names an unknown field and the known ones."""
        if not options:
            return self
        changes = dict(options)
        if changes.get("repeat_penalty") is not None:
            changes.setdefault("repetition_penalty", 1.0)
        return dataclasses.replace(self, **changes)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _refuse_unsupported(self) -> None:
        """Raise `UnsupportedError` for a field that would have an effect, and has none in this version."""
        off = {
            "min_tokens": 0,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "logit_bias": None,
            "logprobs": None,
            "n": 1,
            "json_schema": None,
            "regex": None,
            "grammar": None,
        }
        for name, value in off.items():
            given = getattr(self, name)
            if given != value and not (name == "logit_bias" and not given):
                raise UnsupportedError(f"{name} is not supported by this version: leave it at {value}, found {given!r}")


# `dataclasses.replace` must not pass the other name back, and reading it gives the value
del SamplingParams.__dataclass_fields__["repeat_penalty"]
SamplingParams.repeat_penalty = property(lambda self: self.repetition_penalty)  # type: ignore[attr-defined]


def _token_ids(value: object) -> frozenset[int]:
    if value is None:  # the default of vLLM
        return frozenset()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise Error(f"stop_token_ids must be a list of token ids, found {value!r}")
    return frozenset(whole_number("a token of stop_token_ids", token, 0) for token in value)


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments that override fields of `SamplingParams`; `max_tokens` is a parameter of its own."""

    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Iterable[int] | None
    ignore_eos: bool
    logprobs: int | None
    n: int
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None
    special: bool


def merge(
    params: SamplingParams | None,
    defaults: SamplingParams,
    max_tokens: int | NotGiven | None,
    options: Mapping[str, Any],
) -> SamplingParams:
    """`params`, or `defaults` where there are none, with the keyword arguments of a call in place of its fields."""
    if not isinstance(params, SamplingParams | None):
        raise Error(f"params must be SamplingParams, found {params!r}")
    given = {} if max_tokens is NOT_GIVEN else {"max_tokens": max_tokens}
    return (defaults if params is None else params).override({**given, **options})


DEFAULTS = SamplingParams()
"""Default settings of `generate` and `stream`."""
CHAT_DEFAULTS = SamplingParams(max_tokens=1024)
"""Default settings of `Chat.send` and `Chat.stream`."""


class SamplerState:
    """The buffers that one generation samples with, allocated once.

    `vocab_size` is how many tokens may be chosen: ids 0 to `vocab_size` - 1.

    Attributes: `settings` float64 [SETTINGS], `recent` int32 [REPEAT_WINDOW] (a ring of the latest tokens), `counts`
    int64 [1] (tokens that `recent` has seen), `state` uint64 [1] (of the random generator), `ids` int32 [vocab_size]
    (scratch).
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self.settings = np.zeros(SETTINGS, np.float64)
        self.settings[TEMPERATURE] = params.temperature if params.temperature >= MIN_TEMPERATURE else 0.0
        self.settings[TOP_K] = min(params.top_k, vocab_size)
        self.settings[TOP_P] = params.top_p
        self.settings[MIN_P] = params.min_p
        self.settings[REPETITION_PENALTY] = params.repetition_penalty
        self.ids = np.zeros(vocab_size, np.int32)
        self.recent = np.zeros(REPEAT_WINDOW, np.int32)
        self.counts = np.zeros(1, np.int64)
        seed = int.from_bytes(os.urandom(8), "little") if params.seed in (None, -1) else params.seed
        assert seed is not None
        self.state = np.array([seed & (1 << 64) - 1], np.uint64)
        self.addresses = (*(array.ctypes.data for array in self.operands), len(self.ids))
        """The operands' addresses, and how many tokens may be chosen: arguments of the CPU's compiled loop."""

    def remember(self, tokens: Iterable[int]) -> None:
        """Add tokens, usually those of a prompt, to those that the repetition penalty applies to."""
        for token in tokens:
            if not 0 <= token < len(self.ids):
                continue  # it is never chosen, so there is nothing to penalise
            self.recent[self.counts[0] % REPEAT_WINDOW] = token
            self.counts[0] += 1

    @property
    def is_argmax(self) -> bool:
        """Whether these settings always choose the largest logit of the model."""
        return bool(self.settings[TEMPERATURE] == 0 and self.settings[REPETITION_PENALTY] == 1)

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """Arguments of `cpu.sampling.sample` after the logits."""
        return self.settings, self.recent, self.counts, self.state, self.ids
