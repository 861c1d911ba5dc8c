"""A server with the page and a small fake of the API: the last message chooses the answer."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from numballama.server import page

MARKDOWN = """\
A **binary search** halves a sorted list until the value is found. Each step compares one element, so a list of \
a million needs about 20 steps.

```python
def find(values: list[int], wanted: int) -> int | None:
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low if low < len(values) and values[low] == wanted else None
```

| Method | Comparisons | Needs order |
|---|---:|:---:|
| Linear search | 1,000,000 | no |
| Binary search | 20 | yes |

Two things to keep in mind:

1. The list must be **sorted**.
2. With few elements a plain loop is as fast; see [the manual](https://docs.python.org/3/library/bisect.html).
"""
HOSTILE = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script> [click](javascript:hacked=1)'
REASONING = "The user asks for a search. I compare two methods and show the code."


class FakeAPI:
    """What the page sent is in `requests`."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.running = 0
        self.wanted_key: str | None = None
        self.pause_s = 0.01
        self.app = Starlette(
            routes=[
                *page.routes(),
                Route("/v1/models", self.models),
                Route("/props", self.props),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )

    def refusal(self, request: Request) -> Response | None:
        key = request.headers.get("authorization")
        self.keys.append(key)
        if self.wanted_key and key != f"Bearer {self.wanted_key}":
            return error(401, "a wrong API key")
        return None

    async def models(self, request: Request) -> Response:
        model = {"id": "SmolLM2-360M-Instruct-Q8_0", "object": "model"}
        return self.refusal(request) or JSONResponse({"object": "list", "data": [model]})

    async def props(self, request: Request) -> Response:
        props = {"model": "SmolLM2-360M-Instruct-Q8_0", "context": 4096, "max_sequences": 4}
        props["default_generation_settings"] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return self.refusal(request) or JSONResponse(props)

    async def chat(self, request: Request) -> Response:
        if refused := self.refusal(request):
            return refused
        body = await request.json()
        self.requests.append(body)
        said = body["messages"][-1]["content"]
        if said == "busy":
            return JSONResponse({"error": {"message": "full"}}, 429, headers={"Retry-After": "3"})
        if said == "fail":
            return error(500, "a kernel failed")
        return StreamingResponse(self.stream(said, body), media_type="text/event-stream")

    async def stream(self, said: str, body: dict[str, Any]) -> AsyncIterator[str]:
        self.running += 1
        try:
            tokens = 0
            if "search" in said:
                for word in REASONING.split(" "):
                    yield event({"reasoning_content": word + " "})
                    await asyncio.sleep(self.pause_s)
            for piece in pieces(self.answer(said, body)):
                tokens += 1
                yield event({"content": piece})
                await asyncio.sleep(self.pause_s)
                if said == "break" and tokens == 3:
                    return
            yield event({}, "length" if said == "cut" else "stop")
            prompt = 20 * len(body["messages"])
            usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
            cached = {"cached_tokens": prompt - 20}
            yield f"data: {json.dumps({'choices': [], 'usage': {**usage, 'prompt_tokens_details': cached}})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1

    def answer(self, said: str, body: dict[str, Any]) -> str:
        if "response_format" in body:
            return '{"name": "Lily", "year": 2026, "tags": ["a", "b"]}'
        if "search" in said:
            return MARKDOWN
        return {"slow": "word " * 5000, "hostile": HOSTILE}.get(said, f"Answer {len(self.requests)} to: {said}.")


def error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "error", "param": None, "code": None}}, status)


def pieces(text: str) -> Iterator[str]:
    """About a token each."""
    for start in range(0, len(text), 5):
        yield text[start : start + 5]


def event(delta: dict[str, str], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], 'usage': None})}\n\n"


@contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """Serve an application on a free port of this machine, in a thread; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
