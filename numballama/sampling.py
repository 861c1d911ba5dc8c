"""How tokens are drawn: a generation's settings, and the buffers that they are drawn with.

They apply in llama.cpp's order: repeat penalty, then top-k, top-p and min-p on the probabilities as the model gives
them, then temperature on what is left. `sampling` does it on the CPU, `kernels_cuda.sampling_kernels` on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np

from .errors import Error
from .validation import real_number, whole_number

REPEAT_WINDOW = 64
"""How many of the latest tokens the repeat penalty looks at (llama.cpp's repeat_last_n)."""
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION_PENALTY = range(5)
"""Indices into `Sampler.settings`."""
SETTINGS = 5
"""Numbers in `Sampler.settings`."""
COLDEST = 1e-5
"""A temperature below this is taken as 0: logits divided by it would overflow."""


class Sampler:
    """The settings of one generation with the buffers that its sampling needs, made once.

    `vocab_size` is how many tokens may be drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and
    `repeat_penalty` 1 switch those off. The same `seed` gives the same tokens on one machine; None draws one. Raises
    `Error` for a setting out of its range.
    """

    def __init__(
        self,
        vocab_size: int,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
    ) -> None:
        heat = real_number("temperature", temperature, 0, 1e6, "a number from 0 (greedy) up")
        settings = (
            heat if heat >= COLDEST else 0.0,
            min(whole_number("top_k", top_k, 0), vocab_size),
            real_number("top_p", top_p, 1e-9, 1, "above 0 and at most 1 (off)"),
            real_number("min_p", min_p, 0, 1, "between 0 (off) and 1"),
            real_number("repeat_penalty", repeat_penalty, 0.01, 100, "between 0.01 and 100 (1 is off)"),
        )
        self.settings = np.array(settings, np.float64)
        self.ids = np.zeros(vocab_size, np.int32)
        self.recent = np.zeros(REPEAT_WINDOW, np.int32)
        self.counts = np.zeros(1, np.int64)
        number = int.from_bytes(os.urandom(8), "little") if seed is None else whole_number("seed", seed) & (1 << 64) - 1
        self.state = np.array([number], np.uint64)
        self.addresses = (*(array.ctypes.data for array in self.operands), len(self.ids))
        """What `cpu.walk_and_sample` takes: the operands' addresses, and how many tokens may be drawn."""

    def remember(self, tokens: Iterable[int]) -> None:
        """Let the repeat penalty see these tokens: a prompt."""
        for token in tokens:
            if not 0 <= token < len(self.ids):
                continue  # it is never drawn, so there is nothing to penalise
            self.recent[self.counts[0] % REPEAT_WINDOW] = token
            self.counts[0] += 1

    @property
    def is_argmax(self) -> bool:
        """Whether these settings come down to the largest logit as it is."""
        return bool(self.settings[0] == 0 and self.settings[4] == 1)

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """What `sampling.sample` takes after the logits."""
        return self.settings, self.recent, self.counts, self.state, self.ids

    def __call__(self, logits: np.ndarray) -> int:
        """The next token, or -1 if `logits` [vocab] hold a NaN. They are changed."""
        if len(logits) < len(self.ids):
            raise Error(f"this sampler draws from {len(self.ids):,} tokens, there are {len(logits):,} logits")
        from .cpu.sampling import sample  # not before: a GPU samples by itself, and Numba takes its time

        return int(sample(logits, *self.operands))
