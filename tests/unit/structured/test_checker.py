"""Grammars that break or stop llguidance's compiler end in an error, and the next one is compiled."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from numballama.errors import Error
from numballama.structured import checker as checker_module
from numballama.structured.checker import Checker, first_lines
from numballama.structured.lark import regex_grammar, schema_grammar

pytest.importorskip("llguidance")

CHAIN = "start: a0\n" + "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(5000)) + 'a5000: "x"\n'
"""Takes more stack than a thread has: a child that compiles it dies."""


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    found = Checker()
    yield found
    found.close()


def test_what_is_wrong_is_said(checker: Checker) -> None:
    checker.check(regex_grammar("a+"), "regex")
    with pytest.raises(Error, match=r"regex cannot be followed: .*unclosed group"):
        checker.check("start: /a(/\n", "regex")
    with pytest.raises(Error, match=r"regex cannot be followed: .*look-?around"):
        checker.check(regex_grammar("(?=a)a"), "regex")
    with pytest.raises(Error, match="json_schema cannot be followed: no text fits it"):
        checker.check(schema_grammar('{"$ref":"#"}'), "json_schema")


def test_a_crash_is_an_error_and_the_next_grammar_is_compiled(checker: Checker) -> None:
    with pytest.raises(Error, match="grammar is too large or nested too deeply"):
        checker.check(CHAIN, "grammar")
    checker.check(regex_grammar("a+"), "regex")
    with pytest.raises(Error, match="regex"):
        checker.check(regex_grammar("(" * 20_000 + "a" + ")" * 20_000), "regex")
    checker.check(regex_grammar("b+"), "regex")


def test_a_slow_grammar_is_an_error(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    checker.check(regex_grammar("a+"), "regex")
    monkeypatch.setattr(checker_module, "COMPILE_S", 0.3)
    started = time.monotonic()
    with pytest.raises(Error, match=r"json_schema takes longer than 0.3 s to compile"):
        checker.check(schema_grammar('{"type":"integer","multipleOf":99999989}'), "json_schema")
    assert time.monotonic() - started < 5
    monkeypatch.undo()
    checker.check(regex_grammar("a+"), "regex")


def test_children_are_kept_and_ended(checker: Checker) -> None:
    checker.check(regex_grammar("a+"), "regex")
    (child,) = checker._idle
    checker.check(regex_grammar("ab+"), "regex")
    assert checker._idle == [child]
    child.kill()
    child.wait()
    checker.check(regex_grammar("abc+"), "regex")
    (other,) = checker._idle
    assert other is not child
    checker.close()
    assert other.poll() is not None


def test_messages_are_one_line() -> None:
    assert first_lines("at 1(8): bad\n   1 | start: x\n   ^\n") == "at 1(8): bad"
    assert first_lines("lexer error\n<state>\nsecret\n</state>") == "lexer error"
    assert first_lines("NoExtensionBias\n<non-verbose/>") == "no text fits it"
