"""Run by hand, as root: a Ray cluster of three hosts, each a network namespace of its own with its own address.

    python -m tests.unit.server.check_ray_hosts

A head without CPUs for replicas and two workers with one replica each. It sends requests to all three hosts, checks
that requests which begin alike get to one replica through any of them, stops the host of a replica and checks that the
service goes on. Nothing leaves this machine: the namespaces are joined by a bridge that leads nowhere.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

NAME = f"nb{os.getpid() % 10_000}"
NETWORK = "10.77.14"
HOSTS = range(3)
PORT = 8000
ASK = f"""
import json, sys, http.client
connection = http.client.HTTPConnection(sys.argv[1], {PORT}, timeout=60)
headers = {{"Content-Type": "application/json", "Authorization": "Bearer key"}}
connection.request("POST", "/v1/completions", sys.argv[2], headers)
answer = connection.getresponse()
print(json.dumps([answer.status, answer.headers.get("x-replica"), json.loads(answer.read())]))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def address(host: int) -> str:
    return f"{NETWORK}.{10 + host}"


@contextmanager
def network() -> Iterator[None]:
    """A bridge, and a namespace for each host."""
    with ExitStack() as stack:
        ip("link", "add", NAME, "type", "bridge")
        stack.callback(ip, "link", "delete", NAME)
        ip("link", "set", NAME, "up")
        for host in HOSTS:
            space, cable = f"{NAME}-{host}", f"{NAME}v{host}"
            ip("netns", "add", space)
            stack.callback(ip, "netns", "delete", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", NAME, "up")
            ip("-n", space, "address", "add", f"{address(host)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield


def on(host: int, *command: str) -> list[str]:
    return ["ip", "netns", "exec", f"{NAME}-{host}", *command]


@contextmanager
def running(host: int, folder: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process on a host that has a /tmp/ray of its own. It ends with the block."""
    script = 'mkdir -p /tmp/ray && mount --bind "$0" /tmp/ray && exec "$@"'
    out = Path(folder, f"{host}.out")

    def start() -> subprocess.Popen[bytes]:
        with out.open("w") as file:
            return subprocess.Popen(on(host, "sh", "-c", script, folder, *command), stdout=file)

    process = start()

    def started() -> bool:
        nonlocal process
        if process.poll() is not None:  # Ray gives a host 30 seconds, which a busy machine may exceed
            process = start()
        return "Ray runtime started" in out.read_text()

    try:
        if "--block" in command:
            wait(started, f"Ray on host {host}")
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def ask(host: int, prompt: str) -> tuple[int, str, Any]:
    """(status, replica, answer) of a request that is sent from host 0 to a host."""
    body = json.dumps({"prompt": prompt, "max_tokens": 8})
    done = subprocess.run(on(0, sys.executable, "-c", ASK, address(host), body), capture_output=True, text=True)
    if done.returncode:
        return 0, "", done.stderr.strip().splitlines()[-1]
    status, replica, answer = json.loads(done.stdout)
    return status, replica, answer


def wait(condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            sys.exit(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(1)
    print(f"{what}: after {time.monotonic() - started:.0f} s")


def check(holds: bool, what: str) -> None:
    print("ok  " if holds else "FAIL", what)
    if not holds:
        sys.exit(1)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is taken down
    head = f"{address(0)}:6379"
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_ADDRESS": head}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    serve = [sys.executable, "-m", "numballama", "serve", "--ray", "--device", "cpu", "--threads", "1"]
    serve += ["--replicas", "2", "--host", "0.0.0.0", "--port", str(PORT), "--api-key", "key"]
    with ExitStack() as stack:
        stack.enter_context(network())
        folders = [stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-host-")) for _ in HOSTS]

        def start(host: int, *command: str) -> ExitStack:
            mine = stack.enter_context(ExitStack())
            mine.enter_context(running(host, folders[host], *command))
            return mine

        memory = f"--object-store-memory={100 << 20}"
        start(0, *ray, "--head", f"--node-ip-address={address(0)}", "--port=6379", "--num-cpus=0", memory,
              "--include-dashboard=false")  # fmt: skip
        workers = {
            host: start(host, *ray, f"--address={head}", f"--node-ip-address={address(host)}", "--num-cpus=1", memory)
            for host in (1, 2)
        }
        start(0, *serve)
        wait(lambda: all(ask(host, "Hello")[0] == 200 for host in HOSTS), "all three hosts answer")
        found = {prompt: {ask(host, prompt)[1] for host in HOSTS} for prompt in "abcdefgh"}
        print(found)
        check(all(len(names) == 1 for names in found.values()), "through any host a prompt gets to the same replica")
        check(len(set.union(*found.values())) == 2, "both replicas answer")
        tale = "Once upon a time there was a big dog. " * 12
        cached = [ask(host, tale)[2]["usage"]["prompt_tokens_details"]["cached_tokens"] for host in HOSTS]
        check(cached[0] == 0 and min(cached[1:]) > 0, f"what came through one host is cached for the others: {cached}")
        workers[2].close()
        print("host 2 is stopped")
        wait(lambda: all(ask(host, "Hello again")[0] == 200 for host in (0, 1)), "the others answer")
        answers = [ask(host, prompt) for prompt in "abcdefgh" for host in (0, 1)]
        check(all(status == 200 for status, _, _ in answers), "the others answer everything")
        check(len({replica for _, replica, _ in answers}) == 1, "by the replica that is left")


if __name__ == "__main__":
    main()
