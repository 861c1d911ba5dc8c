"""`check_engine`: what must hold between two steps of an engine on a `FakeRunner`."""

from __future__ import annotations

from collections import Counter

from numballama.engine.engine import Engine
from numballama.engine.sequence import Sequence, Status
from tests.helpers.fake_runner import FakeRunner


def holders(engine: Engine) -> list[Sequence]:
    """Sequences with a slot."""
    scheduler = engine.scheduler
    return [*scheduler.decoding, *scheduler.prefilling, *scheduler.leaving]


def check_engine(engine: Engine, runner: FakeRunner) -> None:
    """Books, pages, slots and contents agree; pages that nobody needs are overwritten."""
    scheduler, pages = engine.scheduler, engine.scheduler.pages
    pages.check()
    holding = holders(engine)
    used = Counter(page for sequence in holding for page in sequence.pages)
    assert used == {page: pages.references(page) for page in range(1, pages.pages) if pages.references(page)}
    slots = [sequence.slot for sequence in holding]
    assert sorted([*slots, *scheduler._free_slots]) == list(range(runner.max_sequences))
    for group in (scheduler.waiting, scheduler.prefilling, scheduler.decoding):
        assert group == sorted(group, key=lambda each: each.order)
    for sequence in holding:
        assert sequence.computed <= sequence.planned <= len(sequence.pages) * pages.page
        assert sequence.in_flight == sum(
            sequence in [*run.decodes, *(chunked for chunked, _ in run.chunks)] for run in engine._runs
        )
        written = sequence.pages[sequence.computed // pages.page :]
        for page in written:
            assert pages.references(page) == 1, "no page is shared for writing"
            assert pages._keys[page] is None or page in pages._writers, "nor can others find it"
    for group, status in ((scheduler.waiting, Status.WAITING), (scheduler.decoding, Status.RUNNING)):
        assert all(each.status is status for each in group)
    for page, sequences in scheduler._parked.items():
        assert page in pages._writers and all(each.parked_on == page for each in sequences)
    for page, key in enumerate(pages._keys):
        if key is not None and page not in pages._writers:
            assert tuple(runner.content[page].tolist()) == key[1], "a cached page keeps its content"
    runner.poison(pages._free)
