"""`BlockManager`: which pages of the KV cache are free, cached or used, and which tokens they hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import Error

Writer = TypeVar("Writer")


@dataclass
class Match(Generic[Writer]):
    """Pages that hold the beginning of a sequence."""

    pages: list[int]
    """Computed pages, in order."""
    node: Hashable
    """Node of the last of them, or of the root if there are none."""
    awaited: int = 0
    """The last of the pages after them that somebody is computing just now, or 0."""
    writer: Writer | None = None
    """Who computes that page."""


class BlockManager(Generic[Writer]):
    """The pages 1 to `pages` - 1 of a KV cache, each for `page` tokens. Page 0 is scratch.

    A page is *free* (its content is of no use), *cached* (nobody uses it, its tokens can be found again) or *used* by
    `references` sequences. Only whole pages are shared, so nobody writes to a page that others read.

    The index is a tree: a page's key is the node of the page before it and its own token ids. The first page's is the
    root, which holds a request's salt. A dictionary compares keys after their hashes, so that a collision of hashes
    never finds a wrong page. Nodes are numbers that are used once.

    A key enters the index when its page is allocated (`enter`), so that others can wait for it. The page can be shared
    when its tokens have been computed (`publish`).
    """

    def __init__(self, pages: int, page: int) -> None:
        if pages < 2 or page < 1:
            raise Error(f"a KV cache needs page 0 and at least one more, found {pages} pages of {page} tokens")
        self.pages, self.page = pages, page
        self._next_node = 0
        self.reset()

    def reset(self) -> None:
        """Make all pages free."""
        self._free = list(range(self.pages - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._references = [0] * self.pages
        self._index: dict[tuple[Hashable, tuple[int, ...]], int] = {}
        self._keys: list[tuple[Hashable, tuple[int, ...]] | None] = [None] * self.pages
        self._nodes = [0] * self.pages
        self._writers: dict[int, Writer] = {}

    @property
    def free(self) -> int:
        """Pages without useful content."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages that no sequence uses, kept for prompts that begin with the same tokens."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Pages that a sequence uses."""
        return self.pages - 1 - len(self._free) - len(self._cached)

    @property
    def available(self) -> int:
        """Pages that can be allocated: free and cached ones."""
        return len(self._free) + len(self._cached)

    def references(self, page: int) -> int:
        """Number of sequences that use a page."""
        return self._references[page]

    def match(self, root: Hashable, ids: Sequence[int]) -> Match[Writer]:
        """Find the pages that hold the beginning of `ids`. The last id never counts: its logits must be computed."""
        size = self.page
        node: Hashable = (root,)  # a tuple is no node of a page, whatever the root is
        found = Match[Writer]([], node)
        for start in range(0, (len(ids) - 1) // size * size, size):
            page = self._index.get((node, tuple(ids[start : start + size])))
            if page is None:
                break
            node = self._nodes[page]
            if page in self._writers:
                found.awaited, found.writer = page, self._writers[page]
            elif not found.awaited:
                found.pages.append(page)
                found.node = node
        return found

    def needed(self, match: Match[Writer], length: int) -> int:
        """Available pages that a sequence of `length` tokens needs: new ones, and cached ones of its match."""
        return -(-length // self.page) - sum(self._references[page] > 0 for page in match.pages)

    def share(self, pages: Iterable[int]) -> None:
        """Use computed pages once more."""
        for page in pages:
            if not self._references[page]:
                del self._cached[page]
            self._references[page] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages: free ones, then the least recently used cached ones, whose content is forgotten."""
        if count > self.available:
            raise Error(f"{count} pages are asked for and {self.available} are available")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page = self._cached.popitem(last=False)[0]
                self._forget(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def enter(self, page: int, parent: Hashable, ids: Sequence[int], writer: Writer) -> int:
        """Enter a page that `writer` computes: `ids` after those of the node `parent`. Returns the node of these ids.

        If another page has these ids already, that one stays in the index and this one is the writer's own.
        """
        key = (parent, tuple(ids))
        known = self._index.setdefault(key, page)
        if known == page:
            self._next_node += 1
            self._keys[page], self._nodes[page], self._writers[page] = key, self._next_node, writer
        return self._nodes[known]

    def publish(self, page: int) -> None:
        """Let others share a page, now that its tokens have been computed."""
        self._writers.pop(page, None)

    def release(self, pages: Sequence[int]) -> list[int]:
        """Give the pages of a sequence back. Returns those that others may have waited for and that are not computed.

        The last page is the first to be allocated again: a page is of no use without those before it.
        """
        dropped = []
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            if self._keys[page] is None:
                self._free.append(page)
            elif page in self._writers:
                self._forget(page)
                self._free.append(page)
                dropped.append(page)
            else:
                self._cached[page] = None
        return dropped

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None
        del self._index[key]
        self._keys[page] = None
        self._writers.pop(page, None)

    def check(self) -> None:
        """Raise `AssertionError` if the books contradict each other. For tests."""
        used = {page for page in range(1, self.pages) if self._references[page] > 0}
        groups = [*self._free, *self._cached, *used]
        assert sorted(groups) == list(range(1, self.pages)), "each page is free, cached or used"
        assert self.free + self.cached + self.used == self.pages - 1
        assert all(count >= 0 for count in self._references)
        entered = {page: key for page, key in enumerate(self._keys) if key is not None}
        assert {key: page for page, key in entered.items()} == self._index
        assert set(self._cached) <= set(entered), "a cached page can be found"
        assert set(self._writers) <= used & set(entered), "a page that is being computed is used"
        assert all(self._references[page] == 1 for page in self._writers), "nobody shares it before it is computed"
