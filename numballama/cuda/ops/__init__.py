"""Every operator on an NVIDIA GPU; the front door to the files of this package, which register themselves on import.

Files come in pairs. One has, under `@kernel`, a function for each operator that says how its kernels are launched: it
gets the operator's operands as `Array` and `Matrix`, its attributes and scratch by name, and returns launches. The
other, `…_kernels`, has the `@cuda.jit` kernels; it is imported, and Numba with it, when one of them must be compiled.
`pieces`, `blocks` and `products` are what kernels are made of; `bandwidth`, a yardstick, is both files in one.
Shapes: T tokens at most, D the model's width, K and N a weight's columns and rows, S sequences, C the cache's length.
"""

from . import attention, elementwise, gemm, gemv, prefill_attention, sampling

__all__ = ["attention", "elementwise", "gemm", "gemv", "prefill_attention", "sampling"]
