"""The Python cost of an engine's step: on a runner that does nothing. Prints µs a step, the best of 50 times 20 steps.

python benchmarks/engine.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from numballama.engine.engine import Engine
from numballama.engine.request import TokenEvent
from numballama.engine.runner import Batch
from numballama.generate import GenerationResponse
from numballama.sampling import SamplingParams

NONE = np.zeros((0, 0), np.float32)


@dataclass
class Tokens:
    tokens: NDArray[np.int32]
    logprobs = top_ids = top_logprobs = NONE


class NoRunner:
    """Every token is 5."""

    max_sequences, max_tokens, page, pages, pages_per_sequence, vocab_size = 256, 512, 32, 20_000, 64, 32_000

    def __init__(self, lookahead: int) -> None:
        self.lookahead, self.runs = lookahead, 0
        self.rows: dict[int, int] = {}

    def start(
        self, slot: int, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], stop: object
    ) -> None:
        pass

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        pass

    def set_mask(self, slot: int, mask: object) -> None:
        pass

    def reset(self) -> None:
        pass

    def submit(self, batch: Batch) -> int:
        self.runs += 1
        self.rows[self.runs] = len(batch.logits)
        return self.runs

    def collect(self, ticket: int) -> Tokens:
        return Tokens(np.full(self.rows.pop(ticket), 5, np.int32))


def respond(event: TokenEvent) -> GenerationResponse:
    return GenerationResponse("text", event.token, event.finish_reason, prompt_tokens=event.prompt_tokens)


def measure(sequences: int, lookahead: int) -> float:
    """µs of CPU time a step, with a `GenerationResponse` for each token."""
    engine = Engine(NoRunner(lookahead))
    prompts = np.random.default_rng(1).integers(0, 30_000, (sequences, 100)).tolist()
    params = SamplingParams(max_tokens=1800, temperature=0)
    requests = [engine.submit(prompt, params, process=respond) for prompt in prompts]
    reader = iter(requests[0])
    for _ in range(200):
        next(reader)
    best = float("inf")
    for _ in range(50):
        started = time.thread_time()
        for _ in range(20):
            next(reader)
        best = min(best, time.thread_time() - started)
    return best / 20 * 1e6


if __name__ == "__main__":
    for lookahead in (0, 1):
        for sequences in (1, 8, 64, 256):
            print(f"lookahead {lookahead}, {sequences:3} sequences: {measure(sequences, lookahead):6.1f} µs a step")
