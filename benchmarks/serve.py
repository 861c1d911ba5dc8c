"""Measure servers of OpenAI's interface side by side: tokens/s, time to the first token, time between tokens.

python benchmarks/serve.py ours=http://127.0.0.1:8000 llama.cpp=http://127.0.0.1:8080 [--clients 1 4 8] [--out FILE]
python benchmarks/serve.py ours=http://127.0.0.1:8000 engine=MODEL.gguf --device cuda --clients 1 16 64

A file in place of an address is the engine without HTTP, in this process: what a server could reach at most.
On a GPU start ours with `--api-server-count 4`: many clients then cost the engine's process little.
The clients of a server at an address are in several processes, half as many as there are cores and at most 8: one
alone needs as long for the answers as the server. They begin each round together. On two cores, and with `--rate`, they
are in this process. `--processes` sets another number.
Each round runs every server in turn. Closed loop: each of N clients sends its next request when its last answer has
ended. With `--rate X` requests arrive at random instead (Poisson, X a second), whoever is still busy. Requests are
streamed chat completions, greedy, of prompts that differ from the first word, so no cache helps. A connection is kept
for further requests, those of later rounds too, as OpenAI's client does. Tokens are those of `usage`. Times are of the
client, in ms: the first token counts from the moment at which the request is written.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import numballama
from numballama.bench.benchmark import machine
from numballama.files import atomic_write
from numballama.model import Model
from numballama.sampling import SamplingParams

Ask = Callable[[dict[str, Any]], Awaitable["Answer"]]
"""Sends the body of a request and reads the answer."""
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


@dataclass
class Answer:
    """What a client saw of one request. Times are of `time.perf_counter`."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    """When each event with text arrived."""
    ended: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""


def prompt_of(words: int, seed: int) -> str:
    chosen = random.Random(seed)
    return f"{seed} " + " ".join(chosen.choice(WORDS) for _ in range(words)) + "\nTell me a long story about this."


class Server:
    """A server at an address, and the connections to it that no request uses."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._free: list[Streams] = []
        key = os.environ.get("NUMBALLAMA_API_KEY")
        self._head = [
            "POST /v1/chat/completions HTTP/1.1", f"Host: {self._parts.netloc}", "Content-Type: application/json",
            *([f"Authorization: Bearer {key}"] if key else []),
        ]  # fmt: skip

    async def ask(self, body: dict[str, Any]) -> Answer:
        """Send a request and read the answer's events."""
        data = json.dumps(body).encode()
        request = "\r\n".join([*self._head, f"Content-Length: {len(data)}", "", ""]).encode() + data
        while self._free:
            streams = self._free.pop()
            if not streams[0].at_eof():
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):  # closed when it was idle
                    return await self._ask(streams, request)
            streams[1].close()
        return await self._ask(await self._connect(), request)

    async def _connect(self) -> Streams:
        return await asyncio.open_connection(self._parts.hostname, self._parts.port or 80, limit=1 << 20)

    async def _ask(self, streams: Streams, request: bytes) -> Answer:
        reader, writer = streams
        answer = Answer(time.perf_counter())
        writer.write(request)
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        headers = {name: value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        rest = b""
        try:
            async for part in _body(reader, headers):
                *events, rest = (rest + part).split(b"\n\n")
                for event in events:
                    if event.startswith(b"data: ") and event != b"data: [DONE]":
                        _take(answer, json.loads(event[6:]))
        except BaseException:
            writer.close()
            raise
        if status.split()[1] != b"200":
            answer.error = rest[-300:].decode("utf-8", "replace") or status.decode()
        answer.ended = time.perf_counter()
        if headers.get(b"connection") == b"close" or not {b"content-length", b"transfer-encoding"} & headers.keys():
            writer.close()
        else:
            self._free.append(streams)
        return answer


async def _body(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> AsyncIterator[bytes]:
    """The parts of an answer's body as they come."""
    if headers.get(b"transfer-encoding") == b"chunked":
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
    elif b"content-length" in headers:
        yield await reader.readexactly(int(headers[b"content-length"]))
    else:
        while part := await reader.read(1 << 16):
            yield part


def _take(answer: Answer, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        answer.error = str(chunk["error"])
    for choice in chunk.get("choices", ()):
        if choice.get("delta", {}).get("content"):
            answer.arrivals.append(time.perf_counter())
    if usage := chunk.get("usage"):
        answer.tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]


async def ask_engine(model: Model, body: dict[str, Any]) -> Answer:
    """The same request to an engine in this process."""
    answer = Answer(time.perf_counter())
    ids = model.apply_chat_template(body["messages"])
    params = SamplingParams(temperature=0, max_tokens=body["max_tokens"], ignore_eos=True)
    assert isinstance(ids, list)
    async for responses in model.engine().submit(ids, params, strip_leading_space=True).batches():
        if any(response.text for response in responses):
            answer.arrivals.append(time.perf_counter())
        answer.tokens += len(responses)
        answer.prompt_tokens = responses[-1].prompt_tokens
    answer.ended = time.perf_counter()
    return answer


async def closed_loop(send: Ask, bodies: Sequence[dict[str, Any]], clients: int) -> list[Answer]:
    """Each client sends its next request when its last answer has ended."""
    waiting, answers = iter(bodies), list[Answer]()

    async def client() -> None:
        for body in waiting:
            answers.append(await send(body))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


MOST_PROCESSES = 8


def processes_for(clients: int, wanted: int | None = None) -> int:
    """The number of processes that share `clients` clients; `wanted` if it is given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(clients, min(cores // 2, MOST_PROCESSES) if wanted is None else wanted), 1)


class Processes:
    """Processes that hold the clients of a server, as evenly as can be."""

    def __init__(self, url: str, number: int) -> None:
        context = multiprocessing.get_context("spawn")  # this process may have an engine
        self._barrier = context.Barrier(number)
        self._pipes: list[Connection] = []
        for _ in range(number):
            ours, theirs = context.Pipe()
            context.Process(target=_be_clients, args=(url, self._barrier, theirs), daemon=True).start()
            self._pipes.append(ours)

    def closed_loop(self, bodies: Sequence[dict[str, Any]], clients: int) -> list[Answer]:
        """As the function of this name."""
        number = len(self._pipes)
        for n, pipe in enumerate(self._pipes):
            pipe.send((bodies[n::number], len(range(n, clients, number))))
        found = [pipe.recv() for pipe in self._pipes]
        for each in found:
            if isinstance(each, Exception):
                raise each
        return [answer for answers in found for answer in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # which ends its process


def _be_clients(url: str, barrier: Barrier, pipe: Connection) -> None:
    """What a process of clients does: rounds, until its pipe is closed."""
    server, loop = Server(url), asyncio.new_event_loop()
    with contextlib.suppress(EOFError):
        while True:
            bodies, clients = pipe.recv()
            barrier.wait()
            try:
                pipe.send(loop.run_until_complete(closed_loop(server.ask, bodies, clients)))
            except Exception as error:
                pipe.send(error)


async def open_loop(send: Ask, bodies: Sequence[dict[str, Any]], rate: float, seed: int) -> list[Answer]:
    """Requests arrive at random, `rate` a second on average."""
    chosen, tasks = random.Random(seed), list[asyncio.Future[Answer]]()
    for body in bodies:
        tasks.append(asyncio.ensure_future(send(body)))
        await asyncio.sleep(chosen.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Rates and percentiles of one round."""
    good = [each for each in answers if not each.error and each.arrivals]
    failed = [each.error or "no text" for each in answers if each.error or not each.arrivals]
    if not good:
        return {"failed": len(failed), "first_error": failed[0]}
    seconds = max(each.ended for each in good) - min(each.sent for each in good)
    first = [1e3 * (each.arrivals[0] - each.sent) for each in good]
    between = [1e3 * (b - a) for each in good for a, b in pairwise(each.arrivals)] or [0.0]
    whole = [1e3 * (each.ended - each.sent) for each in good]
    return {
        "requests": len(good), "failed": len(failed), "first_error": failed[0] if failed else None, "seconds": seconds,
        "tokens_per_second": sum(each.tokens for each in good) / seconds,
        "requests_per_second": len(good) / seconds,
        "prompt_tokens": statistics.mean(each.prompt_tokens for each in good),
        **{f"{name}_ms": percentiles(v) for name, v in (("ttft", first), ("inter_token", between), ("e2e", whole))},
    }  # fmt: skip


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": float(np.quantile(values, p / 100)) for p in (50, 90, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL or NAME=FILE")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--rate", type=float, help="requests a second that arrive at random, in place of clients")
    parser.add_argument("--requests", type=int, default=4, help="requests a round, for each client (default 4)")
    parser.add_argument("--prompt-words", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, help="processes that hold the clients of a server")
    parser.add_argument("--device", default="auto", help="for a file: where its engine runs")
    parser.add_argument("--context", type=int, default=2048, help="for a file: its context (default 2048)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        servers = dict(each.split("=", 1) for each in args.servers)
        measure(args, servers, {name: target(where, args, stack) for name, where in servers.items()})


def target(where: str, args: argparse.Namespace, stack: contextlib.ExitStack) -> Ask:
    """What asks a server at an address, or the engine of a model file, which is closed with `stack`."""
    if "://" in where:
        return Server(where).ask
    model = numballama.compile(where, device=args.device, max_sequences=max(args.clients), context=args.context)
    stack.enter_context(model)
    stack.enter_context(model.engine())
    return partial(ask_engine, model)


def measure(args: argparse.Namespace, servers: dict[str, str], asks: dict[str, Ask]) -> None:
    seeds, loop = count(), asyncio.new_event_loop()

    def bodies(number: int, tokens: int) -> list[dict[str, Any]]:
        return [
            {"model": "any", "messages": [{"role": "user", "content": prompt_of(args.prompt_words, next(seeds))}],
             "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
             "stream_options": {"include_usage": True}}
            for _ in range(number)
        ]  # fmt: skip

    found: dict[str, Any] = {
        "what": "servers, closed loop",
        "machine": machine(),
        "processes": {f"{load} clients": processes_for(load, args.processes) for load in args.clients},
        "arguments": vars(args) | {"out": None},
    }
    for load in [args.rate] if args.rate else args.clients:
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
        several = 1 if args.rate else processes_for(load, args.processes)
        apart = {name: Processes(url, several) for name, url in servers.items() if several > 1 and "://" in url}
        for number in range(args.rounds + 1):
            for name, ask in asks.items():
                asked = bodies(args.requests * (8 if args.rate else load), args.max_tokens)
                if name in apart:
                    answers = apart[name].closed_loop(asked, load)
                elif args.rate:
                    answers = loop.run_until_complete(open_loop(ask, asked, args.rate, number))
                else:
                    answers = loop.run_until_complete(closed_loop(ask, asked, load))
                result = figures(answers)
                if number:  # the first round only warms up
                    rounds[name].append(result)
        for processes in apart.values():
            processes.close()
        label = f"{load:g} a second" if args.rate else f"{load} clients"
        found[label] = {}
        for name, results in rounds.items():
            rate = statistics.median(each.get("tokens_per_second", 0.0) for each in results)
            ttft = statistics.median(each["ttft_ms"]["p50"] if "ttft_ms" in each else float("nan") for each in results)
            failed = sum(each["failed"] for each in results)
            found[label][name] = {"tokens_per_second": rate, "ttft_p50_ms": ttft, "failed": failed, "rounds": results}
            print(f"{label}: {name}: {rate:,.1f} tokens/s, first token {ttft:,.0f} ms, {failed} failed", flush=True)
    if args.out:
        with atomic_write(args.out) as file:
            file.write(json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
