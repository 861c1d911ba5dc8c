"""`numballama serve` in a process of its own, and the pieces of `run`."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from numballama.errors import Error
from numballama.server import run
from numballama.server.guard import JsonFormatter
from numballama.server.run import Address, listen, serve
from numballama.server.settings import Settings
from tests.helpers.http_server import LONG, Running, read_until
from tests.helpers.serve_process import post, process


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_process_drains(signum: signal.Signals) -> None:
    """The command that it prints works, too."""
    with process("--max-sequences", "2", "--log-json", "--api-key", "secret") as (started, port, lines):
        assert "/health says when" in lines[0] and "numballama serves story.gguf at" in lines[1]
        command = lines[2].strip()
        assert command.startswith("curl http://127.0.0.1:") and "Authorization: Bearer …" in command
        shown = json.loads(command.split("-d ")[1].strip("'"))
        assert post(port, shown)[0] == 401
        assert post(port, shown, Authorization="Bearer secret")[1]["usage"]["completion_tokens"] == 40
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Api-Key: secret\r\nContent-Type: application/json\r\n"
        body = json.dumps({"prompt": "Once", "max_tokens": 300, "stream": True, "ignore_eos": True})
        with socket.create_connection(("127.0.0.1", port), timeout=LONG) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            data = read_until(connection, b"data: ")
            started.send_signal(signum)
            data += read_until(connection, b"\r\n0\r\n\r\n")
        assert b"data: [DONE]" in data and data.count(b'"text"') > 10
        assert started.wait(LONG) == 0
        assert started.stderr is not None
        log = [json.loads(line) for line in started.stderr.read().splitlines()]
        assert log[-1]["path"] == "/v1/completions" and log[-1]["status"] == 200 and "Once" not in json.dumps(log)


@pytest.mark.slow
def test_tls_keys_of_a_file_and_a_second_signal(tmp_path: Path) -> None:
    """OpenAI's client trusts the certificate. A second signal does not wait for what runs."""
    openai = pytest.importorskip("openai")
    httpx = importlib.import_module("httpx2" if find_spec("httpx2") else "httpx")  # the client has one of them
    if shutil.which("openssl") is None:
        pytest.skip("the command openssl makes the certificate")
    certificate, key, keys = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "keys"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    keys.write_text("first\nsecond\n", encoding="utf-8")
    words = ["--tls-cert", str(certificate), "--tls-key", str(key), "--api-key-file", str(keys)]
    with process(*words, "--drain-timeout", "600") as (started, port, lines):
        assert f"https://127.0.0.1:{port}" in lines[1]
        trusted = httpx.Client(verify=ssl.create_default_context(cafile=str(certificate)), timeout=LONG)
        options: dict[str, Any] = {"base_url": f"https://127.0.0.1:{port}/v1", "http_client": trusted, "max_retries": 0}
        with openai.OpenAI(**options, api_key="second") as client:
            text: dict[str, Any] = {"model": "m", "prompt": "Once", "extra_body": {"ignore_eos": True}}
            assert client.completions.create(**text, max_tokens=3).usage.completion_tokens == 3
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="third").models.list()
            body = json.dumps({"prompt": "Once", "max_tokens": 500, "n": 16, "stream": True, "ignore_eos": True})
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Api-Key: first\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            context = ssl.create_default_context(cafile=str(certificate))
            with (
                socket.create_connection(("127.0.0.1", port), timeout=LONG) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
            ):
                connection.sendall((head + body).encode())
                assert b"data: " in connection.recv(1 << 16) + connection.recv(1 << 16)
                started.send_signal(signal.SIGTERM)
                started.send_signal(signal.SIGINT)
                started.wait(LONG)
                data = b"".join(iter(lambda: _received(connection), b""))
        assert b"[DONE]" not in data
        assert started.stderr is not None and "Traceback" not in started.stderr.read()


@pytest.mark.slow
def test_a_second_signal_while_nothing_runs() -> None:
    """As when somebody presses Ctrl-C twice."""
    with process() as (started, _, _):
        started.send_signal(signal.SIGINT)
        time.sleep(0.02)
        started.send_signal(signal.SIGINT)
        assert started.wait(LONG) == 0
        assert started.stderr is not None and not started.stderr.read()


def _received(connection: ssl.SSLSocket) -> bytes:
    """What arrives; nothing when the connection was torn."""
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""


@pytest.mark.parametrize(("soft", "hard", "found"), [(200, 300, 300), (300, 300, 300), (200, 10**6, 65_536)])
def test_a_server_takes_the_files_that_it_may_have(soft: int, hard: int, found: int) -> None:
    resource = pytest.importorskip("resource")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most not in (resource.RLIM_INFINITY, hard) and most < hard:
        pytest.skip(f"a process may have {most} files here")
    code = f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({soft}, {hard}))\n"
    code += "from numballama.server.run import allow_files\nallow_files(); print(*r.getrlimit(r.RLIMIT_NOFILE))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == [str(found), str(hard)]


def test_a_port_in_use_is_an_error() -> None:
    with closing(listen(Address(port=0))) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Error, match="--port 0 picks a free one"):
            listen(Address(port=port))
    with pytest.raises(Error, match=r"--host no\.such\.host\.invalid"):
        listen(Address("no.such.host.invalid"))


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        ("c", "other", "KEY_VALUES_MISMATCH"),
        ("none", "k", "PEM"),
        ("c", "none", "PEM"),
        ("c", "locked", "is encrypted"),
    ],
)
def test_files_of_tls_that_cannot_be_used(tls: Path, certificate: str, key: str, message: str) -> None:
    """They are an error at once, and nobody is asked for a password."""
    address = Address(port=0, tls_certificate=str(tls / certificate), tls_key=str(tls / key))
    with pytest.raises(Error, match=f"--tls-key .*/{key}: .*{message}"):
        serve(lambda: pytest.fail("nothing is loaded"), Settings(), address, show=lambda line: pytest.fail(line))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate c and its key k, another key, k with a password, and a file that is no PEM."""
    if shutil.which("openssl") is None:
        pytest.skip("the command openssl makes the files")
    folder = tmp_path_factory.mktemp("tls")
    curve = ["ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    (folder / "none").write_text("no certificate", encoding="utf-8")
    for words in (
        ["req", "-x509", "-newkey", *curve, "-nodes", "-days", "2", "-subj", "/CN=a", "-out", "c", "-keyout", "k"],
        ["ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", "other"],
        ["pkey", "-in", "k", "-aes128", "-passout", "pass:secret", "-out", "locked"],
    ):
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)
    return folder


def test_what_a_model_cannot_do_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "prepare_log", lambda as_json: None)  # it is for a process of its own

    def load() -> Any:
        raise Error("there is no such model")

    lines: list[str] = []
    with pytest.raises(Error, match="no such model"):
        serve(load, Settings(), Address(port=0), show=lines.append)
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.1.2.3", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert Address(host).is_loopback is loopback


def test_names_that_requests_may_use() -> None:
    """Each once, in the error too that lists them."""
    hosts = run.protected(Settings(), Address("127.0.0.1", 80)).allowed_hosts
    assert hosts is not None and sorted(hosts) == ["127.0.0.1", "[::1]", "localhost"]
    assert run.protected(Settings(), Address("127.0.0.2", 80)).allowed_hosts == (*hosts, "127.0.0.2")
    assert run.protected(Settings(api_keys=("k",)), Address("127.0.0.1", 80)).allowed_hosts is None


def test_a_line_of_json() -> None:
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "a %s", ("b",), None)
    record.fields = {"status": 200}
    line = json.loads(JsonFormatter().format(record))
    assert line["message"] == "a b" and line["status"] == 200 and line["level"] == "ERROR"


@pytest.mark.parametrize("processes", [1, 2])
def test_the_benchmark(server: Running, tmp_path: Path, processes: int) -> None:
    """`benchmarks/serve.py` on a running server: what it writes and prints, with clients in one process or in two."""
    out = tmp_path / "out.json"
    script = Path(__file__).parents[3] / "benchmarks" / "serve.py"
    words = ["--clients", "3", "--requests", "2", "--rounds", "1", "--max-tokens", "4", "--prompt-words", "5"]
    words += ["--processes", str(processes)]
    command = [sys.executable, str(script), f"ours={server.url}", *words, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    assert "3 clients: ours: " in done.stdout
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["processes"] == {"3 clients": processes}
    (found,) = report["3 clients"]["ours"]["rounds"]
    assert found["failed"] == 0 and found["requests"] == 6 and found["tokens_per_second"] > 0
    assert found["ttft_ms"]["p50"] <= found["e2e_ms"]["p50"]
