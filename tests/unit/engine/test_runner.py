"""Batches, and that the runner of the tests keeps the protocol that the engine expects."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from numballama.engine.runner import Batch, Runner
from numballama.sampling import FEED
from tests.helpers.fake_runner import FakeRunner, expected, make_params


def batch(ids: list[int], positions: list[int], logits: list[int], decodes: int = 0) -> Batch:
    arrays = (np.array(values, np.int32) for values in (ids, positions, [0] * len(ids), logits))
    return Batch(*arrays, decodes)


def test_the_fake_runner_has_all_of_a_runner() -> None:
    runner = FakeRunner()
    for name, member in inspect.getmembers(Runner):
        if name.startswith("_"):
            continue
        assert hasattr(runner, name), name
        if inspect.isfunction(member):
            ours, theirs = inspect.signature(getattr(FakeRunner, name)), inspect.signature(member)
            assert list(ours.parameters) == list(theirs.parameters), name


def test_rows() -> None:
    assert batch([5, 6], [0, 1], [1]).rows == 2


def test_the_fake_runner_generates_what_is_expected() -> None:
    runner = FakeRunner(lookahead=1)
    runner.set_pages(0, 0, [3, 2])
    runner.start(0, make_params(), [5, 6], [], frozenset())
    first = runner.submit(batch([5, 6], [0, 1], [1]))
    second = runner.submit(batch([FEED], [2], [0], decodes=1))
    tokens = [runner.collect(ticket).tokens.item() for ticket in (first, second)]
    assert tokens == expected([5, 6], 2, 1000)


def test_the_fake_runner_notices_a_wrong_page() -> None:
    runner = FakeRunner()
    runner.set_pages(0, 0, [3, 2])
    runner.start(0, make_params(), [5, 6, 7, 8, 9], [], frozenset())
    runner.collect(runner.submit(batch([5, 6, 7, 8], [0, 1, 2, 3], [])))
    runner.poison([3])
    with pytest.raises(AssertionError, match=r"finds .* in its pages"):
        runner.collect(runner.submit(batch([9], [4], [0])))
