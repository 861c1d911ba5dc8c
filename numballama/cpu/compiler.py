"""How this package compiles with Numba: the options, and the calling convention of a step.

A *step function* is an `@njit`-style function of arrays and scalars, compiled so that it can be called by address with
four integers: `code = f(operands, part, parts, tokens)`. `operands` is the address of a row of int64 slots; a small
wrapper, made here in LLVM and cached with the function, turns them into the function's arrays. So a plan is a table
of integers, and adding an operator means writing one function.
"""

from __future__ import annotations

import contextlib
import os
import threading
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

FAST_MATH = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and multiply-adds fused. Divisions stay exact (a quantised number must not depend on them), and
NaN and infinity keep their meaning (scores are masked with -inf).
"""

_setting = threading.RLock()


def _new_lock() -> None:
    global _setting
    _setting = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # a thread that held it is not in the child to let it go


@contextlib.contextmanager
def _our_cache() -> Iterator[None]:
    """Numba decides where a function is cached when it is decorated, by this setting of the whole process."""
    with _setting:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(cache_directory())
        try:
            yield
        finally:
            numba.config.CACHE_DIR = before


def _has_source_file(function: Callable[..., Any]) -> bool:
    return Path(function.__code__.co_filename).is_file()


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`numba.njit` with this package's options and cache. Works with and without parentheses."""
    if function is None:
        return lambda f: jit(f, **options)
    options = {"fastmath": FAST_MATH, "error_model": "numpy", "nogil": True, **options}
    with _our_cache():
        return numba.njit(cache=True, **options)(function)


def device(function: Callable[..., Any]) -> Any:
    """A helper that kernels call: compiled into each of them, hence not cached by itself."""
    return numba.njit(fastmath=FAST_MATH, error_model="numpy", nogil=True)(function)


def exact_device(function: Callable[..., Any]) -> Any:
    """A helper like `device` whose arithmetic is done as it is written.

    `fastmath=False` is not Numba's default: without it a function has the flags of the first that calls it.
    """
    return numba.njit(fastmath=False, error_model="numpy", nogil=True)(function)


def ordered_device(function: Callable[..., Any]) -> Any:
    """A helper like `exact_device`, but that a product may go into a sum without being rounded before."""
    return numba.njit(fastmath={"contract"}, error_model="numpy", nogil=True)(function)


class _StepLower(Lower):  # type: ignore[misc]
    """Numba's lowering with another C wrapper: the function's operands come from a row of int64 slots."""

    def create_cfunc_wrapper(self) -> None:
        context, fndesc, int64 = self.context, self.fndesc, ir.IntType(64)
        module = context.create_module("step")
        callee_type = context.call_conv.get_function_type(fndesc.restype, fndesc.argtypes)
        callee = ir.Function(module, callee_type, fndesc.llvm_func_name)
        wrapper_type = ir.FunctionType(ir.IntType(32), [int64] * 4)
        wrapper = ir.Function(module, wrapper_type, fndesc.llvm_cfunc_wrapper_name)
        builder = ir.IRBuilder(wrapper.append_basic_block())
        address, *ambient = wrapper.args
        slots = builder.inttoptr(address, int64.as_pointer())
        used = 0

        def take() -> Any:
            nonlocal used
            used += 1
            return builder.load(builder.gep(slots, [ir.Constant(int64, used - 1)]))

        def operand(kind: Any) -> Any:
            if isinstance(kind, types.BaseTuple):
                return context.make_tuple(builder, kind, [operand(part) for part in kind])
            if isinstance(kind, types.Array):
                return self._array(builder, kind, take(), [take() for _ in range(kind.ndim)])
            return builder.bitcast(take(), ir.DoubleType()) if kind == types.float64 else take()

        arguments = [*ambient, *(operand(kind) for kind in fndesc.argtypes[len(ambient) :])]
        status, _ = context.call_conv.call_function(builder, callee, fndesc.restype, fndesc.argtypes, arguments)
        builder.ret(status.code)
        self.library.add_ir_module(module)

    def _array(self, builder: Any, kind: Any, address: Any, shape: list[Any]) -> Any:
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
    """Numba's standard pipeline but for the lowering."""

    def define_pipelines(self) -> list[PassManager]:
        pipeline = PassManager("numballama_step")
        for which, message in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
            pipeline.add_pass(_StepLowering if which is NativeLowering else which, message)
        pipeline.finalize()
        return [pipeline]


def compile_step(function: Callable[..., Any], operands: list[Any]) -> Any:
    """Compile (or load from the cache) a kernel for these Numba types of its operands.

    The function's first three parameters are part, parts and tokens. The result has `address` and `cache_hits`; the
    code lives as long as it does. A function typed into a notebook is compiled, but not cached: it has no file.
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
