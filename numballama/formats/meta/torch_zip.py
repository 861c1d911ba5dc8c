"""PyTorch's checkpoint files (`torch.save`, since 1.6): a zip archive of a pickle and one raw member for each storage.

Nothing of the pickle is executed. The standard library's table of its operations takes it apart, and a machine that
knows lists, dicts, tuples and three functions by name turns it into records; whatever else it names is refused.
Members are stored, not compressed, so that a tensor is a view of the mapping.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...checkpoint import Weight
from ...errors import FormatError, UnsupportedError
from ...files import MappedFile
from ...quantization.convert import convert
from ...quantization.types import BF16, F16, F32, WeightType

MAGIC = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of what torch.save wrote before version 1.6: a pickle of a magic number."""

MAX_PICKLE, MAX_MEMBERS, MAX_TENSORS = 1 << 20, 1 << 16, 1 << 16
"""Bytes of the pickle (a model of 126 layers takes 0.2 MB), members of the archive, and tensors."""

_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_CENTRAL, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_MANY = 0xFFFFFFFF

_STORAGES: dict[str, tuple[WeightType, type[np.generic]]] = {
    "FloatStorage": (F32, np.float32),
    "HalfStorage": (F16, np.uint16),
    "BFloat16Storage": (BF16, np.uint16),
}
_OTHER_STORAGES = ("Double", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat", "ComplexDouble")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: `numel` numbers of storage `key`, whose type is `kind`, from number `start`, in C order."""

    name: str
    kind: str
    key: str
    start: int
    shape: tuple[int, ...]


class TorchFile:
    """The tensors of a file, by name. Raises `FormatError` for a damaged file or one that wants code to run, and
    `UnsupportedError` for kinds of files and tensors that are not read.
    """

    def __init__(self, file: MappedFile) -> None:
        self.file = file
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
        self.tensors: dict[str, TensorInfo] = dict(self._named(_Machine(file, data).result))

    def _fault(self, message: str, expected: object, found: object, where: str | int | None = None) -> FormatError:
        return FormatError(message, path=self.file.path, where=where, expected=expected, found=found)

    def _bytes(self, place: tuple[int, int], most: int) -> bytes:
        offset, size = place
        if size > most:
            raise self._fault("a member is too long", f"at most {most:,} bytes", f"{size:,}", offset)
        return self.file.data[offset : offset + size]

    def _named(self, result: object) -> Iterator[tuple[str, TensorInfo]]:
        if not isinstance(result, dict):
            raise self._fault("the pickle is no table of tensors", "a dict", type(result).__name__)
        if len(result) > MAX_TENSORS:
            raise self._fault("too many tensors", f"at most {MAX_TENSORS:,}", f"{len(result):,}")
        for name, tensor in result.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise self._fault(
                    "the pickle is no table of tensors", "a name for each tensor", f"{type(tensor).__name__}"
                )
            yield name, self._checked(name, tensor)

    def _checked(self, name: str, tensor: _Tensor) -> TensorInfo:
        """A tensor that lies within its storage, row after row."""
        storage, where = tensor.storage, f"tensor {name[:100]}"
        if storage.kind not in _STORAGES:
            raise UnsupportedError(
                f"{self.file.path}: {where} is a {storage.kind}; supported are {', '.join(_STORAGES)}"
            )
        strides, step = list[int](), 1
        for extent in reversed(tensor.shape):
            strides.insert(0, step)
            step *= extent
        wanted = [stride for stride, extent in zip(strides, tensor.shape, strict=True) if extent > 1]
        if wanted != [stride for stride, extent in zip(tensor.strides, tensor.shape, strict=True) if extent > 1]:
            raise UnsupportedError(f"{self.file.path}: {where} does not lie in C order")
        if (place := self._members.get(f"{self._prefix}data/{storage.key}")) is None:
            raise self._fault("the storage of a tensor is missing", f"member data/{storage.key[:50]}", "none", where)
        held = place[1] // _STORAGES[storage.kind][0].nbytes(1)
        if tensor.start + math.prod(tensor.shape) > held:
            raise self._fault(
                "a tensor does not fit its storage", f"at most {held:,} numbers",
                f"{tensor.start:,} + {math.prod(tensor.shape):,}", where,
            )  # fmt: skip
        return TensorInfo(name, storage.kind, storage.key, tensor.start, tensor.shape)

    def view(self, name: str) -> Weight:
        """The tensor: a matrix as a view, a vector, which is small, as float32."""
        info = self.tensors[name]
        kind, element = _STORAGES[info.kind]
        offset = self._members[f"{self._prefix}data/{info.key}"][0] + info.start * kind.nbytes(1)
        data = np.frombuffer(self.file.data, element, math.prod(info.shape), offset)
        weight = Weight(info.shape, kind, data.reshape(info.shape))
        return weight if len(info.shape) == 2 else convert(weight, F32)


# ---- the archive ----


def _members(file: MappedFile) -> dict[str, tuple[int, int]]:
    """Name → (offset, size) of every member. Nothing is believed before it is compared with the file's size."""
    size, data = file.size, file.data

    def fault(message: str, where: int) -> FormatError:
        return FormatError(f"a damaged zip archive: {message}", path=file.path, where=where)

    def unpack(kind: struct.Struct, at: int, magic: bytes, what: str) -> tuple[Any, ...]:
        if not 0 <= at <= size - kind.size or data[at : at + 4] != magic:
            raise fault(f"no {what}", max(min(at, size), 0))
        return kind.unpack_from(data, at)

    end = size - _END.size
    _, _, _, _, count, length, start, _ = unpack(_END, end, b"PK\x05\x06", "end of the directory; cut short?")
    if count == 0xFFFF or _MANY in (length, start):
        at = unpack(_LOCATOR64, end - _LOCATOR64.size, b"PK\x06\x07", "zip64 locator")[2]
        *_, count, length, start = unpack(_END64, at, b"PK\x06\x06", "zip64 end of the directory")
    if count > MAX_MEMBERS or start > end or length > end - start:
        raise fault(f"a directory of {count:,} members in {length:,} bytes", end)
    found: dict[str, tuple[int, int]] = {}
    at = start
    for _ in range(count):
        fields = unpack(_CENTRAL, at, b"PK\x01\x02", "directory entry")
        flags, method, packed, plain = fields[3], fields[4], fields[8], fields[9]
        name_size, extra_size, note_size, local = fields[10], fields[11], fields[12], fields[16]
        extra_at = at + _CENTRAL.size + name_size
        name = data[at + _CENTRAL.size : extra_at].decode("utf-8", "replace")
        plain, packed, local = _wide(data[extra_at : extra_at + extra_size], plain, packed, local)
        if method or flags & 1 or plain != packed:
            raise fault(f"member {name[:80]} is compressed or encrypted", at)
        own = unpack(_LOCAL, local, MAGIC, f"member {name[:80]}")
        offset = local + _LOCAL.size + own[9] + own[10]
        if offset > size or plain > size - offset:
            raise fault(f"member {name[:80]} lies beyond the end", at)
        if name in found:
            raise fault(f"member {name[:80]} is there twice", at)
        found[name] = offset, plain
        at = extra_at + extra_size + note_size
    return found


def _wide(extra: bytes, *values: int) -> list[int]:
    """The values, those of 2^32 - 1 from the zip64 part of an entry's extra bytes."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            return [next(wide, value) if value == _MANY else value for value in values]
        at += 4 + length
    return list(values)


# ---- the pickle ----


@dataclass(frozen=True)
class _Name:
    """Something of a module, named and never looked up."""

    text: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_REBUILD = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED = "collections OrderedDict"
_KNOWN = {_REBUILD, _PARAMETER, _ORDERED}
_KNOWN |= {f"torch {kind}" for kind in _STORAGES} | {f"torch {kind}Storage" for kind in _OTHER_STORAGES}

_MARK = object()
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


class _Machine:
    """A pickle's stack machine without the power to call anything."""

    def __init__(self, file: MappedFile, data: bytes) -> None:
        self._file, self._stack, self._memo = file, list[Any](), dict[int, Any]()
        self.result: Any = None
        place, code, stream = 0, b"", io.BytesIO(data)
        try:
            while code != b".":
                place = stream.tell()
                if not (code := stream.read(1)):
                    raise ValueError("it ends without its last operation")
                opcode = _OPCODES[code]
                if (action := _ACTIONS.get(opcode.name)) is None:
                    raise self._refused(f"the operation {opcode.name}")
                if opcode.name == "GLOBAL":  # the library's reader takes escapes apart, with warnings
                    action(self, f"{stream.readline()[:-1].decode('ascii')} {stream.readline()[:-1].decode('ascii')}")
                else:
                    action(self, opcode.arg.reader(stream) if opcode.arg else None)
        except FormatError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            text = str(error)[:100]
            raise FormatError(f"a damaged pickle: {text}", path=file.path, where=f"byte {place} of data.pkl") from None

    def _refused(self, what: str) -> FormatError:
        return FormatError(
            "the pickle asks for more than tensors, which is refused: it might run code",
            path=self._file.path,
            where="data.pkl",
            expected="dicts of tensors",
            found=what[:100],
        )

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if (value := self._stack.pop()) is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"no {kind.__name__} to add to")
        return self._stack[-1]

    def after_mark(self) -> list[Any]:
        """What was pushed since the last mark, taken off with it."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    def several(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise ValueError("a key that is no string")
            target[key] = value

    def name(self, text: str) -> None:
        if text not in _KNOWN:
            raise self._refused(text.replace(" ", "."))
        self.push(_Name(text))

    def storage(self) -> None:
        """A persistent id: ("storage", its class, its member's name, a device, how many numbers)."""
        what, kind, key, *_ = self.pop()
        if what != "storage" or not isinstance(kind, _Name) or not isinstance(key, str):
            raise ValueError("a persistent id that is no storage")
        self.push(_Storage(kind.text.rpartition(" ")[2], key))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no name")
        if function.text == _ORDERED and not arguments:
            self.push({})
        elif function.text == _PARAMETER and arguments and isinstance(arguments[0], _Tensor):
            self.push(arguments[0])
        elif function.text == _REBUILD:
            storage, start, shape, strides, *_ = arguments
            if not isinstance(storage, _Storage) or not _naturals((start,), shape, strides):
                raise ValueError("a tensor of other parts than a storage and whole numbers")
            self.push(_Tensor(storage, start, shape, strides))
        else:
            raise self._refused(f"a call of {function.text.replace(' ', '.')}")

    def stop(self) -> None:
        self.result = self.pop()


def _naturals(*values: Any) -> bool:
    return all(
        isinstance(value, tuple)
        and len(value) <= 8
        and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
        for value in values
    ) and len(values[-1]) == len(values[-2])


_ACTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda m, x: None,
    "FRAME": lambda m, x: None,
    "STOP": lambda m, x: m.stop(),
    "MARK": lambda m, x: m.push(_MARK),
    "NONE": lambda m, x: m.push(None),
    "NEWTRUE": lambda m, x: m.push(True),
    "NEWFALSE": lambda m, x: m.push(False),
    "EMPTY_DICT": lambda m, x: m.push({}),
    "EMPTY_LIST": lambda m, x: m.push([]),
    "EMPTY_TUPLE": lambda m, x: m.push(()),
    "TUPLE": lambda m, x: m.push(tuple(m.after_mark())),
    "TUPLE1": lambda m, x: m.several(1),
    "TUPLE2": lambda m, x: m.several(2),
    "TUPLE3": lambda m, x: m.several(3),
    "APPEND": lambda m, x: (value := m.pop(), m.top(list).append(value)),
    "APPENDS": lambda m, x: (values := m.after_mark(), m.top(list).extend(values)),
    "SETITEM": lambda m, x: m.set_item(),
    "SETITEMS": lambda m, x: m.set_items(m.after_mark()),
    "BUILD": lambda m, x: m.pop(),  # attributes of an OrderedDict: a state_dict's _metadata
    "GLOBAL": lambda m, x: m.name(x),
    "BINPERSID": lambda m, x: m.storage(),
    "REDUCE": lambda m, x: m.reduce(),
    "MEMOIZE": lambda m, x: m._memo.__setitem__(len(m._memo), m._stack[-1]),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, x: m._memo.__setitem__(x, m._stack[-1])),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, x: m.push(m._memo[x])),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
        lambda m, x: m.push(x),
    ),
}
"""Operation → what it does to the machine; the rest, STACK_GLOBAL, INST, OBJ, NEWOBJ and EXT among them, is refused."""
