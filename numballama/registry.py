"""The kernel registry: (op, backend, operand types) → kernel.

`@kernel` enters a kernel where it is defined, and compares its signature with the op's rule (`ops.py`): a parameter
that is misspelt, missing or in another place is an `Error` then, and not a wrong result later. Each backend imports the
modules of its kernels; a look-up imports nothing.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from . import ir, ops
from .errors import Error, UnsupportedError
from .ir import Rule
from .quantization.types import TYPE_TRAITS

Types = str | tuple[str, ...]
"""Accepted types of one operand: a type's name, several names, or "*" for any."""
ScratchShape = Callable[..., tuple[int, ...]]
"""shape(*input shapes, workers=…) → the shape of a scratch array."""


@dataclass(frozen=True)
class Convention:
    """How a backend calls its kernels.

    `leading` says what comes before the operands. `takes_outputs`: outputs are parameters, after the inputs; otherwise
    they are returned.
    """

    leading: tuple[str, ...]
    takes_outputs: bool


CONVENTIONS = {
    "cpu": Convention(("worker", "n_workers", "tokens"), True),
    "cuda": Convention(("ctx",), True),
    "reference": Convention((), False),
}
"""Backend → its calling convention. After inputs and outputs come attributes and scratch arrays, by name."""


@dataclass(frozen=True)
class KernelRef:
    """A kernel named by its module and function. The module, and Numba with it, is imported when the kernel must be
    compiled: a start with cached kernels needs neither.
    """

    module: str
    name: str

    def load(self) -> Any:
        """The function, its module imported."""
        return getattr(importlib.import_module(self.module), self.name)

    def loaded(self) -> Any | None:
        """The function if its module has been imported already."""
        return self.load() if self.module in sys.modules else None


F = TypeVar("F", bound="Callable[..., Any] | KernelRef")


@dataclass(frozen=True)
class Kernel:
    """The implementation of an op on a backend for given operand types.

    `target` is the function, or a `KernelRef` that names it. `scratch` gives the shapes of its float32 scratch arrays.
    """

    op: str
    backend: str
    types: tuple[Types, ...]
    target: Callable[..., Any] | KernelRef
    scratch: Mapping[str, ScratchShape]

    @property
    def name(self) -> str:
        return self.target.name if isinstance(self.target, KernelRef) else self.target.__name__

    @property
    def built_in(self) -> bool:
        """Whether the kernel is one of this package."""
        module = self.target.module if isinstance(self.target, KernelRef) else self.target.__module__
        return module.partition(".")[0] == __package__

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The function. Raises `Error` for one behind a `KernelRef` whose signature does not fit the op's rule."""
        if not isinstance(self.target, KernelRef):
            return self.target
        function: Callable[..., Any] = self.target.load()
        check_signature(function, self)
        return function

    @cached_property
    def parameters(self) -> list[str]:
        """Names of the function's parameters, in order."""
        return list(inspect.signature(self.function).parameters)

    @cached_property
    def named(self) -> list[str]:
        """Parameters after the operands: attributes of the op and scratch arrays, in order."""
        return self.parameters[len(operand_names(self)) :]

    def accepts(self, types: Sequence[str]) -> bool:
        """Whether operands of these types fit."""
        return len(types) == len(self.types) and all(
            allowed == "*" or found == allowed or (isinstance(allowed, tuple) and found in allowed)
            for allowed, found in zip(self.types, types, strict=True)
        )


__all__ = ["Kernel", "KernelRef", "find", "has", "kernel", "ops"]  # ops: importing it declares the rules

_kernels: dict[tuple[str, str], list[Kernel]] = {}


def kernel(op: str, backend: str, *types: Types, **scratch: ScratchShape) -> Callable[[F], F]:
    """Register the decorated function, or a `KernelRef`, for `op` on `backend`: an entry of `types` for each input.

    The function takes what its backend's convention says comes first (on the CPU `worker, n_workers, tokens`), then the
    op's inputs and outputs under the names and in the order of its rule, without outputs that are updated in place,
    then by name its attributes and scratch arrays. Attributes that the rule calls optional may be left out. A keyword
    of `kernel` names a scratch parameter; its value maps (input shapes, workers) to a shape. A later registration for
    the same types replaces the earlier one, so that a notebook cell can be run again; a user's kernel is preferred to
    the package's.

    Raises `Error` for an op without a rule and for a signature that does not fit it. A `KernelRef` is checked when its
    function is first asked for.
    """

    def register(target: F) -> F:
        made = Kernel(op, backend, types, target, scratch)
        _check_names(made)
        if isinstance(target, KernelRef):
            _rule_of(made)
        else:
            check_signature(target, made)
        entries = _kernels.setdefault((op, backend), [])
        entries[:] = [entry for entry in entries if entry.types != types or entry.built_in < made.built_in]
        # a user's kernel comes before the package's, whichever of the two is registered first
        entries.insert(len(entries) if made.built_in else 0, made)
        return target

    return register


def _check_names(kernel: Kernel) -> None:
    """Raise `Error` for a backend or an operand type that does not exist: nothing would ever find the kernel."""
    if kernel.backend not in CONVENTIONS:
        raise Error(
            f"kernel {kernel.name}: unknown backend {kernel.backend!r}; choose from {', '.join(sorted(CONVENTIONS))}"
        )
    known = {"*", *ir.DTYPES, *TYPE_TRAITS}
    for types in kernel.types:
        for name in (types,) if isinstance(types, str) else types:
            if name not in known:
                raise Error(
                    f"kernel {kernel.name}: unknown operand type {name!r}; choose from {', '.join(sorted(known))}"
                )


def _rule_of(kernel: Kernel) -> Rule:
    if kernel.op not in ir.RULES:
        raise Error(
            f"kernel {kernel.name}: there is no op {kernel.op!r}; declare it first: "
            f"@rule({kernel.op!r}, inputs=(…), outputs=(…)); known: {', '.join(sorted(ir.RULES))}"
        )
    return ir.RULES[kernel.op]


def operand_names(kernel: Kernel) -> list[str]:
    """The parameters that a kernel begins with: its backend's leading ones, inputs and outputs. Raises `Error` for a
    number of types that the op does not take.
    """
    rule, convention = _rule_of(kernel), CONVENTIONS[kernel.backend]
    try:
        inputs = rule.inputs_of(len(kernel.types))
    except Error as error:
        raise Error(f"kernel {kernel.name} has {len(kernel.types)} types: {error}") from None
    return [*convention.leading, *inputs, *(rule.results if convention.takes_outputs else ())]


def check_signature(function: Callable[..., Any], kernel: Kernel) -> None:
    """Raise `Error` unless a kernel's function has the parameters that its op's rule asks for, and no others.

    The leading parameters may have any names, because they are passed by position.
    """
    found, wanted = list(inspect.signature(function).parameters), operand_names(kernel)
    rule, leading = _rule_of(kernel), len(CONVENTIONS[kernel.backend].leading)
    allowed = {*rule.attrs, *kernel.scratch}
    where = f"{kernel.backend} kernel {kernel.name} for {kernel.op}"
    expected = f"expected ({', '.join(wanted)}), then any of ({', '.join(sorted(allowed))}); found ({', '.join(found)})"
    for index, name in enumerate(wanted):
        here = found[index] if index < len(found) else None
        if index < leading:
            misplaced = here in wanted and here != name  # another leading parameter, or an operand
            if here is None or misplaced or here in allowed:
                raise Error(f"{where}: parameter {index + 1} must be `{name}`, found {_quoted(here)}; {expected}")
        elif here != name:
            raise Error(f"{where}: parameter {index + 1} must be `{name}`, found {_quoted(here)}; {expected}")
    rest = found[len(wanted) :]
    for name in rest:
        if name not in allowed:
            raise Error(f"{where}: `{name}` is no attribute of the op and no scratch array of the kernel; {expected}")
    if ignored := [name for name in rule.attrs if name not in (*rest, *rule.optional)]:
        raise Error(f"{where}: attribute `{ignored[0]}` changes the result, so it must be a parameter; {expected}")
    if missing := [name for name in kernel.scratch if name not in rest]:
        raise Error(f"{where}: scratch array `{missing[0]}` is declared but no parameter; {expected}")
    if clash := sorted(set(kernel.scratch) & {*rule.attrs, *wanted}):
        raise Error(f"{where}: scratch array `{clash[0]}` has the name of an operand or attribute; {expected}")


def _quoted(name: str | None) -> str:
    return "nothing" if name is None else f"`{name}`"


def _entries(op: str, backend: str) -> list[Kernel]:
    if backend in CONVENTIONS and not any(each == backend for _, each in _kernels):
        raise Error(
            f"no kernels of backend {backend!r} are registered; import the backend first (numballama.cpu.ops, "
            "numballama.cuda.ops, numballama.reference)"
        )
    return _kernels.get((op, backend), [])


def find(op: str, backend: str, types: Sequence[str]) -> Kernel:
    """The kernel for an op whose inputs have these types. Raises `UnsupportedError` naming what exists."""
    entries = _entries(op, backend)
    for entry in entries:
        if entry.accepts(types):
            return entry
    known = "; ".join(str(entry.types) for entry in entries) or "nothing"
    raise UnsupportedError(f"no {backend} kernel for {op}({', '.join(types)}); registered for this op: {known}")


def has(op: str, backend: str, types: Sequence[str]) -> bool:
    """Whether `find` would succeed. Fusion passes ask before they build an op that the backend lacks."""
    return any(entry.accepts(types) for entry in _entries(op, backend))
