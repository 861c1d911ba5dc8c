"""`serve`: runs the application with uvicorn, loads the model meanwhile, and drains on SIGTERM and Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import json
import logging
import os
import socket
import ssl
import sys
import time
from asyncio import BaseTransport, Protocol, TimerHandle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import Error
from .app import create_app
from .client import LOST
from .errors import ApiError
from .guard import JsonFormatter
from .http import dumps
from .loader import ModelLoader
from .service import Service
from .settings import Settings

if TYPE_CHECKING:
    from ..model import Model

log = logging.getLogger("numballama.server")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
CANCELLED_WITHIN_S = 2
"""Seconds that uvicorn gives requests which are still running after the time to drain."""
MAX_HEAD = 1 << 16
"""Bytes of a request's head."""
MOST_FILES = 65_536
"""Open files that the process allows itself, if the system does. Each connection is one; usual are 1,024."""
QUIET_S = 10.0
"""Seconds between two lines in the log that say that no connection can be accepted."""
GC_THRESHOLD = 20_000
"""Objects that may be made between two collections."""
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
        self._quiet_until = 0.0
        """On the clock of `time.monotonic`: until then the log does not say again that no connection is accepted."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's."""
        asyncio.get_running_loop().set_exception_handler(self._failed_in_loop)
        await super().startup(sockets)

    def _failed_in_loop(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio's. Without a file for a connection it tries thousands of times a second: that is one line."""
        error, now = context.get("exception"), time.monotonic()
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif now >= self._quiet_until:
            self._quiet_until = now + QUIET_S
            log.error("no connection can be accepted, which is tried again: %s", error.strerror)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal arrived. The first begins to drain, the second ends at once."""
        if self._deadline is None:
            self.drain()
        else:
            self.end_at_once()

    def drain(self) -> None:
        """Refuse new requests, and end when the running ones have ended or their time is over."""
        self._service.draining = True
        self._deadline = time.monotonic() + self._service.settings.drain_s

    def end_at_once(self) -> None:
        """End, whatever runs."""
        self.should_exit = self.force_exit = True
        logging.getLogger("uvicorn.error").disabled = True  # what is cancelled now would be a traceback each

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's, ten times a second: whether to stop."""
        if self._deadline is not None:
            late = time.monotonic() >= self._deadline
            if late:
                self._service.end()
            self.should_exit = self.should_exit or late or not self._service.active
        return await super().on_tick(counter)


def connection_class(head_s: float) -> type[Protocol]:
    """A class of connections: with httptools where it is installed, otherwise with h11."""
    quick, slow = _connection_class(AutoHTTPProtocol, head_s), _connection_class(H11Protocol, head_s)
    if AutoHTTPProtocol is H11Protocol:
        return slow

    class Either(quick):  # type: ignore[misc, valid-type]
        def data_received(self, data: bytes) -> None:
            # httptools drops the body of a request that asks for HTTP/2, as Java's client does with each, and sends
            # chunks to clients of HTTP/1.0
            if self._waits and not self._inside and (b"\r\nupgrade:" in data.lower() or b" HTTP/1.0\r\n" in data):
                self._unset_timer()
                self._unset_keepalive_if_required()
                self.connections.discard(self)
                other = slow(self.config, self.server_state, self.app_state)
                other.connection_made(self.transport)
                self.transport.set_protocol(other)
                other.data_received(data)
            else:
                super().data_received(data)

        def _unsupported_upgrade_warning(self) -> None:
            # of a head that came in parts, or behind another request: httptools takes its body for a request
            self.send_400_response("")

    return Either


def _connection_class(base: type[Protocol], head_s: float) -> type[Any]:
    """One of uvicorn's classes of connections, with our answer to what is no HTTP.

    A connection ends when the head of a request takes longer than `head_s` to arrive. It ends with httptools, too, when
    `MAX_HEAD` bytes have come that are neither a whole head nor of a body; h11 sees to that itself.
    """

    class Connection(base):  # type: ignore[misc, valid-type]
        _timer: TimerHandle | None = None
        _lost: Callable[[], None] | None = None
        _unread = 0
        """With httptools: bytes of a request since its beginning, or since the last of its body."""
        _inside, _begins, _has_body = False, False, False
        """With httptools: whether a request has begun and not ended; whether one has just begun, or a part of its body
        has come."""

        def connection_made(self, transport: BaseTransport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            goes_on = self._inside and not self._begins and not self._has_body
            self._unread = self._unread + len(data) if goes_on else 0
            self._begins = self._has_body = False
            if self._unread > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("")
            self._watch()

        # What httptools calls

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._inside = self._begins = True
            self.scope[LOST] = self._when_lost

        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            self._has_body = True

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._inside = False

        def connection_lost(self, exc: Exception | None) -> None:
            self._unset_timer()
            super().connection_lost(exc)
            lost, self._lost = self._lost, None  # what refers to this object would be a reference cycle
            if self.scope is not None:
                self.scope.pop(LOST, None)
            if lost is not None:
                lost()

        def _when_lost(self, call: Callable[[], None]) -> None:
            self._lost = call
            self.flow.resume_reading()  # a large part of a body has paused it: then a loss would not be seen

        @property
        def _waits(self) -> bool:
            """Whether no request is being answered."""
            return self.cycle is None or self.cycle.response_complete

        def _watch(self) -> None:
            if not self._waits:
                self._unset_timer()
            elif self._timer is None:
                self._timer = self.loop.call_later(head_s, self._end)

        def _unset_timer(self) -> None:
            timer, self._timer = self._timer, None
            if timer is not None:
                timer.cancel()

        def _end(self) -> None:
            self._timer = None
            if self._waits:
                self.transport.close()

        def send_400_response(self, msg: str) -> None:
            body = dumps(ApiError("this is no valid request of HTTP/1.1", code="invalid_http").body)
            head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()

    return Connection


def serve(
    load: Callable[[], Model],
    settings: Settings,
    address: Address,
    *,
    log_json: bool = False,
    show: Callable[[str], None] = print,
) -> None:
    """Serve the model that `load` returns until SIGTERM or Ctrl-C.

    The port is open from the beginning: /health says 503 until the model is loaded. It is loaded again after its device
    has failed for good. `show` prints a line for the user.
    Raises `Error` for an address that cannot be used, and what `load` raises.
    """
    prepare_log(log_json)
    allow_files()
    settings = protected(settings, address)
    check_tls(address)
    listener = listen(address)
    app = create_app(None, settings)
    service: Service = app.state.service
    server = Server(server_config(app, address, settings.body_timeout_s), service)
    url = replace(address, port=listener.getsockname()[1]).url

    def announce() -> None:
        show(f"numballama serves {service.name} at {url}")
        show(curl_line(url, settings))

    def load_anew() -> Model:
        gc.unfreeze()
        gc.collect()  # what is left of a model before
        model = load()
        gc.collect()
        gc.freeze()  # the garbage collector passes over what lives as long as the model
        return model

    loader = ModelLoader(load_anew, service, announce, server.drain)
    show(f"loading the model; {url}/health says when it is ready")
    loader.start()
    with rare_collections():
        server.run(sockets=[listener])
    if not loader.stop(LOADED_WITHIN_S):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if loader.error is not None:
        raise loader.error


def allow_files() -> None:
    """Let this process, and those that it starts, have as many files as the system allows, up to `MOST_FILES`."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Let the garbage collector run less often during the block. What was frozen in it is not frozen after it."""
    threshold = gc.get_threshold()
    gc.set_threshold(GC_THRESHOLD, *threshold[1:])
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()


def protected(settings: Settings, address: Address) -> Settings:
    """The settings for an address: without a key, only names of this machine on loopback, and a warning elsewhere."""
    if settings.api_keys:
        return settings
    if not address.is_loopback:
        log.warning("%s can be reached from other machines, and no API key is needed: use --api-key", address.host)
    elif settings.allowed_hosts is None:
        return replace(settings, allowed_hosts=tuple(dict.fromkeys([*LOOPBACK_NAMES, address.host])))
    return settings


def check_tls(address: Address) -> None:
    """Raise `Error` for files of TLS that cannot be used. Asks nobody for a password."""
    if address.tls_certificate is None:
        return

    def password() -> str:
        raise Error(f"--tls-key {address.tls_key}: the key is encrypted; write it without a password (openssl pkey)")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(address.tls_certificate, address.tls_key, password)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        files = f"--tls-cert {address.tls_certificate} --tls-key {address.tls_key}"
        raise Error(f"{files}: {reason}; a certificate and its key as PEM are needed") from None


def server_config(app: object, address: Address, head_s: float = Settings.body_timeout_s) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=connection_class(head_s),
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
    # Python's way not to look for the place, thread and process of each line, which none of them names
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler()
    form = "%(asctime)s %(levelname)s %(message)s"
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(form))
    for name, level in (("numballama.server", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
