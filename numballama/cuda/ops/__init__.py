"""The operators on an NVIDIA GPU, host side: which kernels an operator launches, with which grid and arguments.

A launch function gets a `LaunchContext`, then the operator's operands as `Array` (memory with a shape and a type) or
`Matrix` (a weight), its attributes and scratch by name, and returns a list of `Launch`. It enters the registry by
`@kernel`. The kernels are in `kernels_cuda` (plain operators) and `cuda/kernels`; they are only named here
(`KernelRef`) and imported, and Numba with them, when one must be compiled.

Shapes: T tokens at most, D the model's width, K and N a weight's columns and rows, S sequences, C the KV
cache's length.
"""

from . import attention, collectives, elementwise, linear

__all__ = ["attention", "collectives", "elementwise", "linear"]
