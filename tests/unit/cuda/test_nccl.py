"""The binding of NCCL: where it is looked for, what is passed to it, and how waits end. The library is a stand-in."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from numballama.cuda import nccl
from numballama.cuda.launch import Array, Collective
from numballama.cuda.nccl import Communicator, Library, PreparedCollective
from numballama.errors import DeviceError
from tests.helpers.fake_nccl import FakeNccl

STREAM = 77


@pytest.fixture(autouse=True)
def nothing_loaded() -> None:
    nccl.load.cache_clear()


def wheel(folder: Path, text: str = "no library") -> Path:
    """A folder like that of NVIDIA's wheel."""
    path = folder / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_the_wheel_comes_before_what_the_system_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = wheel(tmp_path), list[str]()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(path) in nccl.places() and nccl.places()[-1] == "libnccl.so.2"

    def load(place: str) -> FakeNccl:
        opened.append(place)
        return FakeNccl()

    monkeypatch.setattr(ctypes, "CDLL", load)
    found = nccl.load()
    assert opened == [str(path)] == [found.place] and found.version == "2.28.5"
    assert nccl.load() is found


def test_the_system_is_asked_without_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "places", lambda: ["/nowhere/libnccl.so.2", "libnccl.so.2"])
    monkeypatch.setattr(ctypes, "CDLL", lambda place: FakeNccl(23203))
    assert (nccl.load().place, nccl.load().version) == ("libnccl.so.2", "2.32.3")


def test_a_library_that_is_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names all places, why one was of no use, and the package."""
    path = wheel(tmp_path)
    monkeypatch.setattr(nccl, "places", lambda: ["/nowhere/libnccl.so.2", str(path), "libnccl_absent.so.2"])
    places = r"looked for /nowhere/libnccl.so.2, .*libnccl.so.2 \(.*too short.*absent"
    with pytest.raises(DeviceError, match=rf"not found; {places}.*pip install nvidia-nccl-cu13"):
        nccl.load()


def test_the_library_that_is_installed() -> None:
    """Without a GPU it gives its version, and ids."""
    try:
        library = nccl.load()
    except DeviceError as error:
        pytest.skip(str(error))
    assert tuple(map(int, library.version.split("."))) >= (2, 9, 0)
    assert len({library.unique_id() for _ in range(2)}) == 2


@pytest.mark.parametrize(("code", "text"), [(23203, "2.32.3"), (22805, "2.28.5"), (2804, "2.8.4"), (20903, "2.9.3")])
def test_versions(code: int, text: str) -> None:
    assert nccl.version_text(code) == text


def test_a_library_that_is_too_old() -> None:
    with pytest.raises(DeviceError, match=r"here is NCCL 2.8.4, 2.9.0 or newer is needed: pip install"):
        Library(FakeNccl(2804), "here")
    with pytest.raises(DeviceError, match=r"here is not NCCL, or too old \(.*ncclGetVersion"):
        Library(SimpleNamespace(), "here")


def test_an_error_has_the_librarys_words() -> None:
    fake = FakeNccl()
    library = Library(fake, "here")
    fake.failing["ncclGetUniqueId"] = 2
    with pytest.raises(DeviceError, match=r"^NCCL: ncclGetUniqueId: fake error 2: what was last$"):
        library.unique_id()
    del fake.ncclGetLastError  # before 2.13
    with pytest.raises(DeviceError, match=r"^NCCL: ncclGetUniqueId: fake error 2$"):
        library.unique_id()


def test_types_of_all_arguments_are_declared() -> None:
    """Without them ctypes passes addresses as 32 bits."""
    library = Library(FakeNccl(), "here")
    assert library._loaded.ncclAllReduce.argtypes[:3] == (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    assert library._loaded.ncclAllReduce.argtypes[-1] == ctypes.c_void_p
    assert library._loaded.ncclCommInitRank.argtypes[2] is nccl.UniqueId and ctypes.sizeof(nccl.UniqueId) == 128
    assert library._loaded.ncclGetErrorString.restype is ctypes.c_char_p


def on_all(action: Callable[[Communicator], Any], ranks: int = 2) -> tuple[list[Any], list[FakeNccl]]:
    """What an action gives on each rank, each in a thread, and the libraries."""
    fakes = [FakeNccl() for _ in range(ranks)]
    unique_id = Library(fakes[0], "here").unique_id()
    started = list[int]()

    def run(rank: int) -> Any:
        made = Communicator(
            Library(fakes[rank], "here"), ranks, rank, unique_id, lambda: started.append(rank), lambda: False
        )
        try:
            return action(made)
        finally:
            made.close()

    with ThreadPoolExecutor(ranks) as pool:
        results = list(pool.map(run, range(ranks)))
    assert sorted(started) == list(range(ranks)), "each thread that connects makes its device current"
    assert all(fake.aborted for fake in fakes)
    return results, fakes


class Place:
    """Numbers, and the array that stands for them."""

    def __init__(self, numbers: np.ndarray, dtype: str = "f32") -> None:
        self.numbers = np.ascontiguousarray(numbers)
        self.array = Array(self.numbers.ctypes.data, self.numbers.shape, dtype)


def enqueue(link: Communicator, collective: Collective, rows: int) -> None:
    device: Any = SimpleNamespace(stream=STREAM)
    PreparedCollective(device, link, collective, rows)()


COUNTER = Array(64, (1,), "i32")


def test_sums_of_the_first_rows() -> None:
    def action(link: Communicator) -> np.ndarray:
        x, out = Place(np.arange(12, dtype=np.float32).reshape(4, 3) + 100 * link.rank), Place(np.zeros((4, 3), "f4"))
        enqueue(link, Collective("all_reduce", x.array, out.array, COUNTER, 3), 2)
        return out.numbers

    results, fakes = on_all(action, ranks=3)
    for result in results:
        np.testing.assert_array_equal(result[:2], 3 * np.arange(6).reshape(2, 3) + 300)
        assert not result[2:].any()
    assert fakes[0].calls == [("all_reduce", 6)]


def test_parts_come_to_their_places() -> None:
    """Of 2 and 3 columns: the rows of rank 1 come after the room of three rows of rank 0."""

    def action(link: Communicator) -> np.ndarray:
        width, out = 2 + link.rank, Place(np.zeros(20, np.float32))
        x = Place(np.arange(3 * width, dtype=np.float32) + 10 * (1 + link.rank))
        parts = (out.array.address, 2), (out.array.address + 4 * 9, 3)
        enqueue(link, Collective("gather_parts", x.array, out.array, COUNTER, width, parts), 2)
        return out.numbers

    results, fakes = on_all(action)
    for result in results:
        assert result[:4].tolist() == [10, 11, 12, 13] and result[9:15].tolist() == [20, 21, 22, 23, 24, 25]
        assert not result[4:9].any() and not result[15:].any()
    assert fakes[1].calls == [("group", 4, 6)]


def test_rows_side_by_side_and_tokens_of_rank_0() -> None:
    def action(link: Communicator) -> list[Any]:
        x, out = Place(np.full(2, link.rank + 1, np.float32)), Place(np.zeros((1, 4), np.float32))
        enqueue(link, Collective("all_gather", x.array, out.array, COUNTER, 2), 1)
        tokens = Place(np.array([5, 6, 7], np.int32) + 10 * link.rank, "i32")
        enqueue(link, Collective("broadcast", tokens.array, tokens.array, COUNTER, 1), 2)
        return [out.numbers.tolist(), tokens.numbers.tolist()]

    (first, second), _ = on_all(action)
    assert first[0] == second[0] == [[1, 1, 2, 2]]
    assert first[1] == [5, 6, 7] and second[1] == [5, 6, 17]


def test_a_group_ends_where_a_call_in_it_fails() -> None:
    """Else all later calls would be put into it."""

    def action(link: Communicator) -> bool:
        link.library._loaded.failing["ncclBroadcast"] = 5
        with pytest.raises(DeviceError, match="ncclBroadcast: fake error 5"):
            link.gather_parts(64, [(64, 1), (128, 1)], STREAM)
        return link.library._loaded._grouped is None

    assert on_all(action)[0] == [True, True]


def test_a_group_ends_where_it_was_aborted() -> None:
    def action(link: Communicator) -> bool:
        start, handle = link.library._loaded.ncclGroupStart._call, link._handle

        def started() -> int:
            link._handle = None  # as an abort does that waited in vain for the call
            return int(start())

        link.library._loaded.ncclGroupStart._call = started
        with pytest.raises(DeviceError, match="have been ended"):
            link.gather_parts(64, [(64, 1), (128, 1)], STREAM)
        link._handle = handle
        return link.library._loaded._grouped is None

    assert on_all(action)[0] == [True, True]


def test_nobody_waits_for_a_rank_that_does_not_connect() -> None:
    library, started = Library(FakeNccl(), "here"), time.monotonic()
    with pytest.raises(DeviceError, match="stopped while they connected"):
        Communicator(library, 2, 0, library.unique_id(), lambda: None, lambda: time.monotonic() > started + 0.1)
    assert time.monotonic() < started + 2
    library._loaded.aborted = True  # its thread ends


def test_an_error_of_a_connection() -> None:
    fake = FakeNccl()
    library = Library(fake, "here")
    fake.failing["ncclCommInitRank"] = 5
    with pytest.raises(DeviceError, match="ncclCommInitRank: fake error 5"):
        Communicator(library, 2, 0, library.unique_id(), lambda: None, lambda: False)


def test_an_abort_ends_a_wait_for_a_rank_that_is_gone() -> None:
    def action(link: Communicator) -> str:
        if link.rank == 1:
            return ""
        numbers = Place(np.ones(4, np.float32))
        threading.Timer(0.1, link.abort).start()
        link.all_reduce(numbers.array.address, numbers.array.address, 4, STREAM)
        link.abort()  # once more does nothing
        end = time.monotonic() + 5
        while link._handle is not None and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(DeviceError, match="have been ended") as raised:
            link.all_reduce(numbers.array.address, numbers.array.address, 4, STREAM)
        return str(raised.value)

    started = time.monotonic()
    results, fakes = on_all(action)
    assert "ended" in results[0] and time.monotonic() < started + 5
    assert fakes[0].calls == [("all_reduce", 4)]
