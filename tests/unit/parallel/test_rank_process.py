"""What a rank's process does with its messages, in this process. Whole groups of processes: test_processes."""

from __future__ import annotations

import io
import json
import os
import queue
from pathlib import Path

import numpy as np
import pytest

from numballama import loader
from numballama.checkpoint import Weight
from numballama.cpu.backend import CpuBackend
from numballama.errors import Error
from numballama.export import export_model
from numballama.graph import KVLayout, build
from numballama.ir import Graph
from numballama.parallel.graph_json import dump_graph
from numballama.parallel.rank_memory import Kind, RankMemory, Until
from numballama.parallel.rank_process import COMMAND, GRAPH, Rank, Settings, read_messages
from tests.helpers.random_models import SMALL, save


def settings_of(path: Path, file: int = -1) -> Settings:
    """Those of the only rank: its graph exchanges nothing."""
    return Settings(str(path), "cpu", None, 0, 1, 1, 8, file, False, False)


def small_graph(weights: dict[str, Weight]) -> Graph:
    types = {name: weight.type for name, weight in weights.items()}
    return build(SMALL, types, KVLayout.of(SMALL, SMALL.context), 2, "rows")


def test_a_rank_runs_what_the_memory_says(tmp_path: Path) -> None:
    path, checkpoint = save(tmp_path, "llama2c-v1")
    settings = settings_of(path)
    memory = RankMemory.create(settings.sizes)
    rank = Rank(settings, memory)
    graph = small_graph(checkpoint.weights)
    rank.add_program(b"false\n" + dump_graph(graph))
    rank.add_program(b"true\n" + dump_graph(graph))
    memory.set_command(Kind.PAGES, 0, 0, 1)
    memory.data[0, 0] = 1
    rank.obey()
    alone = CpuBackend(checkpoint.weights, 1)
    program = alone.program(graph)
    alone.set_pages(0, 0, [1])
    for row, (name, numbers) in enumerate(
        {"ids": [3, 4], "positions": [0, 1], "sequences": [0, 0], "rows": [1]}.items()
    ):
        memory.data[row, : len(numbers)] = numbers
        program.inputs[name][: len(numbers)] = numbers
    program.run(2)
    for number in (0, 1):
        memory.set_command(Kind.RUN, number, 2, 1, Until.END)
        rank.obey()
        np.testing.assert_allclose(rank.programs[number].value("logits"), program.value("logits"), rtol=1e-4, atol=1e-5)
    plain, fused = rank.programs
    assert len(fused.plan.steps) < len(plain.plan.steps)
    calls: list[tuple[int | None, ...]] = []
    fused.run = lambda *arguments: calls.append(arguments)  # type: ignore[method-assign, assignment]
    for until in Until:
        memory.set_command(Kind.RUN, 1, 2, 1, until)
        rank.obey()
    assert calls == [(2, 0, end, 1) for end in (0, fused.prefill_end, None)]
    assert 0 < fused.prefill_end < len(fused.plan.steps)


def test_a_rank_needs_no_tokenizer(tmp_path: Path) -> None:
    """The model's own may be one that is not read: the caller has given another."""
    path, _ = save(tmp_path, "llama2c-v1")
    folder = tmp_path / "hf"
    export_model(path, folder, "safetensors", "f32")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(Error):
        loader.open_checkpoint(folder)
    settings = settings_of(folder)
    assert Rank(settings, RankMemory.create(settings.sizes)).programs == []


def test_settings_come_back_from_json(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "a model", 5)
    assert Settings(**json.loads(settings.as_json())) == settings and settings.sizes == (1, 1, 8)


@pytest.mark.parametrize("cut", [0, 3])
def test_messages_are_read_until_the_input_ends(monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """A graph that is cut off because rank 0 has ended is none."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    text = b"true\n{}"
    sent = COMMAND + GRAPH + len(text).to_bytes(8, "little") + text + COMMAND * 2
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    read_messages(io.BytesIO(sent[: len(sent) - cut]), messages)
    got = [messages.get() for _ in range(messages.qsize())]
    assert got == ([None, text, None, None] if not cut else [None])
    assert codes == [0]
