"""A model by its hub id through huggingface_hub itself, from a hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.helpers.gguf_files import letters, save, split

pytest.importorskip("huggingface_hub")

MODEL = Path(__file__).parents[1] / "golden" / "hf" / "qwen3-f16-sharded-0"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHERS = dict.fromkeys(("pytorch_model.bin", "onnx/model.onnx", "README.md", "original/params.json"), b"not wanted")
"""What hub repositories also hold and this package does not read."""


class Hub(ThreadingHTTPServer):
    """The four answers of the hub's HTTP interface that a download asks for; `asked` holds the files that were sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        files = {path.name: path.read_bytes() for path in MODEL.iterdir()}
        self.files, self.asked = files | OTHERS, list[str]()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = self.server.files
        if path.startswith("/api/models/owner/name/revision/"):
            return self._send({"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        if path.startswith("/api/models/owner/name/tree/"):
            return self._send(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
            )
        name = path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
        if name in files:
            if self.command == "GET":
                self.server.asked.append(name)
            return self._send(files[name])
        self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _send(self, what: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(status)
        given = {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **(headers or {})}
        given["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def inspect(name: str, folder: Path, endpoint: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`numballama inspect` in a fresh process: the library reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}
    others = re.compile("HF_|HUGGING|.*_PROXY", re.IGNORECASE)  # a user's own: his cache, his way out
    kept = {key: value for key, value in os.environ.items() if not others.match(key)}
    words = [sys.executable, "-m", "numballama", "inspect", name]
    done = subprocess.run(words, env=kept | settings | more, capture_output=True, text=True, timeout=120, cwd=folder)
    return without_free_memory(done)


def without_free_memory(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """What does not change from one process to the next: all but how much memory is free."""
    done.stdout = re.sub(r"[\d.]+ [KMGT]iB are free", "… are free", done.stdout)
    return done


@pytest.mark.slow
def test_a_model_comes_from_a_hub_and_then_from_the_cache(server: Hub, tmp_path: Path) -> None:
    done = inspect("owner/name", tmp_path, server.endpoint)
    assert done.returncode == 0, done.stderr
    local = without_free_memory(
        subprocess.run(
            [sys.executable, "-m", "numballama", "inspect", str(MODEL)], capture_output=True, text=True, check=True
        )
    )
    differ = {a: b for a, b in zip(local.stdout.splitlines(), done.stdout.splitlines(), strict=True) if a != b}
    assert len(differ) <= 1 and all(str(MODEL) in line for line in differ), differ  # the line with the path
    assert set(server.asked) == {path.name for path in MODEL.iterdir()} - {"expected.npz"}
    assert len(server.asked) == len(set(server.asked))

    server.asked.clear()
    assert inspect("owner/name", tmp_path, server.endpoint).stdout == done.stdout
    assert inspect("owner/name", tmp_path, server.endpoint, HF_HUB_OFFLINE="1").stdout == done.stdout
    assert not server.asked
    assert inspect("owner/name", tmp_path, "http://127.0.0.1:9").stdout == done.stdout  # nobody listens there


@pytest.mark.slow
def test_a_hub_that_has_no_such_model(server: Hub, tmp_path: Path) -> None:
    done = inspect("owner/other", tmp_path, server.endpoint)
    assert done.returncode == 1 and not done.stdout
    assert "owner/other: no such file or directory, and on the hub" in done.stderr
    assert "there is no such model" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_hub_out_of_reach(tmp_path: Path) -> None:
    done = inspect("owner/name", tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 1 and not done.stdout
    assert "the hub is out of reach" in done.stderr and "hf download owner/name" in done.stderr


@pytest.mark.slow
def test_a_gguf_comes_from_a_hub_and_then_from_the_cache(server: Hub, tmp_path: Path) -> None:
    split(save(tmp_path / "whole.gguf"), 2, "m-Q8_0")
    save(tmp_path / "m-Q2_K.gguf", tokenizer=letters(300))
    server.files = {path.name: path.read_bytes() for path in tmp_path.glob("m-*.gguf")} | {"README.md": b"x"}
    parts = {"m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"}
    done = inspect("owner/name:q8_0", tmp_path, server.endpoint)
    assert done.returncode == 0 and "GGUF v3" in done.stdout, done.stderr
    assert set(server.asked) == parts and len(server.asked) == 2
    server.asked.clear()
    plain = inspect("owner/name", tmp_path, server.endpoint)
    assert plain.returncode == 0 and "has 2 GGUF files: m-Q8_0-00001-of-00002.gguf is used" in plain.stdout
    names = ("owner/name:Q8_0", "owner/name", "owner/name:Q2_K")
    for endpoint, more in ((server.endpoint, {"HF_HUB_OFFLINE": "1"}), ("http://127.0.0.1:9", {})):

        def ask(name: str, endpoint: str = endpoint, more: dict[str, str] = more) -> subprocess.CompletedProcess[str]:
            return inspect(name, tmp_path, endpoint, **more)

        with ThreadPoolExecutor(3) as pool:  # the library waits long before it believes that nobody listens
            tagged, best, missing = pool.map(ask, names)
        assert tagged.stdout == done.stdout
        same = [line for line in best.stdout.splitlines() if "note: owner/name has" not in line]
        assert same == done.stdout.splitlines()
        assert missing.returncode == 1 and "it has no GGUF file of type Q2_K" in missing.stderr
        assert "Traceback" not in missing.stderr
    assert not server.asked
    other = inspect("owner/name/M-Q2_K.gguf", tmp_path, server.endpoint)
    assert other.returncode == 0 and server.asked == ["m-Q2_K.gguf"], other.stderr
    for name in ("owner/other:Q8_0", "owner/other/m.gguf"):
        done = inspect(name, tmp_path, server.endpoint)
        assert done.returncode == 1 and f"{name}: no such file or directory, and on the hub there is no" in done.stderr
