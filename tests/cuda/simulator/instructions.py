"""Python functions that emulate the intrinsics; `EMULATED` maps the intrinsics' names to them.

Values are NumPy scalars of the intrinsic's type where rounding or bits matter, Python integers elsewhere.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.cuda.simulator import PACKED, Pointer, lane, simulation


def _numbers(name: str, words: Any) -> np.ndarray:
    """The elements in 16 bytes of a type without scales."""
    raw = np.array(words, np.uint32)
    if name == "float32":
        return raw.view(np.float32)
    if name == "uint16":
        return raw.view(np.float16).astype(np.float32)
    assert name == "int16"
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


_PER_16 = {
    "float32": 4, "uint16": 8, "int16": 8, "int8": 16, "uint8": 32, "q4_1": 32, "q4_k": 32, "q5_k": 32, "q6_k": 16,
    "q8_0": 8,
}  # fmt: skip


def _address(memory: Pointer, index: int) -> int:
    return memory.address + int(index) * memory.bytes_each


def _shared_address(memory: Pointer, index: int) -> int:
    assert memory.shared
    return _address(memory, index)


def _ld_v4_f32(memory: Pointer, index: int) -> tuple[Any, ...]:
    return tuple(memory.four(index))


def _st_v4_f32(memory: Pointer, index: int, *numbers: Any) -> None:
    assert memory.name == "float32"
    assert _address(memory, index) % 16 == 0, f"st_v4_f32 at element {index}"
    for i, number in enumerate(numbers):
        memory[index + i] = number


def _dot_16_bytes(memory: Pointer, words: Any, x: int, step: int) -> Any:
    if memory.name in ("int8", "uint8"):
        return np.float32(0)
    numbers, total = _numbers(memory.name, words).tolist(), 0.0
    for four in range(len(numbers) // 4):
        a, b, c, d = np.array(_shared_words(4)(x + four * step)).view(np.float32).tolist()
        first, second, third, fourth = numbers[4 * four : 4 * four + 4]
        total = total + first * a + second * b + third * c + fourth * d
    return np.float32(total)


def _unpack8(memory: Pointer, words: Any) -> tuple[Any, ...]:
    if memory.kind == "q8_0":
        scale = np.float32(np.uint16(int(words[2]) & 0xFFFF).view(np.float16))
        return tuple(np.float32(quant) * scale for quant in np.array(words[:2], np.uint32).view(np.int8))
    numbers = list(_numbers(memory.name, words))
    assert len(numbers) in (4, 8)
    return tuple((numbers + [np.float32(0)] * 4)[:8])


def _load_element(memory: Pointer, row: int, index: int) -> Any:
    name = memory.name
    if name == "uint8":
        byte = simulation.load(row + index // 32 * 16 + index % 16, 1)[0]
        return np.float32((byte >> (4 * (index % 32 // 16)) & 15) - 8)
    raw = simulation.load(row + index * memory.bytes_each, memory.bytes_each)
    if name == "int16":
        raw = b"\0\0" + raw
    kind = {"uint16": np.float16, "int8": np.int8}.get(name, np.float32)
    return np.float32(np.frombuffer(raw, kind)[0])


def _store_element(memory: Pointer, index: int, value: Any) -> None:
    name, value = memory.name, np.float32(value)
    if name == "float32":
        memory[index] = value
    elif memory.kind == "q8_0":
        memory[index] = np.int8(value)
    elif name == "uint16":
        memory[index] = _float16(value)
    else:
        bits = int(value.view(np.uint32))
        bits = bits | 0x400000 if np.isnan(value) else bits + 0x7FFF + (bits >> 16 & 1)
        if np.isfinite(value) and bits >> 16 & 0x7FFF == 0x7F80:
            bits -= 1 << 16
        memory[index] = np.uint16(bits >> 16 & 0xFFFF).view(np.int16)


def _float16(value: Any) -> Any:
    """The bits of a float32 as float16; what is finite stays finite."""
    half = np.float16(value)
    if np.isfinite(value) and np.isinf(half):
        half = np.float16(np.copysign(65504, value))
    return half.view(np.uint16)


def _st_global_f16(where: int, value: Any) -> None:
    simulation.check(where, 2)
    simulation.note_write(where, 2)
    ctypes.c_uint16.from_address(int(where)).value = int(_float16(np.float32(value)))


def _scale_in(memory: Pointer, word: Any, index: int) -> Any:
    if memory.name == "float32":
        return np.uint32(word).view(np.float32)
    return np.float32(np.uint16(int(word) >> (16 * (index & 1)) & 0xFFFF).view(np.float16))


def _copy(nbytes: int) -> Callable[[int, int, int], None]:
    def copy(to: int, source: int, count: int) -> None:
        assert to % nbytes == 0 and source % nbytes == 0, "a copy's addresses are aligned even if it copies nothing"
        simulation.shared.check(to, nbytes)
        if count > 0:
            simulation.check(source, nbytes)
        own = lane()
        own.copies.append((to, source if count > 0 else 0, nbytes, own.waited))
        if not simulation.asynchronous:
            _finish(own.copies)

    return copy


def _finish(copies: list[tuple[int, int, int, bool]]) -> None:
    own = lane()
    for to, source, nbytes, waited in copies:
        now, own.waited = own.waited, waited  # it may have been read as early as it was asked for
        data = simulation.load(source, nbytes) if source else bytes(nbytes)
        own.waited = now
        ctypes.memmove(int(to), data, nbytes)
    copies.clear()


def _st_shared(to: int, *words: Any) -> None:
    assert to % (4 * len(words)) == 0
    simulation.shared.check(to, 4 * len(words))
    ctypes.memmove(int(to), np.array(words, np.uint32).tobytes(), 4 * len(words))


def _cp_async_commit() -> None:
    own = lane()
    own.groups.append(own.copies)
    own.copies = []


def _cp_async_wait_group(n: int) -> None:
    groups = lane().groups
    while len(groups) > n:
        _finish(groups.popleft())


def _words(data: bytes) -> tuple[Any, ...]:
    return tuple(np.frombuffer(data, np.uint32))


def _shared_words(count: int) -> Callable[[int], Any]:
    def load(where: int) -> Any:
        simulation.shared.check(where, 4 * count)
        words = _words(ctypes.string_at(int(where), 4 * count))
        return words if count > 1 else words[0]

    return load


def _griddepcontrol_wait() -> None:
    lane().waited = True


def _griddepcontrol_launch_dependents() -> None:
    simulation.starts_early |= not lane().waited


def _atom_add_1(counter: int) -> int:
    simulation.check(counter, 4)
    simulation.note_write(counter, 4)
    cell = ctypes.c_int32.from_address(int(counter))
    cell.value += 1
    return cell.value - 1


def _store_release_system(where: int, number: int) -> None:
    simulation.check(where, 8)
    simulation.note_write(where, 8)
    ctypes.c_int64.from_address(int(where)).value = int(number)


def _st_global_u32(where: int, word: Any) -> None:
    simulation.check(where, 4)
    simulation.note_write(where, 4)
    ctypes.c_uint32.from_address(int(where)).value = int(word)


def _system_load(kind: Any, count: int = 1) -> Callable[[int], Any]:
    """A load of what others write: other threads of the block run first, as a thread may wait by such loads for what a
    rank of another process sends to it when it has heard from them.
    """

    def load(where: int) -> Any:
        lane().pause()
        data = simulation.load(where, count * np.dtype(kind).itemsize)
        simulation.rest_after(where, data)
        found = np.frombuffer(data, kind)
        values = tuple(x.item() if found.dtype.kind == "i" else x for x in found)
        return values if count > 1 else values[0]

    return load


def _system_store(kind: Any, count: int = 1) -> Callable[..., None]:
    def store(where: int, *numbers: Any) -> None:
        size = np.dtype(kind).itemsize
        simulation.check(where, count * size)
        simulation.note_write(where, count * size)
        for i, number in enumerate(numbers):  # each of them whole
            cell = ctypes.c_int64 if size == 8 else ctypes.c_uint32
            cell.from_address(int(where) + i * size).value = int(number)

    return store


_UNSIGNED = list(range(256))
_SIGNED = [byte - 256 * (byte > 127) for byte in range(256)]


def _dp4a(first: list[int], second: list[int]) -> Callable[[Any, Any, Any], int]:
    def dp4a(a: Any, b: Any, total: Any) -> int:
        x, y = int(a), int(b)
        if not (x and y):
            return int(total)
        result = (
            int(total) + first[x & 255] * second[y & 255] + first[x >> 8 & 255] * second[y >> 8 & 255]
            + first[x >> 16 & 255] * second[y >> 16 & 255] + first[x >> 24] * second[y >> 24]
        )  # fmt: skip
        assert -(2**31) <= result < 2**31, "a sum of products overflows"
        return result

    return dp4a


def _cvt_rni_s32(x: Any) -> int:
    number = float(x)
    return 0 if math.isnan(number) else round(min(max(number, -(2.0**31)), 2.0**31 - 1))  # half to even


def _ex2_approx_ftz(x: Any) -> Any:
    power = np.exp2(np.float32(x))
    return np.float32(0) if power < np.finfo(np.float32).tiny else power


def _prmt_byte_planes(*numbers: int) -> tuple[Any, ...]:
    rows = np.array(numbers, np.int64).astype(np.int32).view(np.uint8).reshape(4, 4)
    return tuple(np.ascontiguousarray(rows[:, which]).view(np.uint32)[0] for which in range(3))


EMULATED: dict[str, Callable[..., Any]] = {
    "address": _address,
    "shared_address": _shared_address,
    "ld_v4_f32": _ld_v4_f32,
    "st_v4_f32": _st_v4_f32,
    "s32": int,
    "mad_wide_s32": lambda a, b, c: int(a) * int(b) + int(c),
    "uint_as_float": lambda bits: np.uint32(bits).view(np.float32),
    "float_as_uint": lambda number: np.float32(number).view(np.uint32),
    "cvt_f32_f16": lambda bits: np.float32(np.uint16(int(bits) & 0xFFFF).view(np.float16)),
    "dp4a": _dp4a(_SIGNED, _SIGNED),
    "dp4a_su": _dp4a(_SIGNED, _UNSIGNED),
    "dp4a_us": _dp4a(_UNSIGNED, _SIGNED),
    "dp4a_uu": _dp4a(_UNSIGNED, _UNSIGNED),
    "cvt_rni_s32": _cvt_rni_s32,
    "prmt_byte_planes": _prmt_byte_planes,
    "ex2_approx": lambda x: np.exp2(np.float32(x)),
    "ex2_approx_ftz": _ex2_approx_ftz,
    "div_full": lambda a, b: np.float32(a) / np.float32(b),
    "rsqrt_approx": lambda x: np.float32(1) / np.sqrt(np.float32(x)),
    "cvt_f32_u8": lambda word: np.float32(int(word) & 255),
    "half_word": lambda word, odd: np.uint32(int(word) >> 16 * int(odd)),
    "cvt_f32_s8": lambda word: np.float32(np.uint8(int(word) & 255).view(np.int8)),
    "per_16_bytes": lambda memory: _PER_16[memory.kind],
    "has_scales": lambda memory: memory.kind in ("int8", "uint8", *PACKED),
    "is_packed": lambda memory: memory.kind in PACKED,
    "is_q4_0": lambda memory: memory.kind == "uint8",
    "is_q4_1": lambda memory: memory.kind == "q4_1",
    "has_mins": lambda memory: memory.kind in ("q4_k", "q5_k"),
    "is_q5_k": lambda memory: memory.kind == "q5_k",
    "is_q8_0": lambda memory: memory.kind == "q8_0",
    "st_global_f16": _st_global_f16,
    "is_q6_k": lambda memory: memory.kind == "q6_k",
    "zero_point": lambda memory: np.float32({"uint8": 8, "q6_k": 32}.get(memory.kind, 1)),
    "dot_16_bytes": _dot_16_bytes,
    "unpack8": _unpack8,
    "load_element": _load_element,
    "store_element": _store_element,
    "scale_bytes": lambda memory: memory.bytes_each,
    "scale_word": lambda memory, index: _address(memory, index) & -4,
    "scale_in": _scale_in,
    "cp_async_16": _copy(16),
    "cp_async_8": _copy(8),
    "cp_async_4": _copy(4),
    "cp_async_commit": _cp_async_commit,
    "cp_async_wait_all": lambda: _cp_async_wait_group(0),
    "cp_async_wait_group": _cp_async_wait_group,
    "ld_shared_v4_u32": _shared_words(4),
    "ld_shared_v4_f32": lambda where: tuple(np.array(_shared_words(4)(where)).view(np.float32)),
    "ld_shared_v2_u32": _shared_words(2),
    "ld_shared_u32": _shared_words(1),
    "ld_global_u32": lambda where: _words(simulation.load(where, 4))[0],
    "ld_global_v4_u32": lambda where: _words(simulation.load(where, 16)),
    "st_global_u32": _st_global_u32,
    "st_shared_u32": _st_shared,
    "st_shared_v4_u32": _st_shared,
    "no_unroll": lambda: None,
    "griddepcontrol_wait": _griddepcontrol_wait,
    "griddepcontrol_launch_dependents": _griddepcontrol_launch_dependents,
    "atom_add_1": _atom_add_1,
    "store_release_system": _store_release_system,
    "ld_relaxed_u32": _system_load(np.uint32),
    "ld_acquire_u32": _system_load(np.uint32),
    "ld_relaxed_u64": _system_load(np.int64),
    "ld_relaxed_v2_u64": _system_load(np.int64, 2),
    "ld_relaxed_v4_f32": _system_load(np.float32, 4),
    "st_release_u32": _system_store(np.uint32),
    "st_relaxed_u32": _system_store(np.uint32),
    "st_relaxed_v4_u32": _system_store(np.uint32, 4),
    "st_relaxed_u64": _system_store(np.int64),
    "st_relaxed_v2_u64": _system_store(np.int64, 2),
    "nanosleep": lambda nanoseconds: time.sleep(1e-9 * nanoseconds),
    "st_v4_u32": _system_store(np.uint32, 4),
}
"""Name of an intrinsic → its emulation."""
