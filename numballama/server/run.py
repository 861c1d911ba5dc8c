"""`serve`: runs the application with uvicorn, loads the model meanwhile, and drains on SIGTERM and Ctrl-C."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ..errors import Error
from .app import create_app
from .guard import JsonFormatter
from .service import Service
from .settings import Settings

if TYPE_CHECKING:
    from ..model import Model

log = logging.getLogger("numballama.server")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
CANCELLED_WITHIN_S = 2
"""Seconds that uvicorn gives requests which are still running after the time to drain."""
LOADED_WITHIN_S = 5
"""After a signal: seconds that a model which is being loaded may take before the process ends without it."""


@dataclass(frozen=True)
class Address:
    """Where to listen, and the files of TLS."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: a free one."""
    tls_certificate: str | None = None
    tls_key: str | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.tls_certificate is None else 'https'}://{host}:{self.port}"


class Server(uvicorn.Server):
    """uvicorn's server that drains first: after a signal running requests end, and new ones get 503."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal arrived. The first begins to drain, the second ends at once."""
        if self._deadline is None:
            self.drain()
        else:
            self.should_exit = self.force_exit = True

    def drain(self) -> None:
        """Refuse new requests, and end when the running ones have ended or their time is over."""
        self._service.draining = True
        self._deadline = time.monotonic() + self._service.settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's, ten times a second: whether to stop."""
        if self._deadline is not None and (not self._service.active or time.monotonic() >= self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)


def serve(
    load: Callable[[], Model],
    settings: Settings,
    address: Address,
    *,
    log_json: bool = False,
    show: Callable[[str], None] = print,
) -> None:
    """Serve the model that `load` returns until SIGTERM or Ctrl-C.

    The port is open from the beginning: /health says 503 until the model is loaded. `show` prints a line for the user.
    Raises `Error` for an address that cannot be used, and what `load` raises.
    """
    prepare_log(log_json)
    settings = protected(settings, address)
    listener = listen(address)
    app = create_app(None, settings)
    service: Service = app.state.service
    server = Server(server_config(app, address), service)
    found: list[Model] = []
    errors: list[BaseException] = []
    url = replace(address, port=listener.getsockname()[1]).url
    done = threading.Event()

    def load_model() -> None:
        try:
            model = load()
            found.append(model)
            if not service.draining:
                service.ready(model)
                show(f"numballama serves {service.name} at {url}")
                show(curl_line(url, settings))
        except BaseException as error:
            errors.append(error)
            server.drain()
        finally:
            done.set()

    show(f"loading the model; {url}/health says when it is ready")
    threading.Thread(target=load_model, name="numballama loader", daemon=True).start()
    server.run(sockets=[listener])
    if not done.wait(LOADED_WITHIN_S):  # a compiler cannot be interrupted
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    for model in found:
        model.close()
    if errors:
        raise errors[0]


def protected(settings: Settings, address: Address) -> Settings:
    """The settings for an address: without a key, only names of this machine on loopback, and a warning elsewhere."""
    if settings.api_keys:
        return settings
    if not address.is_loopback:
        log.warning("%s can be reached from other machines, and no API key is needed: use --api-key", address.host)
    elif settings.allowed_hosts is None:
        return replace(settings, allowed_hosts=(*LOOPBACK_NAMES, address.host))
    return settings


def server_config(app: object, address: Address) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=CANCELLED_WITHIN_S,
        ssl_certfile=address.tls_certificate,
        ssl_keyfile=address.tls_key,
    )


def listen(address: Address) -> socket.socket:
    """A socket that listens at an address. Raises `Error` when that is not possible."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise Error(
            f"--host {address.host} --port {address.port}: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise Error(f"--host {address.host} --port {address.port}: {reason}; --port 0 picks a free one") from None
    listener.set_inheritable(False)
    return listener


def curl_line(url: str, settings: Settings) -> str:
    """A command that works."""
    key = "-H 'Authorization: Bearer …' " if settings.api_keys else ""
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 40})
    return f"curl {url}/v1/completions {key}-H 'Content-Type: application/json' -d '{body}'"


def prepare_log(as_json: bool) -> None:
    """Write the log to stderr, as lines of text or of JSON."""
    handler = logging.StreamHandler()
    form = "%(asctime)s %(levelname)s %(message)s"
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(form))
    for name, level in (("numballama.server", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
