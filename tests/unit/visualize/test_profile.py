"""Tables of a profile: for a pipe, a terminal and a notebook."""

from __future__ import annotations

from dataclasses import replace

import pytest

from numballama.visualize.profile import as_html, as_text, show
from tests.helpers.markup import parsed, tags
from tests.unit.bench.test_profiler import MADE, WITH_PROMPT
from tests.unit.visualize.test_html import HOSTILE

ATTENTION = ["attention", "2", "6.00", "2.00", "4.00", "667", "33%", "75.0%"]
WHOLE = ["whole step", "4", "5.00", "3.00", "6.00", "1,201", "60%", "62.5%"]
LINEAR = ["linear_add (wo)", "linear", "2", "3.00", "2.00", "667", "33%", "75.0%"]


def test_tables_as_text() -> None:
    lines = as_text(MADE).splitlines()
    assert lines[0] == "one decode step of a model on a device, at position 9"
    assert lines[1] == "200,000 tokens/s; prompt: 9 tokens in 3.0 ms, 3,000 tokens/s"
    for row in (ATTENTION, WHOLE, LINEAR):
        assert " ".join(row) in [" ".join(line.split()) for line in lines]
    assert len({len(line) for line in lines[3:9]}) == 1, "columns line up"
    assert "2,000 GB/s" in lines[-1]


def test_tables_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow one breaks names, not numbers."""
    for columns in (120, 70):
        monkeypatch.setenv("COLUMNS", str(columns))
        show(MADE)
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert max(map(len, lines)) <= columns
        assert " ".join(ATTENTION) in lines and " ".join(WHOLE) in lines
        assert any(line.endswith(" ".join(LINEAR[2:])) for line in lines)


def test_tables_in_a_notebook() -> None:
    root = parsed(as_html(MADE))
    rows = [[cell.text for cell in row.children] for row in root.all("tr")]
    assert ATTENTION in rows and WHOLE in rows and LINEAR in rows
    widths = [piece.attributes["style"].partition(";")[0] for piece in root.all("i")]
    assert widths == ["width:12.50%", "width:25.00%", "width:50.00%", "width:12.50%"], "a piece a step"
    assert [piece.attributes["title"] for piece in root.all("i")][1] == "1 linear_add (wo): 2.00 µs"
    assert "script" not in tags(parsed(as_html(replace(MADE, model=HOSTILE))))
    assert "\x1b" not in as_text(replace(MADE, model=HOSTILE))


def test_the_prompts_run_has_operations_instead_of_a_floor(capsys: pytest.CaptureFixture[str]) -> None:
    title = "a run of 9 tokens of the prompt, positions 0 to 8"
    rows = [
        ["embedding", "1", "100.00", "0.04", "0.4", "–", "12.5%"],
        ["attention", "1", "700.00", "2.00", "2.9", "2,000", "87.5%"],
        ["whole run", "2", "1,000.00", "2.04", "2.0", "1,400", "125.0%"],
        ["linear_add (wo)", "gemm", "1", "700.00", "2.00", "2.9", "2,000", "87.5%"],
    ]
    show(WITH_PROMPT)
    for text in (as_text(WITH_PROMPT), capsys.readouterr().out):
        lines = [" ".join(line.split()) for line in text.splitlines()]
        assert title in lines and all(" ".join(row) in lines for row in rows)
    root = parsed(as_html(WITH_PROMPT))
    assert title in [each.text for each in root.all("h4")]
    cells = [[cell.text for cell in row.children] for row in root.all("tr")]
    assert all(row in cells for row in rows)


def test_a_step_below_the_clocks_resolution_has_no_rate() -> None:
    first, *rest = MADE.steps
    lines = [line.split() for line in as_text(replace(MADE, steps=(replace(first, seconds=1e-9), *rest))).splitlines()]
    assert ["embedding", "1", "0.00", "0.00", "0.00", "–", "–", "0.0%"] in lines
    assert ["embedding", "(tok_embeddings)", "embedding", "1", "0.00", "0.00", "–", "–", "0.0%"] in lines


def test_without_a_bandwidth_and_without_a_prompt() -> None:
    text = as_text(replace(MADE, bandwidth=None, prompt_s=None))
    assert "bandwidth is unknown" in text and "prompt" not in text
    assert ["attention", "2", "6.00", "–", "4.00", "667", "–", "75.0%"] in [line.split() for line in text.splitlines()]
