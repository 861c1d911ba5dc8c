"""Load a server for an hour with good, broken and abandoned requests. Says whether it grows, hangs or answers wrongly.

python benchmarks/soak_server.py http://127.0.0.1:8000 --pid PID [--minutes 60] [--clients 12] [--out FILE]

Each client sends one request after the other. Most are greedy ones whose answers are known from before the load: a
wrong byte is a failure. They are texts, chats, responses and messages, with tools, custom tools, schemas, several
choices and log probabilities. Others are broken (JSON, fields, paths, half a request), are left by their client at a
random moment, or restrict the text to a schema. Every minute prints counts, and the resident memory and the open files
of the server's process (Linux). In the end the server must be idle: no running or waiting request, no page in use.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from numballama.bench.benchmark import machine
from numballama.files import atomic_write

PROMPTS = ("Once upon a time", "The little dog", "Lily found a red ball in the park. She", "One day, a boy named Tim")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Tim", "Lily"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TIMEOUT_S = 120
"""A request that takes longer is stuck."""


class WrongAnswerError(Exception):
    """The server answered what it must not."""


@dataclass
class Soak:
    """The server, the answers that are known, and what happened so far."""

    url: str
    key: str | None
    expected: list[tuple[str, dict[str, Any], Any]] = field(default_factory=list)
    """(path, greedy request, what is always the same of its answer)."""
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def send(self, path: str, body: bytes, method: str = "POST") -> tuple[asyncio.StreamReader, Any]:
        """Open a connection of its own and send a request."""
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 22)
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n{key}"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        return reader, writer

    async def ask(self, path: str, body: Any, method: str = "POST") -> tuple[int, bytes]:
        """(status, body) of a whole answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        reader, writer = await self.send(path, data, method)
        try:
            status = int((await reader.readline()).split()[1])
            head = await reader.readuntil(b"\r\n\r\n")
            rest = await reader.read()
        finally:
            writer.close()
        return status, _chunks(rest) if b"chunked" in head.lower() else rest

    # What clients do. Each is one request.

    async def known(self, chosen: random.Random) -> str:
        path, body, expected = chosen.choice(self.expected)
        stream = path == "/v1/completions" and "n" not in body and chosen.random() < 0.5
        status, data = await self.ask(path, body | {"stream": stream})
        if status == 429:
            return "429"
        if status != 200:
            raise WrongAnswerError(f"{path} {body!r:.300}: {status}: {data[:300]!r}")
        if stream:
            found, expected = _streamed(data), expected["choices"][0]["text"]
        else:
            found = same_always(json.loads(data))
        if found != expected:
            raise WrongAnswerError(f"{path} {body!r:.300}: {found!r} instead of {expected!r}")
        return f"known {path}"

    async def restricted(self, chosen: random.Random) -> str:
        form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
        body = greedy(chosen.choice(PROMPTS), 60) | {
            "response_format": form,
            "temperature": 1,
            "seed": chosen.getrandbits(32),
        }
        status, data = await self.ask("/v1/completions", body)
        if status == 429:
            return "429"
        found = json.loads(json.loads(data)["choices"][0]["text"])
        if set(found) != {"name", "age"} or found["name"] not in ("Tim", "Lily") or not 0 <= found["age"] <= 9:
            raise WrongAnswerError(f"not of the schema: {found!r}")
        return "restricted"

    async def left(self, chosen: random.Random) -> str:
        """A client that goes away: before, while or after it is answered."""
        path, body = chosen.choice([("/v1/completions", greedy(chosen.choice(PROMPTS), 200)), *KNOWN])
        body = body | {"stream": chosen.random() < 0.7}
        if path.endswith("completions"):
            body["n"] = chosen.choice((1, 1, 3))
        reader, writer = await self.send(path, json.dumps(body).encode())
        try:
            if chosen.random() < 0.7:
                await asyncio.wait_for(reader.read(chosen.randrange(1, 4000)), chosen.random() * 2)
        except TimeoutError:
            pass
        finally:
            if chosen.random() < 0.5:
                writer.transport.abort()
            writer.close()
        return "left"

    async def half(self, chosen: random.Random) -> str:
        """Half a request, and gone."""
        parts = urlsplit(self.url)
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        text = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n" + b'{"prompt": ' * 9
        writer.write(text[: chosen.randrange(1, len(text))])
        await writer.drain()
        await asyncio.sleep(chosen.random() / 10)
        writer.close()
        return "half"

    async def broken(self, chosen: random.Random) -> str:
        """A request that is wrong: 400 to 499 in OpenAI's shape."""
        path, body = chosen.choice(BROKEN)
        status, data = await self.ask(path, body)
        if status == 429:
            return "429"
        if not 400 <= status < 500 or not json.loads(data)["error"]["message"]:
            raise WrongAnswerError(f"{path} {body!r:.100}: {status} {data[:300]!r}")
        return "broken"

    async def figures(self) -> dict[str, float]:
        """Running and waiting requests and the share of pages in use, from /metrics."""
        _, data = await self.ask("/metrics", b"", "GET")
        pattern = (
            r"^numballama:(?:num_requests_(?=[rw])|kv_cache_(?=u))(running|waiting|usage_perc)(?:\{[^}]*\})? (\S+)$"
        )
        return {name: float(value) for name, value in re.findall(pattern, data.decode(), re.MULTILINE)}

    async def client(self, end: float, seed: int) -> None:
        chosen = random.Random(seed)
        kinds: list[Callable[[random.Random], Awaitable[str]]] = [
            self.known,
            self.restricted,
            self.left,
            self.half,
            self.broken,
        ]
        while time.monotonic() < end and len(self.wrong) < 20:
            (kind,) = chosen.choices(kinds, (60, 8, 20, 4, 8))
            try:
                self.counts[await asyncio.wait_for(kind(chosen), TIMEOUT_S)] += 1
            except TimeoutError:
                self.wrong.append(f"{kind.__name__}: no answer in {TIMEOUT_S} s")
            except Exception as error:
                self.wrong.append(f"{kind.__name__}: {error!r:.500}")
            if chosen.random() < 0.02:
                await asyncio.sleep(chosen.random() * 3)  # a client that starts again


def greedy(prompt: str, tokens: int) -> dict[str, Any]:
    return {"model": "any", "prompt": prompt, "max_tokens": tokens, "temperature": 0}


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 60, "temperature": 0, **more}


FUNCTION = {"name": "look", "parameters": SCHEMA}
GRAMMAR = {"type": "grammar", "syntax": "regex", "definition": r"[a-c]{2}\d{3}(, \w+)?"}
LOOK = {"type": "function", "function": FUNCTION}
CODE = {"type": "custom", "custom": {"name": "code", "format": {"type": "grammar", "grammar": GRAMMAR}}}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
KNOWN: list[tuple[str, dict[str, Any]]] = [
    *(("/v1/completions", greedy(prompt, tokens)) for prompt in PROMPTS for tokens in (1, 17, 60)),
    ("/v1/completions", greedy(PROMPTS[0], 30) | {"n": 3, "logprobs": 3, "echo": True}),
    ("/v1/completions", greedy(PROMPTS[1], 30) | {"prompt": [[1, 403], [1, 338, 407]], "n": 2}),
    (CHAT, chat("Tell me of a dog.", n=2, logprobs=True, top_logprobs=3)),
    (CHAT, chat("Tell me of a cat.", tools=[LOOK, CODE])),
    (CHAT, chat("Look.", tools=[LOOK, CODE], tool_choice="required", n=2)),
    (CHAT, chat("Code.", tools=[LOOK, CODE], tool_choice={"type": "custom", "custom": {"name": "code"}})),
    (CHAT, chat("Who?", response_format={"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA}})),
    (
        RESPONSES,
        {
            "input": "Tell me of a bird.",
            "temperature": 0,
            "max_output_tokens": 60,
            "tools": [{"type": "function", **FUNCTION}, {"type": "custom", "name": "code", "format": GRAMMAR}],
            "tool_choice": "required",
        },
    ),
    (RESPONSES, {"input": "Tell me of a fish.", "temperature": 0, "max_output_tokens": 40}),
    (MESSAGES, chat("Tell me of a fox.")),
    (
        MESSAGES,
        chat("Look there.", tools=[{"name": "look", "input_schema": SCHEMA}], tool_choice={"type": "any"}),
    ),
]
"""Greedy requests."""
CHANGES = ("id", "created", "created_at", "completed_at", "call_id", "usage", "logprob", "token_logprobs")
"""Fields of answers that differ each time: ids and times, what was cached, the last bits of log probabilities."""


def same_always(value: Any) -> Any:
    """What is the same in each answer to a greedy request."""
    if isinstance(value, dict):
        left = {name: each for name, each in value.items() if name not in CHANGES}
        if isinstance(top := left.get("top_logprobs"), list):
            left["top_logprobs"] = len(top)
        return {name: same_always(each) for name, each in left.items()}
    return [same_always(each) for each in value] if isinstance(value, list) else value


BROKEN: list[tuple[str, Any]] = [
    (CHAT, {"messages": [{}] * 2000}),
    (CHAT, chat("a", tools=[LOOK, LOOK])),
    (CHAT, chat("a", tools=[CODE], tool_choice={"type": "custom", "custom": {"name": "look"}})),
    (CHAT, chat("a", tools=[{"type": "custom", "custom": {"name": "code", "format": {"type": "grammar"}}}])),
    (RESPONSES, {"input": [{"role": "user", "content": "a"}] * 2048, "instructions": "b"}),
    (RESPONSES, {"input": "a", "metadata": {str(number): 1 for number in range(5000)}}),
    (MESSAGES, chat("a", tools=[{"name": "f", "input_schema": {"type": "array"}}])),
    (
        MESSAGES,
        {"max_tokens": 5, "messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}] * 200}]},
    ),
    ("/v1/completions", {"prompt": "a", "grammar": 'start: "a"\n"' + '\\"' * 20_000}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 200, "temperature": 0, "regex": r"[\s\S]*[aeiou][\s\S]{60}y"}),
    ("/detokenize", {"tokens": ["a"] * 10_000}),
    ("/v1/completions", b"{"),
    ("/v1/completions", b"\xff\xfe" * 500),
    ("/v1/completions", {"prompt": [[]]}),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}),
    ("/v1/completions", {"prompt": "a", "regex": "("}),
    ("/v1/completions", {"prompt": "a", "json_schema": {"uniqueItems": True}}),
    ("/v1/completions", {"prompt": "a " * 100_000}),
    ("/v1/completions", {"prompt": [1 << 30]}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "a"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "logit_bias": {"x": 1}}),
    ("/v1/nothing", {}),
    ("/v1/completions", b"[" * 100_000),
]


def _chunks(data: bytes) -> bytes:
    """The body of a chunked answer."""
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        parts.append(data[:length])
        data = data[length + 2 :]
    return b"".join(parts)


def _streamed(data: bytes) -> str:
    events = [line.removeprefix(b"data: ") for line in data.split(b"\n") if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise WrongAnswerError(f"the stream ends with {data[-200:]!r}")
    return "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])


def resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024


def open_files(pid: int) -> int:
    """Open files of a process, its sockets included."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


async def soak(args: argparse.Namespace) -> dict[str, Any]:
    state = Soak(args.url, args.key)
    for path, body in KNOWN:
        status, data = await state.ask(path, body)
        if status != 200:
            raise WrongAnswerError(f"{path} {body}: {status} {data!r:.300}")
        state.expected.append((path, body, same_always(json.loads(data))))
    begin = time.monotonic()
    end = begin + 60 * args.minutes
    clients = [asyncio.create_task(state.client(end, seed)) for seed in range(args.clients)]
    memory, files = [resident_mb(args.pid)], [open_files(args.pid)]
    while any(not client.done() for client in clients):
        await asyncio.wait(clients, timeout=60)
        memory.append(resident_mb(args.pid))
        files.append(open_files(args.pid))
        counts = ", ".join(f"{name} {count:,}" for name, count in sorted(state.counts.items()))
        print(
            f"{(time.monotonic() - begin) / 60:.0f} min: {memory[-1]:.0f} MB, {files[-1]} files, {counts}",
            *state.wrong,
            flush=True,
        )
    await asyncio.gather(*clients)
    for _ in range(60):
        left = await state.figures()
        if left == {"running": 0, "waiting": 0, "usage_perc": 0}:
            break
        await asyncio.sleep(0.5)
    else:
        state.wrong.append(f"not idle after 30 s: {left}")
    minutes = (time.monotonic() - begin) / 60
    return {
        "what": "a server under load for long",
        "machine": machine(),
        "arguments": vars(args) | {"out": None, "key": None},
        "minutes": minutes,
        "requests": dict(state.counts),
        "wrong": state.wrong,
        "resident_mb": [*memory, resident_mb(args.pid)],
        "open_files": [*files, open_files(args.pid)],
        "left": left,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="the server's process, for its memory")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--key")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = asyncio.run(soak(args))
    print(f"{sum(found['requests'].values()):,} requests, {len(found['wrong'])} wrong")
    if args.out:
        with atomic_write(args.out) as file:
            file.write(json.dumps(found, indent=1).encode() + b"\n")
    raise SystemExit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
