"""Everything that touches NVIDIA's packages: instructions for kernels, the driver for the host, and their common words."""
