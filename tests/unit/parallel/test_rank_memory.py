"""The memory that processes of ranks share: one content, whoever writes, and fixed structures that do not overlap."""

from __future__ import annotations

import numpy as np
import pytest

from numballama.errors import Error
from numballama.parallel.rank_memory import MESSAGE, ROWS, Kind, RankMemory, Sizes

SIZES = Sizes(3, 2, 100)


def both() -> tuple[RankMemory, RankMemory]:
    """The memory of one process, and of another that has inherited its file."""
    memory = RankMemory.create(SIZES)
    return memory, RankMemory(memory.file, SIZES)


def test_what_one_writes_the_other_reads() -> None:
    here, there = both()
    assert here.arrivals.shape == (3, 2, 16) and here.exchange.shape == (2, 100)
    assert not there.exchange.any() and not there.arrivals.any()
    names = ("command", "done", "data", "arrivals", "exchange")
    for number, name in enumerate(names, 1):
        getattr(here, name)[...] = number
    here.fail(2, "no")
    for number, name in enumerate(names, 1):
        found = getattr(there, name)
        assert (found == number).sum() >= found.size - 1, f"{name} shares bytes with another structure"
    assert there.failure(2) == "no"
    assert all(getattr(here, name).ctypes.data % 64 == here.command.ctypes.data % 64 for name in names)
    here.close()
    here.close()
    assert there.exchange[1, 99] == 5, "the mapping outlives the file"


def test_commands_are_numbered() -> None:
    here, there = both()
    assert here.set_command(Kind.PAGES, 1, 2, 3) == 1
    assert here.set_command(Kind.RUN, 4, 5) == 2
    assert there.command[:4].tolist() == [2, Kind.RUN, 4, 5]


def test_why_a_rank_failed() -> None:
    here, there = both()
    assert there.failure(1) is None
    here.fail(1, "Error: größer " + "ö" * MESSAGE)
    found = there.failure(1)
    assert found is not None and found.startswith("Error: größer öö") and len(found.encode()) <= MESSAGE + 2
    assert there.failure(0) is None


def test_more_than_a_row_holds_is_refused() -> None:
    memory = RankMemory.create(SIZES)
    memory.set_data(3, np.arange(ROWS, dtype=np.int32))
    assert memory.data[3, -1] == ROWS - 1
    with pytest.raises(Error, match="at most 4,096 tokens or pages at a time, found 4,097"):
        memory.set_data(0, np.zeros(ROWS + 1, np.int32))
