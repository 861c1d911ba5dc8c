"""`@cuda.jit` kernels, the device side."""
