"""PTX of kernels, kept in the package's cache beside their machine code: several tests look at the same kernels."""

from __future__ import annotations

import hashlib
from unittest import mock

from numballama.cuda import compiler
from numballama.cuda.compiler import Cubin
from numballama.cuda.launch import Specialization
from numballama.files import atomic_write
from numballama.kernel_cache import cuda_cache_directory


def compiled(kernel: Specialization, capability: tuple[int, int]) -> tuple[Cubin, str]:
    """(machine code, PTX) of a kernel. Each is compiled if the cache does not have it."""
    cache = cuda_cache_directory()
    assert cache is not None, "the tests have a cache"
    text = f"{kernel.source} {kernel.parameters} {kernel.threads} {capability}"
    path = cache / f"{kernel.name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.ptx"
    if path.is_file():
        ptx = path.read_text()
    else:
        ptx = compiler.to_ptx(kernel, capability)
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(ptx.encode())
    with mock.patch.object(compiler, "to_ptx", return_value=ptx):  # not once more
        return compiler.compile_kernel(kernel, capability, cache), ptx
