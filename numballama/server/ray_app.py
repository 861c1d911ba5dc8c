"""The server on Ray Serve: replicas of a model on many machines, and fronts that choose a replica for each request.

    client ─► Ray's proxy (HTTP, each machine) ─► Front (reads the body, chooses) ─► Replica (`create_app`, a model)

Ray chooses where processes run, restarts them, adds and removes replicas, and replaces them one after the other when
the application is deployed again. This is the only module that imports Ray.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from ..errors import Error
from .affinity import choose, routing_key
from .app import create_app
from .call import openai_error
from .client import Client, ClientGoneError, body_is_late
from .errors import ApiError
from .http import error_response, event, read_body
from .metrics import Merged
from .run import Address, check_tls, curl_line, listen, prepare_log, protected
from .service import DRAINING
from .settings import Settings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported: it would report to its makers
try:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import BackPressureError, RayServeException
    from ray.serve.handle import DeploymentHandle
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
except ImportError as error:
    raise Error(f'Ray Serve is missing ({error}): pip install "numballama[ray]"') from None

PASSED_ON = ("type", "http_version", "scheme", "method", "path", "raw_path", "query_string", "headers", "client")
"""Fields of an ASGI scope that a replica needs."""
QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Ray's own log. A replica has a line for each request, as every server of this package."""
EVERY_S = 0.1
"""A stream's events are passed on so often: the first at once, later ones together."""
LAST_S = 0.5
"""How long proxies may take to pass on the last event of an answer."""
FRONT_REQUESTS = 64
"""Requests at a time for each front. Where there are more, Ray starts another front."""


class Options(BaseModel, extra="forbid"):
    """What is served, and by how many replicas. `serve run …:app` takes these as name=value."""

    model: str | None = None
    """A file or folder that every machine has, or a hub id. None: the story model."""
    device: Literal["auto", "cpu", "cuda", "reference"] = "auto"
    """cpu, cuda, or auto: cuda where the cluster has GPUs. A replica on cuda has a GPU to itself."""
    threads: int | None = None
    """CPUs of a replica on cpu. None: all of its machine, which then has one replica."""
    max_sequences: int = Field(8, ge=1)
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = None
    """More than `replicas`: Ray adds replicas while each has more than `max_sequences` requests, and removes them."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Other arguments of `numballama.compile`."""
    settings: Settings = Field(default_factory=Settings)
    log_json: bool = False

    @property
    def queue(self) -> int:
        """Requests that may wait besides `max_sequences`, at a replica and again at a front."""
        return 4 * self.max_sequences if self.settings.queue_sequences is None else self.settings.queue_sequences


class Replica:
    """A model with the server's application."""

    def __init__(self, options: Options) -> None:
        from .. import compile

        prepare_log(options.log_json)
        arguments = {"threads": options.threads, "max_sequences": options.max_sequences, **options.arguments}
        self._model = compile(options.model, device=options.device, **arguments)
        self._app = create_app(self._model, options.settings)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    async def answer(self, key: str, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """What the application sends for a request, as soon as it does. The request ends when nobody iterates."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not received:
                await asyncio.Event().wait()  # for ever: when the client leaves, Ray cancels this iterator
            return received.pop()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]  # Ray's proxy adds one
                message["headers"] = [*headers, (b"x-replica", self._name)]
            sent.put_nowait(message)

        task = asyncio.ensure_future(self._app(scope, receive, send))
        task.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while True:
                batch = [await sent.get()]
                while not sent.empty():
                    batch.append(sent.get_nowait())
                yield _joined([message for message in batch if message is not None])
                if batch[-1] is None:
                    break
                if batch[-1]["type"] == "http.response.body":
                    await asyncio.wait({task}, timeout=EVERY_S)
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def whole(self, scope: dict[str, Any]) -> tuple[str, list[Message]]:
        """(name of this replica, everything that the application sends for a request without a body)."""
        return self._name.decode(), [message async for batch in self.answer("", scope, b"") for message in batch]

    def check_health(self) -> None:
        """Ray replaces a replica whose engine has failed."""
        if (why := self._app.state.service.unhealthy()) is not None:
            raise RuntimeError(why)

    def __del__(self) -> None:
        if hasattr(self, "_app"):
            self._app.state.service.close()
            self._model.close()


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """In a front: sends a request where the beginning of its prompt is cached, see `affinity.choose`."""

    # after Ray's 0.1 s a request would leave the cache of a replica that is slow to answer
    queue_len_response_deadline_s = max_queue_len_response_deadline_s = 1.0

    def initialize_state(self, slack: int) -> None:
        self._slack = slack

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The chosen replica, then the others: Ray takes one of them when the first is full."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # before the next try, when all are full
        replicas = {each.replica_id.unique_id: each for each in candidate_replicas}
        queues = {name: self.replica_queue_len_cache.get(each.replica_id) or 0 for name, each in replicas.items()}
        first = replicas.pop(choose(pending_request.args[0], queues, self._slack))
        return [[first], list(replicas.values())]


class Front:
    """Reads a request and passes on what a replica answers. It computes nothing."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings) -> None:
        self._replicas, self._settings = replicas, settings
        self._answer = replicas.answer.options(stream=True)
        self._draining = False
        self._active = 0

    def __serve_build_asgi_app__(self) -> Starlette:
        """Ray's name for the method that makes the application of a class."""
        return Starlette(routes=[Route("/metrics", self._metrics), Mount("/", self._forward)])

    async def drain(self) -> int:
        """Refuse new requests from now on. Returns how many are being answered."""
        self._draining = True
        return self._active

    async def _metrics(self, request: Request) -> Response:
        """The figures of all replicas together."""
        found = await self._replicas.broadcast("whole", _passed_on(request.scope)).results_async(timeout_s=10)
        texts = {name: b"".join(each.get("body", b"") for each in messages) for name, messages in found}
        status, headers = found[0][1][0]["status"], dict(found[0][1][0]["headers"])
        text = next(iter(texts.values())) if status != 200 else Merged({k: v.decode() for k, v in texts.items()}).text()
        return Response(text, status, media_type=headers[b"content-type"].decode())

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._draining:
            error = ApiError(DRAINING, 503, code="draining", retry_after=5)
            await error_response(error)(scope, receive, send)
            return
        self._active += 1
        try:
            await self._pass_on(scope, receive, send)
        finally:
            self._active -= 1

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        streams = started = False
        client = Client(receive)
        try:
            body = b""
            if scope["method"] == "POST":
                reading = read_body(Headers(scope=scope), receive, self._settings.max_body)
                body = await client.run(reading, self._settings.body_timeout_s, body_is_late)
            messages = self._answer.remote(routing_key(body), _passed_on(scope), body)
            try:
                async for batch in messages:
                    for message in batch:
                        if not started:
                            streams = b"text/event-stream" in dict(message["headers"]).get(b"content-type", b"")
                        started = True
                        await send(message)
            finally:
                messages.cancel()
        except ClientGoneError:
            return
        except ApiError as error:
            found = error
        except BackPressureError:
            found = ApiError("all replicas are full: try again later", 429, code="queue_full", retry_after=5)
        except (RayError, RayServeException):
            found = ApiError("the replica failed: try again", 503, code="replica_failed", retry_after=5)
        else:
            return
        finally:
            client.close()
        if not started:
            await error_response(found)(scope, receive, send)
        elif streams:
            named = scope["path"] in ("/v1/messages", "/v1/responses")
            last = event(found.body["error"] | found.body, "error") if named else openai_error(found)
            await send({"type": "http.response.body", "body": last, "more_body": False})


def _joined(messages: list[Message]) -> list[Message]:
    """The same with one body: a message on its way through Ray costs a millisecond or two of CPU."""
    bodies = [message for message in messages if message["type"] == "http.response.body"]
    others = [message for message in messages if message["type"] != "http.response.body"]
    return others + [{**last, "body": b"".join(each.get("body", b"") for each in bodies)} for last in bodies[-1:]]


def _passed_on(scope: Scope) -> dict[str, Any]:
    return {name: scope.get(name) for name in PASSED_ON}


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application, for `serve run numballama.server.ray_app:app name=value …`. Raises `Error` for wrong options."""
    try:
        options = Options.model_validate(arguments)
    except ValidationError as error:
        raise Error("; ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors())) from None
    if options.device == "auto":
        if not ray.is_initialized():
            raise Error("device=cuda or device=cpu? Before it has connected to the cluster `serve run` cannot tell")
        options.device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    on_gpu = options.device == "cuda"
    gpus = options.arguments.get("gpus", 1)
    most, full = max(options.replicas, options.max_replicas or 0), options.max_sequences + options.queue
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": options.settings.request_timeout_s,  # what is replaced answers its requests
        "graceful_shutdown_wait_loop_s": 0.5,
        "logging_config": QUIET,
    }
    replica = serve.deployment(Replica).options(
        ray_actor_options={"num_cpus": 0 if on_gpu else options.threads or 1, "num_gpus": gpus if on_gpu else 0},
        max_replicas_per_node=None if on_gpu or options.threads else 1,
        max_ongoing_requests=full,
        max_queued_requests=full,
        max_constructor_retry_count=2,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"slack": options.max_sequences}
        ),
        **_scaled(options.replicas, most, options.max_sequences),
        **common,
    )
    front = serve.deployment(serve.ingress()(Front)).options(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100 * FRONT_REQUESTS,
        max_surge_percent=100,
        **_scaled(1, most, FRONT_REQUESTS),
        **common,
    )
    return front.bind(replica.bind(options), options.settings)


def _scaled(fewest: int, most: int, requests: int) -> dict[str, Any]:
    """Ray's options for the number of processes: `fewest`, or up to `most` while each has more than `requests`."""
    if fewest == most:
        return {"num_replicas": fewest}
    limits = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": requests}
    return {"autoscaling_config": limits}


def run(arguments: dict[str, Any], settings: Settings, address: Address, show: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C: on the cluster of RAY_ADDRESS or of this machine, or on a new one of its own.

    SIGHUP replaces the replicas one after the other. Raises `Error` for wrong options, an address that is in use, and
    what a replica could not do.
    """
    if not address.port:
        raise Error("--port 0 and --ray do not go together: Ray's proxies use one port on all machines")
    check_tls(address)
    listen(address).close()
    arguments = {**arguments, "settings": protected(settings, address)}
    try:
        ray.init(namespace="serve", include_dashboard=False, logging_level="warning")
    except Exception as error:  # a bare one where its processes do not start in time
        raise Error(f"Ray could not be reached or started: {error}") from error
    again = threading.Event()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # after Ray has set its own
    signal.signal(signal.SIGHUP, lambda *_: again.set())
    try:
        http = {"host": address.host, "port": address.port}
        http |= {"ssl_certfile": address.tls_certificate, "ssl_keyfile": address.tls_key}
        serve.start(proxy_location="EveryNode", http_options=http, logging_config=QUIET)
        _deploy(app(arguments))
        show(f"numballama serves on Ray at {address.url}")
        show(curl_line(address.url, settings))
        try:
            while again.wait():
                again.clear()
                _deploy(app(arguments))
                show("all replicas have been replaced")
        except KeyboardInterrupt:
            _drain(settings.drain_s)
    except KeyboardInterrupt:
        pass  # before requests were answered, or a second time: it does not wait for what runs
    finally:
        serve.shutdown()
        ray.shutdown()


def _drain(seconds: float) -> None:
    """Let the fronts refuse new requests, and wait until the running ones have ended or their time is over.

    Ray's own shutdown ends its proxies at once, with all that they pass on.
    """
    fronts = serve.get_deployment_handle("Front", "default")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(fronts.broadcast("drain").results(timeout_s=10)):
        time.sleep(0.1)
    time.sleep(LAST_S)


def _deploy(application: serve.Application) -> None:
    """Start an application, or replace the replicas of one that runs, and wait until it is done."""
    try:
        serve.run(application)
    except RuntimeError:
        found = serve.status().applications["default"]
        messages = [each.message.strip() for each in (*found.deployments.values(), found)]
        why = next((message for message in messages if message), "see Ray's log")
        raise Error(f"Ray could not start the replicas: {why.splitlines()[-1]}") from None
