"""A process for HTTP of several: `python -m numballama.server.http_process …`, which `processes` starts.

It has the application, the tokenizer and the templates, and no weights. Connections come from the process with the
engine, which accepts them; so do settings and news of the model. When that process ends, this one does, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from .. import loader
from ..errors import DeviceError
from ..host.child import end_after_parent
from .app import create_app
from .link import Head, Link, SharedCounts, pack
from .remote import ENGINE_GONE, Facts, RemoteEngine, RemoteModel
from .run import Address, Server, prepare_log, rare_collections, server_config
from .service import DRAINING, Service, log
from .settings import Settings

ERRORS_WITHIN_S = 2.0
"""Seconds for the answers to clients when the process with the engine has ended."""
ENDED_WITHIN_S = 10.0
"""Seconds after that end until this process ends, whatever it does."""


class HttpServer(Server):
    """A server whose connections another process accepts, and whose engine is there."""

    def __init__(self, app: Any, settings: Settings, address: Address, link: Link, handoff: socket.socket) -> None:
        service: Service = app.state.service
        super().__init__(server_config(app, address, settings.body_timeout_s), service)
        self._link, self._handoff = link, handoff
        handoff.setblocking(False)
        self._latest: Head = {}
        """The latest news of the model."""
        self._tasks: set[asyncio.Task[None]] = set()

    def handle_exit(self, sig: int, frame: object) -> None:
        """A signal, which is for the process with the engine."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._engine = self._service.engine_process = RemoteEngine(self._link, self._loop)
        self._loop.add_reader(self._link.socket, self._read)
        self._loop.add_reader(self._handoff, self._take_connections)
        self._link.send(pack({"do": "up"}))
        self._read()  # what came with the first message

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's. Threads that wait for an answer end: nobody reads it any more."""
        await super().shutdown(sockets)
        self._loop.remove_reader(self._link.socket)
        self._link.close()
        self._engine.fail(DeviceError(DRAINING))

    def _start(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _take_connections(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                data, files, _, _ = socket.recv_fds(self._handoff, 1, 1)
                if not data:
                    self._loop.remove_reader(self._handoff)
                    return
                for file in files:
                    self._start(self._connect(socket.socket(fileno=file)))

    async def _connect(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # TLS was not agreed upon, or the client has left
            await self._loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl)

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def _read(self) -> None:
        for head, tail in self._link.receive(socket.MSG_DONTWAIT):
            self._take(head, tail)
        if self._link.closed:
            self._loop.remove_reader(self._link.socket)
            self._end()

    def _take(self, head: Head, tail: Sequence[int]) -> None:
        if "ready" in head:
            self._latest = head
            self._start(self._open(head))
        elif "unload" in head:
            self._latest = head
            self._service.unload(head["unload"])
        elif "reloaded" in head:
            self._service.reloaded()
        elif "figures" in head:
            counted = self._service.metrics.counted().decode()
            self._link.send(pack({"do": "counted", "of": head["figures"], "text": counted}))
        elif "alive" in head:
            self._link.send(pack({"do": "alive"}))
        elif "drain" in head:
            self.drain()
        elif "exit" in head:
            self.end_at_once()
        else:
            self._engine.receive(head, tail)

    async def _open(self, news: Head) -> None:
        """Open the model's file, for all but its weights, and answer requests from now on."""
        facts = Facts(**news["ready"])
        try:
            checkpoint = await self._service.run(loader.open_checkpoint, facts.path, facts.tokenizer)
            model = await self._service.run(RemoteModel, checkpoint, facts, self._engine)
            if self._latest is not news:
                return
            self._engine.facts, self._engine.failure = facts, None
            self._service.ready(model)
        except Exception as error:
            log.error("the model's file could not be opened: %s", error, exc_info=error)
            self.should_exit = True
            return
        gc.unfreeze()
        gc.collect()  # what is left of a model before
        gc.freeze()
        self._link.send(pack({"do": "ready"}))

    def _end(self) -> None:
        """The process with the engine has ended: so do all requests, with an error, and this process."""
        if not self.should_exit:
            if self._deadline is None:
                log.error("%s: this server ends", ENGINE_GONE)
            self._service.unload(ENGINE_GONE)
            self._engine.fail(DeviceError(ENGINE_GONE))
            self._service.draining, self._deadline = True, time.monotonic() + ERRORS_WITHIN_S


def main(link_file: int, handoff_file: int, counts_file: int, process: int, processes: int) -> None:
    """Serve until the process with the engine says so, or ends."""
    end_after_parent(ENDED_WITHIN_S)
    link, handoff = Link(socket.socket(fileno=link_file), f"http-{process}"), socket.socket(fileno=handoff_file)
    first = link.receive_one()
    if first is None:
        return
    settings = Settings(**first["settings"])
    prepare_log(first["log_json"])
    app = create_app(None, settings, SharedCounts(counts_file, process, processes))
    with rare_collections():
        HttpServer(app, settings, Address(**first["address"]), link, handoff).run(sockets=[])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
