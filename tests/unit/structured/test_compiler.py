"""`compile_constraint`: limits, what is kept, and hostile input."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

import numballama
from numballama import SamplingParams
from numballama.errors import Error
from numballama.structured import compile_constraint, compiler
from numballama.structured.constraint import COPIES
from numballama.tokenizers.base import Tokenizer
from tests.helpers.processes import run_python

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def story() -> Tokenizer:
    return numballama.load_tokenizer(Path(numballama.__file__).parent / "story.gguf")


def test_without_a_grammar_there_is_no_constraint_and_no_import() -> None:
    code = (
        "import sys, numballama\nfrom numballama.structured import compile_constraint\n"
        "assert compile_constraint(numballama.SamplingParams(), None) is None\n"
        "import numballama.model\nassert 'llguidance' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_grammars_in_a_forked_child() -> None:
    """The threads that compute masks, and whoever held a lock, exist only in the parent."""
    code = """
import json, os, signal, sys
from numballama import SamplingParams, load_tokenizer
from numballama.structured import compile_constraint, compiler
tokenizer = load_tokenizer(sys.argv[1])
(a,) = tokenizer.encode_continuation(b"a")
def accepts(regex):
    return compile_constraint(SamplingParams(regex=regex), tokenizer)().accept(a)
assert accepts("ab+") is False
locks = compiler._lock, compiler._stack_lock, compiler._checker._lock, compiler._compiler_of(tokenizer)._lock
for lock in locks:
    lock.acquire()
for _ in range(2):
    compiler._checker._running.acquire()
child = os.fork()
if not child:
    signal.alarm(30)  # if it hangs
    os._exit(7 if accepts("ab+") is False and accepts("a") else 1)
print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
    assert run_python(code, Path(numballama.__file__).parent / "story.gguf") == 7


def test_one_grammar_is_compiled_once(story: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """GHSA-389x-67px-mjg3, GHSA-mgrm-fgjv-mhv8: each request's grammar was kept, in memory or on the disk."""
    compiled: list[str] = []
    real = compiler.Grammar

    def count(vocabulary: object, text: str, what: str, forces: bool) -> compiler.Grammar:
        compiled.append(text)
        return real(vocabulary, text, what, forces)  # type: ignore[arg-type]

    monkeypatch.setattr(compiler, "Grammar", count)
    monkeypatch.setattr(compiler, "MAX_GRAMMARS", 2)
    one, two, three = (SamplingParams(json_schema={"const": number}) for number in range(3))
    for params in (one, SamplingParams(json_schema='{"const": 0, "title": "T"}'), two, one, three, one, two):
        compile_constraint(params, story)
    assert len(compiled) == 4  # the second was the least recently used when the third came
    monkeypatch.setattr(compiler, "MAX_USES", 0)
    compile_constraint(two, story)
    assert len(compiled) == 5


def test_a_tokenizer_is_not_kept_alive() -> None:
    tokenizer = numballama.load_tokenizer(Path(numballama.__file__).parent / "story.gguf")
    assert compile_constraint(SamplingParams(regex="a"), tokenizer) is not None
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


RULES = "start: " + " | ".join(f"r{n}" for n in range(2000)) + "\n" + "".join(f'r{n}: "a" start\n' for n in range(2000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "("}, "regex cannot be followed: .*unclosed group"),
        ({"regex": "(" * 30_000 + ")" * 30_000}, "regex cannot be followed"),
        ({"regex": "(" * 60_000}, "regex cannot be followed"),
        ({"regex": "a" * 70_000}, "regex has 70,000 bytes; the limit is 65,536"),
        ({"regex": "\ud800"}, "regex is not valid Unicode"),
        ({"regex": r"(?-u:\xff)"}, "regex cannot be followed"),
        ({"grammar": "x" * 70_000}, "grammar has 70,000 bytes; the limit is 65,536"),
        ({"grammar": "start: a0\n" + "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(3500))}, "grammar"),
        ({"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000}, "grammar cannot be followed: .*deeply nested"),
        ({"grammar": "start: start\n"}, "no text fits it"),
        ({"grammar": "start: b\n"}, "grammar cannot be followed"),
        ({"grammar": RULES}, "grammar (takes longer|is too large|cannot be followed|allows no text)"),
        ({"json_schema": {"type": "string", "contains": {}}}, "'contains' at # is not enforced"),
        ({"json_schema": {"oneOf": [{"type": "integer"}, {"minimum": 3}]}}, "'oneOf' at # cannot be followed"),
        ({"json_schema": {"type": "integer", "const": "a"}}, "'const' at # cannot be followed: .*incompatible types"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_hostile_input_ends_in_an_error_soon(story: Tokenizer, options: dict[str, str], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(Error, match=message):
        compile_constraint(SamplingParams(**options), story)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("regex", ["a{1000000000}", "((a{1000}){1000}){1000}", "(a|b)*a(a|b){400}c", "(x+x+)+y"])
def test_large_counts_cost_nothing(story: Tokenizer, regex: str) -> None:
    make = compile_constraint(SamplingParams(regex=regex), story)
    assert make is not None
    constraint, token = make(), story.encode_continuation(b"x" if "x" in regex else b"a")[0]
    for _ in range(20):
        assert not constraint.accept(token)


def test_many_threads_may_compile(story: Tokenizer) -> None:
    errors: list[Exception] = []

    def run(number: int) -> None:
        try:
            assert compile_constraint(SamplingParams(json_schema={"const": f"t{number % 3}"}), story)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_grammar_in_use_gets_copies(story: Tokenizer) -> None:
    """So that masks of its texts are computed in parallel. Every copy allows the same."""
    params, token = SamplingParams(regex="ab+"), story.encode_continuation(b"a")[0]
    masks = set()
    for _ in range(COPIES + 2):
        make = compile_constraint(params, story, stop_token_ids=[2])
        assert make is not None
        constraint = make()
        assert not constraint.accept(token)
        mask = constraint.mask()
        assert mask is not None
        masks.add(mask.tobytes())
    assert len(masks) == 1
    (grammar,) = (found for (_, text), found in compiler._compiler_of(story)._kept.items() if "/ab+/" in text)
    assert len(grammar._copies) == COPIES
