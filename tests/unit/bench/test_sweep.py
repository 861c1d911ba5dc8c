"""Sweeps: each combination is measured once, and the table, CSV, JSON and picture show what was measured."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

import numballama
from numballama import ContextError, Error, Model
from numballama.bench.benchmark import bench
from numballama.bench.sweep import Speed, as_csv, as_scaling_table, as_table, draw, scaling, sweep, to_dict
from numballama.bench.traffic import bytes_per_token
from tests.helpers.tiny import TINY


def test_each_combination_once(tiny_file: Path) -> None:
    opened: list[tuple[int | None, int | None, int]] = []

    def open_model(context: int | None, threads: int | None, gpus: int) -> Model:
        opened.append((context, threads, gpus))
        return numballama.compile(tiny_file, device="cpu", context=context, threads=threads, max_sequences=2)

    measured = list(
        sweep(open_model, contexts=(40, None), threads=(1,), prompts=(3, 5), sequences=(1, 2), tokens=4, repeats=1)
    )
    assert opened == [(40, 1, 1), (None, 1, 1)]
    found = [(each.context, each.threads, each.prompt_tokens, each.sequences) for each in measured]
    assert found == [(c, 1, p, s) for c in (40, TINY.context) for p in (3, 5) for s in (1, 2)]
    speeds = [Speed.of(each) for each in measured]
    assert all(each.prefill_tokens_per_second > 0 and each.decode_tokens_per_second > 0 for each in speeds)
    assert len({each.memory_bandwidth_bytes_per_second for each in measured}) == 1, "measured once"
    shared = json.loads(json.dumps(to_dict(measured[0], speeds)))
    assert shared["model"] == tiny_file.name and len(shared["runs"]) == 8 and shared["runs"][7]["prompt_tokens"] == 5
    assert shared["batch_invariant"] is False


def test_a_step_of_two_sequences_reads_the_weights_once(tiny_file: Path) -> None:
    with numballama.compile(tiny_file, device="cpu", max_sequences=2) as model:
        one, far = bytes_per_token(model, 10), bytes_per_token(model, 20)
        cache = (far - one) // 10  # bytes of a position
        two = bytes_per_token(model, 10, sequences=2)
        row, table = TINY.dim * 4, model.program.graph.values["page_table"].nbytes
        extra = cache * 11 + cache + row  # its positions, its new one, its row of the embedding
        assert two - one == extra + 2 * TINY.n_layers * table, "and the page table, which each op reads"
        with pytest.raises(Error, match=r"3 sequences at once need compile\(max_sequences=3\), not 2"):
            bench(model, 3, 4, 1, sequences=3)
        with pytest.raises(Error, match="a sequence ended before the last one began"):
            bench(model, 70, 1, 1, sequences=2)
    with (
        numballama.compile(tiny_file, device="cpu", max_sequences=2, kv_tokens=TINY.context) as model,
        pytest.raises(ContextError, match="2 sequences of 150 tokens do not fit the KV cache"),
    ):
        bench(model, 130, 20, 1, sequences=2)


SPEEDS = [
    Speed("numballama", 512, 2, 1, 128, 64, 1234.5, 56.75, 0.25, 0.5),
    Speed("llama.cpp", 512, 2, 1, 128, 64, 617.25, 60.5, 0.5),
    Speed("numballama", 512, 2, 1, 256, 64, 1000, 50, 0.5, 0.4),
]
ON_GPUS = [
    Speed("numballama", 512, 132, sequences, 128, 64, prefill, decode, 0.5, 0.4, gpus, communication)
    for gpus, sequences, prefill, decode, communication in (
        (2, 1, 3000, 450, 0.0003), (1, 1, 2000, 300, None), (1, 8, 4000, 1000, None), (2, 8, 7000, 1700, None),
        (4, 1, 5000, 600, 0.0004),
    )
]  # fmt: skip


def test_csv_and_table() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(SPEEDS))))
    assert [row["engine"] for row in rows] == ["numballama", "llama.cpp", "numballama"]
    assert float(rows[0]["prefill_tokens_per_second"]) == 1234.5 and rows[1]["bandwidth_fraction"] == ""
    head, *lines = as_table(SPEEDS).splitlines()
    assert len({len(line) for line in (head, *lines)}) == 1 and lines[0].split()[-2:] == ["1,234.5", "56.8"]
    assert {row["gpus"] for row in rows} == {"1"} and {row["communication_s"] for row in rows} == {""}
    head, *lines = as_table(ON_GPUS).splitlines()
    assert [line.split()[head.split().index("gpus") + 1] for line in lines] == ["2", "1", "1", "2", "4"]


def test_scaling_is_over_the_fewest_gpus_of_the_same_options() -> None:
    """In any order of measurements. Nothing is compared with other numbers of sequences, or with llama.cpp."""
    found = scaling(ON_GPUS)
    assert [(each.gpus, each.over_gpus, each.sequences) for each in found] == [(2, 1, 1), (2, 1, 8), (4, 1, 1)]
    assert [(each.prefill_ratio, each.decode_ratio) for each in found] == [(1.5, 1.5), (1.75, 1.7), (2.5, 2)]
    assert [each.decode_step_s for each in found] == [1 / 450, 8 / 1700, 1 / 600]
    head, *lines = as_scaling_table(found).splitlines()
    assert head.split()[-1] == "communication" and len(lines) == 3
    assert lines[0].endswith("128      1.50      1.50  300 µs of 2,222 µs a token")
    assert lines[1].endswith("1.75      1.70"), "not measured"
    assert scaling(SPEEDS) == []
    other = [replace(speed, engine="llama.cpp") for speed in ON_GPUS[:1]] + ON_GPUS[1:2]
    assert scaling(other) == []
    assert "gpus 4" in draw(ON_GPUS, "several")


def test_picture() -> None:
    root = ElementTree.fromstring(draw(SPEEDS, "a <model> & more"))
    names = {"svg": "http://www.w3.org/2000/svg"}
    texts = [element.text for element in root.iterfind(".//svg:text", names)]
    assert texts[0] == "a <model> & more"
    assert [text for text in texts if text and "prompt 1" in text] == [
        "numballama, prompt 128",
        "llama.cpp, prompt 128",
    ]
    bars = [float(bar.attrib["width"]) for bar in root.iterfind(".//svg:rect[@rx]", names)]
    assert len(bars) == 6 and bars[0] == 2 * bars[1] == max(bars[:3]) and bars[4] == max(bars[3:])
    assert "{" not in "".join(text or "" for text in texts)
    assert "numballama" in draw(SPEEDS[:1], "one"), "nothing varies"
