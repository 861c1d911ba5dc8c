"""A rank's backend: on the CPU here. On a GPU: tests/cuda/simulated_ranks.py and tests/unit/cuda/test_peers.py."""

from __future__ import annotations

from unittest.mock import Mock, call

import pytest

from numballama import loader
from numballama.cpu.backend import CpuBackend
from numballama.cpu.collectives import STOPPED
from numballama.cpu.workers import WorkerThreads
from numballama.errors import DeviceError, Error
from numballama.ops import STOPPED as STOPPED_OF_OPS
from numballama.parallel.rank_device import GpuRank, open_rank, way_of_exchange
from numballama.parallel.rank_memory import RankMemory, Sizes
from tests.helpers.cuda_host import missing_gpu, missing_packages
from tests.helpers.fake_nccl import FakeNccl


def test_a_rank_on_the_cpu_exchanges_through_the_memory_of_all() -> None:
    weights = loader.open_checkpoint(None).weights
    memory = RankMemory.create(Sizes(2, 1, 64))
    rank = open_rank("cpu", 1, 2, weights, 1, False)
    rank.publish(memory)
    rank.connect(memory, ())
    assert rank.rank == 1 and isinstance(rank.backend, CpuBackend) and rank.backend.workers == 1
    assert rank.backend.states["exchange"] is memory.exchange and rank.backend.states["arrivals"] is memory.arrivals
    with pytest.raises(Error, match="ranks on the CPU get no tokens"):
        rank.receive(rank.backend.program, 1, 1)  # type: ignore[arg-type]
    rank.close()


def test_too_few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system limits threads: the others would wait for workers that are not there."""
    monkeypatch.setattr(WorkerThreads, "start", lambda self, wanted: 1)
    with pytest.raises(DeviceError, match="2 workers are needed, the system starts 1"):
        open_rank("cpu", 0, 2, {}, 2, False)


@pytest.mark.skipif(not missing_gpu(), reason="there is a GPU")
def test_a_rank_on_a_gpu_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match=r"packages are missing|no usable NVIDIA driver"):
        open_rank("cuda:1", 1, 2, {}, None, False)


def test_what_ranks_share_is_freed_where_the_device_has_failed() -> None:
    """After all else: kernels may still poll it."""
    rank, calls = GpuRank.__new__(GpuRank), Mock()
    rank.backend, rank._peers = calls.backend, calls.peers
    calls.backend.close.side_effect = DeviceError("the device has failed")
    with pytest.raises(DeviceError, match="has failed"):
        rank.close()
    assert calls.mock_calls == [call.backend.close(), call.peers.free()]


TWO = ("cuda:0", "cuda:1")


@pytest.fixture
def without_access(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The pairs of GPUs that do not reach each other's memory. NCCL is there."""
    if reason := missing_packages():
        pytest.skip(reason)
    from numballama.cuda import driver, nccl

    pairs: list[tuple[str, str]] = []
    monkeypatch.setattr(driver, "pairs_without_access", lambda devices: pairs)
    monkeypatch.setattr(nccl, "load", lambda: nccl.Library(FakeNccl(), "here"))
    monkeypatch.delenv("NUMBALLAMA_EXCHANGE", raising=False)
    return pairs


def test_nccl_exchanges_where_memory_is_not_reached(
    without_access: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert way_of_exchange(TWO) == ""
    monkeypatch.setenv("NUMBALLAMA_EXCHANGE", "nccl")
    assert way_of_exchange(TWO) == "NUMBALLAMA_EXCHANGE=nccl: NCCL 2.28.5 exchanges values"
    monkeypatch.delenv("NUMBALLAMA_EXCHANGE")
    without_access += [TWO, ("cuda:0", "cuda:2")]
    assert way_of_exchange((*TWO, "cuda:2")) == (
        "cuda:0 and cuda:1, cuda:0 and cuda:2 do not reach each other's memory: NCCL 2.28.5 exchanges values, which is "
        "slower"
    )
    monkeypatch.setenv("NUMBALLAMA_EXCHANGE", "peer")
    assert way_of_exchange(TWO) == ""
    monkeypatch.setenv("NUMBALLAMA_EXCHANGE", "gloo")
    with pytest.raises(Error, match="NUMBALLAMA_EXCHANGE is 'gloo'; choose from 'nccl' and 'peer'"):
        way_of_exchange(TWO)


def test_nccl_that_is_needed_and_missing(
    without_access: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from numballama.cuda import nccl

    monkeypatch.setattr(nccl, "load", Mock(side_effect=DeviceError("NCCL was not found; pip install it")))
    assert way_of_exchange(TWO) == "", "where memory is reached nobody needs it"
    without_access.append(TWO)
    with pytest.raises(DeviceError, match="do not reach each other's memory, so NCCL is needed; NCCL was not found"):
        way_of_exchange(TWO)


def test_waits_end_by_the_same_element() -> None:
    """Kernels have their own copy of the constant."""
    assert STOPPED == STOPPED_OF_OPS
    memory = RankMemory.create(Sizes(2, 3, 8))
    assert not memory.stopped
    memory.stop()
    assert memory.stopped and memory.bytes[memory.stop_at] == 1 and memory.bytes.sum() == 1
