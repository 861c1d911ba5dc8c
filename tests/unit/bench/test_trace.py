"""A profile as a table and as a Chrome trace."""

import json
from pathlib import Path

import pytest

from numballama.bench.trace import as_text, show, write_trace
from numballama.errors import Error
from tests.unit.bench.test_profiler import MADE


def test_table_as_text() -> None:
    lines = as_text(MADE).splitlines()
    assert lines[0] == "one decode step of a model on a device, at position 9"
    assert lines[4].split() == ["linear_add", "(wo)", "linear", "2", "3.00", "2.00", "667", "33%", "75.0%"]
    assert lines[7].split() == ["sum", "4", "8.00", "6.00", "750", "38%", "100.0%"]
    assert lines[8].startswith("whole step, as it runs") and lines[8].split()[-5:] == [
        "5.00", "6.00", "1,201", "60%", "62.5%"
    ]  # fmt: skip
    assert len({len(line) for line in lines[3:6]}) == 1, "columns line up"


def test_table_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    show(MADE)
    shown = capsys.readouterr().out
    for word in ("linear_add (wo)", "667", "33%", "75.0%", "whole step", "2,000 GB/s"):
        assert word in shown


def test_trace_is_a_chrome_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(MADE, path)
    trace = json.loads(path.read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["ph"] for event in trace["traceEvents"]} == {"M", "X"}
    whole, *steps = events
    assert whole["dur"] == pytest.approx(5) and whole["tid"] == 0
    assert [event["dur"] for event in steps] == pytest.approx([1, 2, 4, 1])
    assert [event["ts"] for event in steps] == pytest.approx([0, 1, 3, 7])
    assert {event["tid"] for event in steps} == {1} and {event["pid"] for event in events} == {1}
    assert steps[1]["args"]["bytes"] == 2_000_000 and steps[1]["args"]["layer"] == 0
    assert steps[1]["args"]["percent_of_bandwidth"] == pytest.approx(50)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"], "nothing is left beside it"
    with pytest.raises(Error, match="cannot be written"):
        write_trace(MADE, tmp_path / "no" / "folder.json")
