"""Page tables for tests: pages in any order, none shared."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from numballama.graph import KVLayout


class HasPages(Protocol):
    def set_pages(self, slot: int, first: int, pages: list[int]) -> None: ...


def shuffled_table(slots: int, pages_per_sequence: int, seed: int = 0) -> np.ndarray:
    """A page table i32 [slots + 1, pages_per_sequence]: every page but 0 once, in random order; zeros at the end."""
    pages = 1 + np.random.default_rng(seed).permutation(slots * pages_per_sequence).astype(np.int32)
    return np.vstack([pages.reshape(slots, pages_per_sequence), np.zeros((1, pages_per_sequence), np.int32)])


def give_pages(backend: HasPages, kv: KVLayout, seed: int = 0) -> np.ndarray:
    """Give every slot all the pages it can use, in random order; returns the page table."""
    table = shuffled_table(kv.slots, kv.pages_per_sequence, seed)
    for slot in range(kv.slots):
        backend.set_pages(slot, 0, table[slot].tolist())
    return table
