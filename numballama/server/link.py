"""`Link`: messages between the engine's process and one for HTTP, over a Unix socket. `SharedCounts`: what both see.

A message is a head of JSON and a tail of numbers, each with its length before it. There is one for each step of the
engine and HTTP process, whatever the number of tokens. Only processes of one server hold the ends of the socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import socket
import struct
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import ContextError, DeviceError, Error, FormatError, UnsupportedError
from ..structured.constraint import GrammarError
from .service import Counts

Head = dict[str, Any]
"""The head of a message: JSON."""

_LENGTHS = struct.Struct("<II")
_AT_ONCE = 1 << 18
"""Bytes that are read at a time."""
_BUFFER = 4 << 20
"""Bytes that a socket is asked to hold."""
_LOCKED_WITHIN_S = 0.05
"""Seconds that a request waits to be counted: another process may have been stopped while it counted one."""
_TRY_S = 0.0001
"""Seconds between two tries."""
_dumps = json.JSONEncoder(separators=(",", ":")).encode
_ERRORS: dict[str, type[Exception]] = {
    each.__name__: each for each in (Error, UnsupportedError, DeviceError, ContextError, GrammarError)
}
"""Errors that are the same in the other process."""


def pack(head: Head, tail: Sequence[int] = ()) -> bytes:
    """A message. `tail`: numbers of 64 bits."""
    text = _dumps(head).encode() if head else b""
    numbers = array("q", tail).tobytes()
    return _LENGTHS.pack(len(text), len(numbers)) + text + numbers


class Link:
    """One end of the socket. `send` never waits, from any thread; what the other end is slow to read is kept."""

    def __init__(self, end: socket.socket, name: str) -> None:
        self.socket, self.name = end, name
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self._lock = threading.Lock()
        self._kept = bytearray()  # what a thread sends, while there is something
        self._sender: threading.Thread | None = None  # that thread, the latest
        self._read = bytearray()
        self.closed = False
        """Whether the other end is gone."""

    def send(self, message: bytes) -> None:
        """Send what `pack` has made. Does nothing when the other end is gone."""
        with self._lock:
            if self._kept:
                self._kept += message
                return
            try:
                sent = 0 if self.closed else self.socket.send(message, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.closed = True
            if self.closed or sent == len(message):
                return
            self._kept += message[sent:]
            sender = threading.Thread(target=self._send_kept, name="numballama link", daemon=True)
            try:
                sender.start()
                self._sender = sender
            except RuntimeError:  # a limit of the system: the engine goes on for others
                self._kept.clear()
                self.closed = True

    def _send_kept(self) -> None:
        while True:
            with self._lock:
                part = bytes(self._kept)
            try:
                self.socket.sendall(part)
            except OSError:
                self.closed = True
            with self._lock:
                del self._kept[: len(part)]
                if self.closed or not self._kept:
                    self._kept.clear()
                    return

    def receive(self, flags: int = 0) -> Iterator[tuple[Head, Sequence[int]]]:
        """(head, tail) of the messages that are there. Waits for a part of one, unless `flags` say otherwise.

        Sets `closed` at the end of the other process.
        """
        data, place = self._read, 0
        try:
            part = self.socket.recv(_AT_ONCE, flags)
            data += part
            self.closed = self.closed or not part
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        try:
            while len(data) - place >= _LENGTHS.size:
                head, tail = _LENGTHS.unpack_from(data, place)
                begin = place + _LENGTHS.size
                if len(data) - begin < head + tail:
                    break
                place = begin + head + tail
                yield (
                    json.loads(data[begin : begin + head]) if head else {},
                    array("q", bytes(data[begin + head : place])) if tail else (),
                )
        finally:
            del data[:place]

    def receive_one(self) -> Head | None:
        """The head of a message that comes alone. None: the other end is gone."""
        while not self.closed:
            for head, _ in self.receive():
                return head
        return None

    def close(self) -> None:
        """End it, for the other process too."""
        self.closed = True
        with contextlib.suppress(OSError):  # the other end is gone
            self.socket.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Close the socket, when nobody reads from it."""
        self.close()
        if self._sender is not None:
            self._sender.join()  # it could send to another socket, which gets the same number
        with self._lock:
            self.socket.close()


def error_as_json(error: BaseException) -> list[str]:
    """[name, message] of an error, for `error_of`."""
    if isinstance(error, FormatError):
        return [Error.__name__, str(error)]
    name = next((each.__name__ for each in type(error).__mro__ if each.__name__ in _ERRORS), "")
    return [name, str(error) if name else f"{type(error).__name__}: {error}"]


def error_of(found: Sequence[str]) -> Exception:
    """The error that another process has raised. An unexpected one becomes a `RuntimeError`."""
    name, message = found
    return _ERRORS.get(name, RuntimeError)(message)


class SharedCounts(Counts):
    """`Counts` in memory that processes share. Each writes numbers of its own."""

    def __init__(self, file: int, process: int, processes: int) -> None:
        self._file = file
        self._map = mmap.mmap(file, self.size(processes))
        self._cells = memoryview(self._map).cast("q")
        self._process = process

    @staticmethod
    def size(processes: int) -> int:
        """Bytes of the memory."""
        return 16 * processes

    def add(self, sequences: int, tokens: int) -> None:
        self._cells[2 * self._process] += sequences
        self._cells[2 * self._process + 1] += tokens

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """A block that one process at a time is in, unless one stays in it longer than others can wait.

        The lock is the system's, which frees it when a process ends, however that was.
        """
        end = time.monotonic() + _LOCKED_WITHIN_S
        while True:
            with contextlib.suppress(BlockingIOError, PermissionError):  # another process has it
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() >= end:
                yield
                return
            time.sleep(_TRY_S)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Use them no more."""
        self._cells.release()
        self._map.close()

    def clear(self, process: int) -> None:
        """A process has ended."""
        self._cells[2 * process] = self._cells[2 * process + 1] = 0

    @property
    def here(self) -> int:
        return self._cells[2 * self._process]

    @property
    def sequences(self) -> int:
        return sum(self._cells[::2])

    @property
    def tokens(self) -> int:
        return sum(self._cells[1::2])
