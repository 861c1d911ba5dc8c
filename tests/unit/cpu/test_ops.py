"""The table of the CPU's kernels: names that exist, signatures that fit, and no Numba to read it."""

from __future__ import annotations

import subprocess
import sys

from numballama import kernels_cpu, registry
from numballama.cpu import kernels_int8, ops
from numballama.registry import Kernel, KernelRef

HERE = (kernels_cpu.__name__, kernels_int8.__name__)


def own_kernels() -> list[Kernel]:
    found = [kernel for (_, backend), entries in registry._kernels.items() if backend == "cpu" for kernel in entries]
    return [kernel for kernel in found if isinstance(kernel.target, KernelRef) and kernel.target.module in HERE]


def test_every_name_is_a_function_whose_signature_fits_the_rule() -> None:
    kernels = own_kernels()
    assert len(kernels) >= 35
    for kernel in kernels:
        assert kernel.function.__name__ == kernel.name  # raises where the signature does not fit


def test_every_kernel_of_the_two_files_is_registered() -> None:
    registered = {kernel.function for kernel in own_kernels()}
    for module in (kernels_cpu, kernels_int8):
        for name, value in vars(module).items():
            if getattr(value, "__module__", "") == module.__name__ and type(value).__name__ == "function":
                assert value in registered, f"{module.__name__}.{name} has three leading parameters but no entry"


def test_the_table_is_read_without_numba() -> None:
    code = "import sys\nimport numballama.cpu.ops\nfrom numballama import registry\n"
    code += "assert registry.find('linear', 'cpu', ['f32', 'q8_0']).name == 'linear'\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "numballama.cpu.ops" in done.stdout.split()
    assert not {"numba", "llvmlite", "numballama.kernels_cpu"} & set(done.stdout.split())


def test_shapes_of_scratch_arrays() -> None:
    x, weight = (64, 256), (100, 256)
    # a panel of 1,024 columns, and elements of 256 not yet transposed
    assert ops.dequantized_rows(weight=1)(x, weight, workers=3) == (3, 16 * 1024 + 16 * 256)
    assert ops.product(0, weight=1)(x, weight, workers=3) == (64, 100)
    assert ops.each_worker_x(x, weight, workers=3) == (3, 64, 256)
    assert ops.each_worker_scores(x, (9, 4, 32, 8), (64,), (64,), (2, 5), workers=3) == (3, 8, 5 * 32 + 7)
    assert ops.each_worker_scores(x, (9, 16, 32, 8), (64,), (64,), (2, 5), workers=3) == (3, 2, 5 * 32 + 7)
    assert ops.each_worker_scores(x, (9, 2, 32, 8), (64,), (64,), (2, 5), workers=3) == (3, 8, 5 * 32 + 7)
    # panel and factors, products, offsets in whole cache lines
    for groups, offsets in ((8, 512), (7, 448), (1, 64)):
        inputs = x, (64, 8), (64, groups), weight
        assert ops.panels(*inputs, workers=3) == (3, 16 * 1024 // 4 + 2 * 1024 + 8 * 16 + offsets)
    assert ops.panels((3, 32), (3, 1), (3, 1), weight, workers=1) == (1, 16 * 1024 // 4 + 2 * 1024 + 8 * 16 + 16)


def test_a_users_kernel_replaces_ours_whichever_came_first() -> None:
    code = "from numballama import registry\n@registry.kernel('add', 'cpu', 'f32', 'f32')\n"
    code += "def mine(worker, n_workers, tokens, a, b, out): ...\n"
    code += "print(registry.find('add', 'cpu', ['f32', 'f32']).name)\n"
    ours = "import numballama.cpu.ops\n"
    for program in (ours + code, code.replace("print(", f"{ours}print(")):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.split() == ["mine"]
