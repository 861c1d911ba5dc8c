"""A CPU dot product in six kernels: page 12 of the course."""
