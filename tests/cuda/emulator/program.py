"""PTX as a list of statements, the global memory that it works on, and numbers of 16 bits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from numballama.cuda.launch import TensorMap

SHARED = 1 << 40
"""Where the window of shared memory begins among generic addresses."""
BASE = 1 << 20
"""The address of the first allocation."""
FIRST_BYTES = 64 << 20
"""What a memory has room for at first."""

WIDTHS = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
          "b64": 8, "u64": 8, "s64": 8, "f64": 8, "bf16x2": 4, "f16x2": 4, "pred": 1}  # fmt: skip
NUMPY = {
    kind: np.dtype(type_)
    for kind, type_ in {
        "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16, "b16": np.uint16,
        "f16": np.float16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32, "u64": np.uint64,
        "s64": np.int64, "b64": np.uint64, "f64": np.float64, "pred": np.bool_,
    }.items()
}  # fmt: skip


class Memory:
    """Global memory: allocations with other bytes between them, which no kernel may access. It grows."""

    def __init__(self) -> None:
        self.bytes, self.allowed = np.empty(0, np.uint8), np.zeros(0, bool)
        self._used = 256
        self.lock = Lock()
        """Held by each load and store: where launches run in several threads, an access is whole."""
        self.tensor_maps: dict[int, TensorMap] = {}
        """Address of a tensor map → the matrix that it describes."""

    def put_map(self, matrix: TensorMap) -> int:
        """The address of a new tensor map; the same for the same matrix."""
        known = {value: key for key, value in self.tensor_maps.items()}
        if matrix not in known:
            known[matrix] = self.put(np.zeros(128, np.uint8))
            self.tensor_maps[known[matrix]] = matrix
        return known[matrix]

    def put(self, array: np.ndarray) -> int:
        """A copy of an array; returns its address, a multiple of 256."""
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        at = self._used
        self._used += -(-(raw.size + 256) // 256) * 256
        if self._used > self.bytes.size:
            before, size = self.bytes.size, max(FIRST_BYTES, 2 * self._used)  # pages that nothing uses cost nothing
            grown, allowed = np.empty(size, np.uint8), np.zeros(size, bool)
            grown[:before], allowed[:before] = self.bytes, self.allowed
            self.bytes, self.allowed = grown, allowed
        self.bytes[at : at + raw.size] = raw
        self.allowed[at : at + raw.size] = True
        return BASE + at

    def get(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        at, count = address - BASE, int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[at : at + count].copy().view(dtype).reshape(shape)


@dataclass(frozen=True)
class Statement:
    guard: str
    negated: bool
    operation: tuple[str, ...]
    operands: tuple[Any, ...]
    text: str


def _split(text: str) -> tuple[Any, ...]:
    """Operands: braces become tuples."""
    parts: list[Any] = []
    for found in re.finditer(r"\{([^}]*)\}|\[[^]]*\]|[^,\s]+", text):
        parts.append(tuple(p.strip() for p in found[1].split(",")) if found[1] is not None else found[0])
    return tuple(parts)


class Program:
    """A parsed kernel."""

    def __init__(self, ptx: str) -> None:
        ptx = re.sub(r"//[^\n]*", "", ptx)
        head = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)", ptx, re.S)
        assert head
        self.parameters = re.findall(r"\.param\s+\.(\w+)\s+([\w$]+)", head[1])
        self.shared: dict[str, int] = {}
        size, dynamic = 0, ""
        for external, align, name, count in re.findall(
            r"(\.extern)?\s*\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", ptx
        ):
            if external:
                dynamic = name
                continue
            size = -(-size // int(align)) * int(align)
            self.shared[name] = size
            size += int(count)
        self.static_bytes = -(-size // 16) * 16
        if dynamic:
            self.shared[dynamic] = self.static_bytes
        body = ptx[ptx.index("{", head.end()) :]
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        self._read(body)
        of_blocks, of_ranks = {"mbarrier", "barrier", "wgmma", "mapa"}, "sys"
        self.is_plain = not any(
            each.operation[0] in of_blocks or of_ranks in each.operation or "bulk" in each.operation
            for each in self.statements
        )
        """Whether its threads meet at barriers of whole blocks or warps only, and wait for no other launch."""

    def _read(self, body: str) -> None:
        scopes: list[dict[str, str]] = []
        count = 0
        for piece in re.findall(
            r"[$\w]+:(?=\s*[{}])|\{(?![^{};]*\}\s*[,;])|\}(?!\s*[,;])|[^;{}]*(?:\{[^{};]*\}[^;{}]*)*;", body
        ):
            text = " ".join(piece.split())
            if text == "{":
                scopes.append({})
                continue
            if text == "}":
                scopes.pop()
                continue
            text = text.rstrip("; ")
            while match := re.match(r"([$\w]+):\s*", text):  # labels
                label = match[1]
                if len(scopes) > 1:  # of inline PTX, which may be there several times
                    if label not in scopes[-1]:
                        count += 1
                        scopes[-1][label] = f"{label}.{count}"
                    label = scopes[-1][label]
                self.labels[label] = len(self.statements)
                text = text[match.end() :]
            if not text or text.startswith((".pragma", ".loc", ".shared", ".extern")):
                continue
            if text.startswith(".reg"):
                for name in re.findall(r"[%\w]+(?=[,\s]|$|<)", text.split(None, 2)[2]):
                    if not name.startswith("%"):
                        count += 1
                        scopes[-1][name] = f"{name}.{count}"
                continue
            if len(scopes) > 1 and (match := re.search(r"\bbra ([a-z]\w*)$", text)) and match[1] not in scopes[-1]:
                count += 1
                scopes[-1][match[1]] = f"{match[1]}.{count}"  # a label that comes later
            for scope in scopes:
                for name, fresh in scope.items():
                    head, _, tail = text.partition(" ")
                    if head.startswith("@"):
                        text = re.sub(rf"(?<![\w.%$]){name}(?![\w.$])", fresh, head) + " " + tail
                        guard, _, rest = text.partition(" ")
                        operation, _, operands = rest.partition(" ")
                        operands = re.sub(rf"(?<![\w.%$]){name}(?![\w.$])", fresh, operands)
                        text = f"{guard} {operation} {operands}"
                    else:
                        text = head + " " + re.sub(rf"(?<![\w.%$]){name}(?![\w.$])", fresh, tail)
            guard, negated = "", False
            if match := re.match(r"@(!?)(\S+)\s+", text):
                guard, negated, text = match[2], bool(match[1]), text[match.end() :]
            operation, _, operands = text.partition(" ")
            self.statements.append(Statement(guard, negated, tuple(operation.split(".")), _split(operands), text))


def round_16(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 to the bits of float16 or bfloat16, to nearest even."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_16(bits: np.ndarray, kind: str) -> np.ndarray:
    """Bits of float16 or bfloat16 to float64."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
