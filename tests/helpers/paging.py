"""Page tables for tests, pages in any order, none shared; and the content of caches of every type."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from numballama.graph import KVLayout
from numballama.ir import nbytes_of
from numballama.quantization.activations import quantize_activations
from numballama.quantization.convert import to_bf16, to_f16
from numballama.quantization.kv import split_q8_0
from numballama.quantization.types import KV_BLOCK


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


def in_cache(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """The memory of a cache that holds these numbers, float32 [pages, kv_heads, page, head_dim]."""
    if dtype != "q8_0":
        return {"f32": lambda a: a, "f16": to_f16, "bf16": to_bf16}[dtype](numbers)
    memory = np.zeros(nbytes_of(numbers.shape, dtype), np.uint8)
    quants, scales = split_q8_0(memory, numbers.shape)
    rows = numbers.reshape(-1, numbers.shape[-1])
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % KV_BLOCK)))
    made, factors, _ = quantize_activations("q8_0", rows)
    quants[...] = made[:, : numbers.shape[-1]].reshape(numbers.shape)
    scales[...] = to_f16(factors).reshape(scales.shape)
    return memory
