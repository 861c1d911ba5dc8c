"""`EngineStats`: what an engine is doing, and `Rates`, which measures its speed."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

WINDOW = 10
"""Seconds that tokens per second are counted over."""


@dataclass(frozen=True)
class EngineStats:
    """The state of an engine at one moment, and what it has done so far."""

    running: int
    """Sequences that have a slot."""
    waiting: int
    """Sequences that wait for a slot or for pages."""
    pages_used: int
    pages_cached: int
    """Pages that no sequence uses, kept for prompts that begin with the same tokens."""
    pages_free: int
    prefix_queries: int
    """Prompt tokens that were looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens that were found there."""
    preemptions: int
    """How often a sequence gave its pages to others and computed them again later."""
    requests: int
    """Requests submitted."""
    steps: int
    """Runs collected."""
    prompt_tokens: int
    """Tokens of prompts that were computed, also when a sequence was computed again."""
    generated_tokens: int
    """Tokens handed to requests, those that a grammar forces too."""
    prompt_tokens_per_second: float
    """Over the last 10 seconds."""
    generated_tokens_per_second: float
    """Over the last 10 seconds."""
    stalled_s: float
    """Seconds since the last step ended; 0 when there is nothing to do."""
    failure: BaseException | None = None
    """Why the engine refuses all requests: its device has failed."""


class Rates:
    """Tokens per second over the last `WINDOW` seconds, from one sample a second."""

    def __init__(self) -> None:
        self._samples = deque([(time.monotonic(), 0, 0)], maxlen=WINDOW + 1)
        """(time, prompt tokens, generated tokens), the oldest first."""
        self.next_sample = 0.0
        """When `sample` is due: `time.monotonic()`."""

    def sample(self, now: float, prompt: int, generated: int) -> None:
        """Note the tokens counted so far."""
        self._samples.append((now, prompt, generated))
        self.next_sample = now + 1

    def per_second(self, prompt: int, generated: int) -> tuple[float, float]:
        """Prompt tokens and generated tokens per second, given the tokens counted so far."""
        now = time.monotonic()
        samples = tuple(self._samples)
        since = next((each for each in samples if now - each[0] <= WINDOW + 1), samples[-1])
        seconds = max(now - since[0], 1e-3)
        return (prompt - since[1]) / seconds, (generated - since[2]) / seconds
