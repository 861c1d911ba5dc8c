"""Environment variables that make Numba or LLVM fail: a note or an error of one line that names the variable.

Numba also reads these settings from `.numba_config.yaml` in the current directory. Without the line, Numba shows a
traceback, and LLVM writes to standard error or ends the process. An empty variable counts as if it were not set.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from functools import lru_cache
from typing import Any

from .. import progress
from ..errors import NEXT_STEP, DeviceError


def import_numba() -> None:
    """Import Numba, and raise `DeviceError` where a variable makes it unusable. One that Numba ignores is noted."""
    thread_limit()
    if "numba" not in sys.modules:
        _import()
    numba: Any = sys.modules["numba"]
    if numba.config.DISABLE_JIT:
        _refuse("NUMBA_DISABLE_JIT", "it switches off the compiler that this device needs", "unset it")
    if numba.config.BOUNDSCHECK:
        _refuse("NUMBA_BOUNDSCHECK", "kernels address memory that Numba does not know the size of", "unset it")
    _check_processor(numba.config)


def thread_limit() -> int | None:
    """NUMBA_NUM_THREADS; None if it is not set. Raises `DeviceError` for what is no number of threads."""
    name = "NUMBA_NUM_THREADS"
    text = os.environ.get(name)
    if not text:
        return None
    if not (text.strip().isdecimal() and int(text) >= 1):
        _refuse(name, "it must be a whole number from 1 on", "correct or unset it")
    return int(text)


def refuse_simulator() -> None:
    """Raise `DeviceError` if numba-cuda would simulate a GPU, in which case it compiles nothing for a real one."""
    name = "NUMBA_ENABLE_CUDASIM"
    if re.fullmatch(r"[+-]?\d*[1-9]\d*", os.environ.get(name, "").strip()):
        _refuse(name, "numba-cuda then simulates a GPU and cannot use a real one", f"unset it; {NEXT_STEP}")


# LLVM


def _check_processor(config: Any) -> None:
    """Ignore a processor and features that LLVM does not know, with a note.

    Raises `DeviceError` for those with which it compiles nothing.
    """
    config.CPU_NAME = config.CPU_NAME or None
    name, features = "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"
    if config.CPU_NAME is not None:
        from numba.core.codegen import get_host_cpu_features

        fine, complaint = _probe(config.CPU_NAME, get_host_cpu_features())
        if not fine:
            _refuse(name, f"LLVM compiles nothing for it ({complaint})", "correct or unset it")
        if complaint:
            _ignored(name, "LLVM knows no such processor")
            config.CPU_NAME = None
    if config.CPU_FEATURES:
        words = [word for word in config.CPU_FEATURES.split(",") if word]
        known = [word for word in words if re.fullmatch(r"[+-](?!help$)[\w.-]+", word)]
        fine, complaint = _probe(config.CPU_NAME or "", ",".join(known))
        unknown = re.findall(r"'([^']*)' is not a recognized feature", complaint)
        known = [word for word in known if word not in unknown]
        if not fine:
            _refuse(features, f"LLVM compiles nothing with it ({complaint[:200]})", "correct or unset it")
        if known != words:
            lost = ", ".join(word for word in words if word not in known)
            _ignored(features, f"LLVM knows no feature {lost}, with a sign + or - in front")
            config.CPU_FEATURES = ",".join(known)


_PROBE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import llvmlite.binding as llvm
llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
target = llvm.Target.from_triple(llvm.get_process_triple())
machine = target.create_target_machine(cpu=sys.argv[2] or llvm.get_host_cpu_name(), features=sys.argv[3])
source = "define double @f(double %x) { %y = fadd double %x, %x\\n ret double %y }"
machine.emit_object(llvm.parse_assembly(source))
"""
"""Compiles a function for a processor with features."""
_PROBE_S = 60.0


@lru_cache
def _probe(cpu: str, features: str) -> tuple[bool, str]:
    """Whether LLVM compiles for a processor ("": this one) with these features, and what it says: in a process of its
    own, which LLVM may end.
    """
    if not sys.executable or getattr(sys, "frozen", False):  # there is no interpreter to start
        return True, ""
    command = [sys.executable, "-c", _PROBE, json.dumps(sys.path), cpu, features]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PROBE_S)
    except (OSError, subprocess.TimeoutExpired):
        return True, ""
    return done.returncode == 0, " ".join(done.stderr.split())


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
        if found and os.environ.get(found[1]) != "":
            _ignored(found[1], "Numba does not understand it")
        elif not found:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _ignored(name: str, why: str) -> None:
    value = os.environ.get(name)
    setting = f"{_key(name).lower()} of .numba_config.yaml" if value is None else f"{name}={value}"
    progress.log.warning("%s is ignored: %s", setting, why)


def _key(name: str) -> str:
    """What `numba.config` calls the setting of a variable."""
    return name.removeprefix("NUMBA_")


def _refuse(name: str, why: str, advice: str) -> None:
    value = os.environ.get(name)
    if value is None:  # Numba's other source; the program itself may also have set numba.config
        raise DeviceError(
            f"numba.config has {_key(name)}: {why}; take {_key(name).lower()} out of .numba_config.yaml in the current "
            "directory, or do not set it"
        )
    raise DeviceError(f"the environment has {name}={value}: {why}; {advice}")
