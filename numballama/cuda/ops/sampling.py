"""Sampling on the device: how the kernels of `sampling_kernels` are launched."""

from __future__ import annotations

from ..launch import Array, Gpu, KernelFile, Launch

kernels = KernelFile("numballama.cuda.kernels.sampling")

THREADS = 1024


def sample(
    gpu: Gpu, logits: Array, n: int, settings: Array, recent: Array, counts: Array, state: Array, next_token: Array
) -> list[Launch]:
    return [Launch(kernels.sample_kernel, (1,), THREADS, (logits, n, settings, recent, counts, state, next_token))]


def advance(
    gpu: Gpu, next_token: Array, ids: Array, positions: Array, step: Array, mailbox: int, slots: int
) -> list[Launch]:
    return [Launch(kernels.advance_kernel, (1,), 32, (next_token, ids, positions, step, mailbox, slots))]
