"""Every operator on an NVIDIA GPU; the front door to the files of this package, which register themselves on import.

Each file holds `@cuda.jit` kernels and, under `@kernel`, a function for each operator that says how they are launched:
it gets the operator's operands as `Array` and `Matrix`, its attributes and scratch by name, and returns launches.
Shapes: T tokens at most, D the model's width, K and N a weight's columns and rows, S sequences, C the cache's length.
"""

from . import attention, basic, chain, gemm, gemv, prefill_attention, sampling

__all__ = ["attention", "basic", "chain", "gemm", "gemv", "prefill_attention", "sampling"]
