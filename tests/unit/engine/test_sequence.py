"""A sequence says where it stands."""

from __future__ import annotations

from numballama.engine.sequence import Sequence, Status
from tests.helpers.fake_runner import make_params


def test_a_new_sequence_waits_and_holds_nothing() -> None:
    sequence = Sequence([1, 2, 3], make_params(), 5, order=(0, 7, 0))
    assert sequence.status is Status.WAITING and sequence.slot == -1 and not sequence.pages
    assert (sequence.prompt_tokens, sequence.output_tokens, sequence.end) == (3, 0, 7)
    assert repr(sequence) == "<Sequence (0, 7, 0) waiting: 3+0 tokens, 0 computed, 0 in flight>"


def test_output_follows_the_prompt() -> None:
    prompt = [1, 2, 3]
    sequence = Sequence(prompt, make_params(), 5, order=(0, 0, 0))
    sequence.ids += [8, 9]
    assert sequence.output == [8, 9] and sequence.output_tokens == 2 and prompt == [1, 2, 3]


def test_a_sequence_that_gives_way_keeps_its_tokens() -> None:
    sequence = Sequence([1], make_params(), 5, order=(0, 0, 0))
    sequence.slot, sequence.pages, sequence.computed, sequence.in_flight = 3, [4], 6, 1
    sequence.ids.append(2)
    sequence.vacate()
    assert sequence.ids == [1, 2] and sequence.slot == -1 and not sequence.pages
    assert (sequence.computed, sequence.planned, sequence.pending, sequence.in_flight) == (0, 0, 0, 0)
