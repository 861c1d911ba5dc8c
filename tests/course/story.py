"""The story model's parts, for solutions: opened once."""

from __future__ import annotations

from functools import lru_cache

from numballama import loader
from numballama.checkpoint import Checkpoint
from numballama.graph import KVLayout, build
from numballama.ir import Graph

CONTEXT = 64


@lru_cache
def checkpoint() -> Checkpoint:
    return loader.open_checkpoint(None)


def layout() -> KVLayout:
    return KVLayout.of(checkpoint().config, CONTEXT)


def graph(tokens: int = 1) -> Graph:
    types = {name: weight.type for name, weight in checkpoint().weights.items()}
    return build(checkpoint().config, types, layout(), tokens)
