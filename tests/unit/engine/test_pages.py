"""Pages: free, cached and used ones are all there are; prefixes are found by their ids, never by a hash alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from numballama.engine.pages import BlockManager
from numballama.errors import Error

PAGE = 4


def make(pages: int = 9) -> BlockManager[str]:
    return BlockManager(pages, PAGE)


def store(manager: BlockManager[str], ids: list[int], root: str = "", computed: bool = True) -> list[int]:
    """Allocate, enter and publish pages for all ids, as a sequence does that shares none."""
    pages = manager.allocate(-(-len(ids) // PAGE))
    node = manager.match(root, ()).node
    for number in range(len(ids) // PAGE):
        node = manager.enter(pages[number], node, ids[number * PAGE : (number + 1) * PAGE], "writer")
        if computed:
            manager.publish(pages[number])
    return pages


IDS = list(range(10, 22))


def test_pages_are_found_again_after_their_sequence_ended() -> None:
    manager = make()
    pages = store(manager, IDS)
    manager.release(pages)
    assert (manager.free, manager.cached, manager.used) == (5, 3, 0)
    found = manager.match("", [*IDS, 99])
    assert found.pages == pages and not found.awaited
    manager.share(found.pages)
    assert (manager.free, manager.cached, manager.used) == (5, 0, 3)
    manager.check()


def test_one_token_is_left_to_compute() -> None:
    """nano-vllm #144."""
    manager = make()
    pages = store(manager, IDS)
    assert manager.match("", IDS).pages == pages[:2], "the last page holds the last token"
    assert manager.match("", IDS[:8]).pages == pages[:1]
    assert manager.match("", IDS[:4]).pages == []
    assert manager.match("", IDS[:1]).pages == []


def test_a_page_counts_only_after_the_same_pages() -> None:
    manager = make()
    store(manager, [1, 1, 1, 1, 2, 2, 2, 2])
    assert manager.match("", [9, 9, 9, 9, 2, 2, 2, 2, 5]).pages == []
    assert manager.match("", [2, 2, 2, 2, 5]).pages == []


def test_a_salt_separates() -> None:
    manager = make()
    store(manager, IDS, root="mine")
    assert manager.match("mine", [*IDS, 1]).pages
    assert not manager.match("yours", [*IDS, 1]).pages


def test_equal_hashes_are_not_equal_pages() -> None:
    """hash(n) is n modulo 2^61 - 1, so these two pages have the same hash."""
    manager, first = make(), [5, 6, 7, 8]
    second = [token + 2**61 - 1 for token in first]
    assert hash(tuple(first)) == hash(tuple(second))
    store(manager, first)
    assert not manager.match("", [*second, 1]).pages
    pages = store(manager, second)
    assert manager.match("", [*second, 1]).pages == pages
    manager.check()


def test_the_end_of_a_sequence_is_forgotten_before_its_beginning() -> None:
    manager = make(5)
    pages = store(manager, list(range(16)))
    manager.release(pages)
    assert manager.allocate(1) == pages[3:], "least recently used, and of no use without the others"
    assert manager.match("", range(17)).pages == pages[:3]
    assert manager.allocate(1) == pages[2:3]
    manager.check()


def test_free_pages_come_before_cached_ones() -> None:
    manager = make(5)
    cached = store(manager, IDS[:8])
    manager.release(cached)
    assert not set(manager.allocate(2)) & set(cached)
    assert len(manager.match("", IDS[:9]).pages) == 2


def test_a_page_that_is_being_computed_is_awaited_and_not_shared() -> None:
    manager = make()
    pages = store(manager, IDS, computed=False)
    found = manager.match("", [*IDS, 1])
    assert found.pages == [] and found.awaited == pages[2] and found.writer == "writer"
    manager.publish(pages[0])
    found = manager.match("", [*IDS, 1])
    assert found.pages == pages[:1] and found.awaited == pages[2]
    assert manager.release(pages) == [pages[2], pages[1]], "those that were never computed"
    assert manager.match("", [*IDS, 1]).pages == pages[:1]
    manager.check()


def test_two_pages_of_the_same_tokens_lead_to_the_same_next_page() -> None:
    manager = make()
    store(manager, IDS[:4])
    (own,) = manager.allocate(1)
    node = manager.enter(own, manager.match("", ()).node, IDS[:4], "second")
    (after,) = manager.allocate(1)
    manager.enter(after, node, IDS[4:8], "second")
    manager.publish(after)
    assert manager.match("", IDS[:9]).pages[1] == after
    manager.release([own])
    assert own in manager.allocate(manager.available), "nobody can find it, so it is free"
    manager.check()


def test_too_many_pages_are_refused() -> None:
    manager = make(3)
    with pytest.raises(Error, match="3 pages are asked for and 2 are available"):
        manager.allocate(3)
    with pytest.raises(Error, match="at least one more"):
        BlockManager(1, 4)


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_a_match_is_the_common_beginning_in_whole_pages(stored: list[int], ids: list[int]) -> None:
    manager = make()
    pages = store(manager, stored)
    common = next((n for n, (a, b) in enumerate(zip(stored, ids, strict=False)) if a != b), min(len(stored), len(ids)))
    assert manager.match("", ids).pages == pages[: max(min(common, len(ids) - 1), 0) // PAGE]


class Pages(RuleBasedStateMachine):
    """Sequences come, share what they find, compute their pages in order, and go at any time."""

    held: Bundle[Any] = Bundle("held")

    @initialize(pages=st.integers(2, 12))
    def make(self, pages: int) -> None:
        self.manager = BlockManager[int](pages, 2)
        self.content: dict[int, tuple[int, ...]] = {}  # page → all tokens up to its end
        self.number = 0

    @rule(target=held, ids=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.integers(0, 1))
    def admit(self, ids: list[int], salt: int) -> Any:
        self.number += 1
        found = self.manager.match(salt, ids)
        for number, page in enumerate(found.pages):
            assert self.content[page] == (salt, *ids[: 2 * number + 2]), "a shared page holds these tokens"
        if self.manager.needed(found, len(ids)) > self.manager.available:
            return multiple()
        self.manager.share(found.pages)
        pages = [*found.pages, *self.manager.allocate(-(-len(ids) // 2) - len(found.pages))]
        for page in pages[len(found.pages) :]:
            self.content.pop(page, None)
        node = found.node
        for number in range(len(found.pages), len(ids) // 2):
            node = self.manager.enter(pages[number], node, ids[2 * number : 2 * number + 2], self.number)
        return [pages, ids, salt, len(found.pages)]

    @rule(sequence=held)
    def compute(self, sequence: Any) -> None:
        pages, ids, salt, computed = sequence
        if computed < len(ids) // 2:
            assert self.manager.references(pages[computed]) == 1, "nobody shares a page that is written"
            self.content[pages[computed]] = (salt, *ids[: 2 * computed + 2])
            self.manager.publish(pages[computed])
            sequence[3] += 1

    @rule(sequence=consumes(held))
    def end(self, sequence: Any) -> None:
        self.manager.release(sequence[0])

    @invariant()
    def books_agree(self) -> None:
        self.manager.check()


TestPages = Pages.TestCase
