"""Samplers for tests, made in one call."""

from __future__ import annotations

from typing import Any

from numballama.sampling import SamplerState, SamplingParams


def make_sampler(vocab_size: int, temperature: float = 0.8, top_k: int = 40, **settings: Any) -> SamplerState:
    """A `SamplerState` with these fields of `SamplingParams`."""
    return SamplerState(SamplingParams(temperature=temperature, top_k=top_k, **settings), vocab_size)
