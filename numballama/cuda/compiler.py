"""Compiles a kernel to machine code: Python → PTX (Numba) → cubin (nvJitLink) → the cache. No step needs a GPU."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .. import kernel_cache
from ..errors import NEXT_STEP, DeviceError, Error
from ..host import call_types, environment, garbage, interrupts
from ..registry import KernelRef
from .launch import Specialization

try:
    from cuda.bindings import nvjitlink
except ImportError as error:  # pragma: no cover - the message is tested without the packages
    raise DeviceError(
        f"NVIDIA's Python packages are missing ({error}): pip install 'numballama[cuda]'; {NEXT_STEP}"
    ) from error


@dataclass(frozen=True)
class Cubin:
    """A kernel's machine code for one compute capability, and what the assembler reports about it."""

    machine: bytes
    entry: str
    """The kernel's name in the machine code."""
    registers: int
    """Registers per thread."""
    stack_bytes: int
    local_bytes: int
    """Bytes of local memory per thread, where registers are spilled."""
    cached: bool = False
    """Whether it came from the cache."""


@dataclass(frozen=True)
class _Facts:
    entry: str
    registers: int
    stack_bytes: int
    local_bytes: int


# Python to PTX


def signature(types_: Sequence[str]) -> tuple[Any, ...]:
    """Numba's types for the types of parameters: "f16*" is a pointer, "i64" and "f32" are scalars."""
    from numba.cuda import types

    from .quant_traits import ELEMENT_TYPES

    return tuple(
        types.CPointer(ELEMENT_TYPES[type_[:-1]]) if type_.endswith("*") else ELEMENT_TYPES[type_] for type_ in types_
    )


def check_parameters(kernel: Specialization) -> None:
    """Raise `Error` unless a launch names the kernel's parameters, all of them and in order."""
    expected = list(inspect.signature(kernel.function.py_func).parameters)
    found = [name for name, _ in kernel.parameters]
    if found == expected:
        return
    module, name = kernel.source
    raise Error(
        f"kernel {module}.{name}: its parameters are ({', '.join(expected)}), but a launch passes "
        f"({', '.join(found)}); make the launch's arguments agree with the kernel's parameters in name and order"
    )


@contextlib.contextmanager
def _compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """Make Numba compile device functions for this capability.

    Numba would otherwise ask the current GPU. It keeps the functions it has compiled, so a process can compile for one
    capability only. Raises `Error` for a second one.
    """
    from numba.cuda import dispatcher

    global _capability
    if _capability not in (None, capability):
        raise Error(f"this process compiles kernels for {_capability}; for {capability} start another")
    _capability = capability
    with _compiling:
        before = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
        try:
            yield
        finally:
            dispatcher.get_current_device = before


_compiling = threading.RLock()

_capability: tuple[int, int] | None = None


def require_compiler() -> None:
    """Raise `DeviceError` unless Numba can be imported and its CUDA compiler is numba-cuda's."""
    environment.import_numba()
    try:
        from numba import cuda
    except ImportError as error:
        raise DeviceError(
            f"numba.cuda cannot be imported ({error}): pip install 'numballama[cuda]'; {NEXT_STEP}"
        ) from error
    if getattr(cuda, "implementation", "") != "NVIDIA":
        raise DeviceError(f"numba.cuda is not numba-cuda's: pip install 'numballama[cuda]'; {NEXT_STEP}")


def to_ptx(kernel: Specialization, capability: tuple[int, int]) -> str:
    """PTX of a kernel. Raises `Error` where a launch's arguments do not have the names of the kernel's parameters."""
    require_compiler()
    from numba import cuda

    check_parameters(kernel)
    function = kernel.function.py_func
    with _compiling_for(capability), call_types.remembered(), garbage.seldom_collected():
        bounds = (kernel.threads, getattr(function, "min_blocks_per_sm", 1))
        options = {"debug": False, "opt": True}  # whatever the environment sets: the cache's key does not tell
        ptx, _ = cuda.compile_ptx(function, signature(kernel.types), cc=capability, launch_bounds=bounds, **options)
    if registers := getattr(function, "max_registers", 0):  # PTX takes one of the two limits
        ptx = re.sub(r"^\.minnctapersm .*$", f".maxnreg {registers}", ptx, flags=re.MULTILINE)
    if "wgmma." in ptx:  # an instruction of this architecture alone
        ptx = re.sub(r"^\.target sm_90\b", ".target sm_90a", ptx, flags=re.MULTILINE)
    return str(ptx)


# PTX to machine code


def assemble(ptx: str, capability: tuple[int, int]) -> Cubin:
    """Machine code from PTX, by nvJitLink. Raises `DeviceError` with its log when it refuses the PTX."""
    alone = "a" if re.search(r"^\.target sm_\d+a\b", ptx, re.MULTILINE) else ""
    options = [f"-arch=sm_{capability[0]}{capability[1]}{alone}", "-verbose"]
    handle = nvjitlink.create(len(options), options)
    try:
        source = ptx.encode() + b"\0"
        try:
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, source, len(source), "kernel")
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            raise DeviceError(f"nvJitLink refuses a kernel: {log.decode(errors='replace').strip()}") from error
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
        machine = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, machine)
    finally:
        nvjitlink.destroy(handle)
    (entry,) = re.findall(r"\.entry\s+([\w$]+)", ptx)
    text = log.decode(errors="replace")
    if serialised := re.search(r"\(C75\d+\)[^\n]*", text):
        raise DeviceError(f"nvJitLink lets wgmma run one at a time in kernel {entry}: {serialised[0]}")
    registers, stack, local = (
        int(found[-1]) if (found := re.findall(pattern, text)) else -1
        for pattern in (r"used (\d+) registers", r"(\d+) stack\b", r"(\d+) bytes lmem")
    )
    return Cubin(bytes(machine), entry, registers, stack, local)


def compile_kernel(kernel: Specialization, capability: tuple[int, int], cache: Path | None) -> Cubin:
    """A kernel's machine code, from the cache if it is there. Ctrl-C raises KeyboardInterrupt after the kernel.

    `cache` is `kernel_cache.cuda_cache_directory`, a folder for exactly these sources, so its entries are never stale.
    Without a cache, and for a kernel that is not part of this package, the kernel is compiled.
    """
    entry = _entry(kernel, capability, cache)
    if entry is not None and (content := kernel_cache.load(*entry)) is not None:
        head, _, machine = content.partition(b"\n")
        try:
            return Cubin(machine, **asdict(_Facts(**json.loads(head))), cached=True)
        except (ValueError, TypeError):
            kernel_cache.discard(entry[0])
    with interrupts.deferred():
        code = assemble(to_ptx(kernel, capability), capability)
    entry = _entry(kernel, capability, cache)  # the kernel's file has been imported now
    if entry is not None and kernel_cache.is_current(entry[0].parent):
        facts = asdict(_Facts(code.entry, code.registers, code.stack_bytes, code.local_bytes))
        kernel_cache.store(*entry, json.dumps(facts).encode() + b"\n" + code.machine)
    return code


def cache_entry(kernel: Specialization, capability: tuple[int, int], cache: Path | None) -> Path | None:
    """The file for a kernel's machine code; None for a kernel that is not cached.

    The cache's folder is named after this package's own sources, so only kernels of these files are kept.
    """
    entry = _entry(kernel, capability, cache)
    return None if entry is None else entry[0]


def _entry(kernel: Specialization, capability: tuple[int, int], cache: Path | None) -> tuple[Path, str] | None:
    """File and key of a kernel, as `kernel_cache` takes them."""
    # a kernel that was loaded may have been replaced by another one since
    loaded = kernel.kernel.loaded() if isinstance(kernel.kernel, KernelRef) else kernel.kernel
    if loaded is None:
        module, name = kernel.source
        source = _PACKAGE.parent / (module.replace(".", "/") + ".py")
    else:
        function: Any = loaded.py_func
        module, name, source = function.__module__, function.__qualname__, Path(function.__code__.co_filename)
    if cache is None or not (source.is_relative_to(_PACKAGE) and source.is_file()):
        return None
    parameters = ", ".join(f"{parameter}: {type_}" for parameter, type_ in kernel.parameters)
    key = f"{module}.{name}({parameters}) {kernel.threads} sm_{capability[0]}{capability[1]}"
    return cache / f"{name.rpartition('.')[2]}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin", key


_PACKAGE = Path(__file__).parent.parent
