"""The OpenAPI document, made from the request models."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from .. import __version__
from .answers import ANSWERS, ErrorAnswer

REFERENCE = "#/components/schemas/{model}"
ERRORS = {
    "400": "a field is wrong or not supported",
    "401": "the API key is missing or wrong",
    "413": "the body is too large",
    "415": "the body is not JSON",
    "429": "the queue is full",
    "500": "the server failed",
    "503": "the model is being loaded, or the server is shutting down",
}
STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def document(requests: dict[str, type[BaseModel]], pages: dict[str, str]) -> dict[str, Any]:
    """The document. `requests`: path → model of its body, for POST. `pages`: path → what GET gives."""
    inputs: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in requests.values()]
    outputs: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "serialization") for model in ANSWERS.values()]
    outputs.append((ErrorAnswer, "serialization"))
    names, definitions = models_json_schema([*inputs, *outputs], ref_template=REFERENCE)
    failures = {status: _answer(text, names[ErrorAnswer, "serialization"]) for status, text in ERRORS.items()}
    paths: dict[str, Any] = {}
    for path, model in requests.items():
        answer = ANSWERS.get(path)
        good = _answer("the answer", {} if answer is None else names[answer, "serialization"])
        if path in STREAMS:
            good["content"]["text/event-stream"] = {}  # OpenAPI 3.1 has no schema for events
        paths[path] = {
            "post": {
                "summary": (model.__doc__ or "").splitlines()[0],
                "requestBody": {"required": True, "content": _json(names[model, "validation"])},
                "responses": {"200": good, **failures},
            }
        }
    for path, text in pages.items():
        parameters = [
            {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string"}}
            for part in path.split("/")
            if part.startswith("{")
        ]
        operation: dict[str, Any] = {"summary": text, "responses": {"200": {"description": text}}}
        if path != "/health":
            operation["responses"]["401"] = failures["401"]
        if parameters:
            operation["parameters"] = parameters
            operation["responses"]["404"] = _answer("there is no such model", names[ErrorAnswer, "serialization"])
        operation["responses"]["503"] = failures["503"]
        paths.setdefault(path, {})["get"] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "numballama", "version": __version__, "description": "Text generation over HTTP."},
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _answer(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": _json(schema)}
