"""GGUF files for tests: small models, and containers built by hand."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from numballama.checkpoint import Weight
from numballama.config import ModelConfig
from numballama.files import map_file
from numballama.formats.gguf.header import TENSOR_TYPES, Header
from numballama.formats.gguf.writer import write_gguf
from numballama.quantization.convert import convert
from numballama.quantization.types import BF16, BLOCKS, F16, F32, Q4_0, Q4_1, Q8_0, WeightType
from numballama.tokenizers.base import PieceType, Vocabulary
from numballama.tokenizers.gguf import GgufTokenizer
from tests.helpers.random_models import random_checkpoint

CONFIG = ModelConfig(32, 64, 2, 4, 2, 300, 16, tied_embeddings=False)
TYPES = {"F32": F32, "F16": F16, "BF16": BF16, "Q8_0": Q8_0, "Q4_0": Q4_0, "Q4_1": Q4_1}


def weights_of(config: ModelConfig, kind: WeightType = F32, seed: int = 0) -> dict[str, Weight]:
    weights = random_checkpoint(config, seed).weights
    return {name: convert(w, kind) if len(w.shape) == 2 else w for name, w in weights.items()}


HALVES = {
    "q8_0": ((0,), 127),
    "q4_0": ((0,), 8),
    "q4_1": ((0, 2), 15),
    "q5_0": ((0,), 16),
    "q5_1": ((0, 2), 31),
    "q2_k": ((80, 82), 3 * 15),
    "q3_k": ((108,), 4 * 32),
    "q4_k": ((0, 2), 15 * 63),
    "q5_k": ((0, 2), 31 * 63),
    "q6_k": ((208,), 32 * 128),
    "iq4_nl": ((0,), 127),
    "iq4_xs": ((0,), 127 * 32),
}
"""Block type → where in a block its float16 factors lie, and the most that they are multiplied with."""


def random_blocks(
    name: str,
    rows: int,
    count: int,
    rng: np.random.Generator,
    extreme: float = 0.0,
    odd: bool = False,
    size: float = 1.0,
) -> Weight:
    """Rows of blocks of any payload, with factors that make numbers of about `size` and, once, `extreme`."""
    numbers, nbytes = BLOCKS[name]
    places, most = HALVES[name]
    memory = rng.integers(0, 256, rows * count * nbytes + 1, np.uint8)
    data = memory[odd : len(memory) - 1 + odd].reshape(rows * count, nbytes)
    for at in places:
        factors = (rng.standard_normal(rows * count) * size / most).astype(np.float16)
        factors[rng.integers(factors.size)] = extreme
        data[:, at : at + 2] = factors[:, None].view(np.uint8)
    return Weight((rows, count * numbers), WeightType(name), data.reshape(rows, -1))


def letters(size: int) -> GgufTokenizer:
    """Ids 0 to 2 unknown, BOS and EOS, all bytes, then the letters and made-up pieces."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), "▁".encode()]
    pieces += [bytes([byte]) for byte in b"abcdefghijklmnopqrstuvwxyz"]
    pieces += [b"piece%d" % index for index in range(size - len(pieces))]
    types = [PieceType.UNKNOWN, *[PieceType.CONTROL] * 2, *[PieceType.BYTE] * 256]
    types += [PieceType.NORMAL] * (size - len(types))
    return GgufTokenizer(Vocabulary(pieces, [-float(token) for token in range(size)], types, 1, 2, 0))


def save(path: Path, config: ModelConfig = CONFIG, kind: WeightType = F32, **more: Any) -> Path:
    write_gguf(path, config, weights_of(config, kind), **more)
    return path


# ---- files by hand ----

U32, F32_, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def container(
    entries: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3, align: int = 32
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries + tensors)
    return head + bytes(-len(head) % align) + data


def entries_of(data: bytes) -> dict[str, tuple[int, int]]:
    """Key → (begin, end) of its metadata entry, found by a parser of this test's own."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    at, found = 24, {}

    def skip_string(at: int) -> int:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])

    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        start, at = at, skip_string(at)
        key = data[start + 8 : at].decode()
        kind, items = struct.unpack_from("<I", data, at)[0], 1
        at += 4
        if kind == ARRAY:
            kind, items = struct.unpack_from("<IQ", data, at)
            at += 12
        if kind == STRING:
            for _ in range(items):
                at = skip_string(at)
        else:
            at += items * sizes[kind]
        found[key] = start, at
    return found


def edited(path: Path, changes: Mapping[str, bytes | None], drop: str = "", extra: tuple[bytes, ...] = ()) -> bytes:
    """The file with metadata entries replaced, added or left out (None), without tensor `drop`, with `extra` ones."""
    header, data = Header(map_file(path)), path.read_bytes()
    entries: dict[str, bytes | None] = {key: data[start:end] for key, (start, end) in entries_of(data).items()}
    kinds = {name: number for number, (name, *_) in TENSOR_TYPES.items()}
    infos = [
        tensor(t.name, list(t.shape[::-1]), kinds[t.type], t.offset - header.data_offset)
        for t in header.tensors.values()
        if t.name != drop
    ]
    kept = [value for value in (entries | dict(changes)).values() if value]
    return container(kept, [*infos, *extra], data[header.data_offset :])


def u32(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def f32(key: str, value: float) -> bytes:
    return entry(key, F32_, struct.pack("<f", value))


def split(path: Path, parts: int, stem: str = "model") -> list[Path]:
    """Write the tensors of a file into `parts` files beside it, as gguf-split does: metadata in the first."""
    header, data = Header(map_file(path)), path.read_bytes()
    entries = [data[start:end] for start, end in entries_of(data).values()]
    kinds = {name: number for number, (name, *_) in TENSOR_TYPES.items()}
    tensors = list(header.tensors.values())
    paths = []
    for index in range(parts):
        own = tensors[index * len(tensors) // parts : (index + 1) * len(tensors) // parts]
        numbers = [
            entry("split.no", 2, struct.pack("<H", index)),
            entry("split.count", 2, struct.pack("<H", parts)),
            entry("split.tensors.count", 5, struct.pack("<i", len(tensors))),
        ]
        infos, payload = [], b""
        for info in own:
            infos.append(tensor(info.name, list(info.shape[::-1]), kinds[info.type], len(payload)))
            payload += data[info.offset : info.offset + info.nbytes]
            payload += bytes(-len(payload) % 32)
        paths.append(path.with_name(f"{stem}-{index + 1:05}-of-{parts:05}.gguf"))
        paths[-1].write_bytes(container(numbers + (entries if index == 0 else []), infos, payload))
    return paths
