"""Sampling: `SamplingParams`, the settings of one generation, and `SamplerTable`, the state of many of them.

A token is chosen from the model's logits in this order. What changes the choice of a greedy generation comes first, as
in vLLM: the mask of allowed tokens, `min_tokens`, `logit_bias`, the repetition penalty, then frequency and presence
penalty. The filters follow in llama.cpp's order: top-k, top-p and min-p on the probabilities of these logits, then
temperature on what is left. `cpu.sampling` does this on the CPU, `cuda.kernels.sampling` on a GPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from .errors import Error
from .validation import flag, real_number, require_known, strings, whole_number

REPEAT_WINDOW = 64
"""Number of latest tokens that the repetition penalty applies to (llama.cpp's repeat_last_n)."""
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION_PENALTY, PRESENCE_PENALTY, FREQUENCY_PENALTY, SETTINGS = range(8)
"""Columns of `SamplerTable.settings`, and their number."""
N_CANDIDATES, N_LOGPROBS, N_BIAS, N_STOP, MIN_TOKENS, HAS_COUNTS, HAS_MASK, INFO = range(8)
"""Columns of `SamplerTable.info`, and their number."""
MIN_TEMPERATURE = 1e-5
"""A lower temperature is treated as 0, because logits divided by it would overflow."""
MAX_LOGPROBS = 20
"""Largest `logprobs`, as of OpenAI and vLLM."""
MAX_N = 16
"""Largest `n`."""
MAX_BIASES = 1024
"""Most entries of `logit_bias`, and most stop tokens that `min_tokens` holds back."""
GOLDEN = 0x9E3779B97F4A7C15
"""What the state of a SplitMix64 generator advances by: 2^64 divided by the golden ratio."""
FEED = -1
"""An id in a run's `ids`: the token that this row's slot sampled last, `SamplerTable.last_token`."""


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

    Raises `Error` for a value that is out of range. Use `override` for a copy with other values.
    """

    max_tokens: int | None = 256
    """Tokens to generate at most. None: until the context is full. A chat's default is 1024."""
    min_tokens: int = 0
    """Tokens to generate before an end-of-sequence token or one of `stop_token_ids` may be chosen, and before a stop
    string ends the text. The end of a grammar ends the text in any case."""
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
    """OpenAI's: subtracted from the logits of tokens that the output contains; the prompt does not count. 0: off."""
    frequency_penalty: float = 0.0
    """OpenAI's: subtracted from a token's logit for each time that the output contains the token. 0: off."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Token id → value to add to its logit, from -100 to 100. At most 1,024 tokens."""
    seed: int | None = None
    """The same seed gives the same tokens on one machine. None or -1: a random one."""
    stop: str | Sequence[str] = ()
    """Strings that end the text; empty ones are ignored. They are not part of it. They may spell control tokens
    ("<|im_end|>"), which are not part of the text in any case."""
    stop_token_ids: Iterable[int] = frozenset()
    """Token ids that end the text, besides those of the model file. They add nothing to it."""
    ignore_eos: bool = False
    """Continue after an end-of-sequence token of the model file. `stop_token_ids` still end the text."""
    logprobs: int | None = None
    """Likeliest tokens whose log probabilities to return with each token, up to 20. 0: the chosen token's only.

    They are of the model's own logits, before penalties and temperature, as vLLM's. None: none."""
    n: int = 1
    """Number of texts to generate for the prompt, up to 16."""
    json_schema: Mapping[str, Any] | str | None = field(default=None, hash=False)
    """Generate JSON of this schema: a mapping, or JSON text. {"type": "object"} or "json_object": any JSON object. What
    would not be enforced is an `Error`. At most one of `json_schema`, `regex` and `grammar`; see docs/structured.md."""
    regex: str | None = None
    """Generate text that this expression (Rust's syntax) matches as a whole."""
    grammar: str | None = None
    """Generate text of this grammar, in llguidance's Lark syntax or llama.cpp's GBNF."""
    special: bool = False
    """Whether control tokens that a prompt or a message spells out ("</s>") are tokens. False: they are text."""
    repeat_penalty: InitVar[float | None] = None
    """llama.cpp's name for `repetition_penalty`: an argument, and the same value to read."""

    def __new__(cls, /, **options: object) -> SamplingParams:
        """Raises `Error`, which names the right one, for an option that does not exist."""
        if not options.keys() <= cls.__dataclass_fields__.keys():
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
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, real_number(name, getattr(self, name), -2, 2, "between -2 and 2 (0 is off)"))
        if self.logit_bias is not None:
            self._set("logit_bias", _logit_bias(self.logit_bias))
        if self.logprobs is not None:
            self._set("logprobs", whole_number("logprobs", self.logprobs, 0))
            if self.logprobs > MAX_LOGPROBS:
                raise Error(f"logprobs must be at most {MAX_LOGPROBS}, found {self.logprobs}")
        self._set("stop", () if self.stop is None else tuple(strings("stop", self.stop)))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        self._set("n", whole_number("n", self.n, 1))
        for name in ("ignore_eos", "special"):
            self._set(name, flag(name, getattr(self, name)))
        if self.n > MAX_N:
            raise Error(f"n must be at most {MAX_N}, found {self.n}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise Error(f"min_tokens must be at most max_tokens, {self.max_tokens}, found {self.min_tokens}")
        self._check_structure()

    def override(self, options: Mapping[str, Any]) -> SamplingParams:
        """A copy with other values of some fields. Raises `Error` that names an unknown field and the known ones."""
        if not options:
            return self
        changes = dict(options)
        if changes.get("repeat_penalty") is not None:
            changes.setdefault("repetition_penalty", 1.0)
        return dataclasses.replace(self, **changes)

    @property
    def is_constrained(self) -> bool:
        """Whether the text follows a schema, an expression or a grammar."""
        return not (self.json_schema is None and self.regex is None and self.grammar is None)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_structure(self) -> None:
        """Check the form of `json_schema`, `regex` and `grammar`; `structured` checks what they say."""
        if not self.is_constrained:
            return
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise Error(f"{given[0]} and {given[1]} cannot be followed at once: pass only one of them")
        for name in given:
            value = getattr(self, name)
            if not isinstance(value, str | Mapping if name == "json_schema" else str):
                raise Error(f"{name} must be {'a mapping or JSON text' if name == 'json_schema' else 'text'}, "
                            f"found {value!r:.100}")  # fmt: skip
        if self.ignore_eos:
            raise Error(f"ignore_eos cannot be used with {given[0]}: the text ends where the grammar lets it")


# `dataclasses.replace` must not pass the other name back, and reading it gives the value
del SamplingParams.__dataclass_fields__["repeat_penalty"]
SamplingParams.repeat_penalty = property(lambda self: self.repetition_penalty)  # type: ignore[attr-defined]


def _token_ids(value: object) -> frozenset[int]:
    if value is None:  # the default of vLLM
        return frozenset()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise Error(f"stop_token_ids must be a list of token ids, found {value!r}")
    return frozenset(whole_number("a token of stop_token_ids", token, 0) for token in value)


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise Error(f"logit_bias must map token ids to numbers, found {value!r}")
    if len(value) > MAX_BIASES:
        raise Error(f"logit_bias must have at most {MAX_BIASES:,} tokens, found {len(value):,}")
    return {
        whole_number("a token of logit_bias", token, 0): real_number(
            f"logit_bias of token {token}", bias, -100, 100, "between -100 and 100"
        )
        for token, bias in value.items()
    }


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


@dataclass(frozen=True)
class Sampled:
    """What a run sampled for its R rows of logits."""

    tokens: NDArray[np.int32]
    """[R] ids. -1: the row's logits hold a NaN, or no token can be chosen from them. Only that request fails."""
    logprobs: NDArray[np.float32]
    """[R] log probability of each token. NaN in rows whose slot wants none."""
    top_ids: NDArray[np.int32]
    """[R, n] the likeliest tokens, likeliest first, of equals the smaller id first. A row whose slot wants fewer than n
    has -1 in the rest; n is 0 unless a slot of the run wants log probabilities."""
    top_logprobs: NDArray[np.float32]
    """[R, n] their log probabilities; NaN beside an id of -1, and where the largest logit is not finite."""

    @classmethod
    def empty(cls, rows: int, n: int) -> Sampled:
        """Memory for `rows` rows with up to `n` likeliest tokens each, filled with -1 and NaN."""
        top_ids, top_logprobs = np.full((rows, n), -1, np.int32), np.full((rows, n), np.nan, np.float32)
        return cls(np.full(rows, -1, np.int32), np.full(rows, np.nan, np.float32), top_ids, top_logprobs)

    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """Where the arrays lie, and n: an argument of `cpu.sampling.sample_rows`."""
        arrays = self.tokens, self.logprobs, self.top_ids, self.top_logprobs
        tokens, logprobs, top_ids, top_logprobs = (array.ctypes.data for array in arrays)
        return tokens, logprobs, top_ids, top_logprobs, self.top_ids.shape[1]


(
    SLOTS, VOCAB, SETTINGS_AT, INFO_AT, RECENT_AT, COUNTS_AT, GENERATED_AT, STATE_AT, LAST_TOKEN_AT, OUTPUT_COUNTS_AT,
    BIAS_IDS_AT, BIAS_VALUES_AT, BIAS_CAPACITY, MASK_AT, SCRATCH_IDS_AT, SCRATCH_LOGITS_AT, SCRATCH_ROWS, HEADER,
) = range(18)  # fmt: skip
"""Elements of a table's header, through which compiled code finds its arrays: sizes and addresses."""


class SamplerTable:
    """The state of `slots` generations that sample from logits of `vocab_size` tokens: one row of each array per slot.

    Tokens from `n_candidates` on are never chosen: a model's vocabulary may be padded beyond its tokenizer's. The
    default is all. `assign` starts a generation in a slot, `release` ends it.

    Attributes, the first dimension being the slots:
    `settings` float64 [slots, SETTINGS] and `info` int32 [slots, INFO]: what `SamplingParams` ask for.
    `recent` int32 [slots, REPEAT_WINDOW]: a ring of the latest tokens; `counts` int64 [slots]: tokens it has seen.
    `generated` int64 [slots]: number of generated tokens. `state` uint64 [slots]: of the random generators.
    `last_token` int32 [slots]: the latest token, which the slot's next step reads.
    `output_counts` int32 [slots, vocab_size]: how often each token was generated; no rows before a slot has a presence
    or frequency penalty. `bias_ids` int32, `bias_values` float32 [slots, capacity]: info[slot, N_BIAS] biases, then
    info[slot, N_STOP] stop tokens that may not be chosen yet.
    `mask` uint32 [slots, ceil(vocab_size / 32)]: bit i % 32 of word i // 32 is set where token i is allowed; no rows
    before the first mask.
    """

    def __init__(self, slots: int, vocab_size: int, n_candidates: int | None = None) -> None:
        self.slots, self.vocab_size = slots, vocab_size
        self.n_candidates = vocab_size if n_candidates is None else n_candidates
        if not 1 <= self.n_candidates <= vocab_size:
            raise Error(f"the sampler cannot choose from {self.n_candidates:,} tokens of {vocab_size:,}")
        self.settings = np.zeros((slots, SETTINGS), np.float64)
        self.info = np.zeros((slots, INFO), np.int32)
        self.recent = np.zeros((slots, REPEAT_WINDOW), np.int32)
        self.counts, self.generated = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self.state = np.zeros(slots, np.uint64)
        self.last_token = np.zeros(slots, np.int32)
        self.output_counts = np.zeros((0, vocab_size), np.int32)
        self.bias_ids, self.bias_values = np.zeros((slots, 0), np.int32), np.zeros((slots, 0), np.float32)
        self.mask = np.zeros((0, -(-vocab_size // 32)), np.uint32)
        self.assigned, self.masked = [0] * slots, [0] * slots
        self.changes = 0
        """How often `assign` and `set_mask` have changed a slot; a copy of the table compares it with its own.
        `changes` counts both over all slots."""
        workers = min(slots, os.cpu_count() or 1)
        self._scratch_ids = np.empty((workers, vocab_size), np.int32)
        self._scratch_logits = np.empty((workers, vocab_size), np.float32)
        self._header = np.zeros(HEADER, np.int64)
        self.address = self._header.ctypes.data
        """Address of the header: an argument of `cpu.sampling.sample_rows`."""
        for slot in range(slots):
            self.release(slot)
        self._write_header()

    def _write_header(self) -> None:
        arrays: dict[int, NDArray[Any]] = {
            SETTINGS_AT: self.settings, INFO_AT: self.info, RECENT_AT: self.recent, COUNTS_AT: self.counts,
            GENERATED_AT: self.generated, STATE_AT: self.state, LAST_TOKEN_AT: self.last_token,
            OUTPUT_COUNTS_AT: self.output_counts, BIAS_IDS_AT: self.bias_ids, BIAS_VALUES_AT: self.bias_values,
            MASK_AT: self.mask, SCRATCH_IDS_AT: self._scratch_ids, SCRATCH_LOGITS_AT: self._scratch_logits,
        }  # fmt: skip
        for place, array in arrays.items():
            self._header[place] = array.ctypes.data
        self._header[[SLOTS, VOCAB]] = self.slots, self.vocab_size
        self._header[[BIAS_CAPACITY, SCRATCH_ROWS]] = self.bias_ids.shape[1], len(self._scratch_ids)

    def assign(
        self,
        slot: int,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        output: Sequence[int] = (),
        stop_token_ids: Iterable[int] = (),
    ) -> None:
        """Start a generation in a slot, or resume one that has generated `output`, with the draws that it had left.

        `stop_token_ids` are all tokens that end the text: `min_tokens` holds them back. A `params.seed` of None draws a
        new seed. Raises `Error`, and leaves the slot as it was, for a token of `logit_bias` outside the vocabulary, and
        for `min_tokens` with more than MAX_BIASES stop tokens.
        """
        bias = dict(params.logit_bias or {})
        if outside := [token for token in bias if token >= self.vocab_size]:
            raise Error(f"logit_bias: token {outside[0]} is outside the vocabulary of {self.vocab_size:,} tokens")
        stops = (
            sorted({token for token in stop_token_ids if 0 <= token < self.n_candidates}) if params.min_tokens else []
        )
        if len(stops) > MAX_BIASES:
            raise Error(f"min_tokens can hold back at most {MAX_BIASES:,} stop tokens, found {len(stops):,}")
        self._reserve_biases(len(bias) + len(stops))
        self.bias_ids[slot, : len(bias) + len(stops)] = [*bias, *stops]
        self.bias_values[slot, : len(bias)] = list(bias.values())
        has_counts = params.presence_penalty != 0 or params.frequency_penalty != 0
        if has_counts:
            self._count_output(slot, output)
        settings, info = self.settings[slot], self.info[slot]
        settings[TEMPERATURE] = params.temperature if params.temperature >= MIN_TEMPERATURE else 0.0
        settings[TOP_K], settings[TOP_P], settings[MIN_P] = (
            min(params.top_k, self.vocab_size),
            params.top_p,
            params.min_p,
        )
        settings[REPETITION_PENALTY] = params.repetition_penalty
        settings[PRESENCE_PENALTY], settings[FREQUENCY_PENALTY] = params.presence_penalty, params.frequency_penalty
        info[N_CANDIDATES], info[N_LOGPROBS] = self.n_candidates, -1 if params.logprobs is None else params.logprobs
        info[N_BIAS], info[N_STOP], info[MIN_TOKENS] = len(bias), len(stops), min(params.min_tokens, 2**31 - 1)
        info[HAS_COUNTS], info[HAS_MASK] = has_counts, False
        window = [*prompt[-REPEAT_WINDOW:], *output[-REPEAT_WINDOW:]][-REPEAT_WINDOW:]
        window = [token for token in window if 0 <= token < self.n_candidates]  # others are never chosen
        self.recent[slot, : len(window)] = window
        self.counts[slot], self.generated[slot] = len(window), len(output)
        seed = int.from_bytes(os.urandom(8), "little") if params.seed in (None, -1) else params.seed
        assert seed is not None
        draws = len(output) if settings[TEMPERATURE] > 0 else 0
        self.state[slot] = seed + draws * GOLDEN & (1 << 64) - 1
        self.last_token[slot] = output[-1] if output else prompt[-1] if prompt else 0
        self.assigned[slot] += 1
        self.changes += 1

    def release(self, slot: int) -> None:
        """End the generation of a slot. Until the next one the slot is greedy."""
        self.settings[slot] = 0
        self.settings[slot, [TOP_P, REPETITION_PENALTY]] = 1
        self.info[slot] = 0
        self.info[slot, [N_CANDIDATES, N_LOGPROBS]] = self.n_candidates, -1
        self.assigned[slot] += 1
        self.changes += 1

    def set_mask(self, slot: int, mask: NDArray[np.uint32] | None) -> None:
        """Allow only the tokens whose bits are set in `mask` uint32 [ceil(vocab_size / 32)], or all again for None."""
        if mask is not None:
            if not len(self.mask):
                self.mask = np.zeros((self.slots, self.mask.shape[1]), np.uint32)
                self._write_header()
            if mask.shape != self.mask.shape[1:] or mask.dtype != np.uint32:
                words = self.mask.shape[1]
                raise Error(f"a mask must be uint32 [{words:,}], found {mask.dtype} {list(mask.shape)}")
            self.mask[slot] = mask
        self.info[slot, HAS_MASK] = mask is not None
        self.masked[slot] += 1
        self.changes += 1

    def accept(self, slot: int, token: int) -> None:
        """Add a token that a GPU has sampled, as `cpu.sampling.sample_rows` adds those that it samples."""
        self.recent[slot, self.counts[slot] % REPEAT_WINDOW] = token
        self.counts[slot] += 1
        self.generated[slot] += 1
        if self.info[slot, HAS_COUNTS]:
            self.output_counts[slot, token] += 1
        if self.settings[slot, TEMPERATURE] > 0:
            self.state[slot] = int(self.state[slot]) + GOLDEN & (1 << 64) - 1
        self.last_token[slot] = token

    def is_argmax(self, slot: int) -> bool:
        """Whether the slot's token is the largest of all logits, and nothing else is wanted."""
        return bool(
            self.settings[slot, TEMPERATURE] == 0
            and not self.changes_logits(slot)
            and self.info[slot, N_LOGPROBS] < 0
            and self.info[slot, N_CANDIDATES] == self.vocab_size
        )

    def changes_logits(self, slot: int) -> bool:
        """Whether the slot's settings change logits before a token is chosen. (`min_tokens` do to the end.)"""
        info = self.info[slot]
        changed = info[N_BIAS] or info[N_STOP] or info[HAS_COUNTS] or info[HAS_MASK]
        return bool(changed or self.settings[slot, REPETITION_PENALTY] != 1)

    def top_logprobs(self, slots: Sequence[int] | NDArray[np.int32]) -> int:
        """Largest number of likeliest tokens that one of these slots wants; -1 if none wants log probabilities."""
        return int(self.info[slots, N_LOGPROBS].max(initial=-1))

    def _reserve_biases(self, count: int) -> None:
        if count > self.bias_ids.shape[1]:
            more = ((0, 0), (0, max(count, 2 * self.bias_ids.shape[1]) - self.bias_ids.shape[1]))
            self.bias_ids, self.bias_values = np.pad(self.bias_ids, more), np.pad(self.bias_values, more)
            self._write_header()

    def _count_output(self, slot: int, output: Sequence[int]) -> None:
        if not len(self.output_counts):
            self.output_counts = np.zeros((self.slots, self.vocab_size), np.int32)
            self._write_header()
        self.output_counts[slot] = np.bincount(np.array(output, np.int64), minlength=self.vocab_size)
