"""A profile as a Chrome trace."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from numballama.bench.trace import chrome_trace, write_trace
from numballama.errors import Error
from tests.unit.bench.test_profiler import MADE


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
    assert steps[1]["args"]["percent_of_bandwidth"] == pytest.approx(50) and steps[1]["args"]["part"] == "attention"
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"], "nothing is left beside it"
    with pytest.raises(Error, match="cannot be written"):
        write_trace(MADE, tmp_path / "no" / "folder.json")


def test_without_a_bandwidth_there_is_no_percentage() -> None:
    events = chrome_trace(replace(MADE, bandwidth=None))["traceEvents"]
    assert not any("percent_of_bandwidth" in event["args"] for event in events)
    assert events[-1]["args"]["gigabytes_per_second"] == pytest.approx(2000)
