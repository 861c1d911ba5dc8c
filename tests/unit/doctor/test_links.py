"""Links between GPUs that are made up: what the driver says of each pair, the table, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import pytest

from numballama import DeviceError
from numballama.doctor.links import LEGEND, GpuLink, find_links, groups, lines

if TYPE_CHECKING:
    from numballama.cuda.driver import Device

NVLINK = {"access": 1, "ACCESS_SUPPORTED": 1, "NATIVE_ATOMIC_SUPPORTED": 1, "PERFORMANCE_RANK": 0}
PCIE = {"access": 1, "ACCESS_SUPPORTED": 1, "NATIVE_ATOMIC_SUPPORTED": 0, "PERFORMANCE_RANK": 1}
NO_ACCESS = {"access": 0, "ACCESS_SUPPORTED": 0, "NATIVE_ATOMIC_SUPPORTED": 0, "PERFORMANCE_RANK": 2}
Answer = int | Exception


class Card:
    """A GPU that answers questions about its links from a table: (own index, the peer's) → name → answer."""

    def __init__(self, index: int, answers: Mapping[tuple[int, int], Mapping[str, Answer]]) -> None:
        self.index, self._answers = index, answers

    def _answer(self, peer: Card, name: str) -> int:
        answer = self._answers[self.index, peer.index][name]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def can_access(self, peer: Card) -> bool:
        return bool(self._answer(peer, "access"))

    def link_attribute(self, peer: Card, name: str) -> int:
        return self._answer(peer, name)


def links(count: int, answers: Mapping[tuple[int, int], Mapping[str, Answer]]) -> list[GpuLink]:
    """What is found on a host. Answers of (0, 1) are those of (1, 0) too, where these are not given."""
    both = {**{(b, a): found for (a, b), found in answers.items()}, **answers}
    return find_links(cast("list[Device]", [Card(index, both) for index in range(count)]))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_gpus_have_no_links_and_no_lines(count: int) -> None:
    found = links(count, {})
    assert found == [] and list(lines(found, ["cuda:0"][:count])) == []


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (NVLINK, GpuLink("cuda:0", "cuda:1", "NVLink", True, True, True, 0)),
        (PCIE, GpuLink("cuda:0", "cuda:1", "PCIe", True, True, False, 1)),
        (NO_ACCESS, GpuLink("cuda:0", "cuda:1", "none", False, False, False, 2)),
    ],
)
def test_kinds_of_links(answers: Mapping[str, Answer], expected: GpuLink) -> None:
    assert links(2, {(0, 1): answers}) == [expected]


def test_access_must_be_possible_both_ways() -> None:
    (found,) = links(2, {(0, 1): NVLINK, (1, 0): NO_ACCESS})
    assert (found.kind, found.peer_access, found.problem) == ("none", False, None)


def test_the_table_of_two() -> None:
    assert list(lines(links(2, {(0, 1): NVLINK}), ["cuda:0", "cuda:1"])) == [
        "links     cuda:0    cuda:1",
        "cuda:0    -         NVLink 0",
        "cuda:1    NVLink 0  -",
        *LEGEND,
        "several cards can share a model: cuda:0, cuda:1",
    ]


FOUR = {(0, 1): NVLINK, (2, 3): NVLINK, (0, 2): PCIE, (1, 2): NO_ACCESS, (0, 3): NO_ACCESS, (1, 3): PCIE}


def test_the_table_of_four_shows_each_pair() -> None:
    rows = [line.split("  ") for line in lines(links(4, FOUR), [f"cuda:{i}" for i in range(4)])]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[:5] == [
        ["links", "cuda:0", "cuda:1", "cuda:2", "cuda:3"],
        ["cuda:0", "-", "NVLink 0", "PCIe 1", "no"],
        ["cuda:1", "NVLink 0", "-", "no", "PCIe 1"],
        ["cuda:2", "PCIe 1", "no", "-", "NVLink 0"],
        ["cuda:3", "no", "PCIe 1", "NVLink 0", "-"],
    ]
    assert cells[-1] == ["several cards can share a model: cuda:0, cuda:1; cuda:2, cuda:3"]


def test_in_a_group_each_reaches_each() -> None:
    chain = links(3, {(0, 1): NVLINK, (1, 2): NVLINK, (0, 2): NO_ACCESS})
    assert groups(["cuda:0", "cuda:1", "cuda:2"], chain) == [["cuda:0", "cuda:1"], ["cuda:2"]]
    everything = links(8, {(a, b): NVLINK for a in range(8) for b in range(a + 1, 8)})
    assert len(everything) == 28
    names = [f"cuda:{index}" for index in range(8)]
    assert groups(names, everything) == [names]


@pytest.mark.parametrize(
    ("answers", "working", "expected"),
    [
        (FOUR, (0, 1, 3), "several cards can share a model: cuda:0, cuda:1; only replicas: cuda:3"),
        (FOUR, (0, 3), "no card reaches another's memory: only replicas of a model, one on each card"),
        (FOUR, (2,), "fewer than two of these cards ran the kernel: no cards can share a model"),
        (
            {**FOUR, (0, 3): {**NO_ACCESS, "access": DeviceError("CUDA: CUDA_ERROR_UNKNOWN")}},
            (0, 3),
            "as far as is known, no card reaches another's memory: only replicas of a model, one on each card",
        ),
        (
            {**FOUR, (0, 3): {**NO_ACCESS, "access": DeviceError("CUDA: CUDA_ERROR_UNKNOWN")}},
            (0, 1),
            "several cards can share a model: cuda:0, cuda:1",
        ),
    ],
)
def test_what_follows_counts_only_cards_that_work(
    answers: Mapping[tuple[int, int], Mapping[str, Answer]], working: tuple[int, ...], expected: str
) -> None:
    *_, said = lines(links(4, answers), [f"cuda:{index}" for index in working])
    assert said == expected


@pytest.mark.parametrize(
    ("working", "expected"),
    [
        ((0, 1, 3), "several cards can share a model: cuda:0, cuda:1; through NCCL, which is slower, all"),
        ((0, 3), "no card reaches another's memory: several can share a model through NCCL, which is slower"),
        ((0, 1), "several cards can share a model: cuda:0, cuda:1"),
        ((2,), "fewer than two of these cards ran the kernel: no cards can share a model"),
    ],
)
def test_what_follows_where_nccl_is_installed(working: tuple[int, ...], expected: str) -> None:
    *_, said = lines(links(4, FOUR), [f"cuda:{index}" for index in working], with_nccl=True)
    assert said == expected


def test_an_answer_that_fails_leaves_the_others() -> None:
    """Of the same pair, and of other pairs."""
    broken = {**NVLINK, "PERFORMANCE_RANK": DeviceError("CUDA: CUDA_ERROR_INVALID_VALUE invalid\nargument")}
    found = links(3, {(0, 1): broken, (0, 2): NVLINK, (1, 2): PCIE})
    problem = "performance rank: CUDA: CUDA_ERROR_INVALID_VALUE invalid argument"
    assert found == [
        GpuLink("cuda:0", "cuda:1", "NVLink", True, True, True, None, problem),
        GpuLink("cuda:0", "cuda:2", "NVLink", True, True, True, 0),
        GpuLink("cuda:1", "cuda:2", "PCIe", True, True, False, 1),
    ]
    said = list(lines(found, ["cuda:0", "cuda:1", "cuda:2"]))
    assert f"cuda:0, cuda:1: {problem}" in said and said[1].split() == ["cuda:0", "-", "NVLink", "NVLink", "0"]


def test_a_pair_of_which_nothing_is_known() -> None:
    """Whatever NVIDIA's package raises; the same message stands once."""
    broken = dict.fromkeys(NVLINK, RuntimeError("Function cuDeviceGetP2PAttribute not found"))
    (found,) = links(2, {(0, 1): broken})
    assert found.kind == "unknown" and found.peer_access is None and found.performance_rank is None
    assert found.problem == (
        "peer access, peer access back, access supported, native atomics, performance rank: "
        "Function cuDeviceGetP2PAttribute not found"
    )
    said = list(lines([found], ["cuda:0", "cuda:1"]))
    assert said[1].split() == ["cuda:0", "-", "?"] and said[-1].startswith("as far as is known, no card")
