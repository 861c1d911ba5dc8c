"""GEMV on a GPU in six kernels: page 15 of the course."""
