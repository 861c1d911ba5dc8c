"""Attention for many tokens: how the kernels of `prefill_attention_kernels` are launched, and for which operands."""

from __future__ import annotations

import functools

from ... import registry
from ..launch import Array, Gpu, KernelFile, Launch
from . import attention
from .gemm import FEW

kernels = KernelFile("numballama.cuda.kernels.prefill_attention")

TILE, THREADS = 64, 128


def _takes(gpu: Gpu, q: Array, k_cache: Array, v_cache: Array, window: int) -> bool:
    """Whether these operands are for `prefill_attention_kernels`.

    Before sm_80, whose cards have at least 100 KB of shared memory, tensor cores and copies take more registers than a
    long head leaves.
    """
    head_dim = k_cache.shape[3]
    same = k_cache.dtype == v_cache.dtype != "f32"
    room = head_dim <= (128 if gpu.shared_limit > 64 << 10 else 64)
    everything = not 0 < window < k_cache.shape[2]  # a sliding window is for the kernel of single tokens
    return q.shape[0] > FEW and same and room and head_dim % 8 == 0 and everything


@functools.wraps(attention.fused_attention)
def fused_attention(
    gpu: Gpu, q: Array, k_cache: Array, positions: Array, sequences: Array, v_cache: Array, out: Array, window: int,
    *scratch: Array,
) -> list[Launch]:  # fmt: skip
    if not _takes(gpu, q, k_cache, v_cache, window):
        return attention.fused_attention(gpu, q, k_cache, positions, sequences, v_cache, out, window, *scratch)
    _, kv_heads, context, head_dim = k_cache.shape
    heads = q.shape[1] // head_dim
    function, width = (kernels.attention_64_kernel, 64) if head_dim <= 64 else (kernels.attention_128_kernel, 128)
    arguments = (
        gpu.tokens, q, k_cache, v_cache, positions, sequences, out, kv_heads, heads // kv_heads, context, head_dim,
    )  # fmt: skip
    return [Launch(function, (-(-q.shape[0] // TILE), heads), THREADS, arguments, 2 * 2 * TILE * 2 * width)]


for _cache in ("f16", "bf16"):
    _types = ("f32", _cache, "i32", "i32", _cache)
    registry.kernel("attention", "cuda", *_types, **registry.find("attention", "cuda", _types).scratch)(fused_attention)
