"""The course: pages in this folder, their kernels in folders below, and what runs, draws and checks them."""
