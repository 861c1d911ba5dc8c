"""The page to chat on: static files of this package at `/`, and `/render`, which turns Markdown into HTML.

The browser loads nothing from elsewhere: no library, no font, no image. The page uses the server's public API only.
"""

from __future__ import annotations

import hashlib
from importlib import resources

import anyio
from anyio.to_thread import run_sync
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import ApiError
from ..http import error_response
from .markdown import render

RENDER = "/render"
"""The path that turns Markdown into HTML."""
MAX_RENDER_BYTES = 256 * 1024
BODY_TIMEOUT_S = 30
MAX_RENDERERS = 2
"""Texts that are rendered at the same time. Rendering is Python code, which takes time from the engine's thread."""

FILE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # strings become HTML in one place of the page only
        "trusted-types rendered-markdown",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",  # asked for with If-None-Match each time, so that all files are of one version
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def routes() -> list[Route]:
    """The routes of the page: `/`, its files below `/page/`, and POST `/render`."""
    return [*(_file_route(path, *file) for path, file in _files().items()), _render_route()]


def paths() -> frozenset[str]:
    """The paths of the page and its files, without `/render`."""
    return frozenset(_files())


def _files() -> dict[str, tuple[bytes, str]]:
    """Path → content and media type. `/` is index.html."""
    files = {}
    for file in resources.files(__package__).iterdir():
        kind = next((kind for suffix, kind in FILE_TYPES.items() if file.name.endswith(suffix)), None)
        if kind:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            files[path] = (file.read_bytes(), kind)
    return files


def _file_route(path: str, content: bytes, media_type: str) -> Route:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}

    async def send(request: Request) -> Response:
        known = request.headers.get("if-none-match", "").split(",")
        if any(one.strip().removeprefix("W/") in (tag, "*") for one in known):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return Route(path, send, methods=["GET"])


def _render_route() -> Route:
    renderers = anyio.CapacityLimiter(MAX_RENDERERS)

    async def send(request: Request) -> Response:
        """The body is Markdown in UTF-8, the answer HTML.

        The type text/markdown is required because a page of another site cannot send it: browsers ask the server first.
        """
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "text/markdown":
            return _error(415, "send the Markdown text with Content-Type: text/markdown")
        try:
            with anyio.fail_after(BODY_TIMEOUT_S):
                body = await _read_body(request)
        except TimeoutError:
            return _error(408, f"the text did not come within {BODY_TIMEOUT_S} s")
        except ClientDisconnect:
            return _error(400, "the client closed the connection")
        if len(body) > MAX_RENDER_BYTES:
            return _error(413, f"a text to render may have at most {MAX_RENDER_BYTES:,} bytes")
        try:
            text = body.decode()
        except UnicodeDecodeError as error:
            return _error(400, f"the text is not UTF-8: {error}")
        html = await run_sync(render, text, limiter=renderers)
        return Response(html, media_type="text/html", headers={**HEADERS, "Cache-Control": "no-store"})

    return Route(RENDER, send, methods=["POST"])


async def _read_body(request: Request) -> bytes:
    """The body, or its start where that is already too long."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_RENDER_BYTES:
            break
    return bytes(body)


def _error(status: int, message: str) -> Response:
    response = error_response(ApiError(message, status))
    response.headers.update(HEADERS)
    return response
