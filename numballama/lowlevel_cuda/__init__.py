"""Everything that touches NVIDIA's packages: instructions for kernels, the driver for the host, their common words."""
