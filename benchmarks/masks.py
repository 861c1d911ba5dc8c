"""What the masks of 32 texts cost a step: they follow one schema, each at another place of it.

python benchmarks/masks.py TOKENIZER

A step accepts a token of each text and computes its next mask. Prints milliseconds of wall-clock time, of the calling
thread (Python's part) and of all threads: least and median of many steps. Where other processes are busy, the least
is what to compare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numballama
from numballama import SamplingParams
from numballama.structured import compile_constraint
from numballama.structured.constraint import GrammarConstraint

TEXTS = 32
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "email": {"type": "string", "format": "email"},
        "nested": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "y": {"type": "boolean"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "kind", "nested"],
    "additionalProperties": False,
}
TEXT = (
    '{"name": "Anna Smith", "age": 42, "tags": ["a", "bc", "a longer tag here"], "kind": "cat", '
    '"email": "a@b.cd", "nested": {"x": 1.5, "y": true}}'
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--forced", action="store_true", help="accept forced text too, as without logprobs")
    words = parser.parse_args()
    tokenizer = numballama.load_tokenizer(words.tokenizer)
    ids = tokenizer.encode_continuation(TEXT.encode())
    logprobs = None if words.forced else 0  # with logprobs each token is sampled
    params = SamplingParams(json_schema=json.dumps(SCHEMA), logprobs=logprobs)
    for _ in range(8):  # as for a grammar that many requests use
        make = compile_constraint(params, tokenizer)
    assert make is not None
    texts = [_begin(make, ids, number * len(ids) // TEXTS) for number in range(TEXTS)]
    wall, own, every = list[float](), list[float](), list[float]()
    for _ in range(words.steps):
        steps = [(constraint, ids[place]) for constraint, place in texts]
        before = time.perf_counter(), time.thread_time(), time.process_time()
        ended = GrammarConstraint.advance(steps)
        wall.append(1e3 * (time.perf_counter() - before[0]))
        own.append(1e3 * (time.thread_time() - before[1]))
        every.append(1e3 * (time.process_time() - before[2]))
        for number, (constraint, place) in enumerate(texts):
            if isinstance(ended[number], Exception):
                raise RuntimeError(ended[number])
            place += 1 + len(constraint.forced)
            texts[number] = (constraint, place) if place < len(ids) else _begin(make, ids, 0)
    print(f"{tokenizer.vocab_size:,} tokens, {TEXTS} texts of {len(ids)} tokens")
    for name, times in (("wall", wall), ("calling thread", own), ("all threads", every)):
        print(f"{name:>15}: least {min(times):.2f} ms, median {statistics.median(times):.2f} ms")


def _begin(make: Callable[[], object], ids: list[int], place: int) -> tuple[GrammarConstraint, int]:
    """A text of which `place` tokens have been accepted, and those that they force."""
    constraint, at = make(), 0
    assert isinstance(constraint, GrammarConstraint)
    while at < place:
        constraint.accept(ids[at])
        at += 1 + len(constraint.forced)
    return constraint, at


if __name__ == "__main__":
    main()
