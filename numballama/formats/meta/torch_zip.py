"""PyTorch's checkpoint files (`torch.save`, since 1.6): a zip archive of a pickle and one raw member for each storage.

Nothing in the pickle is executed. `_Unpickler` accepts some twenty operations, the classes of storages, and three
functions by name, and makes records of them; everything else is refused. It extends the pure-Python unpickler of the
standard library. In the C unpickler the memo is an array, so one operation such as `LONG_BINPUT 0x3fffffff` allocates
17 GB; in Python it is a dict.

Members of the archive are stored, not compressed, so that a tensor is a view of the mapped file.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn, TypeGuard

import numpy as np

from ...checkpoint import Weight
from ...errors import FormatError, UnsupportedError
from ...files import MappedFile
from ...quantization.types import BF16, F16, F32, WeightType
from ..tensors import TensorInfo, view_weight

MAGIC = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of files from torch.save before version 1.6: a pickle of a magic number."""

MAX_PICKLE = 1 << 19
"""Maximum size of the pickle in bytes. A model with 126 layers has 0.2 million. An operation of one byte may make an
object of 100 bytes."""
MAX_DIRECTORY = 1 << 21
"""Maximum size of the archive's directory in bytes. An entry takes about 100."""
MAX_TENSORS = 1 << 16

STORAGES: dict[str, tuple[WeightType, type[np.generic]]] = {
    "FloatStorage": (F32, np.float32),
    "HalfStorage": (F16, np.uint16),
    "BFloat16Storage": (BF16, np.uint16),
    "DoubleStorage": (F32, np.float64),
}
"""Class of a storage → the type of its weights, and its elements. float64 becomes float32."""
_ITEM_BYTES = {kind: np.dtype(element).itemsize for kind, (_, element) in STORAGES.items()} | {"IntStorage": 4}
"""Bytes of an element. Tensors of 32-bit integers are packed weights, which `view` does not return."""
_OTHER_STORAGES = ("Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat", "ComplexDouble")


def looks_like(file: MappedFile) -> bool:
    """Whether the file begins as `torch.save` writes it, now or before PyTorch 1.6."""
    return file.data[: len(MAGIC)] == MAGIC or file.data[: len(LEGACY)] == LEGACY


class TorchFile:
    """The tensors of a file, by name, without those for whose name `ignored` is true.

    Raises `FormatError` for a damaged file or a pickle that could run code, and `UnsupportedError` for unsupported
    files and tensors.
    """

    def __init__(self, file: MappedFile, ignored: Callable[[str], bool] = lambda name: False) -> None:
        self.file, self._ignored = file, ignored
        if file.data[: len(LEGACY)] == LEGACY:
            raise UnsupportedError(
                f"{file.path}: torch.save's format from before PyTorch 1.6; convert it with "
                "torch.save(torch.load(path, weights_only=True), path) in a newer one"
            )
        self._members = _members(file)
        pickles = [name for name in self._members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise self._fault("not a PyTorch checkpoint", "one member …/data.pkl", f"{len(pickles)}")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if (order := self._members.get(f"{self._prefix}byteorder")) and self._bytes(order, 16) != b"little":
            raise UnsupportedError(f"{file.path}: a big-endian checkpoint; supported are little-endian ones")
        data = self._bytes(self._members[pickles[0]], MAX_PICKLE)
        self.tensors: dict[str, TensorInfo] = dict(self._infos(_unpickle(file, data)))

    def view(self, name: str) -> Weight:
        """The tensor: a matrix as a view of the file, a vector, which is small, as float32."""
        info = self.tensors[name]
        return view_weight(info, info.shape, STORAGES)

    def _fault(self, message: str, expected: object, found: object, where: str | int | None = None) -> FormatError:
        return FormatError(message, path=self.file.path, where=where, expected=expected, found=found)

    def _bytes(self, member: _Member, limit: int) -> bytes:
        if member.size > limit:
            raise self._fault("a member is too long", f"at most {limit:,} bytes", f"{member.size:,}", member.offset)
        return self.file.data[member.offset : member.offset + member.size]

    def _infos(self, table: object) -> Iterator[tuple[str, TensorInfo]]:
        """The tensors of a table, or of the only table of tensors in it: "state_dict", "model" of training programs.

        Numbers and texts beside them, such as a count of steps, are no weights.
        """
        if not isinstance(table, dict):
            raise self._fault("the pickle is not a table of tensors", "a dict", type(table).__name__)
        if not _tensors_in(table):
            inner = [each for each in table.values() if isinstance(each, dict) and _tensors_in(each)]
            table = inner[0] if len(inner) == 1 else table
        if len(table) > MAX_TENSORS:
            raise self._fault("too many tensors", f"at most {MAX_TENSORS:,}", f"{len(table):,}")
        beside = (int, float, str, type(None)) if _tensors_in(table) else ()
        for name, tensor in table.items():
            if isinstance(name, str) and isinstance(tensor, beside):
                continue
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise self._fault(
                    "the pickle is not a table of tensors", "a name for each tensor", type(tensor).__name__,
                    f"key {str(name)[:100]}",
                )  # fmt: skip
            if not self._ignored(name):
                yield name, self._info(name, tensor)

    def _info(self, name: str, tensor: _Tensor) -> TensorInfo:
        """Position of the tensor in the file, and its strides if it is not in C order within its storage."""
        storage, where = tensor.storage, f"tensor {name[:100]}"
        if storage.kind not in _ITEM_BYTES:
            raise UnsupportedError(
                f"{self.file.path}: {where} is a {storage.kind}; supported are {', '.join(STORAGES)}"
            )
        numel, step, span, other = math.prod(tensor.shape), 1, 1, False
        for stride, extent in zip(reversed(tensor.strides), reversed(tensor.shape), strict=True):
            if extent > 1:
                other, span = other or stride != step, span + (extent - 1) * stride
            step *= extent
        span = span if other else numel
        if other and (span < numel or not numel or storage.kind == "IntStorage"):
            raise UnsupportedError(
                f"{self.file.path}: {where} repeats its elements, or is packed in another order: save it with "
                ".contiguous()"
            )
        if (member := self._members.get(f"{self._prefix}data/{storage.key}")) is None:
            raise self._fault("the storage of a tensor is missing", f"member data/{storage.key[:50]}", "none", where)
        item = _ITEM_BYTES[storage.kind]
        capacity = member.size // item
        if tensor.start + span > capacity:
            raise self._fault(
                "a tensor does not fit its storage", f"at most {capacity:,} elements",
                f"{tensor.start:,} + {span:,}", where,
            )  # fmt: skip
        offset = member.offset + tensor.start * item
        order = tensor.strides if other else ()
        return TensorInfo(self.file, name, storage.kind, tensor.shape, offset, span * item, order)


def _tensors_in(table: dict[object, object]) -> bool:
    return any(isinstance(value, _Tensor) for value in table.values())


# ---- the archive ----


@dataclass(frozen=True)
class _Member:
    """Position and size of a member's bytes in the file."""

    offset: int
    size: int


class _ArchiveReader:
    """The mapped file, for `zipfile`, which reads the whole directory at once and trusts its size."""

    def __init__(self, file: MappedFile) -> None:
        self._data, self._size, self._at = file.data, file.size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError("an offset before the file")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        rest = max(self._size - self._at, 0)
        size = rest if size is None or size < 0 else min(size, rest)
        if size > MAX_DIRECTORY:
            raise OSError(f"a directory of {size:,} bytes, more than {MAX_DIRECTORY:,}")
        self._at += size
        return self._data[self._at - size : self._at]


def _members(file: MappedFile) -> dict[str, _Member]:
    """Name → position of every member. Checks that members are uncompressed, distinct, in the file and disjoint."""

    def fault(message: object, where: int | None = None) -> FormatError:
        return FormatError(f"a damaged zip archive: {message}", path=file.path, where=where)

    try:
        with zipfile.ZipFile(_ArchiveReader(file)) as archive:  # type: ignore[call-overload]
            entries: list[zipfile.ZipInfo] = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, IndexError, struct.error, NotImplementedError) as error:
        raise fault(f"{str(error)[:100]}; is the file cut short?") from None
    if not entries:
        raise fault("it has no members")
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        raise FormatError(
            "not a PyTorch checkpoint",
            path=file.path,
            expected="one member …/data.pkl",
            found="a zip archive of other files: unpack it",
        )
    members: dict[str, _Member] = {}
    for entry in entries:
        name, at = entry.filename, entry.header_offset
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise fault(f"member {name[:80]} is compressed or encrypted", at)
        if name in members:
            raise fault(f"member {name[:80]} occurs twice", at)
        if not 0 <= at <= file.size - zipfile.sizeFileHeader or file.data[at : at + len(MAGIC)] != MAGIC:  # type: ignore[attr-defined]
            raise fault(f"no member {name[:80]}", max(min(at, file.size), 0))
        name_size, extra_size = struct.unpack_from("<HH", file.data, at + 26)  # may differ from the directory's
        offset = at + zipfile.sizeFileHeader + name_size + extra_size  # type: ignore[attr-defined]
        if entry.file_size > file.size - offset:
            raise fault(f"member {name[:80]} lies beyond the end", at)
        members[name] = _Member(offset, entry.file_size)
    for before, after in pairwise(sorted(entries, key=lambda entry: entry.header_offset)):
        member = members[before.filename]
        if member.offset + member.size > after.header_offset:
            raise fault(f"members {before.filename[:80]} and {after.filename[:80]} overlap", after.header_offset)
    return members


# ---- the pickle ----


@dataclass(frozen=True)
class _StorageType:
    kind: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    start: int
    """Elements before the tensor in its storage."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RefusedError(Exception):
    """The pickle contains something that could run code."""


def _rebuild_tensor(storage: object, start: object, shape: object, strides: object, *_: object) -> _Tensor:
    numbers = _naturals((start,)) and _naturals(shape) and _naturals(strides)
    if not isinstance(storage, _Storage) or not numbers or len(shape) != len(strides):  # type: ignore[arg-type]
        raise ValueError("a tensor must have a storage and whole numbers")
    return _Tensor(storage, start, shape, strides)  # type: ignore[arg-type]


def _rebuild_parameter(tensor: object, *_: object) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise ValueError("a parameter without a tensor")
    return tensor


def _ordered_dict() -> dict[object, object]:
    return {}


def _naturals(value: object) -> TypeGuard[tuple[int, ...]]:
    """Whether the value is a tuple of at most 8 ints that are not negative."""
    return isinstance(value, tuple) and len(value) <= 8 and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


_GLOBALS: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): _ordered_dict,
    **{("torch", kind): _StorageType(kind) for kind in STORAGES},
    **{("torch", f"{kind}Storage"): _StorageType(f"{kind}Storage") for kind in _OTHER_STORAGES},
}
"""(module, name) in a pickle → replacement here."""

_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2,
    pickle.TUPLE3, pickle.APPEND, pickle.APPENDS, pickle.GLOBAL, pickle.BINPERSID, pickle.REDUCE, pickle.MEMOIZE,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.BININT, pickle.BININT1,
    pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
)  # fmt: skip
"""Operations that are inherited from the standard unpickler; `_Unpickler` adds four. All others are refused, among
them INST, OBJ, NEWOBJ and EXT, which can name or call other objects.
"""


class _Dispatch(dict[int, Callable[[Any], None]]):
    """Operation → method. Raises for other operations, with their name."""

    def __missing__(self, code: int) -> NoReturn:
        names = (name for name in pickle.__all__ if getattr(pickle, name) == bytes([code]))
        raise _RefusedError(f"the operation {next(names, hex(code))}")


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Makes records of tensors, without calling or importing what the pickle names."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _GLOBALS:
            raise _RefusedError(f"{module}.{name}")
        return _GLOBALS[module, name]

    def load_stack_global(self) -> None:
        """Protocol 4's GLOBAL, whose two texts lie on the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global whose name is no text")
        self.stack.append(self.find_class(module, name))

    def persistent_load(self, pid: object) -> _Storage:
        """`pid` is ("storage", its class, the name of its member, a device, the number of elements)."""
        if not isinstance(pid, tuple) or len(pid) < 3:
            raise ValueError("a persistent id that is no storage")
        what, kind, key = pid[:3]
        if not isinstance(what, str) or what != "storage" or not isinstance(kind, _StorageType):
            raise ValueError("a persistent id that is no storage")
        if not isinstance(key, str):
            raise ValueError("a storage without the name of its member")
        return _Storage(kind.kind, key)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: Sequence[object]) -> None:
        """Accept only strings and numbers as keys: hashing a tuple that is nested a million times crashes Python."""
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("no dict to add to")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise ValueError("a key that is no string")
            target[key] = value

    def load_build(self) -> None:
        """Drop the attributes of an OrderedDict, such as the `_metadata` of a state_dict."""
        self.stack.pop()

    dispatch = _Dispatch({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES})  # type: ignore[attr-defined]
    dispatch[pickle.STACK_GLOBAL[0]] = load_stack_global
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build


def _unpickle(file: MappedFile, data: bytes) -> object:
    stream = io.BytesIO(data)
    try:
        return _Unpickler(stream).load()
    except _RefusedError as error:
        raise FormatError(
            "the pickle asks for more than tensors, which is refused: it might run code",
            path=file.path,
            where="data.pkl",
            expected="dicts of tensors",
            found=str(error)[:100],
        ) from None
    except (
        pickle.UnpicklingError, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, EOFError,
        struct.error,
    ) as error:  # fmt: skip
        where = f"before byte {stream.tell():,} of data.pkl"
        raise FormatError(f"a damaged pickle: {str(error)[:100]}", path=file.path, where=where) from None
