"""Grammars: their embedded schemas are checked, and what changes sampling is refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.errors import Error
from numballama.structured.lark import _IS_LARK, check_grammar, regex_grammar, to_lark
from tests.helpers.structured import accepts, random_text

pytest.importorskip("llguidance")


def probe(grammar: str) -> str:
    """The grammar as the trial compiles it."""
    return check_grammar(to_lark(grammar))[1]


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('start: "a" b*\nb: "x" | %json {"type": "integer"}\n', "ax12", "a1.5"),
        ('root ::= "yes" | "no" [0-9]+\n', "no12", "no"),
        ('root ::= item+\nitem ::= "- " [^\\n]{1,3} "\\n"\n', "- ab\n- c\n", "- \n"),
        ('start: "b" // %json {"contains": {}}\n   | "c" # "%json\n', "c", "a"),
        ('start: <|tool|> %json {"const": 1} <[7]>\n', "?1?", "1"),  # a special token stands as "?" in the trial
        ('start: "<call>\\n" %json {"type": "object"} "\\n</call>"\n', '<call>\n{"a": 1}\n</call>', "<call>{}</call>"),
        ('start: word "!"\nword[suffix="."]: /[a-z]*/\n', "ab.!", "ab!"),
        ('%llguidance {"allow_initial_skip": true}\n%ignore / /\nstart: "a"\n', " a", "b"),
        ('start: %regex {"substring_words": "one two"}\n', "one ", "tw"),
        ('start: %json{"type": "array",\n "items": {"const": 1}}\n', "[1, 1]", "[2]"),
    ],
)  # fmt: skip
def test_grammars_of_both_kinds(grammar: str, good: str, bad: str) -> None:
    assert accepts(probe(grammar), good) and not accepts(probe(grammar), bad)


def test_special_tokens_stay_in_the_grammar() -> None:
    grammar, trial = check_grammar("start: <|eot_id|> <[3-5]>\n")
    assert "<|eot_id|> <[3-5]>" in grammar and "<" not in trial.partition("%")[0]


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (
            'start: "a"\n b: %json {"items": {"contains": {}}}\n',
            "grammar: line 2: json_schema: 'contains' at #/items is not",
        ),
        ('start: %json {"x-guidance": {"lenient": true}}\n', "'x-guidance' at # is not enforced"),
        ('start: %json"x"\n', "line 1: %json needs a schema"),
        ('start: %json {"a": \n', "line 1: what follows %json is not JSON"),
        ("start: %json " + "[" * 60_000 + "\n", "line 1: what follows %json is nested too deeply"),
        ("start: %json false\n", "json_schema is false"),
        ('start: "%json"\n', r"line 1: '\"%json\"' spells a keyword"),
        ("start: /%json {}/\n", "spells a keyword"),
        ("start: a\na[temperature=0.5]: /x/\n", "line 2: the attribute 'temperature' is not supported"),
        ("start: a\na[lazy, max_tokens = 5]: /x/\n", "line 2: the attribute 'max_tokens' is not supported"),
        ('start: a\na[stop="."]: /x/\n', "line 2: the attribute 'stop' is not supported"),
        ('%llguidance {"allow_invalid_utf8": true}\nstart: "a"\n', "the option allow_invalid_utf8 of %llguidance"),
        ("%llguidance 3\nstart: %json {}\n", "the option 3 of %llguidance"),
        ("root ::= (\n", "it is read as GBNF, and that fails: Expected"),
        ("root ::= " + "(" * 5000, "nested too deeply"),
        ('{"grammars": [{"json_schema": {"contains": {}}}]}', "it is read as GBNF"),
        ("\x00", "it is read as GBNF"),
    ],
)
def test_what_is_refused(grammar: str, message: str) -> None:
    with pytest.raises(Error, match=message):
        probe(grammar)


EXPRESSIONS = [
    r"[a-z]{2,4}-\d+", "a|b|", r"(foo|ba[rz])+", r"\w+@\w+\.(com|org)", r"[^a-z\s]{3}", "a/b", r"\\/[/]", "a\nb",
    "(?i)abc", r"x*y+?z", "é+", "%json", r"\$\{\w\}", '"',
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(expression=st.sampled_from(EXPRESSIONS), seed=st.integers(0, 10**6))
def test_an_expression_matches_its_texts_as_a_whole(expression: str, seed: int) -> None:
    text = random_text(regex_grammar(expression), seed, 20)
    assert text is None or re.fullmatch(expression, text, re.ASCII)


def test_the_empty_expression_is_refused() -> None:
    with pytest.raises(Error, match="regex is empty"):
        regex_grammar("")


PIECES = [*'ab:|"/%{}()[]<>#\n =,\\', "%json ", "start: ", "{}", '"a"', "/b/"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        grammar, _ = check_grammar(text)
    except Error:
        return
    assert "x-guidance" in grammar or "%json" not in grammar


@given(
    st.lists(st.sampled_from(["start", "%llguidance", ":", " ", "\n", "\r", "\t", "a", "\v", "\u2028"]), max_size=12)
)
def test_what_is_lark_is_what_llguidance_says(parts: list[str]) -> None:
    from llguidance.gbnf_to_lark import is_lark_syntax

    assert (_IS_LARK.search("".join(parts)) is not None) == is_lark_syntax("".join(parts))


@pytest.mark.parametrize("grammar", ['start: "a"\n"' + '\\"' * 31_000, 'start: "a"\n/' + "\\/" * 31_000, "\n" * 60_000])
def test_a_hostile_grammar_is_refused_at_once(grammar: str) -> None:
    """Each of these took 20 seconds and more, some with all threads of the process waiting."""
    started = time.monotonic()
    with pytest.raises(Error, match=r"line 2: what begins with . has no end|No 'root' rule"):
        check_grammar(to_lark(grammar))
    assert time.monotonic() - started < 5
