"""`create_app`: the ASGI application. What each path does, and what is around all of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from .. import __version__
from . import chat, completions, messages, openapi, page, responses, tokens
from .call import Call
from .client import LOST, Client, ClientGoneError, body_is_late
from .errors import ApiError, failed
from .fields import MAX_PROMPTS, MAX_STOP, MAX_STOPS, Request, parse
from .guard import KEY, Guard
from .http import EventStream, JsonResponse, error_response, read_body
from .metrics import CONTENT_TYPE
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TemplateRequest, TokenizeRequest
from .responses_protocol import ResponsesRequest
from .service import Counts, Service, log
from .settings import Settings

if TYPE_CHECKING:
    from ..chat.text_model import TextModel

Handler = Callable[[Call, Any], Awaitable[Response]]

LARGE_BODY = 1 << 16
"""Bytes of a body from which on work on it is done where others do not wait."""
SMALL_BODY = 1 << 12
"""Bytes of a body up to which work on it may be done on the event loop, see `Service.run_short`."""

POSTS: dict[str, tuple[type[Request], Handler]] = {
    "/v1/chat/completions": (ChatRequest, chat.answer),
    "/v1/completions": (CompletionRequest, completions.answer),
    "/v1/responses": (ResponsesRequest, responses.answer),
    "/v1/messages": (messages.MessagesRequest, messages.answer),
    "/v1/messages/count_tokens": (messages.CountRequest, messages.count_tokens),
    "/tokenize": (TokenizeRequest, tokens.tokenize),
    "/detokenize": (DetokenizeRequest, tokens.detokenize),
    "/apply-template": (TemplateRequest, tokens.apply_chat_template),
}
"""Path → the model of its body, and what answers it."""
GETS = {
    "/": "the page",
    "/health": "whether requests are answered",
    "/metrics": "figures for Prometheus",
    "/openapi.json": "this document",
    "/props": "the model and the limits",
    "/tokenizer_info": "the tokenizer, as vLLM describes it",
    "/v1/models": "the model, as a list",
    "/v1/models/{name:path}": "the model",
}
"""Path → what it gives."""
ALIASES = ("/chat/completions", "/completions", "/responses", "/models")
"""Paths that are answered without /v1 too, as by llama.cpp and mlx-lm: addresses of servers are often given so."""


def create_app(model: TextModel | None, settings: Settings | None = None, counts: Counts | None = None) -> Starlette:
    """An ASGI application that serves a model.

    `model` None: requests are answered with 503 until `app.state.service.ready(model)` is called, from any thread. The
    application starts the engine's thread, and ends it when it shuts down; the model stays open. `counts`:
    those that other processes share.
    """
    service = Service(settings or Settings(), counts)
    if model is not None:
        service.ready(model)
    gets: dict[str, Callable[[Service, HttpRequest], Awaitable[Response]]] = {
        "/health": _health,
        "/metrics": _metrics,
        "/openapi.json": _openapi,
        "/props": _props,
        "/tokenizer_info": _tokenizer_info,
        "/v1/models": _models,
        "/v1/models/{name:path}": _model,
    }
    posts = {path: Post(service, *post) for path, post in POSTS.items()}
    routes: list[BaseRoute] = [Route(path, partial(_get, service, answer)) for path, answer in gets.items()]
    routes += [Route(path, post, methods=["POST"]) for path, post in posts.items()]
    named = {route.path: route for route in routes if isinstance(route, Route)}
    routes += [Route(path, named[f"/v1{path}"].endpoint, methods=named[f"/v1{path}"].methods) for path in ALIASES]
    routes += page.routes()
    posts |= {path: posts[f"/v1{path}"] for path in ALIASES if f"/v1{path}" in posts}

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            service.close()

    app = Application(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )
    app.state.service = service
    app.guard = Guard(app.route, posts, service, frozenset([*POSTS, *GETS, *ALIASES, page.RENDER]))
    return app


class Application(Starlette):
    """What the guard lets in and does not give to a `Post` itself takes Starlette's way."""

    guard: Guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.guard(scope, receive, send)

    async def route(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)


async def _get(
    service: Service, answer: Callable[[Service, HttpRequest], Awaitable[Response]], request: HttpRequest
) -> Response:
    try:
        return await answer(service, request)
    except ApiError as error:
        return error_response(error)
    except Exception as error:
        return _unexpected(error)


class Post:
    """The ASGI application that answers POST requests to a path. `kind`: the model of their body."""

    def __init__(self, service: Service, kind: type[Request], handler: Handler) -> None:
        self._service, self._kind, self._handler = service, kind, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings, key = self._service.settings, scope.get(KEY)
        call = Call(self._service, None if key is None else f"key-{key}")
        client = Client(receive, scope.get(LOST))
        try:
            try:
                reading = read_body(Headers(scope=scope), receive, settings.max_body)
                body = await client.run(reading, settings.body_timeout_s, body_is_late)
                if settings.log_prompts:
                    log.info("body: %s", body.decode("utf-8", "replace"))
                client.watch()
                found = await client.run(self._answer(call, body), settings.request_timeout_s)
                if isinstance(found, EventStream):
                    found.client = client
            except ClientGoneError:
                found = Response(status_code=499)  # nobody reads it; the log shows it
            except ApiError as error:
                found = error_response(error)
            except Exception as error:
                found = _unexpected(error)
            found.raw_headers.append((b"x-request-id", call.key.encode()))
            await found(scope, receive, send)
        finally:
            client.close()

    async def _answer(self, call: Call, body: bytes) -> Response:
        _ = call.service.model  # 503 before the body is looked at
        call.is_large, call.is_small = len(body) > LARGE_BODY, len(body) <= SMALL_BODY
        kind = self._kind
        parsed = await call.run(parse, kind, body) if call.is_large else parse(kind, body)
        found = await self._handler(call, parsed)
        if parsed.ignored:
            plain = (name for name in parsed.ignored if name.isascii() and name.replace(".", "").isidentifier())
            names = ",".join(name[:200] for name in plain)
            found.headers["X-Ignored-Fields"] = names
        return found


def _unexpected(error: Exception) -> Response:
    """A 500 in OpenAI's shape for what nobody expected."""
    log.error("a request failed", exc_info=error)
    return error_response(failed(error))


async def _api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    answer = error_response(ApiError(error.detail, error.status_code, code=code))
    answer.headers.update(error.headers or {})
    return answer


async def _health(service: Service, request: HttpRequest) -> Response:
    await service.refresh()
    if (why := service.unhealthy()) is not None:
        raise ApiError(why, 503, code="unhealthy", retry_after=5)
    return JsonResponse({"status": "ok"})


async def _metrics(service: Service, request: HttpRequest) -> Response:
    return Response(await service.figures(), media_type=CONTENT_TYPE)


async def _openapi(service: Service, request: HttpRequest) -> Response:
    return JsonResponse(
        openapi.document(
            {path: kind for path, (kind, _) in POSTS.items()},
            {path.replace(":path", ""): text for path, text in GETS.items()},
        )
    )


def _model_entry(service: Service) -> dict[str, Any]:
    """What /v1/models says of the model: OpenAI's fields and vLLM's."""
    model = service.model
    return {
        "id": service.name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "numballama",
        "root": service.name,
        "parent": None,
        "max_model_len": model.context,
    }


async def _models(service: Service, request: HttpRequest) -> Response:
    return JsonResponse({"object": "list", "data": [_model_entry(service)]})


async def _model(service: Service, request: HttpRequest) -> Response:
    name = request.path_params["name"]
    if name != service.name:
        raise ApiError(f"there is no model {name!r:.200}", 404, param="model", code="model_not_found")
    return JsonResponse(_model_entry(service))


async def _tokenizer_info(service: Service, request: HttpRequest) -> Response:
    """What lm-eval asks for before it uses /tokenize. Names are those of tokenizer_config.json."""
    tokenizer = service.tokenizer
    bos, eos = (None if token is None else tokenizer.piece(token) for token in (tokenizer.bos_id, tokenizer.eos_id))
    return JsonResponse(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": service.model.context,
            "bos_token": bos,
            "eos_token": eos,
            "chat_template": await service.run(lambda: service.chat_template),
        }
    )


async def _props(service: Service, request: HttpRequest) -> Response:
    model, settings = service.model, service.settings
    tokenizer = model.tokenizer
    template = await service.run(lambda: service.chat_template)

    def piece(token: int | None) -> str | None:
        return None if tokenizer is None or token is None else tokenizer.piece(token)

    return JsonResponse(
        {
            "model_name": service.name,
            "build_info": f"numballama {__version__}",
            "device": model.device,
            "total_slots": model.max_sequences,
            "context": model.context,
            "kv_tokens": model.kv_tokens,
            "vocab_size": model.config.vocab_size,
            "chat_template": template,
            "bos_token": piece(None if tokenizer is None else tokenizer.bos_id),
            "eos_token": piece(None if tokenizer is None else tokenizer.eos_id),
            "modalities": {"vision": False, "audio": False},
            "tools": True,
            "default_generation_settings": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
            "limits": {
                "body_bytes": settings.max_body,
                "prompts": MAX_PROMPTS,
                "stop_strings": MAX_STOPS,
                "stop_string_characters": MAX_STOP,
                "request_seconds": settings.request_timeout_s,
            },
        }
    )
