"""How this package compiles with Numba: options, cache, and the C function through which a kernel is called.

Everything that depends on Numba's private API is here: `compile_step` replaces the C wrapper that Numba makes for a
`cfunc`. The calling convention is explained in `executor`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.lowering import Lower
from numba.core.typed_passes import NativeLowering
from numba.np.arrayobj import make_array, populate_array

from ..kernel_cache import cache_directory
from .fork import ForkSafeLock

FAST_MATH = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and multiply-adds fused. Divisions stay exact, because quantised values depend on them. NaN and
infinity keep their meaning, because attention is masked with -inf.
"""

_cache_setting = ForkSafeLock()


@contextlib.contextmanager
def _our_cache() -> Iterator[None]:
    """Set Numba's cache folder to ours. Numba reads this global setting when a function is decorated."""
    with _cache_setting:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(cache_directory())
        try:
            yield
        finally:
            numba.config.CACHE_DIR = before


def _has_source_file(function: Callable[..., Any]) -> bool:
    """False for a function typed into a notebook or an interpreter."""
    return Path(function.__code__.co_filename).is_file()


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`numba.njit` with this package's options and cache. Works with and without parentheses."""
    if function is None:
        return lambda f: jit(f, **options)
    options = {"fastmath": FAST_MATH, "error_model": "numpy", "nogil": True, **options}
    with _our_cache():
        return numba.njit(cache=True, **options)(function)


def device(function: Callable[..., Any]) -> Any:
    """Decorate a helper that kernels call. It is compiled into each kernel and not cached by itself."""
    return numba.njit(fastmath=FAST_MATH, error_model="numpy", nogil=True)(function)


def exact_device(function: Callable[..., Any]) -> Any:
    """Like `device`, but arithmetic is done as written: no reordering, no fused multiply-add.

    `fastmath=False` must be explicit: without it, Numba compiles a function with the flags of its first caller.
    """
    return numba.njit(fastmath=False, error_model="numpy", nogil=True)(function)


def ordered_device(function: Callable[..., Any]) -> Any:
    """Like `exact_device`, but multiply-adds may be fused."""
    return numba.njit(fastmath={"contract"}, error_model="numpy", nogil=True)(function)


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
        pipeline = PassManager("numballama_step")
        for which, message in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
            pipeline.add_pass(_StepLowering if which is NativeLowering else which, message)
        pipeline.finalize()
        return [pipeline]


def compile_step(function: Callable[..., Any], operands: list[Any]) -> Any:
    """Compile a kernel for operands of these Numba types, or load it from the cache.

    The function's first three parameters are worker, n_workers and tokens. The result has `address` and `cache_hits`;
    the code lives as long as the result. A function typed into a notebook is not cached, because it has no source file.
    """
    signature = types.void(types.int64, types.int64, types.int64, *operands)
    with _our_cache():
        return numba.cfunc(
            signature,
            cache=_has_source_file(function),
            pipeline_class=_StepCompiler,
            fastmath=FAST_MATH,
            error_model="numpy",
        )(function)
