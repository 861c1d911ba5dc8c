"""Environment variables that make Numba fail: an error that names the variable, in place of Numba's traceback."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from typing import Any

from .. import progress
from ..errors import DeviceError


def import_numba() -> None:
    """Import Numba, and raise `DeviceError` where a variable makes it unusable. One that Numba ignores is noted."""
    _check_threads()
    if "numba" not in sys.modules:
        _import()
    numba: Any = sys.modules["numba"]
    if numba.config.DISABLE_JIT:
        _refuse("NUMBA_DISABLE_JIT", "it switches off the compiler that this device needs", "unset it")
    if numba.config.BOUNDSCHECK:
        _refuse("NUMBA_BOUNDSCHECK", "kernels address memory that Numba does not know the size of", "unset it")


def _check_threads() -> None:
    name = "NUMBA_NUM_THREADS"
    text = os.environ.get(name, "1")
    if not (text.strip().isdecimal() and int(text) >= 1):
        _refuse(name, "it must be a whole number from 1 on", "correct or unset it")


def _import() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            importlib.import_module("numba")
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DeviceError(
                f"Numba cannot be imported: {reason}; check the variables NUMBA_… of the environment and a file "
                ".numba_config.yaml in the current directory, or install it again: pip install --force-reinstall numba"
            ) from error
    for warning in caught:
        found = re.match(r"Environment variable '(\w+)' is defined but", str(warning.message))
        if found:
            name = found[1]
            progress.log.warning("%s=%s is ignored: Numba does not understand it", name, os.environ.get(name, ""))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _refuse(name: str, why: str, advice: str) -> None:
    value = os.environ.get(name)
    setting = name if value is None else f"{name}={value}"
    raise DeviceError(f"the environment has {setting}: {why}; {advice}")
