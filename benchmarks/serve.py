"""Load on a server with OpenAI's interface: ours, or another one. Prints a table and writes JSON.

    numballama serve MODEL --max-sequences 16
    python benchmarks/serve.py --clients 1 4 16 --requests 64 --out result.json
    python benchmarks/serve.py --rate 2 8 --requests 64          # arrivals at random (Poisson), so many a second

Closed loop: each client sends its next request when the last one has ended. Every request streams `--max-tokens`
tokens after a random prompt of `--prompt-tokens` ids, or with `--words` of as many words. Figures: time to the first
token, time between tokens and time of a whole request (percentiles), and generated tokens a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "bird",
    "tree",
    "house",
    "river",
    "boat",
    "little",
    "big",
    "red",
    "blue",
    "old",
    "happy",
    "ran",
    "saw",
    "found",
    "loved",
    "went",
]
PERCENTILES = (50, 90, 99)


@dataclass
class Sample:
    """One request: when it was sent, when each token came (seconds from then on), and what went wrong."""

    tokens: int = 0
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    error: str | None = None


@dataclass
class Load:
    """What is sent."""

    url: str
    key: str | None
    model: str
    prompt_tokens: int
    max_tokens: int
    words: bool
    vocabulary: int

    def body(self, number: int) -> bytes:
        """The body of a request. The same number gives the same prompt."""
        rng = random.Random(number)
        prompt: Any = [rng.randrange(3, self.vocabulary) for _ in range(self.prompt_tokens)]
        if self.words:
            prompt = " ".join(rng.choice(WORDS) for _ in range(self.prompt_tokens))
        options = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        body = {"model": self.model, "prompt": prompt, "max_tokens": self.max_tokens, **options}
        return json.dumps(body).encode()


async def send(load: Load, number: int) -> Sample:
    """Send one request and read its stream."""
    place, body, sample = urlsplit(load.url), load.body(number), Sample()
    started = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(place.hostname, place.port or 80, limit=1 << 20)
        head = f"POST {place.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\n"
        head += f"Authorization: Bearer {load.key}\r\n" if load.key else ""
        head += f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = (await reader.readline()).split()
        if status[1:2] != [b"200"]:
            sample.error = f"status {status[1:2]}"
        while sample.error is None and (line := await reader.readline()):
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                sample.error = str(chunk["error"])[:200]
            elif chunk.get("usage"):
                sample.tokens = chunk["usage"]["completion_tokens"]
            if any(choice.get("text") for choice in chunk.get("choices", ())):
                sample.times.append(time.perf_counter() - started)
        writer.close()
    except (OSError, ValueError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.end = time.perf_counter() - started
    if sample.error is None and not sample.tokens:
        sample.error = "the stream had no usage"
    return sample


async def closed(load: Load, clients: int, requests: int) -> list[Sample]:
    """`clients` that each send the next request when their last one has ended."""
    numbers, samples = iter(range(requests)), list[Sample]()

    async def client() -> None:
        for number in numbers:
            samples.append(await send(load, number))

    await asyncio.gather(*(client() for _ in range(clients)))
    return samples


async def poisson(load: Load, rate: float, requests: int) -> list[Sample]:
    """Requests at random times, `rate` a second on average, whether others have ended or not."""
    rng, tasks = random.Random(1), list[Awaitable[Sample]]()
    for number in range(requests):
        tasks.append(asyncio.ensure_future(send(load, number)))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median and high percentiles, by the nearest rank; nothing for no values."""
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, p * len(ordered) // 100)] for p in PERCENTILES if ordered}


def summary(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """The figures of a run that took so long."""
    good = [sample for sample in samples if sample.error is None]
    gaps = [
        (sample.times[-1] - sample.times[0]) / (sample.tokens - 1)
        for sample in good
        if sample.tokens > 1 and len(sample.times) > 1
    ]
    errors = [sample.error for sample in samples if sample.error is not None]
    return {
        "requests": len(samples),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "seconds": seconds,
        "tokens_per_second": sum(sample.tokens for sample in good) / seconds,
        "requests_per_second": len(good) / seconds,
        "time_to_first_token_s": percentiles([sample.times[0] for sample in good if sample.times]),
        "inter_token_s": percentiles(gaps),
        "end_to_end_s": percentiles([sample.end for sample in good]),
    }


def measure(run: Callable[[], Awaitable[list[Sample]]]) -> dict[str, Any]:
    async def timed() -> dict[str, Any]:
        started = time.perf_counter()
        samples = await run()
        return summary(samples, time.perf_counter() - started)

    return asyncio.run(timed())


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address, without /v1")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--model", default="default", help="the name that requests give")
    parser.add_argument("--clients", type=int, nargs="*", default=[], help="closed loops with so many clients")
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="random arrivals, so many a second")
    parser.add_argument("--requests", type=int, default=32, help="requests of a run (default 32)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--words", action="store_true", help="prompts of words in place of ids")
    parser.add_argument("--vocabulary", type=int, default=1000, help="ids are below this (default 1000)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    given = parser.parse_args(words)
    load = Load(
        given.url, given.key, given.model, given.prompt_tokens, given.max_tokens, given.words, given.vocabulary
    )  # fmt: skip
    measure(lambda: closed(load, 1, 1))  # what is compiled or cached at first is no part of the figures
    runs: dict[str, dict[str, Any]] = {}
    print("| load | tokens/s | first token p50, p99 (ms) | between tokens p50, p99 (ms) | request p50 (s) | errors |")
    print("|---|---|---|---|---|---|")
    todo = [
        (f"{n} clients", lambda n=n: closed(load, n, given.requests))
        for n in given.clients or ([] if given.rate else [1, 4])
    ]
    todo += [(f"{rate:g} a second", lambda rate=rate: poisson(load, rate, given.requests)) for rate in given.rate]
    for name, run in todo:
        found = runs[name] = measure(run)
        first, gap, end = (found[key] for key in ("time_to_first_token_s", "inter_token_s", "end_to_end_s"))
        cells = [f"{found['tokens_per_second']:,.0f}", *(_ms(each) for each in (first, gap))]
        print("|", " | ".join([name, *cells, f"{end.get('p50', 0):.2f}", str(found["errors"])]), "|", flush=True)
    if given.out is not None:
        options = {key: value for key, value in vars(given).items() if key not in ("out", "key")}
        given.out.write_text(json.dumps({"options": options, "runs": runs}, indent=1) + "\n", encoding="utf-8")


def _ms(values: dict[str, float]) -> str:
    return ", ".join(f"{1000 * values[key]:.1f}" for key in ("p50", "p99") if key in values)


if __name__ == "__main__":
    main()
