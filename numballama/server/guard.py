"""`Guard`: what every request passes before its route: host, API key, shutting down; and the log."""

from __future__ import annotations

import base64
import hmac
import json
import logging
import time
from collections.abc import Mapping
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .http import error_response
from .page import RENDER, paths
from .service import DRAINING, Service

log = logging.getLogger("numballama.server")

OPEN = ("/health",)
"""Paths that need no key."""
UNCOUNTED = ("/health", "/metrics")
"""Paths that are answered while the server shuts down, and that are no lines in the log."""
PAGE = paths()
"""Paths of the page. A browser cannot send a key for them by itself: it asks for a password, which is the key."""
BASIC = 'Basic realm="numballama: the password is an API key", charset="UTF-8"'
QUIET = PAGE | {RENDER}
"""Paths that are lines in the log only where something went wrong."""
KEY = "numballama.key"
"""Where an ASGI scope holds the number of the API key that the request came with, or None."""


class Guard:
    """ASGI middleware. Answers 400 to a wrong Host header, 401 without a key, 503 while shutting down.

    `posts`: path → what answers POST requests to it, past the layers of `app`, which cost time at each event of an
    answer. `paths`: those that are counted by their names.
    """

    def __init__(self, app: ASGIApp, posts: Mapping[str, ASGIApp], service: Service, paths: frozenset[str]) -> None:
        self._app, self._posts, self._service, self._paths = app, posts, service, paths
        self._keys = [key.encode() for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, path = time.monotonic(), 500, scope["path"]
        counted = path not in UNCOUNTED

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._service.active += counted
        try:
            self._check(scope, path)
        except ApiError as error:
            answer = error_response(error)
            if self._service.draining:  # a kept connection would hold up the end, and the client's next request
                answer.raw_headers.append((b"connection", b"close"))
            await answer(scope, receive, watched)
        else:
            post = self._posts.get(path) if scope["method"] == "POST" and not scope.get("root_path") else None
            await (post or self._app)(scope, receive, watched)
        finally:
            self._service.active -= counted
            self._service.metrics.answered(path if path in self._paths else "other", status)
            if counted and (path not in QUIET or status >= 400):
                _log(scope["method"], path, status, time.monotonic() - started)

    def _check(self, scope: Scope, path: str) -> None:
        headers = Headers(scope=scope)
        hosts = self._service.settings.allowed_hosts
        if hosts is not None and _name(headers.get("host", "")) not in hosts:
            raise ApiError(f"the Host header must name one of {', '.join(hosts)}", 400, code="invalid_host")
        scope[KEY] = None
        if self._keys and path not in OPEN:
            scope[KEY] = self._find(headers, BASIC if path in PAGE else "Bearer")
        if self._service.draining and path not in UNCOUNTED:
            raise ApiError(DRAINING, 503, code="draining", retry_after=5)

    def _find(self, headers: Headers, scheme: str) -> int:
        """Which key the request has. All are compared, each in constant time. Raises `ApiError` 401 with `scheme`."""
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key", "").encode("latin-1")
        if kind.lower() == "bearer":
            given = value.strip().encode("latin-1")
        elif kind.lower() == "basic":
            given = _password(value)
        found = [hmac.compare_digest(given, key) for key in self._keys]
        if True not in found:
            what = "wrong" if given else "missing: send it as `Authorization: Bearer …` or X-Api-Key"
            raise ApiError(f"the API key is {what}", 401, code="invalid_api_key", scheme=scheme)
        return found.index(True)


def _password(value: str) -> bytes:
    """The password of HTTP's Basic scheme; empty if there is none."""
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0].lower()


def _log(method: str, path: str, status: int, seconds: float) -> None:
    record = {
        "method": method,
        "path": quote(path[:200]),
        "status": status,
        "seconds": round(seconds, 4),
    }
    log.info("%s %s %d %.3f s", *record.values(), extra={"fields": record})


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
