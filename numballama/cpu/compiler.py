"""How this package compiles with Numba: options, cache, and the C function through which a kernel is called.

Everything that depends on Numba's private API is here: `KernelCache` replaces Numba's cache, `compile_step` the C
wrapper that Numba makes for a `cfunc`, and `device` leaves out what Numba makes for a function that Python calls.
The calling convention is explained in `executor`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import sigutils
from numba.core.caching import CompileResultCacheImpl, _Cache
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, CompileResult, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.lowering import Lower
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps
from numba.core.typed_passes import NativeLowering
from numba.np.arrayobj import make_array, populate_array

from .. import kernel_cache
from ..host import call_types, garbage, interrupts
from .fork import ForkSafeLock

FAST_MATH = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and multiply-adds fused. Divisions stay exact, because quantised values depend on them. NaN and
infinity keep their meaning, because attention is masked with -inf.
"""

_SETTINGS = ("OPT", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_AVX", "DEBUGINFO_DEFAULT")
"""Settings of Numba, from the environment, that change machine code."""
_PACKAGE = Path(__file__).parent.parent


class KernelCache(_Cache):  # type: ignore[misc]
    """Compiled code of one function, in `kernel_cache`. `options` tells apart what is compiled in different ways.

    Why not Numba's own cache: its index maps signatures to numbered files, and is read, changed and written without a
    lock. Two processes can store a kernel under the number of another one. It raises on damaged files.
    """

    def __init__(self, function: Callable[..., Any], options: str) -> None:
        self._function, self._options = function, options
        self._enabled = True

    @property
    def cache_path(self) -> str | None:
        folder = kernel_cache.cache_directory()
        return None if folder is None else str(folder)

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Numba calls this before it compiles all signatures again; the new entries replace the old ones."""

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        entry = self._entry(sig, target_context.codegen())
        if entry is None or (content := kernel_cache.load(*entry)) is None:
            return None
        try:
            found = CompileResult._rebuild(target_context, *pickle.loads(content))
            if tuple(found.signature.args) == tuple(sigutils.normalize_signature(sig)[0]):
                return found
        except Exception:  # whatever Numba makes of an entry that it cannot use
            kernel_cache.discard(entry[0])
        return None

    def save_overload(self, sig: Any, data: CompileResult) -> None:
        entry = self._entry(sig, data.codegen)
        if entry is None or data.lifted or data.library.has_dynamic_globals:
            return
        if kernel_cache.is_current(entry[0].parent):
            kernel_cache.store(*entry, dumps(CompileResultCacheImpl.reduce(None, data)))

    def _entry(self, sig: Any, codegen: Any) -> tuple[Path, str] | None:
        """File and key of a signature; None if it is not cached. A key has all that the machine code depends on.

        So has the file's name, except for a function's code: a kernel that is edited replaces its old entry, and what
        is compiled for other settings of Numba or another CPU stands beside it.
        """
        folder = kernel_cache.cache_directory()
        code = self._function.__code__
        identity = [*self._place, self._function.__qualname__, code.co_firstlineno, str(sig), codegen.magic_tuple()]
        settings = [getattr(numba.config, setting, None) for setting in _SETTINGS]
        name = json.dumps([*identity, self._options, settings], default=str)
        if folder is None or not self._enabled or " at 0x" in name:  # the address of an object in this process
            return None
        key = json.dumps([name, hashlib.sha256(code.co_code).hexdigest(), self._content])
        digest = hashlib.sha256(name.encode()).hexdigest()[:24]
        return folder / f"{self._function.__name__.strip('<>')}-{digest}.kernel", key

    @cached_property
    def _place(self) -> list[str]:
        """Where the function is: a file of this package, whose content is in the folder's name, or another file."""
        path = Path(self._function.__code__.co_filename)
        if path.is_relative_to(_PACKAGE):
            return ["numballama", path.relative_to(_PACKAGE).as_posix()]
        return ["", str(path)]

    @cached_property
    def _content(self) -> str:
        """Digest of what the folder's name does not tell: a file outside this package, and a closure's variables."""
        digest = hashlib.sha256()
        if not self._place[0]:
            digest.update(Path(self._place[1]).read_bytes())
        if self._function.__closure__ is not None:
            digest.update(dumps(tuple(cell.cell_contents for cell in self._function.__closure__)))
        return digest.hexdigest()


def _has_source_file(function: Callable[..., Any]) -> bool:
    """False for a function typed into a notebook or an interpreter."""
    path = Path(function.__code__.co_filename)
    return path.is_relative_to(_PACKAGE) or path.is_file()  # this package may be in an archive


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`numba.njit` with this package's options and cache. Works with and without parentheses."""
    if function is None:
        return lambda f: jit(f, **options)
    options = {"fastmath": FAST_MATH, "error_model": "numpy", "nogil": True, **options}
    dispatcher = numba.njit(**options)(function)
    if _has_source_file(function):
        dispatcher._cache = KernelCache(function, _text(options))
    return dispatcher


def _text(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={sorted(value) if isinstance(value, set) else value!r}" for name, value in sorted(options.items())
    )


def device(function: Callable[..., Any]) -> Any:
    """Decorate a helper that kernels call. It is compiled into each kernel and not cached by itself."""
    return _helper(function, FAST_MATH)


def exact_device(function: Callable[..., Any]) -> Any:
    """Like `device`, but arithmetic is done as written: no reordering, no fused multiply-add.

    `fastmath=False` must be explicit: without it, Numba compiles a function with the flags of its first caller.
    """
    return _helper(function, False)


def ordered_device(function: Callable[..., Any]) -> Any:
    """Like `exact_device`, but multiply-adds may be fused."""
    return _helper(function, {"contract"})


def _helper(function: Callable[..., Any], fastmath: Collection[str] | bool) -> Any:
    options = {"fastmath": fastmath, "error_model": "numpy", "nogil": True}
    callable_from_python = numba.njit(**options)(function)
    if callable_from_python is function:  # NUMBA_DISABLE_JIT
        return function
    return _Helper(callable_from_python)


class _Helper(CPUDispatcher):  # type: ignore[misc]
    """A function that is compiled as part of its callers. Machine code of its own is made only if Python calls it."""

    def __init__(self, callable_from_python: CPUDispatcher) -> None:
        options = {**callable_from_python.targetoptions, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        super().__init__(callable_from_python.py_func, {}, options, pipeline_class=_HelperCompiler)
        self._callable_from_python = callable_from_python

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._callable_from_python(*args, **kwargs)

    def add_overload(self, result: CompileResult) -> None:
        self.overloads[tuple(result.signature.args)] = result


class _HelperLibrary(JITCodeLibrary):  # type: ignore[misc]
    """LLVM code that others link and that is not assembled: a first start would spend a third of its time on it."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _HelperLowering(NativeLowering):  # type: ignore[misc]
    _name = "numballama_helper_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = library = _HelperLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        key = object()  # by which the callers find it, in place of a function for Python
        state["cr"] = state["cr"]._replace(cfunc=key)
        state.targetctx.insert_user_function(key, state["cr"].fndesc, [library])
        return True


class _HelperCompiler(CompilerBase):  # type: ignore[misc]
    """Numba's standard pipeline with a library that is only linked."""

    def define_pipelines(self) -> list[PassManager]:
        return [_pipeline(self.state, "numballama_helper", _HelperLowering)]


class _StepLower(Lower):  # type: ignore[misc]
    """Numba's lowering with another C wrapper: the function's operands are read from int64 slots."""

    def create_cfunc_wrapper(self) -> None:
        context, fndesc, int64 = self.context, self.fndesc, ir.IntType(64)
        module = context.create_module("step")
        callee_type = context.call_conv.get_function_type(fndesc.restype, fndesc.argtypes)
        callee = ir.Function(module, callee_type, fndesc.llvm_func_name)
        wrapper_type = ir.FunctionType(ir.IntType(32), [int64] * 4)
        wrapper = ir.Function(module, wrapper_type, fndesc.llvm_cfunc_wrapper_name)
        builder = ir.IRBuilder(wrapper.append_basic_block())
        address, *leading = wrapper.args  # worker, n_workers, tokens
        slots = builder.inttoptr(address, int64.as_pointer())
        used = 0

        def take() -> Any:
            nonlocal used
            used += 1
            return builder.load(builder.gep(slots, [ir.Constant(int64, used - 1)]))

        def operand(kind: Any) -> Any:
            if isinstance(kind, types.BaseTuple):
                return context.make_tuple(builder, kind, [operand(member) for member in kind])
            if isinstance(kind, types.Array):
                return self._array(builder, kind, take(), [take() for _ in range(kind.ndim)])
            return builder.bitcast(take(), ir.DoubleType()) if kind == types.float64 else take()

        arguments = [*leading, *(operand(kind) for kind in fndesc.argtypes[len(leading) :])]
        status, _ = context.call_conv.call_function(builder, callee, fndesc.restype, fndesc.argtypes, arguments)
        builder.ret(status.code)
        self.library.add_ir_module(module)

    def _array(self, builder: Any, kind: Any, address: Any, shape: list[Any]) -> Any:
        """Build a Numba array in C order that does not own its memory."""
        array = make_array(kind)(self.context, builder)
        item = ir.Constant(ir.IntType(64), self.context.get_abi_sizeof(self.context.get_data_type(kind.dtype)))
        strides = [item]
        for extent in reversed(shape[1:]):
            strides.insert(0, builder.mul(strides[0], extent))
        data = builder.inttoptr(address, array.data.type)
        populate_array(array, data=data, shape=shape, strides=strides, itemsize=item, meminfo=None)
        return array._getvalue()


@register_pass(mutates_CFG=True, analysis_only=False)
class _StepLowering(NativeLowering):  # type: ignore[misc]
    _name = "numballama_step_lowering"

    @property
    def lowering_class(self) -> type[Lower]:
        return _StepLower


class _StepCompiler(CompilerBase):  # type: ignore[misc]
    """Numba's standard pipeline with our lowering."""

    def define_pipelines(self) -> list[PassManager]:
        return [_pipeline(self.state, "numballama_step", _StepLowering)]


def _pipeline(state: Any, name: str, lowering: type[NativeLowering]) -> PassManager:
    """Numba's standard passes with another lowering."""
    pipeline = PassManager(name)
    for which, message in DefaultPassBuilder.define_nopython_pipeline(state).passes:
        pipeline.add_pass(lowering if which is NativeLowering else which, message)
    pipeline.finalize()
    return pipeline


class _CFunc(CFunc):  # type: ignore[misc]
    """Numba's compiled C callback, with our cache."""

    def enable_caching(self) -> None:
        self._cache = KernelCache(self.__wrapped__, f"step, {_text(_STEP_OPTIONS)}")


_STEP_OPTIONS = {"fastmath": FAST_MATH, "error_model": "numpy"}
_steps: dict[tuple[Callable[..., Any], tuple[Any, ...]], _CFunc] = {}
"""What `compile_step` has returned. Numba keeps compiled code for as long as the process lives, so a model that is
compiled again must not compile its kernels again."""
_steps_lock = ForkSafeLock()


def compile_step(function: Callable[..., Any], operands: list[Any]) -> _CFunc:
    """Compile a kernel for operands of these Numba types, or load it from the cache. Once a process.

    The function's first three parameters are worker, n_workers and tokens. The result has `address` and `cache_hits`.
    A function typed into a notebook is not cached on disk, because it has no source file. Ctrl-C raises
    KeyboardInterrupt after the kernel.
    """
    wanted = function, tuple(operands)
    with _steps_lock:
        found = _steps.get(wanted)
        if found is None:
            signature = types.void(types.int64, types.int64, types.int64, *operands)
            with interrupts.deferred(), call_types.remembered(), garbage.seldom_collected():
                found = _CFunc(
                    function,
                    sigutils.normalize_signature(signature),
                    locals={},
                    options=dict(_STEP_OPTIONS),
                    pipeline_class=_StepCompiler,
                )
                if _has_source_file(function):
                    found.enable_caching()
                found.compile()
                _steps[wanted] = found
    return found
