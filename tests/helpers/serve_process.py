"""`numballama serve` in a process of its own."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from tests.helpers.http_server import LONG


@contextmanager
def process(*words: str) -> Iterator[tuple[subprocess.Popen[str], int, list[str]]]:
    """(process, port, lines of stderr up to the line of curl)."""
    command = [sys.executable, "-m", "numballama", "serve", "--port", "0", "--device", "cpu", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        try:
            lines: list[str] = []
            assert started.stderr is not None
            for line in started.stderr:
                lines.append(line)
                if line.startswith("curl "):
                    break
            port = re.search(r"https?://127\.0\.0\.1:(\d+)", "".join(lines))
            assert port is not None, lines
            yield started, int(port[1]), lines
        finally:
            started.kill()


def post(port: int, body: Any, **headers: str) -> Any:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
