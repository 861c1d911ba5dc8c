"""Remember how Numba typed a call of an operator, so that compiling does not find it out again for each one.

For `a + b` Numba tries some dozens of templates, those of NumPy's array functions among them, each time it meets the
operator: a tenth of what a kernel takes to compile on the CPU, a quarter for a GPU. Where the operator itself is what
is compiled, the answer depends on nothing but the types, so it is kept for as long as the process lives. Where an
`overload` is compiled in its place, as for `min`, Numba looks for one with the caller's options, and is asked again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

MODULES = frozenset({"_operator", "math", "builtins", "numpy"})
"""Calls of functions from these modules are remembered. In other modules a function may be redefined."""

_found: dict[tuple[int, int, tuple[Any, ...]], tuple[Any, ...]] = {}
"""(function type, typing context, types of arguments) → the signature, and what has these identities."""
_thread = threading.local()


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Remember the calls that this thread compiles during the block. What else is compiled is left alone."""
    _install()
    before, _thread.remembers = getattr(_thread, "remembers", False), True
    try:
        yield
    finally:
        _thread.remembers = before


def _install() -> None:
    """Replace the method of Numba's that types a call, once a process."""
    from numba.core.types.functions import BaseFunction

    find = BaseFunction.get_call_type
    if getattr(find, "remembers", False):
        return

    def get_call_type(self: Any, context: Any, args: tuple[Any, ...], kws: dict[str, Any]) -> Any:
        if kws or not getattr(_thread, "remembers", False) or getattr(self.typing_key, "__module__", "") not in MODULES:
            return find(self, context, args, kws)
        key = id(self), id(context), tuple(args)
        known = _found.get(key)
        if known is not None:
            return known[0]
        signature = find(self, context, args, kws)
        if self.get_impl_key(signature) is self.typing_key:
            _found[key] = signature, self, context
        return signature

    get_call_type.remembers = True  # type: ignore[attr-defined]
    BaseFunction.get_call_type = get_call_type  # type: ignore[assignment,method-assign]
