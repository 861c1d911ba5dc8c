"""Checks of runs with rows of many sequences, on a GPU as well as in the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.cuda.checks import SHARE, Pair, bounds_of, close, poison, poison_dead
from tests.helpers.bounds import check_step

Step = Sequence[tuple[int, int]]
"""The rows of a run: (sequence, how many of its next tokens), one after the other."""


def feed_rows(pair: Pair, programs: Sequence[Any], step: Step, lengths: dict[int, int], seed: int) -> int:
    """Write the inputs of a run of many sequences, and count up their lengths; returns the number of rows. The last row
    of every sequence has logits.
    """
    ids, positions, sequences, last = [], [], [], []
    for sequence, count in step:
        start = lengths.get(sequence, 0)
        ids += pair.ids(seed + 100 * sequence, count)
        positions += range(start, start + count)
        sequences += [sequence] * count
        last.append(len(ids) - 1)
        lengths[sequence] = start + count
    for program in programs:
        for name, numbers in (("ids", ids), ("positions", positions), ("sequences", sequences), ("rows", last)):
            program.inputs[name].view(np.uint8)[...] = 0xFF  # what lies after the run's rows is nobody's
            program.inputs[name][: len(numbers)] = numbers
    return len(ids)


def check_rows(pair: Pair, steps: Sequence[Step], rows: int, fusions: bool | Sequence[str] = True) -> None:
    """Runs of many sequences by a program for `rows` rows, step by step, in a cache whose free pages and page 0 hold
    NaN.
    """
    (program, reference), lengths = pair.programs(rows, "rows", fusions), dict[int, int]()
    poison(program)
    for number, step in enumerate(steps):
        count = feed_rows(pair, [program, reference], step, lengths, number)
        program.backend.device.make_current()
        with_logits = len(step)
        program.run_inputs.send(count, with_logits)
        for index in range(len(program.plan.steps)):
            poison_dead(program, index)

            def execute(index: int = index, count: int = count, with_logits: int = with_logits) -> None:
                program.run(count, index, index + 1, rows=with_logits)

            with bounds_of(reference.backend):
                check_step(program, index, count, reference.backend, execute, rows=with_logits)


def check_whole_rows(pair: Pair, steps: Sequence[Step], rows: int, share: float = SHARE) -> None:
    """The same runs, each as one launch of a graph: the logits of each sequence's last row."""
    (program, reference), lengths = pair.programs(rows), dict[int, int]()
    poison(program)
    for number, step in enumerate(steps):
        count = feed_rows(pair, [program, reference], step, lengths, number)
        for each in (program, reference):
            each.run(count, 0, each.graph.first("argmax"), rows=len(step))
        got, want = program.value("logits")[: len(step)], reference.value("logits")
        close(got, want, f"logits of run {number}", share)


def check_alone(pair: Pair, steps: Sequence[Step], rows: Sequence[int]) -> None:
    """A sequence's logits are bit for bit those of a run without the others, by programs for other numbers of rows."""
    lengths: dict[int, int] = {}
    programs = [pair.programs(count)[0] for count in rows]
    poison(programs[0])
    for number, step in enumerate(steps):
        before = dict(lengths)
        count = feed_rows(pair, programs[-1:], step, lengths, number)
        programs[-1].run(count, 0, programs[-1].graph.first("argmax"), rows=len(step))
        together = programs[-1].value("logits")[: len(step)].copy()
        for place, (sequence, own) in enumerate(step):
            for program in programs:
                if own > program.plan.tokens:
                    continue
                feed_rows(pair, [program], [(sequence, own)], dict(before), number)
                program.run(own, 0, program.graph.first("argmax"), rows=1)
                what = f"run {number}, sequence {sequence}, by a program for {program.plan.tokens} rows"
                np.testing.assert_array_equal(program.value("logits")[0], together[place], err_msg=what)
