"""Conversions between float32 and float16 in compiled code."""

from __future__ import annotations

import pytest

from tests.helpers.processes import run_python

HALVES = """
import json
import numba, numpy as np
from numballama.cpu.intrinsics import as_f32, f32_to

@numba.njit
def decode(bits, out):
    for i in range(len(bits)):
        out[i] = as_f32(bits[i])

@numba.njit
def encode(numbers, out):
    for i in range(len(numbers)):
        out[i] = f32_to(out[i], numbers[i])

np.seterr(all="ignore")
bits = np.arange(65536, dtype=np.uint16)
exact, decoded = bits.view(np.float16).astype(np.float32), np.empty(65536, np.float32)
decode(bits, decoded)
drawn = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
numbers = np.concatenate([drawn, exact, (exact[:-1] + exact[1:]) / 2, np.float32([65519.99, 65520, 2**-25, -0.0])])
encoded = np.empty(len(numbers), np.uint16)
encode(numbers, encoded)
same = lambda a, b: bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())
signs = bool((np.signbit(decoded) == np.signbit(exact))[~np.isnan(exact)].all())
print(json.dumps([same(decoded, exact), same(encoded.view(np.float16), numbers.astype(np.float16)), signs]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("generic", [False, True])
def test_float16_is_converted_with_and_without_the_cpu(generic: bool) -> None:
    """A CPU without such instructions (or a user who has Numba compile for any) gets them in integer arithmetic."""
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""} if generic else {}
    assert run_python(HALVES, **plain) == [True, True, True]
