"""Attention of one token on a GPU in six kernels: page 16 of the course."""
