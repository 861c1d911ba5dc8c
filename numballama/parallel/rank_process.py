"""The process of a rank above 0: `python -m numballama.parallel.rank_process SETTINGS`, which `processes` starts.

Rank 0 sends messages through the standard input: GRAPH with a graph as JSON, and COMMAND for what stands in
`RankMemory`. The end of the input means that rank 0 has ended or wants no more: then this process ends at once, also in
the middle of a kernel that waits for another rank.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import BinaryIO

from .. import loader
from ..host.child import continue_when_parent_ends
from ..quantization import policy
from .graph_json import load_graph
from .rank_device import RankProgram, open_rank
from .rank_memory import BEATS, DONE, FAULTS, Kind, RankMemory, Sizes, Until
from .shares import Shares
from .weights import converted, rank_weights

GRAPH, COMMAND = b"G", b"C"
"""First byte of a message. After GRAPH come 8 bytes, the length of the rest: a line with the fusions, and the graph."""
BEAT_S = 0.05
"""Seconds between two signs of life."""
INPUTS = ("ids", "positions", "sequences", "rows")
"""Inputs of a run, in the order of the rows of `RankMemory.data`."""


@dataclass(frozen=True)
class Settings:
    """What a rank's process is started with."""

    path: str
    device: str
    dtype: policy.Dtype | None
    rank: int
    ranks: int
    workers: int
    exchange_size: int
    file: int
    """Descriptor of the shared memory, which the process has inherited."""
    batch_invariant: bool
    int8_activations: bool
    by_nccl: bool = False
    """Whether NCCL exchanges values, between GPUs."""

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.ranks, self.workers, self.exchange_size)


class Rank:
    """A rank with its part of the weights. Opening it reads no weight."""

    def __init__(self, settings: Settings, memory: RankMemory) -> None:
        checkpoint = loader.open_checkpoint(settings.path, with_tokenizer=False)
        config, weights = checkpoint.config, checkpoint.weights
        targets = policy.fallback_types(weights) | policy.types_to_convert(config, weights, settings.dtype)
        types = {name: weight.type for name, weight in weights.items()} | targets
        self.shares = Shares.of(config, types, settings.ranks, settings.int8_activations)
        own = rank_weights(converted(weights, targets, self.shares), self.shares, settings.rank)
        self.memory = memory
        self.programs: list[RankProgram] = []
        where = settings.device, settings.rank, settings.ranks
        self.device = open_rank(*where, own, settings.workers, settings.batch_invariant, settings.by_nccl)
        self.device.publish(memory)

    def add_program(self, message: bytes) -> None:
        """Compile a graph."""
        fusions, _, graph = message.partition(b"\n")
        self.programs.append(self.device.backend.program(load_graph(graph), json.loads(fusions)))

    def obey(self) -> None:
        """Do what the command in the shared memory says."""
        _, kind, *arguments = self.memory.command.tolist()
        if kind == Kind.PAGES:
            slot, first, count = arguments[:3]
            self.device.backend.set_pages(slot, first, self.memory.data[0, :count].tolist())
        elif kind == Kind.CONNECT:
            self.device.connect(self.memory, self.shares.vocab)
        elif kind == Kind.PREPARE:
            self.device.backend.prepare(self.programs[arguments[0]])
        elif kind == Kind.SYNCHRONIZE:
            self.device.backend.synchronize()
        else:
            self._run(Kind(kind), arguments)

    def _run(self, kind: Kind, arguments: Sequence[int]) -> None:
        number, tokens, rows, until = arguments[:4]
        program = self.programs[number]
        for row, name in zip(self.memory.data, INPUTS, strict=True):
            if name in program.inputs:
                count = rows if name == "rows" else tokens
                program.inputs[name][:count] = row[:count]
        if kind == Kind.SUBMIT:
            self.device.receive(program, tokens, rows)
            return
        end = {Until.NOTHING: 0, Until.PREFILL_END: program.prefill_end, Until.END: None}[Until(until)]
        program.run(tokens, 0, end, rows)


def read_messages(source: BinaryIO, messages: queue.SimpleQueue[bytes | None]) -> None:
    """Put each message into the queue: a graph, or None for a command. Ends the process with the input."""
    while kind := source.read(1):
        if kind == COMMAND:
            messages.put(None)
            continue
        length = int.from_bytes(source.read(8), "little")
        text = source.read(length)
        if len(text) < length:
            break
        messages.put(text)
    os._exit(0)


def beat(memory: RankMemory, rank: int) -> None:
    """Count while this process runs: one that is stopped does not, and neither does one that gets no time."""
    import resource  # not on Windows, where no rank is a process

    while True:
        memory.done[rank, BEATS] += 1
        memory.done[rank, FAULTS] = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        time.sleep(BEAT_S)


def main(arguments: Sequence[str]) -> None:
    """Serve as a rank until the standard input ends."""
    settings = Settings(**json.loads(arguments[0]))
    memory = RankMemory(settings.file, settings.sizes)
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    continue_when_parent_ends()
    threading.Thread(target=read_messages, args=(sys.stdin.buffer, messages), daemon=True).start()
    threading.Thread(target=beat, args=(memory, settings.rank), daemon=True).start()
    try:
        rank = Rank(settings, memory)
        while True:
            memory.done[settings.rank, DONE] += 1
            message = messages.get()
            if message is None:
                rank.obey()
            else:
                rank.add_program(message)
    except BaseException as error:
        memory.fail(settings.rank, f"{type(error).__name__}: {error}")
        memory.stop()
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
